"""What holds of every Plan: for the shipped specs and for specs that no person chose."""

from __future__ import annotations

import functools
import math

import pytest
import sympy

from nsa_gen.hardware import TARGETS, UnknownGpuError, gpu, gpu_for_target
from nsa_gen.lowering import lower, space
from nsa_gen.lowering import symbols as s
from nsa_gen.lowering.cost import explain
from nsa_gen.lowering.hopper import hopper_fits, hopper_selected_forward_fits
from nsa_gen.lowering.hopper_backward import (
    hopper_banded_backward_fits,
    hopper_banded_dq_fits,
    hopper_selected_backward_fits,
)
from nsa_gen.lowering.plan import Plan
from nsa_gen.lowering.sharing import local_in_window
from nsa_gen.spec import Compression, Selection, Window, load_spec, parse_spec, shipped_specs
from tests.lowering.drawn_specs import scorer, spec_names, specs

every_program = pytest.mark.parametrize("program", spec_names(), indirect=True)
TABLES = ("interpreter", *TARGETS)


@functools.cache
def lowered(name: str) -> Plan:
    return lower(specs()[name])


@pytest.fixture
def program(request: pytest.FixtureRequest) -> Plan:
    return lowered(request.param)


def test_the_drawn_specs_cover_the_language():
    assert [*specs()] == spec_names()
    drawn = [spec for name, spec in specs().items() if name.startswith("drawn")]
    assert {spec.dtype for spec in drawn} == {"bfloat16", "float16", "float32"}
    assert {spec.combine.gate for spec in drawn} == {"sigmoid", "given", "none"}
    assert {spec.kv for spec in drawn} == {"shared", "per_branch"}
    assert {spec.passes for spec in drawn} == {("forward",), ("forward", "backward"), ("forward", "decode")}
    assert len({spec.branches for spec in drawn}) >= 6
    phis = {
        kind for spec in drawn if spec.compression for kind in (spec.compression.phi.key, spec.compression.phi.value)
    }
    assert {"mean", "weighted", "linear", "mlp", "external"} <= phis
    assert {spec.selection.indices for spec in drawn if spec.selection} == {"computed", "input"}
    assert {scorer(spec) for spec in drawn if spec.selection} == {"compression", "mean", "indexer"}


@every_program
def test_lowering_twice_gives_equal_programs(program: Plan):
    again = lower.__wrapped__(program.spec)
    assert again is not program and again == program
    assert repr(again) == repr(program)


@every_program
def test_steps_read_arguments_and_what_earlier_steps_wrote(program: Plan):
    # A choice of blocks may be given in place of what a step writes.
    replayed = {"indices", "counts"} if program.selects else set()
    known = {argument.name for argument in program.arguments} - replayed
    for step in program.steps:
        assert step.kind in ("pool", "score", "select", "attend", "combine")
        assert set(step.reads) <= known
        assert not set(step.writes) & known
        assert set(step.gradients) <= set(step.reads) and set(step.saved) <= set(step.writes)
        known |= set(step.writes)
    assert {output.name for output in program.outputs} <= known
    assert sorted(program.branches) == sorted(program.spec.branches)


def test_mean_scores_are_pool_score_select_and_attend_with_or_without_the_other_branches():
    spec = parse_spec(
        "version: 2\nname: means\nheads: {query: 4, kv: 2}\nhead_dim: 64\ndtype: bfloat16\nkv: per_branch\n"
        "selection: {block: 64, count: 4, initial: 0, local: 1, scores: mean}\ncombine: {gate: none}\n"
    )
    plan = lower(spec)
    assert [(step.kind, step.name) for step in plan.steps] == [
        ("pool", "mean_keys"), ("score", "mean_scores"), ("select", "select_blocks"), ("attend", "selected"),
    ]  # fmt: skip
    assert not plan.compresses and not plan.external and plan.overlap is None and plan.kv("slc") == ("k", "v")
    assert not [step.name for step in plan.steps if step.kind != "attend" and (step.gradients or step.saved)]
    compression = Compression(block=32, stride=16)
    both = lower(spec.replace(compression=compression, window=Window(size=128)))
    assert [step.name for step in both.steps][:2] == ["compress", "compressed"]
    assert both.compresses and both.scores_means and both.overlap is None
    means, keys = both.writer("mean_keys"), both.writer("k_cmp")
    assert means is not None and means.reads == ("k_slc",) and both.kv("cmp") == ("k", "v")
    assert keys is not None and keys.name == "compress"
    # Where every slot is forced, nothing is pooled or scored.
    forced = lower(spec.replace(selection=Selection(block=64, count=2, initial=1, local=1, scores="mean")))
    assert [step.name for step in forced.steps] == ["select_blocks", "selected"] and forced.scores_means


def test_index_scores_are_score_select_and_attend_and_take_their_queries_and_keys():
    spec = parse_spec(
        "version: 2\nname: index\nheads: {query: 4, kv: 2}\nhead_dim: 64\ndtype: bfloat16\n"
        "selection: {block: 64, count: 4, initial: 0, local: 1, scores: {indexer: {dim: 32}}}\ncombine: {gate: none}\n"
    )
    plan = lower(spec)
    assert [(step.kind, step.name, step.reads) for step in plan.steps[:2]] == [
        ("score", "index_scores", ("q_idx", "k_idx")), ("select", "select_blocks", ("scores",)),
    ]  # fmt: skip
    dims = {argument.name: argument.dims for argument in plan.arguments if not argument.required}
    assert dims["q_idx"] == ("B", "Tq", "S", "32") and dims["k_idx"] == ("B", "Tkv", "1", "32")
    assert plan.index_dim == 32 and plan.signed_scores and not plan.scores_means and plan.overlap is None
    assert not lower(spec.replace(selection={**spec.selection.model_dump(), "scores": "mean"})).index_names


@pytest.mark.parametrize(("scope", "scopes", "lists"), [("group", 8, 8), ("head", 32, 32), ("all", 1, 8)])
def test_a_scope_decides_how_many_choices_and_lists_a_token_has(scope: str, scopes: int, lists: int):
    shipped = load_spec("moba_llama3_8b")
    plan = lower(shipped.replace(selection={**shipped.selection.model_dump(), "scope": scope}))
    assert (plan.scopes, plan.lists, plan.list_rows) == (scopes, lists, 32 // lists)
    assert plan.per_head == (scope == "head") and plan.shares_choice == (scope == "all")
    # Hopper's kernel gathers the heads of a group, which must follow one list.
    assert plan.hopper_selected_backward == (scope != "head")
    indices = next(each for each in plan.arguments if each.name == "indices")
    assert indices.dims == ("B", "Tq", "S", "12")


@every_program
def test_every_kernel_belongs_to_a_schedule_and_every_decision_to_a_tunable(program: Plan):
    schedules = [schedule for step in program.steps for schedule in step.schedules]
    named = {name for schedule in (*schedules, *program.upkeep) for name in schedule.kernels}
    assert named == {kernel.name for kernel in program.kernels}
    assert all(schedule.kernels or schedule.targets == ("sm_90",) for schedule in schedules)
    decided = {tunable.name for decision in program.decisions for tunable in decision.tunables}
    assert {schedule.decided_by[0] for schedule in schedules if schedule.decided_by} <= decided


@every_program
def test_facts_of_a_plan_follow_from_the_spec(program: Plan):
    spec = program.spec
    assert program.branches == spec.branches
    assert program.gated == (spec.combine.gate != "none")
    assert program.combined == (program.gated or len(spec.branches) > 1)
    assert program.backward == ("backward" in spec.passes)
    assert program.compresses == (spec.compression is not None and not spec.external)
    assert program.selects == (spec.selection is not None and spec.selection.indices == "computed")
    assert program.scores_means == (program.selects and spec.selection.scores == "mean")
    assert program.local_in_window == local_in_window(spec)
    assert program.hopper == hopper_fits(spec)
    assert program.hopper_selected_forward == hopper_selected_forward_fits(spec)
    assert program.hopper_banded_backward == hopper_banded_backward_fits(spec)
    assert program.hopper_banded_dq == hopper_banded_dq_fits(spec)
    assert program.hopper_selected_backward == hopper_selected_backward_fits(spec)


@every_program
def test_every_kernel_has_a_default_for_every_target_out_of_its_space_and_within_its_constraints(program: Plan):
    names = [owner.name for owner in (*program.kernels, *program.decisions)]
    assert len(set(names)) == len(names)
    assert set(program.defaults) == set(TABLES)
    for table in TABLES:
        assert list(program.defaults[table]) == names
        for kernel in program.kernels:
            config = program.defaults[table][kernel.name]
            values = config.mapping()
            assert config.kernel == kernel.name
            assert {"num_warps", "num_stages"} <= set(values)
            assert list(values) == [tunable.name for tunable in kernel.tunables]
            assert all(values[tunable.name] in tunable.values for tunable in kernel.tunables)
            for constraint in kernel.constraints:
                assert bool(substitute(constraint, program, values)), (table, kernel.name, constraint)
        for decision in program.decisions:
            config = program.defaults[table][decision.name]
            assert config.kernel == decision.name
            assert [name for name, _ in config.values] == [tunable.name for tunable in decision.tunables]
            assert all(config.mapping()[tunable.name] in tunable.values for tunable in decision.tunables)


@every_program
def test_no_default_is_estimated_beyond_the_shared_memory_where_any_configuration_is_within(program: Plan):
    for target in TARGETS:
        device = gpu_for_target(target)
        for kernel in program.kernels:
            estimate = space.shared_memory_of(kernel, program.sizes, device)
            chosen = program.defaults[target][kernel.name].mapping()
            need = estimate(chosen)
            legal = space.fits(kernel, program.sizes, device)
            if any(legal(config) for config in space.candidates(kernel)):
                assert legal(chosen), (target, kernel.name)
                assert need <= device.shared_memory_per_block, (target, kernel.name)
            else:
                least = min(
                    estimate(config)
                    for config in space.candidates(kernel)
                    if all(bool(substitute(c, program, config)) for c in kernel.constraints)
                )
                assert need == least, (target, kernel.name)


@pytest.mark.parametrize("name", shipped_specs())
def test_every_default_of_a_shipped_spec_is_expected_to_fit_the_h100_it_is_for(name: str):
    program, device = lowered(name), gpu("h100")
    for kernel in program.kernels:
        config = program.defaults[device.target][kernel.name].mapping()
        assert space.fits(kernel, program.sizes, device)(config), (kernel.name, config)


@every_program
def test_costs_are_never_negative_and_every_kernel_moves_something(program: Plan):
    for kernel in program.kernels:
        for tokens in (1, 65536):
            call = {s.T: tokens, s.B: 1}
            config = program.defaults["sm_90"][kernel.name].mapping()
            assert substitute(kernel.useful_flops, program, {}, call) >= 0
            assert substitute(kernel.compulsory_bytes, program, {}, call) > 0, kernel.name
            assert substitute(kernel.resources.flops, program, config, call) >= 0
            assert substitute(kernel.resources.traffic, program, config, call) > 0, kernel.name
            assert substitute(kernel.resources.streamed, program, config, call) > 0, kernel.name
        assert substitute(kernel.resources.shared_memory, program, config) >= 0
        assert substitute(kernel.resources.registers, program, config) >= 0  # 0: no tile is held


@every_program
def test_what_sees_every_block_costs_four_times_as_much_at_twice_the_tokens_and_all_else_twice(
    program: Plan,
):
    for kernel in program.kernels:
        once, twice, batch = (
            substitute(kernel.useful_flops, program, {}, {s.T: tokens, s.B: size})
            for tokens, size in ((2**20, 1), (2**21, 1), (2**20, 2))
        )
        if kernel.direction == "decode":
            assert once <= twice <= 2 * once and batch <= 2 * once, kernel.name
            continue
        quadratic = kernel.name.startswith("compressed_") or kernel.name in (
            "block_scores",
            "mean_scores",
            "index_scores",
        )
        assert twice == (4 if quadratic else 2) * once, kernel.name
        assert batch == 2 * once, kernel.name


@every_program
def test_bytes_grow_with_the_tokens_and_not_with_their_square(program: Plan):
    for kernel in program.kernels:
        once, twice = (substitute(kernel.compulsory_bytes, program, {}, {s.T: 2**n, s.B: 1}) for n in (26, 27))
        # A step of decode reads some of its keys whatever their number.
        least = once if kernel.direction == "decode" else 1.5 * once + 1
        assert least <= twice <= 2 * once, kernel.name


@every_program
def test_no_formula_has_a_symbol_that_neither_spec_nor_call_nor_tunables_give(program: Plan):
    for kernel in program.kernels:
        given = {symbol.name for symbol in (*program.sizes, s.B, s.T, s.SCORES_STAGED)}
        tunables = {tunable.name for tunable in kernel.tunables}
        for formula in (kernel.useful_flops, kernel.compulsory_bytes):
            assert {symbol.name for symbol in sympy.sympify(formula).free_symbols} <= given, kernel.name
        resources = kernel.resources
        formulas = (
            resources.shared_memory,
            resources.registers,
            resources.flops,
            resources.traffic,
            resources.streamed,
        )
        for formula in (*formulas, *kernel.constraints):
            assert {symbol.name for symbol in sympy.sympify(formula).free_symbols} <= given | tunables, kernel.name


@every_program
def test_explain_gives_floors_that_follow_from_the_devices_peaks(program: Plan):
    estimates = explain(program, tokens=8192, batch=2, gpu_key="h100")
    device = gpu("h100")
    chosen = {
        choice
        for decision in program.decisions
        for choice in program.defaults[device.target][decision.name].mapping().items()
    }
    expected = [
        kernel.name for kernel in program.kernels if kernel.whole and (kernel.choice is None or kernel.choice in chosen)
    ]
    if program.decode_steps:  # decode of two such sequences is one launch
        launches = {"decode_compressed", "decode_select", "decode_attend"}
        expected = [name for name in expected if name not in launches] + ["decode_step"]
    assert [estimate.kernel for estimate in estimates] == expected
    for estimate in estimates:
        assert math.isfinite(estimate.seconds_floor)
        assert estimate.seconds_floor >= estimate.bytes / (device.bandwidth_tbs * 1e12) > 0
        assert estimate.seconds_floor >= estimate.flops / (device.bf16_tflops * 1e12)
        assert estimate.limited_by in ("matrix units", "memory")
        assert estimate.config == program.defaults["sm_90"][estimate.kernel].mapping()


def test_the_papers_compressed_attention_has_the_floor_that_its_flops_give():
    (estimate,) = [e for e in explain(lowered("nsa_64x4"), tokens=65536) if e.kernel == "compressed_forward"]
    # 64 heads, T^2 / (2 * 16) pairs, two products of 128: 2.2e12 multiplications and as many additions.
    assert estimate.flops == pytest.approx(64 * 65536**2 / 32 * 2 * (128 + 128), rel=0.01)
    assert estimate.limited_by == "matrix units"


@pytest.mark.parametrize(("tokens", "batch"), [(0, 1), (1, 0), (-1, 1)])
def test_explain_refuses_a_call_without_tokens(tokens: int, batch: int):
    with pytest.raises(ValueError, match="expected positive"):
        explain(lowered("tiny"), tokens=tokens, batch=batch)


def test_explain_refuses_an_unknown_device():
    with pytest.raises(UnknownGpuError, match="abacus"):
        explain(lowered("tiny"), gpu_key="abacus")


@every_program
def test_arguments_say_what_the_spec_takes(program: Plan):
    spec = program.spec
    names = [argument.name for argument in program.arguments]
    assert names[0] == "q"
    assert len(set(names)) == len(names)
    assert ("gates" in names) == (spec.combine.gate != "none")
    assert ("indices" in names) == ("counts" in names) == (spec.selection is not None)
    external = spec.compression is not None and spec.compression.phi.key == "external"
    assert ("k_cmp" in names) == ("v_cmp" in names) == external
    readers = [branch for branch in spec.branches if not (branch == "cmp" and external)]
    raw = [] if not readers else ["k", "v"]
    if spec.kv == "per_branch":
        raw += [f"{letter}_{branch}" for branch in readers[1:] for letter in "kv"]
    assert list(program.raw_names) == raw
    assert [name for name in names if name in raw] == raw


@every_program
def test_arguments_have_known_dims_and_integers_have_no_gradient(program: Plan):
    known = {"B", "Tq", "Tkv", "Nc", "Hq", "Hkv", "Dk", "Dv", "S"}
    for argument in program.arguments:
        assert argument.dtype in ("spec", "int32", "float32")
        assert argument.group in ("tensor", "compression")
        # The indexer learns from its own loss, which is another operator's.
        constant = argument.dtype == "int32" or argument.name in program.index_names
        assert argument.differentiable == (not constant)
        assert all(dim in known or dim.isdigit() for dim in argument.dims if argument.group == "tensor")
    lists = ["indices", "counts"] if program.selects else ["counts"] if program.selected else []
    assert [a.name for a in program.arguments if not a.required] == [*program.index_names, *lists]
    assert (*program.tensors, *program.parameters) == tuple(
        sorted(program.arguments, key=lambda argument: argument.group != "tensor")
    )


@every_program
def test_outputs_are_o_then_what_each_branch_leaves_for_the_backward_pass(program: Plan):
    spec = program.spec
    names = [output.name for output in program.outputs]
    assert names[0] == "o"
    assert len(set(names)) == len(names)
    assert {f"lse_{branch}" for branch in spec.branches} <= set(names)
    assert ("indices" in names) == ("counts" in names) == program.selects
    alone = len(spec.branches) == 1 and spec.combine.gate == "none"
    assert all((f"o_{branch}" in names) != alone for branch in spec.branches)
    saved = [output.name for output in program.saved_outputs]
    assert set(saved) <= set(names)
    assert ("o" in saved) == alone


@every_program
def test_a_spec_without_backward_has_no_backward_kernel_and_one_with_it_has_one_for_each_forward_branch(
    program: Plan,
):
    directions = {kernel.direction for kernel in program.kernels}
    assert directions == set(program.spec.passes)
    forward = {kernel.branch for kernel in program.kernels if kernel.direction == "forward"}
    assert set(program.spec.branches) <= forward
    if program.backward:
        joint = {"slc", "win"} if program.joint else set()
        backward = {k.branch for k in program.kernels if k.direction == "backward"}
        assert {*program.spec.branches, *joint} - {"joint"} <= backward


@every_program
def test_a_gradient_to_which_selection_adds_is_written_before_or_begins_at_zero(program: Plan):
    order = program.backward_branches
    assert sorted(order) == sorted(program.spec.branches)
    for name in program.raw_names:
        branches = [branch for branch in program.raw_branches if name in program.kv(branch)]
        assert program.contributors(name) == len(branches) >= 1
        assert program.starts_at_zero(name) == ("slc" in branches and "win" not in branches)
        if "slc" in branches and "win" in branches:
            assert order.index("win") < order.index("slc")
    assert program.starts_at_zero("q") is False


@every_program
def test_a_gradient_has_a_float32_sum_beside_it_where_several_kernels_add_to_another_dtype(program: Plan):
    narrow = program.spec.dtype != "float32"
    assert program.sums_in_float32("q") == program.rounded_by_kernel("q") == (narrow and len(program.spec.branches) > 1)
    for name in program.raw_names:
        branches = [branch for branch in program.raw_branches if name in program.kv(branch)]
        assert program.sums_in_float32(name) == (narrow and branches not in (["cmp"], ["win"]))
        assert program.rounded_by_kernel(name) == (narrow and "cmp" in branches and len(branches) > 1)
        assert (program.gradient_sum(name) == f"d{name}") == (not program.sums_in_float32(name))


def test_an_unknown_kernel_is_a_key_error():
    with pytest.raises(KeyError, match="nonsense"):
        lowered("tiny").kernel("nonsense")


def substitute(formula, program: Plan, config: dict[str, int], call: dict[sympy.Symbol, int] | None = None):
    """A formula's value with the spec's sizes, a configuration and a call filled in, by sympy's own substitution."""
    formula = sympy.sympify(formula)
    values = {s.SCORES_STAGED: 1, **program.sizes, **(call or {})}
    values |= {symbol: config[symbol.name] for symbol in formula.free_symbols if symbol.name in config}
    return formula.subs(values)
