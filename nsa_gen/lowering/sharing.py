"""Work that one branch's kernels can do for another branch."""

from __future__ import annotations

from nsa_gen.lowering.hopper import HOPPER, NEVER, banded_tokens, hopper_fits, token_limit
from nsa_gen.lowering.hopper_backward import hopper_banded_dq_fits
from nsa_gen.lowering.parts import Config, Decision
from nsa_gen.spec import Spec

HOPPER_LOCAL_TOKENS = "HOPPER_LOCAL_TOKENS"
#: Rows of a row tile of Hopper's kernels, and keys of a tile of the forward and of the gradients.
_ROWS, _FORWARD_KEYS, _BACKWARD_KEYS = 128, 128, 64


def local_in_window(spec: Spec) -> bool:
    """Whether the window's kernels can attend to the selected branch's local blocks.

    Both branches must read the same keys, and the local blocks must lie within the window. It is not possible if the
    caller gives the selection, because local blocks may then be missing. It is not needed for joint branches: there the
    selected branch leaves all of the window's keys to the window.
    """
    selection, window = spec.selection, spec.window
    if selection is None or window is None or selection.indices != "computed" or spec.kv != "shared":
        return False
    if spec.combine.joint:
        return False
    return 0 < selection.local * selection.block <= window.size


def hopper_local_fits(spec: Spec) -> bool:
    """Whether the window's kernels for Hopper can attend to the local blocks, in all passes that the spec has.

    The local keys fit in one tile of the forward. A tile of the gradients lies in one block, and a row tile has queries
    of one block, so that a query's local blocks are whole tiles. Tiles at the other end of the window are not local.
    """
    if not local_in_window(spec) or not hopper_fits(spec, "win"):
        return False
    if "backward" in spec.passes and not hopper_banded_dq_fits(spec, "win"):
        return False
    assert spec.selection is not None and spec.window is not None
    block, keys = spec.selection.block, spec.selection.local * spec.selection.block
    tokens = _ROWS // (spec.heads.group & -spec.heads.group)
    fits = keys <= _FORWARD_KEYS and block % _BACKWARD_KEYS == 0 and tokens <= block
    return fits and spec.window.size >= keys + _ROWS


def decisions(spec: Spec) -> tuple[Decision, ...]:
    """The decision how many query tokens a call needs so that Hopper's kernels process the local blocks."""
    if not hopper_local_fits(spec):
        return ()
    return (Decision("local_blocks", (token_limit(HOPPER_LOCAL_TOKENS),), (HOPPER,)),)


def choose(spec: Spec, target: str) -> dict[str, Config]:
    """The default of that decision on an architecture or on the interpreter, by the decision's name."""
    least = banded_tokens(spec) if target == HOPPER else NEVER
    return {each.name: Config(each.name, ((HOPPER_LOCAL_TOKENS, least),)) for each in decisions(spec)}
