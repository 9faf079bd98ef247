"""`nsa-gen report`: one file that stands alone, read by a parser always and by a browser where there is one."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from nsa_gen.bench import drawing
from nsa_gen.bench.figures import figures
from nsa_gen.bench.records import Results, SelectionRow, merge, read_results, write_json
from nsa_gen.cli.blocks import Code, Heading, Table, Text
from nsa_gen.cli.report import to_html
from nsa_gen.tuning.store import Store, write_entries
from tests.bench.fakes import pair, sample_results
from tests.browser import VARIABLE, Browser, find_browser
from tests.tuning.test_cache import entry as tuned_entry

RECORDS = Path(__file__).parents[2] / "docs" / "results"
VOID = {"meta", "link", "br"}


def full_results() -> Results:
    """The sample with a map of what is selected: everything that a report can show."""
    size = 16
    shares = tuple(
        tuple(round(1 / (i + 1), 4) if j <= i else 0.0 for j in range(size)) for i in range(size)
    )  # each row adds up to 1
    return replace(sample_results(), selections=(SelectionRow("A", "independent", 65536, shares),))


class Page(HTMLParser):
    """Elements with their attributes, text, and whether every tag is closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.inside: dict[str, list[str]] = {}
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, {name: value or "" for name, value in attributes}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, {name: value or "" for name, value in attributes}))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, (tag, self.getpos())

    def handle_data(self, data):
        if self.open:
            self.inside.setdefault(self.open[-1], []).append(data)

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def page_path(tmp_path_factory):
    """The report of a benchmark with everything, two verifications and a suite of checks."""
    from nsa_gen.cli import main

    folder = tmp_path_factory.mktemp("report")
    write_json(folder / "results.json", full_results())
    (folder / "verified.json").write_text(json.dumps(verification(ok=False)))
    checks = str(RECORDS / "h100_2026-11-22_key_major" / "long.json")
    files = [str(folder / "results.json"), str(folder / "verified.json"), checks]
    assert main(["report", *files, "-o", str(folder / "page.html")]) == 0
    return folder / "page.html"


def verification(*, ok: bool) -> dict[str, object]:
    """What `nsa-gen verify --json` prints, in short."""
    row = {"case": "T=63 <ragged>", "quantity": "dk", "measure": "norm", "error": 0.5, "bound": 0.1, "problem": ""}
    return {
        "ok": ok, "name": "tiny", "digest": "0" * 12, "dtype": "float32", "heads": [4, 2], "passes": ["forward"],
        "seed": 0, "cases": ["T=63"], "rows": [row | {"ok": ok}], "notes": ["a note"],
    }  # fmt: skip


@pytest.fixture(scope="module")
def page(page_path):
    return Page(page_path.read_text(encoding="utf-8"))


def test_every_element_is_closed_and_every_identifier_is_there_once(page):
    assert page.open == []
    names = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(names) == len(set(names)) > 10
    for attributes in page.all("a"):
        assert attributes["href"].removeprefix("#") in names
    for attributes in page.all("svg"):
        for name in attributes.get("aria-labelledby", "").split():
            assert name in names


def test_nothing_is_asked_of_a_network(page, page_path):
    assert not page.all("script") and not page.all("img") and not page.all("iframe")
    for _, attributes in page.elements:
        for name in ("src", "href", "srcset", "data", "action"):
            assert attributes.get(name, "#").startswith(("#", "data:")), attributes
    text = page_path.read_text(encoding="utf-8")
    assert "@import" not in text and not re.search(r"url\s*\(", text) and "//" not in re.sub(r"[\w ]//[\w ]", "", text)


def test_every_figure_has_a_title_a_caption_and_words_for_every_chart(page, page_path):
    figures_shown = page_path.read_text(encoding="utf-8").split("<figure>")[1:]
    assert len(figures_shown) == 5  # group sizes, lengths, branches, roofline, selection
    for shown in figures_shown:
        assert 'class="figure-title"' in shown and "<figcaption>" in shown
        charts = re.findall(r'<svg viewBox="[^"]*" role="img".*?</svg>', shown, flags=re.DOTALL)
        assert charts
        for chart in charts:
            (description,) = re.findall(r"<desc[^>]*>(.+?)</desc>", chart)
            assert len(description) > 30 and re.search(r"\d", description)


def test_a_chart_that_is_decoration_is_hidden_from_a_screen_reader(page):
    for attributes in page.all("svg"):
        assert attributes.get("role") == "img" or attributes.get("aria-hidden") == "true"


def test_tables_have_headed_columns_and_a_box_that_scrolls(page):
    assert len(page.all("table")) == len([each for each in page.all("div") if each.get("class") == "scroll"]) > 5
    assert all(each.get("scope") == "col" for each in page.all("th"))
    assert {"viewport"} <= {each.get("name") for each in page.all("meta")}


def test_what_was_found_is_there_failures_too(page_path):
    text = page_path.read_text(encoding="utf-8")
    for said in ("T=63 &lt;ragged&gt;: dk: error beyond its bound", "NotImplementedError: no backward here", "a note"):
        assert said in text
    assert "long llama3_8b 131072" in text and "Made from" in text and "21% at 65,536" in text


@pytest.mark.parametrize(
    "name",
    [
        path.relative_to(RECORDS).as_posix()
        for path in sorted(RECORDS.glob("*/**/*.json"))
        if not path.parent.name.endswith("_quality")  # written by examples, not by a command
    ],
)
def test_every_committed_record_can_be_shown(call, tmp_path, name):
    answer = call("report", str(RECORDS / name), "--json")
    assert answer.returncode == 0, answer.stderr
    assert Page((tmp_path / "report.html").read_text(encoding="utf-8")).open == []


def test_the_same_files_give_the_same_page(call, tmp_path):
    write_json(tmp_path / "results.json", full_results())
    pages = []
    for _ in range(2):
        assert call("report", "results.json", "-o", "page.html").returncode == 0
        pages.append((tmp_path / "page.html").read_bytes())
    assert pages[0] == pages[1]


def test_results_of_two_gpus_are_not_mixed(call, tmp_path):
    write_json(tmp_path / "a.json", full_results())
    write_json(tmp_path / "b.json", Results({"gpu": "NVIDIA H200"}, rows=tuple(pair("nsa_gen", 1.0, 2.0))))
    answer = call("report", "a.json", "b.json")
    assert answer.returncode == 1 and "H200" in answer.stderr


def test_a_journal_that_was_cut_short_is_shown(call, tmp_path):
    from nsa_gen.bench.records import to_line

    found = full_results()
    lines = [json.dumps({"machine": found.machine, "settings": {}}), *map(to_line, (*found.rows, *found.selections))]
    (tmp_path / "records.jsonl").write_text("\n".join(lines) + '\n{"record": "ro')
    assert call("report", "records.jsonl").returncode == 0
    assert read_results(tmp_path / "records.jsonl").selections == found.selections


def test_what_the_tuner_has_kept_is_shown_with_gains_configurations_and_versions(call, tmp_path):
    times = {"independent": {"forward": {"default": 2.0, "tuned": 1.6}}}
    tuned = replace(tuned_entry(), result={"gain": 1.25, "ms": times})
    one = Store(tmp_path / "cache").save(tuned)
    several = tmp_path / "exported.json"
    write_entries(several, [tuned, tuned_entry(65536, configs={})], bundle=True)
    answer = call("report", str(one), str(several), "-o", "page.html")
    assert answer.returncode == 0, answer.stderr
    text = (tmp_path / "page.html").read_text()
    for word in ("t8192_b1", "exported", "1.25x", "2.000", "1.600", "NVIDIA H100 80GB HBM3", "num_warps=", "triton"):
        assert word in text, word
    assert "65536 tokens, NVIDIA H100 80GB HBM3: the default won" in text
    assert Page(text).open == []


DEEP = "[" * 100_000


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "Expecting value"),
        ("{", "nsa-gen bench"),
        ("[]", "expected an object"),
        (DEEP, "nested too deeply"),
        ("{}", "nothing"),
        ('{"machine": {}, "jobs": 3}', "int"),
        ('{"machine": {}, "jobs": [1]}', "int"),
        ('{"machine": {}, "jobs": [{"name": "x"}]}', "status"),
        ('{"cases": [], "rows": [], "digest": ""}', "name"),
        ('{"machine": 1, "rows": 2, "kernels": 3}', "int"),
        ('{"machine": {}, "rows": [{"x": 1}], "kernels": []}', "expected no x"),
        ('{"schema": 1, "identity": {}}', "configs"),
        ('{"schema": 99, "entries": []}', "99"),
    ],
)
def test_a_file_that_holds_no_results_is_refused_by_its_name_and_what_was_expected(call, tmp_path, text, named):
    (tmp_path / "some.json").write_text(text)
    answer = call("report", "some.json")
    assert answer.returncode == 1 and "Traceback" not in answer.stderr
    assert "some.json" in answer.stderr and "expected" in answer.stderr and named in answer.stderr
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize("field", ["heads", "tokens", "median_ms", "contender", "dense"])
def test_a_benchmark_with_a_field_of_another_type_is_refused_by_the_field_s_name(call, tmp_path, field):
    document = sample_results().to_document()
    document["rows"][0][field] = {"wrong": True}
    (tmp_path / "some.json").write_text(json.dumps(document))
    answer = call("report", "some.json")
    assert answer.returncode == 1 and f"Row.{field}" in answer.stderr


def test_a_verification_without_what_is_shown_is_refused_by_the_field_s_name(call, tmp_path):
    for name in ("heads", "rows", "seed"):
        found = verification(ok=True)
        found[name] = "x"
        (tmp_path / "some.json").write_text(json.dumps(found))
        answer = call("report", "some.json")
        assert answer.returncode == 1 and "some.json" in answer.stderr and "got 'x'" in answer.stderr


def test_results_of_before_there_were_maps_are_read(tmp_path):
    document = sample_results().to_document()
    del document["selections"]
    assert Results.from_document(document).rows == sample_results().rows
    assert merge([Results.from_document(document)]).selections == ()


def test_without_a_sweep_the_groups_are_those_of_the_workloads():
    found = read_results(RECORDS / "h100_2026-11-22_key_major" / "bench.json")
    figure = figures(found)[0]
    assert "by group size, 32,768 tokens" in figure.title
    assert re.search(r"nsa_gen: [\d.]+x at 1, [\d.]+x at 4, [\d.]+x at 16", figure.charts[2][1])


def test_without_matplotlib_the_page_says_how_to_get_its_figures(call, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    drawing.pyplot.cache_clear()
    write_json(tmp_path / "results.json", full_results())
    assert call("report", "results.json", "-o", "page.html").returncode == 0
    text = (tmp_path / "page.html").read_text()
    assert "pip install &#39;nsa-gen[bench]&#39;" in text and "<svg" not in text and Page(text).open == []


def test_without_times_there_are_no_figures():
    assert figures(Results({"gpu": "NVIDIA H100"}, rows=tuple(pair("nsa_gen", 1.0, 2.0)))) == []


def test_blocks_are_escaped_and_lists_are_lists():
    text = to_html("a < b", [Heading("x & y"), Text("- one\n- <two>"), Code("a < b"), Table(("k", ">v"), [("<", "1")])])
    assert "<title>a &lt; b</title>" in text and "<li>&lt;two&gt;</li>" in text and '<td class="right">1</td>' in text
    assert Page(text).open == []


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    program = find_browser()
    if program is None:
        pytest.skip(f"needs a headless browser: Chromium or Chrome on PATH, or its path in ${VARIABLE}")
    with Browser(program, tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [360, 1280])
def test_a_browser_lays_it_out_within_the_screen(browser, page_path, width, dark):
    browser.open(page_path, width=width, dark=dark)
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    assert browser.evaluate("[...document.querySelectorAll('svg')].every(s => s.getBoundingClientRect().width > 10)")
    small = "[...document.querySelectorAll('svg[role=img] text')].map(t => t.getBoundingClientRect().height)"
    assert browser.evaluate(f"Math.min(...{small})") > 8
    assert browser.evaluate("getComputedStyle(document.body).backgroundColor") == (
        "rgb(15, 19, 24)" if dark else "rgb(255, 255, 255)"
    )


def test_in_a_browser_no_label_of_a_chart_lies_on_another_or_outside(browser, page_path):
    browser.open(page_path, width=360)
    found = browser.evaluate(
        """[...document.querySelectorAll('svg[role=img]')].flatMap(svg => {
            const box = svg.getBoundingClientRect();
            const texts = [...svg.querySelectorAll('text')].map(t => [t.textContent, t.getBoundingClientRect()]);
            const out = texts.filter(([_, b]) => b.left < box.left - 1 || b.right > box.right + 1 ||
                                                 b.top < box.top - 1 || b.bottom > box.bottom + 1);
            const crossing = texts.flatMap(([t, a], i) => texts.slice(i + 1).filter(([_, b]) =>
                a.left < b.right && b.left < a.right && a.top < b.bottom - 1 && b.top < a.bottom - 1)
                .map(([u, _]) => [t, u]));
            return [...out.map(([t, _]) => ['outside', t]), ...crossing];
        })"""
    )
    assert found == []


def test_a_browser_asks_for_the_file_alone_and_complains_of_nothing(browser, page_path):
    browser.events.clear()
    browser.open(page_path, width=1280)
    browser.evaluate("1")
    told: dict[str, list[dict[str, object]]] = {}
    for event in browser.events:
        told.setdefault(event.get("method", ""), []).append(event.get("params", {}))
    asked = [each["request"]["url"] for each in told["Network.requestWillBeSent"]]
    assert asked and all(url.startswith(("file:", "data:")) for url in asked)
    assert "Log.entryAdded" not in told and "Runtime.exceptionThrown" not in told
    assert browser.screenshot().startswith(b"\x89PNG")


def test_a_browser_prints_it_without_cutting_a_table(browser, page_path):
    browser.open(page_path, width=1000, media="print")
    assert browser.evaluate("getComputedStyle(document.querySelector('.scroll')).overflowX") == "visible"
    widths = "[...document.querySelectorAll('table')].map(t => t.getBoundingClientRect().right)"
    assert browser.evaluate(f"Math.max(...{widths})") <= 1000
    printed = browser.pdf()
    assert printed.startswith(b"%PDF") and len(printed) > 10_000
