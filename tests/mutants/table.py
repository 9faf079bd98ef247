"""All mutants, and docs/mutants.md: `python -m tests.mutants.table` prints the page, `--write` writes it.

`python -m tests.mutants.table NAME...` makes the mutants named and shows what fails in their checks.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

if __name__ == "__main__":
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton

from tests.mutants import (
    alignment,
    attention,
    backward,
    decode_step,
    index_scores,
    inference,
    joint,
    key_major,
    key_major_backward,
    large_sizes,
    local_in_window,
    mean_scores,
    options,
    packing,
    scopes,
    scorer_alone,
    selection,
    sink,
)
from tests.mutants.model import CacheCheck, Check, Equivalent, Mutant, build, failures

MUTANTS: tuple[Mutant, ...] = (
    *attention.MUTANTS,
    *selection.MUTANTS,
    *mean_scores.MUTANTS,
    *index_scores.MUTANTS,
    *alignment.MUTANTS,
    *scopes.MUTANTS,
    *scorer_alone.MUTANTS,
    *large_sizes.MUTANTS,
    *packing.MUTANTS,
    *backward.MUTANTS,
    *key_major.MUTANTS,
    *key_major_backward.MUTANTS,
    *local_in_window.MUTANTS,
    *sink.MUTANTS,
    *joint.MUTANTS,
    *inference.MUTANTS,
    *decode_step.MUTANTS,
    *options.MUTANTS,
)
EQUIVALENT: tuple[Equivalent, ...] = options.EQUIVALENT
BY_NAME = {mutant.name: mutant for mutant in MUTANTS}
CHECKS: tuple[Check | CacheCheck, ...] = tuple(dict.fromkeys(mutant.check for mutant in MUTANTS))

PAGE = Path(__file__).resolve().parents[2] / "docs" / "mutants.md"

HEAD = """\
# Mutants: the verification, tested

A check that has never failed proves little. Each mutant below is a generated package with one mistake put into it, and
`tests/mutants/` holds that the comparisons of `nsa_gen.verification` fail on it. Each check also passes on the package
as it is generated, so it is the mistake that fails. A mutant that survives fails the tests, and so does one whose text
is no longer in the package: when a template changes, its mutants change with it.

A check is one call of the package of a small spec, compared with the float64 oracle as `nsa-gen verify` does it; `T` is
the length, a packed batch is the list of its sequences' lengths. Lengths and seeds are chosen for the mutants here;
`verify` derives its own from a spec's boundaries. Selected attention goes block by block unless a check says
*query-major* (token by token, or its forward alone), and *chunks of* a number is the most tokens that a chunk of its
inverted index has: the index of these checks has several, as that of a long sequence has. With *local blocks in the
window* the window's kernels do those of the selected branch, and what is *recomputed* the backward computes again. A
tunable and a number are a tile size, or a number of shares, other than the interpreter's. Four kinds of check alter
the inputs in a way of their own: *fewer counts* (counts passed with the caller's indices), *sharp* (queries 600 times
larger, so that probabilities underflow to 0), *padded* (rows of NaN behind the last packed sequence) and *rows far
apart* (offsets beyond 2^31 elements, in a sparse file; compared bit by bit with the same numbers close together). The
last column names quantities that fail, as the report of `verify` names them.

Mutants of the cache and of decode have checks of another form: what happens to a cache, step by step, each step that
attends being compared with one long forward.

The checks run under Triton's interpreter, whose tile sizes are known: what a mutant reads or writes out of turn lies
inside the tensors then. On a machine with a GPU they are skipped.

This page is written by `python -m tests.mutants.table --write`.
"""

EQUIVALENT_HEAD = """
## Edits that change no result

They look like mistakes and are none. The tests hold that each leaves every bit of a check as it is.
"""


def page() -> str:
    """The text of docs/mutants.md."""
    lines = [HEAD, f"{len(MUTANTS)} mutants, {len(CHECKS)} checks.", ""]
    lines += ["| mutant | the mistake | file | the check | fails |", "|---|---|---|---|---|"]
    for mutant in MUTANTS:
        files = ", ".join(dict.fromkeys(f"`{edit.file}`" for edit in mutant.edits))
        killed = ", ".join(f"`{quantity}`" for quantity in mutant.killed_by)
        lines.append(f"| `{mutant.name}` | {mutant.mistake} | {files} | {mutant.check.label} | {killed} |")
    lines += [EQUIVALENT_HEAD, "| edit | what it changes | file | why nothing else |", "|---|---|---|---|"]
    for each in EQUIVALENT:
        files = ", ".join(dict.fromkeys(f"`{edit.file}`" for edit in each.edits))
        lines.append(f"| `{each.name}` | {each.edit_in_words} | {files} | {each.reason} |")
    return "\n".join(lines) + "\n"


def show(names: list[str]) -> None:
    """Make mutants and print what fails in their checks, without and with the mistake."""
    clean: dict[Check | CacheCheck, dict[str, str]] = {}
    for name in names:
        mutant = BY_NAME[name]
        started = time.perf_counter()
        if mutant.check not in clean:
            clean[mutant.check] = failures(mutant.check)
            print(f"-- {mutant.check.label}: {clean[mutant.check] or 'passes'} {time.perf_counter() - started:.1f} s")
        started = time.perf_counter()
        found = failures(mutant.check, build(mutant))
        verdict = "killed" if set(mutant.killed_by) <= found.keys() else "SURVIVES"
        print(f"{name}: {verdict} {time.perf_counter() - started:.1f} s", flush=True)
        for quantity, reason in found.items():
            print(f"    {quantity}: {reason}")


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        PAGE.write_text(page())
    elif sys.argv[1:]:
        show(sys.argv[1:] if sys.argv[1:] != ["all"] else list(BY_NAME))
    else:
        print(page(), end="")
