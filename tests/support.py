"""Small specs, their generated packages, and comparisons with the oracle, for the tests of generated operators.

On the CPU the kernels run in Triton's interpreter, where a program instance costs tens of milliseconds and selected
attention has one for each token and KV head. So heads and lengths are small, and many tests have few queries at the
end of many keys.
"""

from __future__ import annotations

import functools
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from nsa_gen.rendering import generate, import_package
from nsa_gen.spec import Combine, Compression, HeadDim, Heads, Phi, Position, Selection, Spec, Window, parse_spec
from nsa_gen.verification import Inputs, OracleParameters, Row, make_inputs
from nsa_gen.verification.cases import Case
from nsa_gen.verification.checking import check_case
from tests.machine import GPU

DEVICE = torch.device("cuda" if GPU else "cpu")

_packages = tempfile.TemporaryDirectory(prefix="nsa_gen_tests_")


def small_spec(
    branches: str = "cmp slc win",
    *,
    group: int = 2,
    kv_heads: int = 1,
    dims: tuple[int, int] = (16, 16),
    dtype: str = "float32",
    scale: float | str = "auto",
    kv: str = "shared",
    gate: str = "sigmoid",
    phi: str = "mean",
    phi_value: str | None = None,
    position: tuple[str, str] = ("none", "none"),
    compression: tuple[int, int] = (8, 4),
    output: bool = True,
    block: int = 16,
    count: int = 3,
    initial: int = 1,
    local: int = 1,
    indices: str = "computed",
    scores: str = "compression",
    index: int = 0,
    pool: str = "sum",
    scope: str = "group",
    window: int = 10,
    sink: str = "none",
    sink_slc: str = "none",
    joint: bool = False,
    sink_joint: str = "none",
    cache: str | None = None,
    passes: tuple[str, ...] = ("forward", "backward"),
) -> Spec:
    """A spec of the branches named; compression is (l, d), block is l', and index the dim of an indexer that scores."""
    present: dict[str, Any] = {}
    if "cmp" in branches:
        kinds = Phi(key=phi, value=phi_value or phi, hidden=16 if "mlp" in (phi, phi_value) else None)
        places = Position(key=position[0], value=position[1])
        present["compression"] = Compression(
            block=compression[0], stride=compression[1], phi=kinds, position=places, output=output
        )
    if "slc" in branches:
        forced = {} if indices == "input" else {"initial": initial, "local": local}
        present["selection"] = Selection(
            block=block, count=count, indices=indices, scores={"indexer": {"dim": index}} if index else scores,
            pool=pool, scope=scope, sink=sink_slc, **forced,
        )  # fmt: skip
    if "win" in branches:
        present["window"] = Window(size=window, sink=sink)
    combine = Combine(gate=gate, joint=("selection", "window") if joint else (), sink=sink_joint)
    later = (sink, sink_slc, sink_joint, "indexer" if index else scores, pool, scope, output, cache or "none")
    spec = Spec(
        version=1 if not joint and set(later) <= {"none", "compression", "sum", "group", True} else 2,
        name="under_test",
        heads=Heads(query=group * kv_heads, kv=kv_heads),
        head_dim=HeadDim(qk=dims[0], v=dims[1]),
        dtype=dtype,
        scale=scale,
        kv=kv,
        combine=combine,
        cache=cache and {"dtype": cache},
        passes=passes,
        **present,
    )
    return parse_spec(spec.resolved_yaml())


@dataclass(frozen=True)
class Operator:
    """A spec, what the oracle needs of it, and its package: the imported module and the folder it lies in."""

    spec: Spec
    parameters: OracleParameters
    module: ModuleType
    folder: Path

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)


@functools.cache
def _built(text: str) -> Operator:
    spec = parse_spec(text)
    folder = generate(spec, Path(_packages.name) / spec.digest())
    return Operator(spec, OracleParameters.from_spec(spec), import_package(folder), folder)


def operator_of_spec(spec: Spec) -> Operator:
    """The generated package of a spec; generated and imported once a session."""
    return _built(spec.resolved_yaml())


def operator_of(branches: str = "cmp slc win", **changes: Any) -> Operator:
    """The generated package of `small_spec(branches, **changes)`."""
    return operator_of_spec(small_spec(branches, **changes))


def set_constants(monkeypatch: pytest.MonkeyPatch, op: Operator, module: str, **values: Any) -> None:
    """Give a module of the kernels other constants, and have it forget launches that it kept, until the test ends."""
    kernels = sys.modules[f"{op.module.__name__}.kernels.{module}"]
    for name, value in tuple(vars(kernels).items()):
        if hasattr(value, "cache_clear"):
            monkeypatch.setattr(kernels, name, functools.cache(value.__wrapped__))
    for name, value in values.items():
        monkeypatch.setattr(kernels, name, value)


def inputs_of(op: Operator, tokens: int | tuple[int, ...], **more: Any) -> Inputs:
    """Random inputs in the spec's dtype, of one batch entry unless told otherwise."""
    more.setdefault("batch", 1)
    dtype = getattr(torch, op.spec.dtype)
    return make_inputs(op.spec, tokens=tokens, dtype=dtype, device=DEVICE, **more)


def assert_matches_oracle(
    op: Operator,
    tokens: int | tuple[int, ...],
    *,
    inputs: Inputs | None = None,
    gradients: bool = True,
    **more: Any,
) -> dict[str, Row]:
    """Outputs, lse, choice of blocks and, with `gradients`, every gradient agree with the oracle.

    `more` goes to `make_inputs` (tokens_kv, kind, batch, seed). Returns the comparisons by quantity.
    """
    inputs = inputs if inputs is not None else inputs_of(op, tokens, **more)
    case = Case(tokens, tokens_kv=more.get("tokens_kv"), kind=more.get("kind", "gaussian"), twice=False)
    rows = check_case(op.module, op.parameters, case, inputs, with_gradients=gradients)
    failures = [row for row in rows if not row.ok]
    assert not failures, "\n".join(
        f"{row.quantity}: {row.problem or f'{row.measure} error {row.error:.3e}, bound {row.bound:.3e}'}"
        for row in failures
    )
    found = {row.quantity: row for row in rows}
    assert "o" in found and (not gradients or "dq" in found)
    return found


def call(op: Operator, inputs: Inputs, **more: Any) -> Any:
    """`nsa_attention` of a package on `inputs`."""
    arguments = {name: x for name, x in inputs.arguments().items() if x is not None}
    if "compression" in arguments:
        arguments["compression"] = op.CompressionParameters(**arguments["compression"])
    first = [arguments.pop(name, None) for name in ("q", "k", "v")]
    return op.nsa_attention(*first, **arguments, **more)


def call_with_gradients(op: Operator, inputs: Inputs, **more: Any) -> dict[str, Tensor]:
    """o, the auxiliary outputs and every gradient for inputs.do, by name; gradients begin with a d.

    `more` goes to `nsa_attention`.
    """
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.differentiable().items()}
    o, aux = call(op, inputs.replace_differentiable(leaves), return_aux=True, **more)
    found = torch.autograd.grad(o, list(leaves.values()), inputs.do)
    gradients = {f"d{name}": x for name, x in zip(leaves, found, strict=True)}
    shown = {name: x.detach() for name, x in aux._asdict().items() if x is not None}
    return {"o": o.detach(), **shown, **gradients}


def assert_a_step_is_the_operator(
    step: Callable[..., tuple[Tensor, Tensor]], op: Operator, inputs: Inputs, branch: str, sink: str, **given: Any
) -> None:
    """A step called alone gives the bits of an operator that has this branch alone, gradients and sink included."""
    leaves = {name: getattr(inputs, name).detach().requires_grad_() for name in ("q", "k", "v", sink)}
    o, lse = step(**leaves, **given, cu_seqlens=inputs.cu_seqlens)
    found = torch.autograd.grad(o, list(leaves.values()), inputs.do)
    whole = call_with_gradients(op, inputs)
    assert torch.equal(o, whole["o"]) and torch.equal(lse, whole[f"lse_{branch}"])
    for name, gradient in zip(leaves, found, strict=True):
        assert torch.equal(gradient, whole[f"d{name}"]), name


def uniform_keys(op: Operator, tokens: int, tokens_kv: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v of one batch entry with equal logits everywhere, and v[j] = j: o is the mean of the keys seen, and
    exp(lse) their number."""
    p, dtype = op.parameters, getattr(torch, op.spec.dtype)
    keys = tokens_kv or tokens
    q = torch.randn(1, tokens, p.query_heads, p.head_dim_qk, dtype=dtype, device=DEVICE)
    k = torch.zeros(1, keys, p.kv_heads, p.head_dim_qk, dtype=dtype, device=DEVICE)
    number = torch.arange(keys, dtype=dtype, device=DEVICE)[None, :, None, None]
    return q, k, number.expand(1, keys, p.kv_heads, p.head_dim_v).contiguous()
