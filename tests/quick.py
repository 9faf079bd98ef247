"""Processes that run examples and blocks of pages under Triton's interpreter, without its needless work."""

from __future__ import annotations

import sys

QUICK = """\
import os
if os.environ.get("TRITON_INTERPRET") == "1":
    from nsa_gen.verification.calls import quick_interpreter
    quick_interpreter()
"""
SCRIPT = """\
import runpy, sys
del sys.argv[0]
sys.path[0] = os.path.dirname(sys.argv[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def quick_command(*command: str) -> list[str]:
    """`python *command`, which is a script and its arguments or "-c" and code, with a quick interpreter of kernels."""
    code, arguments = (QUICK + command[1], command[2:]) if command[0] == "-c" else (QUICK + SCRIPT, command)
    return [sys.executable, "-c", code, *arguments]
