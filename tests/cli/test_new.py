"""`nsa-gen new`: a spec to start from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nsa_gen._resources import specs_dir
from nsa_gen.spec import load_spec, shipped_specs
from nsa_gen.spec.schema import SCHEMA_FILE
from nsa_gen.spec.starter import SCHEMA_LINE, starter_text

CONFIGS = Path(__file__).parent / "configs"

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
        ({"num_key_value_heads": None}, (32, 32), (128, 128), "bfloat16", "its own KV head"),
        ({"num_key_value_heads": None, "multi_query": True}, (32, 1), (128, 128), "bfloat16", ""),
        ({"torch_dtype": None}, (32, 8), (128, 128), "bfloat16", "bfloat16 is used"),
        ({"torch_dtype": None, "dtype": "float32"}, (32, 8), (128, 128), "float32", ""),
        (
            dict.fromkeys(LLAMA) | {"model_type": "gpt2", "n_head": 12, "n_embd": 768},
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
        ({"hidden_size": 4097}, "head_dim", "not a multiple"),
        ({"hidden_size": 384}, "hidden_size / num_attention_heads", "16..256"),
        ({"torch_dtype": "float64"}, "torch_dtype", "one of bfloat16"),
        ({"qk_nope_head_dim": 128}, "qk_rope_head_dim", "required"),
        ({"query_pre_attn_scalar": "auto"}, "query_pre_attn_scalar", "a positive number"),
        ({"attention_multiplier": float("nan")}, "attention_multiplier", "a positive number"),
        ({"model_type": ["llama"]}, "model_type", "got a list"),
        ({"model_type": "falcon", "multi_query": "true"}, "multi_query", "expected true or false"),
        ({"model_type": "qwen2", "use_sliding_window": 0}, "use_sliding_window", "expected true or false"),
        ({"model_type": "mpt", "n_heads": 32, "d_model": 4096, "attn_config": "triton"}, "attn_config", "an object"),
        ({"rope_scaling": "yarn"}, "rope_scaling", "expected an object"),
        ({"model_type": "nemotron-nas", "block_configs": 8}, "block_configs", "expected a list"),
        ({"model_type": "nemotron-nas", "block_configs": []}, "block_configs", "got nothing"),
        ({"model_type": "nemotron-nas", "block_configs": ["full"]}, "block_configs", "got nothing"),
        (
            {"model_type": "mpt", "n_heads": 32, "d_model": 4096, "attn_config": {"attn_type": "new"}},
            "attn_config.attn_type",
            "'new'",
        ),
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


@pytest.mark.parametrize(
    ("text", "said"), [("{", "not valid JSON"), ("[]", "expected an object"), ("\xff", "not valid JSON")]
)
def test_a_file_that_is_no_config_is_refused(call, tmp_path, text, said):
    Path("config.json").write_text(text)
    answer = call("new", "model", "--from", "config.json")
    assert answer.returncode == 1 and said in answer.stderr


@pytest.mark.parametrize(
    ("name", "heads", "dims", "scale", "said"),
    [
        ("deepseek_v3", (128, 128), (192, 128), 0.13523377886088, ["YaRN's factor on the logits, 1.874"]),
        ("phi3small", (32, 8), (128, 128), 1 / 128, ["blocksparse_block_size: 64"]),
        ("btlm", (32, 32), (80, 80), 1 / 80, ["ALiBi"]),
        ("gemma4", (8, 4), (256, 256), 1.0, ["qk_norm", "sliding_window: 512", "global_head_dim: 512"]),
        ("granite", (32, 8), (128, 128), 1 / 128, []),
        ("mpt_own_scale", (32, 4), (128, 128), 0.02, []),
        ("t5", (6, 6), (64, 64), 1.0, ["relative_attention_num_buckets"]),
        ("dbrx", (48, 8), (128, 128), "auto", ["clip_qkv: 8"]),
        ("mpt_multiquery", (32, 1), (128, 128), "auto", ["attn_config.alibi"]),
        ("olmo_multiquery", (32, 1), (128, 128), "auto", []),
        ("refined_web", (128, 8), (64, 64), "auto", []),
        ("refined_web_7b", (71, 1), (64, 64), "auto", []),
        ("falcon_7b", (71, 1), (64, 64), "auto", []),
        ("falcon_40b", (128, 8), (64, 64), "auto", []),
        ("gpt_bigcode", (48, 1), (128, 128), "auto", ["multi_query: missing; True is used", "no dropout"]),
        ("chatglm", (32, 2), (128, 128), "auto", []),
        ("nemotron_nas_uniform", (64, 8), (128, 128), "auto", ["block_configs: some layers"]),
        ("mimo_v2", (64, 4), (192, 128), "auto", ["attention_sink_bias", "swa_num_key_value_heads: 8"]),
        ("gpt_oss", (64, 8), (64, 64), "auto", ["sinks", "sliding_window: 128", "rope_scaling: yarn"]),
        ("mistral_defaults", (32, 8), (128, 128), "auto", ["num_key_value_heads: missing; 8 is used"]),
        ("gemma2_defaults", (8, 4), (256, 256), 1 / 16, ["head_dim: missing; 256", "softcapping: 50.0", "window"]),
        ("qwen2_window_off", (28, 4), (128, 128), "auto", []),
        ("thinker", (28, 4), (128, 128), "auto", []),
        ("language_config", (10, 10), (128, 128), "auto", []),
        ("llm_config", (32, 8), (128, 128), "auto", []),
    ],
)
def test_a_config_of_a_known_type_is_read_as_its_class_reads_it(call, tmp_path, name, heads, dims, scale, said):
    answer = call("new", "model", "--from", str(CONFIGS / f"{name}.json"), "--json")
    assert answer.returncode == 0, answer.stderr
    spec = load_spec(tmp_path / "model.yaml")
    assert (spec.heads.query, spec.heads.kv) == heads
    assert (spec.head_dim.qk, spec.head_dim.v) == dims
    assert spec.scale == (scale if scale == "auto" else pytest.approx(scale))
    notes = "\n".join(json.loads(answer.stdout)["notes"])
    assert all(each in notes for each in said)
    if not said:
        assert not notes


@pytest.mark.parametrize(
    ("name", "field", "said"),
    [
        ("nemotron_nas", "block_configs", "one n_heads_in_group for all layers"),
        ("openelm", "num_kv_heads", "got a list"),
        ("deci", "num_key_value_heads_per_layer", "got a list"),
        ("gpt2_scale_by_layer", "scale_attn_by_inverse_layer_idx", "one scale"),
        ("llama_with_own_scale", "softmax_scale", "not understood for models of type llama"),
        ("llama_with_sinks", "attention_sink_size", "not understood for models of type llama"),
        ("two_counts", "multi_query_attention", "together with n_kv_heads: 8"),
        ("yarn_of_no_factor", "rope_scaling.factor", "the string '40'"),
        ("unknown_type", "model_type", "the string 'novel'"),
    ],
)
def test_a_config_that_would_give_a_plausible_wrong_spec_is_refused_by_name(call, tmp_path, name, field, said):
    answer = call("new", "model", "--from", str(CONFIGS / f"{name}.json"))
    assert answer.returncode == 1 and not (tmp_path / "model.yaml").exists()
    assert f"{name}.json: {field}: " in answer.stderr and said in answer.stderr


def test_a_type_that_is_not_known_is_refused_with_the_fields_that_were_not_understood(call, config):
    answer = call("new", "model", "--from", str(CONFIGS / "unknown_type.json"))
    for field in ("num_attention_heads", "n_groups_kv", "qk_temperature", "attention_scheme", "--like SPEC"):
        assert field in answer.stderr
    assert "vocab_size" not in answer.stderr
    answer = call("new", "model", "--from", config(model_type="qwen4"))
    assert "did you mean 'qwen" in answer.stderr
    assert "model_type: this field is required" in call("new", "model", "--from", config(model_type=None)).stderr


def test_a_config_with_a_byte_order_mark_is_read(call, config):
    path = Path(config())
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert call("new", "model", "--from", str(path)).returncode == 0


@pytest.mark.parametrize("part", ["text_config", "llm_config", "language_config", "thinker_config", "text_model"])
def test_a_text_part_is_named_in_errors_and_its_dtype_may_be_the_whole_model_s(call, tmp_path, part):
    inner = {name: value for name, value in LLAMA.items() if name != "torch_dtype"}
    whole = {"model_type": "more", "torch_dtype": "float16", "head_dim": 16, "num_attention_heads": 3, part: inner}
    Path("config.json").write_text(json.dumps(whole))
    assert call("new", "model", "--from", "config.json").returncode == 0
    spec = load_spec(tmp_path / "model.yaml")
    assert (spec.heads.query, spec.head_dim.qk, spec.dtype) == (32, 128, "float16")
    for odd in ([], {}, 3):
        inner["model_type"] = odd
        Path("config.json").write_text(json.dumps(whole))
        assert "model_type: expected a known model type" in call("new", "odd", "--from", "config.json").stderr
    inner |= {"model_type": "llama", "num_attention_heads": "32"}
    Path("config.json").write_text(json.dumps(whole))
    assert f"config.json: {part}.num_attention_heads: " in call("new", "other", "--from", "config.json").stderr
