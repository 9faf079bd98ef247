"""Which specs have a kernel of banded attention for Hopper, in Gluon, beside the ordinary kernels."""

from __future__ import annotations

from nsa_gen.spec import Spec

#: The only architecture that kernels in Gluon are compiled for.
HOPPER = "sm_90"
#: More query tokens than any call has: from so many on, a kernel serves none.
NEVER = 2**31
#: Head dims of q and k, and of v, of which tiles of 128 keys fit shared memory twice. 256 do not, and the columns of v
#: are a power of two.
_HEAD_DIMS = ((64, 64), (96, 128), (128, 128), (192, 128))


def hopper_fits(spec: Spec, *branches: str) -> bool:
    """Whether the kernel can do one of these branches, or any of the spec's if none is named.

    It takes 16-bit inputs, head dims that fit, and a branch of banded attention whose softmax has no sink.
    """
    without_sink = {"cmp": spec.compression is not None, "win": spec.window is not None and spec.window.sink == "none"}
    banded = any(without_sink[branch] for branch in branches or without_sink)
    return banded and spec.dtype != "float32" and (spec.head_dim.qk, spec.head_dim.v) in _HEAD_DIMS
