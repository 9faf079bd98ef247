"""Timing beside dense attention."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

import nsa_gen
from nsa_gen.bench import compare_with_dense


def test_without_a_gpu_it_refuses_rather_than_time_an_interpreter(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="expected a GPU"):
        next(compare_with_dense(ModuleType("package"), nsa_gen.load_spec("tiny"), [128]))


@pytest.mark.gpu
def test_it_gives_a_positive_time_for_each_pass_at_each_length(tmp_path, monkeypatch):
    monkeypatch.setenv("NSA_GEN_CACHE_DIR", str(tmp_path))
    spec = nsa_gen.load_spec("tiny")
    found = list(compare_with_dense(nsa_gen.load(spec), spec, [128, 500]))
    assert [one.tokens for one in found] == [128, 500]
    for one in found:
        times = (one.forward_ms, one.backward_ms, one.dense_forward_ms, one.dense_backward_ms)
        assert all(0 < time < 1000 for time in times)
