"""The public packages of native sparse attention, composed as in their own documentation; all contenders by name.

They take one sequence as (T, H, D) with cumulative lengths, mean phi, sigmoid gates and one pair of keys and values.
Each of them calls flash-attn 2 for its window branch. Here, torch's build of the same kernels is used
(`sliding_window`), so that nothing has to be compiled. Written with their public sources:

- fla: github.com/fla-org/flash-linear-attention, `fla.ops.nsa.parallel_nsa`
- sfnsa: github.com/mdy666/Scalable-Flash-Native-Sparse-Attention, the functions of `HFNSACore.forward`
- nsa-triton: github.com/XunhaoLai/native-sparse-attention-triton, `native_sparse_attention.ops`
- fsa: github.com/Relaxed-System-Lab/Flash-Sparse-Attention, `fsa.ops` and the `nsa_ref.ops` that it builds on
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nsa_gen.bench.contenders import (
    Contender,
    FlashAttention4,
    FlexAttention,
    Prepared,
    Sdpa,
    keys_and_values,
    leaves_of,
    not_importable,
)
from nsa_gen.verification.reference.inputs import Inputs

if TYPE_CHECKING:
    from nsa_gen.spec import Spec

WINDOW_NOTE = "window by torch's FlashAttention-2"


def sliding_window(q: Tensor, k: Tensor, v: Tensor, size: int, scale: float) -> Tensor:
    """Attention of each query to its own key and the size - 1 keys before it, by the FlashAttention-2 kernels in torch.

    q is (B, T, Hq, D), k and v are (B, T, Hkv, D), bfloat16 or float16; the result has q's shape. Differentiable.
    """
    tokens = q.shape[1]
    found = torch.ops.aten._flash_attention_forward(
        q, k, v, None, None, tokens, tokens, 0.0, True, False, scale=scale, window_size_left=size - 1,
        window_size_right=0,
    )  # fmt: skip
    return found[0]


class _PublicPackage(Contender):
    """What the adapters share: the features that none of the packages has, and the leaves q, k, v and gates."""

    modules: tuple[str, ...] = ()
    package = ""

    def missing(self) -> str:
        return not_importable(self.modules, self.package)

    def refuses(self, spec: Spec, tokens: int) -> str:
        if spec.compression is None or spec.selection is None or spec.window is None:
            return "it computes all three branches, and the spec leaves one out"
        phi, position = spec.compression.phi, spec.compression.position
        if (phi.key, phi.value, position.key, position.value) != ("mean", "mean", "none", "none"):
            return "compared at mean phi without learned positions only"
        if spec.selection.indices != "computed":
            return "it chooses the blocks itself, and the spec takes them as input"
        if spec.selection.scores != "compression":
            return "it scores blocks by the compressed keys"
        if spec.kv != "shared":
            return "its branches share one pair of keys and values"
        if spec.combine.joint:
            return "each of its branches has a softmax of its own"
        if (spec.selection.sink, spec.window.sink) != ("none", "none"):
            return "its branches have no sinks"
        if spec.combine.gate != "sigmoid":
            return "compared with sigmoid gates only"
        if spec.dtype == "float32":
            return "it takes bfloat16 and float16 only"
        if spec.head_dim.qk != spec.head_dim.v:
            return f"its window needs head dims that are equal, not {spec.head_dim.qk} and {spec.head_dim.v}"
        return ""

    def prepare(self, spec: Spec, inputs: Inputs) -> Prepared:
        assert inputs.gates is not None
        leaves = leaves_of(inputs.q, *keys_and_values(inputs), inputs.gates)
        call, note = self.compose(spec, *leaves)
        return Prepared(call, tuple(leaves), inputs.do, note)

    def compose(self, spec: Spec, q: Tensor, k: Tensor, v: Tensor, gates: Tensor) -> tuple[Callable[[], Tensor], str]:
        """The package's operator on (1, T, H, D) tensors, as a call that returns o, and its note."""
        raise NotImplementedError


class FlashLinearAttention(_PublicPackage):
    """flash-linear-attention. Its compression blocks are its selection blocks, without overlap: less work than here."""

    name = "fla"
    modules = ("fla.ops.nsa", "einops")
    package = "flash-linear-attention"

    def refuses(self, spec: Spec, tokens: int) -> str:
        group = spec.heads.group
        if group < 16 or group & (group - 1):
            return f"it needs groups of 16, 32, ... query heads, not {group}"
        return super().refuses(spec, tokens)

    def compose(self, spec: Spec, q: Tensor, k: Tensor, v: Tensor, gates: Tensor) -> tuple[Callable[[], Tensor], str]:
        attend: Any = importlib.import_module("fla.ops.nsa").parallel_nsa
        assert spec.selection is not None and spec.window is not None
        block, count, size, scale = spec.selection.block, spec.selection.count, spec.window.size, spec.scale_value

        def call() -> Tensor:
            g_cmp, g_slc, g_win = gates.sigmoid().unbind(-1)
            o = attend(q, k, v, g_cmp, g_slc, None, block_counts=count, block_size=block, scale=scale)
            return torch.addcmul(o, sliding_window(q, k, v, size, scale), g_win[..., None])

        return call, f"another, simpler setting: compression block and stride {block}; {WINDOW_NOTE}"


class ScalableFlashNsa(_PublicPackage):
    """Scalable-Flash-Native-Sparse-Attention, composed as in its Hugging Face module's forward."""

    name = "sfnsa"
    modules = ("flash_nsa", "pandas", "pkg_resources")
    package = "Scalable-Flash-Native-Sparse-Attention"

    def compose(self, spec: Spec, q: Tensor, k: Tensor, v: Tensor, gates: Tensor) -> tuple[Callable[[], Tensor], str]:
        flash_nsa: Any = importlib.import_module("flash_nsa")
        combine: Any = importlib.import_module("flash_nsa.ops.combine").fused_sigmoid_combine
        assert spec.compression is not None and spec.selection is not None and spec.window is not None
        size, scale = spec.window.size, spec.scale_value
        flash_nsa.NSAHelper.set_hyperparameters(
            kernel_size=spec.compression.block,
            stride=spec.compression.stride,
            block_size=spec.selection.block,
            window_size=size,
            top_n=spec.selection.count,
            num_init_blocks=spec.selection.initial,
            num_local_blocks=spec.selection.local,
        )
        ends = _ends(q)

        def call() -> Tensor:
            flash_nsa.NSAHelper.init_cu_seqlens(ends)
            k_cmp, v_cmp = flash_nsa.mean_pooling(k[0]), flash_nsa.mean_pooling(v[0])
            o_cmp, lse = flash_nsa.compress_attn(q[0], k_cmp, v_cmp, sm_scale=scale)
            chosen, _ = flash_nsa.slc_topk_indices(
                q[0], k_cmp, lse, sm_scale=scale, maybe_efficient_version=True, scale_slc_p=True
            )
            o_slc = flash_nsa.select_attn(q[0], k[0], v[0], chosen, sm_scale=scale)
            o_win = sliding_window(q, k, v, size, scale)[0]
            return combine(o_cmp, o_slc, o_win, gates[0])[None]

        return call, WINDOW_NOTE


class _TopkPackage(_PublicPackage):
    """What nsa-triton and fsa (which is based on it) have in common: three functions, and gates in plain torch."""

    operations = ""
    options: dict[str, Any] = {}  # noqa: RUF012  constants of a class

    def selected(self, spec: Spec, operations: Any) -> tuple[Callable[..., Tensor], str]:
        """The function of the selection branch, and a note about it."""
        return operations.topk_sparse_attention, ""

    def compose(self, spec: Spec, q: Tensor, k: Tensor, v: Tensor, gates: Tensor) -> tuple[Callable[[], Tensor], str]:
        operations: Any = importlib.import_module(self.operations)
        selected, note = self.selected(spec, operations)
        assert spec.compression is not None and spec.selection is not None and spec.window is not None
        block, stride, size, scale = (
            spec.compression.block, spec.compression.stride, spec.window.size, spec.scale_value,
        )  # fmt: skip
        selection, tokens, ends = spec.selection, q.shape[1], _ends(q)
        blocks = (tokens - block) // stride + 1

        def call() -> Tensor:
            k_cmp, cmp_ends = operations.avgpool_compress(k[0], None, ends, block, stride, None)
            v_cmp, _ = operations.avgpool_compress(v[0], None, ends, block, stride, None)
            o_cmp, chosen = operations.compressed_attention(
                q[0], k_cmp, v_cmp, block, stride, selection.block, selection.count, ends, cmp_ends, tokens, blocks,
                scale, selection.initial, selection.local, **self.options,
            )  # fmt: skip
            o_slc = selected(q[0], k[0], v[0], chosen, selection.block, ends, scale)
            o_win = sliding_window(q, k, v, size, scale)[0]
            g = gates[0].sigmoid()
            return (g[..., 0:1] * o_cmp + g[..., 1:2] * o_slc + g[..., 2:3] * o_win)[None]

        return call, "; ".join(filter(None, (note, WINDOW_NOTE)))


class NsaTriton(_TopkPackage):
    """native-sparse-attention-triton."""

    name = "nsa-triton"
    modules = ("native_sparse_attention.ops", "einops")
    package = "native-sparse-attention-triton"
    operations = "native_sparse_attention.ops"


class FlashSparseAttention(_TopkPackage):
    """Flash-Sparse-Attention: nsa-triton with its own selection branch for groups of at most 8 heads."""

    name = "fsa"
    modules = ("fsa.ops", "nsa_ref.ops", "einops")
    package = "Flash-Sparse-Attention"
    operations = "nsa_ref.ops"
    options = {"parallel_topk_compute": False}  # noqa: RUF012  constants of a class

    def selected(self, spec: Spec, operations: Any) -> tuple[Callable[..., Tensor], str]:
        if spec.heads.group > 8:
            return operations.topk_sparse_attention, "groups above 8 fall back to its reference selection"
        return importlib.import_module("fsa.ops").FSA_topk_sparse_attention, ""


def _ends(q: Tensor) -> Tensor:
    """Cumulative lengths of one sequence, (2,) int32."""
    return torch.tensor([0, q.shape[1]], dtype=torch.int32, device=q.device)


PEERS: Sequence[_PublicPackage] = (FlashLinearAttention(), ScalableFlashNsa(), NsaTriton(), FlashSparseAttention())
DENSE: Sequence[Contender] = (
    Sdpa("cudnn", "CUDNN_ATTENTION"),
    Sdpa("fa2", "FLASH_ATTENTION"),
    Sdpa("efficient", "EFFICIENT_ATTENTION"),
    FlashAttention4(),
    FlexAttention(),
)
CONTENDERS: dict[str, Contender] = {contender.name: contender for contender in (*DENSE, *PEERS)}
"""The contenders other than nsa_gen's operator, by their names on the command line."""

DEFAULT_NAMES = ("cudnn", "fa2", "fa4", *(peer.name for peer in PEERS))
"""The default contenders; those that are not installed are left out."""


def choose(names: Sequence[str]) -> list[Contender]:
    """The contenders of these names, in the order of the registry; "dense" and "peers" each name several.

    Raises:
        ValueError: a name is unknown.
    """
    groups = {"dense": ("cudnn", "fa2", "fa4"), "peers": tuple(peer.name for peer in PEERS)}
    wanted = {one for name in names for one in groups.get(name, (name,))}
    if unknown := sorted(wanted - CONTENDERS.keys()):
        known = ", ".join((*groups, *CONTENDERS))
        raise ValueError(f"contenders: expected some of {known}, got {', '.join(unknown):.60}")
    return [contender for name, contender in CONTENDERS.items() if name in wanted]
