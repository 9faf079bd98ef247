"""`nsa-gen bench`: how quick is a generated operator on the GPU at hand, beside dense attention and other packages?"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nsa_gen.cli.common import (
    BudgetOption,
    JsonOption,
    SeedOption,
    SpecArgument,
    lengths_option,
    names_option,
    note,
    output_option,
    print_json,
    read_spec,
    require_output,
    require_pass,
    require_passes,
    some_of,
    split_list,
    stop,
)

if TYPE_CHECKING:
    from nsa_gen.bench.records import Results
    from nsa_gen.spec import Spec

DEFAULT_LENGTHS = (8192, 32768, 65536)
DECODE_LENGTHS, DECODE_BATCHES = (4096, 16384, 65536, 262144, 1048576), (1, 4, 16, 32, 64)
CONTENDERS = "Contenders: dense (cudnn, fa2, fa4), flex, efficient, peers (fla, sfnsa, nsa-triton, fsa), none."
INPUTS = ("independent", "correlated")


def _require_json(path: Path | None) -> Path | None:
    """Refuse a file that cannot be written, or whose name is that of the journal."""
    if path is not None and path.suffix == ".jsonl":
        raise typer.BadParameter(f"{path}: the journal has this name while it lasts; expected one such as results.json")
    return require_output(path)


def _require_inputs(values: list[str]) -> list[str]:
    """Split kinds of inputs; a name that ends in .json is that of a file of statistics, which is read to be sure."""
    items = split_list(values)
    some_of(INPUTS)([item for item in items if not item.endswith(".json")])
    for item in items:
        if item.endswith(".json"):
            from nsa_gen.bench.recorded import Selection

            try:
                Selection.read(Path(item))
            except (OSError, ValueError) as error:
                raise typer.BadParameter(str(error)) from None
    return items


def _require_choices(spec: Spec, inputs: Sequence[str], lengths: Sequence[int]) -> None:
    """Refuse statistics of a selection where the spec chooses no blocks, or lengths at which there is no choice."""
    recorded = [each for each in inputs if each.endswith(".json")]
    if not recorded:
        return
    from nsa_gen.bench.recorded import LAGS

    if spec.selection is None or spec.selection.indices == "input":
        raise typer.BadParameter(f"--inputs: {recorded[0]} needs a spec that selects blocks itself, got {spec.name}")
    least = spec.selection.count * spec.selection.block + max(LAGS)
    for length in lengths:
        if length <= least:
            raise typer.BadParameter(f"--tokens: {recorded[0]} needs more than {least:,} tokens, got {length:,}")


def bench(
    spec: SpecArgument,
    against: Annotated[list[str], names_option(CONTENDERS, split_list, "dense and peers that are installed")] = [],
    tokens: Annotated[list[str], lengths_option("Sequence lengths.", "8192,32768,65536")] = [],
    passes: Annotated[
        list[str], names_option("Passes to time; decode is timed alone.", require_passes, "the spec's without decode")
    ] = [],
    batch: Annotated[list[str], lengths_option("Numbers of sequences in a decode step.", "1,4,16,32,64")] = [],
    inputs: Annotated[
        list[str],
        names_option(
            "Random inputs: independent, correlated (as in a model), or a file of a model's selection statistics.",
            _require_inputs,
            "independent",
        ),
    ] = [],
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE", callback=require_output, help="Draw speed-ups by length: .png, .svg or .pdf."),
    ] = None,
    output: Annotated[
        Path | None, output_option("Write the results as JSON, for report and explain.", _require_json)
    ] = None,
    budget: BudgetOption = None,
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Time an operator, dense attention and other packages.

    The operator is verified first. Then all contenders take turns in every round. If a contender fails, its line of the
    report says why. This needs a GPU; without one, nsa-gen explain shows what the operator must cost.

    With --passes decode, decode steps on caches of --tokens tokens and --batch sequences are timed, contiguous and
    paged, and compared with cuDNN's dense attention (--against none leaves it out).

    With --output FILE.json, results are written to FILE.jsonl as they are measured. That file stays if the benchmark is
    interrupted.

    \b
    Example:
      nsa-gen bench llama3_8b
      nsa-gen bench llama3_8b --against dense --tokens 8192,65536 --inputs independent,correlated --plot speed.png
      nsa-gen bench llama3_8b -o results.json
      nsa-gen bench llama3_8b --passes decode --tokens 65536 --batch 1,32
    """
    loaded = read_spec(spec, as_json=as_json)
    wanted = tuple(passes) or tuple(name for name in loaded.passes if name != "decode")
    require_pass(loaded, wanted)
    journal = None if output is None else output.with_suffix(".jsonl")
    if "decode" in wanted:
        if wanted != ("decode",):
            raise typer.BadParameter("--passes: decode is timed alone")
        if plot is not None:
            raise typer.BadParameter("--plot: decode has no plot, only a table")
        _require_gpu(str(spec))
        shapes = [(n, b) for n in tuple(tokens) or DECODE_LENGTHS for b in tuple(batch) or DECODE_BATCHES]
        _report(_decode_results(loaded, shapes, against != ["none"], budget, seed, journal), output, as_json)
        return
    if batch:
        raise typer.BadParameter("--batch: passes other than decode are timed on one sequence")
    from nsa_gen.bench.peers import DEFAULT_NAMES, choose

    names = [] if against == ["none"] else against or list(DEFAULT_NAMES)
    try:
        contenders = choose(names)
    except ValueError as error:
        raise typer.BadParameter(f"--against: {error}") from None
    if not against:
        contenders = [each for each in contenders if not each.missing()]
    _require_choices(loaded, inputs, tuple(tokens) or DEFAULT_LENGTHS)
    _require_gpu(str(spec))
    from nsa_gen.bench.session import Session, run_session
    from nsa_gen.bench.workloads import spec_tasks

    tasks = spec_tasks(
        loaded,
        lengths=tuple(tokens) or DEFAULT_LENGTHS,
        inputs=tuple(inputs) or ("independent",),
        contenders=[each.name for each in contenders],
        passes=wanted,
    )
    with tempfile.TemporaryDirectory(prefix="nsa_gen_bench_") as folder:
        session = Session(Path(folder), 1e9 if budget is None else budget, seed, journal, progress=note)
        results = run_session(session, tasks, {"spec": loaded.resolved_yaml()})
    _report(results, output, as_json, plot)


def _report(results: Results, output: Path | None, as_json: bool, plot: Path | None = None) -> None:
    """Keep the results and print them; exit code 1 where our operator was wrong or has not all its times."""
    if output is not None:
        from nsa_gen.bench.records import write_json

        write_json(output, results)
        output.with_suffix(".jsonl").unlink(missing_ok=True)
        note(f"wrote {output}; to look at it: nsa-gen report {output}")
    if as_json:
        print_json(results.to_document())
    else:
        from nsa_gen.cli.bench_report import report_blocks
        from nsa_gen.cli.blocks import show

        show(*report_blocks(results))
    if plot is not None:
        _plot(results, plot)
    stop(results.ours_is_timed)


def _decode_results(
    spec: Spec,
    shapes: Sequence[tuple[int, int]],
    dense: bool,
    budget: float | None,
    seed: int,
    journal: Path | None,
) -> Results:
    """Steps of decode, in this process; nothing is timed where decode is wrong. A journal gets each record at once."""
    import nsa_gen
    from nsa_gen.bench.decode import decode_faults, measure_decode
    from nsa_gen.bench.records import OURS, CheckRow, DecodeRow, Record, Results, append_record, begin_journal
    from nsa_gen.machine import machine
    from nsa_gen.rendering.identity import MEASUREMENT

    started, found_on = time.monotonic(), machine()
    settings = {"seed": seed, "budget_seconds": budget, "measurement": MEASUREMENT, "spec": spec.resolved_yaml()}
    found: list[Record] = []
    if journal is not None:
        begin_journal(journal, found_on, settings)

    def keep(record: Record) -> None:
        found.append(record)
        if journal is not None:
            append_record(journal, record)

    package = nsa_gen.load(spec)
    note("checking decode against the oracle")
    wrong = tuple(decode_faults(spec, package))
    keep(CheckRow(spec.name, 0, OURS, wrong))
    if not wrong:
        rows = measure_decode(spec, package, shapes, dense=dense, seed=seed)
        for tokens, batch in shapes:
            if budget is not None and time.monotonic() - started > budget:
                keep(DecodeRow(spec.name, tokens, batch, problem="the budget was spent"))
            else:
                note(f"{tokens:,} tokens, batch {batch}")
                keep(next(rows))
    return Results.of(found, found_on, settings)


def _require_gpu(spec: str) -> None:
    import torch

    if not torch.cuda.is_available():
        note(
            "nsa-gen: bench times kernels on a GPU, and torch sees none here (see nsa-gen env). "
            f"To see what the operator must cost on one: nsa-gen explain {spec} --tokens 65536 --gpu h100"
        )
        raise typer.Exit(2)


def _plot(results: Results, path: Path) -> None:
    """Draw, or say why not: figures that took minutes are not thrown away for a missing library."""
    from nsa_gen.bench.drawing import MatplotlibMissing
    from nsa_gen.bench.figures import plot_by_length

    try:
        plot_by_length(results, path)
    except (MatplotlibMissing, ValueError) as error:
        note(f"nsa-gen: no plot: {error}")
    else:
        note(f"wrote {path}")
