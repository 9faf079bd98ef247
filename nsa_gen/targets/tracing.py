"""Launch every kernel of a package, without the dispatcher, on tensors that are never read.

This is for code that records launches instead of running them (`launches.record_launches`). The plan of the package's
spec decides what is launched; the launch functions are the package's own.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from types import ModuleType
from typing import Any

import torch

from nsa_gen.lowering import Plan, lower
from nsa_gen.lowering.parts import Argument
from nsa_gen.spec import Spec

ALWAYS, NEVER = 0, 2**31
"""Numbers of tokens from which on Hopper's kernels serve calls: always, never."""

NEW_TOKENS, PAGE_SIZES = (1, 4), (0, 64)
"""The traced steps of decode and caches: tokens per sequence, tokens per page (0: contiguous)."""


def trace(package: ModuleType, tokens: int, batch: int, device: str, packed: bool, passes: Sequence[str]) -> None:
    """Launch every kernel of the named passes, including those of every schedule, on uninitialised tensors.

    Packed calls have `batch` sequences of `tokens` tokens end to end. A package with a function `trace` in its `ops`
    was not made by the generator; this function is called instead.
    """
    ops = _module(package, "ops")
    if hasattr(ops, "trace"):
        ops.trace(tokens=tokens, batch=batch, device=device, packed=packed, passes=passes)
        return
    plan = _plan(package)
    if plan.decodes and "decode" in passes and not packed:
        trace_inference(package, tokens, batch, device)
    arguments, sequences = empty_call(package, tokens, batch, device, packed)
    if plan.selected:  # the kernel that sorts the slots of short calls
        index = _module(package, "kernels.inverted_index")
        layout = index.Layout.of(sequences.sizes, tokens)
        index.sort_few_slots(torch.empty(0, dtype=torch.int32, device=device), layout)
    for others in _schedules(package, plan):
        _trace_operator(package, plan, arguments, sequences, passes if others else ())


def empty_call(
    package: ModuleType, tokens: int, batch: int, device: str, packed: bool = False
) -> tuple[tuple[torch.Tensor | None, ...], Any]:
    """Arguments of the whole operator without values and without given blocks, and their `Sequences`."""
    plan = _plan(package)
    rows, entries = (tokens * batch, 1) if packed else (tokens, batch)
    empty = _allocator(plan, device)
    cu_seqlens = empty(batch + 1, dtype=torch.int32) if packed else None
    sequences = _module(package, "runtime.sequences").Sequences(entries, rows, rows, cu_seqlens)
    sizes = {"B": entries, "Tq": rows, "Tkv": rows}
    if plan.external:
        assert plan.compressed is not None
        sizes["Nc"] = sequences.compressed_rows(plan.compressed.constants["BLOCK"], plan.compressed.constants["STRIDE"])
    chosen = ("indices", "counts") if plan.selects else ()
    arguments = tuple(
        None if argument.name in chosen else _empty(empty, plan, argument, sizes) for argument in plan.arguments
    )
    return arguments, sequences


def agreed_values(
    package: ModuleType, q: torch.Tensor, sequences: Any, recompute: str = "", workspace_bytes: int | None = None
) -> tuple[Any, ...]:
    """The operator's further arguments: bounds of sequences, and values on which forward and backward agree."""
    found: list[Any] = [sequences.cu_seqlens]
    for name in _plan(package).schema_constants:
        if name == "recompute":
            found.append(recompute)
        elif name == "chunk_tokens":
            module = _module(package, "kernels.selected_attention")
            found.append(module.most_chunk_tokens(q, sequences, workspace_bytes))
        else:
            found.append(_module(package, "kernels.selected_attention").window_does_local(q, sequences))
    return tuple(found)


def trace_inference(
    package: ModuleType,
    tokens: int,
    batch: int,
    device: str,
    new_tokens: Sequence[int] = NEW_TOKENS,
    page_sizes: Sequence[int] = PAGE_SIZES,
) -> None:
    """Launch every kernel of inference on uninitialised tensors, for caches of `tokens` tokens per sequence."""
    plan = _plan(package)
    empty = _allocator(plan, device)
    names = ("kernels.append", "storage", "decode", "workspace")
    kernels, storage, decode, workspace = (_module(package, name) for name in names)
    sizes = _module(package, "arguments").CHECKS.sizes
    widths = {name: (sizes[kept.heads], sizes[kept.dim]) for name, kept in storage.KEPT.items()}
    for page_size in page_sizes:
        pages = -(-tokens // page_size) if page_size else 0
        table = empty(batch, pages, dtype=torch.int32) if page_size else None
        layout = storage.Layout(batch, tokens, page_size, table)
        held = (
            empty(*layout.rows(kept, batch * pages if page_size else None), *widths[name], dtype=kept.dtype)
            for name, kept in storage.KEPT.items()
        )
        scales = _module(package, "runtime.storage").new_scales(storage.KEPT.values(), plan.kv_heads, device)
        layer = storage.Layer(*held, *scales)
        starts, lengths = empty(batch, dtype=torch.int32), empty(batch, dtype=torch.int32)
        kernels.advance(starts, lengths, empty(batch, dtype=torch.int32), 1, layout)
        for number in new_tokens:
            new = {name: empty(batch, number, *widths[name]) for name in plan.append_names}
            parameters = None
            if plan.parameters:
                fields = (_empty(empty, plan, parameter, {}) for parameter in plan.parameters)
                parameters = package.CompressionParameters(*fields)
            hidden = (None,) if any(side.kind == "mlp" for side in plan.phi_sides) else ()
            kernels.append(new, layer._asdict(), parameters, *hidden, starts, lengths, layout)
            gates = (empty(batch, number, plan.query_heads, len(plan.branches)),) if plan.gated else ()
            lists: tuple[torch.Tensor | None, ...] = ()
            if plan.selected and not plan.selects:
                count = int(plan.selected.constants["COUNT"] or 0)
                lists = (empty(batch, number, plan.scopes, count, dtype=torch.int32), None)
            arguments = (
                empty(batch, number, plan.query_heads, plan.qk.size),
                *gates,
                *((empty(batch, number, plan.scopes, plan.index_dim),) if plan.index_dim else ()),
                *(empty(plan.query_heads, dtype=torch.float32) for _ in plan.sinks),
                layer,
                *lists,
                workspace.DecodeWorkspace.allocate(layout, number, torch.device(device)),
                empty(batch, number, plan.query_heads, plan.v.size),
                starts,
                lengths,
                layout,
            )
            configs = _module(package, "configs")
            with configs.override("decode_launches", MOST_ROUNDS=0) if plan.decode_steps else nullcontext():
                decode.decode_forward(*arguments)
            if plan.decode_steps and configs.get("decode_launches", torch.device(device))["MOST_ROUNDS"]:
                decode.decode_step(*arguments, workspace.MOST_STEP_SPLITS)


def _module(package: ModuleType, name: str) -> Any:
    return importlib.import_module(f"{package.__name__}.{name}")


def _plan(package: ModuleType) -> Plan:
    return lower(Spec.model_validate(dict(package.SPEC)))


def _allocator(plan: Plan, device: str) -> Callable[..., torch.Tensor]:
    own: torch.dtype = getattr(torch, plan.dtype)

    def empty(*sizes: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        return torch.empty(sizes, dtype=dtype or own, device=device)

    return empty


def _empty(
    empty: Callable[..., torch.Tensor], plan: Plan, argument: Argument, sizes: Mapping[str, int]
) -> torch.Tensor:
    known = {
        "Hq": plan.query_heads,
        "Hkv": plan.kv_heads,
        "Dk": plan.qk.size,
        "Dv": plan.v.size,
        "S": plan.scopes,
        **sizes,
    }
    shape = [known[dim] if dim in known else int(dim) for dim in argument.dims]
    return empty(*shape) if argument.dtype == "spec" else empty(*shape, dtype=getattr(torch, argument.dtype))


def _schedules(package: ModuleType, plan: Plan) -> Iterator[bool]:
    """Put every schedule in force in turn. Yields False if it only affects the forward."""
    override = _module(package, "configs").override
    if not plan.hopper:
        yield from _selected_schedules(package, plan)
        return
    # With Hopper's kernel, on architectures that have it, and with the ordinary ones.
    with override("banded_attention", HOPPER_TOKENS=ALWAYS), ExitStack() as stack:
        if plan.hopper_local:
            with override("local_blocks", HOPPER_LOCAL_TOKENS=ALWAYS):
                yield True
            stack.enter_context(override("local_blocks", HOPPER_LOCAL_TOKENS=NEVER))
        yield False
    with override("banded_attention", HOPPER_TOKENS=NEVER), ExitStack() as stack:
        if plan.hopper_local:
            stack.enter_context(override("local_blocks", HOPPER_LOCAL_TOKENS=NEVER))
        yield from _selected_schedules(package, plan)


def _selected_schedules(package: ModuleType, plan: Plan) -> Iterator[bool]:
    if not plan.selected:
        yield True
        return
    override = _module(package, "configs").override
    for key_major, local in ((0, 0), (0, 1), (1, 0), (1, 1)) if plan.local_in_window else ((0, 0), (1, 0)):
        chosen = {"KEY_MAJOR_FORWARD": key_major}
        chosen |= {"KEY_MAJOR_DQ": key_major} if plan.backward else {}
        chosen |= {"LOCAL_IN_WINDOW": local} if plan.local_in_window else {}
        with ExitStack() as stack:
            stack.enter_context(override("selected_attention", **chosen))
            if plan.hopper_selected_forward:
                stack.enter_context(override("selected_outputs", HOPPER_TOKENS=NEVER))
            yield True
    if plan.hopper_selected_forward:
        with override("selected_outputs", HOPPER_TOKENS=ALWAYS):
            yield False


def _trace_operator(
    package: ModuleType, plan: Plan, arguments: tuple[Any, ...], sequences: Any, passes: Sequence[str]
) -> None:
    agreed = agreed_values(package, arguments[0], sequences)
    _trace_passes(package, plan, arguments, agreed, sequences, passes)
    if plan.local_in_window:
        place = 1 + plan.schema_constants.index("local_in_window")
        if agreed[place]:
            # The same for lists that the caller gives: whether they end with the local blocks is checked.
            given = _module(package, "kernels.selected_attention").GIVEN_LISTS
            _trace_passes(package, plan, arguments, (*agreed[:place], given, *agreed[place + 1 :]), sequences, passes)


def _trace_passes(
    package: ModuleType,
    plan: Plan,
    arguments: tuple[Any, ...],
    agreed: tuple[Any, ...],
    sequences: Any,
    passes: Sequence[str],
) -> None:
    operator, q = _module(package, "operator"), arguments[0]
    outputs = operator.attention_forward(*arguments, *agreed)
    if not (plan.backward and "backward" in passes):
        return
    declared = _module(package, "ops").ATTENTION
    named = dict(zip(declared.outputs, outputs, strict=True))
    saved = [named[name] for name in declared.saved]
    override = _module(package, "configs").override
    has = {
        ("banded_backward", "HOPPER_BACKWARD_TOKENS"): plan.hopper_banded_backward,
        ("banded_backward", "HOPPER_DQ_TOKENS"): plan.hopper_banded_dq,
        ("selected_backward", "HOPPER_BACKWARD_TOKENS"): plan.hopper_selected_backward,
    }
    for tokens in (ALWAYS, NEVER) if any(has.values()) else (None,):
        # With Hopper's kernels, on architectures that have them, and with the ordinary ones.
        with ExitStack() as stack:
            for (name, tunable), has_it in has.items():
                if has_it:
                    stack.enter_context(override(name, **{tunable: tokens}))
            operator.attention_backward([torch.empty_like(outputs[0]), *arguments, *agreed, *saved])
    if plan.aligned and plan.selected is not None:
        step = _module(package, "kernels.alignment")
        empty = _allocator(plan, q.device.type)
        tensors = dict(zip((argument.name for argument in plan.arguments), arguments, strict=True))
        keys = (tensors[plan.kv("slc")[0]], tensors["q_idx"], tensors["k_idx"])
        aligned = (q, *keys, named[f"lse_{plan.selected.branch}"], named["indices"], named["counts"])
        loss, *found = step.alignment_forward(*aligned, sequences)
        chunk_tokens = _module(package, "kernels.selected_attention").most_chunk_tokens(q, sequences, None)
        step.alignment_backward(empty(*loss.shape, dtype=torch.float32), *aligned, *found, sequences, chunk_tokens)
    # One kernel is only launched by the separate steps, not by the whole operator.
    _module(package, "kernels.combine").attention_delta(torch.empty_like(outputs[0]), outputs[0])
