"""One dense attention forward, one elementwise backward, each with its launch function."""

import triton
import triton.language as tl

from .configs import key_block
from .helpers import exp


@triton.jit
def scores_kernel(
    q,  # (T, 32)
    k,  # (T, 32)
    bias,  # (T,) or None
    o,  # (T, T)
    shape,  # (T, 32)
    row_stride,
    scale,
    heads,
    KEY_BLOCK: tl.constexpr,
):
    rows, columns, dims = tl.arange(0, 16), tl.arange(0, KEY_BLOCK), tl.arange(0, 32)
    query = tl.load(q + rows[:, None] * shape[1] + dims[None, :])
    for start in range(0, shape[0], KEY_BLOCK):
        key = tl.load(k + (start + columns)[None, :] * shape[1] + dims[:, None])
        scores = tl.dot(query, key) * scale * heads
        if bias is not None:
            scores += tl.load(bias + start + columns)[None, :]
        tl.store(o + rows[:, None].to(tl.int64) * row_stride + (start + columns)[None, :], exp(scores))


def launch_scores(q, k, bias, o) -> None:
    tokens, dim = q.shape
    scores_kernel[lambda meta: (tokens // meta["KEY_BLOCK"], 2)](
        q, k, bias, o, (tokens, dim), 2**33, 0.5, 1, KEY_BLOCK=key_block(), num_warps=4, num_stages=2
    )


@triton.jit
def scale_kernel(x, cu_seqlens, o, T, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    end = T
    if cu_seqlens is not None:
        end = tl.load(cu_seqlens + 1)
    tl.store(o + offsets, tl.load(x + offsets, mask=offsets < end) * 2, mask=offsets < end)


def launch_scale(x, cu_seqlens, o) -> None:
    scale_kernel[(x.numel() // 128,)](x, cu_seqlens, o, x.numel(), BLOCK=128, num_warps=2)
