"""Hypothesis strategies: whole specs within the language's constraints, calls of a spec, and properties to check.

Hypothesis is no dependency of nsa_gen itself: `pip install 'nsa-gen[test]'` brings it.
"""

from __future__ import annotations

from typing import Any

from nsa_gen.spec import Spec, SpecError, parse_spec
from nsa_gen.verification.cases import Case
from nsa_gen.verification.dense import OracleParameters
from nsa_gen.verification.examples import Pick, drawn_case, drawn_property

try:
    from hypothesis import strategies as st
except ImportError as error:
    raise ImportError("nsa_gen.verification.strategies needs hypothesis: pip install 'nsa-gen[test]'") from error

PHIS = ("mean", "weighted", "linear", "mlp")


def _picker(draw: st.DrawFn) -> Pick:
    return lambda options: draw(st.sampled_from(list(options)))


@st.composite
def specs(draw: st.DrawFn, *, dtypes: tuple[str, ...] = ("float32", "float16")) -> Spec:
    """Small specs, cheap enough for the interpreter: every branch, phi, position, gate and way of sharing K and V."""
    import yaml

    pick = _picker(draw)
    branches = pick(("cmp slc win", "cmp slc", "cmp win", "slc win", "cmp", "slc", "win"))
    kv = pick((1, 2))
    dtype = pick(dtypes)
    document: dict[str, Any] = {
        "version": 1,
        "name": "drawn",
        "heads": {"query": kv * pick((1, 2, 3)), "kv": kv},
        "head_dim": {"qk": pick((16, 24, 32)), "v": pick((16, 24, 32))},
        "dtype": dtype,
        "scale": pick(("auto", 0.37, 0.1)),
        "kv": pick(("shared", "per_branch")),
        "combine": {"gate": pick(("sigmoid", "given", "none"))},
        "passes": pick((["forward", "backward"], ["forward"])),
    }
    block = pick((16, 32))
    if "cmp" in branches:
        document["compression"] = _compression(pick, block)
    if "slc" in branches:
        count = pick((1, 2, 3, 5))
        if "cmp" in branches and pick((True, True, False)):
            initial = pick(range(count + 1))
            forced = {"initial": initial, "local": pick(range(count - initial + 1))}
            document["selection"] = {"block": block, "count": count, **forced}
        else:
            document["selection"] = {"block": block, "count": count, "indices": "input"}
    if "win" in branches:
        document["window"] = {"size": pick((1, 2, 7, 16, 17))}
    try:
        return parse_spec(yaml.safe_dump(document, sort_keys=False))
    except SpecError as error:  # the strategy, not the example, is wrong
        raise AssertionError(f"the strategy drew a spec that is not legal: {error}") from error


def _compression(pick: Pick, block: int) -> dict[str, Any]:
    stride = pick((2, 4, 8))
    found: dict[str, Any] = {"stride": stride, "block": stride * pick(range(1, block // stride + 1))}
    if pick((True, False, False, False)):
        return {**found, "phi": "external"}
    key, value = pick(PHIS), pick(PHIS)
    found["phi"] = {"key": key, "value": value, **({"hidden": 16} if "mlp" in (key, value) else {})}
    return {**found, "position": {side: pick(("none", "learned")) for side in ("key", "value")}}


@st.composite
def cases(draw: st.DrawFn, spec: Spec, *, interpreted: bool = True) -> Case:
    """Calls of a spec: lengths around its boundaries, late queries, packed batches; every kind of input."""
    return drawn_case(OracleParameters.from_spec(spec), _picker(draw), interpreted=interpreted)


@st.composite
def properties(draw: st.DrawFn, spec: Spec, case: Case) -> str:
    """Names of the properties that apply to a spec and a case."""
    return drawn_property(OracleParameters.from_spec(spec), case, _picker(draw))
