"""What must not be in the code: lengths as constants, host reads, hidden state, calls that stall or go away."""

from __future__ import annotations

import ast
import functools
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from nsa_gen.spec import load_spec, shipped_specs
from tests.support import call, call_with_gradients, inputs_of, operator_of, operator_of_spec, small_spec

SCRIPT = Path(__file__).parent / "launch_record.py"
GENERATED = Path(__file__).resolve().parents[2] / "generated"
PACKAGES = {
    "mean": small_spec(kv_heads=2),
    "mlp": small_spec(kv_heads=2, phi="mlp", phi_value="linear", position=("learned", "learned"), gate="given"),
    "external_input": small_spec("cmp slc win", phi="external", indices="input", kv="per_branch", gate="none"),
    "paper": load_spec("nsa_paper"),
}


@functools.cache
def records() -> dict[str, Any]:
    """Of each package, launches and allocations at several lengths, on tensors without storage."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    folders = [str(operator_of_spec(spec).folder) for spec in PACKAGES.values()]
    command = [sys.executable, str(SCRIPT), *folders]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=400)
    assert result.returncode == 0, result.stderr[-3000:]
    return dict(zip(PACKAGES, map(json.loads, result.stdout.splitlines()), strict=True))


@pytest.fixture(params=PACKAGES)
def recorded(request: pytest.FixtureRequest) -> dict[str, Any]:
    return records()[request.param]


def test_no_value_of_any_tensor_is_read_on_the_host_cu_seqlens_included(recorded: dict[str, Any]) -> None:
    # Reading a value of a tensor without storage raises, so that the script would not have come this far.
    for name in ("4099 False", "4099 True"):
        kernels = recorded[name]["kernels"]
        assert any("forward" in kernel for kernel in kernels) and any("dkdv" in kernel for kernel in kernels)


PAIRS = [("4099 False", "131072 False"), ("4099 True", "131072 True")]
OF_A_CHUNK = {
    "selected_forward_key_major_kernel",
    "merge_outputs_kernel",
    "selected_backward_dkdv_kernel",
    "merge_dkdv_kernel",
    "merge_dq_kernel",
}
OF_A_SHARE = {"block_scores_kernel", "select_blocks_kernel"}
"""Kernels that work on as many tokens at a time as a workspace of bounded size has room for."""
OF_FEW_TOKENS = {"sort_slots_kernel"}
"""Kernels that a call of many tokens does without."""


@pytest.mark.parametrize("pair", PAIRS, ids=["batched", "packed"])
def test_the_number_of_launches_does_not_grow_with_the_length(recorded: dict[str, Any], pair: tuple[str, str]) -> None:
    """Kernels that work through a workspace of bounded size are launched once for each time it fills, and no more."""
    once, twice = (recorded[name] for name in pair)
    short, long = Counter(once["kernels"]), Counter(twice["kernels"])
    assert list(short) == list(long) and short.keys() >= OF_A_CHUNK
    for kernel in short:
        if kernel in OF_A_CHUNK:
            assert short[kernel] * twice["chunks"] == long[kernel] * once["chunks"], kernel
        elif kernel in OF_A_SHARE:
            assert short[kernel] <= long[kernel] <= short[kernel] * twice["most_shares"], kernel
        elif kernel in OF_FEW_TOKENS:
            assert long[kernel] <= short[kernel], kernel
        else:
            assert short[kernel] == long[kernel], kernel


@pytest.mark.parametrize("pair", PAIRS, ids=["batched", "packed"])
def test_no_constant_of_any_kernel_depends_on_the_sequence_length(
    recorded: dict[str, Any], pair: tuple[str, str]
) -> None:
    short, long = (
        {
            (kernel, json.dumps(constants))
            for kernel, constants in zip(found["kernels"], found["constants"], strict=True)
        }
        for found in (recorded[name] for name in pair)
    )
    assert short == long
    assert recorded[pair[0]]["grids"] != recorded[pair[1]]["grids"]


def test_no_integer_beside_strides_is_specialised_by_its_value(recorded: dict[str, Any]) -> None:
    for call_name, found in recorded.items():
        assert found["specialized"] == [], call_name


def test_no_table_of_blocks_by_tokens_is_allocated(recorded: dict[str, Any]) -> None:
    once, twice = recorded["131072 False"]["largest"], recorded["262144 False"]["largest"]
    assert once >= 131072 and twice <= 2.001 * once  # linear in the length; a table of blocks by tokens quadruples


FORBIDDEN = {
    "block pointers, which Triton 3.9 removes": r"make_block_ptr|tl\.advance\b",
    "a stall of the device": r"cuda\.synchronize|empty_cache|Event\(",
    "a read of a tensor on the host": r"\.item\(|\.tolist\(|\.cpu\(|\.numpy\(|\bnonzero\(",
    "atomics, whose order changes": r"\btl\.atomic_",
    "a tuple made by a stray comma": r"^\s*\w+ = [^(\[{#]*[\w)\]],\s*$",
    "the whole list unrolled at compile time": r"static_range\(.*SELECTION_COUNT",
}


MEANT = {
    # On the CPU, where nothing has to be waited for.
    "runtime/arguments.py": r"    if device\.type == \"cpu\" and .*?\n        bounds = cu_seqlens\.tolist\(\)",
    # Whose purpose is to read the lengths that a replayed graph has left on the device.
    "runtime/cache.py": r"    def synchronize\(.*?(?=\n    def |\Z)",
    # They tell who chooses among the blocks, and who adds up the parts, which are always added in the same order.
    "kernels/decode_select.py": r"tl\.atomic_add\(counters_ptr \+ list_row, 1, sem=\"acq_rel\", scope=\"gpu\"\)",
    "kernels/decode_attend.py": r"tl\.atomic_add\(counters_ptr \+ list_row, 1, sem=\"acq_rel\", scope=\"gpu\"\)",
    # They count the programs that have arrived, and wait for all.
    "kernels/decode_step.py": r"def arrive\(.*?def wait_for_all\(.*?(?=\n@triton)",
}
"""What a module may have once of what is forbidden elsewhere."""


@functools.cache
def sources(name: str) -> dict[str, str]:
    """The modules of a package of `PACKAGES` or of a shipped one, by path within it."""
    folder = operator_of_spec(PACKAGES[name]).folder if name in PACKAGES else GENERATED / name
    found = {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*.py")}
    assert {"operator.py", "runtime/arguments.py", "kernels/primitives.py"} <= set(found)
    return found


@pytest.mark.parametrize("what", FORBIDDEN)
def test_generated_sources_are_free_of(what: str) -> None:
    for package in (*PACKAGES, *shipped_specs()):
        for name, text in sources(package).items():
            if name in MEANT:
                text = re.sub(MEANT[name], "", text, count=1, flags=re.DOTALL)
            found = re.search(FORBIDDEN[what], text, re.MULTILINE)
            assert found is None, f"{package}/{name}: {found.group()!r}"


POSITIVE = {"block_rows", "blocks_per_batch", "chunk_tokens", "tiles_per_batch", "tokens"}
"""Arguments of kernels that are positive wherever a kernel that divides by them is launched."""


@pytest.mark.parametrize("name", PACKAGES)
def test_kernels_divide_by_no_number_that_may_be_zero(name: str) -> None:
    # Not even in a loop of no steps: a pipeline computes the first steps' addresses before the loop is entered, and a
    # compiler that sees a division takes its divisor, and with it the number of steps, not to be 0.
    for module, text in sources(name).items():
        for function in ast.walk(ast.parse(text)):
            if not isinstance(function, ast.FunctionDef) or "jit" not in map(_last_name, function.decorator_list):
                continue
            guarded = {
                ast.unparse(node.targets[0])
                for node in ast.walk(function)
                if isinstance(node, ast.Assign) and re.fullmatch(r"tl\.maximum\(.*, 1\)", ast.unparse(node.value))
            }
            for node in ast.walk(function):
                if isinstance(node, ast.BinOp) and isinstance(node.op, ast.FloorDiv | ast.Mod):
                    divisor = ast.unparse(node.right)
                    constant = divisor.isdigit() or re.fullmatch(r"[A-Z0-9_ *+()-]+", divisor)
                    assert constant or divisor in guarded | POSITIVE, f"{module}: {ast.unparse(node)}"


def _last_name(decorator: ast.expr) -> str:
    """`jit` of `@triton.jit` and of `@triton.jit(...)`."""
    named = decorator.func if isinstance(decorator, ast.Call) else decorator
    return ast.unparse(named).rpartition(".")[2]


def test_two_interleaved_calls_do_not_touch_each_other() -> None:
    op = operator_of(count=2)
    problems = [inputs_of(op, 3, tokens_kv=12, seed=1), inputs_of(op, (2, 3), seed=2)]
    alone = [call_with_gradients(op, inputs) for inputs in problems]
    started = []
    for inputs in problems:
        leaves = {name: x.detach().requires_grad_() for name, x in inputs.differentiable().items()}
        started.append((leaves, call(op, inputs.replace_differentiable(leaves))))
    for number in (0, 1):  # the first call's backward runs after the second call's forward
        leaves, o = started[number]
        gradients = torch.autograd.grad(o, list(leaves.values()), problems[number].do)
        assert torch.equal(o, alone[number]["o"])
        for name, gradient in zip(leaves, gradients, strict=True):
            assert torch.equal(gradient, alone[number][f"d{name}"]), name


def test_inputs_are_not_written_to() -> None:
    op = operator_of(count=2)
    inputs = inputs_of(op, (9, 1), seed=3)
    before = {name: x.clone() for name, x in inputs.differentiable().items()} | {"do": inputs.do.clone()}
    call_with_gradients(op, inputs)
    for name, x in (inputs.differentiable() | {"do": inputs.do}).items():
        assert torch.equal(x, before[name]), name
