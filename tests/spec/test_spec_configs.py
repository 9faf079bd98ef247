"""A model's config with any field changed to anything is read or refused, never more."""

from __future__ import annotations

import contextlib
import json
import tempfile
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from nsa_gen.spec import SpecError
from nsa_gen.spec.huggingface import read_config
from nsa_gen.spec.model_types import MODEL_TYPES

CONFIGS = [json.loads(path.read_text()) for path in sorted((Path(__file__).parents[1] / "cli/configs").glob("*.json"))]
LEAVES = st.none() | st.booleans() | st.integers(-2, 600) | st.floats() | st.sampled_from(("", "yarn", "llama", "7"))
VALUES = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner))


@st.composite
def changed(draw: st.DrawFn) -> dict[str, Any]:
    config = json.loads(json.dumps(draw(st.sampled_from(CONFIGS))))
    for _ in range(draw(st.integers(1, 3))):
        part = config
        while True:
            name = draw(st.sampled_from(sorted(part)))
            if not isinstance(part[name], dict) or not part[name] or draw(st.booleans()):
                break
            part = part[name]
        part[name] = draw(st.sampled_from(sorted(MODEL_TYPES)) if name == "model_type" else VALUES)
    return config


@settings(max_examples=300)
@given(changed())
def test_a_config_with_some_fields_changed_is_read_or_refused_by_a_field_s_name(config: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.json"
        path.write_text(json.dumps(config))
        with contextlib.suppress(SpecError):
            shape = read_config(path)
            assert shape.heads.query % shape.heads.kv == 0
            assert shape.scale == "auto" or shape.scale > 0
