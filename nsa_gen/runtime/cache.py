"""A cache of keys and values, and what it knows of its sequences: lengths, pages, room for more."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Self

import torch

from .arguments import Arguments, check_kind, check_whole
from .pages import CapacityError, Pages
from .sizes import cdiv
from .storage import Kept, Layout, check_layer, check_page_size, new_scales, shapes_of


class Cache:
    """The tensors of a cache, the host's books of it, and the lengths on the device; see a package's `NSACache`.

    A package's own are `write`, which names what new tokens have, and what follows here: checks, operators, most tokens
    that one call decodes, the tensors of a layer and its type, what makes the workspace of decode, and the width of an
    mlp's hidden rows with how many of them new tokens may have.
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
        """A cache in memory that the caller owns, as an inference engine does, with pages that the caller gives out.

        Lengths and the workspace of decode are allocated, nothing else. `assign` says before each step what the
        sequences of the batch hold; the caller writes the numbers of their pages into `table`, which each call reads on
        the device, so that a captured graph serves every batch. `fork` is the caller's, by equal numbers in two rows.

        Args:
            layers: of each layer the tensors that `page_shapes` names, each (pages, *shape), contiguous; kept as they
                are.
            table: numbers of the pages of each sequence (B, W), int32, contiguous; those behind a sequence's tokens
                are not followed.
            page_size: tokens of a page, one of 16, 32, 64, 128, 256.
            capacity: most tokens of a sequence; what W pages hold if None.
            max_new_tokens: most tokens of a sequence that `nsa_decode` is called with.

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
        """What a page of a layer holds by name: (rows, heads, D) and the dtype, raw and compressed."""
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
        """Raise where a package cannot decode sequences of so many tokens."""

    def _begin(
        self,
        layout: Layout,
        pages: Pages | None,
        layers: Sequence[Sequence[torch.Tensor]],
        max_new_tokens: int,
        device: torch.device,
    ) -> None:
        """Begin with no token; `pages` are the cache's own, which None gives out where the memory is the caller's."""
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
        # Tokens [starts, lengths) of each sequence are those that the last `extend` made room for.
        self.starts, self.lengths, self.overflow = (
            torch.zeros(layout.batch, dtype=torch.int32, device=device) for _ in range(3)
        )
        self._tokens = [0] * layout.batch
        self._new: list[int] = [0] * layout.batch
        self._exact = True
        # Whether a captured graph has a `truncate` with a tensor, so that each replay may shorten sequences.
        self._graph_truncates = False

    @property
    def tokens(self) -> tuple[int, ...]:
        """Tokens of each sequence, as the host knows them; an upper bound after `truncate` with a tensor."""
        return tuple(self._tokens)

    @property
    def exact(self) -> bool:
        """Whether the host knows the lengths; not after `truncate` with a tensor."""
        return self._exact

    @property
    def new_tokens(self) -> tuple[int, ...]:
        """Tokens of each sequence that the last `extend` made room for, as the host knows them."""
        return tuple(self._new)

    @property
    def free_pages(self) -> int:
        """Pages that no sequence uses; 0 for a contiguous cache."""
        return 0 if self._pages is None else self._pages.free

    # Growing

    def reserve(self, new_tokens: int | Sequence[int]) -> None:
        """The host's part of `extend`: to be called before each replay of a graph that has the device's.

        Where the host does not know the lengths it goes by upper bounds, and reads them where these leave no room, or
        where pages are shared: a page is copied in time.

        Raises:
            CapacityError: there is no room; the cache is as it was.
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
        """Make room for new tokens, a number for all sequences or one for each; 0 leaves a sequence alone.

        Their keys and values must be written (`write`) in every layer. Under capture of a graph an int is expected.

        Raises:
            CapacityError: there is no room; the cache is as it was.
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
        """Say what each sequence of an attached cache holds, and how many of its last tokens are new, to be written.

        It takes the place of `extend`, `truncate` and `reset`: the batch may be another one than a step before. A row
        without a sequence has 0 tokens. The numbers are copied to the device, and nothing is read there.

        Raises:
            RuntimeError: the cache has memory of its own, so that its books say what it holds.
            CapacityError: a sequence has more tokens than `capacity`; the cache is as it was.
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
        """Set the scales of a layer's codes, by the name of what they are of (`k`, `v`); 1 before.

        A number x of KV head h is kept as the e4m3 code of x / scale[h], which saturates at 448. To be called before
        tokens are written: what the layer holds keeps its codes. Graphs read the scales anew.

        Args:
            layer: number of the layer.
            scales: positive numbers (Hkv,), float32, on the cache's device.

        Raises:
            TypeError, ValueError: naming the argument, what was expected and what came; a package whose cache has no
                codes (`cache: {dtype: e4m3}` of the spec) takes none.
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
        """Write what new tokens have, by name, to a layer, and compress what they complete."""
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
        """Keep at most so many tokens of each sequence, as when drafted tokens are rejected; one number, or one each.

        A tensor (B,) int32 on the cache's device is not read on the host: `tokens` is an upper bound afterwards, and
        pages are kept, until `synchronize`, or until `extend` finds no room. No token is new until the next `extend`.
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
        """Forget one sequence, or all of them, and whether a replayed graph found no room for it."""
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
        """Let sequence `target` begin with the first `tokens` tokens of `source`, with all of them if None.

        Paged, the pages are shared, and copied once one of the two writes to them; what `target` held is given back.
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
        """Read the lengths from the device, which waits for it, and give back pages beyond them.

        Raises:
            CapacityError: a replayed graph went on without `reserve` and found no room; names the sequences.
            RuntimeError: a CUDA graph is being captured, in which nothing can be read.
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

    # The host's books

    @property
    def _is_attached(self) -> bool:
        return self._pages is None and self.layout.table is not None

    def _capturing(self) -> bool:
        return self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()

    def _shortage(self, new: Sequence[int]) -> str:
        """Why there is no room for new tokens, as far as the host knows; "" if there is."""
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
        """What operators are told of the layout."""
        return self.layout.table, self.layout.capacity, self.layout.page_size

    def _counts(self, name: str, counts: int | Sequence[int]) -> list[int]:
        """One number a sequence."""
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
