"""The documentation's site: its pages, links and figures, and that it is built strictly and read without a network."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.figures import PATH, script

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = sorted([*DOCS.glob("*.md"), *DOCS.glob("experiments/*.md")])


class _Loader(yaml.SafeLoader):
    """YAML with tags of other programs left as they are."""


_Loader.add_multi_constructor("", lambda loader, tag, node: None)


def pages_of(nav: list[Any]) -> Iterator[str]:
    """The pages of a navigation, in order."""
    for entry in nav:
        for value in [entry] if isinstance(entry, str) else entry.values():
            yield from [value] if isinstance(value, str) else pages_of(value)


def test_every_page_is_in_the_navigation_once():
    config = yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), _Loader)
    named = list(pages_of(config["nav"]))
    there = [*(path.relative_to(DOCS).as_posix() for path in PAGES), "results/README.md"]
    assert sorted(named) == sorted(there)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_the_links_of_a_page_lead_somewhere(page):
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not target.startswith("https://"):
            path = (page.parent / target.partition("#")[0]).resolve()
            assert path.exists() and path.is_relative_to(DOCS), (page.name, target)


def test_the_figures_are_small_and_the_script_draws_each_of_them(tmp_path):
    pytest.importorskip("matplotlib")
    script().main(tmp_path)
    names = sorted(path.name for path in PATH.parent.glob("*.svg"))
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    for name in names:
        drawn, kept = (tmp_path / name).read_text(), (PATH.parent / name).read_text()
        assert len(kept) < 100_000
        # The same picture by any version of matplotlib: as many shapes and texts in it.
        assert drawn.count("<g id=") == kept.count("<g id="), name


def test_the_figures_choice_of_blocks_is_the_oracle_s():
    import torch

    from nsa_gen.verification.reference.dense import OracleParameters, block_importance, select_blocks

    figure = script()
    p = OracleParameters(
        query_heads=1, kv_heads=1, head_dim_qk=16, head_dim_v=16, scale=1.0,
        compression_block=figure.BLOCK, compression_stride=figure.STRIDE, selection_block=figure.SELECTION,
        selection_count=figure.COUNT, initial=figure.INITIAL, local=figure.LOCAL,
    )  # fmt: skip
    rows = torch.from_numpy(figure.importance())
    positions = torch.arange(figure.TOKENS)
    indices, _ = select_blocks(p, rows[:, None], positions)
    for t in range(figure.TOKENS):
        assert figure.chosen(rows[t].numpy(), t) == [j for j in indices[t, 0].tolist() if j >= 0], t
    # One compressed block with all the probability, the second of two that reach into selection block 1.
    probabilities = torch.zeros(1, 1, 1, 15, dtype=torch.float64)
    probabilities[..., 1] = 1.0
    assert block_importance(p, probabilities, 8)[0, 0].tolist()[:3] == [1.0, 1.0, 0.0]


def test_the_tour_names_files_and_functions_that_exist():
    package = ROOT / "generated" / "llama3_8b"
    text = (DOCS / "tour.md").read_text(encoding="utf-8")
    for path in re.findall(r"`((?:kernels/|runtime/)?\w+\.(?:py|json|yaml))`", text):
        assert (package / path).exists(), path
    for path, names in re.findall(r"`((?:kernels/)?\w+\.py)`: ((?:`\w+`(?:, )?)+)", text):
        source = (package / path).read_text(encoding="utf-8")
        for name in re.findall(r"`(\w+)`", names):
            assert re.search(rf"^(?:def|class) {name}\b", source, flags=re.MULTILINE), (path, name)
    for path, lines in re.findall(r"`([\w/]+\.py)`\*\* \(about (\d+) lines\)", text):
        there = len((package / path).read_text(encoding="utf-8").splitlines())
        assert abs(there - int(lines)) <= 0.2 * there, path


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as `make docs` builds it."""
    for module in ("mkdocs", "material", "mkdocstrings"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"needs {module}: pip install 'nsa-gen[docs]'")
    folder = tmp_path_factory.mktemp("site")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_the_site_has_every_page_and_nothing_from_elsewhere(site):
    names = {path.relative_to(DOCS).with_suffix(".html").as_posix() for path in PAGES}
    assert names <= {path.relative_to(site).as_posix() for path in site.rglob("*.html")}
    assert (site / "results" / "index.html").exists()
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        for tag in re.findall(r"<(?:script|link|img|iframe|source)\b[^>]*>", text):
            assert not re.search(r"""(?:src|href)=["']?(?:https?:)?//""", tag), (page.name, tag)
        for source in re.findall(r'<img\b[^>]*\bsrc="([^"]+)"', text):
            assert (page.parent / source).exists(), (page.name, source)
    for style in site.rglob("*.css"):
        assert not re.search(r"url\(['\"]?(?:https?:)?//", style.read_text(encoding="utf-8")), style.name


def test_the_page_of_the_api_has_arguments_and_errors(site):
    text = (site / "api.html").read_text(encoding="utf-8")
    for name in ("nsa_gen.loading.load", "generated.llama3_8b.operator.nsa_attention", "use_sparse_attention"):
        assert name in text, name
    for word in ("Parameters:", "Returns:", "Raises:", "cu_seqlens"):
        assert word in text, word
