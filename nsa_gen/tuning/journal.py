"""Everything a tuning has found, on disk as soon as it is found: JSON lines, which an interrupted run resumes from.

The first line says what is tuned on what. Each further line answers one question the search may ask; a search that is
run again asks the same questions in the same order, and gets the answers from here as far as they go. Rounds of a race
are lines too, so that one which is interrupted goes on with those that are left.
"""

from __future__ import annotations

import json
import os
import threading
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from nsa_gen._files import read_bytes

JOURNAL_SCHEMA = 1


class JournalWarning(UserWarning):
    """The journal cannot be written, or an earlier one is not this run's."""


class Journal:
    """A file of answers by key.

    Args:
        path: the file. One that exists is continued with `resume`, else kept as `<name>.old`.
        heading: what is tuned on what; an earlier journal is only resumed if its heading is equal.
        resume: take the answers of an earlier run.
    """

    def __init__(self, path: Path, heading: Mapping[str, Any], *, resume: bool) -> None:
        self.path = path
        self.resumed = 0
        self._lock = threading.Lock()
        self._file: IO[str] | None = None
        self._answers: dict[str, Any] = {}
        self._rounds: dict[str, list[Any]] = {}
        self._heading = json.loads(json.dumps(dict(heading)))
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._take(resume)
            self._file = path.open("a", encoding="utf-8")
            if not path.stat().st_size:
                self._write({"journal": JOURNAL_SCHEMA, "heading": self._heading})
        except OSError as error:
            self._give_up(error)

    def get(self, key: str) -> Any:
        """The answer to a question, or None."""
        return self._answers.get(key)

    def put(self, key: str, kind: str, answer: Any, **more: Any) -> None:
        """Keep an answer, on disk before this returns. A disk that is full costs the journal, not the run."""
        with self._lock:
            self._answers[key] = answer
            self._write({"key": key, "kind": kind, **more, "answer": answer})

    def rounds(self, key: str) -> list[Any]:
        """Rounds of a race that an earlier run has come to."""
        return list(self._rounds.get(key, ()))

    def add_round(self, key: str, times: Any) -> None:
        """Keep the times of a round, on disk before this returns."""
        with self._lock:
            self._rounds.setdefault(key, []).append(times)
            self._write({"round": key, "times": times})

    def close(self) -> None:
        """End writing."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _take(self, resume: bool) -> None:
        """Read an earlier journal, or put it out of the way."""
        if not self.path.exists():
            return
        # Of anything but a regular file this is an OSError: a pipe would be waited for.
        lines = _whole_lines(self.path)
        heading = lines[0] if lines else {}
        same = heading.get("journal") == JOURNAL_SCHEMA and heading.get("heading") == self._heading
        if resume and same:
            self._answers = {line["key"]: line["answer"] for line in lines[1:] if "key" in line and "answer" in line}
            for line in lines[1:]:
                if "round" in line and "times" in line:
                    self._rounds.setdefault(line["round"], []).append(line["times"])
            self.resumed = len(self._answers)
            _cut_ragged_end(self.path)
            return
        if resume and lines:
            other = heading.get("heading") or {}
            names = [name for name, value in self._heading.items() if other.get(name) != value]
            warnings.warn(
                f"{self.path} is not resumed: another {', '.join(names) or 'schema'}; kept as {self.path.name}.old",
                JournalWarning,
                stacklevel=4,
            )
        os.replace(self.path, self.path.with_name(f"{self.path.name}.old"))

    def _write(self, line: Mapping[str, Any]) -> None:
        if self._file is None:
            return
        try:
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        self._file = None
        warnings.warn(f"{self.path} cannot be written, so this run cannot be resumed: {error}", JournalWarning, 3)


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    """The lines that their writer lived to finish and that are JSON objects."""
    found = []
    for line in read_bytes(path).split(b"\n")[:-1]:
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            found.append(value)
    return found


def _cut_ragged_end(path: Path) -> None:
    text = read_bytes(path)
    if text and not text.endswith(b"\n"):
        with path.open("r+b") as file:
            file.truncate(text.rfind(b"\n") + 1)
