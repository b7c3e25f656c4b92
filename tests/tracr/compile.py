"""Compile two RASP programs into transformers and save their weights, which tests/test_tracr.py reads.

    pip install tracr-pypi==1.0.0 safetensors    # in an environment of its own: it needs jax
    JAX_PLATFORMS=cpu python tests/tracr/compile.py

*reverse* (4 layers, 1 head, width 41) returns a text's letters from last to first; *xproportion* (2 layers, 1 head,
width 14) returns the share of letters "x" up to each position. Neither has norms, and attention is in both directions.
`labels` of a file's metadata are the names of the residual stream's features.
"""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tracr.compiler import compiling, lib
from tracr.rasp import rasp

PROGRAMS = {
    "reverse": (lib.make_reverse(rasp.tokens), {"a", "b", "c"}),
    "xproportion": (lib.make_frac_prevs(rasp.tokens == "x"), {"w", "x", "y", "z"}),
}


def main() -> None:
    """Write one file for each program."""
    for name, (program, vocabulary) in PROGRAMS.items():
        model = compiling.compile_rasp_to_model(program, vocab=vocabulary, max_seq_len=5, compiler_bos="BOS")
        tensors = {
            f"{path.removeprefix('transformer/').replace('/', '.')}.{kind}": np.asarray(value, dtype=np.float32)
            for path, parts in model.params.items()
            for kind, value in parts.items()
        }
        metadata = {"labels": model.residual_labels, "tokens": model.input_encoder.encoding_map}
        path = Path(__file__).parent / f"{name}.safetensors"
        save_file(tensors, path, {key: json.dumps(value) for key, value in metadata.items()})


if __name__ == "__main__":
    main()
