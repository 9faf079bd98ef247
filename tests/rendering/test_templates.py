"""Templates are Python as they stand, so that an editor, a linter and a reader see what is emitted."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import pytest
from jinja2 import meta, nodes

from nsa_gen._resources import templates_dir
from nsa_gen.lowering.inference import InferencePlan
from nsa_gen.lowering.plan import Plan
from nsa_gen.rendering.environment import environment

# Those that still assemble names or lists of arguments. None may be added; one that becomes Python is taken off.
NOT_YET = {
    "package/steps.py.jinja",
    "package/arguments.py.jinja",
    "package/operator.py.jinja",
    "package/cache.py.jinja",
    "package/decode.py.jinja",
    "package/inference.py.jinja",
    "package/inference_ops.py.jinja",
    "package/module.py.jinja",
    "package/ops.py.jinja",
    "package/storage.py.jinja",
}


def python_of(path: Path) -> str:
    """A template without the header's place, which is its first line."""
    return path.read_text(encoding="utf-8").removeprefix("{{ header }}\n")


@pytest.mark.parametrize("path", sorted(templates_dir().rglob("*.py.jinja")), ids=lambda path: path.name)
def test_a_template_is_python_as_it_stands(path: Path) -> None:
    name = path.relative_to(templates_dir()).as_posix()
    try:
        ast.parse(python_of(path))
    except SyntaxError:
        assert name in NOT_YET, f"{name} is no Python: use a line `#% if ...` and expressions where Python has them"
    else:
        assert name not in NOT_YET, f"{name} is Python now: take it off the list"


@pytest.mark.parametrize("path", sorted(templates_dir().rglob("*.py.jinja")), ids=lambda path: path.name)
def test_a_template_reads_the_plan_and_not_the_spec(path: Path) -> None:
    tree = environment().parse(path.read_text(encoding="utf-8"))
    assert not meta.find_undeclared_variables(tree) & {"spec", "program"}
    assert not [node for node in tree.find_all(nodes.Getattr) if node.attr == "spec"]


def test_the_plan_answers_without_its_spec() -> None:
    """`spec` is there for names, digests and the oracle: what a property of the plan needs is a field of the plan."""
    for answers in (Plan, InferencePlan):
        tree = ast.parse(inspect.getsource(answers))
        assert not [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr == "spec"]


def test_statements_and_comments_on_lines_of_their_own_leave_no_line_and_keep_blank_ones() -> None:
    text = "a\n\n#% if yes\nb\n\n\n    #% endif\n#%# said of the template\nc  #% no statement\n"
    assert environment().from_string(text).render(yes=True) == "a\n\nb\n\n\nc  #% no statement\n"
    assert environment().from_string(text).render(yes=False) == "a\n\nc  #% no statement\n"
