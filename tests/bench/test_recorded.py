"""Statistics of a selection: measured, written, read, and inputs drawn by them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from nsa_gen.bench.inputs import draw_inputs
from nsa_gen.bench.recorded import (
    LAGS,
    PROCESSES,
    Process,
    Selection,
    choose_blocks,
    measure_selection,
    process_weights,
)
from nsa_gen.bench.workloads import nsa_spec
from nsa_gen.spec import Spec
from nsa_gen.verification.reference.dense import OracleParameters
from nsa_gen.verification.reference.inputs import Inputs, make_inputs
from nsa_gen.verification.reference.oracle import reference_attention

BASE = nsa_spec("small", 4, 2, 32, 16).model_dump()
DISTANCE = 0.05
"""How far the shares of drawn inputs may be from the recorded ones: few heads over a few thousand tokens."""


def spec_of(scores: str = "compression", scope: str = "group", pool: str = "sum") -> Spec:
    changed = {"count": 8, "scores": scores, "scope": scope, "pool": pool}
    return Spec.model_validate({**BASE, "version": 2, "selection": {**BASE["selection"], **changed}})


def recorded(shares: tuple[float, float, float]) -> Selection:
    return Selection(4096, 64, 8, 1, 2, dict.fromkeys(LAGS, 0.5), dict(zip(LAGS, shares, strict=True)), 0.4, 0.3)


def written(folder: Path, changes: dict[str, object]) -> str:
    """The name of a file of statistics, some of whose fields are changed."""
    file = folder / "model.json"
    recorded((0.8, 0.7, 0.6)).write(file)
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    return str(file)


def selection_of(spec: Spec, inputs: Inputs) -> torch.Tensor:
    """The blocks that the reference chooses, (1, T, S, n), a few hundred queries at a time."""
    p, tokens = OracleParameters.from_spec(spec), inputs.q.shape[1]
    parts = [torch.arange(tokens)[start : start + 512] for start in range(0, tokens, 512)]
    return torch.cat([choose_blocks(p, inputs.arguments(), inputs.q[0, part], part) for part in parts])[None]


@pytest.mark.parametrize("scores,scope", [("compression", "group"), ("mean", "head")])
@pytest.mark.parametrize("shares", [(0.85, 0.6, 0.4), (0.75, 0.7, 0.6), (0.95, 0.85, 0.5)])
def test_drawn_inputs_share_as_many_blocks_as_were_recorded(tmp_path: Path, scores: str, scope: str, shares) -> None:
    spec = spec_of(scores, scope)
    recorded(shares).write(tmp_path / "model.json")
    inputs = draw_inputs(spec, 3072, device="cpu", kind=str(tmp_path / "model.json"))
    found = measure_selection(selection_of(spec, inputs), 64, 1, 2)
    for lag, share in zip(LAGS, shares, strict=True):
        assert found.shared_choice[lag] == pytest.approx(share, abs=DISTANCE), lag
    independent = measure_selection(selection_of(spec, draw_inputs(spec, 3072, device="cpu")), 64, 1, 2)
    assert max(independent.shared_choice.values()) < min(shares)  # which it would not reach by itself


@pytest.mark.parametrize(
    "scores,scope,pool", [("compression", "all", "max"), ("compression", "group", "sum"), ("mean", "head", "sum")]
)
def test_blocks_are_chosen_as_the_oracle_chooses_them(scores: str, scope: str, pool: str) -> None:
    spec = spec_of(scores, scope, pool)
    inputs = make_inputs(spec, batch=1, tokens=700)
    p = OracleParameters.from_spec(spec)
    expected = reference_attention(p, **inputs.arguments()).indices
    assert torch.equal(choose_blocks(p, inputs.arguments(), inputs.q[0], torch.arange(700))[None], expected)


def test_shares_are_counted_over_queries_that_have_a_choice() -> None:
    tokens, block = 200, 2
    own = torch.arange(tokens) // block
    # The first block, the own block, and one that changes every 16 tokens: 4 and 20 in turn.
    chosen = torch.where((torch.arange(tokens) // 16) % 2 == 0, 4, 20)
    indices = torch.stack((torch.zeros_like(own), chosen, own), -1).int()[None, :, None]
    found = measure_selection(indices, block, initial=1, local=1)
    rows = torch.arange(6, tokens)
    for lag in LAGS:
        later, earlier = rows[lag:], rows[:-lag]
        free = (chosen[later] <= own[later] - 1) & (chosen[later] >= 1)
        same = (chosen[later] == chosen[earlier]) & (chosen[earlier] <= own[earlier] - 1)
        assert found.shared_choice[lag] == pytest.approx((same & free).sum().item() / free.sum().item())
    assert found.shared_choice[1] > 0.9 > found.shared_choice[8] > 0.4 and found.shared[1] < found.shared_choice[1]
    assert found.forced == pytest.approx(1 - ((chosen <= own - 1)[6:]).sum().item() / (3 * len(rows)), abs=0.01)
    assert found.popular == 1.0


def test_a_sequence_in_which_no_query_chooses_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="indices: expected more than 192 tokens"):
        measure_selection(torch.zeros(1, 192, 1, 2, dtype=torch.int32), 64, 1, 1)
    with pytest.raises(ValueError, match="tokens: expected more than 576"):
        draw_inputs(spec_of(), 576, device="cpu", kind=written(tmp_path, {}))


def test_what_is_written_is_read_again_and_more_beside_it_does_not_matter(tmp_path: Path) -> None:
    recorded((0.8, 0.7, 0.6)).write(tmp_path / "model.json", layers=[1, 2])
    assert Selection.read(tmp_path / "model.json") == recorded((0.8, 0.7, 0.6))


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"format": "other"}, "format: expected 'nsa_gen selection statistics 1', got 'other'"),
        ({"shared_choice": {"1": 0.5, "8": 0.5}}, "shared_choice: expected a share from 0 to 1 for each of 1, 8, 64"),
        ({"shared_choice": {"1": 1.5, "8": 0.5, "64": 0}}, "shared_choice: expected a share"),
        ({"forced": "half"}, "forced: expected a number, got 'half'"),
    ],
)
def test_a_file_of_something_else_is_refused_by_field(tmp_path: Path, changes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Selection.read(Path(written(tmp_path, changes)))


def test_a_spec_that_is_given_its_blocks_is_refused(tmp_path: Path) -> None:
    given = {**BASE, "compression": None, "window": None, "combine": {"gate": "none"}}
    given["selection"] = {"block": 64, "count": 4, "indices": "input"}
    with pytest.raises(ValueError, match="expected a spec that chooses blocks by its queries"):
        draw_inputs(Spec.model_validate(given), 1000, device="cpu", kind=written(tmp_path, {}))


@pytest.mark.parametrize("process", [Process(0.9), Process(0.9, 2), Process(0.0), Process(1.0)], ids=str)
def test_processes_have_unit_variance_and_the_correlation_that_they_say(process: Process) -> None:
    from nsa_gen.bench.inputs import _autoregressive

    x = _autoregressive((1, 700, 64, 64), "cpu", torch.Generator().manual_seed(0), process)[0]
    assert x[0].square().mean().item() == pytest.approx(1, abs=0.05)  # from the first value on
    for lag in (0, 1, 8, 64):
        found = (x[lag:] * x[: len(x) - lag]).mean().item()
        assert found == pytest.approx(process.correlation(lag), abs=0.03), lag


def test_weights_give_the_correlations_that_were_asked_for() -> None:
    for wanted in ({1: 0.95, 8: 0.7, 64: 0.3}, {1: 0.99, 8: 0.8, 64: 0.5}, {1: 0.6, 8: 0.5, 64: 0.5}):
        weights = process_weights(wanted)
        assert sum(weights) == pytest.approx(1) and min(weights) >= 0
        for lag, correlation in wanted.items():
            found = sum(weight * process.correlation(lag) for weight, process in zip(weights, PROCESSES, strict=True))
            assert found == pytest.approx(correlation, abs=0.01)
