"""Every field is held to its range, and every rule between fields is enforced where it applies."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from nsa_gen.spec import CONSTRAINTS, RANGES, Compression, HeadDim, Phi, Position, Spec, parse_spec
from tests.spec.spec_texts import as_text, base_document, only_problem, problems_of


def document_with(path: str, value: Any) -> dict[str, Any]:
    """The base document with an integer field set by its dotted path."""
    document = base_document()
    if path.startswith("head_dim"):
        document["head_dim"] = {"qk": 64, "v": 64}
    if path == "compression.phi.hidden":
        document["compression"] = document["compression"] | {"phi": {"key": "mlp"}}
    if path == "selection.scores.indexer.dim":
        document |= {"version": 2, "selection": document["selection"] | {"scores": {"indexer": {}}}}
    *owners, name = path.split(".")
    record = document
    for owner in owners:
        record[owner] = dict(record[owner])
        record = record[owner]
    record[name] = value
    return document


@pytest.mark.parametrize("path", sorted(RANGES))
@pytest.mark.parametrize("beyond", ["below", "above"])
def test_a_number_outside_its_range_is_refused(path: str, beyond: str) -> None:
    legal = RANGES[path].values()
    value = legal[0] - 1 if beyond == "below" else legal[-1] + 1
    problems = [p for p in problems_of(as_text(document_with(path, value))) if p.field == path]
    assert [p.message for p in problems] == [f"expected {RANGES[path].expected}, got the integer {value}"]
    near = legal[0] if beyond == "below" else legal[-1]
    assert problems[0].hint == f"the nearest legal value is {near}"


@pytest.mark.parametrize("path", ["head_dim.qk", "head_dim.v", "selection.block", "compression.phi.hidden"])
def test_a_number_between_legal_ones_is_refused_with_its_neighbours(path: str) -> None:
    legal = RANGES[path].values()
    problem = only_problem(as_text(document_with(path, legal[1] + 1)))
    assert (problem.field, problem.hint) == (path, f"the nearest are {legal[1]} and {legal[2]}")


def test_the_ranges_are_those_of_the_design() -> None:
    assert RANGES["selection.block"].values() == (16, 32, 64, 128, 256, 512, 1024)
    assert RANGES["head_dim.qk"].values() == RANGES["head_dim.v"].values() == tuple(range(16, 257, 8))
    assert RANGES["selection.count"].values() == tuple(range(1, 1025))
    assert RANGES["selection.scores.indexer.dim"].values() == (16, 32, 64, 128, 256)
    assert RANGES["compression.phi.hidden"].values() == tuple(range(16, 1025, 16))
    assert (RANGES["window.size"].minimum, RANGES["window.size"].maximum) == (1, 65536)


@pytest.mark.parametrize("path", sorted(RANGES))
def test_the_model_uses_the_stated_range_of_every_whole_number(path: str) -> None:
    legal = RANGES[path].values()
    for value in (legal[0], legal[-1]):
        problems = ()
        try:
            Spec.model_validate(document_with(path, value))
        except ValidationError as error:
            problems = tuple(".".join(map(str, e["loc"])) for e in error.errors())
        assert path not in problems


@pytest.mark.parametrize(
    ("field", "written", "hint"),
    [
        ("dtype", "bf16", "did you mean 'bfloat16'?"),
        ("dtype", "FP16", "did you mean 'float16'?"),
        ("dtype", "flaot32", "did you mean 'float32'?"),
        ("dtype", "Float32", "did you mean 'float32'?"),
        ("dtype", "int8", ""),
        ("kv", "per-branch", "did you mean 'per_branch'?"),
        ("fp32_precision", "tf23", "did you mean 'tf32'?"),
        ("scale", "atuo", "did you mean 'auto'?"),
    ],
)
def test_a_mistyped_word_gets_a_suggestion(field: str, written: str, hint: str) -> None:
    problem = only_problem(as_text(base_document(**{field: written})))
    assert (problem.field, problem.hint) == (field, hint)
    assert f"got the string '{written}'" in problem.message


@pytest.mark.parametrize(
    ("text", "field", "hint"),
    [
        ("windwo: {size: 3}", "windwo", "did you mean 'window'?"),
        ("Dtype: float32", "Dtype", "did you mean 'dtype'?"),
        ("stride: 4", "stride", "stride is a field of compression"),
        ("block: 4", "block", "block is a field of compression or selection"),
        ("compression.phi.hidden: 4", "'compression.phi.hidden'", "write hidden inside compression.phi"),
        ("qqqq: 4", "qqqq", ""),
    ],
)
def test_an_unknown_field_gets_a_suggestion(text: str, field: str, hint: str) -> None:
    problem = only_problem(as_text(base_document()) + text)
    assert (problem.line, problem.column, problem.field, problem.hint) == (9, 1, field, hint)
    assert problem.message.startswith("unknown field; expected version, name, ")


def test_every_missing_field_is_named_with_what_it_expects() -> None:
    problems = problems_of("window: {}\nheads: {kv: 2}\nversion: 1\n")
    assert [(p.line, p.column, p.field) for p in problems] == [
        (1, 1, "name"),
        (1, 1, "head_dim"),
        (1, 1, "dtype"),
        (1, 1, "window.size"),
        (2, 1, "heads.query"),
    ]
    assert problems[2].message == "this field is required; expected one of bfloat16, float16 or float32"
    assert problems[1].message == "this field is required; expected a mapping with qk and v"


@pytest.mark.parametrize("version", ["3", "0", "'1'", "1.0", "true"])
def test_an_unknown_version_is_refused_alone_because_the_rest_may_mean_something_else(version: str) -> None:
    problem = only_problem(f"version: {version}\nwhatever: 3\n")
    assert (problem.line, problem.column, problem.field) == (1, 10, "version")
    assert problem.message.startswith("unknown version: expected the number 1 or 2, got ")


@pytest.mark.parametrize(
    "name",
    ["../x", "a/b", "..", ".hidden", "_private", "__init__", "1abc", "a-b", "a b", "", "été", "class", "None", "torch"],
)
def test_a_name_that_cannot_be_a_package_is_refused(name: str) -> None:
    problem = only_problem(as_text(base_document(name=name)))
    assert (problem.line, problem.column, problem.field) == (2, 7, "name")


@pytest.mark.parametrize("name", ["a" * 65, "a.b", "a\\b", "a\nb", "a\n", "a\0"])
def test_a_name_with_something_more_is_refused(name: str) -> None:
    assert only_problem(as_text(base_document(name=name))).field == "name"


def test_a_refused_name_comes_with_a_legal_one() -> None:
    assert only_problem(as_text(base_document(name="llama-3.1/8b"))).hint == "for example 'llama_3_1_8b'"
    assert only_problem(as_text(base_document(name="3b"))).hint == "for example 'nsa_3b'"
    assert only_problem(as_text(base_document(name="lambda"))).hint == "for example 'lambda_attention'"


@pytest.mark.parametrize("scale", [0, -1, 0.0, 1e30, float("inf"), float("nan"), True, "big", [1]])
def test_a_scale_that_is_no_positive_number_is_refused(scale: object) -> None:
    with pytest.raises(ValidationError, match="'auto' or a positive number"):
        Spec.model_validate(base_document(scale=scale))


def test_the_scale_is_a_number_or_one_over_the_root_of_the_head_dim() -> None:
    assert parse_spec(as_text(base_document(scale=0.37))).scale_value == 0.37
    assert parse_spec(as_text(base_document(scale=1))).scale_value == 1.0
    assert parse_spec(as_text(base_document(head_dim={"qk": 16, "v": 64}))).scale_value == 0.25


@pytest.mark.parametrize(
    ("passes", "field", "words"),
    [
        (["backward"], "passes", "backward without forward"),
        (["decode"], "passes", "decode without forward"),
        (["decode", "backward"], "passes", "decode and backward without forward"),
        ([], "passes", "an empty list"),
        (["forward", "forward"], "passes[1]", "'forward' is listed twice"),
        (["forward", "bakward"], "passes[1]", "expected one of forward, backward or decode, got the string 'bakward'"),
        ("forward", "passes", "got the string 'forward'"),
        (["forward", {"a": 1}], "passes[1]", "got a mapping"),
    ],
)
def test_passes_that_make_no_sense_are_refused_at_the_item(passes: object, field: str, words: str) -> None:
    problem = only_problem(as_text(base_document(passes=passes)))
    assert problem.field == field
    assert words in problem.message


def test_passes_keep_one_order() -> None:
    assert parse_spec(as_text(base_document(passes=["backward", "forward"]))).passes == ("forward", "backward")
    assert parse_spec(as_text(base_document(passes=["forward"]))).passes == ("forward",)
    assert parse_spec(as_text(base_document(passes=["decode", "forward"]))).passes == ("forward", "decode")


def test_a_description_is_one_paragraph_of_printable_text() -> None:
    text = as_text(base_document()) + "description: >\n  two\n  lines\n\n  more\n"
    assert parse_spec(text).description == "two lines more"
    assert "501 characters" in only_problem(as_text(base_document(description="x" * 501))).message
    assert "U+0000" in only_problem(as_text(base_document()) + 'description: "a\\0b"').message
    assert only_problem(as_text(base_document(description=3))).hint == "put it in quotes"


def test_shorthand_means_both() -> None:
    document = base_document(head_dim=80, compression={"block": 8, "stride": 8, "phi": "linear", "position": "learned"})
    spec = parse_spec(as_text(document))
    assert spec.head_dim == HeadDim(qk=80, v=80)
    assert spec.compression == Compression(
        block=8, stride=8, phi=Phi(key="linear", value="linear"), position=Position(key="learned", value="learned")
    )


@pytest.mark.parametrize(("written", "got"), [(100, "the integer 100"), ("wide", "the string 'wide'"), ([1], "a list")])
def test_a_wrong_shorthand_is_reported_once(written: object, got: str) -> None:
    problem = only_problem(as_text(base_document(head_dim=written)))
    assert (problem.line, problem.column, problem.field) == (4, 11, "head_dim")
    assert problem.message == f"expected a multiple of 8 in 16..256, got {got}"


def test_a_branch_that_is_no_mapping_is_refused_with_the_form_it_should_have() -> None:
    problem = only_problem(as_text(base_document(window=512)))
    assert (problem.line, problem.column, problem.message, problem.hint) == (
        8,
        9,
        "expected a mapping with size and sink, got the integer 512",
        "write window: {size: ...}",
    )


BROKEN_RULES: dict[str, tuple[dict[str, Any], int, int, str]] = {
    "some_branch": ({"compression": None, "selection": None, "window": None}, 1, 1, ""),
    "cache_needs_version_2": (
        {"passes": ["forward", "decode"], "cache": {"dtype": "e4m3"}},
        10,
        8,
        "cache",
    ),
    "cache_needs_decode": ({"version": 2, "cache": {"dtype": "e4m3"}}, 9, 8, "cache"),
    "cache_holds_raw_keys": (
        {
            "version": 2,
            "compression": {"block": 32, "stride": 16, "phi": "external"},
            "selection": None,
            "window": None,
            "passes": ["forward", "decode"],
            "cache": {"dtype": "e4m3"},
        },
        8,
        8,
        "cache",
    ),
    "groups_are_whole": ({"heads": {"query": 8, "kv": 3}}, 3, 16, "heads.query"),
    "tf32_needs_float32": ({"dtype": "bfloat16", "fp32_precision": "tf32"}, 9, 17, "fp32_precision"),
    "selection_sink_needs_version_2": (
        {"selection": {"block": 64, "count": 8, "sink": "learned"}},
        7,
        40,
        "selection.sink",
    ),
    "window_sink_needs_version_2": ({"window": {"size": 8, "sink": "learned"}}, 8, 25, "window.sink"),
    "combine_joint_needs_version_2": ({"combine": {"joint": ["selection", "window"]}}, 9, 18, "combine.joint"),
    "combine_sink_needs_version_2": ({"combine": {"sink": "learned"}}, 9, 17, "combine.sink"),
    "joint_needs_its_branches": (
        {"version": 2, "window": None, "combine": {"joint": ["selection", "window"]}},
        8,
        18,
        "combine.joint",
    ),
    "joint_needs_shared_keys": (
        {"version": 2, "kv": "per_branch", "combine": {"joint": ["selection", "window"]}},
        9,
        5,
        "kv",
    ),
    "joint_has_one_sink": (
        {"version": 2, "window": {"size": 8, "sink": "learned"}, "combine": {"joint": ["selection", "window"]}},
        8,
        25,
        "window.sink",
    ),
    "combined_sink_needs_joint": ({"version": 2, "combine": {"sink": "learned"}}, 9, 17, "combine.sink"),
    "stride_divides_compression_block": ({"compression": {"block": 24, "stride": 16}}, 6, 34, "compression.stride"),
    "computed_selection_needs_compression": ({"compression": None}, 6, 12, "selection"),
    "stride_divides_selection_block": ({"compression": {"block": 24, "stride": 24}}, 6, 34, "compression.stride"),
    "compression_block_fits_selection_block": (
        {"compression": {"block": 128, "stride": 64}},
        6,
        22,
        "compression.block",
    ),
    "compressed_keys_of_a_block": (
        {"compression": {"block": 32, "stride": 2}, "selection": {"block": 1024, "count": 4}},
        6,
        34,
        "compression.stride",
    ),
    "forced_blocks_fit_count": ({"selection": {"block": 64, "count": 2}}, 7, 31, "selection.count"),
    "given_indices_force_nothing": (
        {"selection": {"block": 64, "count": 4, "indices": "input", "local": 2}},
        7,
        57,
        "selection.local",
    ),
    "selection_scores_needs_version_2": (
        {"selection": {"block": 64, "count": 4, "scores": "mean"}},
        7,
        42,
        "selection.scores",
    ),
    "given_indices_are_not_scored": (
        {"version": 2, "selection": {"block": 64, "count": 4, "indices": "input", "scores": "mean"}},
        7,
        58,
        "selection.scores",
    ),
    "selection_pool_needs_version_2": (
        {"selection": {"block": 64, "count": 4, "pool": "max"}},
        7,
        40,
        "selection.pool",
    ),
    "selection_scope_needs_version_2": (
        {"selection": {"block": 64, "count": 4, "scope": "head"}},
        7,
        41,
        "selection.scope",
    ),
    "pools_of_compressed_scores": (
        {"version": 2, "selection": {"block": 64, "count": 4, "scores": "mean", "pool": "max"}},
        7,
        54,
        "selection.pool",
    ),
    "compression_output_needs_version_2": (
        {"compression": {"block": 32, "stride": 16, "output": False}},
        6,
        46,
        "compression.output",
    ),
    "compression_without_output_scores": (
        {
            "version": 2,
            "compression": {"block": 32, "stride": 16, "output": False},
            "selection": {"block": 64, "count": 4, "indices": "input"},
        },
        6,
        46,
        "compression.output",
    ),
    "compression_without_output_ranks": (
        {
            "version": 2,
            "compression": {"block": 32, "stride": 16, "output": False},
            "selection": {"block": 64, "count": 3},
        },
        6,
        46,
        "compression.output",
    ),
    "compression_without_output_learns_nothing": (
        {
            "version": 2,
            "compression": {"block": 32, "stride": 16, "output": False, "phi": "weighted"},
            "selection": {"block": 64, "count": 4},
        },
        6,
        58,
        "compression.phi",
    ),
    "mean_scores_need_the_own_block": (
        {"version": 2, "selection": {"block": 64, "count": 4, "local": 0, "scores": "mean"}},
        7,
        41,
        "selection.local",
    ),
    "index_scores_need_the_own_block": (
        {"version": 2, "selection": {"block": 64, "count": 4, "local": 0, "scores": {"indexer": {"dim": 64}}}},
        7,
        41,
        "selection.local",
    ),
    "index_scores_rank": (
        {"version": 2, "selection": {"block": 64, "count": 3, "scores": {"indexer": {"dim": 64}}}},
        7,
        31,
        "selection.count",
    ),
    "external_is_both_or_neither": (
        {"compression": {"block": 32, "stride": 16, "phi": {"value": "external"}}},
        6,
        43,
        "compression.phi",
    ),
    "external_has_no_position": (
        {"compression": {"block": 32, "stride": 16, "phi": "external", "position": {"key": "learned"}}},
        6,
        63,
        "compression.position",
    ),
    "mlp_needs_hidden": (
        {"compression": {"block": 32, "stride": 16, "phi": {"key": "mlp"}}},
        6,
        43,
        "compression.phi",
    ),
    "hidden_needs_mlp": (
        {"compression": {"block": 32, "stride": 16, "phi": {"hidden": 64}}},
        6,
        52,
        "compression.phi.hidden",
    ),
}


def test_every_rule_has_a_spec_that_breaks_it() -> None:
    assert set(BROKEN_RULES) == {constraint.id for constraint in CONSTRAINTS}


@pytest.mark.parametrize("rule", BROKEN_RULES)
def test_a_broken_rule_is_reported_at_its_field_and_alone(rule: str) -> None:
    changes, line, column, field = BROKEN_RULES[rule]
    (constraint,) = (constraint for constraint in CONSTRAINTS if constraint.id == rule)
    problem = only_problem(as_text(base_document(**changes)))
    assert (problem.line, problem.column, problem.field) == (line, column, field)
    assert problem.hint == constraint.hint
    assert "{" not in problem.message.replace("{size", "")


@pytest.mark.parametrize("rule", BROKEN_RULES)
def test_a_spec_built_in_python_obeys_the_same_rules(rule: str) -> None:
    with pytest.raises(ValidationError) as caught:
        Spec.model_validate(base_document(**BROKEN_RULES[rule][0]))
    assert [error["type"] for error in caught.value.errors()] == ["spec_constraints"]


def test_scores_of_version_2_are_refused_in_version_1_by_name_and_with_the_version_they_need() -> None:
    document = base_document(compression=None, selection={"block": 64, "count": 4, "scores": "mean"})
    problem = only_problem(as_text(document))
    assert "selection.scores (mean)" in problem.message and "version is 1" in problem.message
    assert problem.hint == "write version: 2"
    spec = parse_spec(as_text(document | {"version": 2}))
    assert spec.selection is not None and spec.selection.scores == "mean" and spec.branches == ("slc", "win")


@pytest.mark.parametrize(
    ("scores", "message", "hint"),
    [
        ("indexer", "got the string 'indexer'", "write scores: {indexer: {dim: 128}}"),
        ("maen", "expected compression, mean or {indexer: {dim: ...}}, got the string 'maen'", "did you mean 'mean'?"),
        (5, "expected compression, mean or {indexer: {dim: ...}}, got the integer 5", ""),
    ],
)
def test_what_is_no_word_of_scores_and_no_mapping_is_refused_with_both(scores: Any, message: str, hint: str) -> None:
    selection = {"block": 64, "count": 4, "scores": scores}
    problem = only_problem(as_text(base_document(version=2, selection=selection)))
    assert problem.field == "selection.scores" and message in problem.message and problem.hint == hint


def test_scores_of_an_indexer_are_a_mapping_that_reads_back() -> None:
    selection = {"block": 64, "count": 4, "scores": {"indexer": {"dim": 32}}}
    spec = parse_spec(as_text(base_document(version=2, compression=None, selection=selection)))
    assert spec.selection is not None and spec.selection.index_dim == 32
    assert parse_spec(spec.resolved_yaml()) == spec
    inner = only_problem(as_text(base_document(version=2, selection=selection | {"scores": {"indexer": 5}})))
    assert inner.field == "selection.scores.indexer" and inner.hint == "write indexer: {dim: ...}"


def test_rules_and_fields_are_reported_together() -> None:
    compression = {"block": 32, "stride": 24}
    text = as_text(base_document(heads={"query": 8, "kv": 3}, window={"size": 0}, compression=compression))
    fields = [problem.field for problem in problems_of(text)]
    assert fields == ["heads.query", "compression.stride", "compression.stride", "window.size"]


def test_a_rule_is_not_judged_on_a_value_that_is_already_refused() -> None:
    assert only_problem(as_text(base_document(heads={"query": 8, "kv": 0}))).field == "heads.kv"


@pytest.mark.parametrize(
    "changes",
    [
        {"compression": {"block": 24, "stride": 24}, "selection": {"block": 64, "count": 2, "indices": "input"}},
        {"compression": {"block": 128, "stride": 64}, "selection": {"block": 64, "count": 2, "indices": "input"}},
        {"compression": {"block": 24, "stride": 24}, "selection": None},
        {"compression": None, "selection": {"block": 64, "count": 1, "indices": "input", "initial": 0, "local": 0}},
        {"compression": None, "selection": None, "kv": "per_branch"},
        {"selection": {"block": 64, "count": 1, "initial": 0, "local": 0}},
        {"selection": {"block": 32, "count": 3, "initial": 1, "local": 2}},
        {"heads": {"query": 28, "kv": 4}},
        {"heads": {"query": 1, "kv": 1}},
        {"head_dim": {"qk": 192, "v": 80}},
        {"compression": {"block": 32, "stride": 16, "phi": {"key": "mlp", "value": "linear", "hidden": 48}}},
    ],
)
def test_unusual_but_meaningful_specs_are_accepted(changes: dict[str, Any]) -> None:
    spec = parse_spec(as_text(base_document(**changes)))
    assert spec.heads.group * spec.heads.kv == spec.heads.query


def test_given_indices_leave_no_forced_blocks_in_the_model() -> None:
    spec = parse_spec(as_text(base_document(selection={"block": 64, "count": 4, "indices": "input"})))
    assert spec.selection is not None
    assert (spec.selection.initial, spec.selection.local) == (0, 0)


def test_branches_come_in_the_order_of_the_operator() -> None:
    assert parse_spec(as_text(base_document())).branches == ("cmp", "slc", "win")
    assert parse_spec(as_text(base_document(selection=None))).branches == ("cmp", "win")
    assert parse_spec(as_text(base_document(compression=None, selection=None))).branches == ("win",)


def test_a_spec_is_frozen_and_hashable() -> None:
    spec = parse_spec(as_text(base_document()))
    with pytest.raises(ValidationError, match="frozen"):
        spec.dtype = "float16"  # type: ignore[misc]
    assert len({spec, parse_spec(as_text(base_document()))}) == 1


def test_replace_validates_what_it_changes() -> None:
    spec = parse_spec(as_text(base_document(fp32_precision="tf32")))
    assert spec.replace(name="other", scale=0.5).scale_value == 0.5
    assert spec.replace(window=None).branches == ("cmp", "slc")
    with pytest.raises(ValidationError, match="tf32"):
        spec.replace(dtype="bfloat16")


def test_a_sink_under_version_1_is_refused_by_the_field_and_the_version_it_needs() -> None:
    problem = only_problem(as_text(base_document(window={"size": 8, "sink": "learned"})))
    assert problem.field == "window.sink"
    assert "version 2 of the language" in problem.message and "version is 1" in problem.message
    assert problem.hint == "write version: 2"


def test_a_sink_is_none_or_learned() -> None:
    problem = only_problem(as_text(base_document(version=2, window={"size": 8, "sink": "learnt"})))
    assert problem.field == "window.sink"
    assert problem.message == "expected none or learned, got the string 'learnt'"
    assert problem.hint == "did you mean 'learned'?"


@pytest.mark.parametrize(
    ("joint", "got"),
    [
        (["selection"], "[selection]"),
        (["selection", "selection"], "[selection, selection]"),
        (["compression", "selection"], "[compression, selection]"),
        ("window", "the string 'window'"),
    ],
)
def test_joint_branches_are_selection_and_window_or_none(joint: object, got: str) -> None:
    problem = only_problem(as_text(base_document(version=2, combine={"joint": joint})))
    assert problem.field.startswith("combine.joint")
    assert problem.message == f"expected [selection, window] or an empty list, got {got}"
    for order in (["selection", "window"], ["window", "selection"]):
        spec = parse_spec(as_text(base_document(version=2, combine={"joint": order})))
        assert spec.combine.joint == ("selection", "window") and spec.branches == ("cmp", "joint")
        assert "joint: [selection, window]" in spec.resolved_yaml() or "- selection" in spec.resolved_yaml()
