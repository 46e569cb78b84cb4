"""How much of the memory the cache may take, which lengths that allows, and one table that says so at the start."""

from dataclasses import dataclass
from typing import Any

from llama2.cpu import CpuModel
from llama2.engine.draft import Drafter
from llama2.engine.engine import Engine
from llama2.engine.plan_runners import PAGE, make_plan_runner
from llama2.errors import InputError
from llama2.memory import available_bytes
from llama2.serve.request import Bounds

CACHE_SHARE = 0.4  # of the memory that is free once the weights are there
GIB = 2**30


@dataclass(frozen=True)
class Wanted:
    """Limits that the operator requests; None lets the model and the memory decide."""

    max_input_tokens: int | None = None
    max_total_tokens: int | None = None
    max_batch_total_tokens: int | None = None
    max_batch_prefill_tokens: int = 512
    max_batch_size: int = 64
    max_best_of: int = 8
    max_stop_sequences: int = 16
    max_top_n_tokens: int = 20
    max_client_batch_size: int = 32


def available(model: Any) -> int:
    """Bytes that can still be taken where a model is."""
    device = None if isinstance(model, CpuModel) else model.device
    if device is not None and device.type == "cuda":
        import torch

        return int(torch.cuda.mem_get_info(device)[0])
    return available_bytes()


def bytes_per_token(model: Any, runner: str, kv_cache: Any, draft: Any = None) -> int:
    """Bytes of keys and values per position in the caches that the engine will allocate, in all processes."""
    own = make_plan_runner(model, 1, runner, kv_cache).bytes_per_page * getattr(model, "neighbours", 1)
    return (own + (0 if draft is None else Drafter(model, draft, 1, 1, runner, kv_cache).runner.bytes_per_page)) // PAGE


def cache_tokens(model: Any, wanted: Wanted, bytes_per_token: int, most_bytes: int | None = None) -> tuple[int, str]:
    """Positions of the cache and where the number comes from. Raises InputError where not even one text fits.

    most_bytes: of the cache; None for a share of what is free.
    """
    context = wanted.max_total_tokens or model.config.max_position_embeddings
    if wanted.max_batch_total_tokens is not None:
        return wanted.max_batch_total_tokens, "max_batch_total_tokens"
    most = wanted.max_batch_size * context
    if most_bytes is not None:
        fits = min(most_bytes // bytes_per_token // PAGE * PAGE, most)
        if fits < min(context, 2048):
            raise InputError(
                f"the cache of one of several models may have {most_bytes / GIB:.2f} GiB, which hold {fits} tokens; "
                "give --max-total-tokens or --max-batch-total-tokens, a smaller --max-models, or --kv-cache int8"
            )
        return fits, f"its part of {most_bytes / GIB:.2f} GiB"
    free = available(model)
    fits = int(free * CACHE_SHARE) // bytes_per_token
    if fits < min(context, 2048):
        raise InputError(
            f"{free / GIB:.1f} GiB of memory are free, and {CACHE_SHARE:.0%} of them hold {fits} tokens of the cache; "
            "give --max-total-tokens or --max-batch-total-tokens, or --kv-cache int8"
        )
    if most <= fits:
        return most, f"{wanted.max_batch_size} texts of {context} tokens"
    return fits // PAGE * PAGE, f"{CACHE_SHARE:.0%} of {free / GIB:.1f} GiB free"


def bounds(engine: Engine, limits: Wanted) -> Bounds:
    """Returns the bounds of a request. Raises InputError for bounds that contradict each other or the model."""
    context, held = engine.limit, engine.scheduler.capacity() + 1
    total = limits.max_total_tokens or min(context, held)
    if total > context:
        raise InputError(f"max_total_tokens is {total}, but the model's context is {context}; lower it")
    if total > held:
        raise InputError(f"max_total_tokens is {total}, but the cache holds {held - 1}; lower it or enlarge the cache")
    longest = limits.max_input_tokens or total - 1
    if not 0 < longest < total:
        raise InputError(
            f"max_input_tokens is {longest}; it must be between 1 and {total - 1}, max_total_tokens less 1"
        )
    return Bounds(
        max_input_tokens=longest,
        max_total_tokens=total,
        max_best_of=limits.max_best_of,
        max_stop_sequences=limits.max_stop_sequences,
        max_top_n_tokens=limits.max_top_n_tokens,
        max_client_batch_size=limits.max_client_batch_size,
    )


def table(engine: Engine, limits: Bounds, source: str) -> str:
    """Formats the server's capacity, for people."""
    runner, weights, drafter = engine.runner, engine.runner.weights, engine.drafter
    size = weights.nbytes if weights is not None else sum(p.nbytes for p in engine.model.parameters())
    page = runner.bytes_per_page + (drafter.runner.bytes_per_page if drafter else 0)
    each, held = page / PAGE, engine.scheduler.capacity()
    rows = [
        (
            "weights",
            f"{size / GIB:.2f} GiB",
            "native engine" if weights is not None else f"torch, {engine.model.device}",
        ),
        ("cache, a token", f"{each / 1024:.1f} KiB", "keys and values of all layers"),
        *([("guesses in a step", str(drafter.count), "at most, of the draft model")] if drafter else []),
        ("cache, all", f"{runner.pages * page / GIB:.2f} GiB", f"{held} tokens: {source}"),
        ("full-length texts at once", f"{held / limits.max_total_tokens:.1f}", f"of {limits.max_total_tokens} tokens"),
        ("texts in a step", str(engine.scheduler.width), "max_batch_size; others wait"),
        ("tokens in a step", str(engine.scheduler.budget), "max_batch_prefill_tokens; longer prompts run in parts"),
        ("max_total_tokens", str(limits.max_total_tokens), f"prompt and answer; the context is {engine.limit}"),
        ("max_input_tokens", str(limits.max_input_tokens), "prompt"),
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(2)]
    return "\n".join(f"  {name:<{widths[0]}}  {value:>{widths[1]}}  {note}" for name, value, note in rows)
