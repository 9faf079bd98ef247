"""Which specs also have backward kernels for Hopper, written in Gluon, and which calls use them."""

from __future__ import annotations

from nsa_gen.lowering.hopper import HOPPER, NEVER, banded_tokens, hopper_fits, selected_tiles_fit, token_limit
from nsa_gen.lowering.parts import Config, Decision
from nsa_gen.spec import Spec

HOPPER_BACKWARD_TOKENS, HOPPER_DQ_TOKENS = "HOPPER_BACKWARD_TOKENS", "HOPPER_DQ_TOKENS"
#: Head dims, of q and k and of v, whose accumulators fit together in the registers of one warpgroup.
_HEAD_DIMS = (64, 128)
#: Query tokens of a call from which the kernel of selected blocks is faster. With fewer tokens host time dominates, and
#: this kernel takes more of it.
_FROM_TOKENS = 2048


def hopper_selected_backward_fits(spec: Spec) -> bool:
    """Whether the package has the backward kernel of selected blocks."""
    return selected_tiles_fit(spec) and _fits(spec)


def hopper_banded_backward_fits(spec: Spec) -> bool:
    """Whether the package has the kernel of banded attention's dk and dv."""
    return not {"cmp", "win"}.isdisjoint(spec.branches) and _fits(spec)


def hopper_banded_dq_fits(spec: Spec, *branches: str) -> bool:
    """Whether the package has the kernel of banded attention's dq for one of these branches; for any, if none is named.

    It uses the row tiles of the forward kernel and the row statistics of the dk and dv kernel, so it needs both.
    """
    return hopper_fits(spec, *branches) and hopper_banded_backward_fits(spec)


def _fits(spec: Spec) -> bool:
    """Whether there is a backward with 16-bit inputs, head dims of 64 or 128, and no gates given as values.

    The kernels add the logarithm of the gate to the exponent of p. A sigmoid is positive; a given gate may be negative.
    """
    return (
        "backward" in spec.passes
        and spec.dtype != "float32"
        and spec.head_dim.qk in _HEAD_DIMS
        and spec.head_dim.v in _HEAD_DIMS
        and spec.combine.gate != "given"
    )


def decisions(spec: Spec) -> tuple[Decision, ...]:
    """The decisions how many query tokens a call needs to use each of Hopper's kernels that the package has."""
    return tuple(
        Decision(name, tuple(map(token_limit, tokens)), (HOPPER,), ("backward",))
        for name, tokens in _least_tokens(spec).items()
    )


def choose(spec: Spec, target: str) -> dict[str, Config]:
    """The defaults of those decisions on an architecture or on the interpreter, by the decision's name."""
    return {
        name: Config(name, tuple((each, least if target == HOPPER else NEVER) for each, least in tokens.items()))
        for name, tokens in _least_tokens(spec).items()
    }


def _least_tokens(spec: Spec) -> dict[str, dict[str, int]]:
    """The fewest query tokens with which calls use Hopper's kernels, by decision and tunable."""
    found = {}
    if hopper_banded_backward_fits(spec):
        found["banded_backward"] = {HOPPER_BACKWARD_TOKENS: banded_tokens(spec)}
        if hopper_banded_dq_fits(spec):
            found["banded_backward"][HOPPER_DQ_TOKENS] = banded_tokens(spec)
    if hopper_selected_backward_fits(spec):
        found["selected_backward"] = {HOPPER_BACKWARD_TOKENS: _FROM_TOKENS}
    return found
