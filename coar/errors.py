"""Every error a user can cause: one base class, and each kind also the matching built-in."""


class CoarError(Exception):
    """Base of all errors of this package; the message ends with the remedy."""


class SettingsError(CoarError, ValueError):
    """A setting, such as a fraction, a count or a device, is out of range or unknown."""


class ComponentError(CoarError, ValueError):
    """A pattern matches nothing, or a component is not part of the model."""


class AblationError(CoarError, ValueError):
    """An ablation has no meaning for these components, or a gate never saw the forward pass."""


class ExamplesError(CoarError, ValueError):
    """Inputs, targets and metadata do not fit each other."""


class OutputError(CoarError, ValueError):
    """The model's result does not fit the output function, or an output is not finite."""


class PrecisionError(CoarError, ValueError):
    """A lower precision moved the outputs further than the stated tolerance."""


class WeightsError(CoarError, ValueError):
    """A file of weights is unsafe, damaged, or made for another model."""


class RunError(CoarError, ValueError):
    """A path does not hold a run that this version can use."""


class MismatchError(RunError):
    """A study differs from the one that a run was made for."""


class IncompleteRunError(RunError):
    """Something asked of a run needs units that have not been collected."""


class CorruptRunError(RunError):
    """A chunk of a run cannot be read or fails its checksum."""


class StorageError(CoarError, OSError):
    """The disk refused a write: full, read-only, or not permitted."""


class EngineError(CoarError, RuntimeError):
    """A cluster cannot be reached, or its workers cannot do the work."""


class RegressionError(CoarError, ValueError):
    """A fit was asked for that the masks cannot support."""


class GoalError(CoarError, ValueError):
    """An editing goal selects no examples, the same example twice, or reads a column that is not there."""


class BoundError(GoalError):
    """No set of components nears a goal without breaking the bound on harm."""


class EditError(CoarError, ValueError):
    """An edit does not fit the model or its file is damaged."""


class PipelineError(CoarError, ValueError):
    """A pipeline file is missing, cannot be imported, or lacks what a pipeline must define."""


class RenamedNameError(CoarError, AttributeError):
    """A name of an earlier version was used; the message has the new one."""


class RenamedArgumentError(CoarError, TypeError):
    """A keyword argument of an earlier version was given; the message has the new one."""


class RenamedModuleError(CoarError, ModuleNotFoundError):
    """A module of an earlier version was imported; the message says where its content is now."""
