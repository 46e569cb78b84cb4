"""A hub without a network: Llama's tokenizer and tiny random Llama models under the ids that upstream's tests name."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from peer_environment import MODEL_FILE, WORK, llama2, transformers

REVISIONS = ("0" * 40, "0984d03108b1a041ed679bd253b6519b7e1a4778")
TOKENIZERS: dict[str, tuple[bool | None, bool]] = {  # (legacy, whether special tokens are normalized)
    "hf-internal-testing/llama-tokenizer": (True, False),
    "huggyllama/llama-7b": (True, False),
    "meta-llama/Llama-2-7b-hf": (True, False),
    "hf-internal-testing/llama-tokenizer-non-normalized": (None, False),
    "hf-internal-testing/llama-code-tokenizer": (None, False),
    "meta-llama/Meta-Llama-3-8B": (True, False),  # a stand-in: what its tests ask holds of any tokenizer
}
MODELS = [
    "hf-internal-testing/tiny-random-gpt2",
    "hf-internal-testing/tiny-random-bart",
    "gpt2",
    "openai-community/gpt2",
    "hf-internal-testing/tiny-random-MistralForCausalLM",
    "hf-internal-testing/tiny-random-BartForConditionalGeneration",
    "hf-internal-testing/tiny-random-GPT2LMHeadModel",
    "hf-internal-testing/tiny-random-LlamaForCausalLM",
    "hf-internal-testing/tiny-random-llama",
    "hf-internal-testing/tiny-random-bert",
    "hf-internal-testing/tiny-random-t5",
    "HuggingFaceM4/tiny-random-LlamaForCausalLM",
    "trl-internal-testing/tiny-random-LlamaForCausalLM",
    "trl-internal-testing/tiny-LlamaForCausalLM-3.2",
    "trl-internal-testing/tiny-LlamaForCausalLM-3",
    "peft-internal-testing/tiny-random-LlamaForCausalLM",
    "distilbert/distilgpt2",
    "facebook/bart-large-cnn",
    "sshleifer/bart-tiny-random",
    "saibo/llama-1B",
    "EleutherAI/pythia-160m-deduped",
    "google/gemma-2-2b-it",
    "google-t5/t5-small",
    "cognitivecomputations/dolphin-2.5-mixtral-8x7b",
    "HuggingFaceTB/SmolLM-135M",
    "meta-llama/Llama-2-7b-chat-hf",
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
    "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T",
    "Narsil/tiny-distilbert-sequence-classification",
]


def folder_of(repo: str, revision: str = REVISIONS[0]) -> Path:
    """The snapshot folder of a repository in the hub's cache; made where it is not there."""
    root = WORK / "hf" / "hub" / ("models--" + repo.replace("/", "--"))
    (root / "refs").mkdir(parents=True, exist_ok=True)
    (root / "refs" / "main").write_text(REVISIONS[0])
    folder = root / "snapshots" / revision
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _token(content: str, normalized: bool) -> dict[str, Any]:
    sides = dict.fromkeys(("lstrip", "rstrip", "single_word"), False)
    return {"__type": "AddedToken", "content": content, "normalized": normalized, **sides}


def _tokenizer(folder: Path, repo: str, legacy: bool | None, normalized: bool) -> None:
    shutil.copy(MODEL_FILE, folder / "tokenizer.model")
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    config: dict[str, Any] = {
        **{name: _token(content, normalized) for name, content in special.items()},
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1000000000000000019884624838656,
        "pad_token": None,
        "sp_model_kwargs": {},
        "tokenizer_class": "LlamaTokenizer",
    }
    if legacy is not None:
        config["legacy"] = legacy
    if repo.startswith("huggyllama"):
        config["chat_template"] = llama2.tokenizer.LLAMA2_CHAT_TEMPLATE
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    # As transformers' converter makes it from tokenizer.model (tests/parity compares the two).
    llama2.LlamaTokenizerFast(str(MODEL_FILE), legacy=True)._tokenizer.save(str(folder / "tokenizer.json"))


def make() -> None:
    """Fills the cache once per version of transformers."""
    done = WORK / "hf" / f"done-{transformers.__version__}"
    if done.exists():
        return
    shutil.rmtree(WORK / "hf", ignore_errors=True)
    for repo, (legacy, normalized) in TOKENIZERS.items():
        for revision in REVISIONS:
            _tokenizer(folder_of(repo, revision), repo, legacy, normalized)
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 4}
    tiny = llama2.LlamaConfig(vocab_size=32000, max_position_embeddings=512, **shape)
    source = folder_of("hf-internal-testing/llama-tokenizer")
    for repo in MODELS:
        folder = folder_of(repo)
        llama2.LlamaForCausalLM(tiny).save_pretrained(folder)
        for name in ("tokenizer.model", "tokenizer.json", "tokenizer_config.json"):
            shutil.copy(source / name, folder / name)
        if "dolphin" in repo:
            config = json.loads((folder / "tokenizer_config.json").read_text())
            (folder / "tokenizer_config.json").write_text(json.dumps({**config, "pad_token": "<unk>"}))
    done.write_text("")
