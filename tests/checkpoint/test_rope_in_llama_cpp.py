"""RoPE settings of GGUF files beside llama.cpp: the next token's log-probabilities of the same file."""

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import LLAMA3, tiny_model

from llama2 import AutoModelForCausalLM
from llama2.checkpoint.convert import ConversionSettings, convert

pytestmark = pytest.mark.parity
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
SETTINGS: dict[str, Any] = {
    "default": None,
    "linear": {"rope_type": "linear", "factor": 4.0},
    "yarn": YARN,
    "attention_factor": {**YARN, "attention_factor": 1.3},
    "mscale": {**YARN, "mscale": 0.7, "mscale_all_dim": 0.5},
    "llama3": {**LLAMA3, "original_max_position_embeddings": 8192, "rope_theta": 500000.0},
}
# llama.cpp adds in float32 and in another order: measured 3e-4 on log-probabilities down to -35.
LLAMA_CPP = 2e-3


def server(path: Path) -> Any:
    """llama.cpp with a float32 cache and without flash attention, as exact as it is."""
    x: Any = pytest.importorskip("xllamacpp")
    params = x.CommonParams()
    params.model.path = str(path)
    params.n_ctx, params.n_parallel, params.n_gpu_layers = 256, 1, 0
    params.warmup = params.fit_params = False
    params.cache_type_k = params.cache_type_v = x.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = x.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.cpuparams.n_threads = 1
    return x.Server(params)


def furthest(path: Path, other: Path | None = None) -> float:
    """The largest difference of the 500 likeliest tokens' log-probabilities, ours of the file `other`."""
    run, model = server(path), AutoModelForCausalLM.from_pretrained(other or path, dtype="float32").double()
    ids = torch.randint(3, 31000, (1, 150), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours = model(ids).logits[0].log_softmax(-1)
    worst = 0.0
    for count in (20, 150):
        asked = {"prompt": ids[0, :count].tolist(), "n_predict": 1, "n_probs": 500, "temperature": 0.0}
        answer = run.handle_completions(asked)
        answer = json.loads(answer) if isinstance(answer, str | bytes) else answer
        for token in answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
            worst = max(worst, abs(float(ours[count - 1, token["id"]]) - token["logprob"]))
    return worst


def written(folder: Path, rope: Any, tokenizer_model: Path) -> Path:
    sizes = {"vocab_size": 32000, "hidden_size": 128, "head_dim": 64, "max_position_embeddings": 256}
    tiny_model(torch.float32, **sizes, rope_scaling=rope).save_pretrained(folder)
    shutil.copy(tokenizer_model, folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the betas are told, which another test holds
        convert(folder, folder / "x.gguf", ConversionSettings("gguf"))
    return folder / "x.gguf"


@pytest.mark.parametrize("name", SETTINGS)
def test_both_rotate_alike(name: str, tmp_path: Path, tokenizer_model: Path) -> None:
    assert furthest(written(tmp_path, SETTINGS[name], tokenizer_model)) < LLAMA_CPP


def test_yarns_betas_are_not_read_there(tmp_path: Path, tokenizer_model: Path) -> None:
    """Once this fails, the warning of the converter is out of date."""
    path = written(tmp_path / "betas", {**YARN, "beta_slow": 2.0}, tokenizer_model)
    plain = written(tmp_path / "plain", YARN, tokenizer_model)
    assert furthest(path) > 1 and furthest(path, plain) < LLAMA_CPP
