"""Kernels under the quick interpreter compute what they compute under Triton's own, to the bit."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.conftest import PROJECT_ROOT
from tests.machine import GPU

BOTH = """
import torch
from nsa_gen.verification.calls import quick_interpreter
from tests.support import call_with_gradients, inputs_of, operator_of

op = operator_of(dtype="float16", count=2, dims=(16, 32))
inputs = inputs_of(op, 2, tokens_kv=40)
plain = call_with_gradients(op, inputs)
quick_interpreter()
for _ in range(2):
    quick = call_with_gradients(op, inputs)
    assert quick.keys() == plain.keys() and "dq" in quick
    assert all(torch.equal(x, quick[name]) for name, x in plain.items())
"""


@pytest.mark.skipif(GPU, reason="the interpreter serves machines without a GPU")
def test_outputs_and_gradients_are_those_of_the_interpreter_as_it_is_to_the_bit() -> None:
    done = subprocess.run(
        [sys.executable, "-c", BOTH], cwd=PROJECT_ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
