"""Passages of text and a causal language model: a small GPT-2, or one of your own.

    pip install '.[text]'
    coar collect pipelines/gpt2.py --gradients 64
    coar fit runs/gpt2-mean.zarr

    export COAR_GPT2=/path/to/gpt2          # optional: a folder, or a name on the hub, such as gpt2
    export COAR_GPT2_TEXT=/path/to/text     # optional: a file of text in UTF-8
    export COAR_GPT2_COMPONENTS=heads       # optional: attention heads instead of input features

Without COAR_GPT2_TEXT the text is the language reference that comes with Python (`pydoc_data.topics`), which depends on
the version of Python. Without COAR_GPT2 the model is a GPT-2 of three layers, trained on the text on first use, in
about two minutes on one core, and kept under data/gpt2. Any causal language model can take its place. The components
are those of Shah et al. (2024): every input feature of every linear layer but the last, 64,512 in the smallest
published GPT-2 and 2,688 here. The output is the margin of the next tokens, averaged over a passage, or of its last
token.
"""

import os
from functools import cache
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

import coar
from pipelines import hub, language_model, training

try:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
except ImportError as error:
    raise coar.errors.PipelineError(
        f"the pipeline gpt2 needs {error.name}, which is not installed; {coar.errors.install_hint('text')}"
    ) from None

MASKS = 3_000
TEST_MASKS = 300
TEST_FRACTIONS = (0.05,)

SOURCE = hub.Source(
    name="a causal language model",
    variable="COAR_GPT2",
    default="gpt2",
    contents="a causal language model and its tokenizer,",
)
FOLDER = Path("data/gpt2")
RECIPE = training.Recipe(epochs=12, batch=32, learning_rate=4e-3, weight_decay=0.1)
SIZES = {"n_layer": 3, "n_head": 4, "n_embd": 128}
VOCABULARY = 1_024  # tokens of the small model: bytes, and merged pairs of tokens
LENGTH = 64  # tokens of a passage
HELD_OUT = 8  # one passage in so many is held out from training, for studying or judging
TRAIN, STUDIED, CALIBRATION = 2_000, 64, 200
KINDS = ("inputs", "heads")


def text() -> str:
    """Return the text of the file that COAR_GPT2_TEXT names, or Python's language reference."""
    file = os.environ.get("COAR_GPT2_TEXT")
    if file is None:
        return "\n\n".join(topics[topic] for topic in sorted(topics))
    try:
        return Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise coar.errors.PipelineError(
            f"cannot read the text {file} ({error}); set COAR_GPT2_TEXT to a file of text in UTF-8"
        ) from None


def tokenizer() -> Any:
    """Return the tokenizer of the model that COAR_GPT2 names, or that of the small model."""
    return SOURCE.load(AutoTokenizer) if "COAR_GPT2" in os.environ else byte_pairs(text())


@cache
def byte_pairs(of: str) -> PreTrainedTokenizerFast:
    """Return a tokenizer that merges frequent pairs of bytes of a text."""
    pairs = Tokenizer(models.BPE())
    pairs.pre_tokenizer, pairs.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    every = pre_tokenizers.ByteLevel.alphabet()
    pairs.train_from_iterator(
        of.splitlines(keepends=True),
        trainers.BpeTrainer(vocab_size=VOCABULARY, initial_alphabet=every, show_progress=False),
    )
    return PreTrainedTokenizerFast(tokenizer_object=pairs)


def examples(part: Literal["train", "studied", "judge"]) -> coar.Examples:
    """Return passages of the text, with their place in it as `id`. Left-over tokens at its end are dropped."""
    tokens = tokenizer()
    ids = torch.tensor(tokens.encode(text(), add_special_tokens=False, verbose=False))
    numbers = torch.arange(len(ids) // LENGTH)
    held_out = numbers[::HELD_OUT]
    if len(held_out) < 2:
        raise coar.errors.PipelineError(
            f"the text has {len(ids)} tokens and more than {HELD_OUT * LENGTH + LENGTH} are needed; set "
            f"COAR_GPT2_TEXT to a longer file"
        )
    studied = held_out[::4][:STUDIED]  # spread over the text
    chosen = {
        "train": numbers[numbers % HELD_OUT != 0][:TRAIN],
        "studied": studied,
        "judge": held_out[~torch.isin(held_out, studied)],
    }[part]
    inputs = ids[: len(numbers) * LENGTH].view(-1, LENGTH)[chosen]
    return coar.token_examples(
        {"input_ids": inputs, "attention_mask": torch.ones_like(inputs)},
        metadata={"id": chosen.numpy(), "text": tokens.batch_decode(inputs)},
    )


def next_token_loss(model: nn.Module, inputs: dict[str, Tensor], targets: Tensor) -> Tensor:
    """Return the mean cross-entropy of the next tokens, in nats."""
    return functional.cross_entropy(model(**inputs).logits.flatten(0, 1), targets.flatten())


def small_gpt2() -> nn.Module:
    """Return a small GPT-2 with random weights."""
    dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    nothing = {"bos_token_id": None, "eos_token_id": None, "use_cache": False}
    # the eager attention kernel gives gradients on every device
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY, n_positions=LENGTH, attn_implementation="eager", **SIZES, **dropout, **nothing
        )
    )


def next_tokens_found(model: nn.Module) -> dict[str, float]:
    """Return the share of correctly predicted tokens in the judging passages."""
    inputs, targets = examples("judge").block(0, STUDIED)
    with torch.inference_mode():
        found = model(**inputs).logits[:, :-1].argmax(2) == targets[:, :-1]
    return {"next token": float(found.float().mean())}


def model(training_seed: int = 0) -> nn.Module:
    """Return the model that COAR_GPT2 names, or the small one, trained on first use and kept under data/gpt2."""
    if "COAR_GPT2" in os.environ:
        return language_model.model_of(SOURCE)
    return training.fitted(
        small_gpt2,
        examples("train"),
        RECIPE,
        loss=next_token_loss,
        folder=FOLDER,
        seed=training_seed,
        about="two minutes on one core",
        report=next_tokens_found,
    )


def components(net: nn.Module, kind: str = "inputs") -> coar.Components:
    """Return the input features of all linear layers but the last, or the attention heads."""
    if kind not in KINDS:
        raise coar.errors.SettingsError(f"COAR_GPT2_COMPONENTS is {kind!r}; choose one of {', '.join(KINDS)}")
    if kind == "heads":
        return coar.attention_heads(net)
    last = net.get_output_embeddings()
    return coar.input_features(net, exclude=next(name for name, module in net.named_modules() if module is last))


class Surprise(coar.Output):
    """Minus the mean log-probability of the next tokens, in nats: the loss that optimal constants minimise."""

    def __call__(self, result: Any, targets: Tensor) -> Tensor:
        """Return (examples,) numbers."""
        return -coar.TokenLogProbability()(result, targets)


def ablation_of(label: str) -> coar.Ablation:
    """Return an ablation by its label, with constants computed on training passages."""
    learnt = examples("train")
    passages = learnt.subset(range(min(len(learnt), CALIBRATION)))
    if label == "optimal":
        return coar.Optimal(calibration=passages, loss=Surprise())
    return coar.choose_ablation(label, calibration=passages)


def study(
    *,
    ablation: str = "mean",
    ablated_fraction: float = 0.10,
    seed: int = 0,
    reduction: Literal["mean", "last"] = "mean",
    training_seed: int = 0,
) -> coar.Study:
    """Define the study of 64 passages; `ablation` is any label, `reduction` is over a passage's tokens."""
    net = model(training_seed)
    kind = os.environ.get("COAR_GPT2_COMPONENTS", KINDS[0])
    return coar.Study(
        model=net,
        examples=examples("studied"),
        components=components(net, kind),
        output=coar.TokenMargin(reduction=reduction),
        ablation=ablation_of(ablation),
        sampler=coar.BernoulliSampler(ablated_fraction=ablated_fraction, seed=seed),
    )


def texts() -> tuple[coar.Examples, coar.Examples]:
    """Return passages to train lenses on, and held-out ones."""
    return examples("train"), examples("judge")


def judge() -> coar.Examples:
    """Return other passages, which no training and no attribution has seen."""
    return examples("judge")
