"""Hypothesis strategies: whole specs within the language's constraints, calls of a spec, and properties to check.

nsa_gen does not depend on Hypothesis: `pip install 'nsa-gen[test]'` installs it.
"""

from __future__ import annotations

from nsa_gen.spec import Spec
from nsa_gen.verification.cases import Case
from nsa_gen.verification.drawing import Pick, drawn_spec
from nsa_gen.verification.examples import drawn_case, drawn_property
from nsa_gen.verification.reference.dense import OracleParameters

try:
    from hypothesis import strategies as st
except ImportError as error:
    raise ImportError("nsa_gen.verification.strategies needs hypothesis: pip install 'nsa-gen[test]'") from error


def _picker(draw: st.DrawFn) -> Pick:
    return lambda options: draw(st.sampled_from(list(options)))


@st.composite
def specs(draw: st.DrawFn, *, dtypes: tuple[str, ...] = ("float32", "float16"), wide: bool = False) -> Spec:
    """Specs of every branch, phi, position, gate and way of sharing K and V.

    Small ones are cheap enough for the interpreter; `wide` ones have the sizes that are used on GPUs.
    """
    return drawn_spec(_picker(draw), dtypes=dtypes, wide=wide)


@st.composite
def cases(draw: st.DrawFn, spec: Spec, *, interpreted: bool = True) -> Case:
    """Calls of a spec: lengths around its boundaries, fewer queries than keys, packed batches; every kind of input."""
    return drawn_case(OracleParameters.from_spec(spec), _picker(draw), interpreted=interpreted)


@st.composite
def properties(draw: st.DrawFn, spec: Spec, case: Case) -> str:
    """Names of the properties that apply to a spec and a case on the CPU."""
    return drawn_property(OracleParameters.from_spec(spec), case, _picker(draw), "cpu")
