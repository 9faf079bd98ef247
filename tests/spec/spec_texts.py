"""Spec texts and strategies shared by the tests of this room."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import strategies as st

from nsa_gen.spec import RANGES, Problem, SpecError, parse_spec
from nsa_gen.spec.constraints import MOST_COMPRESSED_KEYS

PHI_WITHOUT_PARAMETERS = ("mean", "weighted", "linear")


def base_document(**changes: Any) -> dict[str, Any]:
    """A small valid document with all branches; a change to None removes the field."""
    document: dict[str, Any] = {
        "version": 1,
        "name": "example",
        "heads": {"query": 8, "kv": 2},
        "head_dim": 64,
        "dtype": "float32",
        "compression": {"block": 32, "stride": 16},
        "selection": {"block": 64, "count": 16},
        "window": {"size": 512},
    }
    document |= changes
    return {name: value for name, value in document.items() if value is not None}


def as_text(document: dict[str, Any]) -> str:
    """One top-level field a line, each value in flow style."""
    return "".join(f"{name}: {flow(value)}\n" for name, value in document.items())


def flow(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name}: {flow(inner)}" for name, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(flow, value)) + "]"
    plain = isinstance(value, str) and value.isidentifier() and value.lower() not in ("null", "true", "false")
    return value if plain else json.dumps(value, ensure_ascii=False)


def problems_of(text: str | bytes, filename: str = "s.yaml") -> tuple[Problem, ...]:
    """The problems of a text that must be refused."""
    with pytest.raises(SpecError) as caught:
        parse_spec(text, filename)
    return caught.value.problems


def only_problem(text: str | bytes) -> Problem:
    problems = problems_of(text)
    assert len(problems) == 1, "\n".join(map(str, problems))
    return problems[0]


def _integers(field: str) -> st.SearchStrategy[int]:
    return st.sampled_from(RANGES[field].values())


@st.composite
def valid_documents(draw: st.DrawFn) -> dict[str, Any]:
    """Documents of valid specs: every branch, phi, gate and precision, in full or in shorthand."""
    kv = draw(st.integers(1, 8))
    document = base_document(
        name=draw(st.sampled_from(["example", "no", "y", "A1_b"])),
        heads={"query": kv * draw(st.sampled_from([1, 2, 3, 7, 16])), "kv": kv},
        head_dim=draw(
            _integers("head_dim.qk")
            | st.fixed_dictionaries({"qk": _integers("head_dim.qk"), "v": _integers("head_dim.v")})
        ),
        dtype=draw(st.sampled_from(["bfloat16", "float16", "float32"])),
        scale=draw(st.sampled_from([None, "auto", 1, 0.37, 1e-5, 12345.678, 1e20])),
        kv=draw(st.sampled_from([None, "shared", "per_branch"])),
        description=draw(
            st.none() | st.text(st.characters(codec="utf-8", categories=("L", "N", "P", "S")), max_size=60)
        ),
        passes=draw(
            st.sampled_from(
                [None, ["forward"], ["forward", "backward"], ["backward", "forward"], ["forward", "decode"]]
            )
        ),
        combine=draw(st.sampled_from([None, {}, {"gate": "given"}, {"gate": "none"}])),
    )
    if document["dtype"] == "float32" and draw(st.booleans()):
        document["fp32_precision"] = "tf32"
    branches = draw(st.sets(st.sampled_from(["compression", "selection", "window"]), min_size=1))
    selection_block = draw(_integers("selection.block"))
    document["compression"] = draw(_compressions(selection_block))
    document["selection"] = draw(_selections(selection_block, "compression" in branches))
    if "selection" in branches and draw(st.integers(0, 3)) == 0:
        document |= {"version": 2, "selection": draw(_mean_selections(selection_block))}
        if _ranks(document["selection"]) and draw(st.booleans()):
            dim = draw(_integers("selection.scores.indexer.dim"))
            document["selection"] = {**document["selection"], "scores": {"indexer": {"dim": dim}}}
    if {"compression", "selection"} <= branches and draw(st.integers(0, 3)) == 0:
        chosen = draw(_selections(selection_block, True).filter(_ranks))
        alone = {"phi": draw(st.sampled_from(["mean", "external"])), "output": False}
        sizes = {name: document["compression"][name] for name in ("block", "stride")}
        document |= {"version": 2, "selection": chosen, "compression": {**sizes, **alone}}
    scope = draw(st.sampled_from(["group", "group", "head", "all"]))
    if "selection" in document and scope != "group":
        document["version"] = 2
        document["selection"] = {**document["selection"], "scope": scope}
    if "selection" in document and draw(st.integers(0, 3)) == 0:
        document["version"] = 2
        document["selection"] = {**document["selection"], "sink": "learned"}
    document["window"] = {"size": draw(st.integers(1, 65536))}
    if draw(st.sampled_from([False, False, True])):
        document["version"] = 2
        document["window"] |= draw(st.sampled_from([{}, {"sink": "none"}, {"sink": "learned"}, {"sink": "learned"}]))
    if {"selection", "window"} <= branches and document.get("kv") != "per_branch" and draw(st.integers(0, 3)) == 0:
        document["version"] = 2
        for name in ("selection", "window"):
            document[name] = {key: value for key, value in document[name].items() if key != "sink"}
        order = draw(st.permutations(["selection", "window"]))
        sink = draw(st.sampled_from([{}, {"sink": "none"}, {"sink": "learned"}]))
        document["combine"] = {**(document.get("combine") or {}), "joint": order, **sink}
    raw = branches != {"compression"} or document["compression"].get("phi") != "external"
    if "decode" in (document.get("passes") or ()) and raw and draw(st.booleans()):
        document |= {"version": 2, "cache": {"dtype": "e4m3"}}
    return {name: value for name, value in document.items() if name in branches or name not in _BRANCHES}


_BRANCHES = ("compression", "selection", "window")


def _ranks(selection: dict[str, Any]) -> bool:
    """Whether some slots are won by importance."""
    return "initial" in selection and selection["initial"] + selection["local"] < selection["count"]


@st.composite
def _compressions(draw: st.DrawFn, selection_block: int) -> dict[str, Any]:
    least, most = selection_block // MOST_COMPRESSED_KEYS, min(selection_block, 256)
    stride = draw(st.sampled_from([2**power for power in range(9) if least <= 2**power <= most]))
    branch: dict[str, Any] = {"stride": stride, "block": stride * draw(st.integers(1, most // stride))}
    kind = draw(st.sampled_from(["default", "shorthand", "pair", "mlp", "external"]))
    if kind == "shorthand":
        branch["phi"] = draw(st.sampled_from(PHI_WITHOUT_PARAMETERS))
    if kind == "pair":
        branch["phi"] = {side: draw(st.sampled_from(PHI_WITHOUT_PARAMETERS)) for side in ("key", "value")}
    if kind == "mlp":
        side = draw(st.sampled_from(["key", "value"]))
        branch["phi"] = {side: "mlp", "hidden": draw(_integers("compression.phi.hidden"))}
    if kind == "external":
        branch["phi"] = "external"
    elif draw(st.booleans()):
        branch["position"] = draw(st.sampled_from(["learned", {"key": "learned"}, {"value": "learned"}]))
    return branch


@st.composite
def _mean_selections(draw: st.DrawFn, block: int) -> dict[str, Any]:
    initial, local = draw(st.integers(0, 5)), draw(st.integers(1, 5))
    count = draw(st.integers(initial + local, 1024))
    return {"block": block, "count": count, "initial": initial, "local": local, "scores": "mean"}


@st.composite
def _selections(draw: st.DrawFn, block: int, compressed: bool) -> dict[str, Any]:
    if not compressed or draw(st.booleans()):
        return {"block": block, "count": draw(_integers("selection.count")), "indices": "input"}
    initial, local = draw(st.integers(0, 5)), draw(st.integers(0, 5))
    count = draw(st.integers(max(1, initial + local), 1024))
    return {"block": block, "count": count, "initial": initial, "local": local}
