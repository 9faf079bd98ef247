"""`nsa-gen verify`: does the generated operator compute what the specification says, forward and backward?"""

from __future__ import annotations

import os
from enum import StrEnum
from typing import Annotated

import typer

from nsa_gen.cli.common import (
    MOST_EXAMPLES,
    JsonOption,
    SeedOption,
    SpecArgument,
    lengths_option,
    note,
    number_option,
    read_spec,
    stop,
)


class Device(StrEnum):
    """Where the kernels run."""

    cpu = "cpu"
    cuda = "cuda"


class DType(StrEnum):
    """Data types a spec can have."""

    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"


def verify(
    spec: SpecArgument,
    device: Annotated[
        Device | None,
        typer.Option(help="Where to run; cpu means Triton's interpreter.", show_default="cuda if there is one"),
    ] = None,
    dtype: Annotated[
        DType | None, typer.Option(help="Verify the spec with another data type.", show_default="the spec's")
    ] = None,
    length: Annotated[list[str], lengths_option("Sequence lengths.", "a set around the blocks")] = [],
    examples: Annotated[
        int | None,
        number_option("Check this many random calls and properties instead.", 1, MOST_EXAMPLES, "fixed cases"),
    ] = None,
    example: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help="One property and call, such as 'oracle: B=2 T=21 spread'."),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Check only three small calls and one cache.")] = False,
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Compare an operator with a dense reference.

    Compares outputs, every gradient and the selection with a reference in float64, on random inputs.

    With --examples, the calls and the properties to check are drawn at random. A failing example is shrunk as far as
    possible, and the report ends with the command that repeats it.

    On the CPU the kernels run under Triton's interpreter, which is slow and computes bfloat16 wrongly. Specs in
    bfloat16 are therefore verified in float32 there, and the report says so.

    \b
    Example:
      nsa-gen verify tiny --device cpu --quick
      nsa-gen verify llama3_8b --device cuda --length 8192,8193
      nsa-gen verify tiny --device cpu --examples 20 --seed 1
    """
    if (examples is not None or example is not None) and length:
        raise typer.BadParameter("--length: examples have their own lengths; use --length or --examples")
    if examples is not None and example is not None:
        raise typer.BadParameter("--example: names one example; use --example or --examples")
    if quick and (length or examples is not None or example is not None):
        raise typer.BadParameter("--quick: names its own calls; leave out --length, --examples and --example")
    loaded = read_spec(spec, as_json=as_json)
    chosen = _choose(device)
    if chosen == "cpu":
        # Triton reads this once, when it is imported.
        os.environ["TRITON_INTERPRET"] = "1"
    else:
        os.environ.pop("TRITON_INTERPRET", None)
    from nsa_gen.cli.blocks import output_console
    from nsa_gen.verification import print_report
    from nsa_gen.verification import verify as verify_spec
    from nsa_gen.verification.examples import require_example
    from nsa_gen.verification.verify import adapt

    kind = dtype.value if dtype else None
    try:
        run, _ = adapt(loaded, interpreted=chosen == "cpu", dtype=kind, fixed=False)
        if example is not None:
            require_example(run, example, seed, chosen)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    report = verify_spec(
        loaded,
        lengths=tuple(length) or None,
        dtype=kind,
        device=chosen,
        seed=seed,
        quick=quick,
        examples=examples,
        example=example,
        source=str(spec),
        progress=note,
    )
    if as_json:
        print(report.to_json())
    else:
        print_report(report, output_console())
    stop(report.ok)


def _choose(device: Device | None) -> str:
    """The device asked for, or the GPU where torch sees one, else the CPU; a GPU that is not there is a wrong call."""
    if device is Device.cpu:
        return "cpu"
    import torch

    present = torch.cuda.is_available()
    if device is Device.cuda and not present:
        raise typer.BadParameter("--device cuda: torch sees no GPU (see nsa-gen env); use --device cpu")
    return "cuda" if present else "cpu"
