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


def hopper_fits(spec: Spec) -> bool:
    """Whether the package has the kernel: 16-bit inputs, a branch of banded attention, and head dims that fit."""
    banded = spec.compression is not None or spec.window is not None
    return banded and spec.dtype != "float32" and (spec.head_dim.qk, spec.head_dim.v) in _HEAD_DIMS
