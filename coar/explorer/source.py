"""What a page needs from a pipeline: the study, its judging examples, and how an example looks."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coar.examples import Examples
from coar.study import Study

Show = Callable[[Any], Any]


@dataclass(frozen=True)
class Source:
    """The part of a pipeline that a page uses.

    Attributes:
        study: The study of the run.
        judge: Returns the judging examples of edits; None when there are none.
        show: Returns the look of one example from its inputs (see `looks.looks_of`); None for the default.
        tokenizer: The tokenizer of the texts, for tokens in words; None for their numbers.
        file: The pipeline file, for commands on the page.
    """

    study: Study
    judge: Callable[[], Examples] | None = None
    show: Show | None = None
    tokenizer: Any = None
    file: Path | None = None
