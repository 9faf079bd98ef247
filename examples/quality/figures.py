"""Figures of runs. Without matplotlib, which comes with nsa-gen[bench], nothing is drawn."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def _axes(path: Path, size: tuple[float, float] = (6, 4), columns: int = 1) -> Iterator[Any]:
    """Axes, or a sequence of them, of a figure that is written to `path`. None without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        yield None
        return
    figure = Figure(figsize=size, layout="constrained")
    yield figure.subplots(1, columns)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, bbox_inches="tight")  # without it, square panels leave no room for titles


def plot_losses(log: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Plot the losses of a run by step."""
    with _axes(path) as axes:
        if axes is not None:
            for name in ("text_loss", "answer_loss"):
                axes.plot([line["step"] + 1 for line in log], [line[name] for line in log], label=name.split("_")[0])
            axes.set(xlabel="step", ylabel="loss (nats a byte)")
            axes.legend()


def plot_positions(bins: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Plot the loss on text by position."""
    with _axes(path) as axes:
        if axes is not None:
            axes.plot(
                [(each["start"] + each["stop"]) / 2 for each in bins], [each["loss"] for each in bins], marker="o"
            )
            axes.set(xlabel="position", ylabel="held-out loss (nats a byte)")


def plot_needles(cells: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Plot the share of needles' letters that are right, by depth and length."""
    lengths, depths = (sorted({each[name] for each in cells}) for name in ("tokens", "depth"))
    known = {(each["depth"], each["tokens"]): each["accuracy"] for each in cells}
    with _axes(path) as axes:
        if axes is not None:
            table = [[known[depth, length] for length in lengths] for depth in depths]
            image = axes.imshow(table, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
            axes.set(xlabel="length (bytes)", ylabel="depth")
            axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
            axes.set_yticks(range(len(depths)), [f"{depth:.2f}" for depth in depths])
            axes.figure.colorbar(image, label="letters that are right")


def plot_selection(maps: Sequence[Sequence[Sequence[float]]], path: Path) -> None:
    """Map each layer's selected blocks: for each range of queries, the share of its slots in each range of keys."""
    with _axes(path, (3 * len(maps) + 1, 3.4), len(maps)) as axes:
        for number, shares in enumerate(maps if axes is not None else ()):
            panel = axes if len(maps) == 1 else axes[number]
            panel.imshow(shares, vmin=0, cmap="Blues", interpolation="nearest")
            panel.set(title=f"layer {number}", xlabel="keys", ylabel="queries" if number == 0 else "")
            panel.set_xticks([])
            panel.set_yticks([])
