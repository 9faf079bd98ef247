"""Which specs have kernels of gradients for Hopper, in Gluon, beside the ordinary ones, and which calls they serve."""

from __future__ import annotations

from nsa_gen.lowering.hopper import HOPPER, NEVER, hopper_fits, selected_tiles_fit
from nsa_gen.lowering.parts import Config, Decision, Tunable
from nsa_gen.spec import Spec

HOPPER_BACKWARD_TOKENS, HOPPER_DQ_TOKENS = "HOPPER_BACKWARD_TOKENS", "HOPPER_DQ_TOKENS"
#: Head dims, of q and k and of v, whose accumulators fit the registers of one warpgroup together.
_HEAD_DIMS = (64, 128)
#: Query tokens of a call from which the kernel of selected blocks is the quicker; with fewer the host's part is
#: longest, which is longer for it.
_FROM_TOKENS = 2048
#: Query rows, tokens times heads, of a call from which the kernel of banded attention is the quicker for both branches,
#: and tokens from which it is so at any number of heads: on an H200 with 64, 32 and 16 heads from 4096, 8192 and 8192
#: tokens, and slower by up to 30% at half of that, where the host is what takes the time.
_FROM_ROWS, _FROM_BANDED_TOKENS = 2**18, 8192
#: Query rows of a call from which the kernel of banded attention's dq is the quicker, at any number of heads: with 64
#: on an H200 the whole backward takes 4.36 ms for 4.56 at 8192 tokens and 2.34 for 2.23 at half of that.
_FROM_DQ_ROWS = 2**19


def hopper_selected_backward_fits(spec: Spec) -> bool:
    """Whether the package has the kernel of selected blocks."""
    return selected_tiles_fit(spec) and _fits(spec)


def hopper_banded_backward_fits(spec: Spec) -> bool:
    """Whether the package has the kernel of banded attention's dk and dv."""
    return not {"cmp", "win"}.isdisjoint(spec.branches) and _fits(spec)


def hopper_banded_dq_fits(spec: Spec, *branches: str) -> bool:
    """Whether the package has the kernel of banded attention's dq, for one of these branches or any if none is named.

    It shares row tiles with the forward's kernel and row statistics with that of dk and dv, and fits where both do.
    """
    return hopper_fits(spec, *branches) and hopper_banded_backward_fits(spec)


def _fits(spec: Spec) -> bool:
    """Whether inputs are of 16 bits, and head dims 64 or 128.

    A gate is a sigmoid, whose logarithm joins the exponent of p; one that is given might be negative.
    """
    return (
        "backward" in spec.passes
        and spec.dtype != "float32"
        and spec.head_dim.qk in _HEAD_DIMS
        and spec.head_dim.v in _HEAD_DIMS
        and spec.combine.gate != "given"
    )


def decisions(spec: Spec) -> tuple[Decision, ...]:
    """From how many query tokens on a call is served by each of Hopper's kernels, where the package has it."""
    values = (*(2**power for power in range(10, 20)), NEVER)
    return tuple(
        Decision(
            name,
            tuple(Tunable(each, values, size=True, least=0) for each in tokens),
            (HOPPER,),
            ("backward",),
        )
        for name, tokens in _least_tokens(spec).items()
    )


def choose(spec: Spec, target: str) -> dict[str, Config]:
    """The same numbers on an architecture or the interpreter, by the decision's name."""
    return {
        name: Config(name, tuple((each, least if target == HOPPER else NEVER) for each, least in tokens.items()))
        for name, tokens in _least_tokens(spec).items()
    }


def _least_tokens(spec: Spec) -> dict[str, dict[str, int]]:
    """Query tokens from which on Hopper's kernels serve calls, by decision and tunable."""
    found = {}
    if hopper_banded_backward_fits(spec):
        least = min(_tokens_of(spec, _FROM_ROWS), _FROM_BANDED_TOKENS)
        found["banded_backward"] = {HOPPER_BACKWARD_TOKENS: least}
        if hopper_banded_dq_fits(spec):
            found["banded_backward"][HOPPER_DQ_TOKENS] = _tokens_of(spec, _FROM_DQ_ROWS)
    if hopper_selected_backward_fits(spec):
        found["selected_backward"] = {HOPPER_BACKWARD_TOKENS: _FROM_TOKENS}
    return found


def _tokens_of(spec: Spec, rows: int) -> int:
    """The greatest power of two of query tokens that have at most so many rows, 1024 or more."""
    return 2 ** max((rows // spec.heads.query).bit_length() - 1, 10)
