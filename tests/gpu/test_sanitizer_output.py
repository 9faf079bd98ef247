"""What compute-sanitizer's output means: no error only where it says so, and every hazard counts."""

from __future__ import annotations

from typing import Any

from tests.gpu.sanitizer import hazards, judge

CLEAN = (
    "========= COMPUTE-SANITIZER\ntokens 37\n========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n"
)
RACE = """\
========= COMPUTE-SANITIZER
========= Error: Race reported between Write access at selected_forward_kernel+0x1a0 in /x/selected.py:237
=========     and Read access at selected_forward_kernel+0x2b0 in /x/selected.py:240 [6136 hazards]
=========
========= Warning: Race reported between Write access at merge+0x10 in /x/merge.py:7
=========     and Write access at merge+0x10 in /x/merge.py:7 [2 hazards]
=========
========= RACECHECK SUMMARY: 2 hazards displayed (1 error, 1 warning)
"""
WARNING = """\
========= Warning: Race reported between Write access at merge+0x10 in /x/merge.py:7
=========     and Write access at merge+0x10 in /x/merge.py:7 [2 hazards]
========= RACECHECK SUMMARY: 1 hazard displayed (0 errors, 1 warning)
"""


def judged(log: str) -> dict[str, Any]:
    return judge("racecheck", log)


def test_no_hazard_is_ok_only_with_a_summary_that_says_so() -> None:
    assert judged(CLEAN) == {
        "sanitizer_errors": 0,
        "problem": "",
        "hazards": [],
        "hazard_errors": 0,
        "hazard_warnings": 0,
    }
    for log in ("", "tokens 37\n", CLEAN.replace("=========", "")):
        assert "no error summary" in judged(log)["problem"]
    assert judged("========= ERROR SUMMARY: 0 errors\n")["problem"]  # the summary of another tool


def test_every_hazard_is_a_failure_and_is_named_with_both_accesses() -> None:
    found = judged(RACE)
    assert (found["sanitizer_errors"], found["hazard_errors"], found["hazard_warnings"]) == (2, 1, 1)
    assert "counted 2 hazards" in found["problem"]
    assert "6136 times Write access at selected_forward_kernel+0x1a0" in found["problem"]
    first, second = hazards(RACE)
    assert (first.severity, first.count) == ("Error", 6136) and "+0x2b0" in first.second
    assert (second.severity, second.count, second.first) == ("Warning", 2, second.second)
    assert judged(WARNING)["problem"] and judged(WARNING)["hazard_errors"] == 0


def test_hazards_of_a_run_that_was_cut_short_still_count() -> None:
    assert "counted 2 hazards" in judged(RACE.rpartition("========= RACECHECK")[0])["problem"]
