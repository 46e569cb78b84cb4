"""Interfaces of models and tokenizers that the library accepts; those of transformers and PEFT satisfy them."""

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Protocol, Self

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


class CausalLM(Protocol):
    """A model that is trained or generates: one of this library, of transformers, or PEFT's wrapper around one."""

    training: bool

    @property
    def config(self) -> Any:
        """Sizes and ids, as LlamaConfig has them."""

    @property
    def generation_config(self) -> Any:
        """How it generates where nothing else is said."""

    @property
    def device(self) -> "torch.device":
        """Where it computes."""

    @property
    def dtype(self) -> "torch.dtype":
        """The dtype of its computation."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Logits (B, T, V) and what else forward gives."""

    def parameters(self, recurse: bool = True) -> "Iterator[nn.Parameter]":
        """As nn.Module."""

    def named_parameters(self, *args: Any, **kwargs: Any) -> "Iterator[tuple[str, nn.Parameter]]":
        """As nn.Module."""

    def modules(self) -> "Iterator[nn.Module]":
        """As nn.Module."""

    def named_modules(self, *args: Any, **kwargs: Any) -> "Iterator[tuple[str, nn.Module]]":
        """As nn.Module."""

    def state_dict(self, *args: Any, **kwargs: Any) -> "dict[str, Tensor]":
        """As nn.Module."""

    def train(self, mode: bool = True) -> Self:
        """As nn.Module."""

    def eval(self) -> Self:
        """As nn.Module."""

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        """Writes config.json and weights to a folder."""

    def get_input_embeddings(self) -> Any:
        """The token embedding."""

    def get_output_embeddings(self) -> Any:
        """The head; None where there is none."""


class TokenizerLike(Protocol):
    """A tokenizer of this library, or one of transformers."""

    padding_side: str
    chat_template: Any
    bos_token: Any
    eos_token: Any
    pad_token: Any
    unk_token: Any

    @property
    def bos_token_id(self) -> int | None:
        """The id of the token in front of a text."""

    @property
    def eos_token_id(self) -> int | None:
        """The id of the token behind a text."""

    @property
    def pad_token_id(self) -> int | None:
        """The id that fills rows up."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Texts as columns of ids."""

    @property
    def added_tokens_decoder(self) -> Mapping[int, Any]:
        """The tokens that are no part of the vocabulary's own, by id."""

    def __len__(self) -> int:
        """The number of ids, added tokens included."""

    def add_special_tokens(self, *args: Any, **kwargs: Any) -> Any:
        """Gives tokens a role; how many are new."""

    def encode(self, *args: Any, **kwargs: Any) -> Any:
        """The ids of a text."""

    def decode(self, *args: Any, **kwargs: Any) -> Any:
        """The text of ids."""

    def get_chat_template(self, *args: Any, **kwargs: Any) -> str:
        """The Jinja text that renders conversations."""

    def apply_chat_template(self, *args: Any, **kwargs: Any) -> Any:
        """A conversation as a prompt."""

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        """Writes the tokenizer's files to a folder."""


class TextDecoder(Protocol):
    """Ids to text, piece by piece; the pieces joined are the whole text."""

    def put(self, ids: "int | Iterable[int]") -> str:
        """Takes ids in and returns the text that is certain."""

    def finish(self) -> str:
        """Returns the text held back."""


class TextTokenizer(TokenizerLike, Protocol):
    """A tokenizer of this library: it decodes token by token too."""

    def stream_decoder(self, *, skip_special_tokens: bool = False) -> TextDecoder:
        """A decoder of one text."""
