"""Find what a call must not do: write outside its tensors, make the host wait for the GPU, use too much memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from nsa_gen.verification.calls import arguments_of
from nsa_gen.verification.reference.dense import OracleParameters
from nsa_gen.verification.reference.inputs import Inputs

BAND = 4096
"""Elements before and after a tensor. A tile of 128 rows written past the end, with a small head dim, lands inside."""

_aten = torch.ops.aten
_FACTORIES = frozenset(
    {
        _aten.empty.memory_format,
        _aten.empty_like.default,
        _aten.empty_strided.default,
        _aten.new_empty.default,
        _aten.new_empty_strided.default,
        _aten.zeros.default,
        _aten.zeros_like.default,
        _aten.new_zeros.default,
        _aten.full.default,
        _aten.full_like.default,
        _aten.new_full.default,
    }
)


def _pattern(dtype: torch.dtype) -> float | int:
    return float("nan") if dtype.is_floating_point else torch.iinfo(dtype).max


class GuardBands(TorchDispatchMode):
    """Within the block, tensors made by torch's factories lie between two bands of NaN (integers: the largest value).

    If a kernel reads a band, its result has NaN. If it writes there, `damage` finds it, unless it writes another NaN.
    Tensors that operations return (sums, sorts) have no bands.
    """

    def __init__(self) -> None:
        super().__init__()
        self._held: list[tuple[Tensor, int, tuple[int, ...]]] = []

    @property
    def guarded(self) -> int:
        """How many tensors have bands."""
        return len(self._held)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        plain = func in _FACTORIES and isinstance(result, Tensor) and result.layout == torch.strided
        if not plain or result.numel() == 0 or result.dtype == torch.bool or result.is_complex():
            return result
        elements = result.untyped_storage().nbytes() // result.element_size()
        pattern = _pattern(result.dtype)
        flat = torch.full((elements + 2 * BAND,), pattern, dtype=result.dtype, device=result.device)
        guarded = flat.as_strided(result.shape, result.stride(), BAND)
        if "empty" not in func.name():
            guarded.copy_(result)
        self._held.append((flat, elements, tuple(result.shape)))
        return guarded

    def damage(self) -> list[str]:
        """A line for each tensor whose bands were written to."""
        found = []
        for flat, elements, shape in self._held:
            for side, band in (("before", flat[:BAND]), ("behind", flat[BAND + elements :])):
                intact = torch.isnan(band) if flat.is_floating_point() else band == _pattern(flat.dtype)
                if not bool(intact.all()):
                    written = int((~intact).sum())
                    found.append(f"{written} elements written {side} a {flat.dtype} tensor of shape {shape}")
        return found


@contextmanager
def no_synchronisation() -> Iterator[None]:
    """Within the block, an operation that makes the host wait for a CUDA device raises RuntimeError."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def synchronises(call: Callable[[], object]) -> str:
    """Call once to warm up (compiling may wait), then once watched. Returns what waited, or ""."""
    call()
    torch.cuda.synchronize()
    try:
        with no_synchronisation():
            call()
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        return str(error).splitlines()[0]
    return ""


# The memory that a call may use in addition to its arguments, as a formula of its shapes, and what it uses on a CUDA
# device. The forward pass keeps what the backward reads: each branch's output and lse, the selected blocks, and
# compressed keys and values. The backward pass has a float32 sum for each gradient of another dtype to which branches
# add. Nothing grows with tokens times blocks, let alone with tokens squared.

FLOAT32 = 4
SLOT_BYTES = 64
"""Bytes of a slot of the selection in an index by key block: key, sorted key, place (8 bytes), and as much again and
the sort's own buffers during the sort."""
WORKSPACE_SHARE, LEAST_WORKSPACE, MOST_WORKSPACE = 9, 5 * 2**26, 15 * 2**27
"""The workspace of a schedule with partial results per (token, slot, part of a block, query head) is nine times the
bytes of q, at least 320 MiB and at most 1,920 MiB. It holds those of o or dq, their lse, and partial dk and dv."""
CHUNK_TOKENS = 64
"""The partial results of at least this many tokens are held at a time, whatever their size."""
SMALLEST_PART = 16
"""The smallest number of a block's keys that has its own partial result."""
SMALLEST_PIECE = 1024
"""The smallest number of query rows (slots times heads of a group) that is summed into one partial dk and dv."""
SCORE_BYTES = 2**28
SCORE_TOKENS = 2048
"""Importances are held for as many tokens at a time as fit SCORE_BYTES, but for at least this many."""
LARGEST_TILE = 128
"""Tokens of a tile. Every sequence may leave all but one token of its last tile unused."""
ALLOCATOR_BYTES = 64 * 2**20
"""What the caching allocator may add: up to 1 MiB per tensor, and small buffers such as bounds of lists."""


@dataclass(frozen=True)
class MemoryBound:
    """Bytes that a pass may allocate at its peak, in addition to those allocated before it, without ALLOCATOR_BYTES.

    `saved` is what the forward pass keeps for the caller and the backward pass; `forward` and `backward` are peaks.
    """

    saved: int
    forward: int
    backward: int


def memory_bound(p: OracleParameters, inputs: Inputs, hidden: int | None = None) -> MemoryBound:
    """The bound of a call, from its shapes only. `hidden` is the width of an mlp phi.

    With R query rows, C compressed rows, n slots of l' keys in each of L lists (Hq with scope: head, else Hkv) a query,
    e bytes an element, and s = 4 where parts of gradients are added in another dtype than their own (else 0):

        saved     R Hq ((branches + 1) Dv e + 4 branches) + 4 R L (n + 1) + C Hkv (Dk + Dv + hidden widths) e
        work      min(R t, max(W, 64 t)) + 64 R L n, where a token has
                  t = n Hq ((l' / 16) (max(Dk, Dv) e + 8) + l' (Dk + Dv) / 256)
                  and W = 9 R Hq Dk e, but at least 320 MiB and at most 1,920 MiB
        scores    4 L (Tkv / l') tokens, for all tokens or for as many as fit 256 MiB (2048 if fewer do);
                  with scores: mean, 4 L (Tkv / l') Dk a sequence besides;
                  where compressed keys have no output, C Hkv Dk e + 4 R Hq besides
        forward   saved + work + scores, and R Hq (2 Dv e + 8) for the parts of joint branches
        backward  (e + s) x every differentiable element + R Hq (4 branches + Dv e) + work
                  + 4 C Hkv ((G + 2) (Dk + Dv) + hidden widths) + 20 x every element of phi's parameters
                  + 4 Hq (R / 16) where a branch has a sink
    """
    q = inputs.q
    size = q.element_size()
    heads, group = p.query_heads, p.group
    rows = q.numel() // (heads * p.head_dim_qk)
    branches = len(p.branches)
    compressed = _compressed_rows(p, inputs) if p.compression_output else 0
    widths = sum(hidden or 0 for phi in (p.phi_key, p.phi_value) if phi == "mlp") if compressed else 0
    pair = p.head_dim_qk + p.head_dim_v

    saved = rows * heads * ((branches + 1) * p.head_dim_v * size + FLOAT32 * branches)
    saved += compressed * p.kv_heads * (pair + widths) * size
    work = 0
    if p.selection_block is not None:
        slots = rows * p.selection_count
        # If all KV heads share one selection, attention reads a copy for each of them.
        lists = max(p.scopes, p.kv_heads)
        saved += FLOAT32 * (slots + rows) * lists
        parts = -(-p.selection_block // SMALLEST_PART)
        bytes_of_part = max(p.head_dim_qk, p.head_dim_v) * size + 2 * FLOAT32
        bytes_of_keys = FLOAT32 * p.selection_block * pair // SMALLEST_PIECE
        token_bytes = p.selection_count * heads * (parts * bytes_of_part + bytes_of_keys)
        budget = min(max(WORKSPACE_SHARE * q.numel() * size, LEAST_WORKSPACE), MOST_WORKSPACE)
        work = min(rows * token_bytes, max(budget, CHUNK_TOKENS * token_bytes))
        work += SLOT_BYTES * slots * lists

    differentiable = inputs.differentiable()
    elements = sum(x.numel() for x in differentiable.values())
    learned = sum(x.numel() for name, x in differentiable.items() if "." in name)
    summed = size < FLOAT32 and (branches > 1 or p.selection_block is not None)
    backward = elements * (size + FLOAT32 * summed) + rows * heads * (FLOAT32 * branches + p.head_dim_v * size) + work
    backward += FLOAT32 * compressed * p.kv_heads * ((group + 2) * pair + widths) + 5 * FLOAT32 * learned
    if p.sinks:
        backward += FLOAT32 * heads * (rows // 16)  # a part of its gradient for each tile of tokens
    forward = saved + work + _score_bytes(p, inputs)
    if p.joint:
        forward += rows * heads * 2 * (p.head_dim_v * size + FLOAT32)
    return MemoryBound(saved, forward, backward)


def _score_bytes(p: OracleParameters, inputs: Inputs) -> int:
    """Bytes of the scores of the tokens that are ranked together, and of keys that are only scored."""
    if p.selection_block is None or not p.computed:
        return 0
    packed = inputs.cu_seqlens is not None
    sequences = inputs.cu_seqlens.numel() if inputs.cu_seqlens is not None else inputs.q.shape[0]
    rows = inputs.q.shape[0] if packed else inputs.q.shape[0] * inputs.q.shape[1]
    keys = rows if packed else inputs.raw_keys().shape[1]
    token_bytes = FLOAT32 * max(p.scopes, p.kv_heads) * -(-keys // p.selection_block)
    padding = sequences * LARGEST_TILE
    means = token_bytes * p.head_dim_qk * (1 if packed else sequences) if p.scores == "mean" else 0
    if p.scorer_alone:
        means = _compressed_rows(p, inputs) * p.kv_heads * p.head_dim_qk * inputs.q.element_size()
        means += FLOAT32 * rows * p.query_heads
    return token_bytes * (min(rows, max(SCORE_BYTES // max(1, token_bytes), SCORE_TOKENS)) + padding) + means


def _compressed_rows(p: OracleParameters, inputs: Inputs) -> int:
    """Rows of K_cmp and V_cmp over the whole batch."""
    if p.compression_block is None or p.compression_stride is None:
        return 0
    if inputs.cu_seqlens is not None:
        return inputs.q.shape[0] // p.compression_stride
    keys = inputs.raw_keys()
    return keys.shape[0] * p.compressed_blocks(keys.shape[1])


def measured(module: Any, inputs: Inputs, gradients: bool) -> tuple[int, int]:
    """Peak bytes that a package's forward and backward allocate on a CUDA device, in addition to those before each."""
    leaves, positional, named = arguments_of(module, inputs, gradients)
    device = inputs.q.device

    def peak(call: Callable[[], Any]) -> tuple[Any, int]:
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        result = call()
        torch.cuda.synchronize(device)
        return result, torch.cuda.max_memory_allocated(device) - before

    o, forward = peak(lambda: module.nsa_attention(*positional, **named))
    if not gradients:
        return forward, 0
    found, backward = peak(lambda: torch.autograd.grad(o, list(leaves.values()), inputs.do, allow_unused=True))
    del found
    return forward, backward
