"""Pipeline files: Python files that define a study for the command line."""

import importlib.util
import inspect
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

from coar.ablation.registry import ABLATIONS
from coar.comparison import Comparison
from coar.editing.goal import EditGoal
from coar.errors import CoarError, PipelineError, RenamedArgumentError, RenamedModuleError, RenamedNameError
from coar.examples import Examples
from coar.explorer.source import Source
from coar.store.run import Run
from coar.study import Study

MASKS = 5_000  # default of a file that sets neither masks nor mask gradients
DEFAULTS: dict[str, Any] = {"MASKS": None, "GRADIENTS": 0, "TEST_MASKS": 500, "TEST_FRACTIONS": ()}
LABELS = {kind.__name__: label for label, kind in ABLATIONS.items()}


@dataclass(frozen=True)
class Pipeline:
    """A loaded pipeline file.

    Attributes:
        name: The file's name without its extension.
        path: The file's path.
        masks: Training masks to collect by default (`MASKS` in the file; 5,000, or none in a file with `GRADIENTS`).
        gradients: Mask gradients to collect by default (`GRADIENTS`).
        test_masks: Test masks to collect by default, at each ablated fraction (`TEST_MASKS`).
        test_fractions: Further ablated fractions to test at by default (`TEST_FRACTIONS`).
        module: The file as a module.
    """

    name: str
    path: Path
    masks: int
    gradients: int
    test_masks: int
    test_fractions: tuple[float, ...]
    module: ModuleType

    def sizes(self, masks: int | None, gradients: int | None) -> dict[str, int]:
        """Return the numbers of training masks and mask gradients to collect.

        The file's own numbers apply when neither is given. When one is given, the other is 0 unless given too.
        """
        if masks is None and gradients is None:
            return {"masks": self.masks, "gradients": self.gradients}
        return {"masks": masks or 0, "gradients": gradients or 0}

    def study(self, **options: Any) -> Study:
        """Call the file's `study` with the options that are not None.

        Raises:
            PipelineError: When `study` takes no such option, or returns something other than a study.
        """
        define = _function(self.path, self.module, "study")
        given = {key: value for key, value in options.items() if value is not None}
        unknown = given.keys() - inspect.signature(define).parameters.keys()
        if unknown:
            raise PipelineError(
                f"study() in {self.path} takes no {min(unknown)!r}; leave that option out, or add it to the function"
            )
        return self._made("study", **given)

    def _made(self, name: str, **options: Any) -> Study:
        made = _function(self.path, self.module, name)(**options)
        if not isinstance(made, Study):
            raise PipelineError(
                f"{name}() in {self.path} returned a {type(made).__name__}; it must return a coar.Study"
            )
        return made

    def published(self) -> Study:
        """Return the file's study of published attributions.

        Raises:
            PipelineError: When the file defines no `published`, or it returns something other than a study.
        """
        return self._made("published")

    def study_of(self, run: Run) -> Study:
        """Define the study of a run again, with those of the run's settings that the file's `study` takes.

        For a run that was imported with this file, it is the study of published attributions on the run's examples.
        """
        imported = run.published
        if imported is not None:
            study = self.published()
            left = set(imported.left_out)
            if left:
                kept = [i for i in range(len(study.examples)) if i not in left]
                study = replace(study, examples=study.examples.subset(kept))
            run.check(study.fingerprint())
            return study
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
            PipelineError: When the file defines no `judge`.
        """
        return self._examples("judge")

    def choosing(self) -> Examples | None:
        """Return the file's further examples to choose edits on, or None when it defines none."""
        return self._examples("choosing") if hasattr(self.module, "choosing") else None

    def learning(self) -> Examples | None:
        """Return the file's examples to find circuits on, or None when it defines none."""
        return self._examples("learning") if hasattr(self.module, "learning") else None

    def facts(self) -> Examples:
        """Return the file's facts to trace; raise `PipelineError` when it defines no `facts`."""
        return self._examples("facts")

    def texts(self) -> tuple[Examples, Examples]:
        """Return the texts that lenses are trained on, and held-out ones.

        Raises:
            PipelineError: When the file defines no `texts`, or it returns something else.
        """
        texts = _function(self.path, self.module, "texts")()
        if not isinstance(texts, tuple) or [type(part) for part in texts] != [Examples, Examples]:
            raise PipelineError(
                f"texts() in {self.path} returned a {type(texts).__name__}; it must return two coar.Examples, to train "
                f"lenses on and to hold out"
            )
        return texts

    def tokenizer(self) -> Any:
        """Return the tokenizer of the file's language model; raise `PipelineError` when it defines no `tokenizer`."""
        return _function(self.path, self.module, "tokenizer")()

    def goal(self) -> EditGoal | None:
        """Return the file's goal of edits (`GOAL`), or None when it defines none."""
        goal = getattr(self.module, "GOAL", None)
        if goal is not None and not isinstance(goal, EditGoal):
            raise PipelineError(f"GOAL in {self.path} is a {type(goal).__name__}; it must be a coar.EditGoal")
        return goal

    def comparison(self) -> Comparison | None:
        """Return the cost comparison of two fits in the JSON file that `COMPARISON` names, or None."""
        file = getattr(self.module, "COMPARISON", None)
        return None if file is None else Comparison.read(Path(file))

    def source(self, run: Run, study: Study | None = None) -> Source:
        """Return what a page of a run needs from the file; its `show`, `judge` and `tokenizer` are optional.

        Args:
            run: The run.
            study: Its study; by default the file defines it again.
        """
        show = _function(self.path, self.module, "show") if hasattr(self.module, "show") else None
        judge = self.judge if hasattr(self.module, "judge") else None
        tokenizer = self.tokenizer() if hasattr(self.module, "tokenizer") else None
        return Source(study or self.study_of(run), judge, show, tokenizer, self.path)

    def _examples(self, name: str) -> Examples:
        examples = _function(self.path, self.module, name)()
        if not isinstance(examples, Examples):
            raise PipelineError(
                f"{name}() in {self.path} returned a {type(examples).__name__}; it must return coar.Examples"
            )
        return examples


def load_pipeline(path: str | Path) -> Pipeline:
    """Import a pipeline file.

    A pipeline file is the user's own trusted code. It defines `study(*, ablation, ablated_fraction, seed)`, with
    any of these options, which returns a `coar.Study`. For edits it defines `judge()`, which returns `coar.Examples`
    that no choice has seen, and optionally `choosing()`, which returns further examples to choose on, and `GOAL`, a
    `coar.EditGoal`. For imports it defines `published()`, which returns the study of published attributions. For
    circuits it may define `learning()`, which returns more examples than those of the study, to find circuits on. For
    traces it defines `facts()`, which returns `coar.Examples` with answers and the positions of subjects. For lenses it
    defines `texts()`, which returns texts to train on and held-out ones, and `tokenizer()`. For pages it may define
    `show(example)`, which returns the look of one example from its inputs; without it, texts are shown in the tokens of
    `tokenizer()`. `MASKS`, `GRADIENTS`, `TEST_MASKS` and `TEST_FRACTIONS` set what is collected by default.
    `COMPARISON` names a JSON file with the measured costs of two fits.

    Raises:
        PipelineError: When the file is missing, fails to import, or defines no `study`.
    """
    file = Path(os.path.expanduser(path))
    if file.suffix != ".py" or not file.is_file():
        raise PipelineError(f"{file} is not a Python file; give a pipeline such as pipelines/digits.py")
    spec = importlib.util.spec_from_file_location(f"coar_pipeline_{file.stem}", file.resolve())
    if spec is None or spec.loader is None:
        raise PipelineError(f"{file} cannot be imported; give a pipeline such as pipelines/digits.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    root = next(folder for folder in file.resolve().parents if not (folder / "__init__.py").is_file())
    if str(root) not in sys.path:
        sys.path.append(str(root))  # the file can import modules next to it and its own package
    try:
        spec.loader.exec_module(module)
    except (RenamedNameError, RenamedArgumentError, RenamedModuleError) as error:
        raise PipelineError(f"{file} was written for an earlier version: {error}") from None
    except CoarError:
        raise
    except Exception as error:
        raise PipelineError(f"{file} failed to import: {type(error).__name__}: {error}; correct the file") from error
    _function(file, module, "study")
    settings = {name: getattr(module, name, default) for name, default in DEFAULTS.items()}
    fractions = settings["TEST_FRACTIONS"]
    if settings["MASKS"] is None:
        settings["MASKS"] = 0 if settings["GRADIENTS"] else MASKS
    counts = [settings[name] for name in ("MASKS", "GRADIENTS", "TEST_MASKS")]
    if not all(isinstance(count, int) for count in counts) or not isinstance(fractions, tuple | list):
        raise PipelineError(
            f"{file} sets {settings}; MASKS, GRADIENTS and TEST_MASKS must be whole numbers, TEST_FRACTIONS a tuple of "
            f"fractions"
        )
    return Pipeline(
        name=file.stem,
        path=file,
        masks=settings["MASKS"],
        gradients=settings["GRADIENTS"],
        test_masks=settings["TEST_MASKS"],
        test_fractions=tuple(fractions),
        module=module,
    )


def _function(path: Path, module: ModuleType, name: str) -> Callable[..., Any]:
    function = getattr(module, name, None)
    if not callable(function):
        raise PipelineError(f"{path} defines no function {name}(); pipelines/digits.py shows what a pipeline needs")
    return function  # type: ignore[no-any-return]
