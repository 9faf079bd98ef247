"""The doctored package of `tuner_faults`, and the verdict on a run that met it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from nsa_gen.rendering import generate
from nsa_gen.spec import parse_spec
from nsa_gen.tuning import Bucket, BucketResult, TuneReport
from tests.gpu import test_suite, tuner_faults

PROGRAM = """
import torch
from tuner_faults import configs, nsa_attention
q = torch.ones(1, 20, 8, 64, dtype=torch.float16)
k = v = torch.ones(1, 20, 2, 64, dtype=torch.float16)
usual = configs.DEFAULTS["interpreter"]["window_forward"]
print(nsa_attention(q, k, v)[0, 0, 0, 0].item())
with configs.override("window_forward", KEY_BLOCK=32):
    print(nsa_attention(q, k, v)[0, 0, 0, 0].item())
"""


def test_a_doctored_package_goes_wrong_for_the_one_configuration(tmp_path: Path, monkeypatch) -> None:
    package = generate(parse_spec(tuner_faults.SPEC.replace("bfloat16", "float16")), tmp_path / "sound")
    copy = tuner_faults.doctored(package, tmp_path / "doctored")
    config = {"QUERY_BLOCK": 16, "KEY_BLOCK": 32, "num_warps": 4, "num_stages": 1}
    script = {"fault": "wrong", "config": config, "flag": str(tmp_path / "flag")}
    monkeypatch.setenv("NSA_GEN_FAULT", json.dumps(script))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    answer = subprocess.run([sys.executable, "-c", PROGRAM], cwd=copy.parent, capture_output=True, text=True)
    assert answer.stdout.split() == ["1.0", "1.5"], answer.stderr


def test_the_configuration_that_goes_wrong_is_one_that_is_tried_and_not_the_default() -> None:
    spec = parse_spec(tuner_faults.SPEC)
    from nsa_gen.lowering import lower

    default = lower(spec).defaults["sm_90"][tuner_faults.KERNEL].mapping()
    assert tuner_faults.fault_config(spec) != default
    assert tuner_faults.fault_config(spec).keys() == default.keys()


def report(quarantined: dict[str, str], **changes: object) -> TuneReport:
    fields = {"bucket": Bucket(2048), "configs": {}, "saved": Path("somewhere"), **changes}
    return TuneReport("tuner_faults", "sm_90", None, {}, (BucketResult(**fields),), quarantined)


def name_of_culprit() -> str:
    config = tuner_faults.fault_config(parse_spec(tuner_faults.SPEC))
    return f"t2048_b1: window_forward {', '.join(f'{name}={value}' for name, value in config.items())}"


def test_a_run_that_quarantines_the_culprit_for_its_fault_is_as_it_should_be() -> None:
    hung = report({name_of_culprit(): "hung: no sign of life for 25 s"})
    assert tuner_faults.judge("hang", hung) == []
    assert tuner_faults.judge("none", report({})) == []


@pytest.mark.parametrize(
    ("found", "problem"),
    [
        (report({}), "nobody was quarantined"),
        (report({name_of_culprit(): "crashed"}), "expected hung, got crashed"),
        (report({name_of_culprit(): "hung", "t2048_b1: default": "hung"}), "another was blamed"),
        (report({name_of_culprit(): "hung"}, problem="not saved"), "not saved"),
        (report({name_of_culprit(): "hung"}, gain=0.9), "slower than the default"),
    ],
)
def test_a_run_that_takes_it_another_way_is_not(found: TuneReport, problem: str) -> None:
    assert any(problem in each for each in tuner_faults.judge("hang", found))


def test_every_fault_has_the_reason_that_is_expected_of_it() -> None:
    assert set(test_suite.FAULTS) == set(tuner_faults.EXPECTED)
