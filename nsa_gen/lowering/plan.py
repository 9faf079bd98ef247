"""The plan that lowering gives to rendering, the tuner and the cost model: frozen data, with every decision made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import sympy

from nsa_gen.lowering.branches import BACKWARD_ORDER
from nsa_gen.lowering.heads import HeadDim
from nsa_gen.lowering.inference import InferencePlan
from nsa_gen.lowering.overlap import Overlap
from nsa_gen.lowering.parts import (
    HOPPER_DQ,
    HOPPER_GATHER,
    HOPPER_GATHER_QUERIES,
    HOPPER_KEYS,
    HOPPER_LOCAL,
    HOPPER_ROWS,
    Argument,
    Config,
    Decision,
    Kernel,
    Output,
    Schedule,
    Step,
)
from nsa_gen.lowering.phi import CompressedSide
from nsa_gen.spec import Spec


@dataclass(frozen=True)
class Plan(InferencePlan):
    """A lowered spec: the steps in the order of the forward, and what they need. Rendering sees nothing else.

    ``spec`` is the spec that was lowered, for names, digests and the oracle; nothing here and no template reads it.
    ``dtype`` is that of q, keys, values and outputs. ``gate`` says how the caller gives gates: sigmoid (as logits),
    given (as values) or none. With ``kv_per_branch`` each branch has its own keys and values. With ``decodes`` there
    are a cache, prefill and decode; the cache stores raw keys and values in ``cache_dtype`` if that is not None. With
    ``rounds_operands`` the operands of tl.dot are rounded to tf32 first, because the matrix units would truncate them
    towards zero. ``hidden`` is the width of an mlp phi. ``phi_sides`` says how keys and values are compressed; it is
    empty if the package does not compress. ``decisions`` choose the steps' schedules and their sizes. ``upkeep`` has
    the kernels that belong to no step.
    """

    spec: Spec
    dtype: str
    gate: str
    query_heads: int
    kv_heads: int
    kv_per_branch: bool
    decodes: bool
    cache_dtype: str | None
    rounds_operands: bool
    hidden: int | None
    phi_sides: tuple[CompressedSide, ...]
    qk: HeadDim
    v: HeadDim
    group_rows: int
    list_rows: int
    selected_rows: int
    scale: float
    scale_log2: float
    overlap: Overlap | None
    steps: tuple[Step, ...]
    upkeep: tuple[Schedule, ...]
    arguments: tuple[Argument, ...]
    outputs: tuple[Output, ...]
    kernels: tuple[Kernel, ...]
    decisions: tuple[Decision, ...]
    sizes: Mapping[sympy.Symbol, int]
    defaults: Mapping[str, Mapping[str, Config]]

    log2_e: float = 1.4426950408889634
    ln_2: float = 0.6931471805599453

    def step(self, kind: str, branch: str = "") -> Step | None:
        """The step of this kind (an attend step also needs its branch), or None if there is none."""
        return next((step for step in self.steps if step.kind == kind and step.branch == branch), None)

    def writer(self, name: str) -> Step | None:
        """The step that writes a tensor of this name; None if no step does."""
        return next((step for step in self.steps if name in step.writes), None)

    @property
    def attends(self) -> tuple[Step, ...]:
        """Attend steps in the order of their gates."""
        found = (step for step in self.steps if step.kind == "attend")
        return tuple(sorted(found, key=lambda step: step.constants["GATE"] or 0))

    @property
    def branches(self) -> tuple[str, ...]:
        """Branches in the order of their gates."""
        return tuple(step.branch for step in self.attends)

    @property
    def compressed(self) -> Step | None:
        """The step of attention to compressed keys or, if they have no output, of their lse."""
        return self.writer("lse_cmp")

    @property
    def compressed_output(self) -> bool:
        """Compressed keys have values and a branch. Otherwise they are used only to choose blocks."""
        return "cmp" in self.branches

    @property
    def compressed_names(self) -> tuple[str, ...]:
        """Names of compressed keys and, if they have an output, values; empty without compression."""
        if self.compressed is None:
            return ()
        return ("k_cmp", "v_cmp") if self.compressed_output else ("k_cmp",)

    @property
    def selected(self) -> Step | None:
        """The step of attention to selected blocks; with joint branches, to these and the window."""
        return self.step("attend", "slc") or self.joint

    @property
    def windowed(self) -> Step | None:
        """The step of attention to a query's last keys; with joint branches, to these and selected blocks."""
        return self.step("attend", "win") or self.joint

    @property
    def joint(self) -> Step | None:
        """The step of attention to selected blocks and a query's last keys under one softmax."""
        return self.step("attend", "joint")

    @property
    def sinks(self) -> tuple[str, ...]:
        """Names of the arguments that are sinks, in the order of their branches."""
        return tuple(step.sink for step in self.attends if step.sink)

    def sink(self, branch: str) -> str:
        """Name of the sink of a branch's softmax; empty if the plan has no such branch, or the branch no sink."""
        step = self.step("attend", branch)
        return step.sink if step else ""

    def sunk(self, sink: str) -> str:
        """The branch to which one of the `sinks` belongs."""
        return next(step.branch for step in self.attends if step.sink == sink)

    @property
    def group(self) -> int:
        """Query heads that share a KV head."""
        return self.query_heads // self.kv_heads

    @property
    def scopes(self) -> int:
        """Selections of blocks per token (S)."""
        return self.selected.size("SCOPES") if self.selected else self.kv_heads

    @property
    def lists(self) -> int:
        """Lists of blocks that selected attention reads per token. A selection that all heads share is read by each."""
        return max(self.scopes, self.kv_heads)

    @property
    def shares_choice(self) -> bool:
        """Whether several KV heads share one selection."""
        return self.scopes < self.kv_heads

    @property
    def per_head(self) -> bool:
        """Whether the query heads of a KV head have different lists."""
        return self.lists > self.kv_heads

    @property
    def external(self) -> bool:
        """The caller passes the compressed keys and, if they have an output, values."""
        return self.compressed is not None and not self.compresses

    @property
    def gated(self) -> bool:
        """The operator takes gates."""
        combine = self.step("combine")
        return combine is not None and "gates" in combine.reads

    @property
    def combined(self) -> bool:
        """A combine step exists: gates, or several branches to add."""
        return self.step("combine") is not None

    @property
    def backward(self) -> bool:
        """Backward kernels are generated."""
        return any(step.gradients for step in self.steps)

    @property
    def compresses(self) -> bool:
        """The package computes compressed keys and, if they have an output, values. The caller does not pass them."""
        return self.writer("k_cmp") is not None

    @property
    def scores_means(self) -> bool:
        """The spec ranks blocks by their mean keys, not by compressed keys; also true if every slot is forced."""
        select = self.step("select")
        return select is not None and select.size("MEAN_SCORES") == 1

    @property
    def index_dim(self) -> int:
        """Elements of an index query or key (Di); 0 if no indexer scores the blocks."""
        select = self.step("select")
        return select.size("INDEX_DIM") if select else 0

    @property
    def index_names(self) -> tuple[str, ...]:
        """Names of the indexer's arguments; empty if no indexer scores the blocks."""
        return ("q_idx", "k_idx") if self.index_dim else ()

    @property
    def aligned(self) -> bool:
        """The package has the indexer's loss, which aligns it with attention."""
        return self.index_dim > 0 and self.backward

    @property
    def signed_scores(self) -> bool:
        """Scores come from mean keys or an indexer, so they may be negative. Negative scores still rank above NaN."""
        return self.scores_means or self.index_dim > 0

    @property
    def pools_by_maximum(self) -> bool:
        """A block's importance is the largest probability of the compressed blocks that overlap it, not the sum."""
        select = self.step("select")
        return select is not None and select.size("MAXIMUM") == 1

    @property
    def selects(self) -> bool:
        """The package computes the selection itself."""
        return self.step("select") is not None

    @property
    def local_in_window(self) -> bool:
        """The window's kernels can attend to the selected branch's local blocks."""
        return any(schedule.fuses for step in self.steps for schedule in step.schedules)

    @property
    def hopper(self) -> bool:
        """The package has the kernel of banded attention for Hopper."""
        return any(step.schedule(HOPPER_ROWS) for step in self.steps)

    @property
    def hopper_banded_backward(self) -> bool:
        """The package has the kernel of banded attention's dk and dv for Hopper."""
        return any(step.schedule(HOPPER_KEYS) for step in self.steps)

    @property
    def hopper_banded_dq(self) -> bool:
        """The package has the kernel of banded attention's dq for Hopper."""
        return any(step.schedule(HOPPER_DQ) for step in self.steps)

    @property
    def hopper_local(self) -> bool:
        """The kernels of the window for Hopper can attend to the selected branch's local blocks."""
        return any(step.schedule(HOPPER_LOCAL) for step in self.steps)

    @property
    def hopper_selected_forward(self) -> bool:
        """The package has the kernel of attention to selected blocks for Hopper."""
        return any(step.schedule(HOPPER_GATHER_QUERIES) for step in self.steps)

    @property
    def hopper_selected_backward(self) -> bool:
        """The package has the kernel of selected attention's gradients for Hopper."""
        return any(step.schedule(HOPPER_GATHER) for step in self.steps)

    @property
    def parameters(self) -> tuple[Argument, ...]:
        """Learned parameters of phi, in the order of the fields of CompressionParameters."""
        return tuple(argument for argument in self.arguments if argument.group == "compression")

    @property
    def tensors(self) -> tuple[Argument, ...]:
        """Arguments of the public function, except the parameters of phi."""
        return tuple(argument for argument in self.arguments if argument.group == "tensor")

    @property
    def differentiable(self) -> tuple[Argument, ...]:
        """Arguments that get a gradient, in order."""
        return tuple(argument for argument in self.arguments if argument.differentiable)

    @property
    def combine_formula(self) -> str:
        """Eq. 5 for the branches present, for a docstring."""
        gate = "g_{0} " if self.gated else ""
        return " + ".join(f"{gate}o_{{0}}".format(branch) for branch in self.branches)

    @property
    def choice(self) -> str:
        """How the blocks are chosen and which heads share them, for a docstring; empty without a selection."""
        if self.selected is None:
            return ""
        heads = {self.query_heads: "for each query head", 1: "for all heads together"}
        whom = {**heads, self.kv_heads: "for each KV head"}[self.scopes]
        if not self.selects:
            return f"given by the caller, {whom}"
        if self.index_dim:
            return f"chosen by an indexer, {whom}"
        pooled = "largest probability" if self.pools_by_maximum else "summed probabilities"
        return f"chosen by {'mean keys' if self.scores_means else f'the {pooled} of compressed keys'}, {whom}"

    def kv(self, branch: str) -> tuple[str, str]:
        """Names of the arguments that hold a branch's raw keys and values."""
        if branch == "cmp" and not self.compressed_output:
            # Such compressed keys score the selection's keys.
            branch = "slc"
        step = self.writer("k_cmp") if branch == "cmp" else self.step("attend", branch) or self.joint
        assert step is not None
        k, v = step.reads[:2] if step.kind == "pool" else step.reads[1:3]
        return k, v

    @property
    def raw_branches(self) -> tuple[str, ...]:
        """Branches that read raw keys and values: all except one whose compressed keys the caller passes."""
        return tuple(branch for branch in self.branches if branch != "cmp" or self.compresses)

    @property
    def raw_names(self) -> tuple[str, ...]:
        """Names of the raw key and value arguments, without repeats."""
        return tuple(dict.fromkeys(name for branch in self.raw_branches for name in self.kv(branch)))

    @property
    def tokens_kv(self) -> str:
        """Python expression for the number of key tokens."""
        return f"{self.raw_names[0]}.shape[1]" if self.raw_names else "q.shape[1]"

    def contributors(self, name: str) -> int:
        """How many branches add to the gradient of q or of a raw key or value argument."""
        return len(self.branches) if name == "q" else sum(name in self.kv(branch) for branch in self.raw_branches)

    @property
    def backward_branches(self) -> tuple[str, ...]:
        """Branches in the order of their backward."""
        return tuple(branch for branch in BACKWARD_ORDER if branch in self.branches)

    def starts_at_zero(self, name: str) -> bool:
        """Whether a raw key's or value's gradient, to which selection adds, has rows that no earlier branch writes."""
        writers = [branch for branch in self.raw_branches if name in self.kv(branch)]
        return "slc" in writers and "win" not in writers

    def sums_in_float32(self, name: str) -> bool:
        """Whether the parts of the gradient of q, or of a raw key or value, are summed in a separate float32 buffer.

        Selection sums the gradients of keys and values chunk by chunk, so it needs the buffer even if it is the only
        branch.
        """
        added = self.contributors(name) > 1 or (self.selected is not None and name in self.kv("slc"))
        return added and self.dtype != "float32"

    def gradient_sum(self, name: str) -> str:
        """Name of the buffer in which the gradient of q, or of a raw key or value, is summed."""
        return f"d{name}_sum" if self.sums_in_float32(name) else f"d{name}"

    def rounded_by_kernel(self, name: str) -> bool:
        """Whether one kernel adds the last part to such a sum and writes the rounded gradient.

        That is true of q, and of keys and values that are also compressed. If selection comes last, its chunks are
        added one by one, and torch rounds the sum.
        """
        compressed = self.compresses and self.compressed_output and name in self.kv("cmp")
        return self.sums_in_float32(name) and (name == "q" or compressed)

    @property
    def padded_outputs(self) -> tuple[tuple[str, str, str], ...]:
        """Outputs with one row per token: name, width of the row, and its value for tokens that pad a packed batch."""
        kinds = {
            "o": ("QUERY_HEADS * HEAD_DIM_V", "0.0"),
            "lse": ("QUERY_HEADS", 'float("-inf")'),
            "indices": ("SCOPES * SELECTION_COUNT", "-1"),
            "counts": ("SCOPES", "0"),
        }
        found = ((output.name, kinds.get(output.name.partition("_")[0])) for output in self.outputs)
        return tuple((name, *kind) for name, kind in found if kind is not None)

    @property
    def padded_gradients(self) -> tuple[tuple[str, str], ...]:
        """Gradients with one row per token: name and width of the row."""
        heads = {"q": "QUERY_HEADS * HEAD_DIM_QK", "k": "KV_HEADS * HEAD_DIM_QK", "v": "KV_HEADS * HEAD_DIM_V"}
        names = ("q", *self.raw_names, *(("gates",) if self.gated else ()))
        widths = heads | {"gates": f"QUERY_HEADS * {len(self.branches)}"}
        return tuple((f"d{name}", widths[name.partition("_")[0]]) for name in names)

    @property
    def saved_outputs(self) -> tuple[Output, ...]:
        """Outputs of the forward that the backward reads."""
        unused = {"o"} if self.combined else set()
        return tuple(output for output in self.outputs if output.name not in unused)

    def recomputed(self, branch: str) -> tuple[str, ...]:
        """Saved outputs of a branch that the backward may recompute instead; never the selection of blocks."""
        own = {f"o_{branch}", f"lse_{branch}"}
        if branch == "cmp" and self.compresses:
            own |= {"k_cmp", "v_cmp"} | {output.name for output in self.outputs if output.saved_by_phi}
        if branch in ("slc", "joint"):
            own |= {"sorted_keys", "sorted_slots"}
        return tuple(output.name for output in self.saved_outputs if output.name in own)

    def recomputed_by(self, output: Output) -> str:
        """The branch for which `output` may be recomputed, or "" if there is none."""
        return next((branch for branch in self.branches if output.name in self.recomputed(branch)), "")

    @property
    def schema_inputs(self) -> tuple[str, ...]:
        """Inputs of the whole operator. A question mark marks those that may be None."""
        names = (argument.name if argument.required else f"{argument.name}?" for argument in self.arguments)
        return (
            *names,
            "cu_seqlens?",
            *(f"{name}:{'str' if name == 'recompute' else 'int'}" for name in self.schema_constants),
        )

    @property
    def schema_constants(self) -> tuple[str, ...]:
        """Further inputs of the whole operator, on which the forward and backward of one call must agree."""
        chunk = ("chunk_tokens",) if self.selected else ()
        local = ("local_in_window",) if self.local_in_window else ()
        return (*chunk, *local, *(("recompute",) if self.backward else ()))

    @property
    def combine_inputs(self) -> tuple[str, ...]:
        """Inputs of the combination when it is called alone."""
        combine = self.step("combine")
        return combine.reads if combine else tuple(f"o_{branch}" for branch in self.branches)

    def runs(self, kernel: Kernel, target: str) -> bool:
        """Whether the operator launches a kernel on an architecture with the default schedules."""
        if kernel.choice is None:
            return kernel.whole
        choice, value = kernel.choice
        chosen = (self.defaults[target][decision.name].mapping() for decision in self.decisions)
        return any(values.get(choice) == value for values in chosen)

    def sizes_on(self, target: str) -> dict[sympy.Symbol, int]:
        """Values of the symbols with the default schedules of an architecture."""
        chosen = {name: value for each in self.decisions for name, value in self.defaults[target][each.name].values}
        return {symbol: chosen.get(symbol.name, value) for symbol, value in self.sizes.items()}

    def kernel(self, name: str) -> Kernel:
        """The kernel of this name; KeyError if the package has none."""
        for kernel in self.kernels:
            if kernel.name == name:
                return kernel
        raise KeyError(name)
