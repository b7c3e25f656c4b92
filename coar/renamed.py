"""Old public names, each refused with the new name.

The tables list names that a released page or message contained. There are no aliases: an old name raises an error that
names the new one.
"""

import functools
from collections.abc import Callable, Iterable
from typing import ParamSpec, TypeVar

from coar.errors import RenamedArgumentError, RenamedModuleError, RenamedNameError, SettingsError

P = ParamSpec("P")
T = TypeVar("T")

NAMES = {  # of `coar`, and of its former modules
    "gradient_x_gate": "coar.mask_gradient",
    "agreement": "coar.equivalence",
    "batches": "coar.forward.batches",
    "checks": "coar.preflight",
    "circuit_figure": "coar.Circuit.plot",
    "devices": "coar.forward.devices",
    "engines": "coar.collection",
    "expressions": "coar.editing.goal",
    "predicted_edit": "coar.edit(rule='predicted')",
    "memory": "coar.forward.malloc",
    "narrowing": "coar.forward.logit_positions",
    "planning": "coar.collection",
    "trimming": "coar.forward.length_bucketing",
    "tuning": "coar.forward.autotune",
    "worker": "coar.forward.runner",
    "ablation.Gates": "coar.gates.gates.Gates",
    "ablation.following_batch_norms": "coar.gates.batch_norms.following_batch_norms",
    "editing.effect_curve": "coar.editing.judge.effect_curve",
    "editing.welch_t": "coar.editing.select.welch_t",
    "outputs.class_logits": "coar.outputs.classification.class_logits",
    "outputs.token_logits": "coar.outputs.tokens.token_logits",
    "store.Probes": "coar.store.gradients.MaskGradients",
    "store.copy": "coar.store.copying.copy",
    "store.merge": "coar.store.copying.merge",
}
EXECUTION = {
    name: f"execution=coar.Execution({name}=...)"
    for name in ("batch_size", "memory_limit", "compile", "precision_tolerance", "mask_block", "example_block")
}
ARGUMENTS = {  # by function, or by class of settings
    "collect": {"probes": "gradients=", **EXECUTION},
    "collect_until": {"probes": "gradients=", **EXECUTION},
    "estimate": {"probes": "gradients=", "batch_size": EXECUTION["batch_size"]},
    "fit": {"probes": "gradients="},
    "select": {"near": "n_boundary_references="},
    "TradeOff": {"harm": "harm_weight="},
}
MEMBERS = {  # by base class
    "Output": {"tells_right": "hard_and_smooth", "sign_means_correct": "hard_and_smooth"},
    "Ablation": {"donors": "sources"},
}
ATTRIBUTES = {  # by class of results
    "Attributions": {"facts": "fit or origin"},
    "Selection": {"steps": "evaluated"},
}
VALUES = {  # by setting
    "strength": {"whole": "full", "least": "minimal", "own": "per_component"},
    "fit": {"gradient_x_gate": "mask_gradient"},
}
OPTIONS = {"--probes": "--gradients"}  # of the command line


def refuse_name(name: str) -> None:
    """Raise `RenamedNameError` for an old attribute of `coar`."""
    if name in NAMES:
        raise RenamedNameError(f"coar.{name} does not exist any more; use {NAMES[name]}")


def no_attribute(found: object, name: str) -> AttributeError:
    """Return the error for an attribute that a result lacks; for an old attribute it names the new one."""
    owner = type(found).__name__
    new = ATTRIBUTES.get(owner, {}).get(name)
    if new:
        return RenamedNameError(f"{owner}.{name} does not exist any more; use {new}")
    return AttributeError(f"{owner!r} object has no attribute {name!r}", name=name, obj=found)


def refuse_arguments(owner: str, given: Iterable[str]) -> None:
    """Raise `RenamedArgumentError` for the first old keyword argument among those given to a function or class."""
    old = ARGUMENTS.get(owner, {})
    for name in given:
        if name in old:
            raise RenamedArgumentError(f"{owner} does not take {name}= any more; use {old[name]}")


def refuse_value(of: str, value: object) -> None:
    """Raise `SettingsError` for an old value of a setting."""
    old = VALUES.get(of, {})
    if isinstance(value, str) and value in old:
        raise SettingsError(f"the {of} {value!r} does not exist any more; use {old[value]!r}")


def refuse_members(made: type) -> None:
    """Raise `RenamedNameError` for a class that defines a member under its old name, which nothing would call."""
    for base in made.__mro__[1:]:
        for old, new in MEMBERS.get(base.__name__, {}).items():
            if old in vars(made):
                raise RenamedNameError(f"{made.__name__} defines {old}, which does not exist any more; call it {new}")


def new_arguments_only(function: Callable[P, T]) -> Callable[P, T]:
    """Decorate a function to refuse its old keyword arguments by `refuse_arguments`."""

    @functools.wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> T:
        refuse_arguments(function.__name__, kwargs)
        return function(*args, **kwargs)

    return checked


class OldModules:
    """An import finder, the last in order, that refuses old modules and old names of subpackages."""

    @staticmethod
    def find_spec(name: str, *_: object) -> None:
        """Raise `RenamedModuleError` for an old name of this package; return None for any other."""
        import coar

        inner = name.removeprefix("coar.")
        if inner == name:
            return
        last = inner.rpartition(".")[2]
        new = NAMES.get(inner) or (f"coar.{last}" if "." in inner and last in dir(coar) else None)
        if new:
            raise RenamedModuleError(
                f"{name} does not exist any more; use {new} (public names are imported from coar itself)"
            )
