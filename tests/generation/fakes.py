"""A network whose next token is written down, and a tokenizer of a dozen pieces."""

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from llama2.cache import DynamicCache
from llama2.generation.config import GenerationConfig


class TableModel:
    """Logits depend on the last id only: row `id` of a table (V, V). Counts its calls and the tokens it was fed."""

    def __init__(self, table: Tensor, **fields: Any) -> None:
        self.table, self.device, self.dtype = table, torch.device("cpu"), table.dtype
        self.config = SimpleNamespace(vocab_size=len(table), max_position_embeddings=64, rope_scaling=None)
        self.generation_config = GenerationConfig(**fields)
        self.calls: list[int] = []

    def __call__(self, input_ids: Tensor, past_key_values: Any = None, logits_to_keep: int = 1, **_: Any) -> Any:
        self.calls.append(input_ids.shape[1])
        cache = DynamicCache() if past_key_values is None else past_key_values
        state = input_ids[:, None, :, None].to(torch.float32)
        cache.update(state, state, 0)
        return SimpleNamespace(
            logits=self.table[input_ids[:, -logits_to_keep:]],
            past_key_values=cache,
            attentions=None,
            hidden_states=None,
        )


def chain(*path: int, size: int = 12, **fields: Any) -> TableModel:
    """A model that continues `path` wherever it is on it, and says 0 elsewhere."""
    table = torch.zeros(size, size)
    table[:, 0] = 1.0
    for here, there in pairwise(path):
        table[here, there] = 5.0
    return TableModel(table, **fields)


class Pieces:
    """Ids are places in a list of byte pieces; decoding drops one leading space, as SentencePiece does."""

    def __init__(self, *pieces: bytes) -> None:
        self.pieces = [b"abcdef", *pieces]

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        assert text == "abcdef" and not add_special_tokens
        return {"input_ids": [0]}

    def decode(self, token_ids: list[int], **_: Any) -> str:
        data = b"".join(self.pieces[i] for i in token_ids)
        return data.removeprefix(b" ").decode("utf-8", "replace")
