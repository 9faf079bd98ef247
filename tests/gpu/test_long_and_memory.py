"""Rows of a long call on the keys that they see, and shares of a GPU's memory between processes."""

from __future__ import annotations

import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from nsa_gen.verification.reference.dense import OracleParameters
from nsa_gen.verification.reference.gradients import reference_gradients
from nsa_gen.verification.reference.inputs import make_inputs
from tests.gpu.long import check_rows
from tests.gpu.support import variant


@pytest.fixture(scope="module")
def whole_call():
    """Inputs of 90 tokens and what a right operator makes of them: the oracle stands in for it."""
    spec = variant("tiny", "float32")
    p = OracleParameters.from_spec(spec)
    inputs = make_inputs(spec, batch=1, tokens=90, dtype=torch.float32, seed=3)
    found = reference_gradients(p, inputs)
    return p, inputs, found


def as_call(found, **replaced: torch.Tensor):
    aux = {name: x for name, x in found.outputs.tensors().items() if name != "o"}
    gradients = dict(found.gradients)
    for name, x in replaced.items():
        (aux if name in aux else gradients)[name] = x
    tensors = {"o": replaced.get("o", found.outputs.o), **aux}
    return SimpleNamespace(aux=aux, gradients=gradients, tensors=lambda: tensors)


@pytest.mark.parametrize(("start", "end"), [(81, 90), (40, 52), (0, 7)])
def test_rows_of_a_long_call_agree_with_the_oracle_on_those_rows_alone(whole_call, start, end):
    p, inputs, found = whole_call
    rows = check_rows(p, inputs, as_call(found), start, end)
    assert [row for row in rows if not row.ok] == []
    names = {row.quantity for row in rows}
    assert {"o", "o_cmp", "lse_slc", "o_win", "dq", "dgates", "selection"} <= names
    assert ({"dk", "dv"} <= names) == (end == 90)


@pytest.mark.parametrize("name", ["o", "o_slc", "lse_win", "q", "k", "v", "gates"])
def test_a_wrong_row_of_a_long_call_is_found(whole_call, name):
    p, inputs, found = whole_call
    right = {**found.outputs.tensors(), **found.gradients}[name]
    wrong = right.clone()
    wrong[:, 85] *= 1.001
    rows = check_rows(p, inputs, as_call(found, **{name: wrong}), 81, 90)
    bad = {row.quantity for row in rows if not row.ok}
    assert bad == {name if name.startswith(("o", "lse")) else f"d{name}"}


def test_a_wrong_choice_of_blocks_in_a_long_call_is_found(whole_call):
    p, inputs, found = whole_call
    indices = found.outputs.indices.clone()
    indices[:, 85] = torch.tensor([0, 1, 2, 3], dtype=torch.int32)  # without the query's own block
    rows = check_rows(p, inputs, as_call(found, indices=indices), 81, 90)
    assert "selection" in {row.quantity for row in rows if not row.ok}


def test_shares_of_memory_are_taken_all_at_once_or_not_at_all(tmp_path, capsys, monkeypatch):
    from tests.gpu import support as packages

    with packages.memory_slot(1, 3, tmp_path), packages.memory_slot(2, 3, tmp_path):
        slept: list[float] = []

        def give_up(seconds: float) -> None:
            slept.append(seconds)
            raise TimeoutError

        monkeypatch.setattr(packages.time, "sleep", give_up)
        with pytest.raises(TimeoutError), packages.memory_slot(2, 3, tmp_path):
            pass
    assert slept and "waiting" in capsys.readouterr().out
    with packages.memory_slot(7, 3, tmp_path):  # more than there are: all of them
        pass


def test_a_share_of_memory_is_held_by_one_process_and_given_back_by_one_that_is_killed(tmp_path, project_root):
    code = (
        "import sys, time; from pathlib import Path; from tests.gpu.support import memory_slot\n"
        f"with memory_slot(1, 1, Path({str(tmp_path)!r})): print('held', flush=True); time.sleep(float(sys.argv[1]))"
    )

    def start(seconds: float) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", code, str(seconds)]
        return subprocess.Popen(command, cwd=project_root, stdout=subprocess.PIPE, text=True)

    first = start(60)
    assert first.stdout is not None
    assert first.stdout.readline() == "held\n"
    second = start(0)
    assert second.stdout is not None
    assert second.stdout.readline().startswith("waiting")
    time.sleep(0.5)
    assert second.poll() is None
    first.kill()
    assert second.stdout.readline() == "held\n"
    assert second.wait() == 0
    first.wait()
    first.stdout.close()
    second.stdout.close()
