"""The errors that a user can cause: one base class, and each kind also a subclass of the matching built-in."""


class CoarError(Exception):
    """Base of all errors of this package; the message ends with the remedy."""


class SettingsError(CoarError, ValueError):
    """A setting, such as a fraction, a count or a device, is out of range or unknown."""


class ComponentError(CoarError, ValueError):
    """A pattern matches nothing, or a component is not part of the model."""


class AblationError(CoarError, ValueError):
    """An ablation is not defined for these components, or a gate was not reached by the forward pass."""


class ExamplesError(CoarError, ValueError):
    """Inputs, targets and metadata do not fit together."""


class OutputError(CoarError, ValueError):
    """The model's result does not fit the output function, or an output is not finite."""


class PrecisionError(CoarError, ValueError):
    """A lower precision moved the outputs by more than the tolerance."""


class WeightsError(CoarError, ValueError):
    """A file of weights is unsafe, damaged, or made for another model."""


class RunError(CoarError, ValueError):
    """A path holds no run that this version can read."""


class MismatchError(RunError):
    """A study differs from the one that a run was made for."""


class IncompleteRunError(RunError):
    """An operation needs units of a run that have not been collected."""


class CorruptRunError(RunError):
    """A chunk of a run cannot be read or fails its checksum."""


class StorageError(CoarError, OSError):
    """The disk refused a write: full, read-only, or not permitted."""


class EngineError(CoarError, RuntimeError):
    """A cluster cannot be reached, or its workers cannot do the work."""


class RegressionError(CoarError, ValueError):
    """The masks of a run cannot support the requested fit."""


class GoalError(CoarError, ValueError):
    """An editing goal selects no examples, the same example twice, or reads a missing column."""


class BoundError(GoalError):
    """No evaluated set of components improves on the goal within the bound on harm."""


class EditError(CoarError, ValueError):
    """An edit does not fit the model or its file is damaged."""


class CircuitError(CoarError, ValueError):
    """A circuit does not fit the model, the study or another circuit, or its file is damaged."""


class PipelineError(CoarError, ValueError):
    """A pipeline file is missing, cannot be imported, or lacks what a pipeline must define."""


class RenamedNameError(CoarError, AttributeError):
    """A name of an earlier version was used; the message has the new one."""


class RenamedArgumentError(CoarError, TypeError):
    """A keyword argument of an earlier version was given; the message has the new one."""


class RenamedModuleError(CoarError, ModuleNotFoundError):
    """A module of an earlier version was imported; the message says where its content is now."""


def install_hint(extra: str) -> str:
    """Return how to install what an extra of this package brings.

    It names a clone: an index may hold another package under a name of ours.
    """
    return f"install it from the root of a clone of this repository, with: pip install '.[{extra}]'"
