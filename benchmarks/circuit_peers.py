"""Edge attribution patching by auto-circuit (on TransformerLens) and by this package: scores, seconds and memory.

    python -m venv peers && peers/bin/pip install auto-circuit==1.0.1 "transformer-lens<3" "numpy<2" "pyarrow<18"
    python benchmarks/circuit_peers.py --peer peers/bin/python                 # minutes on one core

Both score all edges of the same model with the architecture of GPT-2 and random weights, on the same pairs of prompts,
each in a process of its own, on one thread. Ablated edges carry their writer's output for the other prompt of the pair;
the score is the derivative of the logit difference by how much of an edge is kept, averaged over prompts. All prompts
begin with the same token, since this package never ablates the first one. Seconds are of the process; memory is the
rise of its peak above the loaded model. EAP-IG is not on PyPI, so it is not compared.
"""

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

SIZES = {  # layers, heads, width, words
    "2 layers": (2, 4, 64, 200),
    "6 layers": (6, 8, 256, 1000),
    "GPT-2 small": (12, 12, 768, 50257),
}


def peak() -> float:
    """Return the MiB that the process has had in memory at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def make(folder: Path, size: str, prompts: int, positions: int) -> None:
    """Write a model and pairs of prompts."""
    from transformers import GPT2Config, GPT2LMHeadModel

    layers, heads, width, words = SIZES[size]
    torch.manual_seed(0)
    config = GPT2Config(n_layer=layers, n_head=heads, n_embd=width, vocab_size=words, n_positions=1024)
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms too, which a new model does not have
            parameter.add_(torch.randn_like(parameter) * 0.02)
    model.save_pretrained(folder)
    tokens = torch.randint(1, words, (2, prompts, positions))
    tokens[:, :, 0] = 0
    np.savez(folder / "prompts.npz", tokens=tokens.numpy(), answers=torch.randint(1, words, (2, prompts)).numpy())


def ours(folder: Path, batch: int) -> None:
    """Score the edges with this package and write scores, seconds and memory."""
    from transformers import GPT2LMHeadModel

    import coar

    model = GPT2LMHeadModel.from_pretrained(folder).eval()
    prompts = np.load(folder / "prompts.npz")
    count = prompts["tokens"].shape[1]
    ids = torch.from_numpy(prompts["tokens"]).flatten(0, 1)
    before = peak()
    examples = coar.token_examples(
        {"input_ids": ids, "attention_mask": torch.ones_like(ids)},
        answers=torch.from_numpy(np.tile(prompts["answers"][0], 2))[:, None],
        wrong=torch.from_numpy(np.tile(prompts["answers"][1], 2))[:, None],
        metadata={"pair": np.tile(np.arange(count), 2)},
    )
    study = coar.Study(
        model=model,
        examples=examples,
        components=coar.edges(model),
        output=coar.LogitDifference(),
        ablation=coar.Counterfactual(),
        sampler=coar.BernoulliSampler(ablated_fraction=0.1),
    )
    execution = coar.Execution(batch_size=batch)
    run = coar.collect(study, folder / "run.zarr", masks=1, execution=execution, device="cpu", progress=False)
    start = time.process_time()
    fitted = coar.mask_gradient(study, run, device="cpu", batch_size=batch, progress=False)
    seconds = (time.process_time() - start) / 2  # half of the examples are the other prompts
    scores = fitted.weights()[:count].mean(0)
    _write(folder / "ours.npz", dict(zip(study.components.names, scores.tolist(), strict=True)), seconds, before)


def peer(folder: Path, batch: int) -> None:
    """Score the edges with auto-circuit and write scores, seconds and memory."""
    from auto_circuit.data import PromptDataLoader, PromptDataset
    from auto_circuit.prune_algos.mask_gradient import mask_gradient_prune_scores
    from auto_circuit.utils.graph_utils import patchable_model
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformer_lens.pretrained.weight_conversions.gpt2 import convert_gpt2_weights
    from transformers import GPT2LMHeadModel

    loaded = GPT2LMHeadModel.from_pretrained(folder).eval()
    own = loaded.config
    config = HookedTransformerConfig(
        n_layers=own.n_layer,
        n_heads=own.n_head,
        d_model=own.n_embd,
        d_head=own.n_embd // own.n_head,
        d_mlp=4 * own.n_embd,
        d_vocab=own.vocab_size,
        n_ctx=own.n_positions,
        act_fn="gelu_new",
        normalization_type="LN",
        eps=own.layer_norm_epsilon,
        use_attn_result=True,
        use_split_qkv_input=True,
        use_hook_mlp_in=True,
        device="cpu",
    )
    model = HookedTransformer(config)
    model.load_state_dict(convert_gpt2_weights(loaded, config), strict=False)
    prompts = {key: torch.from_numpy(value) for key, value in np.load(folder / "prompts.npz").items()}
    clean, corrupt = prompts["tokens"]
    model.eval().requires_grad_(False)
    with torch.no_grad():
        assert torch.allclose(model(clean[:2]), loaded(clean[:2]).logits, atol=1e-3)
    del loaded
    before = peak()
    start = time.process_time()
    patched = patchable_model(model, factorized=True, slice_output="last_seq", separate_qkv=True)
    answers, wrong = ([row[None] for row in part] for part in prompts["answers"])
    loader = PromptDataLoader(
        PromptDataset(clean, corrupt, answers, wrong), seq_len=None, diverge_idx=0, batch_size=batch, shuffle=False
    )
    found = mask_gradient_prune_scores(patched, loader, None, "logit", "avg_diff", mask_val=0.0)
    seconds = time.process_time() - start
    scores = {
        f"{_label(edge.src.name)} -> {_label(edge.dest.name)}": float(edge.prune_score(found)) / len(loader)
        for edge in patched.edges
    }
    _write(folder / "peer.npz", scores, seconds, before)


def _label(name: str) -> str:
    """Return this package's label of a node of auto-circuit."""
    if name.startswith("Resid"):
        return "embed" if name == "Resid Start" else "out"
    if name.startswith("MLP"):
        return f"L{name.removeprefix('MLP ')}.mlp"
    layer, head, *port = name.removeprefix("A").split(".")
    return ".".join([f"L{layer}", f"H{head}", *[letter.lower() for letter in port]])


def _write(path: Path, scores: dict[str, float], seconds: float, before: float) -> None:
    names = sorted(scores)
    np.savez(path, names=names, scores=[scores[name] for name in names], seconds=seconds, mib=peak() - before)


def compare(python: str, size: str, prompts: int, positions: int, batch: int) -> str:
    """Run both on a size; return a row of a Markdown table."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make(folder, size, prompts, positions)
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        for who, program in (("ours", sys.executable), ("peer", python)):
            command = [program, __file__, "--only", who, "--folder", name, "--batch", str(batch)]
            own = environment if who == "ours" else {k: v for k, v in environment.items() if k != "PYTHONPATH"}
            subprocess.run(command, check=True, env=own)
        mine, other = np.load(folder / "ours.npz"), np.load(folder / "peer.npz")
    assert mine["names"].tolist() == other["names"].tolist()
    difference = np.abs(mine["scores"] - other["scores"]).max() / np.abs(other["scores"]).max()
    times, sizes = other["seconds"] / mine["seconds"], other["mib"] / mine["mib"]
    return (
        f"| {size} | {len(mine['names']):,} | {difference:.0e} | {mine['seconds']:.1f} | {other['seconds']:.1f} | "
        f"{times:.1f} | {mine['mib']:,.0f} | {other['mib']:,.0f} | {sizes:.1f} |"
    )


def main() -> None:
    """Print a table in Markdown, or run one of the two programs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer", help="Python of the environment with auto-circuit")
    parser.add_argument("--sizes", choices=list(SIZES), nargs="+", default=list(SIZES))
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--positions", type=int, default=16)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--only", choices=("ours", "peer"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.only:
        {"ours": ours, "peer": peer}[arguments.only](arguments.folder, arguments.batch)
        return
    if arguments.peer is None:
        parser.error("--peer is needed: the Python of an environment with auto-circuit")
    print("| model | edges | difference | s, ours | s, peer | ratio | MiB, ours | MiB, peer | ratio |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|---:|", flush=True)
    for size in arguments.sizes:
        print(compare(arguments.peer, size, arguments.prompts, arguments.positions, arguments.batch), flush=True)


if __name__ == "__main__":
    main()
