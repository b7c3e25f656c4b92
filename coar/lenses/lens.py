"""A lens of each layer of a language model: logits that a latent predicts, their divergence, reading, and storage."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from coar.charts import html_facts
from coar.errors import SettingsError, StorageError, WeightsError
from coar.examples import Examples
from coar.forward.devices import choose_device
from coar.lenses.divergence import chunks, divergences, passes
from coar.lenses.kinds import Parameters, lens_kind
from coar.lenses.layer_stack import LayerStack
from coar.lenses.reading import LensReading, Tokenizer
from coar.lenses.steering import steering
from coar.weights import read_state, save_state, weights_fingerprint

if TYPE_CHECKING:
    import pandas as pd

TENSORS, DESCRIPTION = "lens.safetensors", "lens.json"


@dataclass(frozen=True, eq=False)
class Lens:
    """A lens reads the residual stream before a layer as a prediction of the next token.

    With h the latent before layer l at one token, U the model's last norm and head, and MLP and norms of later layers
    those of the model, each kind predicts the logits

        logit    U(h)                                              (nostalgebraist 2020)
        tuned    U(h + W_l h + b_l)                                (Belrose et al. 2023)
        mean     layers l, l + 1, ... on h, their attention outputs replaced by their means over tokens
        optimal  the same with constants trained for layer l       (Li and Janson 2024)

    Trained parameters minimise KL(model || lens), averaged over tokens.

    Attributes:
        kind: `optimal`, `mean`, `tuned` or `logit`.
        layers: Numbers of the layers that have a lens.
        facts: What made the lens: steps, texts, learning rate, and hashes of the model's weights and of the texts.
    """

    kind: str
    layers: tuple[int, ...]
    facts: dict[str, Any]
    _stack: LayerStack = field(repr=False)
    _parameters: dict[int, Parameters] = field(repr=False)

    def logits(self, latents: Tensor, layer: int) -> Tensor:
        """Return (tokens, vocabulary) float32 logits that (tokens, width) latents before a layer predict."""
        return lens_kind(self.kind).logits(self._stack, self._own(layer), latents, layer)

    def _own(self, layer: int) -> Parameters:
        if layer not in self.layers:
            raise SettingsError(f"layer {layer} has no lens; choose one of {self.layers}")
        return self._parameters[layer]

    def divergence(self, texts: Examples) -> "pd.DataFrame":
        """Return the mean divergence of the lens from the model, a row per layer and text.

        Columns are `layer`, `text` (its number), `kl`: the mean over the text's tokens but the first of
        KL(model || lens) = sum over v of p_v (log p_v - log q_v) in nats, and `tokens`: their number.
        """
        import pandas as pd

        kind, frames = lens_kind(self.kind), []
        with torch.no_grad():
            for first, passed in passes(self._stack, texts):
                numbers = first + passed.text.cpu().numpy()
                for layer in self.layers:
                    kl = torch.cat([*divergences(kind, self._stack, self._parameters[layer], passed, layer)])
                    frames.append(pd.DataFrame({"layer": layer, "text": numbers, "kl": kl.cpu().numpy()}))
        table = pd.concat(frames, ignore_index=True)
        return table.groupby(["layer", "text"], as_index=False).agg(kl=("kl", "mean"), tokens=("kl", "size"))

    def summary(self, texts: Examples, *, seed: int = 0) -> "pd.DataFrame":
        """Return the mean over texts of the divergence with its 95 % bootstrap interval, a row per layer."""
        import pandas as pd

        table, rows = self.divergence(texts), []
        generator = np.random.default_rng(seed)
        for layer, own in table.groupby("layer"):
            values = own["kl"].to_numpy()
            means = values[generator.integers(0, len(values), (2000, len(values)))].mean(1)
            low, high = np.percentile(means, (2.5, 97.5))
            rows.append({"kind": self.kind, "layer": layer, "kl": values.mean(), "low": low, "high": high})
        return pd.DataFrame(rows)

    def read(self, text: str | Tensor, tokenizer: Tokenizer | None = None, *, top: int = 5) -> LensReading:
        """Read one text: the most probable next tokens at each layer and token.

        Args:
            text: The text, or its (tokens,) token numbers.
            tokenizer: The model's tokenizer; needed for a text, and for tokens in words.
            top: Number of most probable tokens.

        Raises:
            SettingsError: When a text is given without a tokenizer.
        """
        if isinstance(text, str):
            if tokenizer is None:
                raise SettingsError(
                    "a text was given without a tokenizer; give tokenizer=, or the text's token numbers"
                )
            ids = torch.as_tensor(tokenizer(text, return_tensors="pt")["input_ids"]).reshape(-1)
        else:
            ids = text.reshape(-1)
        if len(ids) < 2:
            raise SettingsError(f"the text has {len(ids)} tokens; at least 2 are needed, since the first is not read")
        inputs = {"input_ids": ids[None], "attention_mask": torch.ones_like(ids[None])}
        passed = self._stack.latents(inputs)
        stack, probable = self._stack, []
        with torch.no_grad():
            for layer in self.layers:
                states = passed.states[layer]
                found = [self.logits(states[part], layer).softmax(1).topk(top) for part in chunks(stack, len(states))]
                values, tokens = (torch.cat(parts) for parts in zip(*found, strict=True))
                probable.append((values, tokens))
        last = passed.logits.softmax(1).topk(top)
        return LensReading.of(self.layers, ids, [*probable, (last.values, last.indices)], tokenizer)

    def steering(
        self,
        texts: Examples,
        layer: int,
        *,
        directions: str = "random",
        count: int = 8,
        kl: float = 0.2,
        seed: int = 0,
    ) -> "pd.DataFrame":
        """Move the latent of each text's last token before a layer, and compare the lens with the model.

        Along each direction, all latents are moved by the length for which KL(lens before || lens after) is `kl` on
        average. A faithful lens predicts which moves change the model's next token, and how (Li and Janson 2024).

        Args:
            texts: Texts of at least two tokens.
            layer: Number of the layer.
            directions: `random` unit vectors; or `singular`, the strongest right singular vectors of the Jacobian of
                the lens's centred logits at the mean latent.
            count: Number of directions.
            kl: The lens's mean divergence, in nats.
            seed: Seed of random directions.

        Returns:
            A row per direction and text: `layer`, `direction`, `text`, `kl_lens` and `kl_model`, the divergences of the
            logits after the move from those before, and `similarity`: the cosine of the changes of probabilities.

        Raises:
            SettingsError: When the layer has no lens, the kind of direction is unknown, or a text has one token.
        """
        self._own(layer)
        return steering(self._stack, lambda x: self.logits(x, layer), texts, layer, directions, count, kl, seed)

    def _repr_html_(self) -> str:
        return html_facts(f"Lens of kind {self.kind}, of layers {self.layers[0]} to {self.layers[-1]}", self.facts)

    def save(self, folder: str | Path) -> None:
        """Write the lens into a folder, as `lens.safetensors` and `lens.json`.

        Raises:
            StorageError: When the folder cannot be written.
        """
        save_state(named(self._parameters), Path(folder) / TENSORS)
        write_description(Path(folder), {"kind": self.kind, "layers": list(self.layers), **self.facts})

    @classmethod
    def load(cls, folder: str | Path, model: nn.Module, *, device: str = "auto") -> Self:
        """Read a lens that `save` or `coar.lens` wrote, to compute on a device.

        Raises:
            WeightsError: When the files are damaged, or the lens is of another model.
        """
        place = Path(folder)
        facts = read_description(place)
        own = weights_fingerprint(model)
        if facts.get("weights") != own:
            raise WeightsError(
                f"the lens in {place} was made for weights {str(facts.get('weights'))[:12]}, and this model has "
                f"{own[:12]}; load it with the model that it was made for, or make one with coar.lens"
            )
        stack = LayerStack(model, choose_device(device))
        kind, layers = str(facts.pop("kind")), tuple(facts.pop("layers"))
        parameters: dict[int, Parameters] = {layer: {} for layer in layers}
        for name, value in read_state(place / TENSORS).items():
            layer, _, own_name = name.partition(".")
            parameters[int(layer)][own_name] = value.to(stack.device)
        return cls(kind, layers, facts, stack, parameters)


def named(parameters: dict[int, Parameters]) -> Parameters:
    """Return the parameters of all layers by name, such as `3.moved`."""
    return {f"{layer}.{name}": value for layer, own in parameters.items() for name, value in own.items()}


def write_description(folder: Path, facts: dict[str, Any]) -> None:
    """Write the facts about a lens into its folder; raise `StorageError` when that is impossible."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / DESCRIPTION).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise StorageError(f"cannot write a lens to {folder}: {error}; choose another folder") from error


def read_description(folder: Path) -> dict[str, Any]:
    """Return the facts about the lens in a folder; raise `WeightsError` when there is none."""
    try:
        facts = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
        if not isinstance(facts, dict) or not {"kind", "layers", "weights"} <= facts.keys():
            raise ValueError("kind, layers or weights are missing")
    except (OSError, ValueError) as error:
        raise WeightsError(f"{folder} holds no lens ({error}); make one with coar.lens(..., folder=...)") from None
    return facts
