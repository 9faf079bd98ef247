"""What compute-sanitizer's output means: no error only where it says so, and every hazard counts."""

from __future__ import annotations

import pytest

from tools.gpu.pool import Outcome
from tools.gpu.sanitizer import hazards, judge

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


def judged(log: str, name: str = "racecheck plain", status: str = "ok") -> Outcome:
    detail = "" if status == "ok" else "not finite: o"
    return judge(Outcome(name, status, 1.0, detail, {"ok": status == "ok"}), log)  # type: ignore[arg-type]


def test_no_hazard_is_ok_only_with_a_summary_that_says_so() -> None:
    assert judged(CLEAN).ok and judged(CLEAN).result["sanitizer_errors"] == 0
    for log in ("", "tokens 37\n", CLEAN.replace("=========", "")):
        assert judged(log).status == "failed" and "no error summary" in judged(log).detail
    other = judged("========= ERROR SUMMARY: 0 errors\n")  # the summary of another tool
    assert other.status == "failed"


def test_every_hazard_is_a_failure_and_is_named_with_both_accesses() -> None:
    found = judged(RACE)
    assert found.status == "failed" and found.result["sanitizer_errors"] == 2
    assert (found.result["hazard_errors"], found.result["hazard_warnings"]) == (1, 1)
    assert (
        "counted 2 hazards" in found.detail
        and "6136 times Write access at selected_forward_kernel+0x1a0" in found.detail
    )
    first, second = hazards(RACE)
    assert (first.severity, first.count) == ("Error", 6136) and "+0x2b0" in first.second
    assert (second.severity, second.count, second.first) == ("Warning", 2, second.second)
    assert judged(WARNING).status == "failed" and judged(WARNING).result["hazard_errors"] == 0


def test_hazards_of_a_job_that_was_cut_short_still_count() -> None:
    cut = RACE.rpartition("========= RACECHECK")[0]
    assert judged(cut, status="timed out").status == "failed"
    assert judged("", status="timed out").status == "timed out" and judged("", status="not run").status == "not run"


def test_a_clean_log_does_not_mend_a_job_that_failed() -> None:
    for status in ("failed", "crashed", "timed out"):
        assert judged(CLEAN, status=status).status == status
        assert judged(CLEAN, status=status).detail == "not finite: o"


def test_trouble_of_the_tool_itself_is_a_failure() -> None:
    for line in ("========= Internal Sanitizer Error: out of memory", "========= Device not supported. Please refer"):
        assert judged(f"{line}\n{CLEAN}").status == "failed"
        assert "trouble itself" in judged(f"{line}\n{CLEAN}").detail


@pytest.mark.parametrize(
    ("status", "log", "expected", "detail"),
    [
        ("ok", "========= ERROR SUMMARY: 0 errors\n", "ok", ""),
        ("ok", "========= Invalid __global__ read\n========= ERROR SUMMARY: 2 errors\n", "failed", "counted 2 errors"),
        ("ok", "========= ERROR SUMMARY: 0 errors\n========= ERROR SUMMARY: 1 error\n", "failed", "counted 1 errors"),
        ("crashed", "========= Invalid\n========= ERROR SUMMARY: 1 error\n", "failed", "counted 1 errors"),
        ("crashed", "Device not supported\n", "failed", "no error summary"),
        ("ok", "", "failed", "no error summary"),
        ("failed", "========= ERROR SUMMARY: 0 errors\n", "failed", "not finite"),
        ("timed out", "", "timed out", "not finite"),
    ],
)
def test_a_memcheck_is_ok_only_with_a_summary_of_no_errors(status: str, log: str, expected: str, detail: str) -> None:
    after = judged(log, "memcheck plain", status)
    assert after.status == expected
    assert detail in after.detail
