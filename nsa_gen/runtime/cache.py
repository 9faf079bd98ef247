"""A cache of keys and values, with the lengths and pages of its sequences."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Self

import torch

from .arguments import Arguments, check_kind, check_whole
from .pages import CapacityError, Pages
from .sizes import cdiv
from .storage import Kept, Layout, check_layer, check_page_size, new_scales, shapes_of


class Cache:
    """The tensors of a cache, the lengths on the device, and the host's records of lengths and pages.

    A package derives its `NSACache` from this class. It defines `write`, which names the tensors of new tokens, and the
    attributes below: argument checks, operators, the most tokens that one call decodes, the tensors of a layer and the
    type of a layer, the function that allocates the workspace of decode, and, for an mlp phi, the width of its hidden
    rows and a function that gives the most hidden rows for a number of new tokens.
    """

    _checks: Arguments
    _operator: Callable[[str], Callable]
    _most_tokens: int
    _kept: Mapping[str, Kept]
    _layer_type: Callable[..., tuple[torch.Tensor, ...]]
    _new_workspace: Callable[[Layout, int, torch.device], Any]
    _hidden_rows: tuple[int, Callable[[int], int]] | None = None

    layers: tuple[Any, ...]

    def __init__(
        self,
        batch: int,
        capacity: int,
        *,
        layers: int = 1,
        page_size: int | None = None,
        pages: int | None = None,
        max_new_tokens: int = 1,
        device: torch.device | str | None = None,
    ) -> None:
        check_whole("batch", batch, 1, 65535)
        check_whole("layers", layers, 1, 2**20)
        device = torch.empty(0, device=device).device
        self._check_sizes(capacity, max_new_tokens)
        table, own = None, None
        if page_size is not None:
            check_page_size(page_size)
            width = cdiv(capacity, page_size)
            if pages is not None:
                check_whole("pages", pages, 1, 2**31 - 1)
            own = Pages(batch, page_size, batch * width if pages is None else pages, width)
            table = torch.full((batch, width), -1, dtype=torch.int32, device=device)
        elif pages is not None:
            raise ValueError("pages: expected None for a contiguous cache; set page_size too")
        layout = Layout(batch, capacity, page_size or 0, table)
        shapes = shapes_of(self._kept, self._checks, layout, None if own is None else own.free)
        zeros = [
            [torch.zeros(shape, dtype=dtype, device=device) for shape, dtype in shapes.values()] for _ in range(layers)
        ]
        self._begin(layout, own, zeros, max_new_tokens, device)

    @classmethod
    def attach(
        cls,
        layers: Sequence[Mapping[str, torch.Tensor]],
        table: torch.Tensor,
        *,
        page_size: int,
        capacity: int | None = None,
        max_new_tokens: int = 1,
    ) -> Self:
        """Make a cache in memory that the caller owns, such as the pages of an inference engine.

        This allocates only the lengths and the workspace of decode. The caller allocates pages to sequences and writes
        their numbers into `table`. Before each step, call `assign` to say how many tokens each sequence holds. Every
        call reads `table` on the device, so one captured graph serves every batch. `fork` is not available: to share
        pages, the caller writes the same page numbers into two rows.

        Args:
            layers: for each layer, the tensors in `page_shapes` by name, each (pages, *shape) and contiguous. They are
                used in place, not copied.
            table: page numbers of each sequence (B, W), int32, contiguous. Entries after the last page in use are not
                read.
            page_size: tokens per page, one of 16, 32, 64, 128, 256.
            capacity: most tokens of a sequence; by default, as many as W pages hold.
            max_new_tokens: most tokens per sequence in a call of `nsa_decode`.

        Raises:
            TypeError, ValueError: naming the argument, what was expected and what came.
        """
        check_page_size(page_size)
        check_kind("table", table, "a tensor (B, W)")
        if table.dim() != 2 or table.dtype != torch.int32 or not table.is_contiguous() or not table.numel():
            raise ValueError(
                f"table: expected a contiguous int32 tensor (B, W), got {table.dtype} {tuple(table.shape)} of "
                f"strides {table.stride()}"
            )
        batch, width = table.shape
        capacity = width * page_size if capacity is None else capacity
        cache = cls.__new__(cls)
        cache._check_sizes(capacity, max_new_tokens)
        if capacity > width * page_size:
            raise ValueError(f"capacity: expected at most the {width * page_size} tokens of W pages, got {capacity}")
        if not isinstance(layers, Sequence) or not layers:
            raise ValueError(f"layers: expected the tensors of one layer or more, got {layers!r}")
        shapes = cls.page_shapes(page_size)
        held = [
            check_layer(f"layers[{number}]", layer, shapes, cls._checks, table.device)
            for number, layer in enumerate(layers)
        ]
        cache._begin(Layout(batch, capacity, page_size, table), None, held, max_new_tokens, table.device)
        return cache

    @classmethod
    def page_shapes(cls, page_size: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape (rows, heads, D) and dtype of one page of each tensor of a layer, by name."""
        check_page_size(page_size)
        return {
            name: (shape[1:], dtype)
            for name, (shape, dtype) in shapes_of(cls._kept, cls._checks, Layout(0, 0, page_size, None), 0).items()
        }

    def _check_sizes(self, capacity: int, max_new_tokens: int) -> None:
        check_whole("capacity", capacity, 1, 2**31 - 1)
        check_whole("max_new_tokens", max_new_tokens, 1, self._most_tokens)
        self._check_capacity(capacity)

    def _check_capacity(self, capacity: int) -> None:
        """Raise ValueError if the package cannot decode sequences of `capacity` tokens."""

    def _begin(
        self,
        layout: Layout,
        pages: Pages | None,
        layers: Sequence[Sequence[torch.Tensor]],
        max_new_tokens: int,
        device: torch.device,
    ) -> None:
        """Start with empty sequences; `pages` is None if the cache is contiguous or the caller owns the pages."""
        self.layout, self._pages = layout, pages
        kept, heads = self._kept.values(), self._checks.sizes["Hkv"]
        self.layers = tuple(self._layer_type(*each, *new_scales(kept, heads, device)) for each in layers)
        self.max_new_tokens, self.device = max_new_tokens, device
        self._hidden: torch.Tensor | None = None
        if self._hidden_rows is not None:
            width, most = self._hidden_rows
            shape = (layout.batch, most(max_new_tokens), heads, width)
            self._hidden = torch.zeros(shape, dtype=self._checks.dtype, device=device)
        self.workspace = self._new_workspace(layout, max_new_tokens, device)
        # The last `extend` made room for tokens [starts, lengths) of each sequence.
        self.starts, self.lengths, self.overflow = (
            torch.zeros(layout.batch, dtype=torch.int32, device=device) for _ in range(3)
        )
        self._tokens = [0] * layout.batch
        self._new: list[int] = [0] * layout.batch
        self._exact = True
        # Whether a captured graph contains a `truncate` with a tensor: each replay may then shorten sequences.
        self._graph_truncates = False

    @property
    def tokens(self) -> tuple[int, ...]:
        """Number of tokens of each sequence, from the host's records; an upper bound after `truncate` with a tensor."""
        return tuple(self._tokens)

    @property
    def exact(self) -> bool:
        """Whether the host knows the exact lengths; False after `truncate` with a tensor."""
        return self._exact

    @property
    def new_tokens(self) -> tuple[int, ...]:
        """Number of tokens per sequence that the last `extend` made room for, from the host's records."""
        return tuple(self._new)

    @property
    def free_pages(self) -> int:
        """Pages that no sequence uses; 0 for a contiguous cache."""
        return 0 if self._pages is None else self._pages.free

    # Growing

    def reserve(self, new_tokens: int | Sequence[int]) -> None:
        """Do the host's part of `extend`. Call it before each replay of a graph in which `extend` was captured.

        If the host does not know the exact lengths, it uses upper bounds. It reads the lengths from the device if the
        bounds leave no room, or if pages are shared, because a shared page must be copied before it is written.

        Raises:
            CapacityError: there is no room; the cache is unchanged.
        """
        new = self._counts("new_tokens", new_tokens)
        shortage = self._shortage(new)
        if not self._exact and (shortage or (self._pages is not None and self._pages.sharing)):
            self.synchronize()
            shortage = self._shortage(new)
        if shortage:
            raise CapacityError(f"new_tokens: {shortage}")
        if self._pages is not None:
            self._reserve_pages(new)
        self._new = list(new)
        self._tokens = [held + more for held, more in zip(self._tokens, new, strict=True)]
        self._exact = self._exact and not self._graph_truncates

    def extend(self, new_tokens: int | Sequence[int]) -> None:
        """Make room for new tokens: one number for all sequences, or a list with one number for each.

        0 leaves the length of a sequence unchanged. Call `write` in every layer afterwards. While a CUDA graph is
        captured, only an int is allowed.

        Raises:
            CapacityError: there is no room; the cache is unchanged.
        """
        if self._capturing():
            if not isinstance(new_tokens, int):
                raise TypeError("new_tokens: expected an int while a CUDA graph is captured, got one number a sequence")
            self._new = self._counts("new_tokens", new_tokens)
        else:
            self.reserve(new_tokens)
        counts, number = None, 0
        if isinstance(new_tokens, int):
            number = new_tokens
        else:
            counts = torch.tensor(self._new, dtype=torch.int32).to(self.device)
        self._operator("cache_extend")(self.starts, self.lengths, self.overflow, counts, number, *self._place())

    def assign(self, tokens: Sequence[int], new_tokens: Sequence[int]) -> None:
        """Set the number of tokens of each sequence of an attached cache, and how many of the last ones are new.

        New tokens are those that will be written. Use this instead of `extend`, `truncate` and `reset`: the batch may
        differ from that of the step before. A row without a sequence has 0 tokens. The numbers are copied to the
        device, and nothing is read from it.

        Raises:
            RuntimeError: the cache owns its memory, so it keeps its own records.
            CapacityError: a sequence has more tokens than `capacity`; the cache is unchanged.
        """
        if not self._is_attached:
            raise RuntimeError("assign: expected a cache in the caller's memory (`attach`); this one has its own")
        if self._capturing():
            raise RuntimeError("assign: lengths come from the host; call it before each replay, not while one captures")
        held, new = self._counts("tokens", tokens), self._counts("new_tokens", new_tokens)
        for sequence, (count, more) in enumerate(zip(held, new, strict=True)):
            if count > self.layout.capacity:
                raise CapacityError(
                    f"tokens: sequence {sequence} is to hold {count} of at most {self.layout.capacity} tokens"
                )
            if more > count:
                raise ValueError(f"new_tokens: expected at most the {count} tokens of sequence {sequence}, got {more}")
        starts = [count - more for count, more in zip(held, new, strict=True)]
        both = torch.tensor([starts, held], dtype=torch.int32).to(self.device)
        self.starts.copy_(both[0])
        self.lengths.copy_(both[1])
        self._tokens, self._new, self._exact = held, new, True

    # Writing

    def set_scales(self, layer: int = 0, **scales: torch.Tensor) -> None:
        """Set the scales of a layer's e4m3 codes, by the name of the tensor (`k`, `v`). The default is 1.

        A number x of KV head h is stored as the e4m3 code of x / scale[h], which saturates at 448. Set the scales
        before tokens are written, because existing codes are not converted. Replayed graphs read the current scales.

        Args:
            layer: index of the layer.
            scales: positive numbers (Hkv,), float32, on the cache's device.

        Raises:
            TypeError, ValueError: an argument is invalid; the message names it, what was expected and what it got. Any
                scale is an error in a package whose spec has no `cache: {dtype: e4m3}`.
        """
        held, names = self._layer(layer), [name for name, kept in self._kept.items() if kept.coded]
        for name, scale in scales.items():
            if name not in names:
                raise TypeError(f"{name}: expected scales of {', '.join(names) or 'nothing: the cache has no codes'}")
            sizes = (self._checks.sizes["Hkv"],)
            scale = self._checks.check_tensor(name, scale, ("Hkv",), sizes, device=self.device, dtype=torch.float32)
            both = torch.stack((scale.detach(), 1.0 / scale.detach()))
            held[len(self._kept)][names.index(name)].copy_(both)

    def _write(self, new: dict[str, torch.Tensor], parameters: tuple[torch.Tensor, ...] | None, layer: int) -> None:
        """Write the tensors of new tokens, by name, to a layer, and compress the blocks that they complete."""
        kept, sizes = self._layer(layer), self._checks.sizes
        first = next(iter(new))
        for name, tensor in new.items():
            check_kind(name, tensor, "a tensor (B, N, Hkv, D)")
            if tensor.dim() != 4:
                raise ValueError(f"{name}: expected a tensor (B, N, Hkv, D), got shape {tuple(tensor.shape)}")
            as_kept = self._kept[name]
            rows = new["k_cmp" if as_kept.blocks else first].shape[1]
            shape = (self.layout.batch, rows, sizes[as_kept.heads], sizes[as_kept.dim])
            dims = ("B", "N", as_kept.heads, "D")
            new[name] = self._checks.check_tensor(name, tensor, dims, shape, device=self.device)
        rows, most = new[first].shape[1], max(self._new)
        if most > rows and not self._kept[first].blocks:
            raise ValueError(f"{first}: expected at least the {most} tokens that `extend` made room for, got {rows}")
        learned = self._checks.check_parameters(parameters, new[first]) if self._checks.parameters else ()
        with torch.no_grad():
            self._operator("cache_write")(
                [tensor.detach() for tensor in new.values()],
                list(kept),
                [tensor.detach().contiguous() for tensor in learned],
                self._hidden,
                self.starts,
                self.lengths,
                *self._place(),
            )

    # Shrinking, copying

    def truncate(self, tokens: int | Sequence[int] | torch.Tensor) -> None:
        """Keep at most `tokens` tokens of each sequence, for example to reject drafted tokens.

        `tokens` is one number for all sequences, a list with one number for each, or a tensor (B,) int32 on the cache's
        device. The host does not read the tensor: the property `tokens` is then an upper bound, and pages are not
        freed, until `synchronize` or until `extend` finds no room. No token counts as new until the next `extend`.
        """
        if isinstance(tokens, torch.Tensor):
            self._checks.check_tensor(
                "tokens", tokens, ("B",), (self.layout.batch,), device=self.device, dtype=torch.int32
            )
            self.lengths.copy_(torch.minimum(self.lengths, tokens.clamp(min=0)))
            self._exact = False
            self._graph_truncates = self._graph_truncates or self._capturing()
        else:
            kept = self._counts("tokens", tokens)
            self._tokens = [min(held, most) for held, most in zip(self._tokens, kept, strict=True)]
            self.lengths.copy_(torch.minimum(self.lengths, torch.tensor(kept, dtype=torch.int32).to(self.device)))
            self._shrink_pages(range(self.layout.batch))
        self.starts.copy_(self.lengths)
        self._new = [0] * self.layout.batch

    def reset(self, sequence: int | None = None) -> None:
        """Clear one sequence, or all if None, and its record that a replayed graph found no room."""
        if sequence is not None:
            self._check_sequence("sequence", sequence)
        forgotten = range(self.layout.batch) if sequence is None else range(sequence, sequence + 1)
        for counts in (self.lengths, self.starts, self.overflow):
            counts[forgotten.start : forgotten.stop].zero_()
        for number in forgotten:
            self._tokens[number] = self._new[number] = 0
        self._exact = self._exact or sequence is None
        self._shrink_pages(forgotten)

    def fork(self, source: int, target: int, tokens: int | None = None) -> None:
        """Make sequence `target` start with the first `tokens` tokens of `source`, or with all of them if None.

        A paged cache shares the pages; a page is copied when one of its sequences first writes to it. The pages that
        `target` had are freed.
        """
        if self._is_attached:
            raise RuntimeError("fork: the pages are the caller's; let two rows of the table name them")
        self._check_sequence("source", source)
        self._check_sequence("target", target)
        if not self._exact:
            self.synchronize()
        held = self._tokens[source]
        tokens = held if tokens is None else tokens
        check_whole("tokens", tokens, 0, held)
        if source == target:
            raise ValueError(f"target: expected another sequence than source, got {target} for both")
        if self._pages is not None:
            self._pages.shrink(target, 0)
            self._pages.share(source, target, tokens)
            self._write_table()
        else:
            for tensor in self._rows():
                tensor[target, :tokens].copy_(tensor[source, :tokens])
        self._tokens[target] = tokens
        self._new[target] = 0
        self.lengths[target : target + 1].fill_(tokens)
        self.starts[target : target + 1].fill_(tokens)

    def synchronize(self) -> None:
        """Wait for the device, read the lengths from it, and free pages beyond them.

        Raises:
            CapacityError: `reserve` was not called, and a replayed graph found no room; the message names the
            sequences.
            RuntimeError: a CUDA graph is being captured, during which lengths cannot be read.
        """
        if self._capturing():
            raise RuntimeError(
                "cache: no length can be read from the device while a CUDA graph is captured; call synchronize() before"
            )
        lengths, overflow = self.lengths.tolist(), self.overflow.tolist()
        self._tokens, self._exact = lengths, True
        self._new = (self.lengths - self.starts).tolist()
        self._shrink_pages(range(self.layout.batch))
        if any(overflow):
            self.overflow.zero_()
            full = ", ".join(str(sequence) for sequence, flag in enumerate(overflow) if flag)
            raise CapacityError(f"sequences {full}: no room was found on the device; call reserve before each replay")

    # The host's records

    @property
    def _is_attached(self) -> bool:
        return self._pages is None and self.layout.table is not None

    def _capturing(self) -> bool:
        return self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()

    def _shortage(self, new: Sequence[int]) -> str:
        """Reason why there is no room for new tokens, from the host's records; "" if there is room."""
        capacity = self.layout.capacity
        for sequence, (held, more) in enumerate(zip(self._tokens, new, strict=True)):
            if held + more > capacity:
                return f"sequence {sequence} holds {held} of at most {capacity} tokens; no room for {more} more"
        if self._pages is not None:
            needed = self._pages.needed(self._growing(new))
            if needed > self._pages.free:
                return f"{needed} pages of {self._pages.page_size} tokens needed, {self._pages.free} are free"
        return ""

    def _growing(self, new: Sequence[int]) -> list[tuple[int, int, int]]:
        """(sequence, tokens held, tokens wanted) of the sequences that get new tokens."""
        return [(b, held, held + more) for b, (held, more) in enumerate(zip(self._tokens, new, strict=True)) if more]

    def _rows(self) -> Iterator[torch.Tensor]:
        """The tensors of tokens and blocks of all layers."""
        for layer in self.layers:
            yield from layer[: len(self._kept)]

    def _layer(self, layer: int) -> tuple[torch.Tensor, ...]:
        check_whole("layer", layer, 0, len(self.layers) - 1)
        return self.layers[layer]

    def _place(self) -> tuple[torch.Tensor | None, int, int]:
        """Page table, capacity and page size: the last arguments of the cache operators."""
        return self.layout.table, self.layout.capacity, self.layout.page_size

    def _counts(self, name: str, counts: int | Sequence[int]) -> list[int]:
        """Expand `counts` to one number per sequence, and check them."""
        if not isinstance(counts, (int, Iterable)):
            raise TypeError(f"{name}: expected whole numbers, got {type(counts).__name__} {counts!r}")
        each = [counts] * self.layout.batch if isinstance(counts, int) else list(counts)
        if len(each) != self.layout.batch:
            batch = self.layout.batch
            raise ValueError(f"{name}: expected a number, or one for each of {batch} sequences, got {len(each)}")
        for count in each:
            check_whole(name, count, 0, 2**31 - 1)
        return each

    def _check_sequence(self, name: str, sequence: int) -> None:
        check_whole(name, sequence, 0, self.layout.batch - 1)

    def _reserve_pages(self, new: Sequence[int]) -> None:
        assert self._pages is not None
        for sequence, held, wanted in self._growing(new):
            copied = self._pages.grow(sequence, held, wanted)
            if copied is not None:
                for tensor in self._rows():
                    tensor[copied[1]].copy_(tensor[copied[0]])
        self._write_table()

    def _shrink_pages(self, sequences: Sequence[int]) -> None:
        if self._pages is None:
            return
        for sequence in sequences:
            self._pages.shrink(sequence, self._tokens[sequence])
        self._write_table()

    def _write_table(self) -> None:
        assert self._pages is not None and self.layout.table is not None
        for sequence, pages in self._pages.changes():
            self.layout.table[sequence].copy_(torch.tensor(pages, dtype=torch.int32))
