"""Pipeline files: Python files that define a study, and what a command line needs beside it."""

import importlib.util
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from coar.ablation.registry import ABLATIONS
from coar.editing.goal import EditGoal
from coar.errors import CoarError, PipelineError
from coar.examples import Examples
from coar.store.run import Run
from coar.study import Study

DEFAULTS: dict[str, Any] = {"MASKS": 5_000, "TEST_MASKS": 500, "TEST_FRACTIONS": ()}
LABELS = {kind.__name__: label for label, kind in ABLATIONS.items()}


@dataclass(frozen=True)
class Pipeline:
    """A pipeline file, loaded.

    Attributes:
        name: The file's name without its ending.
        path: Where the file is.
        masks: Training masks to collect unless the user says otherwise (`MASKS` in the file).
        test_masks: Test masks likewise (`TEST_MASKS`).
        test_fractions: Further ablated fractions to test at likewise (`TEST_FRACTIONS`).
        module: The file as a module.
    """

    name: str
    path: Path
    masks: int
    test_masks: int
    test_fractions: tuple[float, ...]
    module: ModuleType

    def study(self, **options: Any) -> Study:
        """Call the file's `study` with the options that are not None.

        Raises:
            PipelineError: When it knows no such option, or returns something other than a study.
        """
        define = _function(self.path, self.module, "study")
        given = {key: value for key, value in options.items() if value is not None}
        unknown = given.keys() - inspect.signature(define).parameters.keys()
        if unknown:
            raise PipelineError(
                f"study() in {self.path} takes no {min(unknown)!r}; leave that option out, or add it to the function"
            )
        made = define(**given)
        if not isinstance(made, Study):
            raise PipelineError(f"study() in {self.path} returned a {type(made).__name__}; it must return a coar.Study")
        return made

    def study_of(self, run: Run) -> Study:
        """Define the study again as it was for a run, so far as the file's options reach."""
        sampler, ablation = run.fingerprint["sampler"], run.fingerprint["ablation"]["name"]
        options = {
            "ablation": LABELS.get(ablation),
            "ablated_fraction": sampler["ablated_fraction"],
            "seed": sampler["seed"],
        }
        known = inspect.signature(_function(self.path, self.module, "study")).parameters
        study = self.study(**{key: value for key, value in options.items() if key in known})
        run.check(study.fingerprint())
        return study

    def judge(self) -> Examples:
        """Return the file's examples for judging edits.

        Raises:
            PipelineError: When it defines none.
        """
        return self._examples("judge")

    def choosing(self) -> Examples | None:
        """Return the file's further examples to choose edits on, None where it defines none."""
        return self._examples("choosing") if hasattr(self.module, "choosing") else None

    def goal(self) -> EditGoal | None:
        """Return the goal of edits that the file names (`GOAL`), None where it names none."""
        goal = getattr(self.module, "GOAL", None)
        if goal is not None and not isinstance(goal, EditGoal):
            raise PipelineError(f"GOAL in {self.path} is a {type(goal).__name__}; it must be a coar.EditGoal")
        return goal

    def _examples(self, name: str) -> Examples:
        examples = _function(self.path, self.module, name)()
        if not isinstance(examples, Examples):
            raise PipelineError(
                f"{name}() in {self.path} returned a {type(examples).__name__}; it must return coar.Examples"
            )
        return examples


def load_pipeline(path: str | Path) -> Pipeline:
    """Import a pipeline file.

    A pipeline file is trusted code of the user's own. It defines `study(*, ablation, ablated_fraction, seed)`, with
    any of these options, returning a `coar.Study`; and for edits `judge()`, returning `coar.Examples` that no choice
    has seen, and if there are any `choosing()`, further examples to choose on, and `GOAL`, what to edit for. `MASKS`,
    `TEST_MASKS` and `TEST_FRACTIONS` are what is collected unless the user says otherwise.

    Raises:
        PipelineError: When the file is missing, fails to import, or defines no `study`.
    """
    file = Path(path)
    if file.suffix != ".py" or not file.is_file():
        raise PipelineError(f"{file} is not a Python file; give a pipeline such as pipelines/digits.py")
    spec = importlib.util.spec_from_file_location(f"coar_pipeline_{file.stem}", file.resolve())
    if spec is None or spec.loader is None:
        raise PipelineError(f"{file} cannot be imported; give a pipeline such as pipelines/digits.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    root = next(folder for folder in file.resolve().parents if not (folder / "__init__.py").is_file())
    if str(root) not in sys.path:
        sys.path.append(str(root))  # the file finds its neighbours, as a script does, and its own package
    try:
        spec.loader.exec_module(module)
    except CoarError:
        raise
    except Exception as error:
        raise PipelineError(f"{file} failed to import: {type(error).__name__}: {error}; mend the file") from error
    _function(file, module, "study")
    settings = {name: getattr(module, name, default) for name, default in DEFAULTS.items()}
    fractions = settings["TEST_FRACTIONS"]
    if not all(isinstance(settings[name], int) for name in ("MASKS", "TEST_MASKS")) or not isinstance(
        fractions, tuple | list
    ):
        raise PipelineError(
            f"{file} sets {settings}; MASKS and TEST_MASKS must be whole numbers, TEST_FRACTIONS a tuple of fractions"
        )
    return Pipeline(file.stem, file, settings["MASKS"], settings["TEST_MASKS"], tuple(fractions), module)


def _function(path: Path, module: ModuleType, name: str) -> Callable[..., Any]:
    function = getattr(module, name, None)
    if not callable(function):
        raise PipelineError(f"{path} defines no function {name}(); pipelines/digits.py shows what a pipeline needs")
    return function  # type: ignore[no-any-return]
