"""A tokenizer from GGUF metadata: the keys tokenizer.ggml.*, as any reader of the file gives them."""

import json
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers

from llama2.errors import CheckpointError, TokenizerError
from llama2.tokenizer.added import AddedToken
from llama2.tokenizer.fast import LlamaTokenizerFast
from llama2.tokenizer.sentencepiece_model import CONTROL, USER_DEFINED, SentencePieceModel
from llama2.tokenizer.slow import LlamaTokenizer

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
# tokenizer.ggml.pre -> the cuts made one after another, as llama.cpp makes them
_CUTS: dict[str, tuple[str, ...]] = {
    "gpt-2": (_GPT2,),
    "smollm": (r"\p{N}", _GPT2),
    "llama-bpe": (_LLAMA3,),
    "default": (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"),
}
_SAME = {"gpt2": "gpt-2", "llama3": "llama-bpe", "llama-v3": "llama-bpe", "starcoder": "smollm", "refact": "smollm"}
_MERGES_IGNORED = ("llama-bpe",)  # a word that is a token is taken whole, as in Llama 3's tokenizer.json


def from_gguf(metadata: Mapping[str, Any], use_fast: bool = True, **kwargs: Any) -> LlamaTokenizer | LlamaTokenizerFast:
    """The tokenizer that a GGUF file describes, with its special ids, flags and chat template.

    Models "llama" (SentencePiece; both classes) and "gpt2" (byte-level BPE; fast only). Other arguments win over the
    metadata. CheckpointError where keys are missing or of an unknown kind.
    """
    tokens = _required(metadata, "tokens")
    settings = {**_settings(metadata, tokens), **kwargs}
    model = _required(metadata, "model")
    if model == "llama":
        spm = _sentencepiece(metadata, tokens)
        if metadata.get("tokenizer.ggml.add_space_prefix") is False and "add_prefix_space" not in settings:
            settings["add_prefix_space"] = False
        if use_fast:
            return LlamaTokenizerFast(spm, **settings)
        return LlamaTokenizer(spm, **settings)
    if model != "gpt2":
        raise CheckpointError(f"tokenizer.ggml.model is {model!r}; supported are 'llama' and 'gpt2'")
    if not use_fast:
        raise TokenizerError("a byte-level BPE tokenizer has no SentencePiece form; use_fast=False is not possible")
    return LlamaTokenizerFast(tokenizer_object=_byte_level(metadata, tokens), **settings)


def _required(metadata: Mapping[str, Any], name: str) -> Any:
    value = metadata.get(f"tokenizer.ggml.{name}")
    if value is None and metadata.get("general.type") == "adapter":
        raise CheckpointError(
            "the GGUF file is an adapter (general.type), no model; give the model with -m and this file with --adapter"
        )
    if value is None:
        raise CheckpointError(f"the GGUF metadata has no tokenizer.ggml.{name}; the file holds no complete tokenizer")
    return value


def _settings(metadata: Mapping[str, Any], tokens: Sequence[str]) -> dict[str, Any]:
    """Constructor arguments: roles, flags, limits and template."""
    out: dict[str, Any] = {"chat_template": metadata.get("tokenizer.chat_template")}
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    for role, key in names.items():
        token_id = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if token_id is not None and not 0 <= int(token_id) < len(tokens):
            warnings.warn(
                f"tokenizer.ggml.{key}_token_id is {token_id}, outside the {len(tokens)} tokens; there is no "
                f"{role}_token",
                stacklevel=4,
            )
            token_id = None
        out[f"{role}_token"] = None if token_id is None else AddedToken(tokens[int(token_id)], special=True)
    spm = metadata.get("tokenizer.ggml.model") == "llama"
    out["add_bos_token"] = bool(metadata.get("tokenizer.ggml.add_bos_token", spm))
    out["add_eos_token"] = bool(metadata.get("tokenizer.ggml.add_eos_token", False))
    if out["unk_token"] is None and spm and "<unk>" in tokens[:8]:
        out["unk_token"] = AddedToken("<unk>", special=True)
    limit = metadata.get("llama.context_length")
    if limit is not None:
        out["model_max_length"] = int(limit)
    types = metadata.get("tokenizer.ggml.token_type") or ()
    marked = {
        i: AddedToken(tokens[i], special=kind == CONTROL, normalized=False)
        for i, kind in enumerate(types)
        if kind in (CONTROL, USER_DEFINED) and tokens[i]
    }
    out["added_tokens_decoder"] = marked
    return out


def _sentencepiece(metadata: Mapping[str, Any], tokens: Sequence[str]) -> SentencePieceModel:
    scores = _required(metadata, "scores")
    types = _required(metadata, "token_type")
    if not len(tokens) == len(scores) == len(types):
        raise CheckpointError(
            f"tokenizer.ggml has {len(tokens)} tokens, {len(scores)} scores and {len(types)} types; they must agree"
        )
    # user-defined tokens are matched as added tokens; inside the model they must not match a second time
    kinds = tuple(CONTROL if kind == USER_DEFINED else int(kind) for kind in types)
    return SentencePieceModel(tuple(tokens), tuple(float(score) for score in scores), kinds)


def _byte_level(metadata: Mapping[str, Any], tokens: Sequence[str]) -> tokenizers.Tokenizer:
    pre = metadata.get("tokenizer.ggml.pre", "default")
    name = _SAME.get(pre, pre)
    if name not in _CUTS:
        raise CheckpointError(
            f"tokenizer.ggml.pre is {pre!r}; known are {', '.join(sorted({*_CUTS, *_SAME}))}. "
            "Load the tokenizer.json of the original model instead"
        )
    halves = [merge.partition(" ") for merge in _required(metadata, "merges")]
    merges = [(left, right) for left, _, right in halves]
    wrong = next((i for i, (left, right) in enumerate(merges) if not left or not right), None)
    if wrong is not None:
        raise CheckpointError(
            f"tokenizer.ggml.merges holds {''.join(halves[wrong])!r}; a merge is two pieces with a space between"
        )
    vocabulary = {token: i for i, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        raise CheckpointError(f"tokenizer.ggml.tokens has {len(tokens) - len(vocabulary)} tokens twice")
    try:
        bpe = models.BPE(vocabulary, merges, ignore_merges=name in _MERGES_IGNORED)
    except Exception as error:  # the Rust side raises plain Exception
        raise CheckpointError(f"tokenizer.ggml.merges do not fit the tokens: {error}") from error
    backend = tokenizers.Tokenizer(bpe)
    backend.pre_tokenizer = _pre_tokenizer(name)
    backend.decoder = decoders.ByteLevel()
    return backend


def byte_level_name(document: Mapping[str, Any]) -> str | None:
    """The tokenizer.ggml.pre of a tokenizer.json that is byte-level BPE; None where GGUF has no name for its cuts."""
    model = document.get("model") or {}
    if model.get("type") != "BPE" or document.get("normalizer") is not None or model.get("byte_fallback"):
        return None
    for name in _CUTS:
        backend = tokenizers.Tokenizer(models.BPE())
        backend.pre_tokenizer = _pre_tokenizer(name)
        if _steps(json.loads(backend.to_str())["pre_tokenizer"]) == _steps(document.get("pre_tokenizer")):
            return name if bool(model.get("ignore_merges")) == (name in _MERGES_IGNORED) else None
    return None


def _steps(pre: Mapping[str, Any] | None) -> list[Any]:
    """The steps of a pre-tokenizer: one alone is a sequence of one."""
    if pre is None:
        return []
    return list(pre["pretokenizers"]) if pre.get("type") == "Sequence" else [pre]


def _pre_tokenizer(name: str) -> pre_tokenizers.PreTokenizer:
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=_CUTS[name][-1] is _GPT2)
    cuts = [cut for cut in _CUTS[name] if not (level.use_regex and cut is _GPT2)]
    splits = [
        pre_tokenizers.Digits(individual_digits=True)
        if cut == r"\p{N}"
        else pre_tokenizers.Split(Regex(cut), "isolated")
        for cut in cuts
    ]
    return pre_tokenizers.Sequence([*splits, level])
