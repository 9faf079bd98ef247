"""Every code block of the README, of CONTRIBUTING.md and of docs/ is run or at least read, here or where it is said."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer

from nsa_gen.cli import main
from nsa_gen.cli.app import app
from nsa_gen.spec import parse_spec
from nsa_gen.tuning.store import Entry
from tests.machine import GPU

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])

ELSEWHERE = {
    ("README.md", "python"): "test_the_readme_s_python_runs_in_small, below",
    ("docs/spec-examples.md", "yaml"): "tests/test_readme.py",
    ("docs/architecture.md", "python"): "test_the_page_on_architecture_prints_what_it_says, below",
    ("docs/bench.md", "python"): "test_the_adapter_of_the_page_on_benchmarks_can_be_timed, below",
    ("docs/debugging.md", "python"): "test_the_page_on_debugging_prints_what_it_says, below",
    ("docs/distributed.md", "python"): "tests/distributed/test_docs.py",
    ("docs/serving.md", "python"): "tests/inference/test_docs.py",
    ("docs/inference.md", "python"): "tests/inference/test_docs.py and, of graphs, below",
    ("docs/pytorch.md", "python"): "tests/pytorch/test_docs.py",
    ("docs/verification.md", "python"): "tests/verification/test_drawn_specs.py",
}
"""Who runs the Python of a page, and reads YAML that is no whole spec."""


def blocks(page: Path) -> Iterator[tuple[str, str]]:
    """(language, text) of the fenced code blocks of a page."""
    return iter(re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE))


def of(language: str) -> list[Any]:
    """The blocks of one language on all pages, as parameters."""
    found = []
    for page in PAGES:
        name = page.relative_to(ROOT).as_posix()
        texts = [text for kind, text in blocks(page) if kind == language]
        found += [pytest.param(name, text, id=f"{name}-{number}") for number, text in enumerate(texts)]
    return found


def test_every_block_says_its_language_and_has_somebody_who_reads_it():
    for page in PAGES:
        name = page.relative_to(ROOT).as_posix()
        for language, text in blocks(page):
            assert language in ("sh", "json", "bibtex", "yaml") or (name, language) in ELSEWHERE, (name, text[:60])
    for place in ELSEWHERE.values():
        for path in re.findall(r"tests/\S+\.py", place):
            assert (ROOT / path).exists(), path


def commands_of(text: str) -> list[str]:
    """The command lines of a block: continued lines joined, comments gone."""
    joined = re.sub(r"\\\n\s*", " ", text)
    return [line for line in (re.sub(r"\s+#\s.*$", "", line).strip() for line in joined.splitlines()) if line]


@pytest.mark.parametrize(("page", "text"), of("sh"))
def test_a_shell_command_calls_what_exists_with_options_that_exist(page, text):
    for line in commands_of(text):
        words = shlex.split(line.partition(" > ")[0])
        while "=" in words[0]:  # settings of the environment
            words.pop(0)
        match words:
            case ["nsa-gen", *arguments]:
                _check_call(arguments)
            case ["make", *targets]:
                for target in (each for each in targets if "=" not in each):
                    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE), line
            case ["python", script, *arguments]:
                source = (ROOT / script).read_text(encoding="utf-8")
                for option in (each for each in arguments if each.startswith("-")):
                    assert f'"{option}"' in source, (line, option)
            case _:
                pytest.fail(f"{page}: nobody knows how to check {line!r}")


def _check_call(arguments: list[str]) -> None:
    """The command exists, and so do its options; a command without files of its own is parsed as when it is called."""
    command: Any = typer.main.get_command(app)
    while hasattr(command, "commands"):
        name, *arguments = arguments
        command = command.commands[name]
    known = {option for parameter in command.params for option in parameter.opts}
    options = {each.partition("=")[0] for each in arguments if each.startswith("-")}
    assert options <= known, (arguments, options - known)


@pytest.mark.parametrize(("page", "text"), [each for each in of("yaml") if (each.values[0], "yaml") not in ELSEWHERE])
def test_a_spec_of_a_page_is_valid(page, text):
    if any(line and not line.startswith("#") for line in text.splitlines()):
        parse_spec(text)


@pytest.mark.parametrize(("page", "text"), of("json"))
def test_a_json_example_is_an_entry_of_the_cache(page, text):
    entry = Entry.from_json(json.loads(text))
    assert entry.identity.bucket.tokens == 8192


@pytest.mark.parametrize(("page", "text"), of("bibtex"))
def test_a_citation_has_balanced_braces_and_the_paper_of_the_first_line(page, text):
    assert text.count("{") == text.count("}") and "2502.11089" in text


def test_the_page_on_architecture_prints_what_it_says():
    ((_, code),) = [block for block in blocks(ROOT / "docs" / "architecture.md") if block[0] == "python"]
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        exec(compile(code, "docs/architecture.md", "exec"), {})
    assert said.getvalue().splitlines() == re.findall(r"^print\(.*\)  # (.*)$", code, flags=re.MULTILINE)


def test_the_page_on_debugging_prints_what_it_says():
    code = "\n".join(text for kind, text in blocks(ROOT / "docs" / "debugging.md") if kind == "python")
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        exec(compile(code, "docs/debugging.md", "exec"), {})
    assert said.getvalue().splitlines() == re.findall(r"^print\(.*\)  # (.*)$", code, flags=re.MULTILINE)


@pytest.mark.parametrize("page", ["architecture", "extending"])
def test_every_file_and_name_on_the_pages_for_contributors_exists(page):
    text = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
    for path in re.findall(r"`((?:nsa_gen|templates|tests|tools)/[\w/.]+)`", text):
        assert (ROOT / path).exists(), path
    everything = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "nsa_gen").rglob("*.py"))
    everything += "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "templates").rglob("*.jinja"))
    for name in re.findall(r"`(_?[a-zA-Z]\w*[a-z]\w*)`", text):
        assert re.search(rf"\b{name}\b", everything), name


def test_the_adapter_of_the_page_on_benchmarks_can_be_timed(monkeypatch):
    """On the CPU, with the clock that only fakes move: it is prepared, called and asked for gradients."""
    from nsa_gen.bench import contenders, inputs, measure, peers
    from nsa_gen.bench.workloads import nsa_spec
    from nsa_gen.spec import Spec
    from nsa_gen.verification.reference.inputs import Inputs
    from tests.bench.fakes import FakeClock

    library = ModuleType("my_library")
    library.attend = lambda q, k, v, scale: q * scale + (k.sum() + v.sum())  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "my_library", library)
    ((_, code),) = [block for block in blocks(ROOT / "docs" / "bench.md") if block[0] == "python"]
    names: dict[str, Any] = {**vars(contenders), "Spec": Spec, "Inputs": Inputs}
    exec(compile(code, "docs/bench.md", "exec"), names)
    spec = nsa_spec("mine", 4, 2, 32, 32)
    drawn = inputs.draw_inputs(spec, 64, device="cpu")
    adapter = names["MyAttention"]()
    monkeypatch.setattr(adapter, "missing", lambda: "", raising=False)
    (found,) = measure.race([adapter], spec, drawn, clock=FakeClock())
    assert found.problem == "" and set(found.timings) == {"forward", "backward"}
    assert peers.CONTENDERS.keys() >= {"cudnn", "fla"}


@pytest.mark.gpu
def test_the_graph_of_the_page_on_inference_is_captured_and_replayed():
    first, graph = [text for kind, text in blocks(ROOT / "docs" / "inference.md") if kind == "python"]
    # The cache of the first block is full after a hundred tokens.
    code = first.replace("capacity=128", "capacity=4096") + graph.replace("cache.extend(1)", "cache.extend(2)")
    exec(compile(code.replace("reserve(1)", "reserve(2)"), "docs/inference.md", "exec"), {})


SMALL = (
    ("llama3_8b", "tiny"),
    ("1, 8192, 32, 128", "1, 17, 4, 16"),
    ("1, 8192, 8, 128", "1, 17, 2, 16"),
    ("1, 8192, 32, 3", "1, 17, 4, 3"),
    ("1, 8192, 4096", "1, 17, 32"),
    ("cache.extend(8192)", "cache.extend(17)"),
    ("capacity=65536", "capacity=128"),
    ("NativeSparseAttention(4096", "NativeSparseAttention(32"),
    ("bfloat16", "float32"),
)
"""The README's Python is for llama3_8b on a GPU; on a CPU the same lines run with tiny and few tokens."""


def test_the_readme_s_python_runs_in_small(tmp_path, monkeypatch):
    monkeypatch.setenv("NSA_GEN_CACHE_DIR", str(tmp_path))
    monkeypatch.chdir(ROOT)
    code = "\n".join(text for kind, text in blocks(ROOT / "README.md") if kind == "python")
    for large, small in SMALL:
        assert large in code, large
        code = code.replace(large, small)
    if not GPU:
        code = code.replace('"cuda"', '"cpu"').replace("fullgraph=True", 'fullgraph=True, backend="eager"')
    monkeypatch.setattr(sys, "path", [str(ROOT), *sys.path])
    names: dict[str, Any] = {}
    exec(compile(code, "README.md", "exec"), names)
    assert names["q"].grad.shape == names["q"].shape
    assert names["o"].shape == (1, 17, 4, 16) and bool(names["o"].isfinite().all())
    assert all(parameter.grad is not None for parameter in names["layer"].parameters())


def test_the_readme_s_tour_runs_on_the_cpu(tmp_path, monkeypatch, capsys):
    """The tour's own commands in order on the small spec, those apart that take minutes; the last one needs a GPU."""
    monkeypatch.chdir(tmp_path)
    seen = []
    for kind, text in blocks(ROOT / "README.md"):
        for line in commands_of(text) if kind == "sh" else []:
            words = shlex.split(line.replace("llama3_8b", "tiny"))
            if words[0] != "nsa-gen" or words[1] in ("compile", "verify", "tune", "bench"):
                continue
            seen.append(words[1])
            assert main(words[1:]) == 0, line
    assert seen == ["new", "check", "generate", "explain"]
    assert (tmp_path / "generated" / "my_attention" / "operator.py").exists()
    if not GPU:
        assert main(["bench", "tiny"]) == 2
        assert "nsa-gen explain tiny" in capsys.readouterr().err


def test_the_rows_of_the_comparison_are_shown_by_what_they_name():
    """The right column is what the adapters say; the third names files and commands that exist."""
    from nsa_gen.bench.peers import CONTENDERS
    from nsa_gen.bench.workloads import nsa_spec

    text = (ROOT / "README.md").read_text(encoding="utf-8").partition("## How it compares")[2].partition("\n## ")[0]
    rows = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("| ")][2:]
    assert len(rows) >= 10
    answers = {}
    for what, here, shown, fla, others in rows:
        paths, commands = re.findall(r"`(tests/\S+)`", shown), re.findall(r"`nsa-gen ([^`]*)`", shown)
        assert paths or commands, what
        for path in paths:
            assert (ROOT / path).exists(), path
        for command in commands:
            _check_call(shlex.split(command))
        answers[what.strip()] = tuple(cell.strip().partition(":")[0].partition(",")[0] for cell in (here, fla, others))
        assert set(answers[what.strip()]) <= {"yes", "no", "not compared"}, what
    # What the adapters say, of specs that have what a row asks for.
    base = nsa_spec("base", 64, 4)
    asked = {
        "Any group size": nsa_spec("four", 32, 8),
        "Different head dims of keys and values": nsa_spec("unequal", 64, 4, 192, 128),
        "Branches left out, or one alone": base.replace(window=None),
        "float32": base.replace(dtype="float32"),
        "Separate keys and values for each branch": base.replace(kv="per_branch"),
    }
    for what, spec in asked.items():
        _, fla, others = answers[what]
        assert (fla == "yes") == (not CONTENDERS["fla"].refuses(spec, 4096)), what
        for name in ("sfnsa", "nsa-triton", "fsa"):
            assert (others == "yes") == (not CONTENDERS[name].refuses(spec, 4096)), (what, name)
    by_four, unequal = nsa_spec("four", 32, 8), nsa_spec("unequal", 64, 4, 192, 128)
    assert "groups of 16" in CONTENDERS["fla"].refuses(by_four, 4096)
    peers = [CONTENDERS[name] for name in ("fla", "sfnsa", "nsa-triton", "fsa")]
    assert all(not peer.refuses(by_four, 4096) for peer in peers[1:])
    assert all("equal" in peer.refuses(unequal, 4096) for peer in peers)
    assert all("float16" in peer.refuses(nsa_spec("x", 64, 4).replace(dtype="float32"), 4096) for peer in peers)
