"""Which scalar is read off the model for each example."""

from coar.outputs.base import Output
from coar.outputs.classes import ClassLogit, CorrectClassMargin, CrossEntropy, class_logits
from coar.outputs.embeddings import CosineSimilarity, ZeroShotMargin
from coar.outputs.tokens import ChoiceMargin, TokenLogProbability, TokenMargin, token_logits

__all__ = [
    "ChoiceMargin",
    "ClassLogit",
    "CorrectClassMargin",
    "CosineSimilarity",
    "CrossEntropy",
    "Output",
    "TokenLogProbability",
    "TokenMargin",
    "ZeroShotMargin",
    "class_logits",
    "token_logits",
]
