"""Spec -> Steps: what NSA computes, with the tensors that each step reads and writes and the schedules to run it.

This module names the kernels of a step; `Plan.kernels` describes them. The steps are in the order of a forward.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from nsa_gen.lowering.branches import kv_names, sink_name, sunk_branches
from nsa_gen.lowering.hopper import HOPPER, hopper_fits, hopper_selected_forward_fits
from nsa_gen.lowering.hopper_backward import (
    hopper_banded_backward_fits,
    hopper_banded_dq_fits,
    hopper_selected_backward_fits,
)
from nsa_gen.lowering.parts import (
    HOPPER_DQ,
    HOPPER_GATHER,
    HOPPER_GATHER_QUERIES,
    HOPPER_KEYS,
    HOPPER_LOCAL,
    HOPPER_ROWS,
    Argument,
    Kernel,
    Output,
    Schedule,
    Step,
)
from nsa_gen.lowering.sharing import HOPPER_LOCAL_TOKENS, hopper_local_fits, local_in_window
from nsa_gen.spec import Spec

QUERY_MAJOR, KEY_MAJOR, LOCAL_BLOCKS = "query_major", "key_major", "local_blocks"
"""Names of schedules. Those of Hopper's schedules are in `parts`."""


def build_steps(
    spec: Spec, arguments: Sequence[Argument], outputs: Sequence[Output], kernels: Sequence[Kernel]
) -> tuple[Step, ...]:
    """The steps of a spec in the order of the forward."""
    present = {kernel.name for kernel in kernels}
    backward = "backward" in spec.passes
    combined = spec.combine.gate != "none" or len(spec.branches) > 1
    steps = []
    if spec.compression:
        if not spec.external:
            steps.append(_pool(spec, arguments, outputs, kernels))
        whole = spec.compression.output
        steps.append(_attend_compressed(spec, combined, present) if whole else _sum_compressed(spec, present))
    if spec.selection and spec.selection.indices == "computed":
        steps += _choose_blocks(spec, present)
    joint = [_attend_joint(spec, combined, kernels)] if spec.combine.joint else []
    selected = [_attend_selected(spec, combined, kernels)] if spec.selection and not joint else []
    window = [_attend_window(spec, combined, present)] if spec.window and not joint else []
    # If the window's kernels may process the local blocks, they run first: selected attention merges their parts.
    steps += [*window, *selected] if local_in_window(spec) else [*selected, *window, *joint]
    if combined:
        gates = ("gates",) if spec.combine.gate != "none" else ()
        reads = (*(f"o_{branch}" for branch in spec.branches), *gates)
        names = ("combine_forward", "combine_backward")
        schedules = (
            Schedule("one_pass", _among(names, present)),
            *_decoding(("decode_attend", "decode_step"), present),
        )
        steps.append(Step("combine", "combine", reads, ("o",), reads if backward else (), (), {}, schedules))
    return tuple(steps)


def _among(names: Iterable[str], present: Iterable[str]) -> tuple[str, ...]:
    return tuple(name for name in names if name in present)


def _decoding(names: Iterable[str], present: set[str]) -> tuple[Schedule, ...]:
    """The schedule of a step in decode. One decode kernel may run several steps of the plan."""
    kernels = _among(names, present)
    return (Schedule("decode", kernels),) if kernels else ()


def _pool(spec: Spec, arguments: Sequence[Argument], outputs: Sequence[Output], kernels: Sequence[Kernel]) -> Step:
    """The step that computes phi of every block: compressed keys and, if they have an output, values (Eq. 7)."""
    assert spec.compression is not None
    output = spec.compression.output
    parameters = tuple(argument.name for argument in arguments if argument.group == "compression")
    saved = tuple(output.name for output in outputs if output.saved_by_phi)
    keys, values = kv_names(spec, "cmp")
    reads = (keys, *((values,) if output else ()), *parameters)
    writes = ("k_cmp", *(("v_cmp",) if output else ()), *saved)
    names = tuple(each.name for each in kernels if each.module.startswith("compression_"))
    present = {kernel.name for kernel in kernels}
    constants = {"BLOCK": spec.compression.block, "STRIDE": spec.compression.stride}
    schedules = (Schedule("blocks", names), *_decoding(("append", "append_linear"), present))
    gradients = reads if output and "backward" in spec.passes else ()
    return Step("pool", "compress", reads, writes, gradients, saved, constants, schedules)


def _attend(
    spec: Spec,
    combined: bool,
    branch: str,
    name: str,
    kv: tuple[str, str],
    constants: dict[str, int | float | None],
    schedules: tuple[Schedule, ...],
    index: tuple[str, ...] = (),
    sorted_index: tuple[str, ...] = (),
) -> Step:
    sink = branch in sunk_branches(spec)
    learned = ("q", *kv, *((sink_name(branch),) if sink else ()))
    writes = (f"o_{branch}" if combined else "o", f"lse_{branch}", *sorted_index)
    backward = "backward" in spec.passes
    return Step(
        "attend", name, (*learned, *index), writes, learned if backward else (), writes if backward else (),
        {"GATE": spec.branches.index(branch), "SINK": int(sink), **constants}, schedules, branch,
    )  # fmt: skip


def _banded(spec: Spec, branch: str, name: str, combined: bool, present: set[str]) -> tuple[Schedule, ...]:
    """The schedules of banded attention."""
    names = [f"{name}_forward", f"{name}_backward_dq", f"{name}_backward_dkdv", *_row_sums(spec, branch, combined)]
    found = [Schedule(QUERY_MAJOR, _among(names, present))]
    if hopper_fits(spec, branch):
        found.append(Schedule(HOPPER_ROWS, (), (HOPPER,), decided_by=("HOPPER_TOKENS", None)))
    if hopper_banded_dq_fits(spec, branch):
        found.append(Schedule(HOPPER_DQ, (), (HOPPER,), decided_by=("HOPPER_DQ_TOKENS", None)))
    if hopper_banded_backward_fits(spec):
        found.append(Schedule(HOPPER_KEYS, (), (HOPPER,), decided_by=("HOPPER_BACKWARD_TOKENS", None)))
    return tuple(found)


def _row_sums(spec: Spec, branch: str, combined: bool) -> tuple[str, ...]:
    """Backward kernels that read no keys: delta, unless the backward of a combination computes it, and the sink's."""
    return (*(() if combined else ("attention_delta",)), *(("sink_gradient",) if branch in sunk_branches(spec) else ()))


def _attend_compressed(spec: Spec, combined: bool, present: set[str]) -> Step:
    """Attention to the compressed blocks that end at or before a query (Eq. 7)."""
    assert spec.compression is not None
    constants = {"BLOCK": spec.compression.block, "STRIDE": spec.compression.stride, "WINDOW": None}
    decode = _decoding(("append_compressed", "decode_compressed", "decode_step"), present)
    schedules = (*_banded(spec, "cmp", "compressed", combined, present), *decode)
    return _attend(spec, combined, "cmp", "compressed", ("k_cmp", "v_cmp"), constants, schedules)


def _sum_compressed(spec: Spec, present: set[str]) -> Step:
    """The lse of the scores of compressed keys without values, which importance needs (Eq. 8)."""
    assert spec.compression is not None
    constants = {"BLOCK": spec.compression.block, "STRIDE": spec.compression.stride, "WINDOW": None}
    decode = _decoding(("append_compressed", "decode_compressed", "decode_step"), present)
    schedules = (Schedule(QUERY_MAJOR, ("compressed_lse",)), *decode)
    return Step("score", "compressed_lse", ("q", "k_cmp"), ("lse_cmp",), (), (), constants, schedules)


def _attend_window(spec: Spec, combined: bool, present: set[str]) -> Step:
    """Attention to a query's last keys."""
    assert spec.window is not None
    schedules = list(_banded(spec, "win", "window", combined, present))
    if local_in_window(spec):
        names = schedules[0].kernels
        schedules.append(Schedule(LOCAL_BLOCKS, names, decided_by=("LOCAL_IN_WINDOW", 1), fuses=("selected",)))
        if hopper_local_fits(spec):
            decided_by = (HOPPER_LOCAL_TOKENS, None)
            schedules.append(Schedule(HOPPER_LOCAL, (), (HOPPER,), decided_by=decided_by, fuses=("selected",)))
    constants = {"BLOCK": 1, "STRIDE": 1, "WINDOW": spec.window.size}
    decode = _decoding(("decode_attend", "decode_step"), present)
    return _attend(spec, combined, "win", "window", kv_names(spec, "win"), constants, (*schedules, *decode))


def _attend_selected(spec: Spec, combined: bool, kernels: Sequence[Kernel]) -> Step:
    """Attention to the tokens of the selected blocks (Eq. 11 and 12)."""
    assert spec.selection is not None
    schedules = _selected(spec, _row_sums(spec, "slc", combined), kernels)
    return _attend(
        spec, combined, "slc", "selected", kv_names(spec, "slc"), _selection_sizes(spec), schedules,
        ("indices", "counts"), _sorted_index(spec),
    )  # fmt: skip


def _attend_joint(spec: Spec, combined: bool, kernels: Sequence[Kernel]) -> Step:
    """Attention to the selected blocks and a query's last keys under one softmax, in which each key counts once."""
    assert spec.window is not None
    present = {kernel.name for kernel in kernels}
    window = _banded(spec, "win", "window", True, present)
    always = (*window[0].kernels, "merge_joint", *_row_sums(spec, "joint", combined))
    schedules = (*_selected(spec, always, kernels), *window[1:])
    return _attend(
        spec, combined, "joint", "joint", kv_names(spec, "joint"),
        _selection_sizes(spec) | {"WINDOW": spec.window.size}, schedules, ("indices", "counts"), _sorted_index(spec),
    )  # fmt: skip


def _selection_sizes(spec: Spec) -> dict[str, int | float | None]:
    assert spec.selection is not None
    return {"BLOCK": spec.selection.block, "COUNT": spec.selection.count, "SCOPES": spec.scopes}


def _sorted_index(spec: Spec) -> tuple[str, ...]:
    return ("sorted_keys", "sorted_slots") if "backward" in spec.passes else ()


def _selected(spec: Spec, always: Iterable[str], kernels: Sequence[Kernel]) -> tuple[Schedule, ...]:
    """The schedules of attention to selected blocks. The kernels `always` run in addition to theirs."""
    present = {kernel.name for kernel in kernels}
    own = [
        each for each in kernels if each.branch == "slc" and each.direction != "decode" and each.module not in _CHOICE
    ]
    query_major = tuple(each.name for each in own if each.choice and not each.choice[1])
    # dk and dv are always key-major.
    key_major = tuple(each.name for each in own if not each.choice or each.choice[1])
    shared = _among(always, present)
    schedules = [
        Schedule(QUERY_MAJOR, query_major, decided_by=("KEY_MAJOR_FORWARD", 0)),
        Schedule(KEY_MAJOR, (*key_major, *shared), decided_by=("KEY_MAJOR_FORWARD", 1)),
    ]
    if hopper_selected_forward_fits(spec):
        schedules.append(Schedule(HOPPER_GATHER_QUERIES, (), (HOPPER,), decided_by=("HOPPER_TOKENS", None)))
    if hopper_selected_backward_fits(spec):
        schedules.append(Schedule(HOPPER_GATHER, (), (HOPPER,), decided_by=("HOPPER_BACKWARD_TOKENS", None)))
    return (*schedules, *_decoding(("decode_attend", "decode_step"), present))


#: Modules of the kernels that choose blocks. The other kernels of the branch attend to these blocks.
_CHOICE = ("selection", "mean_keys")


def _choose_blocks(spec: Spec, present: set[str]) -> list[Step]:
    """The steps that score the blocks (Eq. 8 to 10, mean keys or index keys) and choose the best ones (Eq. 11).

    Blocks are not scored if every slot is forced.
    """
    assert spec.selection is not None
    selection = spec.selection
    block = {"BLOCK": selection.block}
    if selection.index_dim:
        scorer = _score_indexed(spec, present)
    else:
        scorer = _score_means(spec, present) if selection.scores == "mean" else _score_compressed(block, present)
    count = {
        "COUNT": selection.count, "INITIAL": selection.initial, "LOCAL": selection.local,
        "MEAN_SCORES": int(selection.scores == "mean"), "INDEX_DIM": selection.index_dim,
        "MAXIMUM": int(selection.pool == "max"),
    }  # fmt: skip
    decode = _decoding(("decode_select", "decode_step"), present)
    select = Step(
        "select", "select_blocks", scorer[-1].writes if scorer else (), ("indices", "counts"), (), (), block | count,
        (Schedule("sorted_list", ("select_blocks",)), *decode),
    )  # fmt: skip
    return [*scorer, select]


def _score_compressed(block: dict[str, int], present: set[str]) -> list[Step]:
    """Importance of the blocks from attention to the compressed keys (Eq. 8 to 10)."""
    if "block_scores" not in present:
        return []
    schedules = (Schedule("from_lse", ("block_scores",)),)
    return [Step("score", "importance", ("q", "k_cmp", "lse_cmp"), ("importance",), (), (), block, schedules)]


def _score_means(spec: Spec, present: set[str]) -> list[Step]:
    """The mean key of each block of the selection's keys, and the products of a group's queries with it (MoBA)."""
    if "mean_scores" not in present:
        return []
    assert spec.selection is not None
    block = {"BLOCK": spec.selection.block}
    keys, _ = kv_names(spec, "slc")
    pool = Step(
        "pool", "mean_keys", (keys,), ("mean_keys",), (), (), block | {"STRIDE": spec.selection.block},
        (Schedule("blocks", ("mean_keys",)), *_decoding(("append_means",), present)),
    )  # fmt: skip
    schedules = (Schedule("group_sum", ("mean_scores",)),)
    return [pool, Step("score", "mean_scores", ("q", "mean_keys"), ("scores",), (), (), block, schedules)]


def _score_indexed(spec: Spec, present: set[str]) -> list[Step]:
    """The largest product of an index query with the index keys of each block (the indexer of MSA)."""
    if "index_scores" not in present:
        return []
    assert spec.selection is not None
    block = {"BLOCK": spec.selection.block}
    schedules = (Schedule("block_maxima", ("index_scores",)), *_decoding(("append_index",), present))
    return [Step("score", "index_scores", ("q_idx", "k_idx"), ("scores",), (), (), block, schedules)]


def upkeep(kernels: Sequence[Kernel], steps: Sequence[Step]) -> tuple[Schedule, ...]:
    """Kernels of no step: for rows that pad a packed batch, the cache's own, and those of steps called alone."""
    owned = {name for step in steps for schedule in step.schedules for name in schedule.kernels}
    groups: dict[str, list[str]] = {}
    for kernel in kernels:
        if kernel.name not in owned:
            group = "decode" if kernel.direction == "decode" else kernel.module
            groups.setdefault(group, []).append(kernel.name)
    return tuple(Schedule(group, tuple(names)) for group, names in groups.items())
