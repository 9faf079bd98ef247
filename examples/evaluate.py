"""Evaluate a checkpoint of pretrain.py: held-out loss, tasks, needles, memory and speed of generation.

    python examples/evaluate.py build/pretrain --rows 64 --lengths 16384,32768
    python examples/evaluate.py build/pretrain --mode reference   # a checkpoint of an operator, on a CPU

Writes evaluation.json, and plots of the loss by position and of needles by depth and length, into the run's folder.
If the attention selects blocks, selection.png maps them, and selection.json has statistics for nsa-gen bench --inputs.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from examples.quality.data import held_out_batch, library
from examples.quality.evaluation import evaluate, generation
from examples.quality.figures import plot_needles, plot_positions
from examples.quality.selection import write_selection
from examples.quality.training import device_here, load_model


def main(arguments: list[str] | None = None) -> None:
    """Read the command line, evaluate, write JSON and plots, and print a summary."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of the checkpoint")
    parser.add_argument("--mode", choices=("operator", "reference"), help="what runs the spec, whatever trained it")
    parser.add_argument(
        "--rows", type=int, default=32, help="held-out sequences of each task; of text, four times as many (32)"
    )
    parser.add_argument("--lengths", default="", help="more lengths of text and needles, such as 16384,32768")
    parser.add_argument("--new", type=int, default=32, help="bytes to generate (32)")
    options = parser.parse_args(arguments)
    try:
        lengths = [int(each) for each in options.lengths.split(",") if each]
    except ValueError:
        parser.error(f"--lengths: expected whole numbers with commas between, got {options.lengths!r}")
    for name, value in (("rows", options.rows), ("new", options.new - 1), *(("lengths", each - 1) for each in lengths)):
        if value < 1:
            parser.error(f"--{name}: expected more, got {getattr(options, name)}")
    if not (options.run / "checkpoint.pt").exists():
        parser.error(f"run: there is no checkpoint.pt in {options.run}")
    device = device_here()
    try:
        model, settings = load_model(options.run, device, options.mode)
        corpus = library(settings.packages)
    except ValueError as error:
        parser.error(str(error))
    tasks = settings.tasks.split(",")
    found = evaluate(model, corpus, settings.tokens, device, rows=options.rows, lengths=lengths, tasks=tasks)
    prompt = held_out_batch(corpus, "text", settings.tokens, range(1))[0].to(device)
    found["generation"] = generation(model, prompt, options.new)
    (options.run / "evaluation.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    plot_positions(found["positions"], options.run / "positions.png")
    plot_needles(found["needles"], options.run / "needles.png")
    chosen = write_selection(
        model, held_out_batch(corpus, "text", settings.tokens, range(4))[0].to(device), options.run
    )
    print(f"held-out loss {found['held_out_loss']:.4f} nats a byte")
    for each in found["perplexity"]:
        print(f"perplexity {each['perplexity']:.3f} a byte at {each['tokens']:,}")
    for each in found["tasks"]:
        print(f"{each['task']:10} {each['tokens']:7,}  {100 * each['accuracy']:5.1f}% right, loss {each['loss']:.3f}")
    if chosen is not None:
        shares = ", ".join(f"{100 * share:.0f}% over {lag}" for lag, share in chosen.shared.items())
        print(f"blocks shared: {shares} tokens; {100 * chosen.forced:.0f}% are forced")
    speed = found["generation"]
    print(
        f"generates {speed['tokens_per_second']:,.1f} tokens/s by {speed['by']}; peak {found['peak_bytes'] >> 20:,} MiB"
    )


if __name__ == "__main__":
    main()
