"""Hopper's kernels of gradients and of selected blocks: which packages have them, and which calls they serve.

Their values are checked on a GPU, by tests/gpu/test_hopper.py: the interpreter does not know the language that they are
written in.
"""

from __future__ import annotations

import importlib
import math
from typing import Any

import pytest
import torch

from nsa_gen.hardware import TARGETS
from nsa_gen.lowering import lower
from nsa_gen.lowering.hopper import ordinary_kernel
from nsa_gen.rendering import render
from nsa_gen.runtime.sequences import OutputGradient
from tests.gpu import hopper
from tests.support import DEVICE, Operator, assert_matches_oracle, operator_of, small_spec

FILES = {
    "forward": {"kernels/hopper_tiles.py", "kernels/hopper_selected_forward.py"},
    "banded": {"kernels/hopper_backward.py", "kernels/hopper_tiles.py", "kernels/hopper_banded_backward.py"},
    "dq": {"kernels/hopper_banded_dq.py"},
    "selected": {"kernels/hopper_backward.py", "kernels/hopper_tiles.py", "kernels/hopper_selected_backward.py"},
}
CALL = {"dims": (64, 64), "dtype": "float16", "block": 64, "count": 2}
NEVER = 2**31
SELECTED = ("hopper_selected_forward_kernel", "hopper_selected_backward_kernel")
# Kernels of a package, and how many programs of each share a multiprocessor.
KERNELS = {
    "hopper_banded_backward_dq_kernel": 1,
    "hopper_banded_backward_dkdv_kernel": 2,
    "hopper_selected_forward_kernel": 2,
    "hopper_selected_backward_kernel": 2,
}

TRACED = """
import importlib, sys
from nsa_gen.hardware import gpu_for_target
from nsa_gen.rendering import import_package
from nsa_gen.targets.launches import record_launches, specialize
from nsa_gen.targets.tracing import trace

package = import_package(sys.argv[1])
configs = importlib.import_module(f"{package.__name__}.configs")
for target in sys.argv[2].split(","):
    with configs.use_target(target), record_launches() as launches:
        trace(package, 64, 2, "meta", False, ("forward", "backward"))
    print(target, *sorted({launch.name for launch in launches}))
    for kernel in sys.argv[3:]:
        import triton

        launch = next(each for each in launches if each.kernel.__name__ == kernel)
        wanted = specialize(launch, gpu_for_target(target))
        compiled = triton.compile(wanted.source, target=wanted.target, options=wanted.options)
        # Products that are waited for one by one would be as many waits as instructions.
        ptx, ttgir = compiled.asm["ptx"], compiled.asm["ttgir"]
        counts = ptx.count("wgmma.mma_async"), ptx.count("wgmma.wait_group"), ttgir.count("scf.while")
        print(kernel, compiled.metadata.shared, *counts)
"""


def operator() -> Operator:
    return operator_of("slc win", indices="input", **CALL)


def tensor(*strides: int, offset: int = 0, sizes: tuple[int, ...] = (2, 5, 3, 64)) -> torch.Tensor:
    return torch.as_strided(torch.zeros(8192, dtype=torch.float16), sizes, (*strides, 1), offset)


@pytest.mark.parametrize(
    ("changes", "forward", "selected", "banded", "dq"),
    [
        ({}, True, True, True, True),
        ({"dims": (128, 64)}, True, True, True, False),
        ({"group": 7, "block": 128}, True, True, True, True),
        ({"group": 4}, True, True, True, True),
        ({"gate": "none"}, True, True, True, True),
        ({"gate": "given"}, True, False, False, False),
        ({"dims": (192, 128)}, True, False, False, False),
        ({"dims": (80, 80)}, False, False, False, False),
        ({"block": 32}, False, False, True, True),
        ({"group": 65}, False, False, True, True),
        ({"dtype": "float32"}, False, False, False, False),
        ({"passes": ("forward",)}, True, False, False, False),
        ({"branches": "win"}, False, False, True, True),
        ({"branches": "slc"}, True, True, False, False),
    ],
)
def test_a_package_has_the_kernels_where_their_tiles_fit(
    changes: dict[str, Any], forward: bool, selected: bool, banded: bool, dq: bool
) -> None:
    spec = small_spec(**{"branches": "slc win", "indices": "input", **CALL, **changes})
    program = lower(spec)
    has = {"forward": forward, "selected": selected, "banded": banded, "dq": dq}
    found = (
        program.hopper_selected_forward,
        program.hopper_selected_backward,
        program.hopper_banded_backward,
        program.hopper_banded_dq,
    )
    assert found == tuple(has.values())
    wanted = set().union(*(FILES[name] for name in has if has[name]))
    assert set(render(spec)) & set().union(*FILES.values()) == wanted
    most_rows = 2048 if changes.get("group") == 65 else 8192  # 2**18 rows, and no more than 8192 tokens
    for name, tunable, has_it, from_tokens in (
        ("selected_outputs", "HOPPER_TOKENS", forward, 2048 if changes.get("group", 2) >= 4 else NEVER),
        ("selected_backward", "HOPPER_BACKWARD_TOKENS", selected, 2048),
        ("banded_backward", "HOPPER_BACKWARD_TOKENS", banded, most_rows),
    ):
        tables = {target: table.get(name) for target, table in program.defaults.items()}
        assert all((config is not None) is has_it for config in tables.values())
        if has_it:
            least = {target: config.mapping()[tunable] for target, config in tables.items()}
            assert least.pop("sm_90") == from_tokens and set(least.values()) == {NEVER}
    for target, table in program.defaults.items():
        config = table.get("banded_backward")
        least = (most_rows if target == "sm_90" else NEVER) if dq else None
        assert (config.mapping() if config else {}).get("HOPPER_DQ_TOKENS") == least


@pytest.mark.parametrize(
    ("x", "fits"),
    [
        (tensor(960, 192, 64), True),
        (tensor(960, 192, 64, offset=8), True),  # 16 bytes
        (tensor(960, 192, 64, offset=4), False),
        (tensor(960, 196, 64), False),
        (tensor(0, 192, 64), True),  # one entry, expanded
        (tensor(3, 192, 64, sizes=(1, 5, 3, 64)), True),  # the stride of a single entry is of no account
    ],
)
def test_rows_are_gathered_from_multiples_of_16_bytes(x: torch.Tensor, fits: bool) -> None:
    assert importlib.import_module(f"{operator().module.__name__}.kernels.hopper_device").has_aligned_rows(x) is fits


def test_the_ordinary_kernel_serves_a_device_that_is_no_hopper_gpu_whatever_is_asked_for() -> None:
    op = operator()
    with op.configs.override("selected_backward", HOPPER_BACKWARD_TOKENS=0):
        if not (torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)):
            name = op.module.__name__
            hopper, sequences = (
                importlib.import_module(f"{name}.{each}") for each in ("kernels.hopper_backward", "runtime.sequences")
            )
            q, k = torch.zeros(1, 64, 2, 64, dtype=torch.float16), torch.zeros(1, 64, 1, 64, dtype=torch.float16)
            assert hopper.module_for("selected", q, k, k, q, sequences.Sequences(1, 64, 64)) is None
        assert_matches_oracle(op, 70)


def test_only_a_trace_for_hopper_launches_the_kernel_and_it_launches_the_ordinary_one_too(compiling) -> None:
    done = compiling(TRACED, str(operator().folder), ",".join(TARGETS))
    found = {target: names for target, *names in map(str.split, done.stdout.splitlines())}
    assert set(found) == set(TARGETS)
    for target, names in found.items():
        for kernel in KERNELS:
            assert (kernel.replace("banded", "window") in names) is (target == "sm_90")
        assert {"selected_backward_dkdv_kernel", "merge_dq_kernel"} <= set(names)


@pytest.mark.slow
def test_kernels_compile_without_a_gpu_to_asynchronous_products_and_fit_a_multiprocessor(compiling) -> None:
    _, *lines = compiling(TRACED, str(operator().folder), "sm_90", *KERNELS).stdout.splitlines()
    assert [line.split()[0] for line in lines] == [*KERNELS]
    for line in lines:
        kernel, *numbers = line.split()
        shared, products, waits, whiles = map(int, numbers)
        assert shared <= (228 * 1024) // KERNELS[kernel] - 1024, kernel
        assert products > 3 * waits > 0, kernel
        # A `for` about loops whose bounds it carries would be compiled wrongly by some versions, which keep the first.
        assert whiles == (kernel in SELECTED), kernel


@pytest.mark.parametrize("branch", ["compressed", "window"])
@pytest.mark.parametrize("shape", [(37, None, "fused"), ((20, 0, 9), None, "plain")])
def test_rows_of_dq_that_hoppers_kernel_leaves_are_written_by_the_ordinary_one_and_no_others(
    branch: str, shape: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = operator_of("cmp win", dims=(64, 64), dtype="float16").module
    gradients = importlib.import_module(f"{module.__name__}.kernels.banded_backward")
    (q, k, v), sequences = hopper.inputs(module, branch, *shape, str(DEVICE))
    lse, delta, before = torch.randn(3, *q.shape[:3], device=DEVICE) + 4
    gradient = OutputGradient(torch.randn(q.shape, device=DEVICE).half(), lse, delta, None)
    left = torch.rand(q.shape[:3], device=DEVICE) < 0.2

    def backward() -> torch.Tensor:
        dq = before[..., None].repeat(1, 1, 1, q.shape[3])
        dk, dv = torch.empty_like(k), torch.empty_like(v)
        getattr(gradients, f"{branch}_backward")(q, k, v, gradient, dq, dk, dv, sequences, dq_before=dq)
        return dq

    class Hopper:
        @staticmethod
        def backward_dq(*arguments: Any) -> torch.Tensor:
            arguments[5][~left] = 7.0  # dq
            return left.to(torch.int8)

    expected = torch.where(left[..., None], backward(), 7.0)
    monkeypatch.setattr(gradients.hopper_backward, "dq_module_for", lambda *given: Hopper)
    assert torch.equal(backward(), expected)


@pytest.mark.parametrize("gated", [True, False])
def test_row_statistics_are_the_bias_of_scores_in_base_2_and_minus_delta(gated: bool) -> None:
    hopper = importlib.import_module(f"{operator().module.__name__}.kernels.hopper_backward")
    lse, delta = torch.randn(2, 2, 700, 2, device=DEVICE)
    lse[0, :3] = -torch.inf  # rows that see no key
    logits = (torch.randn(2, 700, 3, 2, device=DEVICE) * 60).half()[:, :, 1]
    expected = -lse.double()
    if gated:
        expected += torch.nn.functional.logsigmoid(logits.double())
    bias, other = hopper.row_statistics(OutputGradient(lse, lse, delta, logits if gated else None))
    torch.testing.assert_close(bias.double() * math.log(2), expected, rtol=3e-7, atol=3e-7)
    assert torch.equal(other, -delta)


LOCAL = {**CALL, "branches": "cmp slc win", "group": 2, "kv_heads": 2, "local": 2, "count": 4, "window": 256}


@pytest.mark.parametrize(
    ("changes", "fits"),
    [
        ({}, True),
        ({"group": 6}, True),
        ({"group": 3}, False),  # a row tile has 128 tokens, two blocks
        ({"group": 3, "block": 128, "local": 1}, True),
        ({"local": 3, "window": 512}, False),  # more than one tile of keys
        ({"window": 255}, False),  # a tile may have local keys and keys before the window
        ({"block": 32}, False),
        ({"dtype": "float32"}, False),
        ({"gate": "given"}, False),  # no kernel for dq
        ({"gate": "given", "passes": ("forward",)}, True),
        ({"dims": (128, 64)}, False),
        ({"kv": "per_branch"}, False),
        ({"sink": "learned"}, False),
    ],
    ids=str,
)
def test_the_windows_kernels_do_the_local_blocks_where_these_are_whole_tiles(
    changes: dict[str, Any], fits: bool
) -> None:
    spec = small_spec(**{**LOCAL, **changes})
    program = lower(spec)
    assert program.hopper_local is fits
    least = {target: table.get("local_blocks") for target, table in program.defaults.items()}
    assert all((config is not None) is fits for config in least.values())
    if fits:
        tokens = {target: config.mapping()["HOPPER_LOCAL_TOKENS"] for target, config in least.items()}
        assert tokens.pop("sm_90") == 8192 and set(tokens.values()) == {NEVER}


def test_two_branches_with_the_same_keys_are_one_with_other_row_statistics() -> None:
    hopper = importlib.import_module(f"{operator_of(**LOCAL).module.__name__}.kernels.hopper_backward")
    lse, delta, slc_lse, slc_delta = torch.randn(4, 2, 90, 4, device=DEVICE) * 30
    slc_lse[0, :3] = torch.inf  # lists that lack the local blocks
    logits = (torch.randn(2, 90, 4, 3, device=DEVICE) * 20).half()
    window = OutputGradient(lse, lse, delta, logits[..., 2])
    selected = OutputGradient(lse, slc_lse, slc_delta, logits[..., 1])
    found = hopper.row_statistics(window, selected)
    assert torch.equal(found[:2], hopper.row_statistics(window))

    gates = logits.double().sigmoid()
    score, dp = torch.minimum(lse, slc_lse).double() + 2.0, torch.randn_like(lse).double() * 40
    p, slc_p = gates[..., 2] * (score - lse.double()).exp(), gates[..., 1] * (score - slc_lse.double()).exp()
    both = ((score / math.log(2)) + found[2].double()).exp2()
    torch.testing.assert_close(both, p + slc_p, rtol=1e-4, atol=0.0)
    ds = p * (dp - delta.double()) + slc_p * (dp - slc_delta.double())
    near = 1e-4 * (p * (dp.abs() + delta.abs()) + slc_p * (dp.abs() + slc_delta.abs()))
    assert ((both * (dp + found[3].double()) - ds).abs() <= near).all()


def test_a_profile_tells_which_kernel_of_the_plan_hoppers_stands_for(compiling) -> None:
    op = operator_of("cmp slc win", **CALL)
    done = compiling(TRACED, str(op.folder), "sm_90")
    kernels = {name.removesuffix("_kernel") for name in done.stdout.split()[1:] if name.startswith("hopper_")}
    aside = {"hopper_compressed_repair", "hopper_window_repair"}
    assert len(kernels - aside) == 8 and aside < kernels
    known = {kernel.name for kernel in lower(op.spec).kernels}
    assert {ordinary_kernel(name) for name in kernels - aside} <= known
    assert ordinary_kernel("merge_dq") == "merge_dq"
