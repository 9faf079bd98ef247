"""The specs that come with the generator, and loading by path or by name."""

from __future__ import annotations

import os
from pathlib import Path

from nsa_gen._resources import specs_dir
from nsa_gen.spec.errors import Problem, SpecError
from nsa_gen.spec.fields import did_you_mean, join
from nsa_gen.spec.model import Spec
from nsa_gen.spec.parse import parse_spec
from nsa_gen.spec.source import read_bytes


def shipped_specs() -> dict[str, Path]:
    """The shipped specs: name to file, in alphabetical order."""
    return {path.stem: path for path in sorted(specs_dir().glob("*.yaml"))}


def load_spec(source: str | os.PathLike[str]) -> Spec:
    """The spec in a file, or the shipped spec of that name.

    A string without a folder or suffix (``llama3_8b``) is the name of a shipped spec first, and a path otherwise.

    Raises:
        SpecError: the spec is invalid (the message has the line, column and field of every error), or there is no such
            file or name.
    """
    text = os.fspath(source)
    if isinstance(source, str) and not os.path.dirname(text) and not os.path.splitext(text)[1]:
        shipped = shipped_specs()
        if text in shipped:
            return parse_spec(read_bytes(shipped[text]), str(shipped[text]))
        if not os.path.exists(text):
            message = f"there is no such file, and no shipped spec of that name; shipped are {join(shipped, 'and')}"
            raise SpecError([Problem(text, 0, 0, "", message, did_you_mean(text, shipped))])
    return parse_spec(read_bytes(text), text)
