"""The check of tuned values that a package carries, for those that judge a tuned file without the package."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from nsa_gen.lowering import Plan
from nsa_gen.lowering.space import legal_space
from nsa_gen.runtime.space import Space

Check = Callable[[str, Mapping[str, Any]], str]
"""What is wrong with values of a kernel's tunables, "" where nothing is."""


def check_of(program: Plan) -> Check:
    """The check of a program's package."""
    legal = legal_space(program)
    values = {kernel: each.values for kernel, each in legal.items()}
    return Space(values, {kernel: each.rules for kernel, each in legal.items()}).problem


def problems(check: Check, configs: Mapping[str, Mapping[str, Any]]) -> str:
    """What is wrong with the configurations of an entry; "" where nothing is."""
    return "; ".join(filter(None, (check(kernel, values) for kernel, values in configs.items())))
