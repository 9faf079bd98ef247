"""What a plan consists of: arguments and outputs, kernels with their tunables and costs, schedules and steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

import sympy

from nsa_gen.hardware import TARGETS
from nsa_gen.lowering.branches import sink_name

INTERPRETER = "interpreter"
"""The table of default configurations has one entry an architecture, and this one for Triton's interpreter."""

HOPPER_ROWS, HOPPER_DQ, HOPPER_KEYS = "hopper_rows", "hopper_dq", "hopper_keys"
HOPPER_GATHER, HOPPER_GATHER_QUERIES = "hopper_gather", "hopper_gather_queries"
"""Schedules for Hopper, in Gluon: banded attention's forward, dq, and dk and dv, and gradients of selected blocks."""

BRANCH_NAMES = {
    "cmp": "compression",
    "slc": "selection",
    "win": "window",
    "joint": "selection and window",
    "all": "every branch",
}
"""What people call the branches of kernels; "all" are kernels of every branch."""


@dataclass(frozen=True)
class Argument:
    """A tensor that the operator takes.

    ``dims`` are symbolic: ``("B", "Tq", "Hq", "Dk")``. ``dtype`` is ``"spec"`` or torch's name of one. ``group`` is
    ``"tensor"`` for arguments of the public function and ``"compression"`` for fields of CompressionParameters.
    ``differentiable`` arguments get a gradient.
    """

    name: str
    dims: tuple[str, ...]
    dtype: str = "spec"
    required: bool = True
    group: str = "tensor"
    differentiable: bool = True


@dataclass(frozen=True)
class Output:
    """A tensor that the forward operator returns and the backward may read.

    ``dims`` are symbolic, as those of an `Argument`: ``n`` are the blocks that a query selects, ``Nc`` the compressed
    rows of a call and ``slots`` those of an inverted index. ``dtype`` is ``"spec"``, ``"float32"`` or ``"int32"``.
    ``auxiliary`` ones are shown to users by ``return_aux``; ``saved_by_phi`` ones are phi's own.
    """

    name: str
    dims: tuple[str, ...]
    dtype: str = "spec"
    auxiliary: bool = True
    saved_by_phi: bool = False


@dataclass(frozen=True)
class Tunable:
    """A ``tl.constexpr`` argument of a kernel, or num_warps / num_stages, and the values worth trying.

    No other value is legal, unless it is a ``size``: then every number from ``least`` to the largest value is.
    """

    name: str
    values: tuple[int, ...]
    size: bool = False
    least: int = 1

    @property
    def legal(self) -> tuple[int, ...] | range:
        """Every value that does not break the kernel."""
        return range(self.least, max(self.values) + 1) if self.size else self.values


@dataclass(frozen=True)
class Resources:
    """Symbolic use of one program of a kernel, over its tunables and the sizes of the spec.

    ``shared_memory`` is in bytes; ``registers`` counts 32-bit values that must be alive together; ``flops`` is what
    the matrix units execute for the whole launch, padding and masked tile edges included; ``traffic`` is the bytes
    that all programs read and write, mostly through L2. ``streamed`` is the rows of the tile that one step of the
    inner loop brings in: each step costs some time whatever its size. ``height`` is the rows of the products: the
    matrix units of Hopper and Blackwell take 64 at a time. ``programs`` is how many programs there are, where they may
    be too few, or too unequal, to fill a device. ``memory`` is the bytes, besides ``traffic``, that no cache holds.
    ``tensor_memory`` is the columns of Blackwell's tensor memory, where they may run out.
    """

    shared_memory: sympy.Expr
    registers: sympy.Expr
    flops: sympy.Expr
    traffic: sympy.Expr
    streamed: sympy.Expr
    height: sympy.Expr
    programs: sympy.Expr = sympy.oo
    memory: sympy.Expr = sympy.S.Zero
    tensor_memory: sympy.Expr = sympy.S.Zero

    @property
    def symbols(self) -> set[sympy.Symbol]:
        """Symbols that any of these depends on."""
        return set().union(*(getattr(self, field.name).free_symbols for field in fields(self)))


@dataclass(frozen=True)
class Kernel:
    """A kernel of the package: where it lives, what it is for, and the space the tuner may search.

    ``useful_flops`` and ``compulsory_bytes`` are those that no schedule avoids; they give the floor. A kernel that is
    not ``whole`` runs only when a step of the operator is called alone, or in packed calls; one with a ``choice``
    (name, value) only where that choice of schedule is in force. ``function`` names, without its "_kernel",
    the function that it is a specialisation of: compilers and profilers know each specialisation by ``name``.
    """

    name: str
    module: str
    branch: str
    direction: str
    purpose: str
    schedule: str
    tunables: tuple[Tunable, ...]
    constraints: tuple[sympy.Basic, ...]
    resources: Resources
    useful_flops: sympy.Expr
    compulsory_bytes: sympy.Expr
    whole: bool = True
    choice: tuple[str, int] | None = None
    function: str = ""

    def __post_init__(self) -> None:
        """A kernel is a function of its own unless it says otherwise."""
        object.__setattr__(self, "function", self.function or self.name)


@dataclass(frozen=True)
class Decision:
    """What is decided for several kernels of a branch together: which of them run, and on how much at a time.

    It changes nothing on other architectures than ``targets``, nor in other passes than ``passes``.
    """

    name: str
    tunables: tuple[Tunable, ...]
    targets: tuple[str, ...] = TARGETS
    passes: tuple[str, ...] = ("forward", "backward")

    @property
    def choices(self) -> tuple[str, ...]:
        """Those of the tunables that decide between two ways; the others are sizes."""
        return tuple(tunable.name for tunable in self.tunables if tunable.values == (0, 1))


@dataclass(frozen=True)
class Config:
    """Values of the tunables of a kernel, num_warps and num_stages included, or of a schedule."""

    kernel: str
    values: tuple[tuple[str, int], ...]

    def mapping(self) -> dict[str, int]:
        """The values by name."""
        return dict(self.values)


@dataclass(frozen=True)
class Schedule:
    """One way to run a step.

    ``kernels`` names those it launches; a kernel that two schedules share is named by both, and Gluon's, which have no
    tunables, by none. ``targets`` are the architectures that it is compiled for. ``decided_by`` is a tunable of a
    `Decision` and the value that asks for this schedule, or None where the tunable is a number of tokens. ``fuses``
    names steps of whose work the schedule does a part.
    """

    name: str
    kernels: tuple[str, ...]
    targets: tuple[str, ...] = (*TARGETS, INTERPRETER)
    decided_by: tuple[str, int | None] | None = None
    fuses: tuple[str, ...] = ()


@dataclass(frozen=True)
class Step:
    """One step of the operator, with its tensors by name.

    ``kind`` is pool, score, select, attend or combine. ``gradients`` are those of ``reads`` that get one; ``saved`` are
    those of ``writes`` that its backward reads. An attend step reads q, keys and values first, in this order, and has
    the ``branch`` whose output it is; the constant GATE is the branch's place in the combination, SINK says whether its
    softmax has a `sink`, SCOPES how many choices of blocks a token has.
    """

    kind: str
    name: str
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    gradients: tuple[str, ...]
    saved: tuple[str, ...]
    constants: Mapping[str, int | float | None]
    schedules: tuple[Schedule, ...]
    branch: str = ""

    @property
    def sink(self) -> str:
        """The read that is a sink of the softmax: a logit per query head, without a value; empty where it has none."""
        return sink_name(self.branch) if self.constants.get("SINK") else ""

    def size(self, name: str) -> int:
        """A constant that is a number of tokens, blocks or slots."""
        value = self.constants[name]
        assert isinstance(value, int), f"{self.name}: {name} is {value}"
        return value

    def schedule(self, name: str) -> Schedule | None:
        """The schedule of this name, if the step has it."""
        return next((schedule for schedule in self.schedules if schedule.name == name), None)
