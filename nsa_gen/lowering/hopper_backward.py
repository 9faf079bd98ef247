"""Which specs have a kernel for Hopper, in Gluon, of the gradients of selected blocks, beside the ordinary one."""

from __future__ import annotations

from nsa_gen.spec import Spec

#: Keys of a tile, which selection blocks consist of, and rows, of which a group's heads take a power of two.
_KEYS, _ROWS = 64, 64
#: Head dims, of q and k and of v, whose accumulators fit the registers of one warpgroup together.
_HEAD_DIMS = (64, 128)


def hopper_backward_fits(spec: Spec) -> bool:
    """Whether the package has the kernel.

    Its inputs are of 16 bits, head dims 64 or 128, blocks of whole tiles of keys and groups of at most a tile of heads.
    A gate is a sigmoid, whose logarithm joins the exponent of p; one that is given might be negative.
    """
    return (
        spec.selection is not None
        and "backward" in spec.passes
        and spec.dtype != "float32"
        and spec.head_dim.qk in _HEAD_DIMS
        and spec.head_dim.v in _HEAD_DIMS
        and spec.selection.block % _KEYS == 0
        and spec.heads.group <= _ROWS
        and spec.combine.gate != "given"
    )
