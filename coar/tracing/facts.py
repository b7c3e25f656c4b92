"""Facts to trace: prompts with their answers, the tokens of their subjects, and the places that are restored."""

from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor

from coar.errors import ExamplesError
from coar.examples import UNREAD, Examples
from coar.inputs import Inputs

FIRST, LAST = "subject_first", "subject_last"  # positions of examples that a trace needs


@dataclass(frozen=True, eq=False)
class Facts:
    """Prompts of one batch.

    Attributes:
        inputs: Tensors by name, `input_ids` among them.
        answer: (facts,) tokens of the answers.
        read: (facts,) positions that predict them.
        subject: (facts, positions) booleans, True at the tokens of the subject.
        places: (facts, positions) booleans by the name of a place, True at the positions that are restored.
    """

    inputs: dict[str, Tensor]
    answer: Tensor
    read: Tensor
    subject: Tensor
    places: dict[str, Tensor]

    @classmethod
    def of(cls, examples: Examples, device: torch.device) -> Self:
        """Take the prompts of `coar.token_examples`, with answers and the positions of the subjects' tokens.

        Raises:
            ExamplesError: When the positions or the answers are missing, or a subject ends before it begins.
        """
        missing = [name for name in (FIRST, LAST) if name not in examples.positions]
        inputs: Inputs = examples.block(0, len(examples))[0]
        if missing or not isinstance(inputs, dict):
            lacking = f"no positions {' and '.join(missing)}" if missing else "inputs without names"
            raise ExamplesError(
                f"the facts have {lacking}; make them with coar.token_examples(tokens, answers=..., "
                f"positions={{'{FIRST}': ..., '{LAST}': ...}})"
            )
        first, last = (torch.as_tensor(examples.positions[name]).to(device) for name in (FIRST, LAST))
        wrong = (last < first).nonzero()
        if len(wrong):
            raise ExamplesError(
                f"the subject of fact {int(wrong[0])} ends at position {int(last[wrong[0]])}, before it begins at "
                f"{int(first[wrong[0]])}; exchange the two"
            )
        answer, read = _answers(examples)
        read = read.to(device)
        columns = torch.arange(inputs["input_ids"].shape[1], device=device)
        subject = (columns >= first[:, None]) & (columns <= last[:, None])
        spans = {"subject": subject, "all": (columns >= first[:, None]) & (columns <= read[:, None])}
        named = {name: torch.as_tensor(column).to(device) for name, column in examples.positions.items()}
        single = {"subject_middle": (first + last) // 2} | named | {"last": read}
        return cls(
            inputs={name: value.to(device) for name, value in inputs.items()},
            answer=answer.to(device),
            read=read,
            subject=subject,
            places=spans | {name: columns == column[:, None] for name, column in single.items()},
        )

    def __len__(self) -> int:
        return len(self.answer)

    def subset(self, rows: Tensor) -> Self:
        """Return some of the facts, by their numbers."""
        return type(self)(
            {name: value[rows] for name, value in self.inputs.items()},
            self.answer[rows],
            self.read[rows],
            self.subject[rows],
            {name: value[rows] for name, value in self.places.items()},
        )


def _answers(examples: Examples) -> tuple[Tensor, Tensor]:
    """Return the answer of each fact and the position that predicts it."""
    targets = examples.targets if examples.targets.ndim == 2 else examples.targets.flatten(2)[..., 0]
    rows, read = torch.where(targets != UNREAD)
    if not np.array_equal(rows.cpu().numpy(), np.arange(len(examples))):
        raise ExamplesError(
            "every fact needs one answer, at one position; make the facts with coar.token_examples(tokens, answers=...)"
        )
    return targets[rows, read], read
