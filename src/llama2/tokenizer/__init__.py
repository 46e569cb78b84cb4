"""Text <-> tokens, without torch.

    tokenizer = llama2.tokenizer.load("path/to/folder")     # or tokenizer.model, or tokenizer.json
    ids = tokenizer.encode("Hello world")                    # [1, 15043, 3186]

Both classes keep the contract of `PreTrainedTokenizer` and give the same ids: `LlamaTokenizer` through sentencepiece,
`LlamaTokenizerFast` through the `tokenizers` package.
"""

from pathlib import Path
from typing import Any

from llama2.tokenizer.added import AddedToken
from llama2.tokenizer.base import PreTrainedTokenizer
from llama2.tokenizer.chat import LLAMA2_CHAT_TEMPLATE, ChatPrompt
from llama2.tokenizer.encoding import BatchEncoding, CharSpan, Encoding, TokenSpan
from llama2.tokenizer.fast import LlamaTokenizerFast, PreTrainedTokenizerFast
from llama2.tokenizer.gguf import from_gguf
from llama2.tokenizer.infilling import CodeLlamaTokenizer, CodeLlamaTokenizerFast
from llama2.tokenizer.slow import LlamaTokenizer
from llama2.tokenizer.stream import StreamDecoder

__all__ = [
    "LLAMA2_CHAT_TEMPLATE",
    "AddedToken",
    "BatchEncoding",
    "CharSpan",
    "ChatPrompt",
    "CodeLlamaTokenizer",
    "CodeLlamaTokenizerFast",
    "Encoding",
    "LlamaTokenizer",
    "LlamaTokenizerFast",
    "PreTrainedTokenizer",
    "PreTrainedTokenizerFast",
    "StreamDecoder",
    "TokenSpan",
    "from_gguf",
    "load",
]


def load(path: str | Path, use_fast: bool = True, **kwargs: Any) -> LlamaTokenizer | LlamaTokenizerFast:
    """The tokenizer of a folder, a tokenizer.model, a tokenizer.json or a hub id; keywords as for from_pretrained."""
    kind = LlamaTokenizerFast if use_fast else LlamaTokenizer
    given: dict[str, Any] = {**kwargs, "_from_auto": True}
    return kind.from_pretrained(path, **given)
