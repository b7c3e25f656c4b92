"""An edit: components to ablate permanently; it is applied, undone, joined with others, and stored."""

import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from coar.ablation.base import Ablation
from coar.attributions import Attributions
from coar.charts import html_table, signed_bars
from coar.components.layers import unwrapped
from coar.components.table import Component, read_component
from coar.editing import saving
from coar.editing.goal import EditGoal
from coar.errors import EditError, SettingsError, StorageError, WeightsError
from coar.examples import Examples
from coar.forward.copies import device_copy
from coar.forward.model_runner import ModelRunner
from coar.gates.batch_norms import following_batch_norms
from coar.gates.folding import Constant, added_parameters, check_permanent, fold
from coar.model_code import differences, model_code
from coar.model_copy import independent_copy
from coar.store.run import UNKNOWN
from coar.study import Study
from coar.weights import read_state, save_state, state_fingerprint, weights_fingerprint

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

log = logging.getLogger(__name__)

FORMAT = 3
CHECKED = 32  # examples on which batch norms are found
LISTED = 5  # differences of code in a message
NAMED = 3  # components in a text of an edit
Code = dict[str, dict[str, str]]  # a result of `model_code`
State = Mapping[str, Tensor]
AT, WAS = "@at", "@was"  # after a tensor's name: changed positions, and their original numbers
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes per number


@dataclass(frozen=True, eq=False)
class Originals:
    """Every number that an edit changed, with its original value.

    Attributes:
        tensors: By `<name>@at` the (changed,) positions in a flattened tensor of the state dict, and by `<name>@was`
            their original numbers.
        added: Tensors that the edit added, such as a bias.
        edited: SHA-256 of the edited weights.
    """

    tensors: dict[str, Tensor]
    added: tuple[str, ...]
    edited: str

    @classmethod
    def between(cls, before: State, after: State) -> "Originals":
        """Compare two state dicts bit by bit; the second must have all names of the first."""
        tensors = {}
        for name, old in before.items():
            old_bits, new_bits = _bits(old), _bits(after[name])
            at = torch.nonzero(old_bits != new_bits)[:, 0]
            if len(at):
                tensors[name + AT], tensors[name + WAS] = at, old.detach().cpu().reshape(-1)[at].clone()
        return cls(tensors, tuple(name for name in after if name not in before), state_fingerprint(after))

    def restore(self, state: State, *, original: str) -> dict[str, Tensor]:
        """Return a copy of an edited state dict with the original numbers.

        Args:
            state: The edited weights.
            original: SHA-256 that the result must have.

        Raises:
            EditError: When these are not the weights that the edit produced.
        """
        found = state_fingerprint(state)
        if found != self.edited:
            what = "the weights before the edit" if found == original else f"others, {found[:12]}..."
            raise EditError(
                f"this edit made weights {self.edited[:12]}..., and these are {what}; give the checkpoint that the "
                f"edit was applied to, unchanged since"
            )
        restored = {name: value.detach().clone() for name, value in state.items() if name not in self.added}
        for key, at in self.tensors.items():
            if key.endswith(AT):
                name = key.removesuffix(AT)
                flat = restored[name].contiguous().view(-1)
                flat[at.to(flat.device)] = self.tensors[name + WAS].to(flat)
                restored[name] = flat.view(restored[name].shape)
        if state_fingerprint(restored) != original:
            raise EditError("the original numbers do not belong to this edit; get both files of the edit again")
        return restored

    def fingerprint(self) -> str:
        """Return the SHA-256 of the numbers and their positions."""
        return state_fingerprint(self.tensors)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Originals) and (self.fingerprint(), self.added, self.edited) == (
            other.fingerprint(),
            other.added,
            other.edited,
        )

    __hash__ = None  # type: ignore[assignment]


@dataclass(frozen=True)
class Edit:
    """Components to ablate permanently, and the constants that replace them.

    Attributes:
        components: The chosen components, most important first.
        replacements: The constants of each component: one number, or as many as it has channels.
        scores: The score each was chosen by.
        goal: The goal; None for joined edits with different goals.
        ablation: Name of the ablation that the attributions were made with.
        batch_norms: Path of the batch norm that takes the constants of a site without bias.
        weights: SHA-256 of the weights that the edit was made for.
        originals: The numbers it takes out of the weights, see `keep`; None for an edit made without the model.
        strengths: How far each component goes towards its constants: with a strength s an activation y with constant c
            becomes (1 - s) y + s c, so that 1, the default, ablates it.
        codes: Hashes of the code of models that the edit may be applied to, see `coar.model_code`: that of the run, and
            what was accepted as equivalent. Empty if it is unknown, as for a run of an older format.

    Raises:
        EditError: When there are not as many strengths as components, or one is not above 0 and at most 1.
    """

    components: tuple[Component, ...]
    replacements: tuple[Constant, ...]
    scores: tuple[float, ...]
    goal: EditGoal | None
    ablation: str
    batch_norms: dict[str, str]
    weights: str
    originals: Originals | None = field(default=None, repr=False)
    strengths: tuple[float, ...] = ()
    codes: tuple[Code, ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        if not self.strengths:
            object.__setattr__(self, "strengths", (1.0,) * len(self.components))
        if len(self.strengths) != len(self.components) or not all(0 < one <= 1 for one in self.strengths):
            raise EditError(
                f"an edit of {len(self.components)} components was given the strengths {list(self.strengths)}; give "
                f"one for each, above 0 and at most 1"
            )

    @classmethod
    def of(
        cls,
        study: Study,
        names: Sequence[str],
        *,
        ablation: Ablation | None = None,
        strength: float = 1.0,
        goal: EditGoal | None = None,
        device: str = "auto",
    ) -> Self:
        """Return an edit chosen by hand: it ablates the named components of a study with its ablation's constants.

        No run is needed. Constants and batch norms are those that a run of the study would have.

        Args:
            study: The study; its examples are used to find the batch norms that take constants.
            names: Names of components, such as `layer1.0.conv1[17]`, most important first; `study.components.names` has
                all of them.
            ablation: An ablation to take constants from instead, for a study whose ablation has none, such as
                `coar.Mean(calibration=...)` for one that resamples.
            strength: How far each component goes towards its constants, above 0 and at most 1.
            goal: What the edit is for; `coar.judge_edit` needs it, or a goal of its own.
            device: Where to compute the constants.

        Raises:
            ComponentError: When the study has no component of that name.
            EditError: When no component or the same one twice is named, or the ablation has no constants for one.
        """
        if isinstance(names, str) or not names or len(set(names)) != len(names):
            raise EditError(f"{names!r} was given; name one or more different components in a list")
        rows = [study.components.index(name) for name in names]
        chosen = ablation or study.ablation
        copy = device_copy(study.model, device, study.examples)
        runner = ModelRunner(copy, study.output)
        constants = chosen.replacements(copy, study.components, batch_size=runner.batch_size)
        few = runner.load(study.examples, 0, min(CHECKED, len(study.examples)))
        norms = following_batch_norms(
            copy,
            study.components,
            run=lambda net: torch.from_numpy(ModelRunner(net, study.output).base_output(few)),
        )
        one_each = constants.ndim == 1  # by position there is no single constant
        flat = constants.tolist() if one_each else [torch.nan] * study.components.width
        components = tuple(study.components[row] for row in rows)
        values = tuple(_constant([flat[n] for n in study.components.channels_of([row])]) for row in rows)
        for component, value in zip(components, values, strict=True):
            check_permanent(component, value)
        sites = {component.site for component in components}
        return cls(
            components,
            values,
            (0.0,) * len(components),
            goal,
            str(chosen.settings()["name"]),
            {site: name for site, name in norms.items() if site in sites},
            weights_fingerprint(study.model),
            strengths=(strength,) * len(components),
            codes=(model_code(study.model),),
        )

    def __len__(self) -> int:
        return len(self.components)

    def __repr__(self) -> str:
        order = sorted(range(len(self)), key=lambda i: -self.strengths[i])  # the most important first where equal
        names = [self.components[i].name for i in order[:NAMED]] + ["..."] * (len(self) > NAMED)
        ends = dict.fromkeys(f"{end(self.strengths, default=1):.3g}" for end in (min, max))
        return (
            f"Edit({len(self)} of strength {' to '.join(ends)}, {self.ablation} ablation: {', '.join(names) or 'none'})"
        )

    def apply(self, model: nn.Module) -> nn.Module:
        """Return an edited copy, a plain module of the same class; the one inside a compiled or parallel model.

        Its state dict has the same keys wherever a layer has a bias or is followed by a batch norm. Otherwise the layer
        gets a bias, see `new_parameters`, with a warning if the model's `from_pretrained` leaves it out.

        Raises:
            EditError: When the model's weights or code are not the ones that the edit was made for.
            WeightsError: When a module of the model cannot be copied.
        """
        edited = applied(self, model)
        added = added_parameters(unwrapped(model), edited)
        if added and any(hasattr(module, "from_pretrained") for module in edited.modules()):
            log.warning(
                "the edited %s has more biases than its configuration creates (%d, such as %s), and from_pretrained "
                "leaves them out; save it with edit.save_pretrained(model, folder, examples)",
                type(edited).__name__,
                len(added),
                added[0],
            )
        return edited

    def accept_code(self, model: nn.Module) -> "Edit":
        """Return this edit with this model's code accepted as equivalent to the code that it was made for.

        Use it for changed code that computes the same, such as a renamed class; the weights are still checked.
        """
        return replace(self, codes=(*self.codes, model_code(unwrapped(model))))

    def new_parameters(self, model: nn.Module) -> tuple[str, ...]:
        """Return the names of the biases that the edit adds to layers without one; see `apply` for errors.

        A state dict with these names is not loaded strictly into the model's class before its layers get a bias.
        """
        return added_parameters(unwrapped(model), applied(self, model))

    def save_state_dict(self, model: nn.Module, path: str | Path, examples: Examples) -> saving.SavedModel:
        """Apply the edit, write the edited weights as safetensors, and compare the result with a model loaded from it.

        Args:
            model: The model that the edit was made for.
            path: The file to write.
            examples: Examples of the model's inputs; the first ones are used to compare.

        Returns:
            The file, and Python code that loads it without this package.

        Raises:
            EditError: When the path does not end in `.safetensors`, when the loaded model is not the edited one, or see
                `apply`.
            StorageError: When the disk refuses the write.
        """
        return saving.save_state_dict(unwrapped(model), applied(self, model), Path(path), examples)

    def save_pretrained(self, model: nn.Module, folder: str | Path, examples: Examples) -> saving.SavedModel:
        """Apply the edit, write the edited model by its own `save_pretrained`, and compare it with a loaded one.

        A layer that gets a bias by the edit keeps it: by options of the configuration, such as `mlp_bias` of Llama, or
        else by a small module of Python code in the folder, which transformers loads with `trust_remote_code=True`.

        Args:
            model: The model of transformers or diffusers that the edit was made for, or a module that wraps one.
            folder: The folder to write.
            examples: Examples of the model's inputs; the first ones are used to compare.

        Returns:
            The folder, and Python code that loads it without this package.

        Raises:
            EditError: When the model has no `save_pretrained`, when the folder cannot keep new biases, when the loaded
                model is not the edited one, or see `apply`.
            StorageError: When the disk refuses the write.
        """
        return saving.save_pretrained(unwrapped(model), applied(self, model), Path(folder), examples)

    def constants(self, attributions: Attributions) -> np.ndarray:
        """Return the (components.width,) constants of attributions, with those of this edit for its components.

        Raises:
            ComponentError: When the edit has a component that the attributions do not have.
        """
        table = attributions.components
        flat = attributions.origin.constants.copy()
        for component, value in zip(self.components, self.replacements, strict=True):
            flat[table.channels_of([table.index(component.name)])] = value
        return flat

    def gates(self, attributions: Attributions) -> np.ndarray:
        """Return the (components,) gates equivalent to this edit: 1 less the strength for each of its components.

        Raises:
            ComponentError: When the edit has a component that the attributions do not have.
        """
        found = np.ones(len(attributions.components), dtype=np.float32)
        found[[attributions.components.index(component.name) for component in self.components]] -= self.strengths
        return found

    def keep(self, model: nn.Module) -> "Edit":
        """Return this edit with the numbers that it takes out of the model's weights, so that it can be undone.

        Raises:
            EditError: When the model's weights or code are not the ones that the edit was made for.
        """
        return replace(
            self, originals=Originals.between(unwrapped(model).state_dict(), applied(self, model).state_dict())
        )

    def undo(self, model: nn.Module) -> nn.Module:
        """Return a copy of the edited model with the original weights, bit for bit.

        Raises:
            EditError: When the edit keeps no original weights, or did not make this model's.
            WeightsError: When a module of the model cannot be copied.
        """
        restored = independent_copy(model)
        state = self.kept().restore(model.state_dict(), original=self.weights)
        for name in self.kept().added:
            site, _, parameter = name.rpartition(".")
            setattr(restored.get_submodule(site), parameter, None)
        restored.load_state_dict(state)
        return restored

    def kept(self) -> Originals:
        """Return the originals; raise `EditError` when there are none."""
        if self.originals is None:
            raise EditError(
                "this edit keeps no original weights, so it cannot be undone; call edit.keep(model) with the model it "
                "was made for, or load those weights again"
            )
        return self.originals

    def __add__(self, other: "Edit") -> "Edit":
        """Return the edit that joins both; a component in both must have the same constant and strength.

        Original weights are not carried over; call `keep` on the result.

        Raises:
            EditError: When the edits are for different weights or code, or disagree on a constant or a strength.
        """
        if self.weights != other.weights:
            raise EditError(
                f"one edit is for weights {self.weights[:12]}..., the other for {other.weights[:12]}...; join edits of "
                f"one model only"
            )
        codes = tuple(code for code in self.codes if code in other.codes)
        if self.codes and other.codes and not codes:
            raise EditError(
                "the edits were made for models of equal weights and different code; if the code computes the same, "
                "accept it first with edit.accept_code(model)"
            )
        mine = {component: how for component, _, *how in self._rows()}
        more = []
        for component, score, *how in other._rows():
            if component not in mine:
                more.append((component, score, *how))
            elif mine[component] != how:
                (value, strength), (its_value, its_strength) = mine[component], how
                raise EditError(
                    f"{component.name!r} is replaced by {value} at a strength of {strength:g} in one edit and by "
                    f"{its_value} at {its_strength:g} in the other; take it out of one, or make both with the same "
                    f"ablation, constants='run' and full strength"
                )
        parts = zip(*more, strict=True) if more else ((), (), (), ())
        components, scores, values, strengths = (tuple(part) for part in parts)
        return Edit(
            self.components + components,
            self.replacements + values,
            self.scores + scores,
            self.goal if self.goal == other.goal else None,
            self.ablation if self.ablation == other.ablation else f"{self.ablation} and {other.ablation}",
            {**self.batch_norms, **other.batch_norms},
            self.weights,
            strengths=self.strengths + strengths,
            codes=codes or self.codes or other.codes,
        )

    def _rows(self) -> Iterator[tuple[Component, float, Constant, float]]:
        """Yield each component with its score, constants and strength."""
        yield from zip(self.components, self.scores, self.replacements, self.strengths, strict=True)

    def save(self, path: str | Path) -> None:
        """Write the edit atomically as JSON, after the original weights, as safetensors next to it.

        Raises:
            StorageError: When the disk refuses the write.
        """
        file = Path(os.path.expanduser(path))
        partial = file.with_name(f"{file.name}.{os.getpid()}.partial")
        content = {
            "format": FORMAT,
            "goal": self.goal.model_dump(mode="json") if self.goal else None,
            "ablation": self.ablation,
            "weights": self.weights,
            "codes": list(self.codes),
            "batch_norms": self.batch_norms,
            "components": [
                {**component._asdict(), "replacement": value, "score": score, "strength": strength}
                for component, score, value, strength in self._rows()
            ],
            "originals": self.originals
            and {
                "file": _beside(file).name,
                "sha256": self.originals.fingerprint(),
                "added": list(self.originals.added),
                "edited": self.originals.edited,
            },
        }
        if self.originals:
            save_state(self.originals.tensors, _beside(file))
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text(json.dumps(content, indent=1) + "\n")
            os.replace(partial, file)
        except OSError as error:
            raise StorageError(f"cannot write the edit to {file}: {error}; choose another path") from error

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read an edit written by `save`; raise `EditError` for any other file."""
        file = Path(os.path.expanduser(path))
        try:
            content: dict[str, Any] = json.loads(file.read_text())
            if content["format"] > FORMAT:
                raise EditError(f"{file} has format {content['format']}, this version reads {FORMAT}; update coar")
            rows: list[dict[str, Any]] = content["components"]
            if not isinstance(rows, list):
                raise TypeError("components is not a list")
            return cls(
                tuple(read_component([row[field] for field in Component._fields]) for row in rows),
                tuple(_constant(row["replacement"]) for row in rows),
                tuple(float(row["score"]) for row in rows),
                None if content["goal"] is None else EditGoal(**content["goal"]),
                str(content["ablation"]),
                {str(site): str(name) for site, name in content["batch_norms"].items()},
                str(content["weights"]),
                _read_originals(file, content.get("originals")),
                tuple(float(row.get("strength", 1)) for row in rows),
                tuple(_read_code(code) for code in content.get("codes", [])),
            )
        except EditError:
            raise
        except (OSError, UnicodeDecodeError, KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise EditError(f"{file} does not hold an edit ({error!r}); write it again with Edit.save") from None

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Draw the number of components of each layer, each counted by its strength; return the axes.

        Args:
            ax: Matplotlib axes; by default those of a new figure.
        """
        sites = list(dict.fromkeys(component.site for component in self.components))
        pairs = list(zip(self.components, self.strengths, strict=True))
        sums = np.array([sum(strength for one, strength in pairs if one.site == site) for site in sites])
        return signed_bars(ax, sites, sums, xlabel="components, each counted by its strength")

    def _repr_html_(self) -> str:
        return html_table(self.to_pandas())

    def to_pandas(self) -> "pd.DataFrame":
        """Return a frame with one row per component: name, score, replacement, strength."""
        import pandas as pd

        names = [component.name for component in self.components]
        columns = {"score": self.scores, "replacement": self.replacements, "strength": self.strengths}
        return pd.DataFrame({"name": names, **columns})


def edit_of(
    attributions: Attributions,
    goal: EditGoal | None,
    indices: Sequence[int] | np.ndarray,
    scores: np.ndarray,
    *,
    constants: np.ndarray | None = None,
    strengths: np.ndarray | None = None,
) -> Edit:
    """Return the edit that ablates these components, in this order, by default fully and with the run's constants.

    Raises:
        EditError: When a component has no constant, as under resampling.
    """
    origin, table = attributions.origin, attributions.components
    flat = (origin.constants if constants is None else constants).tolist()
    components = tuple(table[int(i)] for i in indices)
    values = tuple(_constant([flat[n] for n in table.channels_of([int(i)])]) for i in indices)
    for component, value in zip(components, values, strict=True):
        if origin.weights == UNKNOWN and not np.isfinite(value).all():
            raise EditError(
                f"the bias of {component.name!r}, which stays when its weights are zeroed, is unknown, since the "
                f"attributions were imported without a model; import the file again with --pipeline, or study="
            )
        check_permanent(component, value)
    sites = {component.site for component in components}
    return Edit(
        components,
        values,
        tuple(float(scores[int(i)]) for i in indices),
        goal,
        origin.ablation,
        {site: name for site, name in origin.batch_norms.items() if site in sites},
        origin.weights,
        strengths=() if strengths is None else tuple(strengths.tolist()),
        codes=origin.codes,
    )


def _constant(values: float | Sequence[float]) -> Constant:
    """Return the constants of a component, a number where it has one; raise `ValueError` or `TypeError` for others."""
    if not isinstance(values, list):
        return float(values)  # type: ignore[arg-type]
    return float(values[0]) if len(values) == 1 else tuple(float(value) for value in values)


def applied(edit: Edit, model: nn.Module) -> nn.Module:
    """Return an edited copy; see `Edit.apply` for errors."""
    model = unwrapped(model)
    owner, accept = "this edit was made for", "edit.accept_code(model)"
    check_model(model, weights=edit.weights, codes=edit.codes, owner=owner, accept=accept)
    edited = independent_copy(model)
    fold(edited, edit.components, edit.replacements, batch_norms=edit.batch_norms, strengths=edit.strengths)
    return edited


def check_model(model: nn.Module, *, weights: str, codes: Sequence[Code], owner: str, accept: str) -> None:
    """Raise `EditError` unless a model has these weights, and code with one of these hashes, if there are any.

    Versions of libraries may differ, since the edited weights do not depend on them.

    Args:
        model: The model.
        weights: SHA-256 of its weights.
        codes: Results of `model_code`.
        owner: What weights and code belong to, in words.
        accept: How to accept other code, in words.
    """
    kind = type(model).__name__
    if weights_fingerprint(model) != weights:
        raise EditError(
            f"{owner} weights {weights[:12]}..., and this {kind} has others; load the weights that the attributions "
            f"were collected with"
        )
    now = {**model_code(model), "libraries": {}}
    changes = [differences({**code, "libraries": {}}, now) for code in codes]
    if changes and all(changes):
        more = f", and {len(changes[0]) - LISTED} more" if len(changes[0]) > LISTED else ""
        raise EditError(
            f"{owner} a model of the same weights and other code, and this {kind} may compute something else; these "
            f"differ: {'; '.join(changes[0][:LISTED])}{more}. Load the model as it was; if the changed code computes "
            f"the same, accept it with {accept}"
        )


def _read_code(code: Mapping[str, Mapping[str, str]]) -> Code:
    return {part: {str(name): str(value) for name, value in hashes.items()} for part, hashes in code.items()}


def check_budget(budget: int, components: int) -> int:
    """Return the budget, or raise `SettingsError` when it is not between 1 and the number of components."""
    if not 1 <= budget <= components:
        raise SettingsError(f"a budget of {budget} was given; choose 1 to {components}, the components there are")
    return budget


def _beside(file: Path) -> Path:
    return file.with_name(f"{file.stem}.originals.safetensors")


def _read_originals(file: Path, about: dict[str, Any] | None) -> Originals | None:
    """Read the original weights of an edit; raise `EditError` when they are not those written with it."""
    if about is None:
        return None
    beside = file.with_name(Path(str(about["file"])).name)
    try:
        tensors = read_state(beside)
    except WeightsError as error:
        raise EditError(f"{file} keeps original weights in {beside}, which cannot be read: {error}") from None
    originals = Originals(tensors, tuple(str(name) for name in about["added"]), str(about["edited"]))
    if originals.fingerprint() != about["sha256"]:
        raise EditError(
            f"{beside} is not the file that was written with {file}; get both again, or make the edit again"
        )
    return originals


def _bits(value: Tensor) -> Tensor:
    """Return a flat view of the numbers as integers, so that -0.0 and 0.0 differ and NaN equals itself."""
    return value.detach().cpu().contiguous().view(-1).view(BITS[value.element_size()])
