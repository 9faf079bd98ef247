"""How the tokens of a call are laid out, and the sizes of grids and buffers that follow from it."""

from typing import NamedTuple

import torch

from .lookup import Bucket, bucket_of
from .sizes import cdiv


class Sequences(NamedTuple):
    """Batched sequences (B, T, H, D) of one length, or packed ones (1, T_total, H, D) delimited by cu_seqlens.

    tokens_q and tokens_kv are rows of the tensors: T, or T_total if packed. Queries are aligned to the end of the keys.
    Nothing here reads the values of cu_seqlens, which stay on the device. In `sizes`, `bounded` is the number of packed
    sequences, and cu_seqlens is None.
    """

    batch: int
    tokens_q: int
    tokens_kv: int
    cu_seqlens: torch.Tensor | None = None
    bounded: int | None = None

    @property
    def sizes(self) -> "Sequences":
        """The same without the tensor cu_seqlens: only numbers, which serve as the key of prepared launches."""
        if self.cu_seqlens is None:
            return self
        return Sequences(self.batch, self.tokens_q, self.tokens_kv, None, self.count)

    @property
    def packed(self) -> bool:
        return self.cu_seqlens is not None or self.bounded is not None

    @property
    def count(self) -> int:
        """Number of packed sequences; 0 if batched."""
        return self.bounded or 0 if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1

    @property
    def numbers(self) -> tuple[int, int, int]:
        """Arguments of kernels: numbers of query tokens, key tokens and packed sequences."""
        return self.tokens_q, self.tokens_kv, self.count

    @property
    def bucket(self) -> Bucket:
        """The bucket of this call: calls in one bucket share their configurations."""
        return bucket_of(self.tokens_kv, self.batch, self.packed)

    def tiles(self, tokens: int, size: int) -> int:
        """Grid extent for tiles of `size` tokens; see `find_sequence` for the upper bound of packed sequences."""
        return tokens // size + self.count if self.packed else cdiv(tokens, size)

    def compressed_rows(self, block: int, stride: int) -> int:
        """Rows of k_cmp and v_cmp per batch entry: the complete blocks or, if packed, an upper bound that leaves gaps.

        If packed, block j of sequence s is in row cu_seqlens[s] // stride + j.
        """
        return self.tokens_kv // stride if self.packed else max(0, (self.tokens_kv - block) // stride + 1)


class OutputGradient(NamedTuple):
    """The inputs of a branch's backward.

    do (B, Tq, Hq, Dv), contiguous, is the gradient of the operator's output. lse and delta (B, Tq, Hq) float32 belong
    to the branch; delta is do . o with the branch's o. gate (B, Tq, Hq), with any strides, is the factor on the
    branch's output, or None.
    """

    do: torch.Tensor
    lse: torch.Tensor
    delta: torch.Tensor
    gate: torch.Tensor | None

    @property
    def gate_strides(self) -> tuple[int, ...]:
        """The gate's strides; zeros without a gate."""
        return (0, 0, 0) if self.gate is None else self.gate.stride()
