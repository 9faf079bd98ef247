"""The canonical text of a spec is stable and reads back; the shipped specs are what they say."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings

from nsa_gen.spec import Spec, SpecError, load_spec, parse_spec, shipped_specs
from tests.spec.spec_texts import as_text, base_document, valid_documents

DIGESTS = {
    "gptoss_window": "7cb456264dbe",
    "infllm_v2_8b": "00a58e8b531e",
    "llama3_8b": "f579930cee6f",
    "moba_llama3_8b": "2cd785938f44",
    "mha_16": "9fc623750898",
    "msa_m3": "3b53036c3d28",
    "msa_m3_indexer": "8f91b726d703",
    "nsa_64x4": "a8ed3506802c",
    "nsa_paper": "f537c0b864eb",
    "qwen2_5_7b": "22d4d67a3470",
    "tiny": "2c89c63d6715",
    "window_selection_joint": "69055e66b2de",
}
"""A changed digest means that users' generated packages and tuned results are out of date: change it knowingly."""


@given(valid_documents())
@settings(max_examples=80)
def test_the_resolved_text_reads_back_as_the_same_spec(document: dict) -> None:
    spec = parse_spec(as_text(document))
    text = spec.resolved_yaml()
    assert parse_spec(text) == spec
    assert parse_spec(text).resolved_yaml() == text
    assert Spec.model_validate(document) == spec
    assert Spec.model_validate(spec.model_dump()) == spec


@given(valid_documents())
@settings(max_examples=40)
def test_other_yaml_readers_read_the_resolved_text_alike(document: dict) -> None:
    spec = parse_spec(as_text(document))
    assert yaml.safe_load(spec.resolved_yaml()) == spec.model_dump(mode="json", exclude_none=True)


def test_the_resolved_text_does_not_depend_on_how_a_spec_was_written() -> None:
    document = base_document()
    backwards = dict(reversed(document.items())) | {"scale": "auto", "kv": "shared", "combine": {"gate": "sigmoid"}}
    assert parse_spec(as_text(backwards)).resolved_yaml() == parse_spec(as_text(document)).resolved_yaml()


def test_the_resolved_text_writes_every_default_in_a_fixed_order() -> None:
    document = base_document(selection=None, window=None, description='say "no" \\ yes', name="no", scale=1e-5)
    assert parse_spec(as_text(document)).resolved_yaml() == (
        "version: 1\n"
        'name: "no"\n'
        'description: "say \\"no\\" \\\\ yes"\n'
        "heads:\n  query: 8\n  kv: 2\n"
        "head_dim:\n  qk: 64\n  v: 64\n"
        "dtype: float32\n"
        "fp32_precision: ieee\n"
        "scale: 1.0e-05\n"
        "kv: shared\n"
        "compression:\n  block: 32\n  stride: 16\n"
        "  phi:\n    key: mean\n    value: mean\n"
        "  position:\n    key: none\n    value: none\n"
        "combine:\n  gate: sigmoid\n"
        "passes: [forward, backward]\n"
    )


def test_fields_of_version_2_are_written_in_version_2_alone() -> None:
    first = parse_spec(as_text(base_document()))
    second = parse_spec(as_text(base_document(version=2)))
    assert "scores" not in first.resolved_yaml() and "scores" not in first.model_dump()["selection"]
    assert "  scores: compression\n" in second.resolved_yaml()
    assert first.replace(version=2) == second and first.digest() != second.digest()
    written = base_document(selection={"block": 64, "count": 16, "scores": "compression"})
    assert parse_spec(as_text(written)) == first


@pytest.mark.parametrize("name", DIGESTS)
def test_the_digest_of_a_shipped_spec_is_stable(name: str) -> None:
    assert load_spec(name).digest() == DIGESTS[name]


def test_any_change_of_a_spec_changes_its_digest() -> None:
    spec = load_spec("tiny")
    changed = [spec.replace(name="other"), spec.replace(scale=0.25), spec.replace(window=None)]
    assert len({spec.digest(), *(other.digest() for other in changed)}) == 4


def test_the_shipped_specs_are_found_by_name_and_named_like_their_file() -> None:
    assert set(shipped_specs()) == set(DIGESTS)
    for name, path in shipped_specs().items():
        assert load_spec(name) == load_spec(path)
        assert load_spec(name).name == name
        assert load_spec(name).description
        assert path.read_text().startswith("# yaml-language-server: $schema=./nsa-spec.schema.json\n")


def test_the_paper_spec_is_the_paper() -> None:
    spec = load_spec("nsa_paper")
    assert (spec.heads.query, spec.heads.kv, spec.heads.group) == (64, 4, 16)
    assert (spec.head_dim.qk, spec.head_dim.v, spec.dtype, spec.kv) == (192, 128, "bfloat16", "shared")
    compression, selection, window = spec.compression, spec.selection, spec.window
    assert compression is not None and selection is not None and window is not None
    assert (compression.block, compression.stride, compression.phi.hidden) == (32, 16, 256)
    assert (compression.phi.key, compression.phi.value) == ("mlp", "mlp")
    assert (compression.position.key, compression.position.value) == ("learned", "none")
    assert (selection.block, selection.count, selection.initial, selection.local) == (64, 16, 1, 2)
    assert window.size == 512


def test_an_unknown_name_gets_a_suggestion_and_the_list() -> None:
    with pytest.raises(SpecError) as caught:
        load_spec("lama3_8b")
    (problem,) = caught.value.problems
    assert problem.hint == "did you mean 'llama3_8b'?"
    assert all(name in problem.message for name in DIGESTS)


def test_a_file_without_suffix_is_read_when_no_shipped_spec_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("mine", "tiny"):
        (tmp_path / name).write_text(as_text(base_document()))
    assert load_spec("mine").name == "example"
    assert load_spec("tiny").name == "tiny"
    assert load_spec("./tiny").name == "example"


def test_a_field_of_version_2_is_written_out_in_version_2_alone() -> None:
    first, second = (parse_spec(as_text(base_document(version=version))) for version in (1, 2))
    assert first.window is not None and second.window is not None
    assert first.window.sink == second.window.sink == "none"
    assert "window:\n  size: 512\ncombine" in first.resolved_yaml()
    assert "window:\n  size: 512\n  sink: none\ncombine" in second.resolved_yaml()
    assert "sink" not in first.model_dump()["window"] and second.model_dump()["window"]["sink"] == "none"
