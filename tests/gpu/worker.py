"""The process that runs tests on a GPU, `python -m tests.gpu.worker`: a test a request, see conftest.py."""

from __future__ import annotations

import ast
import importlib
from typing import Any

import pytest

from nsa_gen.hangs import note_launches
from nsa_gen.workers import Handle, Say, serve
from tests.gpu import common


def handle(request: dict[str, Any], say: Say) -> dict[str, str]:
    """Call a test function of a module with its parameters; {"skipped": reason} if it skips itself."""
    common.use(say)
    test = getattr(importlib.import_module(request["module"]), request["name"])
    try:
        test(**ast.literal_eval(request["arguments"]))
    except pytest.skip.Exception as skipped:
        return {"skipped": str(skipped)}
    return {}


def build(opening: dict[str, Any]) -> Handle:
    """What a worker answers with."""
    note_launches()
    return handle


if __name__ == "__main__":
    serve(build)
