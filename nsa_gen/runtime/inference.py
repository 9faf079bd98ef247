"""Prefill and decode with a cache: the operators, and the checks, gathering and padding around them.

Each operator is one call of the dispatcher and declares which tensors it writes. None is differentiable.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from itertools import groupby
from typing import Any, NamedTuple

import torch

from .arguments import Arguments
from .cache import Cache
from .lookup import Bucket, decode_bucket
from .registration import Library, Output
from .sequences import Sequences
from .storage import Kept, Layout

_PLACE = "Tensor? table, SymInt capacity, SymInt page_size"

# Neighbouring sequences of equal lengths: first and end of their range, tokens and new tokens of each.
Run = tuple[int, int, int, int]


class Launches(NamedTuple):
    """A package's functions that advance lengths, write new tokens, decode and prefill."""

    advance: Callable[..., None]
    append: Callable[..., None]
    decode: Callable[..., None]
    prefill: Callable[..., list[torch.Tensor]]


class Inference:
    """The inference operators of a package, and the bodies of its public functions `nsa_decode` and `nsa_prefill`.

    Args:
        library: the library in which the operators are registered.
        serving: the context that configures the kernels of a call.
        checks: the checks of the package's arguments.
        launches: the functions that the operators run.
        kept: the tensors of a layer of the cache, by name, in order.
        written: names of those tensors that a caller passes for new tokens.
        outputs: the outputs of a call, o first, each with its value in rows of padding.
        layer, workspace: the package's tuple types; operators rebuild them from lists of tensors.
        parameters: the type of phi's parameters, None if it has none.
        sinks: names of the sinks, (Hq,) float32 each, which are the last arguments of a call.
        gated: whether calls have gates.
        given_lists: whether the caller passes the selected blocks.
    """

    def __init__(
        self,
        library: Library,
        serving: Callable[[torch.device, Bucket], AbstractContextManager[None]],
        checks: Arguments,
        launches: Launches,
        *,
        kept: Mapping[str, Kept],
        written: tuple[str, ...],
        outputs: tuple[tuple[Output, float], ...],
        layer: Callable[..., Any],
        workspace: Callable[..., Any],
        parameters: Callable[..., Any] | None = None,
        sinks: tuple[str, ...] = (),
        gated: bool = True,
        given_lists: bool = False,
    ) -> None:
        self._library, self._serving, self._checks, self.launches = library, serving, checks, launches
        self._kept, self._written, self._outputs = kept, written, outputs
        self._layer, self._workspace, self._parameters = layer, workspace, parameters
        self._sinks, self._gated, self._given_lists = sinks, gated, given_lists
        self._indexed = "Di" in checks.sizes  # an indexer chooses the blocks
        register = library.register_in_place
        weights = ", ".join(["Tensor? gates", "Tensor? q_idx", *(f"Tensor {name}" for name in sinks)])
        register(
            "cache_extend",
            "(Tensor(a!) starts, Tensor(b!) lengths, Tensor(c!) overflow, Tensor? counts, SymInt number, "
            f"{_PLACE}) -> ()",
            self._extend,
        )
        register(
            "cache_write",
            "(Tensor[] new, Tensor(a!)[] layer, Tensor[] parameters, Tensor(b!)? hidden, Tensor starts, "
            f"Tensor lengths, {_PLACE}) -> ()",
            self._write,
        )
        register(
            "decode",
            f"(Tensor q, {weights}, Tensor[] layer, Tensor? indices, Tensor? counts, Tensor(a!)[] workspace, "
            f"Tensor(b!) o, Tensor starts, Tensor lengths, {_PLACE}) -> ()",
            self._decode,
        )
        register(
            "prefill",
            f"(Tensor q, {weights}, Tensor[] layer, Tensor? indices, Tensor? counts, SymInt tokens) -> Tensor[]",
            self._prefill,
            self.new_outputs,
        )

    # The operators

    def _extend(
        self,
        starts: torch.Tensor,
        lengths: torch.Tensor,
        overflow: torch.Tensor,
        counts: torch.Tensor | None,
        number: int,
        *place: Any,
    ) -> None:
        """Advance the lengths by `counts` (B,) int32, or by `number`."""
        layout = self._layout_at(lengths, *place)
        self.launches.advance(starts, lengths, overflow, number if counts is None else counts, layout)

    def _write(
        self,
        new: list[torch.Tensor],
        layer: list[torch.Tensor],
        parameters: list[torch.Tensor],
        hidden: torch.Tensor | None,
        starts: torch.Tensor,
        lengths: torch.Tensor,
        *place: Any,
    ) -> None:
        """Write new tokens, in the order of `written`, to a layer; `hidden` is the workspace of an mlp phi."""
        learned = None if self._parameters is None else self._parameters(*parameters)
        given, held = dict(zip(self._written, new, strict=True)), self._layer(*layer)._asdict()
        within = () if hidden is None else (hidden,)
        self.launches.append(given, held, learned, *within, starts, lengths, self._layout_at(lengths, *place))

    def _decode(self, q: torch.Tensor, gates: torch.Tensor | None, q_idx: torch.Tensor | None, *given: Any) -> None:
        """Attention of the newest tokens, with the configurations for the cache's capacity and batch."""
        sinks, given = given[: len(self._sinks)], given[len(self._sinks) :]
        layer, indices, counts, workspace, o, starts, lengths, *place = given
        layout = self._layout_at(lengths, *place)
        weights = (*((gates,) if self._gated else ()), *((q_idx,) if self._indexed else ()), *sinks)
        lists = (indices, counts) if self._given_lists else ()
        with self._serving(q.device, decode_bucket(layout.capacity, layout.batch)):
            held = self._layer(*layer), *lists, self._workspace(*workspace)
            self.launches.decode(q, *weights, *held, o, starts, lengths, layout)

    def _prefill(
        self, q: torch.Tensor, gates: torch.Tensor | None, q_idx: torch.Tensor | None, *given: Any
    ) -> list[torch.Tensor]:
        """Attention of q (B, Tq, Hq, Dk), the last Tq of `tokens` tokens, to cached tensors (B, rows, Hkv, D)."""
        *sinks, layer, indices, counts, tokens = given
        sequences = Sequences(q.shape[0], q.shape[1], tokens)
        with self._serving(q.device, sequences.bucket):
            index = (q_idx,) if self._indexed else ()
            return self.launches.prefill(q, gates, *index, *sinks, self._layer(*layer), indices, counts, sequences)

    def new_outputs(self, q: torch.Tensor, *_: object) -> list[torch.Tensor]:
        """Uninitialized outputs of a prefill of q (B, N, Hq, Dk)."""
        sizes = {"B": q.shape[0], "Tq": q.shape[1], **self._checks.sizes, "n": self._checks.selected}
        return [output.allocate(q, sizes.__getitem__) for output, _ in self._outputs]

    def _layout_at(self, lengths: torch.Tensor, table: torch.Tensor | None, capacity: int, page_size: int) -> Layout:
        return Layout(lengths.shape[0], capacity, page_size, table)

    # The public functions

    def decode(
        self,
        q: torch.Tensor,
        cache: Cache,
        gates: torch.Tensor | None,
        q_idx: torch.Tensor | None,
        indices: torch.Tensor | None,
        counts: torch.Tensor | None,
        layer: int,
        out: torch.Tensor | None,
        return_aux: bool,
        *sinks: torch.Tensor,
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """Body of `nsa_decode`: returns o, and copies of the branches' outputs if `return_aux`."""
        q = self._check_queries(q, cache)
        tokens, most = q.shape[1], cache.max_new_tokens
        if not 1 <= tokens <= most:
            raise ValueError(f"q: expected 1 to {most} tokens, the cache's max_new_tokens, got {tokens}")
        gates, q_idx, indices, counts, *sinks = self._check_others(q, gates, q_idx, indices, counts, *sinks)
        shape = (*q.shape[:3], self._checks.sizes["Dv"])
        if out is None:
            out = q.new_empty(shape)
        else:
            self._checks.check_tensor("out", out, ("B", "N", "Hq", "Dv"), shape, device=q.device)
            if not out.is_contiguous():
                raise ValueError(f"out: expected a contiguous tensor, got strides {out.stride()}")
            if out.is_neg():
                raise ValueError("out: expected a tensor to be written to, got a view that changes the sign")
        with torch.no_grad():
            self._library.operator("decode")(
                q,
                gates,
                q_idx,
                *sinks,
                list(cache._layer(layer)),
                indices,
                counts,
                list(cache.workspace),
                out,
                cache.starts,
                cache.lengths,
                *cache._place(),
            )
        if not return_aux:
            return out, ()
        shown = cache.workspace.view(tokens, cache.layout)
        return out, tuple(shown[output.name].clone() for output, _ in self._outputs[1:])

    def prefill(
        self,
        q: torch.Tensor,
        cache: Cache,
        gates: torch.Tensor | None,
        q_idx: torch.Tensor | None,
        indices: torch.Tensor | None,
        counts: torch.Tensor | None,
        layer: int,
        *sinks: torch.Tensor,
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """Body of `nsa_prefill`: returns o and the branches' outputs."""
        q = self._check_queries(q, cache)
        if not cache.exact:
            cache.synchronize()
        if q.shape[1] < max(cache.new_tokens):
            raise ValueError(f"q: expected at least the cache's {max(cache.new_tokens)} new tokens, got {q.shape[1]}")
        gates, q_idx, indices, counts, *sinks = self._check_others(q, gates, q_idx, indices, counts, *sinks)
        runs = runs_of(cache.tokens, cache.new_tokens)
        parts = []
        with torch.no_grad():
            for first, end, tokens, new in runs:
                rows = (slice(first, end), slice(0, new))
                parts.append(
                    self._library.operator("prefill")(
                        q[rows],
                        None if gates is None else gates[rows],
                        None if q_idx is None else q_idx[rows],
                        *sinks,
                        self._gathered(cache, layer, first, end, tokens),
                        None if indices is None else indices[rows].contiguous(),
                        None if counts is None else counts[rows].contiguous(),
                        tokens,
                    )
                )
            whole = len(runs) == 1 and runs[0][:2] == (0, q.shape[0]) and runs[0][3] == q.shape[1]
            o, *others = parts[0] if whole else self._padded(q, runs, parts)
        return o, tuple(others)

    def _check_queries(self, q: torch.Tensor, cache: Cache) -> torch.Tensor:
        """Check q (B, N, Hq, Dk) against the cache, and return it detached."""
        if not isinstance(cache, Cache) or cache._checks is not self._checks:
            raise TypeError(f"cache: expected this package's NSACache, got {type(cache).__name__}")
        q = self._checks.check_query("q", q, None)
        shape = (cache.layout.batch, q.shape[1], self._checks.sizes["Hq"], self._checks.sizes["Dk"])
        return self._checks.check_tensor("q", q, ("B", "N", "Hq", "Dk"), shape, device=cache.device).detach()

    def _check_others(
        self,
        q: torch.Tensor,
        gates: torch.Tensor | None,
        q_idx: torch.Tensor | None,
        indices: torch.Tensor | None,
        counts: torch.Tensor | None,
        *sinks: torch.Tensor,
    ) -> tuple[torch.Tensor | None, ...]:
        """Check the other arguments that the package takes against q, and return them; floats are detached."""
        if self._gated:
            gates = self._checks.check_gates(gates, q, packed=False).detach()
        if self._given_lists:
            indices, counts = self._checks.check_selection(indices, counts, q, None)
        if self._indexed:
            q_idx = self._checks.check_query("q_idx", q_idx, None)
            q_idx = self._checks.check_heads("q_idx", q_idx, q.shape[1], "S", "Di", q, "N").detach()
        checked = (self._checks.check_sink(*each, q).detach() for each in zip(self._sinks, sinks, strict=True))
        return gates, q_idx, indices, counts, *checked

    def _gathered(self, cache: Cache, layer: int, first: int, end: int, tokens: int) -> list[torch.Tensor]:
        """Tensors (B, rows, Hkv, D) of a layer for sequences first .. end, which have `tokens` tokens each.

        They are views of a contiguous cache, and copies of a paged one.
        """
        layout, held = cache.layout, cache._layer(layer)
        scales = held[len(self._kept) :]
        scale_of_codes = iter(scales[0][:, 0] if scales else ())
        index = {}
        if layout.table is not None:
            kinds = {kept.blocks for kept in self._kept.values()}
            index = {blocks: layout.index(blocks, first, end, tokens) for blocks in kinds}
        rows = []
        for kept, tensor in zip(self._kept.values(), held, strict=False):
            if layout.table is None:
                found = tensor[first:end, : kept.blocks.of(tokens) if kept.blocks else tokens]
            else:
                found = tensor.flatten(0, 1)[index[kept.blocks]]
            rows.append(decoded(found, next(scale_of_codes), self._checks.dtype) if kept.coded else found)
        return [*rows, *scales]

    def _padded(self, q: torch.Tensor, runs: list[Run], parts: list[list[torch.Tensor]]) -> list[torch.Tensor]:
        """Outputs for the whole batch: those of the runs in their rows, and the values of padding in all others."""
        found = self.new_outputs(q)
        for number, (tensor, (_, padding)) in enumerate(zip(found, self._outputs, strict=True)):
            tensor.fill_(padding)
            for (first, end, _, new), part in zip(runs, parts, strict=True):
                tensor[first:end, :new] = part[number]
        return found


def decoded(codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Decode e4m3 codes (B, rows, Hkv, D) uint8 with scales (Hkv,) of the KV heads, as kernels do."""
    return (codes.view(torch.float8_e4m3fn).float() * scales[:, None]).to(dtype)


def runs_of(tokens: tuple[int, ...], new_tokens: tuple[int, ...]) -> list[Run]:
    """Group neighbouring sequences of equal lengths that have new tokens."""
    runs, first = [], 0
    for (held, new), members in groupby(zip(tokens, new_tokens, strict=True)):
        end = first + len(list(members))
        if new > 0:
            runs.append((first, end, held, new))
        first = end
    return runs
