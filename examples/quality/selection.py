"""Show which blocks a trained model selects: maps, and statistics for `nsa-gen bench --inputs`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from examples.quality.evaluation import logits_of
from examples.quality.figures import plot_selection
from examples.quality.model import Model
from nsa_gen.bench.inputs import selection_shares
from nsa_gen.bench.recorded import Selection, measure_selection


def selected_blocks(model: Model, tokens: Tensor) -> list[Tensor]:
    """The blocks that each layer selects for tokens (B, T): (B, T, S, n) int32 with -1 in empty slots.

    The list is empty if the model's attention selects no blocks.
    """
    operators = model.operators()
    for operator in operators:
        operator.keep = True
    logits_of(model, tokens)
    found = [operator.indices for operator in operators if operator.indices is not None]
    for operator in operators:
        operator.keep, operator.indices = False, None
    return found


def selection_statistics(model: Model, tokens: Tensor) -> tuple[Selection | None, list[Selection], list[Any]]:
    """The mean over layers, each layer's statistics, and each layer's map of the first sequence, for tokens (B, T).

    Without selected blocks: None and two empty lists. With too few blocks for a choice: None, an empty list, the maps.
    """
    spec, found = model.choice.spec, selected_blocks(model, tokens)
    if not found:
        return None, [], []
    chosen = spec.selection
    maps = [selection_shares(indices, chosen.block) for indices in found]
    try:
        layers = [measure_selection(indices, chosen.block, chosen.initial, chosen.local) for indices in found]
    except ValueError:  # the sequence is too short for a choice
        return None, [], maps
    return Selection.mean(layers), layers, maps


def write_selection(model: Model, tokens: Tensor, folder: Path) -> Selection | None:
    """Write selection.json, for benchmarks, and selection.png. Returns the mean over layers."""
    mean, layers, maps = selection_statistics(model, tokens)
    if maps:
        plot_selection(maps, folder / "selection.png")
    if mean is not None:
        mean.write(folder / "selection.json", spec=model.choice.spec.name, layers=[asdict(each) for each in layers])
    return mean
