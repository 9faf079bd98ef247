"""What is wrong with a spec, and where: one `Problem` a mistake, all of them in one `SpecError`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Problem:
    """One mistake in a spec.

    Attributes:
        file: the file's name as the caller gave it, or ``<string>``.
        line: 1-based line; 0 when the mistake has no place in the text (a missing file, say).
        column: 1-based column, counted in characters; 0 when there is no line.
        field: dotted path of the field (``compression.stride``); empty when the whole file is meant.
        message: what was expected and what came.
        hint: how to mend it; may be empty.
    """

    file: str
    line: int
    column: int
    field: str
    message: str
    hint: str = ""

    def __str__(self) -> str:
        """One line in the form editors understand: ``file:line:column: field: message (hint)``."""
        place = f"{self.file}:{self.line}:{self.column}" if self.line else self.file
        field = f"{self.field}: " if self.field else ""
        hint = f" ({self.hint})" if self.hint else ""
        return f"{place}: {field}{self.message}{hint}"


class SpecError(ValueError):
    """A spec that cannot be used. ``problems`` holds every mistake found, in the order of the text."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        ordered = sorted(dict.fromkeys(problems), key=lambda problem: (problem.line, problem.column))
        if not ordered:
            raise ValueError("a SpecError needs at least one problem")
        self.problems: tuple[Problem, ...] = tuple(ordered)
        super().__init__(self.problems)

    def __str__(self) -> str:
        return "\n".join(str(problem) for problem in self.problems)
