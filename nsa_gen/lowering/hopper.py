"""Which specs have kernels of the forward for Hopper, in Gluon, beside the ordinary ones, for which calls."""

from __future__ import annotations

from nsa_gen.lowering.parts import Config, Decision, Tunable
from nsa_gen.spec import Spec

#: The only architecture that kernels in Gluon are compiled for.
HOPPER = "sm_90"
#: More query tokens than any call has: from so many on, a kernel serves none.
NEVER = 2**31
#: Head dims of q and k, and of v, of which tiles of 128 keys fit shared memory twice. 256 do not, and the columns of v
#: are a power of two.
_HEAD_DIMS = ((64, 64), (96, 128), (128, 128), (192, 128))
#: The same for selected blocks, whose tiles are of 64 rows, and of 64 or more keys of one block.
_SELECTED_QK, _SELECTED_V = (64, 128, 192), (64, 128)
_SELECTED_ROWS, _SELECTED_KEYS = 64, 64
#: Query tokens of a call from which the kernel of selected blocks is the quicker, and key-major with it, and heads of a
#: group: on an H200 it is so with 4 and 16, and slower by 15 to 20% with 1.
_SELECTED_FROM_TOKENS, _SELECTED_FROM_HEADS = 2048, 4
#: Kernels for Hopper whose names differ by more than the prefix from those of the ordinary kernels they stand for.
_STANDS_FOR = {
    "hopper_selected_forward": "selected_forward_key_major",
    "hopper_selected_backward": "selected_backward_dkdv",
}


def ordinary_kernel(name: str) -> str:
    """The kernel of the plan that a kernel stands for, which is itself unless it is one for Hopper."""
    return _STANDS_FOR.get(name, name.removeprefix("hopper_"))


def hopper_fits(spec: Spec, *branches: str) -> bool:
    """Whether the kernel can do one of these branches, or any of the spec's if none is named.

    It takes 16-bit inputs, head dims that fit, and a branch of banded attention whose softmax has no sink.
    """
    without_sink = {"cmp": "cmp" in spec.branches, "win": spec.window is not None and spec.window.sink == "none"}
    banded = any(without_sink[branch] for branch in branches or without_sink)
    return banded and spec.dtype != "float32" and (spec.head_dim.qk, spec.head_dim.v) in _HEAD_DIMS


def selected_tiles_fit(spec: Spec) -> bool:
    """Whether blocks are whole tiles of keys, and groups at most a tile of heads, which follow one list.

    The kernels see every key up to a query: not where it leaves those of the window out, of joint branches.
    """
    if spec.combine.joint:
        return False
    if spec.selection is None or spec.selection.block % _SELECTED_KEYS or spec.scopes > spec.heads.kv:
        return False
    return spec.heads.group <= _SELECTED_ROWS


def hopper_selected_forward_fits(spec: Spec) -> bool:
    """Whether the package has the kernel of selected blocks, which takes 16-bit inputs."""
    dims = spec.head_dim
    return selected_tiles_fit(spec) and spec.dtype != "float32" and dims.qk in _SELECTED_QK and dims.v in _SELECTED_V


def decisions(spec: Spec) -> tuple[Decision, ...]:
    """From how many query tokens on a call's selected blocks are served by Hopper's kernel, if the package has it."""
    if not hopper_selected_forward_fits(spec):
        return ()
    tokens = Tunable("HOPPER_TOKENS", (*(2**power for power in range(10, 20)), NEVER), size=True, least=0)
    return (Decision("selected_outputs", (tokens,), (HOPPER,)),)


def choose(spec: Spec, target: str) -> dict[str, Config]:
    """The same number on an architecture or the interpreter, by the decision's name."""
    serves = target == HOPPER and spec.heads.group >= _SELECTED_FROM_HEADS
    least = _SELECTED_FROM_TOKENS if serves else NEVER
    return {each.name: Config(each.name, (("HOPPER_TOKENS", least),)) for each in decisions(spec)}
