"""Draw the figures of the documentation as SVG.

    python docs/figures/draw.py [FOLDER]

FOLDER is docs/figures unless another is given. The figures of the operator draw its definition (docs/semantics.md) for
a small example; the figures of speed-ups and of quality draw results of docs/results. Needs matplotlib
(`pip install 'nsa-gen[bench]'`).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

FOLDER = Path(__file__).resolve().parent
RESULTS = FOLDER.parent / "results"

BLUE, ORANGE, GREEN, GREY, LIGHT, INK = "#0064b4", "#c4570a", "#00734f", "#8c959f", "#e7ecf1", "#1f2328"
STYLE = {
    "svg.fonttype": "path",  # the same picture whichever fonts the reader has
    "svg.hashsalt": "nsa_gen",  # the same figure gives the same file
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": GREY,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.facecolor": "white",
}

# The example of the figures: 32 tokens, compression blocks of 4 at a stride of 2, selection blocks of 4, a window of 6.
TOKENS, BLOCK, STRIDE, SELECTION, COUNT, INITIAL, LOCAL, WINDOW = 32, 4, 2, 4, 4, 1, 1, 6
QUERY = 26


def importance(seed: int = 3) -> np.ndarray:
    """Importance (TOKENS, blocks) of the selection blocks, of random logits of the compressed blocks.

    Eq. 8 to 10 for one head: a softmax over the visible compressed blocks, then for each selection block the sum of the
    probabilities, each weighed by the tokens that it shares with the block, over the stride.
    """
    compressed, blocks = (TOKENS - BLOCK) // STRIDE + 1, TOKENS // SELECTION
    logits = np.random.default_rng(seed).normal(size=(TOKENS, compressed)) * 1.5
    found = np.zeros((TOKENS, blocks))
    for t in range(TOKENS):
        visible = [i for i in range(compressed) if i * STRIDE + BLOCK - 1 <= t]
        if not visible:
            continue
        weights = np.exp(logits[t, visible] - logits[t, visible].max())
        for i, p in zip(visible, weights / weights.sum(), strict=True):
            for token in range(i * STRIDE, i * STRIDE + BLOCK):
                found[t, token // SELECTION] += p / STRIDE
    return found


def chosen(row: np.ndarray, t: int) -> list[int]:
    """The blocks that query t selects: forced ones first, then by importance, ties to the lower block."""
    own = t // SELECTION
    forced = [j for j in range(own + 1) if j < INITIAL or j > own - LOCAL]
    others = sorted((j for j in range(own + 1) if j not in forced), key=lambda j: (-row[j], j))
    return sorted((forced + others)[:COUNT])


COMPARED = {"C": 1, "G2": 2, "B": 4, "G7": 7, "A": 16}
"""Workloads of the comparison by name, and their query heads per KV head."""
PACKAGES = ("nsa_gen", "sfnsa", "nsa-triton", "fsa", "fla")
LATEST, ALL_PACKAGES = "h200_2026-11-30_dq", "h200_2026-11-30"
"""The newest run, beside the quickest of the public packages, and the one beside all four."""


def speed_ups(run: str = LATEST) -> list[dict[str, Any]]:
    """Forward and backward together over the quickest dense attention of the same run, by group size and length.

    Fields: group, heads, tokens, and the ratio of each package that computes this group size, from comparison.json of
    a run, all of it on one H200. Above 1 is quicker.
    """
    comparison = json.loads((RESULTS / run / "comparison.json").read_text())
    found: dict[tuple[str, int], dict[str, Any]] = {}
    for row in comparison["rows"]:
        if row["workload"] in COMPARED and row["inputs"] == "independent" and row.get("median_ms") is not None:
            times = found.setdefault((row["workload"], row["tokens"]), {"heads": row["heads"]})
            times[row["contender"]] = times.get(row["contender"], 0.0) + row["median_ms"]
    records = []
    for (workload, tokens), times in found.items():
        dense = min(times[name] for name in ("cudnn", "fa2", "fa4") if name in times)
        ratios = {name: dense / times[name] for name in PACKAGES if name in times}
        records.append({"group": COMPARED[workload], "heads": times["heads"], "tokens": tokens, **ratios})
    return sorted(records, key=lambda record: (record["tokens"], record["group"]))


def ratio_text(value: float) -> str:
    """A power of two as people read a ratio: 1/4x, 1/2x, 1x, 2x."""
    return f"{value:g}x" if value >= 1 else f"1/{1 / value:g}x"


def draw_speed_up() -> plt.Figure:
    """Speed-up over dense attention by group size: short sequences on the left, long ones on the right."""
    records = speed_ups()
    short = sum(row["tokens"] == 8192 for row in records)
    widths = short, len(records) - short
    figure, axes = plt.subplots(1, 2, figsize=(7.2, 2.9), sharey=True, layout="constrained", width_ratios=widths)
    series = (("nsa_gen", BLUE), ("sfnsa", "#7fb2dd"))
    for ax, rows in zip(axes, (records[:short], records[short:]), strict=True):
        for number, (name, colour) in enumerate(series):
            for place, row in enumerate(rows):
                x, ratio = place + (number - 0.5) * 0.4, row[name]
                ax.bar(x, ratio - 1, 0.36, bottom=1, color=colour, label=name if not place else None, zorder=2)
                offset, anchor = (2, "bottom") if ratio >= 1 else (-2, "top")
                ax.annotate(
                    f"{ratio:.2f}" if ratio < 1 else f"{ratio:.1f}", (x, ratio), (0, offset),
                    textcoords="offset points", ha="center", va=anchor, fontsize=7,
                )  # fmt: skip
        ax.axhline(1, color=INK, linewidth=1)
        ax.set_yscale("log", base=2)
        ax.set_ylim(0.11, 9)
        ticks = (1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8)
        ax.set_yticks(ticks, [ratio_text(each) for each in ticks])
        ax.minorticks_off()
        ax.set_xticks(range(len(rows)), [f"{row['group']}\n{row['tokens'] // 1024}k" for row in rows])
        ax.set_xlabel("query heads per KV head; tokens")
        ax.grid(axis="y", color=LIGHT, zorder=0)
    axes[0].set_title("short sequences", fontsize=9)
    axes[1].set_title("long sequences", fontsize=9)
    axes[0].set_ylabel("speed-up over the best dense\nattention (1x), both passes")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    return figure


def draw_quality() -> plt.Figure:
    """Held-out loss by position, and the needles that models found, by depth and length."""
    study = json.loads((RESULTS / "h200_2026-11-30_rates_quality" / "dense_nsa.json").read_text())
    figure, (left, *maps) = plt.subplots(1, 3, figsize=(9, 2.6), layout="constrained", width_ratios=(3, 4, 4))
    names = {"dense-group-4": ("dense", ORANGE), "nsa-group-4": ("NSA", BLUE)}
    for ax, row in zip(maps, study["rows"], strict=True):
        name, colour = names[row["arm"]]
        places = [(each["start"] + each["stop"]) / 2 for each in row["positions"]]
        left.plot(places, [each["loss"] for each in row["positions"]], color=colour, marker=".", label=name)
        lengths, depths = (sorted({cell[key] for cell in row["needles"]}) for key in ("tokens", "depth"))
        found = {(cell["depth"], cell["tokens"]): cell["accuracy"] for cell in row["needles"]}
        ax.pcolormesh([[found[depth, length] for length in lengths] for depth in depths], vmin=0, vmax=1, cmap="Blues")
        for y, depth in enumerate(depths):
            for x, length in enumerate(lengths):
                share = found[depth, length]
                shade = "white" if share > 0.5 else INK
                ax.text(x + 0.5, y + 0.5, f"{100 * share:.0f}", ha="center", va="center", fontsize=7, color=shade)
        ax.set_xticks([x + 0.5 for x in range(len(lengths))], [f"{length // 1024}k" for length in lengths])
        ax.set_yticks([y + 0.5 for y in range(len(depths))], [f"{depth:g}" for depth in depths])
        ax.axvline(1 + lengths.index(study["settings"]["tokens"]), color=INK, linewidth=1)
        ax.set(xlabel="bytes", title=f"letters of a needle found, {name} (%)")
        ax.title.set_fontsize(9)
    maps[0].set_ylabel("depth")
    left.set(xlabel="position", ylabel="held-out loss (nats a byte)", ylim=(0.55, None))
    left.set_xticks([0, 4096, 8192], ["0", "4k", "8k"])
    left.grid(axis="y", color=LIGHT)
    left.legend(frameon=False, fontsize=8)
    return figure


def _tokens(ax: Any, y: float, colours: list[str], height: float = 0.8) -> None:
    for token, colour in enumerate(colours):
        ax.add_patch(Rectangle((token, y), 0.9, height, facecolor=colour, edgecolor="none"))


def _bare(figsize: tuple[float, float], width: float, low: float, high: float) -> tuple[plt.Figure, Any]:
    figure, ax = plt.subplots(figsize=figsize, layout="constrained")
    ax.set(xlim=(-0.5, width), ylim=(low, high))
    ax.axis("off")
    return figure, ax


def draw_compression() -> plt.Figure:
    """Blocks of tokens that overlap, the compressed key of each, and which of them a query sees."""
    figure, ax = _bare((7.2, 2.7), TOKENS + 0.5, -3.4, 6.2)
    _tokens(ax, 0, [LIGHT if token > QUERY else "#b9c4cf" for token in range(TOKENS)])
    ax.add_patch(Rectangle((QUERY, 0), 0.9, 0.8, facecolor=ORANGE))
    ax.text(QUERY + 0.45, -0.35, f"query t = {QUERY}", ha="center", va="top", color=ORANGE)
    ax.text(0, -0.35, f"tokens 0 to {TOKENS - 1}", va="top")
    for i in range((TOKENS - BLOCK) // STRIDE + 1):
        start, visible = i * STRIDE, i * STRIDE + BLOCK - 1 <= QUERY
        y, colour = 1.4 + 0.5 * (i % 2), BLUE if visible else GREY
        ax.plot([start, start + BLOCK - 0.1], [y, y], color=colour, linewidth=2.4, solid_capstyle="butt")
        centre = start + (BLOCK - 0.1) / 2
        ax.annotate("", (centre, 3.6), (centre, y + 0.1), arrowprops={"arrowstyle": "-", "color": colour, "lw": 0.7})
        ax.add_patch(
            Rectangle((centre - 0.45, 3.6), 0.9, 0.8, facecolor=colour if visible else "white", edgecolor=colour)
        )
    ax.text(0, 4.75, "one compressed key and value per block: φ(block)", color=BLUE)
    ax.text(TOKENS, 4.75, "not visible yet: ends after t", ha="right", color=GREY)
    ax.text(
        0,
        -1.75,
        f"Block i covers tokens i·d to i·d + l − 1; here l = {BLOCK} and d = {STRIDE}, so neighbours overlap.",
        va="top",
    )
    ax.text(0, -2.65, "Query t sees block i if its last token is not in the future: i·d + l − 1 ≤ t.", va="top")
    return figure


def draw_selection() -> plt.Figure:
    """Importance of each block for one query, and the blocks that it selects."""
    row = importance()[QUERY]
    own, picked = QUERY // SELECTION, chosen(row, QUERY)
    figure, ax = _bare((7.2, 2.9), TOKENS + 0.5, -4.2, 6.6)
    for j in range(TOKENS // SELECTION):
        x = j * SELECTION
        forced, future = j < INITIAL or own - LOCAL < j <= own, j > own
        colour = GREEN if forced else BLUE if j in picked else GREY
        label = "future" if future else "first block: forced" if j < INITIAL else "own block: forced" if forced else ""
        label = label or ("selected" if j in picked else "not selected")
        for token in range(x, x + SELECTION):
            seen = j in picked and token <= QUERY
            face = colour if seen else "white" if future else LIGHT
            ax.add_patch(Rectangle((token, 0), 0.9, 0.8, facecolor=face, edgecolor=GREY, linewidth=0.4))
        if not future:
            height = 4.2 * row[j] / row.max()
            ax.add_patch(Rectangle((x + 0.6, 1.2), SELECTION - 1.3, height, facecolor=colour, alpha=0.85))
            ax.text(x + SELECTION / 2 - 0.05, 1.35 + height, f"{row[j]:.2f}", ha="center", va="bottom", fontsize=8)
        ax.text(x + SELECTION / 2 - 0.05, -0.35, f"{j}", ha="center", va="top", fontsize=8)
        ax.text(
            x + SELECTION / 2 - 0.05,
            -1.25,
            label.replace(": ", ":\n"),
            ha="center",
            va="top",
            fontsize=7.5,
            color=colour,
        )
    ax.text(0, 6.1, f"importance of each selection block for query t = {QUERY}", fontsize=9)
    size = f"n = {COUNT} blocks of l′ = {SELECTION} tokens, forced ones included."
    ax.text(0, -3.1, f"{size} All query heads of a KV head share the choice.", va="top")
    return figure


def draw_masks() -> plt.Figure:
    """Which keys each query sees in the three branches, for the example of the other figures."""
    scores, compressed = importance(), (TOKENS - BLOCK) // STRIDE + 1
    t = np.arange(TOKENS)[:, None]
    see_compressed = np.arange(compressed)[None] * STRIDE + BLOCK - 1 <= t
    see_selected = np.zeros((TOKENS, TOKENS), bool)
    for query in range(TOKENS):
        for j in chosen(scores[query], query):
            see_selected[query, j * SELECTION : min((j + 1) * SELECTION, query + 1)] = True
    key = np.arange(TOKENS)[None]
    see_window = (key <= t) & (key > t - WINDOW)
    figure, axes = plt.subplots(
        1, 3, figsize=(7.2, 2.6), layout="constrained", width_ratios=[compressed, TOKENS, TOKENS]
    )
    parts = (
        ("compressed", see_compressed, BLUE, "compressed block"),
        ("selected", see_selected, GREEN, "key"),
        ("window", see_window, ORANGE, "key"),
    )
    for ax, (title, seen, colour, label) in zip(axes, parts, strict=True):
        for row in range(TOKENS):
            edges = np.flatnonzero(np.diff(np.concatenate(([0], seen[row].astype(int), [0]))))
            for first, end in edges.reshape(-1, 2):
                ax.add_patch(
                    Rectangle((first, row), end - first, 1, facecolor=colour, edgecolor="white", linewidth=0.3)
                )
        ax.set(xlim=(0, seen.shape[1]), ylim=(TOKENS, 0), xticks=[], yticks=[], aspect="equal")
        ax.set_xlabel(label)
        ax.set_title(title, fontsize=9, color=colour)
        for side in ax.spines.values():
            side.set_visible(True)
    axes[0].set_ylabel("query")
    return figure


def draw_gates() -> plt.Figure:
    """The three branches and their gated sum."""
    figure, ax = _bare((7.2, 3.0), 100, 0, 50)

    def box(x: float, y: float, w: float, text: str, colour: str, h: float = 9) -> None:
        ax.add_patch(
            FancyBboxPatch((x, y), w, h, "round,pad=0.2,rounding_size=1.2", facecolor="white", edgecolor=colour, lw=1.4)
        )
        ax.text(x + w / 2, y + h / 2, text, ha="center", va="center", fontsize=8.5)

    def arrow(x: float, y: float, x2: float, y2: float, colour: str = INK) -> None:
        ax.add_patch(
            FancyArrowPatch(
                (x, y), (x2, y2), arrowstyle="-|>", mutation_scale=8, color=colour, lw=1, shrinkA=0, shrinkB=0
            )
        )

    box(0, 20, 11, "q, k, v", INK)
    rows = (
        (38, BLUE, "φ: blocks to\ncompressed keys", "attention to\ncompressed keys", "g_cmp · o_cmp"),
        (20.5, GREEN, "scores, and choice\nof n blocks", "attention to the\nselected tokens", "g_slc · o_slc"),
        (3, ORANGE, "last w tokens", "attention to\nthe window", "g_win · o_win"),
    )
    for y, colour, first, second, gated in rows:
        box(20, y, 18, first, colour)
        box(46, y, 18, second, colour)
        box(71, y, 15, gated, colour)
        arrow(11.6, 24.5, 19.6, y + 4.5)
        arrow(38.6, y + 4.5, 45.6, y + 4.5, colour)
        arrow(64.6, y + 4.5, 70.6, y + 4.5, colour)
        arrow(86.6, y + 4.5, 93.2, 25 + (y - 20.5) * 0.12, colour)
    arrow(55, 37.6, 30, 30.2, BLUE)
    ax.text(47, 32, "importance", fontsize=8, color=BLUE)
    ax.text(96, 25, "o", ha="center", va="center", fontsize=13)
    return figure


FIGURES = {
    "speed_up": draw_speed_up,
    "quality": draw_quality,
    "compression": draw_compression,
    "selection": draw_selection,
    "masks": draw_masks,
    "branches": draw_gates,
}


def main(folder: Path) -> None:
    """Write every figure into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, draw in FIGURES.items():
        with plt.rc_context(STYLE):
            figure = draw()
            figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
            plt.close(figure)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", default=FOLDER, help="where to write them (docs/figures)")
    main(parser.parse_args().folder)
