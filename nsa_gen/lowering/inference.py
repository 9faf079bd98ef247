"""What rendering reads of a plan about inference: the cache's tensors, and the launches and workspace of decode."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nsa_gen.lowering.decode_step import MOST_BLOCKS
from nsa_gen.lowering.heads import SMALLEST_TILE, power_of_two

if TYPE_CHECKING:
    from nsa_gen.lowering.heads import HeadDim
    from nsa_gen.lowering.overlap import Overlap
    from nsa_gen.lowering.parts import Kernel, Step

#: Elements of a block that are added up at a time, at most. A tile of these elements by the head dim is in registers.
_MOST_POOLED_ELEMENTS = 32
#: Floats of the parts that one program merges at a time.
_MERGED_FLOATS = 8192
#: The same if a step is one launch, where a program merges the parts of all branches together.
_STEP_FLOATS = 16384
#: Most programs per list if a step is one launch. In NSA's paper, a list has 25 tiles of selected blocks and window.
_STEP_SPLITS = 32


def _literal(names: tuple[str, ...]) -> str:
    """A tuple of names as Python source."""
    listed = ", ".join(f'"{name}"' for name in names)
    return f"({listed},)" if len(names) == 1 else f"({listed})"


class InferencePlan:
    """Properties of a `Plan` that the templates of cache, prefill and decode read. All are derived from its fields."""

    if TYPE_CHECKING:
        branches: tuple[str, ...]
        dtype: str
        kv_per_branch: bool
        v: HeadDim
        overlap: Overlap | None
        compressed: Step | None
        compressed_output: bool
        compressed_names: tuple[str, ...]
        selected: Step | None
        compresses: bool
        external: bool
        decodes: bool
        cache_dtype: str | None
        query_heads: int
        scopes: int
        selects: bool
        scores_means: bool
        index_dim: int
        signed_scores: bool
        pools_by_maximum: bool
        combined: bool
        raw_names: tuple[str, ...]

        kernels: tuple[Kernel, ...]

        def kernel(self, name: str) -> Kernel: ...

        def step(self, kind: str, branch: str = "") -> Step | None: ...

        def kv(self, branch: str) -> tuple[str, str]: ...

    # The cache

    @property
    def quantized(self) -> bool:
        """The cache holds raw keys and values as 8-bit codes."""
        return self.cache_dtype is not None

    @property
    def cache_names(self) -> tuple[str, ...]:
        """Names of the tensors of one layer of the cache, in order."""
        scored = ("mean_keys",) if self.decode_means else ("k_idx",) if self.index_dim else ()
        return (*self.raw_names, *self.compressed_names, *scored)

    @property
    def cache_pairs(self) -> tuple[tuple[str, str], ...]:
        """Names of raw keys and values, in pairs. If the package compresses, it compresses the first pair."""
        return tuple(zip(self.raw_names[::2], self.raw_names[1::2], strict=True))

    @property
    def append_names(self) -> tuple[str, ...]:
        """Names of the tensors that the caller passes for new tokens."""
        compressed = self.compressed_names if self.external else ()
        return (*self.raw_names, *compressed, *(("k_idx",) if self.index_dim else ()))

    def head_dim(self, name: str) -> str:
        """Name of the head dim of a cached tensor: Dk for keys, Dv for values, Di for index keys."""
        if name == "k_idx":
            return "Di"
        return "Dk" if name in (*self.raw_names[::2], "k_cmp", "mean_keys") else "Dv"

    @property
    def pooled_elements(self) -> int:
        """Elements of a block that are added up at a time: a power of two that divides the block."""
        assert self.compressed is not None
        block = self.compressed.size("BLOCK")
        return min(block & -block, _MOST_POOLED_ELEMENTS)

    # Decode

    @property
    def free_blocks(self) -> int:
        """Slots of a list that are not forced: the highest-ranked blocks fill them."""
        select = self.step("select")
        return select.size("COUNT") - select.size("INITIAL") - select.size("LOCAL") if select else 0

    @property
    def decode_selects(self) -> bool:
        """Decode ranks blocks by importance or by scores."""
        return self.free_blocks > 0

    @property
    def decode_means(self) -> bool:
        """Decode ranks blocks by their mean keys, which the cache holds."""
        return self.decodes and self.decode_selects and self.scores_means

    @property
    def decode_scores(self) -> bool:
        """Decode ranks blocks by scores that it computes from cached mean keys or index keys."""
        return self.decodes and self.decode_selects and self.signed_scores

    @property
    def decode_importance(self) -> bool:
        """Decode ranks blocks by importance, which attention to the compressed keys computes."""
        return self.decode_selects and not self.signed_scores

    @property
    def decode_maxima(self) -> bool:
        """Decode ranks blocks by their largest compressed probability."""
        return self.decode_importance and self.pools_by_maximum

    @property
    def largest_share(self) -> int:
        """The most selection blocks in a tile, which one program ranks at once."""
        (tiles,) = (each for each in self.kernel("decode_select").tunables if each.name == "BLOCK_TILE")
        return tiles.values[-1]

    @property
    def decode_shares(self) -> bool:
        """Selection and window read the same keys, so a tile that both need is loaded once."""
        return {"slc", "win"} <= set(self.branches) and not self.kv_per_branch

    @property
    def decode_finishes_early(self) -> bool:
        """Compressed attention is the only branch, so its merge is the last launch."""
        return self.branches == ("cmp",)

    @property
    def decode_raw_names(self) -> tuple[str, ...]:
        """Names of the raw keys and values that decode's attention to uncompressed keys reads, without repeats."""
        branches = [branch for branch in self.branches if branch != "cmp"]
        return tuple(dict.fromkeys(name for branch in branches for name in self.kv(branch)))

    @property
    def decode_steps(self) -> bool:
        """Decode also has a kernel with all steps, for few sequences and short contexts."""
        return any(kernel.name == "decode_step" for kernel in self.kernels)

    @property
    def decode_launches(self) -> str:
        """The number of launches in a decode step, in words."""
        compressed = self.compressed is not None
        count = compressed + (compressed or self.decode_selects) + (self.branches != ("cmp",))
        found = {1: "one launch", 2: "two launches", 3: "three launches"}[count]
        return f"one launch or {found.removesuffix(' launches')}" if self.decode_steps else found

    @property
    def candidates(self) -> int:
        """Candidates from each tile of blocks: free slots, padded to a power of two, but at most the largest tile."""
        return min(power_of_two(self.free_blocks), self.largest_share)

    @property
    def scope_rows(self) -> int:
        """Query heads that share one selection of blocks, padded to a power of two."""
        return power_of_two(self.query_heads // self.scopes)

    @property
    def list_slots(self) -> int:
        """Slots of a list, padded to a power of two."""
        assert self.selected is not None
        return power_of_two(self.selected.size("COUNT"))

    @property
    def before_keys(self) -> int:
        """Compressed blocks that are read before a tile because they reach into it; a product needs at least 16."""
        assert self.overlap is not None
        return max(SMALLEST_TILE, power_of_two(-self.overlap.first))

    @property
    def merged_floats(self) -> int:
        """Floats of parts that one program merges at a time."""
        return _MERGED_FLOATS

    @property
    def most_compressed_splits(self) -> int:
        """Parts of a row that one program merges at a time, at most."""
        return _MERGED_FLOATS // power_of_two(self.v.size)

    @property
    def most_step_blocks(self) -> int:
        """Most selection blocks of a cache for which a step is one launch."""
        return MOST_BLOCKS

    @property
    def most_step_splits(self) -> int:
        """Most programs that share a list if a step is one launch. One program merges their parts of all branches."""
        return min(_STEP_SPLITS, _STEP_FLOATS // (power_of_two(len(self.branches)) * power_of_two(self.v.size)))

    @property
    def step_floats(self) -> int:
        """Floats of parts that one program of a step in one launch merges at a time."""
        return _STEP_FLOATS

    @property
    def decode_outputs(self) -> tuple[str, ...]:
        """Names of what decode and prefill compute besides o: outputs and lse of the branches, and the selection."""
        branches = tuple(name for branch in self.branches for name in (f"o_{branch}", f"lse_{branch}"))
        return (*branches, *(("indices", "counts") if self.selects else ()))

    @property
    def decode_outputs_literal(self) -> str:
        """`decode_outputs` as a Python tuple."""
        return _literal(self.decode_outputs)

    @property
    def prefill_outputs(self) -> tuple[tuple[str, str, str, str], ...]:
        """o and `decode_outputs`: name, dims, dtype, and (as Python source) the value in a row that sees no key."""
        kinds = {
            "o": ("B Tq Hq Dv", "", "0.0"),
            "lse": ("B Tq Hq", "float32", 'float("-inf")'),
            "indices": ("B Tq S n", "int32", "-1"),
            "counts": ("B Tq S", "int32", "0"),
        }
        return tuple((name, *kinds[name.partition("_")[0]]) for name in ("o", *self.decode_outputs))

    @property
    def workspace_fields(self) -> tuple[tuple[str, str], ...]:
        """Tensors of the decode workspace, each with a description for a comment."""
        return tuple((name, meaning) for name, meaning, _ in self._workspace())

    @property
    def workspace_sizes(self) -> tuple[tuple[str, str], ...]:
        """Tensors of the decode workspace, each with its allocation as Python source."""
        return tuple((name, allocation) for name, _, allocation in self._workspace())

    def _workspace(self) -> list[tuple[str, str, str]]:
        dtype = f"torch.{self.dtype}"
        found = []
        if self.compressed:
            splits = "MOST_COMPRESSED_SPLITS"
            if self.compressed_output:
                found.append(("compressed_parts", "(rows, splits, Dv) fp32", f"floats(rows, {splits}, DV)"))
            found += [
                ("compressed_max", "(rows, splits) fp32, base 2", f"floats(rows, {splits})"),
                ("compressed_sum", "(rows, splits) fp32", f"floats(rows, {splits})"),
            ]
        if self.decode_importance:
            found += [
                (
                    "importance",
                    "(rows, compressed blocks) fp32, relative to `reference`",
                    "floats(rows, blocks * BLOCKS_PER_SELECTION)",
                )
                if self.decode_maxima
                else ("importance", "(rows, selection blocks) fp32, relative to `reference`", "floats(rows, blocks)"),
                ("reference", "(rows, tiles) fp32, the maximum of each tile", "floats(rows, tiles)"),
            ]
        if self.decode_selects:
            slots = "layout.batch * tokens * SCOPES, named_tiles, CANDIDATES"
            found += [
                ("values", "(choices, tiles, candidates) fp32", f"floats({slots})"),
                ("candidates", "(choices, tiles, candidates) int32",
                 f"torch.empty({slots}, dtype=torch.int32, device=device)"),
            ]  # fmt: skip
        if self.branches != ("cmp",):
            branches = len([branch for branch in self.branches if branch != "cmp"])
            parts = f"{branches} * lists * MOST_ATTEND_SPLITS"
            if self.decode_steps:
                # A step in one launch has parts of all branches, from no more programs than there are multiprocessors.
                parts = f"max({parts}, {len(self.branches)} * configs.multiprocessors(device))"
            found += [
                ("parts", "(branches * lists * splits, heads, Dv) fp32", f"floats({parts}, HQ // LISTS, DV)"),
                ("max_parts", "(branches * lists * splits, heads) fp32, base 2", f"floats({parts}, HQ // LISTS)"),
                ("sum_parts", "(branches * lists * splits, heads) fp32", f"floats({parts}, HQ // LISTS)"),
                ("counters", "(lists,) int32, 0 between calls", "torch.zeros(lists, dtype=torch.int32, device=device)"),
            ]
        if self.decode_steps:
            found += [
                ("sums", "(lists, selection blocks) fp32, importance summed over heads", "floats(lists, blocks)"),
                ("arrivals", "(lists, 3) int32, the first two 0 between calls",
                 "torch.zeros(lists, 3, dtype=torch.int32, device=device)"),
            ]  # fmt: skip
        for branch in self.branches:
            output = f"torch.empty(*outputs, DV, dtype={dtype}, device=device)"
            found += [
                (f"o_{branch}", "(B, N, Hq, Dv)", output),
                (f"lse_{branch}", "(B, N, Hq) fp32", "floats(*outputs)"),
            ]
        if self.selects:
            lists = "layout.batch, tokens, SCOPES"
            found += [
                ("indices", "(B, N, S, n) int32",
                 f"torch.empty({lists}, SELECTION_COUNT, dtype=torch.int32, device=device)"),
                ("counts", "(B, N, S) int32", f"torch.empty({lists}, dtype=torch.int32, device=device)"),
            ]  # fmt: skip
        return found
