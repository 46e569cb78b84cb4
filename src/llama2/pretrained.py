"""The interface of every model class besides forward: the shared surface of `transformers.PreTrainedModel`.

Loading, saving and generating live higher up: see `model_methods`.
"""

import copy
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar, Protocol, Self

import torch
from torch import Tensor, nn

from llama2.attention import check_available
from llama2.companions import Companions
from llama2.config import LlamaConfig
from llama2.errors import InputError, Llama2Error
from llama2.generation.config import GenerationConfig
from llama2.model_methods import ModelMethods


class PadTokenizer(Protocol):
    """The part of a tokenizer that `add_pad_token` uses."""

    pad_token: Any

    @property
    def pad_token_id(self) -> int | None: ...

    def add_special_tokens(self, special_tokens_dict: dict[str, Any]) -> int: ...

    def __len__(self) -> int: ...


class PreTrainedModel(ModelMethods, Companions, nn.Module):
    """Base of the model classes: configuration, embeddings, precision, checkpointing, loading, saving, generation."""

    config_class: ClassVar[type[LlamaConfig]] = LlamaConfig
    base_model_prefix: ClassVar[str] = "model"
    main_input_name: ClassVar[str] = "input_ids"

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        config = LlamaConfig.of(config)
        config.validate()
        config._attn_implementation = config._attn_implementation or "sdpa"
        check_available(config._attn_implementation)
        self.config = config
        self.name_or_path = config.name_or_path
        self.warnings_issued = {}
        self.gradient_checkpointing = False
        self.gradient_checkpointing_kwargs: dict[str, Any] = {"use_reentrant": False}
        self.gradient_checkpointing_offload = False
        self.generation_config = GenerationConfig.from_model_config(config)

    @classmethod
    def from_config(
        cls,
        config: LlamaConfig,
        dtype: torch.dtype | None = None,
        *,
        attn_implementation: str | Mapping[str, str] | None = None,
    ) -> Self:
        """A model with fresh weights, in `dtype` or torch's default, and a configuration of its own."""
        config = copy.deepcopy(LlamaConfig.of(config))
        config._attn_implementation = attn_implementation or config._attn_implementation
        model = cls(config)
        return model if dtype is None else model.to(dtype)

    _from_config = from_config  # under which TRL and others call it

    # -- where and what it is ------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Device of the first parameter; of parameters that accelerate has offloaded, where it brings them to run."""
        first = next(self.parameters()).device
        return first if first.type != "meta" else _execution_device(self) or first

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the first floating-point parameter; of a packed embedding, what it unpacks to."""
        like = getattr(getattr(self.base_model, "embed_tokens", None), "like", None)
        if isinstance(like, Tensor):
            return like.dtype
        return next((p.dtype for p in self.parameters() if p.is_floating_point()), torch.get_default_dtype())

    @property
    def base_model(self) -> nn.Module:
        """The LlamaModel inside, or the model itself."""
        inner: nn.Module = getattr(self, self.base_model_prefix, self)
        return inner

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Number of parameters; shared ones count once, and packed weights by their values."""
        embedding = self.get_input_embeddings()
        skip = {id(embedding.weight), id(embedding)} if exclude_embeddings else set()
        packed = [m for m in self.modules() if id(m) not in skip] if not only_trainable else []
        own = [p for p in self.parameters() if id(p) not in skip and (p.requires_grad or not only_trainable)]
        return sum(p.numel() for p in own) + sum(getattr(m, "packed_count", 0) for m in packed)

    def get_memory_footprint(self, return_buffers: bool = True) -> int:
        """Bytes of parameters, and of buffers unless told otherwise."""
        buffers = self.buffers() if return_buffers else ()
        return sum(x.numel() * x.element_size() for x in (*self.parameters(), *buffers))

    # -- weights -------------------------------------------------------------------------------------------------

    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        if isinstance(module, nn.Linear | nn.Embedding):
            module.weight.data.normal_(mean=0.0, std=std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                module.bias.data.zero_()
            if isinstance(module, nn.Embedding) and module.padding_idx is not None:
                module.weight.data[module.padding_idx].zero_()

    def init_weights(self) -> None:
        """Draws fresh weights: N(0, initializer_range), biases 0, the padding row 0, norms 1."""
        if next(self.parameters()).device.type == "meta":
            return
        self.apply(self._init_weights)
        self.tie_weights()

    def post_init(self) -> None:
        """The last line of a subclass's constructor for transformers: draws the weights of what it has added."""
        self.init_weights()

    def get_input_embeddings(self) -> nn.Embedding:
        """The token embedding."""
        embedding: nn.Embedding = self.base_model.embed_tokens  # type: ignore[assignment]
        return embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replaces the token embedding."""
        self.base_model.embed_tokens = value

    def get_output_embeddings(self) -> nn.Linear | None:
        """The language-model head, or None."""
        return None

    def tie_weights(self) -> None:
        """Makes head and embedding one parameter where the configuration says so; packed ones are one already."""
        head, weight = self.get_output_embeddings(), self.get_input_embeddings().weight
        if self.config.tie_word_embeddings and head is not None and isinstance(weight, nn.Parameter):
            head.weight = weight

    # -- vocabulary ----------------------------------------------------------------------------------------------

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Embedding:
        """Grows or shrinks the vocabulary of embedding and head; old rows are kept bit for bit.

        New rows are the mean of the old ones, or N(0, initializer_range) with mean_resizing=False.
        """
        embedding = self.get_input_embeddings()
        size = self._resized(new_num_tokens, pad_to_multiple_of)
        if size is None or size == embedding.num_embeddings:
            return embedding
        tied = self.config.tie_word_embeddings
        weight = self._resized_rows(embedding.weight, size, mean_resizing)
        embedding.weight, embedding.num_embeddings = weight, size
        if embedding.padding_idx is not None and embedding.padding_idx >= size:
            embedding.padding_idx = None
        head = self.get_output_embeddings()
        if head is not None:
            if not tied:
                head.weight = self._resized_rows(head.weight, size, mean_resizing)
            head.out_features = size
        self.config.vocab_size = size
        for module in (self, self.base_model):
            module.vocab_size = size  # type: ignore[assignment]
        self.tie_weights()
        self._keep_for_adapters()
        return embedding

    def _keep_for_adapters(self) -> None:
        """Notes that embedding and head are not the checkpoint's: an adapter that is saved brings them (as peft's)."""
        held = self.__dict__.setdefault("_adapter_parameters", {})
        inner = "" if self.base_model is self else f"{self.base_model_prefix}."
        held[f"{inner}embed_tokens.weight"] = "model.embed_tokens.weight"
        if self.get_output_embeddings() is not None and not self.config.tie_word_embeddings:
            held["lm_head.weight"] = "lm_head.weight"

    def _resized(self, new_num_tokens: int | None, multiple: int | None) -> int | None:
        if new_num_tokens is None and multiple is None:
            return None
        size = self.get_input_embeddings().num_embeddings if new_num_tokens is None else new_num_tokens
        if multiple is not None:
            if not isinstance(multiple, int) or multiple < 1:
                raise InputError(f"pad_to_multiple_of is {multiple!r}; it must be a positive integer")
            size = -(-size // multiple) * multiple
        if size < 1:
            raise InputError(f"the vocabulary cannot have {size} tokens; give at least 1")
        return size

    def _resized_rows(self, old: Tensor, size: int, mean: bool) -> nn.Parameter:
        rows = old.new_empty((size, old.shape[1]))
        kept = min(size, old.shape[0])
        with torch.no_grad():
            rows[:kept] = old[:kept]
            if size > kept and mean:
                rows[kept:] = old.to(torch.float32).mean(0).to(old.dtype)
            elif size > kept:
                rows[kept:].normal_(0.0, self.config.initializer_range)
        return nn.Parameter(rows, requires_grad=old.requires_grad)

    def add_pad_token(self, tokenizer: PadTokenizer, pad_token: str = "<pad>") -> int:
        """The whole documented pad-token recipe in one call; returns the pad id.

        Adds the token if the tokenizer has none, grows the embeddings, zeroes the pad row, keeps it out of training
        (padding_idx) and sets the id in the tokenizer, `config` and `generation_config`.
        """
        if tokenizer.pad_token_id is None:
            tokenizer.add_special_tokens({"pad_token": pad_token})
        pad = tokenizer.pad_token_id
        assert pad is not None
        if pad >= self.get_input_embeddings().num_embeddings:
            self.resize_token_embeddings(max(len(tokenizer), pad + 1))
        eos = self.config.eos_token_id
        if pad in (eos if isinstance(eos, list) else [eos]):
            warnings.warn(
                f"the pad token is the end token (id {pad}); its row is left as it is, because the model needs it",
                stacklevel=2,
            )
        else:
            embedding = self.get_input_embeddings()
            embedding.padding_idx = pad
            with torch.no_grad():
                embedding.weight[pad].zero_()
        self.config.pad_token_id = pad
        self.generation_config.update(pad_token_id=pad)
        return pad

    # -- training and attention switches -------------------------------------------------------------------------

    def gradient_checkpointing_enable(
        self,
        gradient_checkpointing_kwargs: dict[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """Recomputes layers in the backward pass instead of keeping their activations.

        Every `every_n_layers`-th one, from the first on; the others keep theirs. `offload` keeps what the recomputation
        starts from in the memory of the host. The keywords are those of torch.utils.checkpoint.checkpoint.
        """
        if isinstance(every_n_layers, bool) or not isinstance(every_n_layers, int) or every_n_layers < 1:
            raise InputError(f"every_n_layers is {every_n_layers!r}; it must be an integer of at least 1")
        self._set_checkpointing(True, {"use_reentrant": False} | (gradient_checkpointing_kwargs or {}), offload)
        layer: Any
        for place, layer in enumerate(self.base_model.layers):  # type: ignore[arg-type]
            layer.gradient_checkpointing = place % every_n_layers == 0

    def activation_checkpointing_enable(
        self,
        activation_checkpointing_kwargs: dict[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """`gradient_checkpointing_enable` under its name in transformers 5.23."""
        self.gradient_checkpointing_enable(activation_checkpointing_kwargs, every_n_layers, offload)

    def gradient_checkpointing_disable(self) -> None:
        """Keeps activations again."""
        self._set_checkpointing(False, self.gradient_checkpointing_kwargs, False)
        layer: Any
        for layer in self.base_model.layers:  # type: ignore[union-attr]
            layer.gradient_checkpointing = False

    def activation_checkpointing_disable(self) -> None:
        """`gradient_checkpointing_disable` under its name in transformers 5.23."""
        self.gradient_checkpointing_disable()

    def _set_checkpointing(self, on: bool, kwargs: dict[str, Any], offload: bool) -> None:
        module: Any
        for module in (self, self.base_model):
            module.gradient_checkpointing, module.gradient_checkpointing_kwargs = on, kwargs
            module.gradient_checkpointing_offload = offload

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether layers are recomputed in the backward pass."""
        return bool(self.base_model.gradient_checkpointing)

    def enable_input_require_grads(self) -> None:
        """Makes the embedding output require gradients, so that checkpointed layers train with a frozen embedding."""
        self._input_grad_hook = self.get_input_embeddings().register_forward_hook(require_grad)

    def disable_input_require_grads(self) -> None:
        """Undoes enable_input_require_grads."""
        self._input_grad_hook.remove()

    @property
    def attn_implementation(self) -> str:
        """How attention is computed: that of the configuration, which the model and the one inside it share."""
        return self.config._attn_implementation or "sdpa"

    def set_attn_implementation(self, attn_implementation: str | Mapping[str, str]) -> None:
        """Switches to "eager", "sdpa" or "flash_attention_2"; a dict of parts holds it under ""."""
        before = self.config._attn_implementation
        self.config._attn_implementation = attn_implementation
        try:
            check_available(self.attn_implementation)
        except Llama2Error:
            self.config._attn_implementation = before
            raise


def _execution_device(model: nn.Module) -> torch.device | None:
    """Where the first of accelerate's hooks puts a module's parameters for its forward."""
    for module in model.modules():
        hook = vars(module).get("_hf_hook")
        for one in getattr(hook, "hooks", (hook,)):  # a SequentialHook has several
            device = getattr(one, "execution_device", None)
            if device is not None:
                return torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    return None


def require_grad(module: nn.Module, inputs: Any, output: Tensor) -> None:
    """The forward hook of `enable_input_require_grads`; it changes no value."""
    output.requires_grad_(True)


@contextmanager
def readable_index_errors(input_ids: Tensor, vocab_size: int) -> Iterator[None]:
    """Turns torch's "index out of range in self" into an error that names the id and the bound (CPU)."""
    try:
        yield
    except IndexError as error:
        worst = int(input_ids.max()) if int(input_ids.max()) >= vocab_size else int(input_ids.min())
        raise InputError(
            f"input_ids contains {worst} but ids run from 0 to {vocab_size - 1}; after adding tokens call "
            "model.resize_token_embeddings(len(tokenizer)), and give labels, not inputs, the value -100"
        ) from error


LlamaPreTrainedModel = PreTrainedModel  # its name in type hints of scripts for transformers
