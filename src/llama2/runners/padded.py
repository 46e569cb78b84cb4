"""How generate() talks to a network: feed new tokens of some rows over a cache, get logits back.

The native engine packs the rows for the contract of all runners (`contract.Runner`); a module of torch takes them as
they are, padding included, over the caller's cache or its own.

B rows, T new tokens, S cached and new positions, V vocabulary.
"""

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from llama2 import cpu
from llama2.cache import DynamicCache, StaticCache
from llama2.companions import prepares_by_itself
from llama2.errors import InputError
from llama2.model import LlamaForCausalLM
from llama2.plain_network import difference
from llama2.runners.cuda_graphs import graphs_of
from llama2.runners.native import NativeModel, native_runner, why_not
from llama2.runners.prepared import PreparedRunner

RUNNERS = ("auto", "native", "torch", "plain")  # "plain": torch without CUDA graphs


class PaddedRunner(Protocol):
    """Runs the network. An implementation other than torch fits behind this without a change above it."""

    def new_cache(self, kind: str | None, rows: int, length: int) -> Any:
        """An empty cache ("dynamic" or None, "static", "quantized") for `rows` rows and at most `length` positions."""

    def step(self, tokens: Tensor, positions: Tensor, mask_BS: Tensor | None, cache: Any, keep: int = 1) -> Tensor:
        """Logits (B, keep, V) of the last `keep` new tokens, in a tensor that later calls leave alone.

        tokens: ids (B, T), or embeddings (B, T, D). positions (B | 1, T) start at 0. mask_BS: True = a real token,
        None where all are. cache: from `new_cache`, grown by this call; None runs without.
        """


class TorchRunner:
    """The torch module itself, on whatever device it is; single tokens as CUDA graphs where that works.

    graphs=False always calls the module.
    """

    def __init__(self, model: Any, attentions: bool = False, hidden_states: bool = False, graphs: bool = True) -> None:
        self.model = model
        self._graphs = graphs_of(model) if graphs and not (attentions or hidden_states) else None
        self._looked, self._usable, self._length = False, False, 0
        self._extra = {
            name: True
            for name, requested in (("output_attentions", attentions), ("output_hidden_states", hidden_states))
            if requested
        }
        self._prepacked = not isinstance(model, LlamaForCausalLM)
        self.attentions: tuple[Tensor, ...] | None = None  # of the last step
        self.hidden_states: tuple[Tensor, ...] | None = None

    def new_cache(self, kind: str | None, rows: int, length: int) -> Any:
        """As PaddedRunner.new_cache."""
        if kind == "quantized":
            raise InputError(
                "cache_implementation='quantized' keeps int8 keys and values in the native engine, and torch runs this "
                "model; leave it out"
            )
        if kind == "static":
            return StaticCache(
                self.model.config,
                batch_size=rows,
                max_cache_len=length,
                device=self.model.device,
                dtype=self.model.dtype,
            )
        cache, self._length = DynamicCache(), length
        if self._may_replay() and self._graphs is not None:
            self._graphs.receive(cache, self.model.device, rows, length)
        return cache

    def _may_replay(self) -> bool:
        """Whether graphs can do this model's steps, looked up once for each prompt."""
        if not self._looked:
            self._looked = True
            self._usable = self._graphs is not None and self._graphs.current(self.model)
        return self._usable

    def _replayed(self, tokens: Tensor, positions: Tensor, mask_BS: Tensor | None, cache: Any) -> Tensor | None:
        if self._graphs is None or type(cache) is not DynamicCache or torch.is_grad_enabled():
            return None
        if tokens.shape[1] > 1 or tokens.is_floating_point():
            if cache.get_seq_length():
                self._looked = False  # another prompt of a conversation: its model may have changed
            return None
        if not self._may_replay():
            return None
        return self._graphs.step(self.model, tokens, positions, mask_BS, cache, self._length)

    def step(self, tokens: Tensor, positions: Tensor, mask_BS: Tensor | None, cache: Any, keep: int = 1) -> Tensor:
        """As PaddedRunner.step."""
        replayed = self._replayed(tokens, positions, mask_BS, cache)
        if replayed is not None:
            return replayed
        if tokens.shape[1] == 1 and not self._prepacked:
            self._prepacked = True
            if not difference(self.model):
                self.model.prepack()  # from the first single token on it pays; before, it would delay the first token
        if mask_BS is None and cache is None:
            mask_BS = torch.ones_like(tokens[..., 0] if tokens.dim() == 3 else tokens, dtype=torch.bool)  # one document
        output = self.model(
            **{"inputs_embeds" if tokens.is_floating_point() else "input_ids": tokens},
            attention_mask=mask_BS,
            position_ids=positions,
            past_key_values=cache,
            use_cache=cache is not None,
            logits_to_keep=keep,
            return_dict=True,
            **self._extra,
        )
        self.attentions, self.hidden_states = output.attentions, output.hidden_states
        logits: Tensor = output.logits
        return logits


def make_runner(
    runner: str | PaddedRunner,
    model: Any,
    attentions: bool = False,
    hidden_states: bool = False,
    needs_torch: str = "",
    cache_dtype: cpu.KvDtype | None = None,
    extra: Mapping[str, Any] | None = None,
    precision: str = "fast",
) -> PaddedRunner:
    """The runner called `runner`, or the object itself.

    "auto" takes the native engine where it can run `model`, else torch; "plain" is torch without CUDA graphs.
    `needs_torch` names what of this call only torch can do. cache_dtype is what the native engine keeps keys and values
    in, None its own choice. extra: arguments that only the forward of another library's class knows. precision: "fast"
    lets the native engine round activations (`cpu.CpuRunner`), "exact" keeps them float32; torch rounds to the model's
    dtype alone. Raises InputError where "native" or a cache_dtype is asked for and cannot be had.
    """
    cpu.check_precision(precision)
    if attentions or hidden_states:
        needs_torch = "output_attentions and output_hidden_states"
    if not isinstance(runner, str):
        if precision != "fast":
            raise InputError(f"precision={precision!r} beside a runner that is made already; make that one with it")
        if attentions or hidden_states:
            raise InputError(f"{needs_torch} need runner='torch', which alone has them")
        return runner
    if runner not in RUNNERS:
        raise InputError(f"runner is {runner!r}; it must be one of {', '.join(RUNNERS)}")
    prepared = prepares_by_itself(model) or bool(extra)
    if prepared:
        needs_torch = needs_torch or "a replaced prepare_inputs_for_generation"
    only_native = runner == "native" or isinstance(model, NativeModel)
    native = None if runner in ("torch", "plain") or needs_torch else native_runner(model, cache_dtype, precision)
    if native is not None:
        return native
    if only_native:
        raise InputError(
            f"the native engine cannot run this call: {needs_torch or why_not(model)}; load the model with "
            "AutoModelForCausalLM and use runner='torch'"
        )
    if cache_dtype is not None:
        reason = needs_torch or why_not(model) or f"runner={runner!r} was asked for"
        raise InputError(
            f"a cache of {cache_dtype} is the native engine's, and torch runs this model ({reason}); leave it out"
        )
    if prepared:
        return PreparedRunner(model, attentions, hidden_states, extra)
    return TorchRunner(model, attentions, hidden_states, graphs=runner != "plain")
