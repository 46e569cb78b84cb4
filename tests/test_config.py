"""LlamaConfig: defaults, spellings, refusals."""

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import tiny_config

from llama2 import AutoConfig, CheckpointError, ConfigError, InputError, LlamaConfig
from llama2.rope_types import ROPE_TYPES, attention_scaling, inverse_frequencies


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
        assert LlamaConfig(torch_dtype=given).dtype is torch.float16
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


LINEAR = {"rope_type": "linear", "factor": 2.0}
STORED = {"plain": None, "linear": {"rope_type": "linear", "factor": 4.0}}


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        ({"rope_scaling": LINEAR}, {**LINEAR, "rope_theta": 10000.0}),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, {**LINEAR, "rope_theta": 10000.0}),
        ({"rope_scaling": {**LINEAR, "rope_theta": 7.0}}, {**LINEAR, "rope_theta": 7.0}),
    ],
)
def test_an_edited_rope_scaling_counts(stored: str, edit: dict[str, Any], expected: Any, tmp_path: Path) -> None:
    """The library writes both spellings; the one that differs from what rope_parameters implies is the user's."""
    fields = {**tiny_config(rope_scaling=STORED[stored]).to_dict(), **edit}
    with pytest.warns(UserWarning, match="rope_scaling counts"):
        assert LlamaConfig.from_dict(fields).rope_parameters == expected
    with pytest.warns(UserWarning, match="rope_scaling counts"):
        assert LlamaConfig(**fields).rope_parameters == expected
    (tmp_path / "config.json").write_text(json.dumps(fields))
    for load in (LlamaConfig.from_pretrained, AutoConfig.from_pretrained):
        with pytest.warns(UserWarning, match="rope_scaling counts"):
            assert load(tmp_path).rope_parameters == expected


@pytest.mark.parametrize("stored", STORED)
def test_an_edited_rope_theta_counts(stored: str) -> None:
    config = tiny_config(rope_scaling=STORED[stored])
    fields = {**config.to_dict(), "rope_theta": 5e5}
    with pytest.warns(UserWarning, match=r"rope_theta is 500000.0 but rope_parameters"):
        assert LlamaConfig.from_dict(fields).rope_parameters == {**config.rope_parameters, "rope_theta": 5e5}


def test_a_deleted_rope_scaling_counts() -> None:
    fields = {**tiny_config(rope_scaling=LINEAR).to_dict(), "rope_scaling": None}
    with pytest.warns(UserWarning, match="rope_scaling counts"):
        assert LlamaConfig.from_dict(fields).rope_scaling is None


def test_two_edits_of_rope_are_no_edit() -> None:
    fields = {**tiny_config().to_dict(), "rope_scaling": LINEAR, "rope_theta": 5e5}
    with pytest.raises(ConfigError, match=r"rope_theta is 500000.0 and rope_scaling is .*'linear'.*rope_parameters"):
        LlamaConfig.from_dict(fields)


def test_rope_parameters_alone_and_agreeing_spellings_are_quiet() -> None:
    assert LlamaConfig(rope_parameters={"rope_theta": 5e5}).rope_theta == 5e5
    for scaling in STORED.values():
        config = tiny_config(rope_scaling=scaling, rope_theta=5e5)
        assert LlamaConfig.from_dict(config.to_dict()) == config
        assert LlamaConfig(**config.to_dict()) == config
    assert LlamaConfig.from_dict({"rope_theta": 5e5, "rope_scaling": LINEAR}).rope_theta == 5e5


def test_rope_parameters_set_later_are_completed() -> None:
    config = tiny_config(rope_theta=5e5)
    config.rope_parameters = {"type": "linear", "factor": 2.0}
    assert config.rope_parameters == {**LINEAR, "rope_theta": 5e5}
    config.rope_parameters = {"rope_theta": 7.0}
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 7.0}


def test_dtype_is_torchs_in_python_and_a_name_in_the_file(tmp_path: Path) -> None:
    config = LlamaConfig(dtype="bfloat16")
    assert config.dtype is config.torch_dtype is torch.bfloat16 and config.dtype_name == "bfloat16"
    config.dtype = torch.float16
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "float16"
    assert LlamaConfig.from_pretrained(tmp_path).dtype is torch.float16
    assert LlamaConfig.from_pretrained(tmp_path, dtype="float32").dtype is torch.float32
    assert LlamaConfig.from_pretrained(tmp_path, torch_dtype=torch.float64).dtype is torch.float64
    assert LlamaConfig().dtype is None and copy.deepcopy(config).dtype is torch.float16


def test_the_surface_of_a_configuration(tmp_path: Path) -> None:
    """Names and results as transformers documents them."""
    config = tiny_config(num_labels=3)
    assert config.get_text_config() is config.get_text_config(decoder=True) is config
    assert "num_hidden_layers" in config and "no_such_field" not in config
    assert {"vocab_size", "id2label", "rope_parameters", "pad_token_id"} <= set(config)
    config._name_or_path = "here"
    assert config.name_or_path == config._name_or_path == config.to_dict()["_name_or_path"] == "here"
    assert config.use_return_dict is True
    config.to_json_file(tmp_path / "one.json")
    config.to_json_file(tmp_path / "all.json", use_diff=False)
    one, whole = (json.loads((tmp_path / name).read_text()) for name in ("one.json", "all.json"))
    assert "return_dict" not in one and whole["return_dict"] is True and one["id2label"]["2"] == "LABEL_2"
    assert whole == json.loads(config.to_json_string(use_diff=False)) == config.to_dict()
    assert one == config.to_diff_dict() == json.loads(config.to_json_string())
    assert LlamaConfig.from_json_file(tmp_path / "one.json") == LlamaConfig.from_json_file(tmp_path / "all.json")
    assert "id2label" not in tiny_config().to_diff_dict() and tiny_config().to_dict()["id2label"]["1"] == "LABEL_1"


def test_get_config_dict(tmp_path: Path) -> None:
    config = tiny_config(my_field=3)
    config.save_pretrained(tmp_path, push_to_hub=False)
    fields, rest = LlamaConfig.get_config_dict(tmp_path, revision="main", token=None, foo=1)
    assert fields == config.to_diff_dict() and rest == {"foo": 1}
    assert LlamaConfig.get_config_dict(tmp_path / "config.json") == (fields, {})


def test_keywords_of_from_pretrained_that_are_no_fields(tmp_path: Path) -> None:
    """Hub settings are used or dropped, never stored; the rest is handed back where that is asked for."""
    tiny_config().save_pretrained(tmp_path)
    for load in (LlamaConfig.from_pretrained, AutoConfig.from_pretrained):
        config = load(tmp_path, trust_remote_code=True, revision="main", proxies=None, cache_dir=None)
        assert config == tiny_config()
        config, unused = load(tmp_path, use_cache=False, foo=1, return_unused_kwargs=True)
        assert config == tiny_config(use_cache=False) and unused == {"foo": 1}
        assert load(tmp_path, attn_implementation="eager")._attn_implementation == "eager"
        with pytest.raises(InputError, match="use_cash.*use_cache"):
            load(tmp_path, use_cash=False)
        with pytest.warns(UserWarning, match="proxies has no effect.*HTTPS_PROXY"):
            load(tmp_path, proxies={"https": "x:1"})
    config, unused = LlamaConfig.from_dict({"vocab_size": 7}, return_unused_kwargs=True, use_cache=False, foo=1)
    assert (config.vocab_size, config.use_cache, unused) == (7, False, {"foo": 1}) and not hasattr(config, "foo")


def test_numbers_of_numpy_and_torch() -> None:
    config = tiny_config(hidden_size=np.int64(64), rope_theta=np.float32(10000.0), eos_token_id=torch.tensor(2))
    assert type(config.hidden_size) is int and type(config.eos_token_id) is int
    assert json.loads(config.to_json_string())["hidden_size"] == 64
    config.num_hidden_layers = np.int32(3)
    assert type(config.num_hidden_layers) is int


def test_minus_one_is_no_pad_token_whenever_it_is_set() -> None:
    config = tiny_config()
    config.pad_token_id = -1
    assert config.pad_token_id is None


class TheirConfig:
    """What transformers 5.23 gives: `to_dict` of LlamaConfig(hidden_size=64, ...) with its own fields about it."""

    model_type = "llama"
    _attn_implementation = "eager"

    def to_dict(self) -> dict[str, Any]:
        rope = {"rope_theta": 5e5, "rope_type": "linear", "factor": 2.0}
        sizes = {k: v for k, v in tiny_config().to_dict().items() if "rope" not in k}
        return {
            **sizes,
            "rope_parameters": rope,
            "dtype": "bfloat16",
            "transformers_version": "5.23.0",
            "_experts_implementation_internal": None,
        }


def test_a_configuration_of_transformers_is_read() -> None:
    config = LlamaConfig.of(TheirConfig())
    assert config == tiny_config(rope_theta=5e5, rope_scaling=LINEAR, dtype="bfloat16")
    assert config._attn_implementation == "eager" and LlamaConfig.of(config) is config
    for other in ({"model_type": "llama"}, None, type("Bert", (), {"model_type": None})()):
        with pytest.raises(ConfigError, match="LlamaConfig is needed"):
            LlamaConfig.of(other)


@pytest.mark.parametrize("keyword", ["repo_id", "token", "save_function"])
def test_save_pretrained_takes_the_keywords_of_a_model(keyword: str, tmp_path: Path) -> None:
    tiny_config().save_pretrained(tmp_path, push_to_hub=False, **{keyword: None})
    assert LlamaConfig.from_pretrained(tmp_path) == tiny_config()
    with pytest.raises(InputError, match="'foo'"):
        tiny_config().save_pretrained(tmp_path, foo=1)


def test_rope_settings_that_change_nothing() -> None:
    """5.x keeps both keys beside a type that does not use them; another share of the head would change the answers."""
    extra = {"partial_rotary_factor": 1.0, "original_max_position_embeddings": 16}
    assert tiny_config(rope_parameters={**LINEAR, "rope_theta": 7.0, **extra}).rope_parameters["factor"] == 2.0
    for kind in ({"rope_type": "default"}, LINEAR):
        with pytest.raises(ConfigError, match="partial_rotary_factor is 0.5"):
            tiny_config(rope_parameters={**kind, "partial_rotary_factor": 0.5})


def test_the_dynamic_type_stretches_behind_max_position_embeddings() -> None:
    """As transformers 4.46 and 5.x, which look at no original_max_position_embeddings there."""
    plain = tiny_config(rope_scaling={"rope_type": "dynamic", "factor": 10.0})
    noted = tiny_config(
        rope_scaling={"rope_type": "dynamic", "factor": 10.0, "original_max_position_embeddings": 16384}
    )

    def frequencies(config: LlamaConfig, length: int) -> torch.Tensor:
        found: torch.Tensor = inverse_frequencies(config, length, xp=torch, dtype=torch.float32)
        return found

    for length in (60, 96):
        assert torch.equal(frequencies(noted, length), frequencies(plain, length))
    assert not torch.equal(frequencies(noted, 60), frequencies(noted, 96))


TYPES: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 8.0, "original_max_position_embeddings": 64},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}


def test_every_type_has_a_case() -> None:
    assert set(TYPES) == set(ROPE_TYPES)


@pytest.mark.parametrize("kind", TYPES)
def test_numpy_and_torch_turn_by_the_same_frequencies(kind: str) -> None:
    config = tiny_config(rope_parameters={"rope_type": kind, "rope_theta": 5e5, **TYPES[kind]})
    for length in (None, 500):
        exact = inverse_frequencies(config, length, xp=torch, dtype=torch.float64).numpy()
        for found in (
            inverse_frequencies(config, length, xp=np, dtype=np.float32),
            inverse_frequencies(config, length, xp=torch, dtype=torch.float32).numpy(),
        ):
            assert found.dtype == np.float32 and found.shape == (config.head_dim // 2,)
            np.testing.assert_allclose(found, exact, rtol=1e-6)
        np.testing.assert_allclose(inverse_frequencies(config, length, xp=np, dtype=np.float64), exact, rtol=1e-14)


def test_scales_of_cos_and_sin() -> None:
    assert attention_scaling({"rope_type": "llama3"}) == 1.0
    assert attention_scaling({"rope_type": "yarn", "factor": 8.0}) == pytest.approx(1.2079441541679836)  # 0.1 ln 8 + 1
    assert attention_scaling({"rope_type": "yarn", "factor": 8.0, "attention_factor": 0.7}) == 0.7
