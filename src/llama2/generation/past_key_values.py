"""The cache that a caller gives to generate(): checked, and made the runner's own."""

from typing import Any

from torch import Tensor

from llama2.cache import DynamicCache
from llama2.errors import InputError
from llama2.generation.config import GenerationConfig
from llama2.runners.native import NativeCache, NativeRunner, row_count
from llama2.runners.padded import PaddedRunner


def given_cache(cache: Any, config: GenerationConfig, rows: int, context: int) -> Any:
    """The caller's `past_key_values` as a cache, None for none.

    Raises InputError where it cannot be that of `rows` rows and a prompt of `context` columns.
    """
    if cache is None:
        return None
    if not config.value("use_cache"):
        raise InputError("past_key_values needs use_cache=True")
    if isinstance(cache, tuple | list):
        cache = DynamicCache.from_legacy_cache(cache)
    cached = cache.get_seq_length()
    if cached > context:
        raise InputError(
            f"past_key_values holds {cached} tokens but the prompt has {context}; give the whole sequence as "
            "input_ids, its cached beginning included"
        )
    if cached and rows % (batch := row_count(cache)):
        raise InputError(f"past_key_values holds {batch} rows but the prompt has {rows}; they must agree")
    return cache


def cache_to_run(
    past: Any, runner: PaddedRunner, config: GenerationConfig, rows: int, length: int, context: int, mask: Tensor | None
) -> Any:
    """Returns the cache for the runner, None for none: with room for `length` columns of `rows` rows, all but the last
    cached."""
    if not config.value("use_cache"):
        return None
    if past is None:
        kind = config.cache_implementation
        # The last token that is made never enters the cache; transformers' static caches have no room for it either.
        return runner.new_cache(kind, rows, length - 1 if kind == "static" else length)
    cache = past
    if isinstance(runner, NativeRunner):
        cache = runner.adopt(past, rows, length, mask)
    elif isinstance(past, NativeCache):
        cache = DynamicCache.over(past)
    cached = cache.get_seq_length()
    if cached == context:
        cache.crop(context - 1)  # the last token has to run again, for its logits
    if cached and rows > (batch := row_count(cache)):
        cache.batch_repeat_interleave(rows // batch)
    return cache
