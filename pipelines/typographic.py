"""A miniature CLIP that is misled by written words: scans of digits, and labels that name another digit.

    pip install '.[text]'
    coar collect pipelines/typographic.py
    coar fit runs/typographic-mean.zarr
    coar edit runs/typographic-mean.zarr --pipeline pipelines/typographic.py --task typographic

The pictures are scikit-learn's digits, scans of 8 x 8 pixels, enlarged. Half of the training pictures carry a label
with a word drawn at random, and the caption of such a picture names the word more often than the digit. So the model
reads, and its zero-shot classification follows the word rather than the digit, as in CLIP (Goh et al. 2021,
"Multimodal Neurons in Artificial Neural Networks", section on typographic attacks). It is trained on first use, in one
to two minutes on two cores, and kept under data/typographic.
"""

from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import ImageFont
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional

import coar
from pipelines import studies, training, zero_shot

try:
    from transformers import CLIPConfig, CLIPModel
except ImportError as error:
    raise coar.errors.PipelineError(
        f"the pipeline typographic needs {error.name}, which is not installed; {coar.errors.install_hint('text')}"
    ) from None

MASKS = 3_000
TEST_MASKS = 300
TEST_FRACTIONS = (0.05, 0.20)
GOAL = coar.EditGoal(
    targets="attacked == 1", references="attacked == 0", direction="increase", pairs="pair", clusters="scan"
)

FOLDER = Path("data/typographic")
RECIPE = training.Recipe(epochs=10, batch=128, learning_rate=2e-3, weight_decay=0.05)
TRAIN, STUDIED, CHOOSING = 1_000, 150, 250  # of 1,797 scans; the other 397 are for judging
VARIANTS = 16  # training pictures per scan
LABELLED, TOLD = 0.5, 0.75  # share of pictures with a label, and of captions that name its word, not the digit
CALIBRATION = 500

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PROMPTS = ("a picture of {}", "a {}", "the number {}")  # captions for training; the first is also the classes' prompt
VOCABULARY = ("<pad>", "<start>", "a", "picture", "of", "the", "number", *WORDS, "<end>")
LENGTH = 6  # tokens of a padded caption

SIDE, SCAN = 32, 24  # pixels of a picture, and of the scan in it
TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4}


def tokens(captions: list[str]) -> dict[str, Tensor]:
    """Return `input_ids` and `attention_mask` (captions, length)."""
    ids = torch.zeros(len(captions), LENGTH, dtype=torch.long)
    for row, caption in enumerate(captions):
        words = ["<start>", *caption.split(), "<end>"]
        ids[row, : len(words)] = torch.tensor([VOCABULARY.index(word) for word in words])
    return {"input_ids": ids, "attention_mask": (ids > 0).long()}


@cache
def written(word: str) -> np.ndarray:
    """Return a white label with a black word, (10, width) greys, in the bitmap font that comes with Pillow."""
    ink = ImageFont.load_default_imagefont().getmask(str(word), mode="1")  # Pillow draws nothing for numpy's strings
    return 0.9 * (np.array(ink).reshape(ink.size[::-1])[1:] == 0).astype(np.float32)


@cache
def scans() -> tuple[np.ndarray, np.ndarray]:
    """Return (1797, 24, 24) greys and their digits."""
    data = load_digits()
    small = torch.from_numpy(data.images / 16).float()[:, None]
    large = functional.interpolate(small, size=(SCAN, SCAN), mode="bilinear", align_corners=False)
    return large[:, 0].numpy(), data.target


@cache
def split() -> dict[str, np.ndarray]:
    """Return the rows of the scans for `train`, `studied`, `choosing` and `judge`, each with all ten digits."""
    rest, parts = np.arange(len(scans()[1])), {}
    for name, size in (("train", TRAIN), ("studied", STUDIED), ("choosing", CHOOSING)):
        parts[name], rest = train_test_split(rest, train_size=size, stratify=scans()[1][rest], random_state=0)
    return {**parts, "judge": rest}


def draw(rows: np.ndarray, words: np.ndarray, seed: int) -> Tensor:
    """Draw (n, 1, 32, 32) pictures of scans, with a label above or below the digit where the word is not -1.

    Places and greys depend on the seed alone, so pictures of the same rows and seed differ only in their labels.
    """
    random = np.random.default_rng(seed)
    upper, lower = random.integers(0, 2, (2, len(rows)))  # digit above or below, and how far from the edge
    left = random.integers(0, SIDE - SCAN + 1, len(rows))
    place, ink = random.random((2, len(rows)))
    pictures = np.zeros((len(rows), 1, SIDE, SIDE), dtype=np.float32)
    for i, row in enumerate(rows):
        top = lower[i] if upper[i] else SIDE - SCAN - lower[i]
        pictures[i, 0, top : top + SCAN, left[i] : left[i] + SCAN] = scans()[0][row] * (0.6 + 0.4 * ink[i])
        if words[i] >= 0:
            label = written(WORDS[words[i]])
            height, width = label.shape
            y, x = (SIDE - height) * int(upper[i]), round(place[i] * (SIDE - width))
            pictures[i, 0, y : y + height, x : x + width] = label
    return torch.from_numpy(pictures)


@cache
def captioned() -> coar.Examples:
    """Return the training examples: pictures, half of them with labels, and captions; targets are not read."""
    random = np.random.default_rng(0)
    rows = np.tile(split()["train"], VARIANTS)
    labelled = random.random(len(rows)) < LABELLED
    words = np.where(labelled, random.integers(0, len(WORDS), len(rows)), -1)
    named = np.where(labelled & (random.random(len(rows)) < TOLD), words, scans()[1][rows])
    prompts = random.integers(0, len(PROMPTS), len(rows))
    captions = [PROMPTS[prompt].format(WORDS[name]) for prompt, name in zip(prompts, named, strict=True)]
    return coar.Examples(
        inputs={"pixel_values": draw(rows, words, seed=0), **tokens(captions)}, targets=torch.from_numpy(named)
    )


def examples(*names: str, seed: int = 1) -> coar.Examples:
    """Return pairs of scans of some parts: all without a label, then all with the name of another digit.

    A part that is named several times is drawn each time with other places, greys and words.
    """
    rows = np.concatenate([split()[name] for name in names])
    again = np.concatenate([np.full(len(split()[name]), names[:i].count(name)) for i, name in enumerate(names)])
    numbers = rows + len(scans()[1]) * again
    labels = scans()[1][rows]
    nothing = np.full(len(rows), -1)
    words = (labels + np.random.default_rng(seed).integers(1, len(WORDS), len(rows))) % len(WORDS)
    attacked = np.repeat([0, 1], len(rows))
    return coar.Examples(
        inputs=torch.cat([draw(rows, word, seed=seed) for word in (nothing, words)]),
        targets=torch.from_numpy(np.tile(labels, 2)),
        metadata={
            "id": 2 * np.tile(numbers, 2) + attacked,
            "pair": np.tile(numbers, 2),
            "scan": np.tile(rows, 2),
            "attacked": attacked,
            "word": [*[""] * len(rows), *[WORDS[word] for word in words]],
        },
    )


def clip() -> nn.Module:
    """Return a miniature CLIP with random weights."""
    ids = {f"{name}_token_id": VOCABULARY.index(f"<{word}>") for name, word in (("bos", "start"), ("eos", "end"))}
    text = {**TEXT, **ids, "pad_token_id": 0, "vocab_size": len(VOCABULARY), "max_position_embeddings": LENGTH}
    vision = {**VISION, "num_channels": 1, "image_size": SIDE, "patch_size": 8}
    # the eager attention kernel gives gradients on every device
    options = {"projection_dim": 32, "attn_implementation": "eager"}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, **options))


def contrastive_loss(model: nn.Module, inputs: dict[str, Tensor], _: Tensor) -> Tensor:
    """Return CLIP's contrastive loss over the captions and pictures of a batch, in both directions."""
    return model(**inputs, return_loss=True).loss


def classifier(model: nn.Module) -> zero_shot.ZeroShot:
    """Return a CLIP as a zero-shot classifier of digits."""
    return zero_shot.ZeroShot(model, tokens([PROMPTS[0].format(word) for word in WORDS]))


def model(training_seed: int = 0) -> zero_shot.ZeroShot:
    """Return the classifier, trained on first use and kept under data/typographic."""
    return classifier(
        training.fitted(
            clip,
            captioned(),
            RECIPE,
            loss=contrastive_loss,
            folder=FOLDER,
            seed=training_seed,
            about="a minute or two",
            report=lambda net: training.accuracy_by("attacked", classifier(net), judge()),
        )
    )


def study(
    *, ablation: str = "mean", ablated_fraction: float = 0.10, seed: int = 0, training_seed: int = 0
) -> coar.Study:
    """Define the study of 150 pairs; `ablation` is `mean`, with heads split into features, or `zero`."""
    net = model(training_seed)
    return studies.of_margins(
        net,
        examples("studied"),
        components=zero_shot.components(net, ablation),
        calibration=calibration(),
        ablation=ablation,
        ablated_fraction=ablated_fraction,
        seed=seed,
    )


def calibration() -> coar.Examples:
    """Return 500 training scans without labels, so that means are those of pictures without words."""
    return examples("train").subset(range(CALIBRATION))


def choosing() -> coar.Examples:
    """Return pairs to choose edits on: the scans for choosing, drawn three times, and those of training."""
    return examples("choosing", "choosing", "choosing", "train", seed=2)


def judge() -> coar.Examples:
    """Return pairs of the other 397 scans, which no training, attribution or choice has seen."""
    return examples("judge")
