"""The Auto classes, and hub ids through a stand-in for huggingface_hub."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from llama2.auto import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    load_config,
)
from llama2.classifiers import LlamaForSequenceClassification
from llama2.config import LlamaConfig
from llama2.errors import CheckpointError, ConfigError, InputError
from llama2.model import LlamaForCausalLM, LlamaModel


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("model")
    LlamaForCausalLM(LlamaConfig.preset("tiny")).half().save_pretrained(path)
    return path


def test_classes(folder: Path) -> None:
    assert type(AutoModelForCausalLM.from_pretrained(folder)) is LlamaForCausalLM
    assert type(AutoModel.from_pretrained(str(folder), dtype="float32")) is LlamaModel
    with pytest.warns(UserWarning, match="score.weight"):
        classifier = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=4)
    assert type(classifier) is LlamaForSequenceClassification and classifier.num_labels == 4


def test_from_config() -> None:
    config = LlamaConfig.preset("tiny", dtype="float16")
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    assert (model.dtype, model.attn_implementation, model.training) == (torch.float16, "eager", True)
    assert config._attn_implementation is None
    assert AutoModel.from_config(config, dtype="float64").dtype == torch.float64
    assert AutoModelForSequenceClassification.from_config(LlamaConfig.preset("tiny")).dtype == torch.float32


def test_config(folder: Path, smollm2: Path) -> None:
    assert AutoConfig.from_pretrained(folder).hidden_size == 64
    assert AutoConfig.from_pretrained(folder, use_cache=False).use_cache is False
    assert AutoConfig.from_pretrained(folder / "config.json").dtype is torch.float16
    assert LlamaConfig.from_pretrained(smollm2).num_hidden_layers == 30
    assert AutoConfig.from_pretrained(smollm2.parent, gguf_file=smollm2.name).vocab_size == 49152
    assert AutoConfig.for_model("llama", hidden_size=128).hidden_size == 128
    assert AutoConfig.from_pretrained(folder, num_labels=7, trust_remote_code=True).num_labels == 7
    with pytest.raises(InputError, match="did you mean hidden_size"):
        AutoConfig.from_pretrained(folder, hiden_size=5)
    with pytest.raises(ConfigError, match="model_type is 'bert'"):
        AutoConfig.for_model("bert")


def test_foreign_and_missing(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}))
    for call in (load_config, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(CheckpointError, match="describes a 'qwen2' model"):
            call(tmp_path)
        with pytest.raises(CheckpointError, match="does not exist"):
            call(tmp_path / "gone")


@pytest.mark.parametrize("cls", [AutoConfig, AutoTokenizer, AutoModel, AutoModelForCausalLM])
def test_not_constructed(cls: Any) -> None:
    with pytest.raises(InputError, match="call .*from_pretrained"):
        cls()


def test_gguf_by_every_road(smollm2: Path) -> None:
    by_path = AutoModelForCausalLM.from_pretrained(smollm2)
    by_folder = AutoModelForCausalLM.from_pretrained(smollm2.parent)
    by_keyword = AutoModelForCausalLM.from_pretrained(smollm2.parent, gguf_file=smollm2.name)
    ids = torch.tensor([[1, 4093, 198]])
    with torch.inference_mode():
        logits = by_path(ids).logits
        assert torch.equal(by_folder(ids).logits, logits) and torch.equal(by_keyword(ids).logits, logits)


def test_gguf_tokenizer(smollm2: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    ids = tokenizer("Hello, world!")["input_ids"]
    assert tokenizer.decode(ids) == "Hello, world!"
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)


def test_sentencepiece_tokenizer(tokenizer_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_model.parent)
    assert tokenizer("Hello world")["input_ids"] == [1, 15043, 3186]


def test_loading_a_gguf_imports_no_more_than_it_needs(smollm2: Path) -> None:
    code = (
        "import sys\n"
        "from llama2.auto import AutoConfig, AutoModelForCausalLM\n"
        f"AutoConfig.from_pretrained({str(smollm2)!r})\n"
        "assert 'torch' not in sys.modules\n"
        f"AutoModelForCausalLM.from_pretrained({str(smollm2)!r})\n"
        "bad = {'huggingface_hub', 'jinja2', 'sentencepiece', 'tokenizers', 'rich', 'tyro', 'safetensors',"
        " 'transformers', 'torch._dynamo', 'sympy'} & set(sys.modules)\n"
        "assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# -- hub -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """huggingface_hub whose only repository, "who/tiny", is the folder; calls are recorded."""
    import huggingface_hub

    calls: list[dict[str, Any]] = []

    def download(**kwargs: Any) -> str:
        calls.append(kwargs)
        if kwargs["repo_id"] != "who/tiny":
            raise ConnectionError("no route\n to host")
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return calls


def test_hub_id(hub: list[dict[str, Any]]) -> None:
    model = AutoModelForCausalLM.from_pretrained("who/tiny", revision="v2", token="secret", local_files_only=True)
    assert model.dtype == torch.float16 and model.config.name_or_path == "who/tiny"
    (call,) = hub
    assert (call["revision"], call["token"], call["local_files_only"]) == ("v2", "secret", True)
    assert "*.safetensors" in call["allow_patterns"] and call["ignore_patterns"] == ["original/*"]
    assert LlamaConfig.from_pretrained("who/tiny").hidden_size == 64
    assert {"config.json", "generation_config.json", "params.json"} <= set(hub[1]["allow_patterns"])


def test_hub_subfolder_and_bin(hub: list[dict[str, Any]]) -> None:
    with pytest.raises(CheckpointError):
        AutoModelForCausalLM.from_pretrained("who/tiny", subfolder="deep", use_safetensors=False)
    assert "deep/pytorch_model*.bin" in hub[0]["allow_patterns"]
    assert not any("safetensors" in pattern for pattern in hub[0]["allow_patterns"])


def test_offline_is_one_clear_paragraph(hub: list[dict[str, Any]]) -> None:
    with pytest.raises(CheckpointError) as caught:
        AutoModelForCausalLM.from_pretrained("meta-llama/Llama-2-7b-hf")
    message = str(caught.value)
    assert "\n" not in message and "no route to host" in message
    assert "give the path of its folder" in message


def test_push_to_hub(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub

    uploads: list[Any] = []
    monkeypatch.setattr(huggingface_hub, "create_repo", lambda **kwargs: uploads.append(kwargs["repo_id"]))

    def upload(**kwargs: Any) -> str:
        uploads.append(sorted(p.name for p in Path(kwargs["folder_path"]).iterdir()))
        return "https://hub/commit/1"

    monkeypatch.setattr(huggingface_hub, "upload_folder", upload)
    model = AutoModelForCausalLM.from_pretrained(folder)
    files = ["config.json", "generation_config.json", "model.safetensors"]
    assert model.push_to_hub("me/mine") == "https://hub/commit/1"
    model.save_pretrained(tmp_path / "named", push_to_hub=True)
    assert uploads == ["me/mine", files, "named", files]
