"""How the tokens of a call are laid out, and the sizes of grids and buffers that follow."""

from typing import NamedTuple

import torch

from .lookup import Bucket, bucket_of
from .sizes import cdiv


class Sequences(NamedTuple):
    """Batched sequences (B, T, H, D) of one length, or packed ones (1, T_total, H, D) bounded by cu_seqlens.

    tokens_q and tokens_kv are rows of the tensors: T, or T_total when packed. Queries are aligned to the end of the
    keys. Nothing here reads cu_seqlens, which stays on the device. `sizes` has the number of packed sequences instead.
    """

    batch: int
    tokens_q: int
    tokens_kv: int
    cu_seqlens: torch.Tensor | None = None
    bounded: int | None = None

    @property
    def sizes(self) -> "Sequences":
        """The same without cu_seqlens: numbers alone, which launches are kept by."""
        if self.cu_seqlens is None:
            return self
        return Sequences(self.batch, self.tokens_q, self.tokens_kv, None, self.count)

    @property
    def packed(self) -> bool:
        return self.cu_seqlens is not None or self.bounded is not None

    @property
    def count(self) -> int:
        """Number of packed sequences; 0 when batched."""
        return self.bounded or 0 if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1

    @property
    def numbers(self) -> tuple[int, int, int]:
        """What kernels take of a call: query and key tokens, and packed sequences."""
        return self.tokens_q, self.tokens_kv, self.count

    @property
    def bucket(self) -> Bucket:
        """Calls that are launched alike."""
        return bucket_of(self.tokens_kv, self.batch, self.packed)

    def tiles(self, tokens: int, size: int) -> int:
        """Grid extent for tiles of `size` tokens; see `find_sequence` for the packed bound."""
        return tokens // size + self.count if self.packed else cdiv(tokens, size)

    def compressed_rows(self, block: int, stride: int) -> int:
        """Rows of k_cmp and v_cmp a batch entry: complete blocks, or a packed bound that leaves gaps.

        Packed, block j of sequence s is row cu_seqlens[s] // stride + j.
        """
        return self.tokens_kv // stride if self.packed else max(0, (self.tokens_kv - block) // stride + 1)


class OutputGradient(NamedTuple):
    """What the gradients of a branch begin with.

    do (B, Tq, Hq, Dv), contiguous, is the gradient of the operator's output; lse and delta (B, Tq, Hq) float32 are the
    branch's, delta = do . o of the branch; gate (B, Tq, Hq), of any strides, is what it was multiplied by, or None.
    """

    do: torch.Tensor
    lse: torch.Tensor
    delta: torch.Tensor
    gate: torch.Tensor | None

    @property
    def gate_strides(self) -> tuple[int, ...]:
        """The gate's strides; zeros without one."""
        return (0, 0, 0) if self.gate is None else self.gate.stride()
