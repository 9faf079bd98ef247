"""The package as a user meets it: what it exports, says of itself, imports, and where it runs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from nsa_gen.lowering import lower
from nsa_gen.spec import parse_spec
from tests.support import operator_of

STEPS = {"compress", "compressed_attention", "select_blocks", "selected_attention", "window_attention", "combine"}

EXPORTS = {
    "cmp slc win": ({}, STEPS),
    "win": ({"gate": "none"}, {"window_attention", "combine"}),
    "slc": ({"indices": "input"}, {"selected_attention", "combine"}),
    "cmp": ({"phi": "external"}, {"compressed_attention", "combine"}),
    "cmp slc": ({"phi": "mlp"}, STEPS - {"window_attention"} | {"CompressionParameters"}),
}


@pytest.mark.parametrize("branches", EXPORTS)
def test_all_names_exactly_what_the_spec_has(branches: str) -> None:
    changes, expected = EXPORTS[branches]
    op = operator_of(branches, **changes)
    always = {"SPEC", "Auxiliary", "NativeSparseAttention", "explain", "nsa_attention", "ops"}
    assert set(op.module.__all__) - always == expected
    assert len(set(op.module.__all__)) == len(op.module.__all__)
    for name in op.module.__all__:
        assert getattr(op.module, name) is not None
    for name in STEPS - expected:
        assert not callable(getattr(op.module, name, None)), name


def test_spec_shows_the_resolved_spec_and_cannot_be_changed() -> None:
    op = operator_of(scale=0.37)
    assert op.SPEC["scale"] == 0.37 and op.SPEC["heads"]["kv"] == 1 and op.SPEC["window"]["size"] == 10
    assert dict(op.SPEC) == op.spec.model_dump(mode="json") or op.SPEC["selection"]["count"] == 3
    with pytest.raises(TypeError):
        op.SPEC["scale"] = 1.0
    assert parse_spec((op.folder / "spec.yaml").read_text()) == op.spec


def test_explain_names_every_kernel_the_package_has() -> None:
    op = operator_of(phi="mlp", position=("learned", "none"))
    text = op.explain()
    kernels = {
        line.split("(")[0].removeprefix("def ").removesuffix("_kernel")
        for path in op.folder.rglob("*.py")
        for line in path.read_text().splitlines()
        if line.startswith("def ") and line.split("(")[0].endswith("_kernel")
    }
    named = lower(op.spec).kernels
    assert kernels == {kernel.function for kernel in named}
    assert all(f"{kernel.name} " in text for kernel in named)


def run(code: str, folder: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run Python code in a folder, in its own process."""
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=folder, env=environment, timeout=120
    )


def test_the_package_imports_nothing_but_torch_and_triton(compiler_environment: dict[str, str]) -> None:
    op = operator_of(phi="mlp")
    environment = {name: value for name, value in compiler_environment.items() if name != "PYTHONPATH"}
    code = f"""
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("nsa_gen", "pydantic", "yaml", "typer", "rich", "platformdirs"):
            raise ImportError("refused: " + name)
sys.meta_path.insert(0, Refuse())
import torch, triton
before = set(sys.modules)
import {op.folder.name} as package
after = {{name.split(".")[0] for name in set(sys.modules) - before}} - set(sys.stdlib_module_names)
print(sorted(after - {{"torch", "triton"}}))
"""
    result = run(code, op.folder.parent, environment)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == str([op.folder.name])


def test_cpu_tensors_without_the_interpreter_are_refused_with_the_mend(compiler_environment: dict[str, str]) -> None:
    op = operator_of("win", gate="none")
    code = f"""
import torch, {op.folder.name} as package
x = torch.zeros(1, 4, 2, 16)
try:
    package.nsa_attention(x, x[:, :, :1], x[:, :, :1])
except ValueError as error:
    print(error)
"""
    result = run(code, op.folder.parent, compiler_environment)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("q: expected a tensor on a GPU, got device cpu")
    assert "TRITON_INTERPRET=1" in result.stdout


def test_two_packages_live_in_one_process_without_sharing_operators() -> None:
    first, second = operator_of("win", gate="none", window=3), operator_of("win", gate="none", window=4)
    assert first.ops is not second.ops
    assert first.module.registration.NAMESPACE != second.module.registration.NAMESPACE
    assert first.SPEC["window"]["size"] == 3 and second.SPEC["window"]["size"] == 4


def test_overrides_of_tile_sizes_are_checked_and_end_with_their_block() -> None:
    import torch

    op = operator_of("win", gate="none")
    device = torch.device("cpu")
    usual = op.configs.get("window_forward", device)
    with op.configs.override("window_forward", KEY_BLOCK=32):
        assert op.configs.get("window_forward", device) == usual | {"KEY_BLOCK": 32}
    assert op.configs.get("window_forward", device) == usual
    with (
        pytest.raises(ValueError, match=r"^kernel: expected .*window_forward.*got 'window'"),
        op.configs.override("window"),
    ):
        pass
    with (
        pytest.raises(ValueError, match=r"^window_forward: expected .*KEY_BLOCK.*got KEY"),
        op.configs.override("window_forward", KEY=1),
    ):
        pass
