"""Models with LoRA of peft, before and after the adapter is merged into the weights."""

from collections.abc import Iterator
from functools import partial

import peft
import torch
from torch import nn

from benchmarks.models_table import transformers_models
from benchmarks.models_table.subjects import Subject, by_pretrained, by_state_dict

TARGETS = {
    "llama": ["q_proj", "v_proj"],
    "gpt2": ["c_attn"],
    "bert": ["query", "value"],
    "vit": ["query", "value", "q_proj", "v_proj"],
}


def subjects() -> Iterator[Subject]:
    """Yield each model twice."""
    plain = {subject.name: subject for subject in transformers_models.subjects()}
    for name, targets in TARGETS.items():
        for merged in (False, True):
            make = partial(_make, plain[name], targets, merged=merged)
            word = "merged" if merged else "unmerged"
            saved = by_pretrained if merged else by_state_dict  # a saved adapter has no weights below it
            yield Subject(f"{name}-lora-{word}", "peft", make, plain[name].inputs, saved)


def _make(subject: Subject, targets: list[str], *, merged: bool) -> nn.Module:
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False)
    model = peft.get_peft_model(subject.make(), config)  # type: ignore[arg-type]
    return model.merge_and_unload() if merged else model  # type: ignore[operator,no-any-return]
