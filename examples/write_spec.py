"""Write a spec for a model's attention, from its Hugging Face config.json.

    python examples/write_spec.py path/to/config.json my_attention.yaml

Without arguments, it reads a small Llama's config and prints the spec. `nsa-gen new NAME --from CONFIG` does the same.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from nsa_gen import load_spec
from nsa_gen.spec import Compression, Phi, SpecError
from nsa_gen.spec.huggingface import read_config
from nsa_gen.spec.starter import starter_text

CONFIG = {
    "model_type": "llama",
    "hidden_size": 2048,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 131072,
    "torch_dtype": "bfloat16",
}


def spec_text(config: Path, name: str) -> str:
    """The YAML of a spec with the model's heads, head dims, dtype and scale, and a learned compression.

    Raises:
        SpecError: the model is of an unknown type, or has a field that changes its attention in an unknown way.
    """
    shape = read_config(config)
    spec = load_spec("llama3_8b").replace(
        name=name,
        description=f"Sparse attention in the head layout of {shape.model or 'a model'}",
        heads=shape.heads,
        head_dim=shape.head_dim,
        dtype=shape.dtype,
        scale=shape.scale,
        compression=Compression(block=32, stride=16, phi=Phi(key="mlp", value="mlp", hidden=128)),
        passes=("forward", "backward"),
    )
    return starter_text(spec, shape.notes)  # every field with a comment; the notes say what a spec cannot


def main(arguments: list[str]) -> int:
    """Read a config and write or print the spec. Returns exit status 1 if the model is refused."""
    with tempfile.TemporaryDirectory() as folder:
        config = Path(arguments[0]) if arguments else Path(folder) / "config.json"
        if not arguments:
            config.write_text(json.dumps(CONFIG), encoding="utf-8")
        try:
            text = spec_text(config, Path(arguments[1]).stem if arguments[1:] else "my_attention")
        except SpecError as error:
            print(error, file=sys.stderr)
            return 1
    if arguments[1:]:
        Path(arguments[1]).write_text(text, encoding="utf-8")
        print(arguments[1])
    else:
        print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
