"""What is measured: shapes of attention in models, lengths, and the tasks made of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from nsa_gen.spec import Spec

KIB = 1024


@dataclass(frozen=True)
class Task:
    """One measurement: contenders take turns on one sequence of one spec.

    Attributes:
        workload: the name that its rows carry.
        part: the part of a comparison to which it belongs.
        spec: the operator.
        tokens: length of the sequence.
        inputs: kind of inputs, see `nsa_gen.bench.inputs.draw_inputs`.
        contenders: names in `nsa_gen.bench.peers.CONTENDERS`; our own operator always comes first.
        passes: "forward", "backward".
        seconds: time for the timed rounds.
        profile: whether our kernels are profiled one by one.
        check: time nothing; verify our operator at a length that ends inside blocks, and compare the sparse contenders'
            outputs with ours.
    """

    workload: str
    part: str
    spec: Spec
    tokens: int
    inputs: str = "independent"
    contenders: tuple[str, ...] = ()
    passes: tuple[str, ...] = ("forward", "backward")
    seconds: float = 4.0
    profile: bool = False
    check: bool = False

    @property
    def label(self) -> str:
        """The task in words, for progress."""
        what = "checking" if self.check else f"{self.tokens:,} tokens, {self.inputs}"
        return f"{self.workload}: {what}"


def nsa_spec(name: str, query_heads: int, kv_heads: int, qk: int = 128, v: int = 128) -> Spec:
    """The NSA paper's setting with mean phi, bfloat16: l = 32, d = 16, l' = 64, n = 16 (1 + 2 forced), w = 512."""
    return Spec.model_validate(
        {
            "version": 1,
            "name": name,
            "heads": {"query": query_heads, "kv": kv_heads},
            "head_dim": {"qk": qk, "v": v},
            "dtype": "bfloat16",
            "compression": {"block": 32, "stride": 16, "phi": "mean"},
            "selection": {"block": 64, "count": 16, "initial": 1, "local": 2},
            "window": {"size": 512},
            "combine": {"gate": "sigmoid"},
        }
    )


@dataclass(frozen=True)
class Part:
    """A part of the comparison with other packages: specs by workload, at each length, with each kind of inputs.

    Our kernels are profiled at the lengths in `profiled`, with independent inputs.
    """

    name: str
    specs: Mapping[str, Spec]
    lengths: tuple[int, ...]
    inputs: tuple[str, ...] = ("independent",)
    profiled: tuple[int, ...] = ()


GROUPS = ((1, 8), (2, 8), (4, 8), (7, 4), (8, 4), (16, 4), (32, 4))
"""Group sizes of the sweep, each with its number of KV heads: 8 up to groups of 4 query heads, 4 beyond."""
GROUP_TOKENS = 32 * KIB
BREAK_EVEN_LENGTHS = (2 * KIB, 3 * KIB, 4 * KIB, 6 * KIB, 8 * KIB, 12 * KIB, 16 * KIB)


def _shape(query_heads: int, kv_heads: int) -> Spec:
    """The setting at head dim 128. Parts of the same shape share the spec, and so its check and its kernels."""
    return nsa_spec(f"bench_{query_heads}x{kv_heads}", query_heads, kv_heads)


def parts() -> dict[str, Part]:
    """The parts of the comparison, by name, in the order in which they run."""
    long = (32 * KIB, 64 * KIB, 8 * KIB, 128 * KIB)
    both = ("independent", "correlated")
    groups = {f"G{group}": _shape(group * kv, kv) for group, kv in GROUPS}
    even = {"even16": _shape(64, 4), "even4": _shape(32, 8)}
    found = (
        Part("A", {"A": _shape(64, 4)}, long, both, profiled=(8 * KIB, 64 * KIB)),
        Part("B", {"B": _shape(32, 8)}, long, both, profiled=(8 * KIB, 64 * KIB)),
        Part("C", {"C": _shape(16, 16)}, (32 * KIB, 8 * KIB), both, profiled=(32 * KIB,)),
        # The paper's head dims.
        Part("D", {"D": nsa_spec("bench_64x4_192", 64, 4, 192, 128)}, (64 * KIB, 8 * KIB), both, profiled=(64 * KIB,)),
        Part("groups", groups, (GROUP_TOKENS,)),
        Part("breakeven", even, BREAK_EVEN_LENGTHS),
    )
    return {part.name: part for part in found}


CHECK_TOKENS = 2 * KIB
"""The length at which other packages' outputs are compared with ours: most blocks are not selected there."""


def comparison_tasks(chosen: Iterable[Part], contenders: Sequence[str], *, seconds: float = 4.0) -> list[Task]:
    """The tasks of some parts of the comparison: first one check of each spec, then everything that is timed."""
    chosen, names = list(chosen), tuple(contenders)
    checks: dict[str, Task] = {}
    for part in chosen:
        for workload, spec in part.specs.items():
            check = Task(workload, part.name, spec, CHECK_TOKENS, contenders=names, check=True)
            checks.setdefault(spec.digest(), check)
    timed = [
        Task(workload, part.name, spec, tokens, kind, names, seconds=seconds, profile=profile)
        for part in chosen
        for kind in part.inputs
        for workload, spec in part.specs.items()
        for tokens in part.lengths
        for profile in [kind == "independent" and tokens in part.profiled]
    ]
    return [*checks.values(), *timed]


def spec_tasks(
    spec: Spec,
    *,
    lengths: Sequence[int],
    inputs: Sequence[str],
    contenders: Sequence[str],
    passes: Sequence[str],
    seconds: float = 4.0,
) -> list[Task]:
    """The tasks of one spec: a check, then each kind of inputs at each length. The longest one is profiled."""
    check = Task(
        spec.name, spec.name, spec, CHECK_TOKENS, contenders=tuple(contenders), passes=tuple(passes), check=True
    )
    timed = [
        replace(check, tokens=tokens, inputs=kind, seconds=seconds, profile=profile, check=False)
        for kind in inputs
        for tokens in lengths
        for profile in [tokens == max(lengths) and kind == inputs[0]]
    ]
    return [check, *timed]
