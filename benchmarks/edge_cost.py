"""The cost of a pass with gates on all edges, as multiples of a plain forward pass, and its memory.

    python benchmarks/edge_cost.py                    # a process for each row: a few minutes on one core
    python benchmarks/edge_cost.py --models GPT-2 --rows 4 --positions 32

Models have the sizes of SmolLM2-135M and GPT-2 small with random weights, which cost the same. Times are of the process
on one thread, so other programs on the machine change them little; each is the least of several. Memory is the rise of
the process's peak during the passes. The logits are those of the last position only.
"""

import argparse
import resource
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import coar
from coar.gates.gates import Gates

SMOLLM2 = {"hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "SmolLM2-135M": lambda: LlamaForCausalLM(
        LlamaConfig(**SMOLLM2, intermediate_size=1536, vocab_size=49152, tie_word_embeddings=True)
    ),
    "GPT-2 small": lambda: GPT2LMHeadModel(GPT2Config()),
}
KEPT = (200, 1000, 5000, 20000)  # edges of small circuits
CASES = [
    "plain, with gradients",
    "all edges",
    "97 % of edges, one mask",
    "97 % of edges, a mask per text",
    *[f"{kept:,} edges" for kept in KEPT],
    "gradients at all edges",
    "gradients at 97 % of edges, one mask",
    "gradients at 97 % of edges, a mask per text",
]


def least(work: Callable[[], object], repeats: int = 3) -> float:
    """Return the least seconds of the process of several calls, after one that is not timed."""
    work()
    taken = []
    for _ in range(repeats):
        start = time.process_time()
        work()
        taken.append(time.process_time() - start)
    return min(taken)


def peak() -> float:
    """Return the MiB that the process has had in memory at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def mask_of(case: str, edges: int, rows: int) -> Tensor:
    """Return the mask of a case: (edges,) for all texts, or (rows, edges)."""
    draw = torch.Generator().manual_seed(0)
    if "all edges" in case:
        return torch.ones(rows, edges) if "gradients" in case else torch.ones(edges)
    if "97" in case:
        shape = (rows, edges) if "per text" in case else (edges,)
        return (torch.rand(shape, generator=draw) < 0.97).float()
    kept = int(case.split(maxsplit=1)[0].replace(",", ""))
    mask = torch.zeros(edges)
    mask[torch.randperm(edges, generator=draw)[:kept]] = 1
    return mask


def measure(name: str, case: str, rows: int, positions: int) -> str:
    """Return a row of a Markdown table."""
    torch.manual_seed(0)
    model = MODELS[name]().eval().requires_grad_(False)
    edges = coar.edges(model)
    tokens = torch.randint(2, 1000, (rows, positions))
    before = peak()

    def logits() -> Tensor:
        found: Tensor = model(tokens, logits_to_keep=1, use_cache=False).logits
        return found[:, -1, 7].sum()

    with torch.no_grad():
        plain = least(logits, 5)
    if case == "plain, with gradients":
        handle = model.get_input_embeddings().register_forward_hook(lambda _m, _a, y: y.requires_grad_())
        spent = least(lambda: logits().backward())
        handle.remove()
        return f"| {name} | {case} | {spent / plain:.2f} | {peak() - before:,.0f} |"
    mask = mask_of(case, len(edges), rows)
    with Gates(model, edges, torch.randn(edges.width) * 0.01, use_hooks=True) as gates:

        def gated() -> object:
            gates.set(mask)
            if "gradients" in case:
                return torch.autograd.grad(logits(), mask)
            with torch.no_grad():
                return logits()

        mask.requires_grad_("gradients" in case)
        spent = least(gated)
    return f"| {name} | {case} | {spent / plain:.2f} | {peak() - before:,.0f} |"


def main() -> None:
    """Print a table in Markdown; each row comes from a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", choices=list(MODELS), nargs="+", default=list(MODELS))
    parser.add_argument("--cases", choices=CASES, nargs="+", default=CASES)
    parser.add_argument("--rows", type=int, default=8, help="texts per pass")
    parser.add_argument("--positions", type=int, default=16, help="tokens per text")
    parser.add_argument("--alone", action="store_true", help="measure the one model and case given in this process")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.alone:
        print(measure(arguments.models[0], arguments.cases[0], arguments.rows, arguments.positions), flush=True)
        return
    print("| model | edges kept | time, of a plain forward | MiB above the model |")
    print("|---|---|---:|---:|", flush=True)
    for name in arguments.models:
        for case in arguments.cases:
            own = ["--models", name, "--cases", case, "--alone"]
            size = ["--rows", str(arguments.rows), "--positions", str(arguments.positions)]
            subprocess.run([sys.executable, __file__, *own, *size], check=True)


if __name__ == "__main__":
    main()
