"""What voids a tuning: code that runs and the space that was searched, and nothing else."""

from __future__ import annotations

from nsa_gen.lowering import lower
from nsa_gen.rendering import render
from nsa_gen.rendering.identity import code_of, kernels_digest, space_digest
from nsa_gen.spec import load_spec
from nsa_gen.tuning.store import kernels_of
from tests.support import small_spec

FILES = render(small_spec())


def changed(name: str, old: str, new: str) -> dict[str, str]:
    assert old in FILES[name], (name, old)
    return {**FILES, name: FILES[name].replace(old, new, 1)}


def test_a_package_carries_the_digest_of_its_kernels() -> None:
    assert kernels_of(FILES) == kernels_digest(FILES)


def test_comments_docstrings_and_blank_lines_do_not_void_a_tuning() -> None:
    text = FILES["kernels/banded.py"]
    start = text.index('"""')
    other = text[:start] + '"""Another docstring,\n\nof other lines."""' + text[text.index('"""', start + 3) + 3 :]
    other = other.replace("import torch\n", "import torch  # a comment\n\n\n", 1)
    assert kernels_digest({**FILES, "kernels/banded.py": other}) == kernels_digest(FILES)


def test_modules_that_launch_nothing_do_not_void_a_tuning() -> None:
    for name in (
        "steps.py",
        "registration.py",
        "arguments.py",
        "__init__.py",
        "ops.py",
        "configs.py",
        "runtime/lookup.py",
    ):
        assert kernels_digest({**FILES, name: FILES[name] + "\nx = 1\n"}) == kernels_digest(FILES), name
    assert kernels_digest({**FILES, "decode.py": "x = 1\n"}) == kernels_digest(FILES), "the operator does not import it"


def test_code_that_runs_voids_a_tuning() -> None:
    before = kernels_digest(FILES)
    assert kernels_digest(changed("spec.py", "GROUP = tl.constexpr(2)", "GROUP = tl.constexpr(4)")) != before
    for name in (
        "operator.py",
        "kernels/banded.py",
        "kernels/primitives.py",
        "kernels/selected_key_major_lists.py",
        "runtime/sequences.py",
    ):
        assert kernels_digest({**FILES, name: FILES[name] + "\nx = 1\n"}) != before, name


def test_a_name_or_description_does_not_void_a_tuning() -> None:
    spec = load_spec("tiny")
    other = spec.model_copy(update={"name": "another", "description": "of the same kernels"})
    assert kernels_of(render(spec)) == kernels_of(render(other))


def test_the_space_is_its_tunables_their_values_and_their_constraints() -> None:
    program = lower(small_spec())
    same = lower(small_spec(window=12))
    assert space_digest(program) == space_digest(same)
    assert space_digest(program) != space_digest(lower(small_spec(block=32)))
    # A window of a whole block can do the local one.
    assert space_digest(program) != space_digest(lower(small_spec(window=16)))


def test_code_is_text_without_what_is_said_about_it() -> None:
    source = '"""Doc."""\n\nx = "a # b"  # said\n\n\ndef f():\n    """Doc\n    more."""\n    return f"{x}#"  \n'
    assert code_of(source) == 'x = "a # b"\ndef f():\n    return f"{x}#"'
