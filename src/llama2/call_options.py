"""The keywords of the widest calls as types: what `generate`, `GenerationConfig` and each `from_pretrained` take.

A TypedDict here is the `**options: Unpack[...]` of such a call, so that mypy, pyright and editors know every name and
type. `showing` puts the same names, with their defaults, into `inspect.signature` and `help`. Standard library only.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, TypedDict, TypeVar


class AsStored:
    """Stands in a signature for a default that the files of the model or of the tokenizer give."""

    def __repr__(self) -> str:
        return "<as stored>"


STORED = AsStored()


class TokenText(Protocol):
    """A token with flags, such as AddedToken."""

    @property
    def content(self) -> str: ...


Token = str | TokenText | Mapping[str, Any]


class HubSettings(TypedDict, total=False):
    """Which revision of a hub repository, from where and as whom; none matters for a local path."""

    revision: str | None
    cache_dir: str | Path | None
    token: str | bool | None
    local_files_only: bool
    force_download: bool
    subfolder: str


class ConfigFields(TypedDict, total=False):
    """The fields of LlamaConfig, which from_pretrained takes as keywords and which then win over the file's."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int | None
    hidden_act: str
    max_position_embeddings: int
    initializer_range: float
    rms_norm_eps: float
    use_cache: bool
    pad_token_id: int | None
    bos_token_id: int | None
    eos_token_id: int | list[int] | None
    pretraining_tp: int
    tie_word_embeddings: bool
    rope_theta: float | None
    rope_scaling: Mapping[str, Any] | None
    attention_bias: bool
    attention_dropout: float
    mlp_bias: bool
    head_dim: int | None
    rope_parameters: Mapping[str, Any] | None
    architectures: list[str] | None
    return_dict: bool
    output_hidden_states: bool
    output_attentions: bool
    problem_type: str | None
    num_labels: int
    id2label: Mapping[int, str]
    label2id: Mapping[str, int]


class ConfigOptions(HubSettings, ConfigFields, total=False):
    """Keyword arguments of a configuration's from_pretrained."""


class GenerationSettings(TypedDict, total=False):
    """The fields of GenerationConfig; None means not given, or switched off where the field can be."""

    # length, in tokens
    max_length: int | None
    max_new_tokens: int | None
    min_length: int | None
    min_new_tokens: int | None
    early_stopping: bool | Literal["never"] | None
    max_time: float | None
    stop_strings: str | Sequence[str] | None
    # strategy
    do_sample: bool | None
    num_beams: int | None
    num_beam_groups: int | None
    penalty_alpha: float | None
    dola_layers: str | Sequence[int] | None
    use_cache: bool | None
    cache_implementation: str | None
    cache_config: Mapping[str, Any] | None
    prefill_chunk_size: int | None
    # logits
    temperature: float | None
    top_k: int | None
    top_p: float | None
    top_h: float | None
    min_p: float | None
    typical_p: float | None
    epsilon_cutoff: float | None
    eta_cutoff: float | None
    diversity_penalty: float | None
    repetition_penalty: float | None
    encoder_repetition_penalty: float | None
    length_penalty: float | None
    no_repeat_ngram_size: int | None
    encoder_no_repeat_ngram_size: int | None
    bad_words_ids: Sequence[Sequence[int]] | None
    force_words_ids: Sequence[Any] | None
    constraints: Sequence[Any] | None
    renormalize_logits: bool | None
    forced_bos_token_id: int | None
    forced_eos_token_id: int | Sequence[int] | None
    remove_invalid_values: bool | None
    exponential_decay_length_penalty: tuple[int, float] | Sequence[float] | None
    suppress_tokens: Sequence[int] | None
    begin_suppress_tokens: Sequence[int] | None
    sequence_bias: Mapping[tuple[int, ...], float] | Sequence[Sequence[Any]] | None
    token_healing: bool | None
    guidance_scale: float | None
    watermarking_config: Mapping[str, Any] | None
    # outputs
    num_return_sequences: int | None
    output_attentions: bool | None
    output_hidden_states: bool | None
    output_scores: bool | None
    output_logits: bool | None
    return_dict_in_generate: bool | None
    # ids
    pad_token_id: int | None
    bos_token_id: int | None
    eos_token_id: int | Sequence[int] | None
    # assisted decoding
    num_assistant_tokens: int | None
    num_assistant_tokens_schedule: str | None
    assistant_confidence_threshold: float | None
    prompt_lookup_num_tokens: int | None
    max_matching_ngram_size: int | None


class GenerationFileOptions(GenerationSettings, HubSettings, total=False):
    """Keyword arguments of GenerationConfig.from_pretrained: fields, which override the file's, and hub settings."""


class TokenizerOptions(HubSettings, total=False):
    """Keyword arguments of a tokenizer's from_pretrained; those not given come from the files."""

    unk_token: Token | None
    bos_token: Token | None
    eos_token: Token | None
    pad_token: Token | None
    sep_token: Token | None
    cls_token: Token | None
    mask_token: Token | None
    additional_special_tokens: Sequence[Token] | None
    extra_special_tokens: Sequence[Token] | Mapping[str, Token] | None
    added_tokens_decoder: Mapping[int | str, Token] | None
    add_bos_token: bool | None
    add_eos_token: bool | None
    add_prefix_space: bool | None
    legacy: bool | None
    from_slow: bool
    sp_model_kwargs: dict[str, Any] | None
    chat_template: str | dict[str, str] | None
    clean_up_tokenization_spaces: bool
    model_input_names: list[str] | None
    model_max_length: float | None
    padding_side: Literal["left", "right"] | None
    truncation_side: Literal["left", "right"] | None
    spaces_between_special_tokens: bool
    split_special_tokens: bool
    use_default_system_prompt: bool
    verbose: bool


HUB_DEFAULTS: dict[str, Any] = {
    "revision": None,
    "cache_dir": None,
    "token": None,
    "local_files_only": False,
    "force_download": False,
    "subfolder": "",
}

Function = TypeVar("Function", bound=Callable[..., Any])


def showing(
    options: type,
    defaults: Mapping[str, Any],
    otherwise: Any = STORED,
    more: bool = False,
    doc: str | None = None,
) -> Callable[[Function], Function]:
    """A decorator: each key of the TypedDict `options` is shown as a keyword in place of `**options`.

    defaults: what is shown as the default of a key; `otherwise` is that of any other. more: `**options` stays behind
    the keywords, for a call that takes further names too. doc: the docstring where it stands at another function.
    Only what `inspect.signature` and `help` say changes.
    """

    def decorate(function: Function) -> Function:
        signature = inspect.signature(function)
        kept = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        names = {p.name for p in kept}
        keywords = [
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=defaults.get(name, otherwise),
                annotation=getattr(kind, "__forward_arg__", kind),
            )
            for name, kind in options.__annotations__.items()
            if name not in names
        ]
        rest = [inspect.Parameter("kwargs", inspect.Parameter.VAR_KEYWORD, annotation=Any)] if more else []
        function.__signature__ = signature.replace(  # type: ignore[attr-defined]
            parameters=[*kept, *keywords, *rest]
        )
        function.__doc__ = function.__doc__ if doc is None else doc
        return function

    return decorate
