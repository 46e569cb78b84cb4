"""GPTQ while a model is loaded: from_pretrained(path, quantization_config=GPTQConfig(dataset=..., tokenizer=...))."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llama2.auto import AutoTokenizer, load_config
from llama2.errors import InputError
from llama2.quantization_config import GPTQConfig
from llama2.quantize.calibration import encode
from llama2.quantize.job import quantize
from llama2.train.readers import read

_LENGTH = 512  # tokens of a window, where the texts have as many
_WIKITEXT = ("Salesforce/wikitext", "train", "wikitext-2-raw-v1")


def quantized(source: str | Path, config: GPTQConfig, target: Path) -> None:
    """Quantises `source` to the folder `target` as `config` says.

    Its dataset is a list of texts, a file, or "wikitext2" of the hub; its tokenizer one, or where it is. Raises
    InputError for another data set, and as `quantize`.
    """
    tokenizer = config.tokenizer
    if isinstance(tokenizer, str | Path):
        tokenizer = AutoTokenizer.from_pretrained(tokenizer)
    texts = _texts(config.dataset)
    tokens = sum(len(encode(text, tokenizer)) for text in texts)
    length = max(2, min(_LENGTH, load_config(source).max_position_embeddings, tokens - tokens // 8))
    quantize(
        source,
        target,
        "gptq",
        data=texts,
        tokenizer=tokenizer,
        bits=config.bits,
        group_size=config.group_size,
        act_order=config.desc_act,
        static_groups=config.static_groups,
        sym=config.sym,
        damp=config.damp_percent,
        format=config.format,
        true_sequential=config.true_sequential,
        length=length,
        eval_tokens=0,
    )


def _texts(dataset: Any) -> list[Any]:
    if isinstance(dataset, str | Path) and Path(dataset).exists():
        return [row["text"] for row in read(dataset) if row.get("text")]
    if dataset == "wikitext2":
        return [row["text"] for row in read(*_WIKITEXT) if row["text"].strip()]
    if isinstance(dataset, str) or not isinstance(dataset, Sequence) or not dataset:
        raise InputError(f"the dataset of GPTQConfig is {dataset!r}; give a list of texts, a file, or 'wikitext2'")
    return list(dataset)
