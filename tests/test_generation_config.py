"""GenerationConfig: defaults, what counts as set, files, refusals."""

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest

from llama2.config import LlamaConfig
from llama2.errors import CheckpointError, InputError
from llama2.generation.config import DEFAULTS, GenerationConfig

HUB = {
    "bos_token_id": 1,
    "do_sample": True,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "temperature": 0.6,
    "max_length": 4096,
    "top_p": 0.9,
    "transformers_version": "4.31.0.dev0",
}


def test_unset_fields_read_as_defaults() -> None:
    config = GenerationConfig()
    assert {name: getattr(config, name) for name in DEFAULTS} == DEFAULTS
    assert (config.top_k, config.temperature, config.max_length, config.num_beams) == (50, 1.0, 20, 1)
    assert config.to_diff_dict() == {}
    with pytest.raises(AttributeError, match="tempreature"):
        _ = config.tempreature


def test_hub_file_keeps_pad_zero_and_unknown_keys(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps(HUB | {"my_key": [1]}))
    config = GenerationConfig.from_pretrained(tmp_path, temperature=0.5)
    assert (config.pad_token_id, config.temperature, config.my_key) == (0, 0.5, [1])
    config.save_pretrained(tmp_path / "copy")
    saved = json.loads((tmp_path / "copy" / "generation_config.json").read_text())
    assert saved == {k: v for k, v in HUB.items() if k != "transformers_version"} | {"temperature": 0.5, "my_key": [1]}
    assert GenerationConfig.from_pretrained(tmp_path / "copy") == config == copy.deepcopy(config)


def test_set_wins_over_base_and_none_switches_off() -> None:
    base = GenerationConfig(top_k=7, temperature=0.6)
    merged = GenerationConfig(temperature=0.9).over(base)
    assert (merged.temperature, merged.top_k) == (0.9, 7)
    off = GenerationConfig()
    off.top_k = None
    assert off.over(base).top_k is None
    off.num_beams = None
    assert off.value("num_beams") == 1
    assert base.top_k == 7


def test_update_returns_what_it_does_not_know() -> None:
    config = GenerationConfig(top_k=3)
    assert config.update(top_k=5, colour="red") == {"colour": "red"}
    assert config.update(defaults_only=True, top_k=9, top_p=0.5) == {}
    assert (config.top_k, config.top_p) == (5, 0.5)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"max_new_tokens": 0}, "at least 1"),
        ({"temperature": 0.0}, "do_sample=False"),
        ({"temperature": -1.0}, "positive"),
        ({"top_p": 1.5}, r"\[0, 1\]"),
        ({"top_k": -1}, "at least 1"),
        ({"min_p": 2.0}, r"\[0, 1\]"),
        ({"typical_p": 0.0}, r"\(0, 1\]"),
        ({"repetition_penalty": 0.0}, "positive"),
        ({"num_beams": 0}, "at least 1"),
        ({"num_beams": True}, "at least 1"),
        ({"early_stopping": "always"}, "never"),
        ({"num_return_sequences": 2}, "do_sample=True"),
        ({"num_beams": 2, "num_return_sequences": 3}, "at most num_beams"),
        ({"num_beam_groups": 2, "num_beams": 4}, "does not implement"),
        ({"penalty_alpha": 0.6}, "does not implement"),
        ({"cache_implementation": "tape"}, "static"),
        ({"num_assistant_tokens_schedule": "quick"}, "constant"),
        ({"temperature": float("nan")}, "positive"),
    ],
    ids=str,
)
def test_refuses_to_generate_but_never_to_save(tmp_path: Path, fields: dict[str, Any], says: str) -> None:
    config = GenerationConfig.from_dict(fields)
    with pytest.raises(InputError, match=says):
        config.validate()
    if fields.get("temperature") == fields.get("temperature"):
        with pytest.warns(UserWarning, match="saved, but"):
            config.save_pretrained(tmp_path)
        assert GenerationConfig.from_pretrained(tmp_path) == config


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"temperature": 0.0}, "do_sample=False"),
        ({"constraints": ["dummy"], "num_beams": 2}, "does not implement"),
        ({"do_sample": False, "num_beams": 1, "num_return_sequences": 2}, "do_sample=True"),
        ({"num_beams": 2, "num_return_sequences": 3}, "at most num_beams"),
        ({"logits_processor": "foo"}, r"logits_processor is no setting; give it to generate\(\)"),
        ({"streamer": None}, "streamer is no setting"),
    ],
    ids=str,
)
def test_refuses_to_be_made(fields: dict[str, Any], says: str) -> None:
    """As in transformers; what other settings may still allow is left to generate()."""
    with pytest.raises(InputError, match=says):
        GenerationConfig(**fields)


@pytest.mark.parametrize(
    ("fields", "idle"),
    [
        ({"do_sample": False, "temperature": 0.5}, "temperature"),
        ({"num_beams": 1, "length_penalty": 2.0}, "length_penalty"),
        (
            {"return_dict_in_generate": False, "output_scores": True, "output_logits": True},
            "output_scores, output_logits",
        ),
    ],
    ids=str,
)
def test_says_what_has_no_effect(fields: dict[str, Any], idle: str) -> None:
    with pytest.warns(UserWarning, match=f"^{idle}.*has no effect"):
        GenerationConfig(**fields)
    GenerationConfig(num_return_sequences=2, **dict(list(fields.items())[1:]))  # the model's settings may allow it


def test_an_update_says_what_has_no_effect() -> None:
    """transformers' own case: a value, its default, and None."""
    config = GenerationConfig(do_sample=False)
    with pytest.warns(UserWarning, match="temperature has no effect"):
        config.update(temperature=0.9)
    config.update(temperature=1.0)
    config.update(temperature=None)


def test_good_settings_pass() -> None:
    GenerationConfig(**HUB).validate()
    GenerationConfig(num_beams=4, num_return_sequences=4, early_stopping="never", temperature=2, top_k=0).validate()


def test_sequence_bias_survives_json(tmp_path: Path) -> None:
    GenerationConfig(sequence_bias={(1, 2): -3.0}).save_pretrained(tmp_path)
    assert GenerationConfig.from_pretrained(tmp_path).sequence_bias == [[[1, 2], -3.0]]


def test_from_model_config() -> None:
    config = GenerationConfig.from_model_config(LlamaConfig(eos_token_id=[2, 3], pad_token_id=0, temperature=0.7))
    assert config.to_diff_dict() == {"bos_token_id": 1, "eos_token_id": [2, 3], "pad_token_id": 0, "temperature": 0.7}
    assert config.eos_token_ids == [2, 3]
    assert GenerationConfig.from_model_config(LlamaConfig(use_cache=False)).use_cache is False


def test_bad_files(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        GenerationConfig.from_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(CheckpointError, match="valid JSON"):
        GenerationConfig.from_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="object"):
        GenerationConfig.from_pretrained(tmp_path)


def test_good_save_is_silent(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        GenerationConfig(**HUB).save_pretrained(tmp_path)


def test_unused_names_what_has_no_effect() -> None:
    config = GenerationConfig()
    assert config.unused({"temperature": 0.5, "top_k": 50, "length_penalty": 2.0}) == ["temperature", "length_penalty"]
    assert GenerationConfig(do_sample=True).unused({"temperature": 0.5}) == []


def test_keywords_of_from_pretrained(tmp_path: Path) -> None:
    """Hub settings are no fields; what is neither is handed back where that is asked for."""
    GenerationConfig(top_k=7).save_pretrained(tmp_path, push_to_hub=False)
    config, unused = GenerationConfig.from_pretrained(
        tmp_path, revision="main", token=None, proxies=None, do_sample=True, foo=1, return_unused_kwargs=True
    )
    assert config.to_diff_dict() == {"top_k": 7, "do_sample": True} and unused == {"foo": 1}
    config = GenerationConfig.from_pretrained(tmp_path, revision="main", cache_dir=None, trust_remote_code=True)
    assert config.to_diff_dict() == {"top_k": 7}
    assert GenerationConfig.from_pretrained(tmp_path / "generation_config.json") == config


def test_another_file_name(tmp_path: Path) -> None:
    GenerationConfig(top_k=7).save_pretrained(tmp_path, config_file_name="mine.json")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.json"]
    assert GenerationConfig.from_pretrained(tmp_path, "mine.json").top_k == 7
    with pytest.raises(CheckpointError, match="generation_config.json"):
        GenerationConfig.from_pretrained(tmp_path)
    GenerationConfig(top_k=8).to_json_file(tmp_path / "file.json")
    assert json.loads((tmp_path / "file.json").read_text()) == {"top_k": 8}
    with pytest.raises(InputError, match="'foo'"):
        GenerationConfig().save_pretrained(tmp_path, foo=1)


class TheirSettings:
    """A GenerationConfig of transformers: 5.x holds None where nothing was set, 4.x its defaults."""

    def __init__(self, version: str, **fields: Any) -> None:
        self.version, self.fields = version, fields

    def to_dict(self) -> dict[str, Any]:
        return {"transformers_version": self.version, "_from_model_config": False, **self.fields}

    def to_diff_dict(self) -> dict[str, Any]:
        return self.to_dict()


def test_settings_of_transformers_are_read() -> None:
    new = GenerationConfig.of(TheirSettings("5.23.0", do_sample=None, max_new_tokens=5, top_k=None))
    assert new.to_diff_dict() == {"max_new_tokens": 5} and not new.is_set("do_sample")
    old = GenerationConfig.of(TheirSettings("4.46.3", do_sample=False, max_new_tokens=5))
    assert old.is_set("do_sample") and old.over(GenerationConfig(do_sample=True)).do_sample is False
    assert GenerationConfig.of({"top_k": 3}).top_k == 3 and GenerationConfig.of(new) is new
    with pytest.raises(InputError, match="generation_config is a int"):
        GenerationConfig.of(3)
