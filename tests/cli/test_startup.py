"""`nsa-gen --help` and `nsa-gen check` answer at once, because neither imports what it does not need."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("arguments", "unwanted"),
    [
        (["--help"], {"torch", "triton", "sympy", "pydantic", "rich", "jinja2", "numpy", "yaml"}),
        # typer itself may use pydantic to read a command's numbers.
        (["compile", "--help"], {"torch", "triton", "sympy", "rich", "jinja2", "numpy", "yaml"}),
        (["check", "tiny"], {"torch", "triton", "sympy", "rich", "jinja2", "numpy"}),
    ],
)
def test_it_imports_nothing_it_does_not_need(arguments, unwanted):
    program = (
        "import sys\nfrom nsa_gen.cli import main\ncode = main(sys.argv[1:])\n"
        "print('IMPORTED', *{name.partition('.')[0] for name in sys.modules})\nsys.exit(code)\n"
    )
    answer = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=True)
    imported = set(answer.stdout.splitlines()[-1].split()[1:])
    assert "nsa_gen" in imported
    assert sorted(imported & unwanted) == []


def test_importing_the_library_imports_no_room_of_it():
    program = "import sys, nsa_gen\nprint(*[name for name in sys.modules if name.startswith('nsa_gen.')])"
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert answer.stdout.split() == []
