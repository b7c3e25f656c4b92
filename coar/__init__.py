"""Component attribution: which parts of a network made a prediction, and how to change that for good."""

from coar._version import __version__
from coar.ablation import Mean, Optimal, Peak, PositionMean, Resample, ZeroActivation, ZeroWeight, choose_ablation
from coar.attributions import Attributions, load
from coar.baselines import gradient_x_gate, leave_one_out
from coar.components import (
    Component,
    Components,
    attention_heads,
    conv_filters,
    experts,
    input_features,
    modules,
    neurons,
    parameter_slices,
)
from coar.editing import (
    Bound,
    Edit,
    EditGoal,
    Selection,
    TradeOff,
    edit,
    fix_errors,
    forget_class,
    judge_edit,
    predict_edit,
    predicted_edit,
    reach_goal,
    remove_backdoor,
    resist_typographic,
    select,
    strengthen_group,
)
from coar.engines import collect
from coar.errors import CoarError
from coar.evaluation import Evaluation, evaluate
from coar.examples import Examples, token_examples
from coar.outputs import (
    ChoiceMargin,
    ClassLogit,
    CorrectClassMargin,
    CosineSimilarity,
    CrossEntropy,
    TokenLogProbability,
    TokenMargin,
    ZeroShotMargin,
)
from coar.regression import fit
from coar.sampling import BernoulliSampler, FixedSizeSampler
from coar.store import Problem, Run, repair, verify
from coar.study import Study
from coar.weights import load_weights, save_weights

__all__ = [
    "Attributions",
    "BernoulliSampler",
    "Bound",
    "ChoiceMargin",
    "ClassLogit",
    "CoarError",
    "Component",
    "Components",
    "CorrectClassMargin",
    "CosineSimilarity",
    "CrossEntropy",
    "Edit",
    "EditGoal",
    "Evaluation",
    "Examples",
    "FixedSizeSampler",
    "Mean",
    "Optimal",
    "Peak",
    "PositionMean",
    "Problem",
    "Resample",
    "Run",
    "Selection",
    "Study",
    "TokenLogProbability",
    "TokenMargin",
    "TradeOff",
    "ZeroActivation",
    "ZeroShotMargin",
    "ZeroWeight",
    "__version__",
    "attention_heads",
    "choose_ablation",
    "collect",
    "conv_filters",
    "edit",
    "evaluate",
    "experts",
    "fit",
    "fix_errors",
    "forget_class",
    "gradient_x_gate",
    "input_features",
    "judge_edit",
    "leave_one_out",
    "load",
    "load_weights",
    "modules",
    "neurons",
    "parameter_slices",
    "predict_edit",
    "predicted_edit",
    "reach_goal",
    "remove_backdoor",
    "repair",
    "resist_typographic",
    "save_weights",
    "select",
    "strengthen_group",
    "token_examples",
    "verify",
]
