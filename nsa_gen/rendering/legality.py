"""The check of tuned values that a package contains, for code that checks a tuned file without the package."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from nsa_gen.lowering import Plan
from nsa_gen.lowering.space import legal_space
from nsa_gen.runtime.space import Space

Check = Callable[[str, Mapping[str, Any]], str]
"""Maps a kernel's name and values of its tunables to a description of what is wrong, or to ""."""


def check_of(program: Plan) -> Check:
    """The check that the package of a program contains."""
    legal = legal_space(program)
    values = {kernel: each.values for kernel, each in legal.items()}
    return Space(values, {kernel: each.rules for kernel, each in legal.items()}).problem


def problems(check: Check, configs: Mapping[str, Mapping[str, Any]]) -> str:
    """A description of what is wrong with the configurations of an entry, or ""."""
    return "; ".join(filter(None, (check(kernel, values) for kernel, values in configs.items())))
