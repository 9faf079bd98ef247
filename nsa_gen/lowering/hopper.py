"""Which specs also have forward kernels for Hopper, written in Gluon, and which calls use them."""

from __future__ import annotations

from nsa_gen.lowering.parts import Config, Decision, Tunable
from nsa_gen.spec import Spec

#: The only architecture for which the Gluon kernels are compiled.
HOPPER = "sm_90"
#: More query tokens than any call has. As a kernel's limit, it means that no call uses the kernel.
NEVER = 2**31
#: Head dims (of q and k, of v) with which two tiles of 128 keys fit in shared memory. With 256 they do not. The columns
#: of v must be a power of two.
_HEAD_DIMS = ((64, 64), (96, 128), (128, 128), (192, 128))
#: The same for selected blocks. Their tiles have 64 rows, and 64 or more keys, all of one block.
_SELECTED_QK, _SELECTED_V = (64, 128, 192), (64, 128)
_SELECTED_ROWS, _SELECTED_KEYS = 64, 64
#: Query rows (tokens times heads) of a call from which the kernels of banded attention, forward and gradients, are
#: faster, and tokens from which they are with any number of heads. On an H200 they are with 64 heads from 4096 tokens,
#: with 32, 28 and 16 heads from 8192. With half as many, the host's time decides, and these kernels take more of it.
_BANDED_FROM_ROWS, _BANDED_FROM_TOKENS = 2**18, 8192
#: From this many query tokens per call and heads per group, the kernel of selected blocks, and with it the key-major
#: schedule, is the fastest. On an H200 that holds for groups of 4 and 16; with groups of 1 it is 15 to 20% slower.
_SELECTED_FROM_TOKENS, _SELECTED_FROM_HEADS = 2048, 4
#: Kernels for Hopper and the Triton kernels that they replace, if the names differ by more than the prefix.
_STANDS_FOR = {
    "hopper_selected_forward": "selected_forward_key_major",
    "hopper_selected_backward": "selected_backward_dkdv",
}


def token_limit(name: str, first: int = 10) -> Tunable:
    """A tunable for the fewest query tokens with which calls use a kernel: powers of two from 2**first on, or NEVER."""
    return Tunable(name, (*(2**power for power in range(first, 20)), NEVER), size=True, least=0)


def banded_tokens(spec: Spec) -> int:
    """The fewest query tokens, a power of two, with which calls use the kernels of banded attention by default."""
    return min(2 ** max((_BANDED_FROM_ROWS // spec.heads.query).bit_length() - 1, 10), _BANDED_FROM_TOKENS)


def ordinary_kernel(name: str) -> str:
    """The kernel of the plan that a Hopper kernel replaces; any other kernel's own name."""
    return _STANDS_FOR.get(name, name.removeprefix("hopper_"))


def hopper_fits(spec: Spec, *branches: str) -> bool:
    """Whether the kernel supports one of these branches, or any branch of the spec if none is named.

    It needs 16-bit inputs, head dims that fit, and a banded branch whose softmax has no sink.
    """
    without_sink = {"cmp": "cmp" in spec.branches, "win": spec.window is not None and spec.window.sink == "none"}
    banded = any(without_sink[branch] for branch in branches or without_sink)
    return banded and spec.dtype != "float32" and (spec.head_dim.qk, spec.head_dim.v) in _HEAD_DIMS


def selected_tiles_fit(spec: Spec) -> bool:
    """Whether each block is a whole number of key tiles, and a group's heads share one list and fit in one tile.

    The kernels do not support joint branches. They attend to every key up to the query, and cannot leave out the
    window's keys.
    """
    if spec.combine.joint:
        return False
    if spec.selection is None or spec.selection.block % _SELECTED_KEYS or spec.scopes > spec.heads.kv:
        return False
    return spec.heads.group <= _SELECTED_ROWS


def hopper_selected_forward_fits(spec: Spec) -> bool:
    """Whether the package has the forward kernel of selected blocks, which needs 16-bit inputs."""
    dims = spec.head_dim
    return selected_tiles_fit(spec) and spec.dtype != "float32" and dims.qk in _SELECTED_QK and dims.v in _SELECTED_V


def decisions(spec: Spec) -> tuple[Decision, ...]:
    """The decision how many query tokens a call needs to use Hopper's kernel of selected blocks, if there is one."""
    if not hopper_selected_forward_fits(spec):
        return ()
    return (Decision("selected_outputs", (token_limit("HOPPER_TOKENS"),), (HOPPER,)),)


def choose(spec: Spec, target: str) -> dict[str, Config]:
    """The default of that decision on an architecture or on the interpreter, by the decision's name."""
    serves = target == HOPPER and spec.heads.group >= _SELECTED_FROM_HEADS
    least = _SELECTED_FROM_TOKENS if serves else NEVER
    return {each.name: Config(each.name, (("HOPPER_TOKENS", least),)) for each in decisions(spec)}
