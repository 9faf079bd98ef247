"""The parts of a plan: arguments and outputs, kernels with their tunables and costs, schedules and steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

import sympy

from nsa_gen.hardware import TARGETS
from nsa_gen.lowering.branches import sink_name

INTERPRETER = "interpreter"
"""The entry for Triton's interpreter in the table of default configurations. The other entries are architectures."""

HOPPER_ROWS, HOPPER_DQ, HOPPER_KEYS = "hopper_rows", "hopper_dq", "hopper_keys"
HOPPER_GATHER, HOPPER_GATHER_QUERIES = "hopper_gather", "hopper_gather_queries"
HOPPER_LOCAL = "hopper_local_blocks"
"""Names of the schedules for Hopper, written in Gluon.

The first three are banded attention's forward, dq, and dk and dv. The next two are the gradients and the forward of
attention to selected blocks. With the last, the first three also process the selected branch's local blocks.
"""

BRANCH_NAMES = {
    "cmp": "compression",
    "slc": "selection",
    "win": "window",
    "joint": "selection and window",
    "all": "every branch",
}
"""Readable names of the branches of kernels; "all" marks kernels that serve every branch."""


@dataclass(frozen=True)
class Argument:
    """A tensor that the operator takes.

    ``dims`` are symbolic: ``("B", "Tq", "Hq", "Dk")``. ``dtype`` is ``"spec"`` or a torch dtype's name. ``group`` is
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

    ``dims`` are symbolic, like those of an `Argument`: ``n`` is the number of blocks that a query selects, ``Nc`` the
    number of compressed rows of a call, and ``slots`` the number of slots of an inverted index. ``dtype`` is
    ``"spec"``, ``"float32"`` or ``"int32"``. ``return_aux`` shows ``auxiliary`` outputs to users. Outputs that are
    ``saved_by_phi`` belong to phi.
    """

    name: str
    dims: tuple[str, ...]
    dtype: str = "spec"
    auxiliary: bool = True
    saved_by_phi: bool = False


@dataclass(frozen=True)
class Tunable:
    """A ``tl.constexpr`` argument of a kernel, or num_warps or num_stages, and the values worth trying.

    Only these values are legal, unless the tunable is a ``size``. Then every number from ``least`` to the largest value
    is legal.
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
    """What a kernel needs, as expressions over its tunables and the sizes of the spec.

    Attributes:
        shared_memory: bytes of shared memory of one program.
        registers: 32-bit values of one program that are live at the same time.
        flops: what the matrix units execute for the whole launch, including padding and masked tile edges.
        traffic: bytes that all programs read and write, mostly through L2.
        streamed: rows of the tile that one step of the inner loop loads. Each step has a fixed cost, whatever its size.
        height: rows of the products. The matrix units of Hopper and Blackwell take 64 at a time.
        programs: number of programs, given where they may be too few or too unequal to fill a device.
        memory: bytes that no cache holds, in addition to `traffic`.
        tensor_memory: columns of Blackwell's tensor memory of one program, given where they may run out.
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
        """All symbols in these expressions."""
        return set().union(*(getattr(self, field.name).free_symbols for field in fields(self)))


@dataclass(frozen=True)
class Kernel:
    """A kernel of the package: where it lives, what it is for, and the space that the tuner may search.

    ``useful_flops`` and ``compulsory_bytes`` are those that no schedule can avoid; they give the floor. A kernel that
    is not ``whole`` does not run in every call of the operator: it serves packed calls, the indexer's loss, or a step
    that is called alone. A kernel with a ``choice`` (name, value) runs only if that choice of schedule is in force.
    ``function`` is the function, without "_kernel", of which the kernel is a specialisation. Compilers and profilers
    show each specialisation under its ``name``. ``waits`` counts how often programs of a launch wait for others, or
    leave the rest to the last that arrives.
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
    waits: int = 0

    def __post_init__(self) -> None:
        """Use the kernel's name as its function unless another is given."""
        object.__setattr__(self, "function", self.function or self.name)


@dataclass(frozen=True)
class Decision:
    """A decision for several kernels of a branch together: which of them run, and on how many tokens.

    It has an effect only on the architectures ``targets`` and in the passes ``passes``.
    """

    name: str
    tunables: tuple[Tunable, ...]
    targets: tuple[str, ...] = TARGETS
    passes: tuple[str, ...] = ("forward", "backward")

    @property
    def choices(self) -> tuple[str, ...]:
        """Names of the tunables that choose between two schedules. The other tunables are sizes."""
        return tuple(tunable.name for tunable in self.tunables if tunable.values == (0, 1))


@dataclass(frozen=True)
class Config:
    """Values of the tunables of a kernel, including num_warps and num_stages, or of a decision."""

    kernel: str
    values: tuple[tuple[str, int], ...]

    def mapping(self) -> dict[str, int]:
        """The values by name."""
        return dict(self.values)


@dataclass(frozen=True)
class Schedule:
    """One way to run a step.

    ``kernels`` names the kernels that it launches. Two schedules may name the same kernel. Gluon kernels have no
    tunables and are not named. ``targets`` are the architectures that it is compiled for. ``decided_by`` is a tunable
    of a `Decision` and the value that selects this schedule; the value is None if the tunable is a number of tokens.
    ``fuses`` names other steps; the schedule does part of their work.
    """

    name: str
    kernels: tuple[str, ...]
    targets: tuple[str, ...] = (*TARGETS, INTERPRETER)
    decided_by: tuple[str, int | None] | None = None
    fuses: tuple[str, ...] = ()


@dataclass(frozen=True)
class Step:
    """One step of the operator, with its tensors by name.

    ``kind`` is pool, score, select, attend or combine. ``gradients`` are the ``reads`` that get a gradient; ``saved``
    are the ``writes`` that the step's backward reads. An attend step reads q, keys and values first, in this order, and
    computes the output of its ``branch``. Its constants: GATE is the branch's place in the combination, SINK is 1 if
    its softmax has a `sink`, and SCOPES is the number of selections per token.
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
        """Name of the softmax's sink, a logit per query head without a value; empty if there is none."""
        return sink_name(self.branch) if self.constants.get("SINK") else ""

    def size(self, name: str) -> int:
        """A constant that is a number of tokens, blocks or slots."""
        value = self.constants[name]
        assert isinstance(value, int), f"{self.name}: {name} is {value}"
        return value

    def schedule(self, name: str) -> Schedule | None:
        """The schedule of this name, if the step has it."""
        return next((schedule for schedule in self.schedules if schedule.name == name), None)
