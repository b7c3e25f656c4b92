"""The model behind a served page: it measures what the page predicts, and judges and saves edits made by hand."""

import re
import threading
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from coar.attributions import Attributions
from coar.collection.preparation import fast_runner
from coar.editing.edit import Edit, edit_of
from coar.editing.evaluate import columns
from coar.editing.judge import margins
from coar.errors import EditError, SettingsError
from coar.examples import device_of
from coar.explorer.activations import activations_of
from coar.explorer.edits import edits_of
from coar.explorer.packing import floats, plain, table
from coar.explorer.part import Part
from coar.explorer.source import Source
from coar.forward.copies import device_copy
from coar.report import write_edit
from coar.store.run import Run

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,39}")
CHARACTERS, TOKENS = 4_000, 256  # of a text that is typed, at most
CONTINUED = 24  # tokens that a text is continued by
NEXT = 5  # most probable next tokens


class LiveModel:
    """Runs the model of a run without components that a page names by their numbers on it.

    Args:
        run: The run.
        source: Its pipeline.
        attributions: The attributions on the page.
        part: The examples and components on the page.
        folder: The reports folder, into which edits are saved.
        device: Where to compute.

    Raises:
        SettingsError: When there is no such device, or the ablation takes activations of examples that are not on the
            page.
    """

    def __init__(
        self, run: Run, source: Source, attributions: Attributions, part: Part, folder: Path, *, device: str = "auto"
    ) -> None:
        study = source.study
        if study.ablation.sources is not None and len(part.examples) < part.n_examples:
            raise SettingsError(
                f"{run.fingerprint['ablation']['name']} ablation replaces activations by those of other examples, and "
                f"the page has {len(part.examples)} of {part.n_examples}; collect a run of fewer examples"
            )
        self._run, self._source, self._attributions, self._part = run, source, attributions, part
        self._folder, self._device = folder, device
        self._runner = fast_runner(study, run, device_copy(study.model, device, study.examples))
        self._examples = (
            study.examples if len(part.examples) == part.n_examples else study.examples.subset(part.examples)
        )
        self._lock = threading.Lock()

    def measure(self, components: list[int]) -> dict[str, Any]:
        """Return the outputs of the examples on the page when components are ablated.

        Raises:
            SettingsError: When a number is not one of a component on the page.
        """
        mask = np.ones((1, self._part.n_components), dtype=bool)
        mask[0, self._rows(components)] = False
        step = self._runner.batch_size
        ends = [*range(0, len(self._examples), step), len(self._examples)]
        with self._lock:
            blocks = (self._runner.load(self._examples, start, stop) for start, stop in pairwise(ends))
            found = [self._runner.outputs(block, mask) for block in blocks]
        return {"output": floats(np.concatenate(found, axis=1)[0])}

    def judge(self, components: list[int]) -> dict[str, Any]:
        """Return margins of the judging examples before and after an edit by hand, and accuracies by label.

        Raises:
            SettingsError: When a number is not one of a component on the page, or the pipeline cannot judge.
            EditError: When no edit can ablate one of the components.
        """
        import pandas as pd

        edit = self._edit(components)
        study, judge = self._source.study, self._source.judge
        pair = study.output.hard_and_smooth()
        if judge is None or pair is None:
            raise SettingsError("the pipeline has no judging examples, or its output is not a margin; add judge()")
        with self._lock:
            examples = judge()
            nets = (study.model, edit.apply(study.model))
            before, after = (margins(net, examples, device=self._device, output=pair[0]) for net in nets)
        groups = {"all": np.ones(len(examples), dtype=bool)}
        labels = columns(examples).get("label")
        if labels is not None:
            groups |= {str(plain(value)): labels == value for value in np.unique(labels)}
        rows = [
            {
                "group": name,
                "examples": int(chosen.sum()),
                "accuracy_before": float((before[chosen] > 0).mean()),
                "accuracy_after": float((after[chosen] > 0).mean()),
                "margin_before": float(before[chosen].mean()),
                "margin_after": float(after[chosen].mean()),
            }
            for name, chosen in groups.items()
        ]
        return {"table": table(pd.DataFrame(rows))}

    def save(self, components: list[int], name: str) -> dict[str, Any]:
        """Save an edit by hand, and the edited weights, into a new folder of the reports folder.

        Returns:
            The `files`, and the `task` that the page shows under its edits, with judging examples of its own.

        Raises:
            SettingsError: When a number is not one of a component on the page, or the name is not a simple one.
            EditError: When no edit can ablate one of the components, or there is a folder of that name.
            StorageError: When the folder cannot be written.
        """
        if not NAME.fullmatch(name):
            raise SettingsError("the name of an edit has up to 40 letters, digits, - and _, and starts with no sign")
        place = self._folder / name
        if place.exists():
            raise EditError(f"{place} exists; choose another name")
        model = self._source.study.model
        with self._lock:
            files = write_edit(self._edit(components).keep(model), model, place, self._source.study.examples)
            names = [self._attributions.components[int(row)].name for row in self._part.components]
            made = edits_of(self._folder, names, self._attributions, self._source, only=name)
        (task,) = made["tasks"]
        return {"files": [str(file) for file in files], "task": task | {"judge": made["judge"]}}

    @property
    def reads_texts(self) -> bool:
        """Whether the pipeline has a tokenizer, and a language model that takes its tokens and continues texts."""
        inputs = self._examples.block(0, 1)[0]
        texts = isinstance(inputs, dict) and "input_ids" in inputs
        return texts and callable(self._source.tokenizer) and hasattr(self._source.study.model, "generate")

    @cached_property
    def _model(self) -> nn.Module:
        return device_copy(self._source.study.model, self._device, self._source.study.examples)

    def read(self, components: list[int], text: str) -> dict[str, Any]:
        """Return the tokens of a text, and the activation of one component at each of them.

        Raises:
            SettingsError: When not one component of the page is given, or the text cannot be read.
        """
        rows = self._rows(components)
        if len(rows) != 1:
            raise SettingsError(f"{len(rows)} components were given to read a text; give one")
        tokens = self._tokens(text)
        with self._lock:
            given = {name: value.to(device_of(self._model)) for name, value in tokens.items()}
            component = self._attributions.components[int(rows[0])]
            values = activations_of(self._model, component, self._run.facts.batch_norms, given)
        return {"words": self._words(tokens["input_ids"][0]), "values": floats(values)}

    def complete(self, components: list[int], text: str) -> dict[str, Any]:
        """Return how the model continues a text, with all components and without some.

        Each of `with` and `without` has the most probable next tokens, with their probabilities, and the continuation
        by the most probable token, step by step.

        Raises:
            SettingsError: When a number is not one of a component on the page, or the text cannot be read.
            EditError: When no edit can ablate one of the components.
        """
        edit, tokens = self._edit(components), self._tokens(text)
        model = self._source.study.model
        with self._lock:
            return {"with": self._completion(model, tokens), "without": self._completion(edit.apply(model), tokens)}

    def _completion(self, net: Any, tokens: dict[str, Tensor]) -> dict[str, Any]:
        given = {name: value.to(next(net.parameters()).device) for name, value in tokens.items()}
        length = given["input_ids"].shape[1]
        with torch.no_grad():
            shares, ids = net(**given).logits[0, -1].float().softmax(0).topk(NEXT)
            longer = net.generate(**given, max_new_tokens=CONTINUED, do_sample=False)[0, length:]
        following = [[word, share] for word, share in zip(self._words(ids), shares.tolist(), strict=True)]
        return {"next": following, "text": self._source.tokenizer.decode(longer.tolist())}

    def _tokens(self, text: str) -> dict[str, Tensor]:
        if not self.reads_texts:
            raise SettingsError("the pipeline has no tokenizer, or its model is no language model; add tokenizer()")
        if not text.strip() or len(text) > CHARACTERS:
            raise SettingsError(f"the text has {len(text):,} characters; give some, and at most {CHARACTERS:,}")
        found = self._source.tokenizer(text, return_tensors="pt")
        tokens = {name: found[name] for name in ("input_ids", "attention_mask")}
        count = tokens["input_ids"].shape[1]
        if not 0 < count <= TOKENS:
            raise SettingsError(f"the text has {count:,} tokens; give some, and at most {TOKENS}")
        return tokens

    def _words(self, ids: Tensor) -> list[str]:
        return [self._source.tokenizer.decode([one]) for one in ids.tolist()]

    def _rows(self, components: list[int]) -> np.ndarray:
        count = len(self._part.components)
        if not components or len(set(components)) != len(components):
            raise SettingsError("no component, or one of them twice, was given; give different ones")
        if not all(0 <= one < count for one in components):
            raise SettingsError(f"a component was given that is not on the page, which has {count}, counted from 0")
        rows: np.ndarray = self._part.components[components]
        return rows

    def _edit(self, components: list[int]) -> Edit:
        return edit_of(self._attributions, None, self._rows(components), np.zeros(self._part.n_components))
