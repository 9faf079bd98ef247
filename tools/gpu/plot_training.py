"""Plot the losses that `pytest -m gpu -k trains --gpu-report REPORT` found: `plot_training.py REPORT FILE`."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))


def plot(document: Path, picture: Path) -> None:
    """Plot the losses of a report, smoothed over ten steps."""
    from nsa_gen.bench.drawing import pyplot

    lines = map(json.loads, document.read_text(encoding="utf-8").splitlines())
    result = next(line["found"] for line in reversed(list(lines)) if "losses" in line.get("found", {}))
    figure, ax = pyplot().subplots(figsize=(7, 4), layout="constrained")
    styles = itertools.cycle(({"linewidth": 2.2}, {"linewidth": 1.2, "linestyle": "--"}, {"linewidth": 1.2}))
    for (name, losses), style in zip(result["losses"].items(), styles, strict=False):
        ax.plot(range(len(losses)), _smoothed(losses), label=name, **style)
    ax.set_xlabel("step")
    ax.set_ylabel("loss, nats a byte (mean of 10 steps)")
    size = result["size"]
    ax.set_title(f"{result['parameters'] / 1e6:.1f}M parameters, {size['batch']} x {size['tokens']} bytes a step")
    ax.grid(alpha=0.3)
    ax.legend()
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=150)
    pyplot().close(figure)


def _smoothed(losses: Sequence[float]) -> list[float]:
    return [sum(losses[max(0, at - 9) : at + 1]) / len(losses[max(0, at - 9) : at + 1]) for at in range(len(losses))]


if __name__ == "__main__":
    plot(Path(sys.argv[1]), Path(sys.argv[2]))
