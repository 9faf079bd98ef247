"""The search with a GPU that is a formula: what is quicker is found, what is not is left alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nsa_gen.hardware import gpu_for_target
from nsa_gen.lowering import lower
from nsa_gen.spec import parse_spec
from nsa_gen.tuning import EFFORTS, BackendLost, Bucket, TuneReport, tune
from nsa_gen.tuning.race import Candidate, Race, Reading, Times, pick, scores, spread
from nsa_gen.tuning.space import is_legal, kernel_space
from tests.tuning.fakes import SPEC, fake_tools, spec

H100 = gpu_for_target("sm_90")
DEFAULTS = {name: config.mapping() for name, config in lower(spec()).defaults["sm_90"].items()}


def tuned(cache: Path, script: dict[str, Any] | None = None, **settings: Any) -> TuneReport:
    tools = fake_tools(cache, script)
    return tune(spec(), tools=tools, **{"shapes": (8192,), "effort": "quick", **settings})


def began(log: Path) -> list[dict[str, Any]]:
    """The candidates that a fake GPU was asked about, in order."""
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def other_tile(kernel: str, number: int = 2) -> str:
    """A rule that holds for one candidate of a kernel, not its default, that every effort tries."""
    program = lower(spec())
    space = kernel_space(program, program.kernel(kernel), H100, Bucket(8192), EFFORTS["quick"].candidates)
    return " ".join([kernel, *(f"{name}={value}" for name, value in space.candidates[number].items())])


def config_of(rule: str) -> dict[str, int]:
    """The configuration that a rule names."""
    return {name: int(value) for name, value in (each.split("=") for each in rule.split()[1:])}


def test_a_quicker_tile_is_found_and_saved_with_every_value_of_its_kernel(cache: Path) -> None:
    rule = other_tile("window_forward")
    report = tuned(cache, {"times": {"forward": {rule: 2.0}}})
    (result,) = report.results
    assert result.configs == {"window_forward": config_of(rule)} and report.ok
    assert result.configs["window_forward"].keys() == DEFAULTS["window_forward"].keys()
    assert result.gain == pytest.approx(30 / 28)
    assert result.times["correlated"]["forward"] == {"default": 10.0, "tuned": 8.0}
    document = json.loads(result.saved.read_text())
    assert document["configs"] == result.configs and document["result"]["gain"] == pytest.approx(30 / 28, abs=1e-3)


def test_a_backward_kernel_is_judged_by_the_backward_alone(cache: Path) -> None:
    rule = other_tile("window_backward_dkdv")
    report = tuned(cache, {"times": {"backward": {rule: 4.0}}})
    assert set(report.results[0].configs) == {"window_backward_dkdv"}


def test_where_nothing_is_quicker_by_more_than_noise_the_default_stays(cache: Path) -> None:
    script = {"times": {"forward": {other_tile("window_forward"): 0.01}}}
    (result,) = tuned(cache, script).results
    assert result.configs == {} and result.gain == 1.0
    assert result.saved.is_file(), "that the default won is a result too"


def test_what_gains_in_one_pass_and_loses_in_the_other_is_not_taken(cache: Path) -> None:
    flipped = 1 - DEFAULTS["selected_attention"]["KEY_MAJOR_FORWARD"]
    rule = f"selected_attention KEY_MAJOR_FORWARD={flipped}"
    (result,) = tuned(cache, {"times": {"forward": {rule: -1.0}, "backward": {rule: 5.0}}}).results
    assert result.configs.get("selected_attention", {}).get("KEY_MAJOR_FORWARD") != flipped


def test_schedules_compete_end_to_end_with_the_winners_of_their_own_kernels(cache: Path) -> None:
    """The other schedule is slower with the default's tiles, and quicker with a tile that only it runs."""
    flipped = 1 - DEFAULTS["selected_attention"]["KEY_MAJOR_FORWARD"]
    kernel = "selected_forward_key_major" if flipped else "selected_forward"
    rule = other_tile(kernel)
    script = {"times": {"forward": {f"selected_attention KEY_MAJOR_FORWARD={flipped}": -2.0, rule: 5.0}}}
    (result,) = tuned(cache, script).results
    assert result.configs["selected_attention"]["KEY_MAJOR_FORWARD"] == flipped
    assert result.configs[kernel] == config_of(rule)


def test_kernels_of_a_hopeless_schedule_are_not_timed(cache: Path, tmp_path: Path) -> None:
    flipped = 1 - DEFAULTS["selected_attention"]["KEY_MAJOR_FORWARD"]
    kernel = "selected_forward_key_major" if flipped else "selected_forward"
    log = tmp_path / "log"
    tuned(cache, {"times": {"forward": {f"selected_attention KEY_MAJOR_FORWARD={flipped}": -90.0}}, "log": str(log)})
    assert not [each for each in began(log) if kernel in each["configs"]]


def test_who_does_the_local_blocks_is_decided_for_all_passes_or_left_alone(cache: Path, tmp_path: Path) -> None:
    rest = SPEC.replace(
        "selection: {block: 64, count: 3, indices: input}", "selection: {block: 64, count: 3, local: 1}"
    )
    whole = parse_spec(rest.replace("{size: 10}", "{size: 64}\ncompression: {block: 32, stride: 16, phi: mean}"))
    rule, log = "selected_attention LOCAL_IN_WINDOW=1", tmp_path / "log"
    script = {"times": {"forward": {rule: 3.0}, "backward": {rule: 1.0}}, "log": str(log)}
    call: dict[str, Any] = {"tools": fake_tools(cache, script), "shapes": (8192,), "effort": "quick"}
    (result,) = tune(whole, passes=("forward",), **call).results
    assert result.configs == {} and began(log)
    assert all(each["configs"].get("selected_attention", {}).get("LOCAL_IN_WINDOW", 0) == 0 for each in began(log))
    (result,) = tune(whole, **call).results
    assert result.configs["selected_attention"]["LOCAL_IN_WINDOW"] == 1


def test_sizes_of_chunks_are_tried_around_the_default(cache: Path) -> None:
    size = DEFAULTS["selected_attention"]["CHUNK_TOKENS"] // 2
    (result,) = tuned(cache, {"times": {"backward": {f"selected_attention CHUNK_TOKENS={size}": 3.0}}}).results
    assert result.configs["selected_attention"] == {**DEFAULTS["selected_attention"], "CHUNK_TOKENS": size}


def test_everything_is_checked_before_it_is_timed_and_nothing_illegal_is_tried(cache: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    tuned(cache, {"log": str(log)})
    checked: list[dict[str, Any]] = []
    program = lower(spec())
    for each in began(log):
        if each["what"] == "check":
            checked.append(each["configs"])
        # By itself, or together with candidates of other kernels.
        assert any(each["configs"].items() <= one.items() for one in checked), each
        for kernel, values in each["configs"].items():
            assert is_legal(program, kernel, {**DEFAULTS[kernel], **values}, H100), each
    tried = {json.dumps(each["configs"], sort_keys=True) for each in began(log)}
    assert len(checked) < len(tried) and len(tried) > 20, "a check serves several"


def test_every_bucket_is_tuned_by_itself_and_checks_are_not_repeated(cache: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    report = tuned(cache, {"log": str(log)}, shapes=(8192, 60000))
    assert [each.bucket.tokens for each in report.results] == [8192, 65536]
    checks = [json.dumps(each["configs"], sort_keys=True) for each in began(log) if each["what"] == "check"]
    assert len(checks) == len(set(checks))


def test_a_budget_that_is_spent_still_ends_in_a_final_and_a_result(cache: Path) -> None:
    report = tuned(cache, {"times": {"forward": {other_tile("window_forward"): 2.0}}}, budget=0.001)
    assert report.results[0].cut_short and report.results[0].saved.is_file()


def test_a_budget_that_is_spent_before_anything_is_compared_saves_nothing(cache: Path) -> None:
    alone = parse_spec(SPEC.replace("selection: {block: 64, count: 3, indices: input}\n", ""))
    report = tune(alone, tools=fake_tools(cache), shapes=(8192,), effort="quick", budget=0.001)
    (result,) = report.results
    assert not report.ok and result.saved is None and "before anything was compared" in result.problem


def test_a_second_sweep_keeps_what_the_first_has_found(cache: Path) -> None:
    rule = other_tile("window_forward")
    (result,) = tuned(cache, {"times": {"forward": {rule: 2.0}}}, effort="thorough").results
    assert result.configs == {"window_forward": config_of(rule)}


def test_forward_alone_tunes_no_backward_kernel(cache: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    report = tuned(cache, {"log": str(log)}, passes=("forward",))
    assert not [each for each in began(log) if any("backward" in kernel for kernel in each["configs"])]
    assert set(report.results[0].times.get("independent", {"forward": {}})) == {"forward"}


def test_forward_alone_leaves_the_backward_what_an_earlier_tuning_found(cache: Path) -> None:
    dkdv, window = other_tile("window_backward_dkdv"), other_tile("window_forward")
    whole = {"forward": {window: 1.0}, "backward": {dkdv: 3.0, "selected_attention CHUNK_TOKENS=4096": 3.0}}
    (first,) = tuned(cache, {"times": whole}).results
    assert first.configs.keys() >= {"window_forward", "window_backward_dkdv"}
    combine = other_tile("combine_forward", 1)
    (second,) = tuned(cache, {"times": {"forward": {combine: 2.0}}}, passes=("forward",)).results
    document = json.loads(second.saved.read_text())
    assert second.saved == first.saved and document["result"]["passes"] == ["forward", "backward"]
    kept = {name: values for name, values in first.configs.items() if name not in ("window_forward",)}
    assert document["configs"] == {**kept, "combine_forward": config_of(combine)}
    assert set(document["result"]["ms"]["independent"]) == {"forward", "backward"}
    (third,) = tuned(cache, {}).results
    assert json.loads(third.saved.read_text())["configs"] == {}, "a tuning of both replaces both"


def test_forward_alone_leaves_alone_from_when_on_hoppers_kernel_computes_the_gradients(cache: Path) -> None:
    (first,) = tuned(cache, {"times": {"backward": {"selected_backward HOPPER_BACKWARD_TOKENS=4096": 3.0}}}).results
    assert first.configs["selected_backward"] == {"HOPPER_BACKWARD_TOKENS": 4096}
    (forward,) = tuned(cache, {}, passes=("forward",)).results
    assert json.loads(forward.saved.read_text())["configs"]["selected_backward"] == first.configs["selected_backward"]


DECODING = """\
version: 1
name: decoding
heads: {query: 4, kv: 1}
head_dim: 64
dtype: bfloat16
compression: {block: 32, stride: 16, phi: mean}
selection: {block: 64, count: 4}
window: {size: 100}
passes: [forward, decode]
"""


def test_decode_has_buckets_of_its_own_for_every_batch_and_length(cache: Path, tmp_path: Path) -> None:
    of, log = parse_spec(DECODING), tmp_path / "log"
    program = lower(of)
    gpu_space = kernel_space(program, program.kernel("decode_step"), H100, Bucket(8192, decode=True), 6)
    quick = gpu_space.candidates[2]
    rule = " ".join(["decode_step", *(f"{name}={value}" for name, value in quick.items())])
    tools = fake_tools(cache, {"times": {"decode": {rule: 0.01}}, "log": str(log)})
    report = tune(of, tools=tools, passes=("decode",), shapes=(8192, 60000), batch=(1, 24), effort="quick")
    assert report.ok
    assert [each.bucket.name for each in report.results] == [
        "t8192_b1_decode",
        "t8192_b32_decode",
        "t65536_b1_decode",
        "t65536_b32_decode",
    ]
    assert report.results[0].configs == {"decode_step": quick}
    assert report.results[0].times == {"independent": {"decode": {"default": 0.05, "tuned": 0.04}}}
    # Only the kernels that a bucket's steps launch: three for many tokens of many sequences, else one.
    named = {kernel for each in began(log) for kernel in each["configs"]}
    assert named == {"decode_compressed", "decode_select", "decode_attend", "decode_step"}
    both = tune(of, tools=fake_tools(cache), passes=("forward", "decode"), shapes=(8192,), effort="quick")
    assert [each.bucket.decode for each in both.results] == [False, True]


def test_several_gpus_share_the_work(cache: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    alone = tuned(cache, {"times": {"forward": {other_tile("window_forward"): 2.0}}})
    shared = tuned(
        cache,
        {"times": {"forward": {other_tile("window_forward"): 2.0}}, "devices": 3, "log": str(log)},
    )
    assert {each["device"] for each in began(log)} == {"0", "1", "2"}
    assert shared.results[0].configs == alone.results[0].configs


def test_a_gpu_whose_worker_cannot_be_started_any_more_leaves_the_work_to_the_others(cache: Path) -> None:
    rule = other_tile("window_forward")
    tools = fake_tools(cache, {"times": {"forward": {rule: 2.0}}, "devices": 2})
    make = tools.backend

    def failing(*arguments: Any) -> Any:
        backend = make(*arguments)
        if arguments[3] == 1:
            backend.race = lambda *race: (_ for _ in ()).throw(BackendLost("no GPU any more"))
        return backend

    tools.backend = failing
    (result,) = tune(spec(), tools=tools, shapes=(8192,), effort="quick").results
    assert result.configs == {"window_forward": config_of(rule)}


def test_the_loss_of_every_gpu_ends_the_run_and_names_the_way_on(cache: Path) -> None:
    tools = fake_tools(cache, {})
    make = tools.backend

    def failing(*arguments: Any) -> Any:
        backend = make(*arguments)
        backend.race = lambda *race: (_ for _ in ()).throw(BackendLost("no GPU any more"))
        return backend

    tools.backend = failing
    with pytest.raises(BackendLost, match="no GPU any more"):
        tune(spec(), tools=tools, shapes=(8192,), effort="quick")
    assert any("--resume goes on from" in line for line in tools.said)  # type: ignore[attr-defined]


def test_wrong_settings_are_refused(cache: Path) -> None:
    with pytest.raises(ValueError, match="effort: expected one of quick, default, thorough, got 'hard'"):
        tuned(cache, effort="hard")
    with pytest.raises(ValueError, match="passes: expected forward"):
        tuned(cache, passes=("backward",))
    with pytest.raises(ValueError, match="batch: expected 1 for packed"):
        tuned(cache, packed=True, batch=4)


def test_a_worker_that_never_starts_ends_the_run_with_its_reason(cache: Path) -> None:
    with pytest.raises(BackendLost, match="does not start: crashed: the process exited with 9"):
        tuned(cache, {"start": "crash"})


# Races and scores


def test_a_race_is_read_as_it_was_sent() -> None:
    candidates = (Candidate(), Candidate({"window_forward": {"num_warps": 8}}))
    race = Race(candidates, Bucket(8192, 1, True), "correlated", ("forward", "backward"), 0.4, "window_forward")
    again = Race.from_json(json.loads(json.dumps(race.to_json())))
    assert again == race and again.key == race.key


def reading(ms: float, spread: float = 0.001, repeats: int = 9) -> Reading:
    return Reading({"forward": Times(ms, ms * (1 - spread / 2), ms * (1 + spread / 2), repeats)})


def test_the_base_wins_inside_noise_and_then_the_least_resources() -> None:
    steady = scores([[reading(10.0), reading(9.99), reading(9.0), reading(9.01)]], ("forward",))
    assert pick(steady, [(9.0,), (1.0,), (5.0,), (2.0,)]) == 3, "9.0 and 9.01 are equal, and the latter takes less"
    assert pick(steady[:2], [(9.0,), (1.0,)]) == 0
    noisy = scores([[reading(10.0, 0.5), reading(9.0, 0.5)]], ("forward",))
    assert pick(noisy, [(9.0,), (1.0,)]) == 0


def test_a_score_is_the_geometric_mean_over_the_kinds_of_input() -> None:
    found = scores([[reading(10.0), reading(5.0)], [reading(1.0), reading(2.0)]], ("forward",))
    assert found[0].ratio == 1.0 and found[1].ratio == pytest.approx(1.0)


def test_who_failed_in_one_race_is_out_and_a_base_that_failed_wins_nothing_less() -> None:
    found = scores([[reading(10.0), Reading(error="hung")], [reading(10.0), reading(1.0)]], ("forward",))
    assert pick(found, [(0.0,), (0.0,)]) == 0
    assert pick(scores([[Reading(error="hung"), reading(1.0)]], ("forward",)), [(0.0,), (0.0,)]) == 0


def test_the_base_goes_on_to_the_next_round_whatever_its_time() -> None:
    found = scores([[reading(10.0), reading(1.0), reading(2.0), reading(3.0)]], ("forward",))
    assert spread(found, 3) == [0, 1, 2]


def test_a_candidate_says_what_it_is() -> None:
    candidate = Candidate({"a": {"X": 1}}).with_configs({"a": {"Y": 2}, "b": {"Z": 3}})
    assert candidate.label == "a X=1, Y=2; b Z=3" and Candidate().label == "default"
