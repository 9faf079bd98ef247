"""Every test of the tuner has a cache of its own, and lowers and renders each spec once a session."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest

from nsa_gen.lowering import Plan, lower
from nsa_gen.rendering import package, render
from nsa_gen.spec import Spec, parse_spec
from nsa_gen.tuning import cache as cache_module
from nsa_gen.tuning import run


@functools.cache
def _lowered(text: str) -> Plan:
    return lower(parse_spec(text))


@functools.cache
def _rendered(text: str) -> dict[str, str]:
    return render(parse_spec(text))


def _lower_once(spec: Spec) -> Plan:
    return _lowered(spec.resolved_yaml())


def _render_once(spec: Spec) -> dict[str, str]:
    return _rendered(spec.resolved_yaml())


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder, which this process and those it starts use."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("NSA_GEN_CACHE_DIR", str(folder))
    monkeypatch.delenv("NSA_GEN_TUNED", raising=False)
    for module in (run, cache_module):
        monkeypatch.setattr(module, "lower", _lower_once)
        monkeypatch.setattr(module, "render", _render_once)
    monkeypatch.setattr(package, "render", _render_once)
    return folder
