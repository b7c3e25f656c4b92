"""A cache of the start of forward passes: modules that run before masks begin to differ run once.

A pass is divided at calls of modules. Before the first call of a given module, other modules have been called and have
returned. The cache holds the results of the outermost of these, and a later pass gets them instead of running the
modules. All else runs as usual, including the model's own code between modules.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as trees

from coar.components.table import Components
from coar.equivalence import FastPath, Kind, compare
from coar.errors import AblationError
from coar.examples import rows_of
from coar.gates.gates import Gates
from coar.inputs import Inputs

FEW = 8  # components, on average, in which masks may differ from the majority for the cache to be considered
SAVED = 0.1  # least share of the calls that the cache must save
NOTED = 2  # examples of the pass that records calls
OTHERWISE = "the model does not call its modules in the same order in every pass"

Forward = Callable[..., Any]


@dataclass(frozen=True)
class Call:
    """One call of a module in a forward pass.

    Attributes:
        module: The module.
        start: Number of calls that began or ended before it.
        end: The same number at its end.
        changed: Whether its result is changed in place afterwards.
    """

    module: nn.Module
    start: int
    end: int
    changed: bool


@dataclass(frozen=True)
class Calls:
    """All calls of modules in a forward pass, in the order in which they begin."""

    calls: tuple[Call, ...]

    @classmethod
    def of(cls, model: nn.Module, run: Callable[[], object]) -> Self:
        """Record the calls of a plain forward pass, which must not be in inference mode."""
        spans: list[tuple[nn.Module, int, int, list[tuple[Tensor, int]]]] = []
        clock = 0

        def timed(module: nn.Module, forward: Forward, *args: Any, **kwargs: Any) -> Any:
            nonlocal clock
            start, clock = clock, clock + 1
            value = forward(*args, **kwargs)
            spans.append((module, start, clock, [(one, one._version) for one in _tensors(value)]))
            clock += 1
            return value

        with _through(model.modules(), timed), torch.no_grad():
            run()
        calls = [
            Call(module, start, end, any(one._version != version for one, version in returned))
            for module, start, end, returned in spans
        ]
        return cls(tuple(sorted(calls, key=lambda call: call.start)))

    def first(self, module: nn.Module) -> int:
        """Return the start of a module's first call; 0, the start of the pass, if it is not called."""
        return next((call.start for call in self.calls if call.module is module), 0)

    def ended(self, by: int) -> list[Call]:
        """Return the outermost calls that have ended by a time."""
        found: list[Call] = []
        for call in self.calls:
            if call.end < by and (not found or call.start > found[-1].end):
                found.append(call)
        return found


class SharedStart:
    """Holds the results of modules up to a time in a pass, and runs passes that continue from there.

    Args:
        calls: The calls of the model's forward pass.

    Attributes:
        time: The time.
    """

    def __init__(self, calls: Calls) -> None:
        self._calls, self.time = calls, 0
        self._held: dict[int, Any] = {}

    def advance(self, time: int, run: Callable[[], object]) -> None:
        """Run from the held results up to the call that begins at a later time, and hold the results up to it.

        Raises:
            AblationError: When that call is not reached, because the model calls its modules in another order.
        """
        if time == self.time:
            return
        recorded = self._calls.ended(time)
        stop = next(call.module for call in self._calls.calls if call.start == time)
        with self._passing(recorded, stop) as found, suppress(_ReachedError):
            run()
        if len(found) < len(recorded):
            raise AblationError(OTHERWISE)
        self._held, self.time = found, time

    def run(self, run: Callable[[], Tensor]) -> Tensor:
        """Run a whole pass, with held results instead of calls of the modules that returned them.

        Raises:
            AblationError: When the model does not call a module whose result is held.
        """
        with self._passing([], None):
            return run()

    @contextmanager
    def _passing(self, recorded: list[Call], stop: nn.Module | None) -> Iterator[dict[int, Any]]:
        """Return held results, record the results of some calls, and stop before the first call of a module."""
        known, noted = deque(self._calls.ended(self.time)), deque(recorded)
        found: dict[int, Any] = {}
        inside = False  # a recorded call

        def passed(module: nn.Module, forward: Forward, *args: Any, **kwargs: Any) -> Any:
            nonlocal inside
            if module is stop and not noted and not inside:
                raise _ReachedError
            note = noted.popleft() if noted and not inside and noted[0].module is module else None
            if known and known[0].module is module:
                call = known.popleft()
                value = _own(self._held[call.start], call)
            else:
                inside = inside or note is not None
                value = forward(*args, **kwargs)
                inside = inside and note is None
            if note is not None:
                found[note.start] = _own(value, note)
            return value

        modules = dict.fromkeys([*(call.module for call in (*known, *noted)), *([stop] if stop else [])])
        with _through(modules, passed):
            yield found
        if known and stop is None:
            raise AblationError(OTHERWISE)


class _ReachedError(BaseException):
    """A pass has reached its stop; not an `Exception`, so that no handler in the model catches it."""


@contextmanager
def _through(modules: Iterable[nn.Module], passed: Callable[..., Any]) -> Iterator[None]:
    """Route calls of modules through a function of the module, its own forward, and the arguments."""
    before = {module: module.__dict__.get("forward") for module in modules}
    for module in before:
        module.__dict__["forward"] = partial(passed, module, module.forward)
    try:
        yield
    finally:
        for module, own in before.items():
            if own is None:
                del module.__dict__["forward"]
            else:
                module.__dict__["forward"] = own


def _tensors(value: Any) -> list[Tensor]:
    leaves = trees.tree_leaves(value)
    return [one for one in leaves if isinstance(one, Tensor) and not one.is_inference()]  # these have no version


def _own(value: Any, call: Call) -> Any:
    """Return a value, or a copy of it if the model changes it in place later."""
    return trees.tree_map_only(Tensor, torch.clone, value) if call.changed else value


@dataclass(frozen=True)
class Starts:
    """The times at which components are first used in a forward pass.

    Attributes:
        calls: The calls of the pass.
        times: (components,) start of the first call of each component's module; 0 if it is not known.
    """

    calls: Calls
    times: np.ndarray

    @classmethod
    def of(cls, model: nn.Module, components: Components, run: Callable[[], object]) -> Self:
        """Record a plain pass of a few examples."""
        with torch.inference_mode(False):
            calls = Calls.of(model, run)
        times = np.zeros(len(components), dtype=np.int64)
        for (site, side, _), indices in components.sites().items():
            if side != "parameter":
                times[indices] = calls.first(model.get_submodule(site))
        return cls(calls, times)

    def differing(self, differs: np.ndarray) -> np.ndarray:
        """Return the (masks,) times at which masks begin to differ, from (masks, components) booleans."""
        return np.asarray(np.where(differs, self.times, self.calls.calls[-1].start).min(1))

    def saved(self, times: np.ndarray) -> float:
        """Return the share of calls that have ended by these times, on average."""
        ends = np.array([call.end for call in self.calls.calls])
        return float((ends < times[:, None]).mean())


class PrefixCache:
    """Runs one mask after another, but the parts of the model before their first difference only once.

    Args:
        model: The model.
        components: The components of a mask.
        run: Runs the model on inputs.
        read: Reads (examples,) outputs off the model's result, for targets.

    Attributes:
        path: Whether the model was found to give the same outputs.
    """

    def __init__(
        self,
        model: nn.Module,
        components: Components,
        run: Callable[[Inputs], Any],
        read: Callable[[Any, Tensor], Tensor],
    ) -> None:
        self._model, self._components, self._run, self._read = model, components, run, read
        self._starts: Starts | None = None
        self.path = FastPath("the prefix cache")

    def fill(self, out: Tensor, batches: list[tuple[Inputs, Tensor]], masks: np.ndarray, gates: Gates) -> bool:
        """Write (masks, examples) outputs if the cache saves calls, and return whether it did.

        The first time, the pass with the most saved calls is compared with a plain one. If they differ, the cache is
        not used.

        Args:
            out: The tensor to write into.
            batches: Inputs and targets.
            masks: (masks, components) boolean masks.
            gates: The gates, already entered.
        """
        usual = 2 * masks.sum(0) >= len(masks)
        differs = masks != usual
        if self.path.fallback or len(masks) < 2 or differs.sum() > FEW * len(masks):
            return False
        base, keeps = (torch.from_numpy(part).to(out.device) for part in (usual, masks))
        gates.set(base)
        if self._starts is None:
            few = rows_of(batches[0][0], slice(NOTED))
            self._starts = Starts.of(self._model, self._components, partial(self._run, few))
        times = self._starts.differing(differs)
        if self._starts.saved(times) < SAVED:
            return False
        try:
            at = 0
            for inputs, targets in batches:
                part = out[:, at : at + len(targets)]
                self._fill(part, inputs, targets, times, SharedStart(self._starts.calls), gates, base, keeps)
                at += len(targets)
            self._check(out, batches[0], int(times.argmax()), gates, keeps)
        except AblationError as error:
            return self.path.settle(str(error))
        return True

    def _fill(
        self,
        out: Tensor,
        inputs: Inputs,
        targets: Tensor,
        times: np.ndarray,
        start: SharedStart,
        gates: Gates,
        base: Tensor,
        keeps: Tensor,
    ) -> None:
        """Run a batch under each mask, in the order of the times at which masks begin to differ."""
        run = partial(self._run, inputs)
        for i in np.argsort(times, kind="stable"):
            if start.time != times[i]:
                gates.set(base)
                start.advance(int(times[i]), run)
            gates.set(keeps[i])
            out[i] = self._read(start.run(run), targets)

    def _check(self, out: Tensor, batch: tuple[Inputs, Tensor], latest: int, gates: Gates, keeps: Tensor) -> None:
        """Raise `AblationError` when a gate saw no pass, or when, the first time, a plain pass gives other outputs."""
        gates.confirm()
        if self.path.confirmed:
            return
        inputs, targets = batch
        gates.set(keeps[latest])
        plain, found = self._read(self._run(inputs), targets).to(out), out[latest, : len(targets)]
        compared = compare(plain, found, Kind.REORDERED)
        if not compared.agrees:
            raise AblationError(f"replaying cached outputs changed the result: outputs {compared}")
        self.path.settle("")
