"""LlamaConfig: defaults, spellings, refusals."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import tiny_config

from llama2 import CheckpointError, ConfigError, LlamaConfig


def test_defaults_are_those_of_transformers() -> None:
    config = LlamaConfig()
    assert (config.vocab_size, config.hidden_size, config.intermediate_size) == (32000, 4096, 11008)
    assert (config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads) == (32, 32, 32)
    assert (config.max_position_embeddings, config.rms_norm_eps, config.initializer_range) == (2048, 1e-6, 0.02)
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id, config.head_dim) == (1, 2, None, 128)
    assert config.rope_scaling is None
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 10000.0}


@pytest.mark.parametrize(
    ("name", "parameters"),
    # Sums worked out from the released tensor shapes.
    [("7b", 6_738_415_616), ("13b", 13_015_864_320), ("70b", 68_976_648_192), ("smollm2-135m", 134_515_008)],
)
def test_presets(name: str, parameters: int) -> None:
    assert LlamaConfig.preset(name).num_parameters == parameters
    assert LlamaConfig.preset(f"Llama-2-{name}-chat-hf") == LlamaConfig.preset(name)


def test_num_parameters_counts_what_the_model_has() -> None:
    from tiny import VARIANTS, tiny_model

    for changes in VARIANTS.values():
        model = tiny_model(**changes)
        assert model.num_parameters() == model.config.num_parameters


def test_kv_bytes() -> None:
    assert LlamaConfig.preset("7b").kv_bytes_per_token() == 2 * 32 * 4096 * 2
    assert LlamaConfig.preset("70b").kv_bytes_per_token() == 2 * 80 * 8 * 128 * 2


@pytest.mark.parametrize(
    "spelling",
    [
        {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}},
        {
            "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5},
            "rope_theta": 5e5,
            "rope_scaling": {"rope_type": "linear", "factor": 2.0},
        },
    ],
)
def test_every_rope_spelling_is_one(spelling: dict) -> None:
    before = json.dumps(spelling)
    for config in (LlamaConfig(**spelling), LlamaConfig.from_dict(spelling)):
        assert config.rope_parameters == {"rope_type": "linear", "rope_theta": 5e5, "factor": 2.0}
        assert config.rope_theta == 5e5
        assert config.rope_scaling == {"rope_type": "linear", "factor": 2.0}
        assert LlamaConfig.from_dict(config.to_dict()) == config
    assert json.dumps(spelling) == before


def test_both_spellings_are_written() -> None:
    fields = tiny_config(rope_theta=5e5, dtype="bfloat16").to_dict()
    assert fields["rope_theta"] == fields["rope_parameters"]["rope_theta"] == 5e5
    assert fields["dtype"] == fields["torch_dtype"] == "bfloat16"
    assert fields["model_type"] == "llama"


def test_dtype_names() -> None:
    for given in ("float16", "torch.float16", torch.float16):
        assert LlamaConfig(torch_dtype=given).dtype == "float16"
    assert LlamaConfig(dtype="bfloat16").torch_dtype is torch.bfloat16
    with pytest.raises(ConfigError, match="'float17'.*bfloat16"):
        LlamaConfig(dtype="float17")


def test_rope_can_be_changed_after_construction() -> None:
    config = tiny_config()
    config.rope_scaling = {"type": "dynamic", "factor": 10.0}
    assert config.rope_parameters == {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 10.0}
    config.rope_theta = 7.0
    config.validate()
    assert config.rope_parameters["factor"] == 10.0


def test_overrides_beat_the_file() -> None:
    stored = tiny_config(rope_theta=5e5, rope_scaling={"type": "linear", "factor": 2.0}).to_dict()
    assert LlamaConfig.from_dict(stored, rope_theta=1e4).rope_parameters == {
        "rope_type": "linear",
        "rope_theta": 1e4,
        "factor": 2.0,
    }
    changed = LlamaConfig.from_dict(stored, rope_scaling={"rope_type": "linear", "factor": 4.0})
    assert changed.rope_parameters == {"rope_type": "linear", "rope_theta": 5e5, "factor": 4.0}


def test_unknown_keys_and_labels_survive(tmp_path: Path) -> None:
    config = tiny_config(foo=[1, {"a": None}], id2label={0: "no", 1: "yes", 2: "so"}, quantization_config={"bits": 4})
    config.save_pretrained(tmp_path)
    again = LlamaConfig.from_pretrained(tmp_path)
    assert again == config
    assert again.foo == [1, {"a": None}]
    assert again.id2label == {0: "no", 1: "yes", 2: "so"} and again.num_labels == 3
    assert again.label2id == {"no": 0, "yes": 1, "so": 2}
    assert LlamaConfig.from_pretrained(tmp_path / "config.json", use_cache=False).use_cache is False
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]


def test_attention_choice_is_never_saved() -> None:
    assert "attn_implementation" not in tiny_config(attn_implementation="eager").to_json_string()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_attention_heads": 32, "num_key_value_heads": 5}, r"32 is not a multiple of num_key_value_heads 5"),
        ({"hidden_size": 4097}, r"4097 is not a multiple of num_attention_heads 32.*head_dim"),
        ({"head_dim": 63}, r"head_dim is 63.*even"),
        ({"vocab_size": "abc"}, r"vocab_size is 'abc'.*integer"),
        ({"num_hidden_layers": 0}, r"num_hidden_layers is 0.*at least 1"),
        ({"hidden_act": "foo"}, r"hidden_act is 'foo'.*silu"),
        ({"initializer_range": 2.0}, r"initializer_range is 2.0"),
        ({"rms_norm_eps": 0.0}, r"rms_norm_eps is 0.0"),
        ({"pad_token_id": 32000}, r"pad_token_id is 32000 .*31999.*add_pad_token"),
        ({"attn_implementation": "flash"}, r"'flash'.*flash_attention_2"),
        ({"rope_scaling": {"type": "bogus", "factor": 2.0}}, r"'bogus'.*yarn"),
        ({"rope_scaling": {"factor": 2.0}}, r"name no rope_type"),
        ({"rope_scaling": {"type": "linear"}}, r"'linear' needs factor"),
        ({"rope_scaling": {"type": "linear", "factor": 0.5}}, r"factor is 0.5.*at least 1"),
        ({"rope_scaling": {"type": "linear", "factor": float("nan")}}, r"factor is nan"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "fcator": 1}}, r"does not use fcator"),
        ({"rope_scaling": "linear"}, r"give a dict"),
        ({"rope_theta": -1.0}, r"rope_theta is -1.0"),
        ({"num_labels": 3, "id2label": {0: "a"}}, r"num_labels is 3 but id2label names 1"),
    ],
)
def test_refuses_what_cannot_work(changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        LlamaConfig(**changes)
    assert isinstance(caught.value, ValueError)


def test_minus_one_is_no_pad_token() -> None:
    assert LlamaConfig(pad_token_id=-1).pad_token_id is None


def test_other_architectures_and_broken_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'mistral'.*llama"):
        LlamaConfig.from_dict({"model_type": "mistral"})
    with pytest.raises(CheckpointError, match=r"config\.json"):
        LlamaConfig.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        LlamaConfig.from_pretrained(tmp_path)


def test_a_failed_save_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_config().save_pretrained(tmp_path)
    before = (tmp_path / "config.json").read_text()

    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        tiny_config(vocab_size=98).save_pretrained(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]
    assert (tmp_path / "config.json").read_text() == before


def test_importing_the_package_and_its_configuration_loads_no_torch() -> None:
    code = "import sys, llama2; llama2.LlamaConfig.preset('7b'); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
