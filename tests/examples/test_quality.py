"""The examples that train and evaluate models: their data, their runs, and the study of attentions."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import random
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from tests.machine import GPU

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """A cache of their own for the packages that runs load."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NSA_GEN_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


def example(name: str) -> ModuleType:
    """A script of the gallery as a module."""
    spec = importlib.util.spec_from_file_location(f"examples_{name}", ROOT / "examples" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def page_of(task: str, length: int = 300, seed: int = 0, **more: float) -> tuple[bytes, list[tuple[int, bytes]]]:
    """A sequence of a task, and its answers with the places where they begin."""
    from examples.quality.data import ANSWER, NOISE, TASKS, TEXT, library, task_page

    page = task_page(task, length, random.Random(seed), library(), held_out=False, **more)
    assert len(page.text) == len(page.kinds) == length
    kind = bytes([ANSWER + list(TASKS).index(task)])
    assert set(page.kinds) <= {NOISE, TEXT, kind[0]}
    marks = re.finditer(re.escape(kind) + b"+", page.kinds)
    return bytes(page.text), [(mark.start(), bytes(page.text[mark.start() : mark.end()])) for mark in marks]


# Data


@pytest.mark.parametrize("length", [32, 300, 4000])
def test_a_recalled_value_is_the_one_that_stands_behind_its_key(length):
    text, answers = page_of("recall", length)
    front, _, questions = text.rpartition(b"\x06")
    keys = [each[:-1] for each in questions.split()]
    assert len(keys) == len(set(keys)) == len(answers) >= 2
    known = dict(re.findall(b"(?<![a-z])(%s)([a-z]) " % b"|".join(keys), front[1 : 1 + 4 * len(keys)]))
    assert [answer for _, answer in answers] == [known[key] for key in keys]


@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
def test_a_needle_lies_at_its_depth_and_holds_the_answer(depth):
    text, ((place, answer),) = page_of("needle", 1000, depth=depth)
    start = text.index(b"\x07")
    assert start == pytest.approx(1 + depth * (1000 - 16), abs=2)
    assert text[start : start + 8] == b"\x07" + text[place - 2 : place] + answer + b"\x07"[:1]
    assert place + len(answer) == len(text)


def test_each_of_several_needles_is_asked_for_once_in_another_order():
    counts = set()
    for seed in range(12):
        text, answers = page_of("needle", 1000, seed)
        known = dict(re.findall(rb"\x07([a-z]{2})([a-z]{4})\x07", text))
        asked = [text[place - 2 : place] for place, _ in answers]
        assert sorted(asked) == sorted(known) and [answer for _, answer in answers] == [known[key] for key in asked]
        assert all(text[place - 3 : place - 2] == b"\x06" for place, _ in answers)
        counts.add(len(answers))
    assert counts == {1, 2, 3}  # at most one in 256 bytes


@pytest.mark.parametrize("seed", range(4))
def test_links_lead_from_the_question_to_the_answer_in_as_many_steps_as_it_says(seed):
    text, answers = page_of("hops", 400, seed)
    after = {a: b for a, b in re.findall(rb"([A-Za-z])>([A-Za-z]) ", text)}
    for place, answer in answers:
        node, steps = text[place - 2 : place - 1], int(text[place - 1 : place])
        assert text[place - 3 : place - 2] == b"\x06" and 1 <= steps <= 3
        for _ in range(steps):
            node = after[node]
        assert node == answer
    assert len(answers) >= 4


def test_what_is_copied_is_the_start_of_the_sequence():
    text, ((place, answer),) = page_of("copy", 400)
    assert text[1 : 1 + len(answer)] == answer and len(answer) == 399 // 4 and place + len(answer) == 400


def test_answers_of_the_regression_are_a_linear_function_of_the_digits():
    text, answers = page_of("regression", 800)
    rows = [(text[i] - ord("4"), text[i + 1] - ord("4"), text[i + 2] - ord("M")) for i in range(1, 797, 4)]
    inside = torch.tensor([row for row in rows if abs(row[2]) < 12], dtype=torch.float64)
    fitted = torch.linalg.lstsq(inside[:, :2], inside[:, 2:]).solution
    assert (inside[:, :2] @ fitted - inside[:, 2:]).abs().max() < 1.0  # rounding takes at most a half
    assert [place for place, _ in answers] == list(range(1 + 4 * 4 + 2, 798, 4))


def test_a_batch_depends_on_seed_step_and_row_alone_and_not_on_how_rows_are_dealt_out():
    from examples.quality.data import library, training_batch

    def draw(seed: int, step: int, rows: range) -> torch.Tensor:
        return training_batch(library(), seed, step, rows, 256, 0.5)[0]

    whole = draw(0, 3, range(8))
    assert torch.equal(whole, torch.cat([draw(0, 3, range(4)), draw(0, 3, range(4, 8))]))
    assert not torch.equal(whole, draw(0, 4, range(8))) and not torch.equal(whole, draw(1, 3, range(8)))


def test_sequences_are_of_the_tasks_that_were_asked_for():
    from examples.quality.data import TASKS, library, training_batch

    first = [1 + list(TASKS).index(task) for task in ("copy", "needle")]
    tokens, _ = training_batch(library(), 0, 0, range(12), 128, 1.0, ["copy", "needle"])
    assert set(tokens[:, 0].tolist()) == set(first)


def test_text_can_be_of_packages_too_and_has_a_file_in_twenty_held_out():
    from examples.quality.data import library

    alone, more = library(), library("jinja2")
    assert alone.digest != more.digest and more.train.startswith(alone.train)
    added = (len(more.train) - len(alone.train), len(more.held_out) - len(alone.held_out))
    assert added[0] > 5 * added[1] >= 0
    with pytest.raises(ValueError, match="packages: expected installed packages, got no_such_package"):
        library("jinja2,no_such_package")


def test_held_out_text_is_not_trained_on_and_tasks_are_held_out_at_other_lengths():
    from examples.quality.data import HELD_OUT_SHARES, TRAINED_SHARES, held_out_batch, library

    corpus = library()
    tokens, kinds = held_out_batch(corpus, "text", 200, range(6))
    assert all(bytes(row.tolist()) in corpus.held_out for row in tokens) and bool((kinds == 1).all())
    assert sum(bytes(row.tolist()) in corpus.train for row in tokens) == 0
    assert not set(HELD_OUT_SHARES) & set(TRAINED_SHARES)


def test_a_task_of_too_few_bytes_is_refused():
    from examples.quality.data import library, task_page

    with pytest.raises(ValueError, match="tokens: expected at least 32 bytes of a task, got 20"):
        task_page("copy", 20, random.Random(0), library(), held_out=False)


# The model


@pytest.mark.slow
@pytest.mark.skipif(GPU, reason="compares in Triton's interpreter")
def test_the_reference_gives_the_logits_and_gradients_of_the_operator():
    from examples.quality.model import Choice, Model

    models = [Model(Choice.parse(text), 32, 1, seed=1) for text in ("tiny", "reference:tiny")]
    models[1].load_state_dict(models[0].state_dict())
    tokens = torch.randint(256, (1, 40), generator=torch.Generator().manual_seed(0))
    found = []
    for model in models:
        logits = model(tokens)
        logits.square().mean().backward()
        found.append((logits, {name: p.grad for name, p in model.named_parameters()}))
    (ours, our_gradients), (theirs, their_gradients) = found
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    for name, gradient in their_gradients.items():
        torch.testing.assert_close(our_gradients[name], gradient, rtol=1e-3, atol=1e-6, msg=name)
    assert their_gradients["blocks.0.attention.gate_proj.weight"].abs().max() > 0


def test_attentions_start_with_the_same_numbers_in_what_they_have_in_common():
    from examples.quality.model import Choice, Model

    dense, sparse = (Model(Choice.parse(text), 32, 2, seed=3) for text in ("dense:tiny", "reference:tiny"))
    ours, theirs = dict(dense.named_parameters()), dict(sparse.named_parameters())
    assert set(theirs) - set(ours) == {
        f"blocks.{i}.attention.gate_proj.{p}" for i in (0, 1) for p in ("weight", "bias")
    }
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_a_model_does_not_see_bytes_that_come_later():
    from examples.quality.model import Choice, Model

    for text in ("dense", "reference:tiny"):
        model = Model(Choice.parse(text), 32, 2)
        tokens = torch.randint(256, (1, 96), generator=torch.Generator().manual_seed(0))
        changed = tokens.clone()
        changed[:, 60:] = 7
        with torch.no_grad():
            torch.testing.assert_close(model(tokens)[:, :60], model(changed)[:, :60])


def test_an_attention_that_no_layer_can_have_is_refused(tmp_path):
    from examples.quality.model import Choice

    with pytest.raises(
        ValueError, match=r"expected a spec that computes all it needs, got msa_m3, which takes indices"
    ):
        Choice.parse("reference:msa_m3")


# Training


def losses_of(folder: Path) -> list[tuple[float, float]]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(len(lines)))
    return [(line["text_loss"], line["answer_loss"]) for line in lines]


def test_sequences_grow_to_their_length_and_a_step_keeps_its_number_of_bytes(tmp_path, monkeypatch):
    from examples.quality import training
    from examples.quality.data import library
    from examples.quality.training import Settings, read_log
    from nsa_gen.spec import load_spec

    spec = load_spec("tiny").resolved_yaml()
    grown = Settings("dense", spec, tokens=8192, steps=100, growth=0.5)
    assert [grown.length(step) for step in (0, 9, 10, 20, 30, 40, 49, 50, 99)] == [
        256, 256, 512, 1024, 2048, 4096, 4096, 8192, 8192,
    ]  # fmt: skip
    assert {Settings("dense", spec, tokens=192, growth=0.5).length(step) for step in range(100)} == {192}
    short = Settings("dense", spec, width=16, layers=1, tokens=512, batch=2, steps=5, growth=0.8)
    shapes, step = [], training._step
    monkeypatch.setattr(training, "_step", lambda *given: shapes.append(given[-1][0].shape) or step(*given))
    training.train(short, tmp_path, library())
    assert shapes == [(8, 128), (8, 128), (4, 256), (4, 256), (2, 512)]
    assert [line["length"] for line in read_log(tmp_path / "log.jsonl")] == [128, 128, 256, 256, 512]


def test_each_task_of_a_step_has_the_same_weight_however_many_answers_it_has(monkeypatch):
    from examples.quality.data import TASKS, TEXT, library, task_page
    from examples.quality.training import Settings, _step, counted, loss_sums, optimiser_of
    from nsa_gen.spec import load_spec

    settings = Settings("dense", load_spec("tiny").resolved_yaml(), width=16, layers=1, answer_weight=0.5)
    pages = [task_page(task, 256, random.Random(0), library(), held_out=False) for task in ("copy", "needle")]
    tokens = torch.tensor([list(page.text) for page in pages])
    kinds = torch.tensor([list(page.kinds) for page in pages], dtype=torch.uint8)
    model = settings.model(torch.device("cpu"))
    sums, right = loss_sums(model(tokens), tokens, kinds)
    counts = counted(kinds)
    assert counts.tolist() == [(kinds == TEXT).sum(), 0, 4, 0, 255 // 4, 0]
    text, needle, copied = (sums / counts)[[0, 2, 4]].tolist()
    ((sums / counts.clamp(min=1)) @ torch.tensor([1.0, 0, 0.25, 0, 0.25, 0]).double()).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    wanted = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    optimiser = optimiser_of(model, 0.0, fused=False)
    found: list[torch.Tensor] = []
    monkeypatch.setattr(optimiser, "step", lambda: found.extend(p.grad.clone() for p in model.parameters()))
    line = _step(model, optimiser, settings, 0, (tokens, kinds))
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert line["text_loss"] == pytest.approx(text) and line["answer_loss"] == pytest.approx((needle + copied) / 2)
    assert set(line["tasks"]) == {"needle", "copy"} < set(TASKS)
    assert line["tasks"]["needle"] == {"loss": pytest.approx(needle), "accuracy": right[2].item() / 4}


SMALL = ["--width", "32", "--layers", "1", "--batch", "2", "--steps", "4", "--save-every", "1"]


@pytest.mark.parametrize("attention", ["dense", "reference:tiny"])
def test_two_steps_and_two_resumed_ones_have_the_losses_of_four(attention, tmp_path, capsys):
    pretrain = example("pretrain")
    run = [*SMALL, "--attention", attention, "--out"]
    pretrain.main([*run, str(tmp_path / "whole")])
    pretrain.main([*run, str(tmp_path / "parts"), "--stop-after", "2"])
    assert len(losses_of(tmp_path / "parts")) == 2
    with (tmp_path / "parts" / "log.jsonl").open("a") as log:  # a step behind the checkpoint, and a cut line
        log.write('{"step": 2, "text_loss": 0}\n{"step": 3, "te')
    pretrain.main([*run, str(tmp_path / "parts")])
    assert losses_of(tmp_path / "parts") == losses_of(tmp_path / "whole")
    first, last = losses_of(tmp_path / "whole")[0], losses_of(tmp_path / "whole")[-1]
    assert first[0] == pytest.approx(math.log(256), abs=0.2) and last[0] < first[0]


def test_a_checkpoint_of_another_run_is_refused_by_name(tmp_path, capsys):
    pretrain = example("pretrain")
    run = [*SMALL, "--attention", "dense", "--out", str(tmp_path / "run")]
    pretrain.main([*run, "--stop-after", "1"])
    with pytest.raises(SystemExit):
        pretrain.main([*run, "--seed", "5"])
    assert "seed: the checkpoint in" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        pretrain.main([*SMALL, "--tokens", "100"])
    assert "tokens: expected at least 128, got 100" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        pretrain.main([*SMALL, "--tasks", "copy,paste"])
    assert "tasks: expected some of recall, needle, hops, copy, regression, got paste" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(GPU or not torch.distributed.is_gloo_available(), reason="two ranks on the CPU; needs gloo")
def test_two_processes_have_the_losses_of_one(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    environment.pop("RANK", None)

    def run(folder: Path, *before: str) -> None:
        command = [
            sys.executable,
            *before,
            "examples/pretrain.py",
            *SMALL,
            "--attention",
            "dense",
            "--out",
            str(folder),
        ]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]

    run(tmp_path / "one")
    run(tmp_path / "two", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    for one, two in zip(losses_of(tmp_path / "one"), losses_of(tmp_path / "two"), strict=True):
        assert one == pytest.approx(two, rel=1e-4)


# Evaluation


def test_the_selection_of_a_model_is_that_of_its_operator_and_becomes_statistics(trained, tmp_path):
    from examples.quality.selection import selected_blocks, selection_statistics, write_selection
    from examples.quality.training import load_model
    from nsa_gen.bench.inputs import draw_inputs
    from nsa_gen.bench.recorded import Selection

    model, _ = load_model(trained, torch.device("cpu"))
    tokens = torch.randint(256, (2, 256), generator=torch.Generator().manual_seed(0))
    (indices,) = selected_blocks(model, tokens)
    own = torch.arange(256) // 16
    assert indices.shape == (2, 256, 2, 4) and bool((indices[0, :, 0].max(-1).values == own).all())  # the own block
    assert bool(((indices == 0).any(-1)).all())  # and the first one
    assert all(operator.indices is None for operator in model.operators())
    mean, layers, maps = selection_statistics(model, tokens)
    assert [mean] == layers and len(maps) == 1 and sum(maps[0][-1]) == pytest.approx(1, abs=1e-3)
    assert mean.forced == 0.5 and mean.shared[1] >= mean.shared[64]  # two of four
    write_selection(model, tokens, tmp_path)
    assert Selection.read(tmp_path / "selection.json") == mean
    assert draw_inputs(model.choice.spec, 256, device="cpu", kind=str(tmp_path / "selection.json")).q.shape[1] == 256
    if GPU:
        return
    again, _ = load_model(trained, torch.device("cpu"), "operator")
    assert torch.equal(selected_blocks(again, tokens[:1, :48])[0], indices[:1, :48])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a few steps by the reference."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    example("pretrain").main([*SMALL, "--out", str(folder)])
    return folder


def test_an_evaluation_has_losses_tasks_needles_and_the_speed_of_generation(trained, capsys):
    from examples.quality.data import TASKS

    example("evaluate").main([str(trained), "--rows", "2", "--lengths", "128,512", "--new", "2"])
    found = json.loads((trained / "evaluation.json").read_text())
    bins = found["positions"]
    assert bins[0]["start"] == 1 and bins[-1]["stop"] == 256
    mean = sum(each["loss"] * (each["stop"] - each["start"]) for each in bins) / 255
    assert mean == pytest.approx(found["held_out_loss"])
    at = {each["tokens"]: each["perplexity"] for each in found["perplexity"]}
    assert set(at) == {128, 256, 512} and at[256] == pytest.approx(math.exp(found["held_out_loss"]))
    assert {(row["task"], row["tokens"]) for row in found["tasks"]} == {
        (task, length) for task in TASKS for length in (64, 128, 256, 96, 192, 384)
    }
    assert all(row["trained"] == (row["tokens"] in (64, 128, 256)) for row in found["tasks"])
    assert {(each["depth"], each["tokens"]) for each in found["needles"]} == {
        (depth, length) for depth in (0, 0.25, 0.5, 0.75, 1) for length in (64, 96, 128, 192, 256, 384, 512)
    }
    assert found["generation"]["by"] == "forward" and len(found["generation"]["first"]) == 2
    assert found["peak_bytes"] > 0
    if importlib.util.find_spec("matplotlib"):
        assert (trained / "needles.png").exists() and (trained / "positions.png").exists()


def test_accuracy_counts_answers_alone():
    from examples.quality.data import ANSWER, NOISE, TEXT
    from examples.quality.training import counted, loss_sums

    tokens = torch.tensor([[1, 2, 3, 4, 5]])
    kinds = torch.tensor([[TEXT, NOISE, ANSWER, ANSWER, TEXT]], dtype=torch.uint8)
    logits = torch.zeros(1, 5, 256)
    logits[0, 1, 3] = logits[0, 3, 5] = 50.0  # the first answer and the text are right, the second answer is not
    kinds[0, 3] += 1  # of the second task
    loss, right = loss_sums(logits, tokens, kinds)
    assert right.tolist()[:3] == [1, 1, 0] and counted(kinds).tolist()[:3] == [1, 1, 1]
    assert loss.tolist() == pytest.approx([0, 0, math.log(256), 0, 0, 0], abs=1e-4)


@pytest.mark.slow
@pytest.mark.skipif(GPU, reason="compares in Triton's interpreter")
def test_generation_with_a_cache_gives_the_bytes_of_whole_forward_passes(trained):
    from examples.quality.evaluation import generation
    from examples.quality.training import load_model

    prompt = torch.randint(256, (1, 36), generator=torch.Generator().manual_seed(2))
    found = {}
    for mode in ("operator", "reference"):
        model, _ = load_model(trained, torch.device("cpu"), mode)
        found[mode] = generation(model, prompt, 3)
    assert found["operator"]["by"] == "cache" and found["reference"]["by"] == "forward"
    assert found["operator"]["first"] == found["reference"]["first"]


# The study


def test_arms_differ_from_the_base_in_what_their_names_say():
    from examples.quality.arms import PROFILES

    for profile in PROFILES.values():
        arms = profile.arms()
        base = arms[profile.base].spec
        assert {"no-compression", "no-selection", "no-window", "phi-mlp", "moba", "window-sink"} < set(arms)
        for name, choice in arms.items():
            kind, _, number = name.rpartition("-")
            spec = choice.spec
            assert choice.mode == ("dense" if kind.startswith("dense") else profile.mode)
            if kind.endswith("group"):
                assert spec.heads.query == int(number) * spec.heads.kv == profile.heads
            elif kind == "count":
                assert spec.selection.count == int(number) != base.selection.count
                assert spec.selection.block == base.selection.block
            elif kind == "block":
                assert spec.selection.block == int(number) != base.selection.block
                assert spec.selection.block * spec.selection.count == profile.selected
            elif kind == "no":
                assert getattr(spec, number) is None
        assert arms["phi-mlp"].spec.compression.phi.key == "mlp" and arms["moba"].spec.branches == ("slc",)


@pytest.fixture
def small_profile(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The study, whose cpu profile is a narrow layer; children run in this process, one after the other."""
    from dataclasses import replace

    study = example("study")
    small = replace(study.PROFILES["cpu"], settings={"width": 32, "layers": 1, "tokens": 128, "batch": 1}, rows=1)
    monkeypatch.setitem(study.PROFILES, "cpu", small)

    class Child:
        """A process of the study that has run."""

        def __init__(self, options, phase, runs, number=0) -> None:
            arguments = ["--out", str(options.out), "--steps", str(options.steps), "--tokens", str(options.tokens)]
            arguments += ["--phase", phase]
            study.main([*arguments, "--runs", ",".join(runs)])
            self.returncode = 0

        def poll(self) -> int:
            return self.returncode

        wait = poll

    monkeypatch.setattr(study, "child", Child)
    return study


def test_a_study_gives_all_runs_the_same_steps_and_data_and_keeps_finished_runs(small_profile, tmp_path, capsys):
    call = ["--out", str(tmp_path), "--arms", "dense-group-2,window-sink", "--seeds", "0,1", "--steps", "2"]
    small_profile.main(call)
    found = json.loads((tmp_path / "study.json").read_text())
    assert [(row["arm"], row["seed"]) for row in found["rows"]] == [
        (arm, seed) for seed in (0, 1) for arm in ("dense-group-2", "window-sink")
    ]
    assert all(row["steps"] == 2 and row["held_out_loss"] > 0 and row["tokens_per_second"] > 0 for row in found["rows"])
    table = (tmp_path / "study.md").read_text().splitlines()
    assert len(table) == 6 and f"{found['rows'][3]['held_out_loss']:.4f}" in table[-1]
    kept = (tmp_path / "runs" / "window-sink.0.json").stat().st_mtime_ns
    (tmp_path / "runs" / "window-sink.1.json").unlink()
    small_profile.main(call)
    assert (tmp_path / "runs" / "window-sink.0.json").stat().st_mtime_ns == kept
    assert json.loads((tmp_path / "study.json").read_text())["rows"][3] | {"peak_bytes": 0} == (
        found["rows"][3] | {"peak_bytes": 0}
    )
    with pytest.raises(SystemExit):
        small_profile.main([*call[:-1], "3"])
    assert "--steps: the study in" in capsys.readouterr().err


def test_a_study_of_other_lengths_has_as_many_bytes_a_step_and_is_not_mixed_with_the_first(
    small_profile, tmp_path, monkeypatch, capsys
):
    from dataclasses import replace

    profile = small_profile.PROFILES["cpu"]
    longer = replace(profile, settings={**profile.settings, "tokens": 512}, lengths=(1024,))
    monkeypatch.setitem(small_profile.PROFILES, "cpu", longer)
    call = ["--out", str(tmp_path), "--arms", "window-sink", "--steps", "1"]
    small_profile.main([*call, "--tokens", "256"])
    found = json.loads((tmp_path / "study.json").read_text())
    assert (found["settings"]["tokens"], found["settings"]["batch"]) == (256, 2)
    assert [each["tokens"] for each in found["rows"][0]["perplexity"]] == [256]
    for tokens, message in (("512", "has sequences of 256 bytes, got 512"), ("96", "got 96"), ("300", "got 300")):
        with pytest.raises(SystemExit):
            small_profile.main([*call, "--tokens", tokens])
        assert "--tokens: " in (said := capsys.readouterr().err) and message in said


@pytest.mark.parametrize(("jobs", "seconds"), [("1", (60 - 2 * 5) / 1.5), ("2", (60 - 5) / 1.0)])
def test_minutes_become_as_many_steps_as_all_runs_have_time_for(jobs, seconds, small_profile, tmp_path, monkeypatch):
    chosen = []
    monkeypatch.setattr(small_profile, "train_all", lambda options, runs, started: chosen.append(options.steps))
    timing = {"dense-group-2": 0.5, "window-sink": 1.0, "evaluation": 3.0, "start": 2.0}
    monkeypatch.setattr(
        small_profile, "time_arms", lambda profile, arms, out: small_profile.write_json(out / "timing.json", timing)
    )
    monkeypatch.setattr(small_profile, "compile_all", lambda options, arms: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: int(jobs))
    monkeypatch.setattr(small_profile.time, "monotonic", lambda: 0.0)
    arms = ["--arms", "dense-group-2,window-sink", "--minutes", "1", "--jobs", jobs]
    (tmp_path / "study.md").write_text("")
    small_profile.main(["--out", str(tmp_path), *arms])
    assert chosen == [pytest.approx(0.9 * seconds, abs=1)]
    assert json.loads((tmp_path / "plan.json").read_text())["steps"] == chosen[0]


def test_a_step_takes_the_mean_of_its_lengths_by_the_fastest_step_of_each(small_profile):
    from dataclasses import replace

    profile = small_profile.PROFILES["cpu"]
    profile = replace(profile, settings={**profile.settings, "tokens": 512, "growth": 0.5})
    run = small_profile.short_run(profile, "dense-group-2", 3)
    lengths = [run.length(step) for step in range(run.steps)]
    assert lengths == [128] * 3 + [256] * 3 + [512] * 3
    log = [{"length": length, "tokens_per_second": 512 * 8 // (1 + i % 3)} for i, length in enumerate(lengths)]
    log[-1]["tokens_per_second"] = log[-2]["tokens_per_second"] = log[-3]["tokens_per_second"] = 512 * 2
    seconds = small_profile.seconds_a_step(profile, "dense-group-2", log)
    assert seconds == pytest.approx(0.5 / 8 + 0.5 / 2)


def test_a_run_is_in_the_table_before_its_process_ends_and_its_evaluation_is_kept(small_profile, tmp_path, monkeypatch):
    done = small_profile.child
    runs, seen = ["dense-group-2.0", "window-sink.0"], []

    class Slow:
        """A process that has finished one more run whenever it is asked."""

        def __init__(self, options, phase, runs, number=0) -> None:
            self.options, self.waiting, self.returncode = options, list(runs), None

        def poll(self) -> int | None:
            if (tmp_path / "study.json").exists():
                seen.append(len(json.loads((tmp_path / "study.json").read_text())["rows"]))
            if not self.waiting:
                self.returncode = 0
            else:
                done(self.options, "train", [self.waiting.pop(0)])
            return self.returncode

    monkeypatch.setattr(small_profile, "child", Slow)
    small_profile.main(["--out", str(tmp_path), "--arms", "dense-group-2,window-sink", "--steps", "1"])
    assert seen == [1, 2]
    for run in runs:
        row = json.loads((tmp_path / "runs" / f"{run}.json").read_text())
        evaluation = json.loads((tmp_path / "runs" / run / "evaluation.json").read_text())
        assert evaluation.items() <= row.items() and evaluation["needles"]


def test_a_run_that_fails_is_a_row_with_its_reason_and_is_tried_again_by_the_next_call(
    small_profile, tmp_path, monkeypatch
):
    train = small_profile.train

    def failing(settings, *given, **named):
        if settings.mode == "dense":
            raise RuntimeError("no such kernel\nand more")
        return train(settings, *given, **named)

    monkeypatch.setattr(small_profile, "train", failing)
    with pytest.raises(SystemExit):
        small_profile.main(["--out", str(tmp_path), "--arms", "dense-group-2,window-sink", "--steps", "1"])
    first, second = json.loads((tmp_path / "study.json").read_text())["rows"]
    assert first["problem"] == "RuntimeError: no such kernel" and "held_out_loss" in second
    assert "no such kernel" in (tmp_path / "study.md").read_text()
    monkeypatch.setattr(small_profile, "train", train)
    small_profile.main(["--out", str(tmp_path), "--arms", "dense-group-2,window-sink"])
    again = json.loads((tmp_path / "study.json").read_text())["rows"]
    assert "held_out_loss" in again[0] and again[1] == second
