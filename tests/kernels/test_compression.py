"""Generated compression kernels against the dense oracle in float64, under Triton's interpreter."""

from __future__ import annotations

import contextlib
import importlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from nsa_gen.rendering import generate, import_package
from nsa_gen.spec import Spec, parse_spec
from nsa_gen.verification.reference.dense import OracleParameters, compress

BLOCK, STRIDE, HEADS, BATCH, HIDDEN = 4, 2, 2, 2, 32
EDGES = (0, 1, BLOCK - 1, BLOCK + 1)
PACKED = (0, 13, 13, 14, 33, 36, 43, 43)
"""Sequence bounds with empty sequences, one of a single token, and starts that the stride does not divide."""

TILES = {
    "pool_forward": {"BLOCK_TILE": 8},
    "pool_backward_input": {"TOKEN_BLOCK": 16},
    "pool_backward_weight": {"BLOCK_TILE": 8},
    "linear_forward": {"BLOCK_TILE": 16, "OUTPUT_BLOCK": 32, "FEATURE_BLOCK": 32},
    "linear_backward_input": {"STEP_TILE": 16, "OUTPUT_BLOCK": 32, "FEATURE_BLOCK": 32},
    "linear_backward_weight": {"BLOCK_TILE": 16, "OUTPUT_BLOCK": 32, "FEATURE_BLOCK": 32, "SHARES": 1},
}
"""Larger than the interpreter's defaults, of which a sequence takes many; SHARES has its own test."""


@dataclass(frozen=True)
class Case:
    """phi of keys and values, with a learned position where the kind is followed by a plus; head dims of both."""

    key: str
    value: str
    head_dims: tuple[int, int] = (16, 24)
    block: int = BLOCK
    stride: int = STRIDE
    dtype: str = "float32"
    passes: str = "forward, backward"

    def __str__(self) -> str:
        return f"{self.key}-{self.value}"

    def spec(self) -> Spec:
        kinds = {side: kind.removesuffix("+") for side, kind in (("key", self.key), ("value", self.value))}
        positions = {
            side: "learned" if kind.endswith("+") else "none"
            for side, kind in (("key", self.key), ("value", self.value))
        }
        hidden = f", hidden: {HIDDEN}" if "mlp" in kinds.values() else ""
        return parse_spec(
            f"""
            version: 1
            name: compression_case
            heads: {{query: {HEADS}, kv: {HEADS}}}
            head_dim: {{qk: {self.head_dims[0]}, v: {self.head_dims[1]}}}
            dtype: {self.dtype}
            compression:
              block: {self.block}
              stride: {self.stride}
              phi: {{key: {kinds["key"]}, value: {kinds["value"]}{hidden}}}
              position: {{key: {positions["key"]}, value: {positions["value"]}}}
            combine: {{gate: none}}
            passes: [{self.passes}]
            """
        )


CASES = (
    Case("mean", "mean"),
    Case("mean+", "weighted"),
    Case("weighted", "mean+"),
    Case("weighted+", "weighted+"),
    Case("linear", "mean+"),
    Case("linear+", "linear+"),
    Case("linear", "mlp+"),
    Case("mlp", "linear+"),
    Case("mlp+", "weighted+"),
)
HEAD_DIMS = (
    Case("mean", "mean", (80, 200)),
    Case("mean+", "weighted", (80, 200)),
    Case("linear", "mean", (80, 16)),
    Case("mlp", "linear", (16, 80)),
)
BLOCKS = (
    Case("weighted+", "mlp", block=12, stride=4),
    Case("linear+", "mean", block=12, stride=4),
    Case("mlp+", "weighted", block=3, stride=1),
    Case("linear", "mean+", block=1, stride=1),
)

PerCase = pytest.mark.parametrize("case", CASES, ids=str)


@dataclass(frozen=True)
class Package:
    """The modules of a generated package that compression needs, and its spec."""

    spec: Spec
    compression: ModuleType
    sequences: ModuleType
    configs: ModuleType

    @property
    def fields(self) -> tuple[str, ...]:
        """Names of phi's parameters."""
        parameters = getattr(self.compression, "CompressionParameters", None)
        return parameters._fields if parameters else ()


@pytest.fixture(scope="module")
def package_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Case], Package]:
    """Generates a case's package, once, and imports it."""
    built: dict[Case, Package] = {}

    def build(case: Case) -> Package:
        if case not in built:
            spec = case.spec()
            folder = generate(spec, tmp_path_factory.mktemp("packages"))
            package = import_package(folder)
            names = ("kernels.compression", "runtime.sequences", "configs")
            built[case] = Package(spec, *(importlib.import_module(f"{package.__name__}.{name}") for name in names))
        return built[case]

    return build


@dataclass
class Problem:
    """Inputs of one call: k and v are slices of a fused projection; parameters have the spec's dtype."""

    k: Tensor
    v: Tensor
    parameters: dict[str, Tensor]
    cu_seqlens: Tensor | None
    block: int
    stride: int

    def bounds(self) -> Iterator[tuple[int, slice]]:
        """Batch entry and tokens of every sequence."""
        if self.cu_seqlens is None:
            return ((entry, slice(None)) for entry in range(self.k.shape[0]))
        return ((0, slice(*bounds)) for bounds in itertools.pairwise(self.cu_seqlens.tolist()))


def make_problem(package: Package, tokens: int, bounds: Sequence[int] | None = None, seed: int = 0) -> Problem:
    """Random inputs of a batched call, or of a packed one with the given bounds."""
    generator = torch.Generator().manual_seed(seed)
    spec, dtype = package.spec, getattr(torch, package.spec.dtype)
    assert spec.compression is not None
    dim_k, dim_v, block = spec.head_dim.qk, spec.head_dim.v, spec.compression.block

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    shapes = {
        "weight": lambda dim: (block,),
        "weight_in": lambda dim: (block * dim, HIDDEN),
        "weight_out": lambda dim: (HIDDEN, dim),
        "position": lambda dim: (block, dim),
    }
    parameters = {}
    for name in package.fields:
        side, role = name.split("_", 1)
        dim = dim_k if side == "key" else dim_v
        shape = shapes[role](dim)
        if role == "weight" and getattr(spec.compression.phi, side) == "linear":
            shape = (block * dim, dim)
        scale = 1.0 if len(shape) == 1 or role == "position" else shape[0] ** -0.5
        parameters[name] = random(HEADS, *shape) * scale
    fused = random(1 if bounds else BATCH, tokens, HEADS, dim_k + 8 + dim_v)
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32) if bounds else None
    return Problem(fused[..., :dim_k], fused[..., dim_k + 8 :], parameters, cu_seqlens, block, spec.compression.stride)


@contextlib.contextmanager
def quick_tiles(package: Package) -> Iterator[None]:
    """Tiles of TILES for the kernels the package has."""
    with contextlib.ExitStack() as stack:
        for kernel in TILES.keys() & package.configs.DEFAULTS["interpreter"].keys():
            stack.enter_context(package.configs.override(kernel, **TILES[kernel]))
        yield


@dataclass
class Result:
    """Compressed rows, and gradients by name: k, v and phi's parameters."""

    k_cmp: Tensor
    v_cmp: Tensor
    gradients: dict[str, Tensor]


def forward(package: Package, problem: Problem) -> tuple[Tensor, Tensor]:
    """k_cmp and v_cmp by the kernels."""
    k, v, compression = problem.k, problem.v, package.compression
    sequences = package.sequences.Sequences(k.shape[0], k.shape[1], k.shape[1], problem.cu_seqlens)
    parameters = compression.CompressionParameters(**problem.parameters) if package.fields else None
    with quick_tiles(package):
        return compression.compress_forward(k, v, parameters, sequences)[:2]


def run(
    package: Package,
    problem: Problem,
    before: tuple[Tensor, Tensor] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Result:
    """Forward and backward by the kernels; dk and dv, in `dtype`, have those of `before` added, and start as NaN."""
    k, v, compression = problem.k, problem.v, package.compression
    sequences = package.sequences.Sequences(k.shape[0], k.shape[1], k.shape[1], problem.cu_seqlens)
    parameters = compression.CompressionParameters(**problem.parameters) if package.fields else None
    dk, dv = (torch.full(x.shape, torch.nan, dtype=dtype) for x in (k, v))
    dk_before, dv_before = before or (None, None)
    with quick_tiles(package):
        k_cmp, v_cmp, saved = compression.compress_forward(k, v, parameters, sequences)
        dk_cmp, dv_cmp = row_gradients(problem, k_cmp), row_gradients(problem, v_cmp)
        gradients = compression.compress_backward(
            k, v, parameters, saved, dk_cmp, dv_cmp, dk, dv, sequences, dk_before=dk_before, dv_before=dv_before
        )
    return Result(k_cmp, v_cmp, {"k": dk, "v": dv, **dict(zip(package.fields, gradients, strict=True))})


def row_gradients(problem: Problem, rows: Tensor) -> Tensor:
    """A gradient of compressed rows, fp32; 0 in the rows of a packed call that belong to no block."""
    gradient = torch.randn(rows.shape, generator=torch.Generator().manual_seed(rows.shape[-1]))
    used = torch.zeros(rows.shape[:2], dtype=torch.bool)
    for entry, tokens in problem.bounds():
        used[entry, sequence_rows(problem, tokens)] = True
    return gradient * used[..., None, None]


def sequence_rows(problem: Problem, tokens: slice) -> slice:
    """Rows of k_cmp that hold the blocks of the sequence of these tokens."""
    first = 0 if problem.cu_seqlens is None else tokens.start // problem.stride
    length = problem.k.shape[1] if problem.cu_seqlens is None else tokens.stop - tokens.start
    return slice(first, first + max(0, (length - problem.block) // problem.stride + 1))


def reference(package: Package, problem: Problem, like: Result) -> Result:
    """The same by the oracle and autograd, in float64."""
    leaves = {"k": problem.k, "v": problem.v, **problem.parameters}
    leaves = {name: leaf.double().requires_grad_() for name, leaf in leaves.items()}
    oracle = OracleParameters.from_spec(package.spec)
    k_cmp, v_cmp = (torch.zeros(rows.shape, dtype=torch.float64) for rows in (like.k_cmp, like.v_cmp))
    dk_cmp, dv_cmp = (row_gradients(problem, rows).double() for rows in (k_cmp, v_cmp))
    # Every input takes part, so that one no block reads has a gradient of 0 and not none.
    loss = torch.stack([0.0 * leaf.sum() for leaf in leaves.values()]).sum()
    for entry, tokens in problem.bounds():
        rows = sequence_rows(problem, tokens)
        k, v = compress(oracle, leaves["k"][entry, tokens], leaves["v"][entry, tokens], leaves)
        k_cmp[entry, rows], v_cmp[entry, rows] = k.detach(), v.detach()
        loss = loss + (k * dk_cmp[entry, rows]).sum() + (v * dv_cmp[entry, rows]).sum()
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    return Result(k_cmp, v_cmp, dict(zip(leaves, gradients, strict=True)))


def assert_near(name: str, actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """The largest error is within `tolerance` of the largest expected value, and no element is undefined."""
    assert actual.shape == expected.shape, name
    if expected.numel():
        error = (actual.double() - expected).abs().max().item()
        assert error <= tolerance * max(expected.abs().max().item(), 1e-30), f"{name}: error {error}"


def assert_agrees(package: Package, problem: Problem, tolerance: float = 1e-5) -> None:
    """Kernels and oracle agree on the compressed rows and on every gradient."""
    result = run(package, problem)
    expected = reference(package, problem, result)
    assert_near("k_cmp", result.k_cmp, expected.k_cmp, tolerance)
    assert_near("v_cmp", result.v_cmp, expected.v_cmp, tolerance)
    assert result.gradients.keys() == expected.gradients.keys()
    for name, gradient in expected.gradients.items():
        assert_near(f"d{name}", result.gradients[name], gradient, tolerance)


@PerCase
@pytest.mark.parametrize("tokens", [BLOCK, 37])
def test_batched_rows_and_gradients_agree_with_the_oracle(
    case: Case, tokens: int, package_of: Callable[[Case], Package]
) -> None:
    package = package_of(case)
    assert_agrees(package, make_problem(package, tokens))


@pytest.mark.parametrize("case", [CASES[1], CASES[6]], ids=str)
@pytest.mark.parametrize("tokens", EDGES)
def test_sequences_about_as_long_as_a_block_agree_with_the_oracle(
    case: Case, tokens: int, package_of: Callable[[Case], Package]
) -> None:
    package = package_of(case)
    assert_agrees(package, make_problem(package, tokens))


@PerCase
def test_packed_rows_and_gradients_agree_with_the_oracle(case: Case, package_of: Callable[[Case], Package]) -> None:
    package = package_of(case)
    assert_agrees(package, make_problem(package, PACKED[-1], PACKED))


@pytest.mark.parametrize("case", HEAD_DIMS, ids=str)
def test_head_dims_that_are_no_powers_of_two_agree_with_the_oracle(
    case: Case, package_of: Callable[[Case], Package]
) -> None:
    package = package_of(case)
    assert_agrees(package, make_problem(package, 9))


@pytest.mark.parametrize("case", BLOCKS, ids=str)
@pytest.mark.parametrize("bounds", [None, (0, 29, 30, 47)], ids=["batched", "packed"])
def test_every_ratio_of_block_to_stride_agrees_with_the_oracle(
    case: Case, bounds: Sequence[int] | None, package_of: Callable[[Case], Package]
) -> None:
    package = package_of(case)
    assert_agrees(package, make_problem(package, bounds[-1] if bounds else 23, bounds))


@pytest.mark.parametrize("kinds", [("mean+", "weighted+"), ("linear+", "mlp+")])
def test_float16_rows_and_gradients_are_rounded_once(
    kinds: tuple[str, str], package_of: Callable[[Case], Package]
) -> None:
    package = package_of(Case(*kinds, dtype="float16"))
    assert_agrees(package, make_problem(package, 23), tolerance=3e-3)


@pytest.mark.parametrize("case", [CASES[1], CASES[6]], ids=str)
def test_gradients_of_k_and_v_add_to_those_before_in_float32_and_are_rounded_once(
    case: Case, package_of: Callable[[Case], Package]
) -> None:
    package = package_of(case)
    problem = make_problem(package, 9)
    fresh = run(package, problem).gradients
    before = torch.randn(problem.k.shape), torch.randn(problem.v.shape)
    sums = run(package, problem, before).gradients
    rounded = run(package, problem, before, torch.float16).gradients
    for name, x in zip("kv", before, strict=True):
        assert torch.equal(sums[name], x + fresh[name])
        assert torch.equal(rounded[name], sums[name].half())


@PerCase
def test_a_nan_reaches_the_blocks_that_contain_it_and_no_other(
    case: Case, package_of: Callable[[Case], Package]
) -> None:
    package = package_of(case)
    problem = make_problem(package, 21)
    clean = forward(package, problem)
    poisoned_token, head = 11, 1
    for x in (problem.k, problem.v):
        x[0, poisoned_token, head, 3] = torch.nan
    starts = torch.arange(clean[0].shape[1]) * STRIDE
    poisoned = torch.zeros(clean[0].shape[:3], dtype=torch.bool)
    poisoned[0, :, head] = (starts <= poisoned_token) & (poisoned_token < starts + BLOCK)
    for before, after in zip(clean, forward(package, problem), strict=True):
        assert torch.equal(after.isnan().any(-1), poisoned)
        assert torch.equal(after[~poisoned], before[~poisoned])


def test_a_nan_in_the_tail_that_no_block_covers_is_never_read(package_of: Callable[[Case], Package]) -> None:
    package = package_of(Case("linear", "mean+"))
    problem = make_problem(package, PACKED[-1], PACKED)
    clean = forward(package, problem)
    for x in (problem.k, problem.v):
        x[0, 12] = torch.nan  # the last of 13 tokens: the last block ends with token 11
    for before, after in zip(clean, forward(package, problem), strict=True):
        assert torch.equal(after, before)


def test_means_of_keys_and_values_share_a_launch(
    package_of: Callable[[Case], Package], monkeypatch: pytest.MonkeyPatch
) -> None:
    package = package_of(Case("mean", "mean"))
    pool = importlib.import_module(f"{package.compression.__package__}.compression_pool")
    prepare, launched = pool.prepare_pool, []

    def noted(kernel: Any, *sizes: Any) -> Any:
        launched.append(kernel.__name__)
        return prepare(kernel, *sizes)

    monkeypatch.setattr(pool, "prepare_pool", noted)
    run(package, make_problem(package, 9))
    assert launched == ["pool_forward_kernel", "pool_backward_input_kernel"]


def test_rows_of_a_packed_call_that_belong_to_no_block_are_zero(package_of: Callable[[Case], Package]) -> None:
    package = package_of(Case("mlp+", "weighted+"))
    problem = make_problem(package, PACKED[-1], PACKED)
    for rows in forward(package, problem):
        gap = torch.ones(rows.shape[1], dtype=torch.bool)
        for _, tokens in problem.bounds():
            gap[sequence_rows(problem, tokens)] = False
        assert gap.any()
        assert not rows[:, gap].any()


@pytest.mark.parametrize("shares", [2, 4])
def test_weight_gradients_do_not_depend_on_how_many_programs_share_the_sum(
    shares: int, package_of: Callable[[Case], Package], monkeypatch: pytest.MonkeyPatch
) -> None:
    package = package_of(Case("linear", "mean+"))
    problem = make_problem(package, 70)
    monkeypatch.setitem(TILES, "linear_backward_weight", TILES["linear_backward_weight"] | {"SHARES": shares})
    assert_agrees(package, problem)


def test_parameters_may_be_strided(package_of: Callable[[Case], Package]) -> None:
    package = package_of(Case("mlp", "linear+"))
    problem = make_problem(package, 7)
    dense = run(package, problem)
    for name, parameter in problem.parameters.items():
        problem.parameters[name] = parameter.transpose(1, 2).contiguous().transpose(1, 2)
    strided = run(package, problem)
    assert torch.equal(strided.k_cmp, dense.k_cmp)
    for name, gradient in dense.gradients.items():
        assert torch.equal(strided.gradients[name], gradient), name


def test_two_runs_give_the_same_bits(package_of: Callable[[Case], Package]) -> None:
    package = package_of(Case("mlp+", "weighted+"))
    first, second = (run(package, make_problem(package, 21, (0, 21))) for _ in range(2))
    for name, gradient in first.gradients.items():
        assert torch.equal(second.gradients[name], gradient), name


def test_an_empty_batch_gives_empty_rows_and_zero_parameter_gradients(package_of: Callable[[Case], Package]) -> None:
    package = package_of(Case("linear+", "linear+"))
    problem = make_problem(package, 12)
    problem.k, problem.v = problem.k[:0], problem.v[:0]
    result = run(package, problem)
    assert result.k_cmp.shape == (0, 5, HEADS, 16)
    for name in package.fields:
        assert not result.gradients[name].any(), name


def test_external_compression_has_no_kernels(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = generate(Case("external", "external").spec(), tmp_path_factory.mktemp("external"))
    assert not (folder / "kernels/compression.py").exists()
    assert (folder / "kernels/banded.py").exists()


def test_a_forward_only_package_has_no_backward_kernels(package_of: Callable[[Case], Package]) -> None:
    package = package_of(Case("mlp+", "weighted", passes="forward"))
    assert not [name for name in vars(package.compression) if "backward" in name or "derivative" in name]
    problem = make_problem(package, 11)
    sequences = package.sequences.Sequences(BATCH, 11, 11)
    parameters = package.compression.CompressionParameters(**problem.parameters)
    k_cmp, v_cmp, _ = package.compression.compress_forward(problem.k, problem.v, parameters, sequences)
    expected = reference(package, problem, Result(k_cmp, v_cmp, {}))
    assert_near("k_cmp", k_cmp, expected.k_cmp, 1e-5)
    assert_near("v_cmp", v_cmp, expected.v_cmp, 1e-5)
