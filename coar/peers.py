"""Conductance and internal influence by captum, stored as fits to compare with.

Both integrate along the straight path from a baseline input to the example. Where F is the output and y a component's
activations, of which a filter has one per position:

- conductance (Dhamdhere, Sundararajan and Yan 2018) adds up dF/dy times the change of y along the path: the part of
  F(example) - F(baseline) that flows through the component. The parts of a layer through which everything flows add up
  to that difference.
- internal influence (Leino et al. 2018) adds up dF/dy alone, averaged over the path: how the output responds to the
  component. It is multiplied neither by the activation nor by its change, so it does not estimate the effect of an
  ablation, which depends on the activation's size.
"""

import time
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from coar.attributions import Attributions
from coar.baselines import store_added
from coar.errors import AblationError, ExamplesError, SettingsError, install_hint
from coar.examples import Examples
from coar.forward.copies import plain_copy
from coar.forward.devices import batch_size_on, choose_device
from coar.store.run import Run
from coar.study import Study

PathMethod = Literal["conductance", "internal_influence"]
STEPS = 20  # along the path


@dataclass(frozen=True)
class PeerAttributions:
    """Scores of a peer for every example, and their cost.

    Attributes:
        weights: (examples, components) float32 scores, added up over positions.
        forwards: Forward passes per example. Captum repeats them for each site, though one would serve all sites;
            divide by `sites` for the cost of a program that shares them.
        backwards: Backward passes per example, likewise. No weight has a gradient, so one takes the arithmetic of a
            forward pass, and less if it ends at a late site.
        sites: Number of outputs and inputs of modules with components.
        seconds: Wall-clock time, from the first example to the last.
    """

    weights: np.ndarray
    forwards: float
    backwards: float
    sites: int
    seconds: float


def conductance(
    study: Study,
    run: Run,
    *,
    steps: int = STEPS,
    embedding: str | None = None,
    baseline: Tensor | float = 0.0,
    device: str = "auto",
    batch_size: int | None = None,
) -> Attributions:
    """Attribute to each component its conductance: the part of the output's change along the path that it carries.

    Captum evaluates `steps` + 1 Gauss-Legendre points and takes the changes between them, so the ends of the path
    outside the outer points are left out: 0.6 % of the path for 20 steps. The default baseline is the zero input, which
    for normalised pictures is the mean colour, or zero embeddings. Needs the extra `captum`.

    Args:
        study: The study that the run was made for; its ablation and sampler are not used.
        run: The run to write the attributions into, as fit `conductance`.
        steps: Steps along the path.
        embedding: For token inputs, the path of the embedding that reads the tokens: its output moves along the path,
            and other embeddings and masks stay constant. Inside the model an example may have several entries, such as
            both sentences of a pair, if their number is the same at every site; their scores are added up.
        baseline: Start of the path: one number, or a tensor (1, ...) of the shape of an input or its embeddings.
        device: Where to compute.
        batch_size: Most points on the path per forward pass, at least 2; by default as in `coar.collect`.

    Raises:
        SettingsError: When captum is not installed.
        MismatchError: When the run was made for another study.
        AblationError: When components are parameter slices, which have no activation.
        ExamplesError: When the inputs are tokens or several tensors and no embedding is named.
    """
    found = path_scores(
        _checked(study, run),
        "conductance",
        steps,
        embedding=embedding,
        baseline=baseline,
        device=device,
        batch_size=batch_size,
    )
    return _stored(run, "conductance", found)


def internal_influence(
    study: Study,
    run: Run,
    *,
    steps: int = STEPS,
    embedding: str | None = None,
    baseline: Tensor | float = 0.0,
    device: str = "auto",
    batch_size: int | None = None,
) -> Attributions:
    """Attribute to each component its internal influence: the output's gradient by it, averaged over the path.

    Needs the extra `captum`.

    Args:
        study: The study that the run was made for; its ablation and sampler are not used.
        run: The run to write the attributions into, as fit `internal_influence`.
        steps: Gauss-Legendre points on the path.
        embedding: For token inputs, the path of the embedding that reads the tokens, see `conductance`.
        baseline: Start of the path, see `conductance`.
        device: Where to compute.
        batch_size: Most points on the path per forward pass; by default as in `coar.collect`.

    Raises:
        SettingsError: When captum is not installed.
        MismatchError: When the run was made for another study.
        AblationError: When components are parameter slices, which have no activation.
        ExamplesError: When the inputs are tokens or several tensors and no embedding is named.
    """
    found = path_scores(
        _checked(study, run),
        "internal_influence",
        steps,
        embedding=embedding,
        baseline=baseline,
        device=device,
        batch_size=batch_size,
    )
    return _stored(run, "internal_influence", found)


def _checked(study: Study, run: Run) -> Study:
    run.check(study.fingerprint())
    return study


def _stored(run: Run, name: str, found: PeerAttributions) -> Attributions:
    """Store scores as a fit that is exact for the unablated model."""
    base = np.asarray(run.array("base_output")[:], dtype=np.float32)
    return store_added(run, name, found.weights, base - found.weights.sum(1))


def path_scores(
    study: Study,
    method: PathMethod,
    steps: int,
    *,
    embedding: str | None = None,
    baseline: Tensor | float = 0.0,
    device: str = "auto",
    batch_size: int | None = None,
) -> PeerAttributions:
    """Return the scores of a path method with their cost; for arguments and errors see `conductance`."""
    try:
        from captum.attr import InternalInfluence, LayerConductance
    except ImportError:
        raise SettingsError(f"{method} is computed by captum, which is not there; {install_hint('captum')}") from None
    kind, points = {
        "conductance": (LayerConductance, steps + 1),
        "internal_influence": (InternalInfluence, steps),
    }[method]
    reader = CaptumReader(study, device, embedding)
    rows = max(batch_size or batch_size_on(reader.device), 2)  # conductance takes differences of two
    examples = max(rows // points, 1)  # at a time; captum splits an example with more points than rows
    weights = np.empty((len(study.examples), len(study.components)), dtype=np.float32)
    start = time.perf_counter()
    for at in range(0, len(study.examples), examples):
        part = slice(at, min(at + examples, len(study.examples)))
        end, *others = reader.load_path(study.examples, part)
        entries = len(end) // len(others[-1])  # of an example inside the model, such as both sentences of a pair
        for (site, side, axis), indices in study.components.sites().items():
            values = kind(reader, reader.model.get_submodule(site)).attribute(
                end,
                baselines=baseline,
                additional_forward_args=tuple(others),
                n_steps=steps,
                internal_batch_size=rows * entries,
                attribute_to_layer_input=side == "input",
            )
            channels = by_channel(values.detach(), axis).sum(2)
            channels = channels.reshape(-1, entries, channels.shape[1]).sum(1)
            spans = [slice(c.position, c.position + c.size) for c in (study.components[i] for i in indices)]
            sums = torch.stack([channels[:, span].sum(1) for span in spans], 1)  # (rows, components of the site)
            weights[part, indices] = sums.cpu().numpy()
    return reader.result(study, weights, time.perf_counter() - start)


class CaptumReader:
    """Runs a copy of the model, returns the study's output per example, and counts the examples that pass through.

    Its arguments are tensors (rows, ...): first the point on the path if there is an embedding, then the model's
    inputs in order, then the targets. Modules of the copy do not work in place, since that would change activations
    that captum has kept of the module before.
    """

    def __init__(self, study: Study, device: str, embedding: str | None = None) -> None:
        if any(component.side == "parameter" for component in study.components):
            raise AblationError("parameter slices have no activation to attribute to; use conv_filters or neurons")
        self.device = choose_device(device)
        self.model = plain_copy(study.model, self.device).eval().requires_grad_(False)
        for module in self.model.modules():
            if hasattr(module, "inplace"):
                setattr(module, "inplace", False)  # noqa: B010
        self._output = study.output
        self._embedding = None if embedding is None else self.model.get_submodule(embedding)
        self._names: list[str] | None = None
        self.forwards = self.backwards = 0

    def load(self, examples: Examples, rows: slice) -> list[Tensor]:
        """Return the model's inputs in order, then the targets, on the device."""
        inputs, targets = examples.block(rows.start, rows.stop)
        self._names = list(inputs) if isinstance(inputs, dict) else None
        tensors = list(inputs.values()) if isinstance(inputs, dict) else [inputs]
        return [tensor.to(self.device) for tensor in (*tensors, targets)]

    def load_path(self, examples: Examples, rows: slice) -> list[Tensor]:
        """Return the end of the path, which captum scales, and all other arguments of a call."""
        arguments = self.load(examples, rows)
        if self._embedding is not None:
            return [self._embedded(self._embedding, arguments), *arguments]
        if self._names is not None or not arguments[0].is_floating_point():
            raise ExamplesError(
                f"a path needs one floating-point input per example, but the inputs are "
                f"{', '.join(str(tensor.dtype) for tensor in arguments[:-1])}; name the embedding that reads the tokens"
            )
        return arguments

    def __call__(self, *arguments: Tensor) -> Tensor:
        """Return (rows,) outputs for a point on the path, if there is an embedding, the inputs and the targets."""
        self.forwards += len(arguments[-1])
        if self._embedding is None:
            return self._read(arguments)
        point, *others = arguments
        handle = self._embedding.register_forward_hook(lambda _module, _args, _y: point)
        values = self._read(others)
        handle.remove()
        return values

    def result(self, study: Study, weights: np.ndarray, seconds: float) -> PeerAttributions:
        """Put the scores together with the counts, per example."""
        n = len(study.examples)
        return PeerAttributions(
            weights, self.forwards / n, self.backwards / n, len(study.components.sites()), round(seconds, 3)
        )

    def _read(self, arguments: Any) -> Tensor:
        *tensors, targets = arguments
        named = None if self._names is None else dict(zip(self._names, tensors, strict=True))
        values = self._output(self.model(*tensors) if named is None else self.model(**named), targets)
        if values.requires_grad:
            values.register_hook(self._count_backward)  # type: ignore[no-untyped-call]
        return values

    def _count_backward(self, gradient: Tensor) -> None:
        self.backwards += len(gradient)

    def _embedded(self, embedding: nn.Module, arguments: list[Tensor]) -> Tensor:
        """Return the (rows, length, width) embeddings of the inputs."""
        kept: list[Tensor] = []
        handle = embedding.register_forward_hook(lambda _module, _args, y: kept.append(y))
        with torch.no_grad():
            self.forwards += len(arguments[-1])
            self._read(arguments)
        handle.remove()
        return kept[-1]


def by_channel(values: Tensor, axis: int) -> Tensor:
    """Return (rows, channels, positions) from a tensor with channels on some axis."""
    moved = values.movedim(axis, 1)
    return moved.reshape(*moved.shape[:2], -1)
