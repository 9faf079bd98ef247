"""`nsa-gen new`: a spec to start from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nsa_gen._resources import specs_dir
from nsa_gen.spec import load_spec, shipped_specs
from nsa_gen.spec.schema import SCHEMA_FILE
from nsa_gen.spec.starter import SCHEMA_LINE, starter_text

LLAMA = {
    "model_type": "llama",
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "torch_dtype": "bfloat16",
}


@pytest.fixture
def config(tmp_path):
    """Write a config.json: Llama's with some fields changed, those that are None left out."""

    def write(**changes: object) -> str:
        path = tmp_path / "config.json"
        path.write_text(json.dumps({k: v for k, v in (LLAMA | changes).items() if v is not None}))
        return str(path)

    return write


@pytest.mark.parametrize("name", shipped_specs())
def test_every_shipped_spec_survives_being_commented(name):
    spec = load_spec(name)
    text = starter_text(spec)  # which reads it back and compares
    lines = text.splitlines()
    assert lines[0] == SCHEMA_LINE
    assert max(map(len, lines)) <= 120
    assert sum("#" in line for line in lines) > 20


def test_a_branch_that_is_absent_is_there_as_a_comment_that_works_when_it_is_uncommented(tmp_path):
    text = starter_text(load_spec("llama3_8b").replace(compression=None, selection=None))
    (line,) = (line for line in text.splitlines() if line.startswith("# compression: {"))
    path = tmp_path / "more.yaml"
    path.write_text(text.replace(line, line.removeprefix("# ")))
    assert load_spec(path).compression is not None


def test_it_writes_a_valid_copy_and_the_schema_that_its_first_line_names(call, tmp_path):
    answer = call("new", "mine", "--like", "qwen2_5_7b")
    assert (answer.returncode, answer.stdout) == (0, "mine.yaml\n")
    spec, base = load_spec(tmp_path / "mine.yaml"), load_spec("qwen2_5_7b")
    assert spec == base.replace(name="mine", description="Native sparse attention like qwen2_5_7b")
    assert (tmp_path / SCHEMA_FILE).read_bytes() == (specs_dir() / SCHEMA_FILE).read_bytes()
    assert call("check", "mine.yaml").returncode == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.yaml", SCHEMA_FILE]


def test_a_file_that_exists_is_replaced_only_by_force(call, tmp_path):
    path = tmp_path / "sub" / "mine.yaml"
    path.parent.mkdir()
    path.write_text("precious")
    (path.parent / SCHEMA_FILE).write_text("an older one")
    answer = call("new", "mine", "-o", "sub/mine.yaml")
    assert answer.returncode == 1 and "--force" in answer.stderr
    assert (path.read_text(), (path.parent / SCHEMA_FILE).read_text()) == ("precious", "an older one")
    assert call("new", "mine", "-o", "sub/mine.yaml", "--force").returncode == 0
    assert load_spec(path).name == "mine"
    assert (path.parent / SCHEMA_FILE).read_text() != "an older one"


def test_a_schema_that_is_there_is_left_alone(call, tmp_path):
    (tmp_path / SCHEMA_FILE).write_text("mine")
    answer = call("new", "one", "--json")
    assert json.loads(answer.stdout)["written"] == ["one.yaml"]
    assert (tmp_path / SCHEMA_FILE).read_text() == "mine"


@pytest.mark.parametrize(("name", "hint"), [("my-op", "my_op"), ("class", "class_attention"), ("torch", "hide")])
def test_a_name_that_cannot_be_imported_is_a_wrong_call(call, tmp_path, name, hint):
    answer = call("new", name)
    assert answer.returncode == 2 and hint in answer.stderr
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_ends_with_1(call, tmp_path):
    (tmp_path / "file").write_text("")
    answer = call("new", "mine", "-o", "file/mine.yaml")
    assert answer.returncode == 1 and "cannot be written" in answer.stderr


@pytest.mark.parametrize(
    ("changes", "heads", "dims", "dtype", "note"),
    [
        ({}, (32, 8), (128, 128), "bfloat16", ""),
        ({"head_dim": 64, "torch_dtype": "float16"}, (32, 8), (64, 64), "float16", ""),
        ({"num_key_value_heads": None}, (32, 32), (128, 128), "bfloat16", "a key head of its own"),
        ({"num_key_value_heads": None, "multi_query": True}, (32, 1), (128, 128), "bfloat16", ""),
        ({"torch_dtype": None}, (32, 8), (128, 128), "bfloat16", "bfloat16 is taken"),
        ({"torch_dtype": None, "dtype": "float32"}, (32, 8), (128, 128), "float32", ""),
        (
            dict.fromkeys(LLAMA) | {"n_head": 12, "n_embd": 768},
            (12, 12), (64, 64), "bfloat16", "",
        ),
        (
            {"qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "num_key_value_heads": 32},
            (32, 32), (192, 128), "bfloat16", "latent attention",
        ),
        ({"attn_logit_softcapping": 50.0}, (32, 8), (128, 128), "bfloat16", "no cap of logits"),
    ],
)  # fmt: skip
def test_a_model_s_config_fills_in_heads_dims_and_dtype(call, tmp_path, config, changes, heads, dims, dtype, note):
    answer = call("new", "model", "--from", config(**changes))
    assert answer.returncode == 0, answer.stderr
    spec = load_spec(tmp_path / "model.yaml")
    assert (spec.heads.query, spec.heads.kv) == heads
    assert (spec.head_dim.qk, spec.head_dim.v) == dims
    assert spec.dtype == dtype
    assert note in answer.stderr


def test_the_text_part_of_a_model_of_more_and_its_folder_will_do(call, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vision", "text_config": LLAMA}))
    assert call("new", "model", "--from", str(tmp_path)).returncode == 0
    assert "layout of llama" in load_spec(tmp_path / "model.yaml").description


@pytest.mark.parametrize(
    ("changes", "scale"),
    [({"query_pre_attn_scalar": 256}, 1 / 16), ({"attention_multiplier": 0.0078125}, 0.0078125), ({}, "auto")],
)
def test_a_model_s_own_scale_is_taken(call, tmp_path, config, changes, scale):
    assert call("new", "model", "--from", config(**changes)).returncode == 0
    assert load_spec(tmp_path / "model.yaml").scale == scale


@pytest.mark.parametrize(
    ("changes", "field", "said"),
    [
        ({"num_attention_heads": None}, "num_attention_heads", "required"),
        ({"num_attention_heads": "32"}, "num_attention_heads", "the string '32'"),
        ({"num_key_value_heads": [8, 8]}, "num_key_value_heads", "got a list"),
        ({"num_key_value_heads": 5}, "num_key_value_heads", "divides the 32 query heads"),
        ({"head_dim": 100}, "head_dim", "a multiple of 8"),
        ({"head_dim": 512}, "head_dim", "16..256"),
        ({"hidden_size": None}, "head_dim", "required"),
        ({"hidden_size": 4097}, "head_dim", "no multiple"),
        ({"hidden_size": 384}, "hidden_size / num_attention_heads", "16..256"),
        ({"torch_dtype": "float64"}, "torch_dtype", "one of bfloat16"),
        ({"qk_nope_head_dim": 128}, "qk_rope_head_dim", "required"),
        ({"query_pre_attn_scalar": "auto"}, "query_pre_attn_scalar", "a positive number"),
    ],
)
def test_what_no_spec_can_have_is_refused_by_the_name_of_its_field(call, tmp_path, config, changes, field, said):
    path = config(**changes)
    answer = call("new", "model", "--from", path)
    assert answer.returncode == 1
    assert f"{path}: {field}: " in answer.stderr and said in answer.stderr
    assert not (tmp_path / "model.yaml").exists()
    assert any(
        each["field"] == field for each in json.loads(call("new", "m", "--from", path, "--json").stdout)["problems"]
    )


def test_every_mistake_of_a_config_is_named_at_once(call, config):
    answer = call("new", "model", "--from", config(num_attention_heads=0, torch_dtype="int8", head_dim=7))
    assert len(answer.stderr.splitlines()) == 3


@pytest.mark.parametrize(("text", "said"), [("{", "no JSON"), ("[]", "expected an object"), ("\xff", "no JSON")])
def test_a_file_that_is_no_config_is_refused(call, tmp_path, text, said):
    Path("config.json").write_text(text)
    answer = call("new", "model", "--from", "config.json")
    assert answer.returncode == 1 and said in answer.stderr
