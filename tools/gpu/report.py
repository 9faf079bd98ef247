"""What the suite leaves behind: JSON a part, a summary, and a table short enough for the end of a terminal."""

from __future__ import annotations

import subprocess
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nsa_gen import machine as this_machine
from nsa_gen._files import json_text, write_whole
from tools.gpu.pool import Outcome

LONGEST_TABLE = 58


def machine(project: Path) -> dict[str, Any]:
    """What a benchmark says of the machine, and whether the checkout has changes that are not committed."""
    found = this_machine.machine()
    command = ("git", "-C", str(project), "status", "--porcelain", "--untracked-files=no")
    changed = subprocess.run(command, capture_output=True, text=True, check=False).stdout if found["commit"] else None
    return {**found, "commit_is_changed": None if changed is None else bool(changed.strip())}


def as_document(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """Outcomes as plain data."""
    return [
        {
            "name": outcome.name,
            "status": outcome.status,
            "seconds": round(outcome.seconds, 2),
            "detail": outcome.detail,
            "result": outcome.result,
        }
        for outcome in outcomes
    ]


def write_json(path: Path, document: Any) -> None:
    """Write JSON with objects and lists that hold no others on one line each, whole or not at all."""
    write_whole(path, json_text(document) + "\n")


def table(parts: Mapping[str, Sequence[Outcome]], notes: Sequence[str]) -> list[str]:
    """At most LONGEST_TABLE lines: what is not ok, then each part in short, then the verdict."""
    everything = [outcome for outcomes in parts.values() for outcome in outcomes]
    bad = [outcome for outcome in everything if not outcome.ok]
    lines: list[str] = []
    for outcome in bad[:14]:
        lines += [f"{outcome.status.upper()} {outcome.name}: {_why(outcome)}"]
    if len(bad) > 14:
        lines.append(f"... and {len(bad) - 14} more that are not ok")
    for outcome in parts.get("correctness", ()):
        lines.append(_verified(outcome))
    for part in ("examples", "soak"):
        if part in parts:
            lines += _counted(part, parts[part])
    for outcome in (
        outcome
        for part in ("inference", "repeats", "hopper", "hygiene", "long", "sanitizer", "far", "tuner_faults")
        for outcome in parts.get(part, ())
    ):
        result = outcome.result or {}
        facts = [f"{outcome.seconds:.0f} s"]
        if result.get("peak_bytes"):
            facts.append(f"peak {result['peak_bytes'] / 2**30:.1f} GiB")
        if result.get("forward_peak_bytes"):
            facts.append(f"forward {result['forward_peak_bytes'] / 2**30:.1f} GiB")
        if result.get("largest_elements"):
            facts.append(f"{result['largest_elements'] / 2**31:.2f} x 2^31 elements")
        facts += [f"{shape['repeats']} repeats at {shape['shape']}" for shape in result.get("shapes", ())]
        if result.get("rows"):
            facts.append(f"{len(result['rows'])} comparisons")
        facts += [
            f"{row['quantity']} {100 * row['error'] / row['bound']:.0f}% at {row['case']}"
            for row in result.get("rows", ())
            if row["measure"] == "bytes"
        ][-2:]
        if "fault" in result and "report" in result:
            facts += [f"{reason}"[:90] for reason in list(result["report"]["quarantined"].values())[:1]]
        if "hazards" in result:
            facts.append(f"{result['sanitizer_errors']} hazards")
        elif "sanitizer_errors" in result:
            facts.append(f"{result['sanitizer_errors']} errors")
        lines.append(f"{outcome.name:<30} {outcome.status:<10} {', '.join(facts)}")
    for part in ("pytorch", "training", "fla", "decode"):
        for outcome in parts.get(part, ()):
            lines += (outcome.result or {}).get("table", ())
    lines += _times(parts.get("bench", ()))
    lines += [f"note: {note}" for note in notes]
    room = LONGEST_TABLE - 1
    if len(lines) > room:
        lines = [*lines[: room - 1], f"... {len(lines) - room + 1} lines more in the JSON files"]
    return [*lines, f"{len(everything) - len(bad)} of {len(everything)} jobs ok"]


def totals(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """What drawn examples come to over all jobs of a part, those of jobs that were cut short included."""
    results = [outcome.result for outcome in outcomes if outcome.result and "examples" in outcome.result]
    counted: dict[str, Counter[str]] = {name: Counter() for name in ("properties", "kinds", "dtypes")}
    specs: set[str] = set()
    for result in results:
        for name in ("properties", "kinds"):
            counted[name].update(result.get(name, {}))
        for spec in result.get("specs", [result]):
            counted["dtypes"][spec["dtype"]] += spec["examples"]
            if spec["examples"]:
                specs.add(spec["yaml"])
    return {
        "examples": sum(result["examples"] for result in results),
        "comparisons": sum(result["comparisons"] for result in results),
        "failed": sum(result["failed"] for result in results),
        "specs": len(specs),
        "jobs": len(outcomes),
        **{name: dict(sorted(counts.items())) for name, counts in counted.items()},
    }


def _counted(part: str, outcomes: Sequence[Outcome]) -> list[str]:
    """A part of drawn examples in two lines."""
    found = totals(outcomes)
    ok = sum(outcome.ok for outcome in outcomes)
    each = ", ".join(f"{name} {count}" for name, count in found["properties"].items())
    dtypes = ", ".join(f"{name} {count}" for name, count in found["dtypes"].items())
    return [
        f"{part}: {found['examples']} examples of {found['specs']} specs ({dtypes}), {found['failed']} failed, "
        f"{found['comparisons']} comparisons, {ok} of {len(outcomes)} jobs ok",
        f"  {each}",
    ]


def _why(outcome: Outcome) -> str:
    result = outcome.result or {}
    rows = [row for row in result.get("rows", ()) if row.get("ok") is False]
    text = outcome.detail
    if rows and "check" in rows[0]:
        text += f"; {rows[0]['check']}: {rows[0]['detail']}"
    elif rows:
        row = rows[0]
        text += f"; {row['case']}: {row['quantity']} {row['problem'] or row['measure']}"
        if not row["problem"] and row["error"] is not None:
            text += f" {row['error']:.2e} of {row['bound']:.2e}"
    last = [line for line in text.strip().splitlines() if line.strip()]
    text = " ... ".join(last[:1] + last[1:][-1:])
    return text[:230]


def _verified(outcome: Outcome) -> str:
    rows = (outcome.result or {}).get("rows", ())
    used = [(row["error"] / row["bound"], row) for row in rows if row["bound"] and row["error"] is not None]
    worst = max(used, key=lambda pair: pair[0], default=None)
    said = "" if worst is None else f"worst {100 * worst[0]:.0f}% {worst[1]['quantity']} at {worst[1]['case']}"
    return f"{outcome.name:<30} {outcome.status:<10} {outcome.seconds:4.0f} s {len(rows):4d} comparisons {said}"[:140]


def _times(outcomes: Sequence[Outcome]) -> list[str]:
    lines = []
    for outcome in outcomes:
        result = outcome.result or {}
        cells: dict[int, dict[str, dict[str, float]]] = {}
        for row in result.get("rows", ()):
            cells.setdefault(row["tokens"], {}).setdefault(row["contender"], {})[row["direction"]] = row["median_ms"]
        for tokens, contenders in cells.items():
            shown = (f"{name} {found['forward']:.2f} / {found['backward']:.2f}" for name, found in contenders.items())
            lines.append(f"{outcome.name} {tokens}, forward / backward ms: {'; '.join(shown)}")
        top = ", ".join(f"{kernel['kernel'][:44]} {kernel['ms']:.2f}" for kernel in result.get("kernels", ())[:8])
        if top:
            lines.append(f"  kernels at {result['profiled_tokens']}, ms: {top}")
    return lines
