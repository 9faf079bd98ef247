"""Inputs and results of related calls: a call's past, its sequences, its chunks, its batch, its groups."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from nsa_gen.verification.calls import Call
from nsa_gen.verification.checking import COMPRESSED, compare_result, comparison_row
from nsa_gen.verification.reference.alignment import LOSS
from nsa_gen.verification.reference.dense import OracleParameters
from nsa_gen.verification.reference.gradients import truth_and_baseline
from nsa_gen.verification.reference.inputs import Inputs
from nsa_gen.verification.reference.oracle import SINKS, compressed_rows, mapped
from nsa_gen.verification.report import Row

BY_QUERY = ("q", "do", "q_idx", "gates", "indices", "counts")
QUERY_GRADIENTS = ("dq", "dq_idx", "dgates")
"""Gradients with one row per query token."""


def changed(inputs: Inputs, change: Callable[[str, Tensor], Tensor]) -> Inputs:
    """`inputs` with every tensor but sinks replaced by `change(name, tensor)`; phi's parameters have their own names.

    A tensor that keeps its shape keeps its strides, because a CPU's matrix product may round depending on them.
    """
    return mapped(inputs, lambda name, x: x if name in SINKS else _laid_out_as(x, change(name, x)))


def _laid_out_as(x: Tensor, y: Tensor) -> Tensor:
    """y with the strides of x, if both have the same shape and no two elements of x share memory."""
    if y.shape != x.shape or y.stride() == x.stride() or 0 in x.stride():
        return y
    return torch.empty_strided(x.shape, x.stride(), dtype=y.dtype, device=y.device).copy_(y)


def of_tokens(inputs: Inputs, change: Callable[[str, Tensor], Tensor]) -> Inputs:
    """As `changed`, without changing phi's parameters."""
    return replace(changed(replace(inputs, compression=None), change), compression=inputs.compression)


def normal(x: Tensor) -> Tensor:
    """x with 0 for subnormal numbers and for those that may be rounded subnormals: they do not double exactly."""
    return torch.where(x.abs() <= torch.finfo(x.dtype).smallest_normal, torch.zeros_like(x), x)


def has_subnormal(x: Tensor | None) -> bool:
    """Whether `normal` would change x."""
    return x is not None and bool(((x.abs() > 0) & (normal(x) == 0)).any())


# The past


@dataclass(frozen=True)
class Kept:
    """Masks (bool) of the query rows, keys and compressed blocks that lie in the past of a token."""

    dim: int
    queries: Tensor
    keys: Tensor
    blocks: Tensor

    def of(self, name: str) -> Tensor | None:
        """The mask for an input of this name. None if it has no token dimension."""
        if name in COMPRESSED:
            return self.blocks
        if name in BY_QUERY:
            return self.queries
        return self.keys if name.split("_")[0] in ("k", "v") else None


def kept(p: OracleParameters, inputs: Inputs) -> Kept:
    """The first half of each sequence's queries, and the keys and blocks that the last of them may see."""
    device = inputs.q.device
    packed = inputs.cu_seqlens is not None
    if inputs.cu_seqlens is not None:
        bounds = list(pairwise(inputs.cu_seqlens.tolist()))
        rows = tokens = inputs.q.shape[0]
        blocks = tokens // (p.compression_stride or 1)
    else:
        rows, tokens = inputs.q.shape[1], inputs.raw_keys().shape[1]
        bounds, blocks = [(0, rows)], p.compressed_blocks(tokens)
    queries, keys, compressed = (torch.zeros(n, dtype=torch.bool) for n in (rows, tokens, blocks))
    for start, stop in bounds:
        half = (stop - start + 1) // 2
        seen = half if packed else tokens - rows + half
        queries[start : start + half] = True
        keys[start : start + seen] = True
        first = start // (p.compression_stride or 1)
        compressed[first : first + p.compressed_blocks(seen)] = True
    return Kept(0 if packed else 1, *(x.to(device) for x in (queries, keys, compressed)))


def _column(mask: Tensor, x: Tensor, dim: int) -> Tensor:
    return mask.view(*(1,) * dim, -1, *(1,) * (x.dim() - dim - 1))


def mixed(inputs: Inputs, others: Inputs, keep: Kept) -> Inputs:
    """The past of `inputs` and the future of `others`."""

    def change(name: str, x: Tensor) -> Tensor:
        mask, other = keep.of(name), getattr(others, name, None)
        return x if mask is None or other is None else torch.where(_column(mask, x, keep.dim), x, other)

    return changed(inputs, change)


def torn(inputs: Inputs, keep: Kept) -> Inputs:
    """NaN in every key and value of the future, compressed ones too."""

    def change(name: str, x: Tensor) -> Tensor:
        mask = None if name in BY_QUERY else keep.of(name)
        return x if mask is None else x.masked_fill(~_column(mask, x, keep.dim), torch.nan)

    return changed(inputs, change)


def past(call: Call, keep: Kept) -> dict[str, Tensor]:
    """The results of the kept rows: outputs, blocks, and the gradients of queries and gates."""
    found = {}
    for name, x in call.tensors().items():
        if name in COMPRESSED:
            found[name] = x.index_select(keep.dim, keep.blocks.nonzero()[:, 0])
        elif name in QUERY_GRADIENTS or not (name.startswith("d") or name == LOSS):
            found[name] = x.index_select(keep.dim, keep.queries.nonzero()[:, 0])
    return found


# Sequences, chunks, groups


def sequences(p: OracleParameters, inputs: Inputs) -> list[Inputs]:
    """The nonempty sequences of a packed call, each as a batch of one."""
    assert inputs.cu_seqlens is not None
    found = []
    for number, (start, stop) in enumerate(pairwise(inputs.cu_seqlens.tolist())):
        if start == stop:
            continue
        first = start // (p.compression_stride or 1)
        blocks = slice(first, first + p.compressed_blocks(stop - start))

        def cut(
            name: str, x: Tensor, rows: slice = slice(start, stop), blocks: slice = blocks, number: int = number
        ) -> Tensor:
            if name in COMPRESSED:
                return x[blocks][None]
            if name == "dloss":
                return x[number : number + 1]
            return x[rows][None] if name in BY_QUERY or name.split("_")[0] in ("k", "v") else x

        found.append(of_tokens(replace(inputs, cu_seqlens=None), cut))
    return found


def joined(p: OracleParameters, inputs: Inputs, calls: Sequence[Call]) -> dict[str, Tensor]:
    """The results of `sequences(p, inputs)` in the packed call's layout; gradients of parameters are added."""
    assert inputs.cu_seqlens is not None
    found: dict[str, Tensor] = {}
    rows = compressed_rows(p, inputs.cu_seqlens).to(inputs.q.device)
    for name in calls[0].tensors():
        parts = [call.tensors()[name] for call in calls]
        if is_gradient_of_parameters(name):
            found[name] = torch.stack([part.double() for part in parts]).sum(0)
        elif name == LOSS:
            lengths = inputs.cu_seqlens.diff()
            found[name] = parts[0].new_zeros(lengths.numel()).masked_scatter(lengths > 0, torch.cat(parts))
        elif name.removeprefix("d") in COMPRESSED:
            total = inputs.q.shape[0] // (p.compression_stride or 1)
            blocks = torch.cat([part[0] for part in parts])
            found[name] = blocks.new_zeros(total, *blocks.shape[1:]).index_copy(0, rows, blocks)
        else:
            found[name] = torch.cat([part[0] for part in parts])
    return found


def padded(p: OracleParameters, inputs: Inputs, rows: int) -> Inputs:
    """A packed call with `rows` more rows after its last sequence, which hold what must not be read."""

    def behind(name: str, x: Tensor) -> Tensor:
        if name in COMPRESSED:
            stride = p.compression_stride or 1
            more = (inputs.q.shape[0] + rows) // stride - x.shape[0]
        elif name in BY_QUERY or name.split("_")[0] in ("k", "v"):
            more = rows
        else:
            return x
        unread = math.nan if x.is_floating_point() else torch.iinfo(x.dtype).max
        return torch.cat((x, x.new_full((more, *x.shape[1:]), unread)))

    return of_tokens(inputs, behind)


def cut(tensors: Mapping[str, Tensor], whole: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Split a padded call's results: the rows that `whole` (the results without padding) has, and the rest."""
    rows = {name: 0 if is_gradient_of_parameters(name) else x.shape[0] for name, x in whole.items()}
    kept = {name: x[: rows[name]] if rows[name] else x for name, x in tensors.items()}
    return kept, {name: x[rows[name] :] for name, x in tensors.items() if rows[name]}


def chunks(p: OracleParameters, inputs: Inputs) -> list[Inputs]:
    """A batched call with Tq = Tkv as two calls: the first third of the tokens, then the rest with all keys.

    The alignment loss is a mean over the tokens, so each chunk has its share of it.
    """
    tokens = inputs.q.shape[1]
    cut = max(1, tokens // 3)

    def first(name: str, x: Tensor) -> Tensor:
        if name == "dloss":
            return x * cut / tokens
        return x[:, : p.compressed_blocks(cut)] if name in COMPRESSED else x[:, :cut]

    def second(name: str, x: Tensor) -> Tensor:
        if name == "dloss":
            return x * (tokens - cut) / tokens
        return x[:, cut:] if name in BY_QUERY else x

    return [of_tokens(inputs, change) for change in (first, second)]


def repeated(p: OracleParameters, inputs: Inputs) -> Inputs:
    """The same call with one KV head per query head."""
    by_choice = () if p.scope == "group" else ("q_idx", "indices", "counts")
    same = ("q", "do", "k_idx", "gates", "cu_seqlens", "dloss", *by_choice)

    def change(name: str, x: Tensor) -> Tensor:
        if name in same:
            return x
        learned = name.startswith(("key_", "value_"))
        dim = 0 if learned else x.dim() - (1 if name == "counts" else 2)
        return x.repeat_interleave(p.group, dim).contiguous()

    return changed(inputs, change)


def rejoined(
    parts: Sequence[Mapping[str, Tensor]], names: Iterable[str]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The results of two `chunks` in the layout of the whole call, and what was rounded once more than there.

    Rows of queries are concatenated. Gradients of keys, values and compressed blocks are added over the chunks, which
    all start at the first of them. Gradients of phi's parameters are added as they are.
    """
    expected: dict[str, Tensor] = {}
    rounded: dict[str, Tensor] = {}
    for name in names:
        pieces = [part[name] for part in parts]
        if name == LOSS:
            tokens = [part["o"].shape[1] for part in parts]
            shares = [x.double() * t / sum(tokens) for x, t in zip(pieces, tokens, strict=True)]
            expected[name] = torch.stack(shares).sum(0)
            rounded[name] = torch.stack(shares).square().sum(0).sqrt()
            continue
        if not is_gradient(name) or name in QUERY_GRADIENTS:
            expected[name] = torch.cat(pieces, 1)
            continue
        exact = [piece.double() for piece in pieces]
        if not is_gradient_of_parameters(name):
            longest = max(piece.shape[1] for piece in exact)
            exact = [_lengthened(piece, longest) for piece in exact]
        expected[name] = torch.stack(exact).sum(0)
        rounded[name] = torch.stack(exact).square().sum(0).sqrt()
    return expected, rounded


def _lengthened(x: Tensor, tokens: int) -> Tensor:
    return torch.cat([x, x.new_zeros(x.shape[0], tokens - x.shape[1], *x.shape[2:])], 1)


def regrouped(call: Call, group: int, names: Iterable[str]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The results of a `repeated` call with the original KV heads, and what was rounded once more than there.

    The gradient of a KV head, and of its parameters, is the sum over its copies.
    """
    expected: dict[str, Tensor] = {}
    rounded: dict[str, Tensor] = {}
    tensors = call.tensors()
    for name in names:
        x = tensors[name]
        if not is_gradient(name) or name in QUERY_GRADIENTS or name[1:] in SINKS:
            expected[name] = x
            continue
        dim = 0 if name.startswith("dcompression") else x.dim() - 2
        copies = x.double().unflatten(dim, (x.shape[dim] // group, group))
        expected[name] = copies.sum(dim + 1)
        rounded[name] = copies.square().sum(dim + 1).sqrt()
    return expected, rounded


def is_gradient(name: str) -> bool:
    """Whether the name is that of a gradient."""
    return name.startswith("d")


def is_gradient_of_parameters(name: str) -> bool:
    """Whether the name is that of a gradient of phi's parameters or of a sink, which sums over all tokens."""
    return name.startswith("dcompression") or name[1:] in SINKS


def is_gradient_of_raw_keys(name: str) -> bool:
    """Whether the name is that of a gradient of a branch's raw keys or values, or of index keys."""
    return name in ("dk", "dk_idx", "dv", "dk_slc", "dv_slc", "dk_win", "dv_win")


def is_gradient_of_values(name: str) -> bool:
    """Whether the name is that of a gradient of v, v_cmp, v_slc, v_win or a learned position of values."""
    return name.startswith("dv") or name == "dcompression.value_position"


TINY = 2.0**-60
"""Smaller gradients may have terms below the smallest normal float32, where doubling rounds."""


def not_tiny(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Two results, with 0 for the elements that are tiny in both."""
    both = {name: (x.abs() < TINY) & (second[name].abs() < TINY) for name, x in first.items()}
    a, b = ({name: x.masked_fill(both[name], 0.0) for name, x in each.items()} for each in (first, second))
    return a, b


def near(
    label: str,
    title: str,
    p: OracleParameters,
    inputs: Inputs,
    actual: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    more_rounded: Mapping[str, Tensor] | None = None,
) -> list[Row]:
    """Two results of the same operator are as close to each other as each must be to the truth.

    `more_rounded` are sizes, by name, of quantities that one of them rounded once more than the operator does. They
    count as noise. If rounding made the two select different blocks, what depends on the selection is not compared.
    """
    computed = p.selection_block is not None and not p.indices_given and "indices" in actual
    chosen = (actual["indices"], actual["counts"]) if computed else (None, None)
    same = not computed or torch.equal(actual["indices"], expected["indices"])
    gradients = any(is_gradient(name) for name in actual)
    truth, base = truth_and_baseline(p, inputs, chosen, with_gradients=gradients)
    found = []
    for name, x in actual.items():
        if name in ("indices", "counts") or not (same or name.endswith(("_cmp", "_win"))):
            continue
        again = (more_rounded or {}).get(name)
        comparison = compare_result(p, inputs, name, x, truth, base, expected=expected[name], rounded=again)
        found.append(comparison_row(label, f"{title}: {name}", comparison))
    return found
