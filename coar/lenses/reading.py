"""What a lens reads in one text: the most probable next tokens at every layer and token, as a table and a heat map."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, Self

from torch import Tensor

from coar.charts import axes_or_new, html_table

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

MODEL = "model"  # the name of the model's own prediction, in the place of a layer


class Tokenizer(Protocol):
    """What a lens needs of a tokenizer of transformers."""

    def __call__(self, text: str, *, return_tensors: str) -> Any:
        """Return the text's `input_ids`."""

    def decode(self, token_ids: list[int]) -> str:
        """Return the text of tokens."""


@dataclass(frozen=True)
class LensReading:
    """The most probable next tokens at every layer and token of a text.

    Attributes:
        table: A row per layer, position and rank: `layer`, the number of a layer or `model` for the model's own
            prediction; `position`, the token's place in the text; `token`, that token; `rank`, from 1; `prediction`,
            the predicted next token; `probability`.
    """

    table: "pd.DataFrame"

    @classmethod
    def of(
        cls,
        layers: Sequence[int],
        ids: Tensor,
        probable: Sequence[tuple[Tensor, Tensor]],
        tokenizer: Tokenizer | None,
    ) -> Self:
        """Make the table from (positions, ranks) probabilities and tokens of each layer, and last of the model."""
        import pandas as pd

        def word(token: int) -> str:
            return str(token) if tokenizer is None else tokenizer.decode([token])

        given, rows = [word(token) for token in ids.tolist()], []
        for layer, (values, tokens) in zip([*layers, MODEL], probable, strict=True):
            for i, (shares, predicted) in enumerate(zip(values.tolist(), tokens.tolist(), strict=True), start=1):
                rows += [
                    {
                        "layer": layer,
                        "position": i,
                        "token": given[i],
                        "rank": rank,
                        "prediction": word(token),
                        "probability": share,
                    }
                    for rank, (share, token) in enumerate(zip(shares, predicted, strict=True), start=1)
                ]
        return cls(pd.DataFrame(rows))

    def grid(self) -> "pd.DataFrame":
        """Return the most probable next tokens, a row per layer and a column per position."""
        first = self.table[self.table["rank"] == 1]
        wide = first.pivot_table(index="layer", columns="position", values="prediction", aggfunc="first", sort=False)
        return wide.reindex(list(dict.fromkeys(self.table["layer"])))

    def _repr_html_(self) -> str:
        words = dict(zip(self.table["position"], self.table["token"], strict=True))
        return html_table(self.grid().rename(columns=words).reset_index())

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Draw a heat map of the largest probability, with the most probable next token in each cell.

        Args:
            ax: Matplotlib axes; by default those of a new figure that fits the text.
        """
        first = self.table[self.table["rank"] == 1]
        layers = list(dict.fromkeys(self.table["layer"]))
        wide = first.pivot_table(index="layer", columns="position", values="probability", sort=False).reindex(layers)
        shares, words = wide.to_numpy(), self.grid().to_numpy()
        given = dict(zip(first["position"], first["token"], strict=True))
        width, height = max(5.0, 0.75 * shares.shape[1] + 1.5), max(3.0, 0.28 * shares.shape[0] + 1.2)
        ax = axes_or_new(ax, width=width, height=height)
        image = ax.imshow(shares, cmap="cividis", vmin=0, vmax=1, aspect="auto", origin="lower")
        for row in range(shares.shape[0]):
            for column in range(shares.shape[1]):
                dark = shares[row, column] < 0.55
                ax.text(
                    column,
                    row,
                    _short(words[row, column]),
                    ha="center",
                    va="center",
                    fontsize=7,
                    color="white" if dark else "black",
                    parse_math=False,
                )
        ax.set_xticks(
            range(shares.shape[1]),
            [_short(given[p]) for p in wide.columns],
            fontsize=8,
            rotation=45,
            ha="right",
            parse_math=False,
        )
        ax.set_yticks(range(shares.shape[0]), [str(layer) for layer in layers], fontsize=8)
        ax.set_xlabel("token read")
        ax.set_ylabel("before layer")
        ax.figure.colorbar(image, ax=ax, label="probability of the most probable next token")
        return ax


def _short(word: str, most: int = 9) -> str:
    shown = word.replace("\n", "\\n").strip() or repr(word)
    return shown if len(shown) <= most else shown[: most - 1] + "\u2026"
