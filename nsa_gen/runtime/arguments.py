"""Checks of the arguments that callers pass. Each error names the argument, what was expected and what it got."""

from collections.abc import Collection, Mapping
from types import MappingProxyType

import torch

from .tiles import INTERPRETED

# Largest extent of a grid's second and third dimension, and largest int32 row number.
LARGEST_BATCH = 65535
LARGEST_TOKENS = 2**31 - 1

_PLAIN = frozenset((torch.Tensor, torch.nn.Parameter))
# Most signatures that are remembered; then all are forgotten, since many lengths occur only once.
_MOST_ACCEPTED = 4096


class Arguments:
    """The checks of a package's arguments.

    Args:
        dtype: expected dtype of tensors, unless a check names another.
        branches: names of the branches, in order.
        sizes: expected sizes of the dims Hq, Hkv, Dk, Dv and S (scopes: block selections per token); with an indexer
            also of Hi and Di (heads and head dim of index keys).
        compression: block and stride of compressed keys; zeros without compression.
        selected: number of blocks that a query selects; 0 without selection.
        gate: the name of gates in messages: "logits" or "gate values".
        parameters: dims of each of phi's parameters; the first dim is "Hkv".
    """

    def __init__(
        self,
        dtype: torch.dtype,
        branches: tuple[str, ...],
        sizes: Mapping[str, int],
        *,
        compression: tuple[int, int] = (0, 0),
        selected: int = 0,
        gate: str = "logits",
        parameters: Mapping[str, tuple[str | int, ...]] = MappingProxyType({}),
    ) -> None:
        self.dtype, self.branches, self.sizes = dtype, branches, sizes
        self.selected, self.parameters = selected, parameters
        self._compression, self._gate = compression, gate
        self._accepted: set[tuple] = set()

    def signature(self, cu_seqlens: torch.Tensor | None, *tensors: torch.Tensor | None) -> tuple | None:
        """A key of everything that the checks look at in the tensors of a call; None if the checks must always run.

        The checks must run while a compiler traces, if autocast may change a dtype, for tensor subclasses, and if the
        values of cu_seqlens are checked.
        """
        if torch.compiler.is_compiling():
            return None
        seen: list[object] = []
        if cu_seqlens is not None:
            if type(cu_seqlens) not in _PLAIN or cu_seqlens.dtype is not torch.int32 or has_checked_values(cu_seqlens):
                return None
            seen += (cu_seqlens.shape, cu_seqlens.stride(), cu_seqlens.device)
        try:
            for tensor in tensors:
                if tensor is None:
                    seen.append(None)
                elif type(tensor) in _PLAIN and tensor.dtype is self.dtype and not tensor._is_zerotensor():
                    seen += (tensor.shape, tensor.stride(), tensor.device)
                else:
                    return None
        except RuntimeError:  # nested tensors have no shape
            return None
        return tuple(seen)

    def is_accepted(self, seen: tuple | None) -> bool:
        """Whether an earlier call with this signature passed the checks."""
        return seen is not None and seen in self._accepted

    def accept(self, seen: tuple | None) -> None:
        """Remember the signature of a call that passed the checks."""
        if seen is not None:
            if len(self._accepted) >= _MOST_ACCEPTED:
                self._accepted.clear()
            self._accepted.add(seen)

    def check_tensor(
        self,
        name: str,
        tensor: torch.Tensor,
        dims: tuple[str, ...],
        sizes: tuple[int, ...],
        *,
        device: torch.device,
        dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        """Raise unless `tensor` has these sizes, this dtype and device, and a contiguous last dim.

        `dims` are the names of `sizes` in messages. `dtype` is the package's dtype if None. Returns the tensor, or a
        copy if it is a lazily negated view.
        """
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor of shape {_shape(dims, sizes)}, got {_describe(tensor)}")
        check_kind(name, tensor)
        wanted = self.dtype if dtype is None else dtype
        if tensor.dtype != wanted:
            reason = ", which this package is generated for" if wanted == self.dtype else ""
            raise TypeError(f"{name}: expected dtype {wanted}{reason}, got {tensor.dtype}")
        if tuple(tensor.shape) != sizes:
            raise ValueError(f"{name}: expected shape {_shape(dims, sizes)}, got {tuple(tensor.shape)}")
        if tensor.device != device:
            raise ValueError(f"{name}: expected device {device}, as the others, got {tensor.device}")
        if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
            raise ValueError(
                f"{name}: expected a contiguous last dim, got strides {tensor.stride()}; call {name}.contiguous() first"
            )
        return tensor.resolve_neg()

    def check_query(self, name: str, tensor: torch.Tensor, cu_seqlens: torch.Tensor | None) -> torch.Tensor:
        """Check the tensor that determines the layout, and return it as (B, T, H, D), with B = 1 if packed."""
        check_kind(name, tensor)
        layout = "(T_total, H, D), since cu_seqlens is given" if cu_seqlens is not None else "(B, T, H, D)"
        if tensor.dim() != (3 if cu_seqlens is not None else 4):
            raise ValueError(f"{name}: expected {layout}, got shape {tuple(tensor.shape)}")
        if tensor.device.type not in ("cuda", "cpu", "meta"):
            raise ValueError(f"{name}: expected a tensor on a GPU, got device {tensor.device}")
        if tensor.device.type == "cpu" and not INTERPRETED and not is_fake(tensor):
            raise ValueError(
                f"{name}: expected a tensor on a GPU, got device cpu; on the CPU the kernels run only in Triton's "
                "interpreter: set TRITON_INTERPRET=1 before triton is imported"
            )
        if cu_seqlens is not None:
            check_cu_seqlens(cu_seqlens, tensor.shape[0], tensor.device)
            tensor = tensor.unsqueeze(0)
        tensor = self.autocasted(tensor)
        if tensor.shape[0] > LARGEST_BATCH:
            raise ValueError(f"{name}: expected a batch of at most {LARGEST_BATCH}, got {tensor.shape[0]}")
        if tensor.shape[1] > LARGEST_TOKENS:
            raise ValueError(f"{name}: expected at most {LARGEST_TOKENS} tokens, got {tensor.shape[1]}")
        return tensor

    def with_batch(self, name: str, tensor: torch.Tensor, packed: bool, *, cast: bool = True) -> torch.Tensor:
        """Add a leading batch dim of 1 to a packed tensor. With `cast`, also apply autocast."""
        check_kind(name, tensor)
        tensor = self.autocasted(tensor) if cast else tensor
        return tensor.unsqueeze(0) if packed else tensor

    def autocasted(self, tensor: torch.Tensor) -> torch.Tensor:
        """Cast a floating tensor to the package's dtype if autocast to that dtype is on; else return it unchanged."""
        kind = tensor.device.type
        if kind == "meta" or tensor.dtype == self.dtype or not tensor.is_floating_point():
            return tensor
        if torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == self.dtype:
            return tensor.to(self.dtype)
        return tensor

    def check_heads(
        self, name: str, tensor: torch.Tensor, rows: int, heads: str, dim: str, like: torch.Tensor, rows_name: str = "T"
    ) -> torch.Tensor:
        """Check a (B, rows, H, D) tensor against the package's heads and head dim, and `like`'s batch and device."""
        shape = (like.shape[0], rows, self.sizes[heads], self.sizes[dim])
        return self.check_tensor(name, tensor, ("B", rows_name, heads, dim), shape, device=like.device)

    def check_keys(
        self,
        k_name: str,
        k: torch.Tensor,
        v_name: str,
        v: torch.Tensor,
        q: torch.Tensor,
        cu_seqlens: torch.Tensor | None,
        expected_tokens: int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Check raw keys (B, Tkv, Hkv, Dk) and values (B, Tkv, Hkv, Dv); Tq <= Tkv, and Tq == Tkv if packed.

        `expected_tokens` is the Tkv of an earlier branch: all branches must have the same Tkv.
        """
        packed = cu_seqlens is not None
        k, v = self.with_batch(k_name, k, packed), self.with_batch(v_name, v, packed)
        if k.dim() != 4:
            raise ValueError(f"{k_name}: expected as many dims as q, got shape {tuple(k.shape)}")
        tokens = k.shape[1]
        if cu_seqlens is not None and tokens != q.shape[1]:
            raise ValueError(f"{k_name}: expected T_total={q.shape[1]} tokens, as q, got {tokens}")
        if expected_tokens is not None and tokens != expected_tokens:
            raise ValueError(f"{k_name}: expected Tkv={expected_tokens} tokens, as k, got {tokens}")
        if tokens < q.shape[1]:
            raise ValueError(f"{k_name}: expected at least as many tokens as q's {q.shape[1]}, got {tokens}")
        if tokens > LARGEST_TOKENS:
            raise ValueError(f"{k_name}: expected at most {LARGEST_TOKENS} tokens, got {tokens}")
        return self.check_heads(k_name, k, tokens, "Hkv", "Dk", q), self.check_heads(v_name, v, tokens, "Hkv", "Dv", q)

    def check_compressed(
        self, name: str, tensor: torch.Tensor, dim: str, tokens: int, q: torch.Tensor, cu_seqlens: torch.Tensor | None
    ) -> torch.Tensor:
        """Check compressed keys or values: (B, Nc(Tkv), Hkv, D), or (T_total // stride, Hkv, D) if packed."""
        block, stride = self._compression
        rows = max(0, (tokens - block) // stride + 1) if cu_seqlens is None else tokens // stride
        return self.check_heads(name, self.with_batch(name, tensor, cu_seqlens is not None), rows, "Hkv", dim, q, "Nc")

    def check_selection(
        self,
        indices: torch.Tensor | None,
        counts: torch.Tensor | None,
        q: torch.Tensor,
        cu_seqlens: torch.Tensor | None,
        *,
        required: bool = True,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Check indices (B, Tq, S, n) and counts (B, Tq, S), both int32, and return them contiguous.

        Both may be None if they are not `required`.
        """
        if not required and indices is None and counts is None:
            return None, None
        shape = (*q.shape[:2], self.sizes["S"], self.selected)
        dims = ("B", "Tq", "S", "n")
        indices = self.with_batch("indices", indices, cu_seqlens is not None)
        indices = self.check_tensor("indices", indices, dims, shape, device=q.device, dtype=torch.int32)
        if counts is None:
            return indices.contiguous(), None
        counts = self.with_batch("counts", counts, cu_seqlens is not None)
        if isinstance(counts, torch.Tensor):
            counts = counts.contiguous()
        counts = self.check_tensor("counts", counts, dims[:-1], shape[:-1], device=q.device, dtype=torch.int32)
        return indices.contiguous(), counts

    def check_index(
        self,
        q_idx: torch.Tensor | None,
        k_idx: torch.Tensor | None,
        cu_seqlens: torch.Tensor | None,
        q: torch.Tensor | None = None,
        tokens: int | None = None,
        *,
        required: bool = True,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Check index queries (B, Tq, S, Di) and index keys (B, Tkv, Hi, Di).

        `q` (B, Tq, Hq, Dk) and `tokens` (Tkv) are those of the call; if None, the index queries and keys determine Tq
        and Tkv. q_idx and k_idx may both be None if they are not `required`, for example if the caller passes the
        blocks.
        """
        if not required and q_idx is None and k_idx is None:
            return None, None
        q_idx = self.check_query("q_idx", q_idx, cu_seqlens)
        k_idx = self.with_batch("k_idx", k_idx, cu_seqlens is not None)
        q = q_idx if q is None else q
        tokens = self.key_tokens("k_idx", k_idx, q, cu_seqlens) if tokens is None else tokens
        q_idx = self.check_heads("q_idx", q_idx, q.shape[1], "S", "Di", q, "Tq")
        return q_idx, self.check_heads("k_idx", k_idx, tokens, "Hi", "Di", q, "Tkv")

    def key_tokens(self, name: str, k: torch.Tensor, q: torch.Tensor, cu_seqlens: torch.Tensor | None) -> int:
        """Tkv of keys (B, Tkv, H, D) for queries (B, Tq, H, D): at least Tq, and equal to Tq if packed."""
        tokens = k.shape[1] if k.dim() == 4 else q.shape[1]
        if tokens < q.shape[1] or (cu_seqlens is not None and tokens != q.shape[1]):
            relation = "" if cu_seqlens is not None else "at least "
            raise ValueError(f"{name}: expected {relation}q's {q.shape[1]} tokens, got {tokens}")
        return tokens

    def check_gates(self, gates: torch.Tensor | None, q: torch.Tensor, packed: bool) -> torch.Tensor:
        """Check gates (B, Tq, Hq, branches), in the order of `branches`."""
        if gates is None:
            order = ", ".join(self.branches)
            shape = f"(B, Tq, Hq, {len(self.branches)})"
            raise TypeError(f"gates: expected {self._gate} of shape {shape} in the order {order}, got None")
        gates = self.with_batch("gates", gates, packed)
        shape = (*q.shape[:3], len(self.branches))
        return self.check_tensor("gates", gates, ("B", "Tq", "Hq", "branches"), shape, device=q.device)

    def check_sink(self, name: str, sink: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        """Check a sink: one logit per query head, (Hq,) float32."""
        return self.check_tensor(name, sink, ("Hq",), (self.sizes["Hq"],), device=q.device, dtype=torch.float32)

    def check_parameters(
        self, parameters: tuple[torch.Tensor, ...] | None, like: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """Check phi's parameters against the package's dims, and return them contiguous."""
        if parameters is None:
            raise TypeError(f"compression: expected CompressionParameters({', '.join(self.parameters)}), got None")
        if not isinstance(parameters, tuple) or len(parameters) != len(self.parameters):
            fields = ", ".join(self.parameters)
            raise TypeError(f"compression: expected CompressionParameters({fields}), got {_describe(parameters)}")
        checked = []
        for (name, dims), tensor in zip(self.parameters.items(), parameters, strict=True):
            sizes = (self.sizes["Hkv"], *(dim for dim in dims if isinstance(dim, int)))
            labels = tuple(str(dim) for dim in dims)
            if isinstance(tensor, torch.Tensor):
                tensor = self.autocasted(tensor)
            checked.append(
                self.check_tensor(f"compression.{name}", tensor, labels, sizes, device=like.device).contiguous()
            )
        return tuple(checked)

    def check_recompute(self, names: Collection[str]) -> str:
        """Check names of branches and join them, in the order of `branches`, to the string that the operator takes."""
        if names == ():
            return ""
        if (
            not isinstance(names, Collection)
            or isinstance(names, str)
            or not all(name in self.branches for name in names)
        ):
            raise ValueError(f"recompute: expected some of {', '.join(self.branches)} in a tuple, got {names!r}")
        return " ".join(branch for branch in self.branches if branch in names)


def check_workspace(workspace_bytes: int | None) -> int | None:
    """Check the bytes of partial results that a call may hold at a time, and return them; None means the default."""
    if workspace_bytes is None:
        return None
    if isinstance(workspace_bytes, bool) or not isinstance(workspace_bytes, int):
        raise TypeError(f"workspace_bytes: expected an int or None, got {_describe(workspace_bytes)}")
    if workspace_bytes < 1:
        raise ValueError(f"workspace_bytes: expected at least 1, got {workspace_bytes}")
    return workspace_bytes


def check_whole(name: str, value: object, least: int, most: int) -> None:
    """Raise unless `value` is a whole number from `least` to `most`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected a whole number, got {type(value).__name__} {value!r}")
    if not least <= value <= most:
        raise ValueError(f"{name}: expected {least} to {most}, got {value}")


def check_kind(name: str, tensor: object, expected: str = "a torch.Tensor") -> None:
    """Raise unless `tensor` is a dense, strided tensor in the memory of one device."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name}: expected {expected}, got {_describe(tensor)}")
    if tensor.is_nested:
        raise TypeError(f"{name}: expected a dense tensor, got a nested one; pack its sequences and give cu_seqlens")
    if tensor.layout is not torch.strided:
        raise TypeError(f"{name}: expected a dense tensor, got layout {tensor.layout}; call {name}.to_dense() first")
    if type(tensor) not in _PLAIN and hasattr(tensor, "placements") and hasattr(tensor, "to_local"):
        raise TypeError(
            f"{name}: expected a tensor of one device, got a {type(tensor).__name__} of placements "
            f"{tensor.placements}; call {name}.to_local(), whole KV heads with their query heads a device, in a "
            "package generated for that many heads"
        )
    if torch.compiler.is_compiling():
        return
    if tensor._is_zerotensor():
        raise TypeError(f"{name}: expected a tensor with memory, got zeros without; use torch.zeros_like({name})")
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor) and not torch._C._are_functorch_transforms_active():
        raise TypeError(f"{name}: expected a torch.Tensor, got one of a transformation of torch.func that has ended")


def check_cu_seqlens(cu_seqlens: torch.Tensor, tokens: int, device: torch.device) -> None:
    """Check shape, dtype and device of cu_seqlens, and its values if it is on the CPU.

    Tokens after the last boundary are padding. On a GPU the values are not read: the caller must make sure that they
    are valid.
    """
    check_kind("cu_seqlens", cu_seqlens, "an int32 tensor of shape (N + 1,)")
    if cu_seqlens.dtype != torch.int32:
        raise TypeError(f"cu_seqlens: expected dtype torch.int32, got {cu_seqlens.dtype}")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(f"cu_seqlens: expected shape (N + 1,), beginning with 0, got {tuple(cu_seqlens.shape)}")
    if cu_seqlens.shape[0] == 1 and tokens > 0:
        raise ValueError(f"cu_seqlens: expected the bounds of a sequence at least for {tokens} tokens, got shape (1,)")
    if cu_seqlens.device != device:
        raise ValueError(f"cu_seqlens: expected device {device}, as q, got {cu_seqlens.device}")
    if not cu_seqlens.is_contiguous():
        raise ValueError("cu_seqlens: expected a contiguous tensor, got a strided one; call .contiguous() on it first")
    if device.type == "cpu" and not (is_fake(cu_seqlens) or torch.compiler.is_compiling()):
        bounds = cu_seqlens.tolist()
        if bounds[0] != 0 or bounds[-1] > tokens or bounds != sorted(bounds):
            shown = bounds if len(bounds) <= 8 else f"{bounds[:4]} ... {bounds[-1]}"
            raise ValueError(f"cu_seqlens: expected bounds rising from 0 to at most T_total={tokens}, got {shown}")


def has_checked_values(cu_seqlens: torch.Tensor) -> bool:
    """Whether the values of cu_seqlens are checked: only on the CPU, since reading them from a GPU would block."""
    return cu_seqlens.is_cpu


def with_batch_dim(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """Add a leading batch dim of 1 to packed tensors."""
    return [tensor.unsqueeze(0) for tensor in tensors]


def copied_lists(indices: torch.Tensor, counts: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Copy indices (B, Tq, S, n) and counts (B, Tq, S), or n if None: an operator must not return its inputs."""
    slots = indices.shape[-1]
    return indices.clone(), indices.new_full(indices.shape[:-1], slots) if counts is None else counts.clone()


def refuse(**arguments: object) -> None:
    """Raise TypeError for every given argument: this package's spec does not use them."""
    for name, value in arguments.items():
        if value is not None:
            raise TypeError(f"{name}: expected None, as this package's spec has no such input, got {_describe(value)}")


def is_fake(tensor: torch.Tensor) -> bool:
    """Whether a tensor has no data, as when torch.compile traces."""
    return isinstance(tensor, torch._subclasses.FakeTensor)


def _shape(dims: tuple[str, ...], sizes: tuple[int, ...]) -> str:
    shown = (str(size) if dim == str(size) else f"{dim}={size}" for dim, size in zip(dims, sizes, strict=True))
    return f"({', '.join(shown)})"


def _describe(value: object) -> str:
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    return "None" if value is None else f"{type(value).__name__} {value!r}"
