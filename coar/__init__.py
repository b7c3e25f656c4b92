"""Component attribution: which parts of a network made a prediction, and how to change that for good."""

from coar._version import __version__
from coar.ablation import Mean, ZeroWeight
from coar.components import Component, Components, conv_filters, neurons, parameter_slices
from coar.engines import collect
from coar.errors import CoarError
from coar.examples import Examples
from coar.outputs import ClassLogit, CorrectClassMargin, CrossEntropy
from coar.sampling import BernoulliSampler, FixedSizeSampler
from coar.store import Run
from coar.study import Study
from coar.weights import load_weights, save_weights
