# mypy: disable-error-code="empty-body"
"""The methods of every model whose work is done higher up: loading, saving and generating, with all that they take.

Each declares its signature and says what it does; `declares` forwards the call to the function that it names, so the
body of a declaration is never run. No torch at import: the Auto classes take their types from here.
"""

from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, Self, TypedDict, Unpack, overload

from llama2.call_options import HUB_DEFAULTS, ConfigFields, GenerationSettings, HubSettings, showing
from llama2.config import LlamaConfig
from llama2.generation.config import DEFAULTS, GenerationConfig
from llama2.lazy import declares
from llama2.quantization_config import QuantizationConfig

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from llama2.outputs import GenerateBeamDecoderOnlyOutput, GenerateDecoderOnlyOutput


class Streamer(Protocol):
    """Interface of a streamer of generate(), such as TextStreamer."""

    def put(self, value: Any) -> None:
        """Takes the prompt (1, P) first, then the new ids (1,) of each step."""

    def end(self) -> None:
        """Called once when generation is over, however it ended."""


class LoadingInfo(TypedDict):
    """The second result of from_pretrained with output_loading_info=True."""

    missing_keys: list[str]
    unexpected_keys: list[str]
    mismatched_keys: list[Any]
    error_msgs: list[str]


class LoadSettings(TypedDict, total=False):
    """Keyword arguments of a model's from_pretrained, without hub settings and fields of the configuration."""

    config: LlamaConfig | str | Path | None
    dtype: "torch.dtype | str | None"
    torch_dtype: "torch.dtype | str | None"
    device_map: "str | int | torch.device | Mapping[str, str | int | torch.device] | None"
    attn_implementation: str | Mapping[str, str] | None
    ignore_mismatched_sizes: bool
    use_safetensors: bool | None
    weights_only: bool
    variant: str | None
    gguf_file: str | None
    state_dict: "Mapping[str, Tensor] | None"
    generation_config: GenerationConfig | Mapping[str, Any] | None
    key_mapping: Mapping[str, str] | None
    quantization_config: QuantizationConfig | Mapping[str, Any] | None
    load_in_4bit: bool
    load_in_8bit: bool
    dequantize: bool | None
    disable_mmap: bool


class LoadOptions(LoadSettings, HubSettings, ConfigFields, total=False):
    """Keyword arguments of a model's from_pretrained."""


LOAD_DEFAULTS: dict[str, Any] = {
    **HUB_DEFAULTS,
    **dict.fromkeys(("config", "dtype", "torch_dtype", "device_map", "attn_implementation", "use_safetensors")),
    "dequantize": None,
    **dict.fromkeys(("variant", "gguf_file", "state_dict", "generation_config", "key_mapping", "quantization_config")),
    **dict.fromkeys(("ignore_mismatched_sizes", "load_in_4bit", "load_in_8bit", "disable_mmap"), False),
    "weights_only": True,
}


class GenerationMethods:
    """generate() and what belongs to it, for a class with config, generation_config, device and dtype."""

    @showing(GenerationSettings, DEFAULTS)
    @declares("generation.loop", "generate")
    def generate(
        self,
        inputs: "Tensor | None" = None,
        generation_config: GenerationConfig | None = None,
        logits_processor: "Sequence[Callable[[Tensor, Tensor], Tensor]] | None" = None,
        stopping_criteria: Sequence[Callable[..., Any]] | None = None,
        prefix_allowed_tokens_fn: "Callable[[int, Tensor], list[int]] | None" = None,
        synced_gpus: bool | None = None,
        assistant_model: Any = None,
        streamer: Streamer | None = None,
        negative_prompt_ids: "Tensor | None" = None,
        negative_prompt_attention_mask: "Tensor | None" = None,
        *,
        input_ids: "Tensor | None" = None,
        attention_mask: "Tensor | None" = None,
        position_ids: "Tensor | None" = None,
        inputs_embeds: "Tensor | None" = None,
        past_key_values: Any = None,
        tokenizer: Any = None,
        assistant_tokenizer: Any = None,
        seed: int | Sequence[int] | None = None,
        generator: "torch.Generator | None" = None,
        runner: Any = "auto",
        precision: str = "fast",
        **settings: Unpack[GenerationSettings],
    ) -> "Tensor | GenerateDecoderOnlyOutput | GenerateBeamDecoderOnlyOutput":
        """Continues each row of `inputs`.

        B prompts of P tokens, D the width of the model, V the vocabulary, L <= P + new tokens.

        Args:
            inputs, input_ids: ids (B, P), integers; the BOS token alone where neither they nor inputs_embeds are given.
            generation_config: settings, which win over `model.generation_config`; keywords win over both.
            logits_processor: called with ids (rows, S) and scores (rows, V) before the filters; gives new scores.
            stopping_criteria: called with ids (rows, S) and the kept scores; gives a bool a row, True = done.
            prefix_allowed_tokens_fn: prompt number and ids (S,) -> ids that may come next.
            synced_gpus: True is refused.
            assistant_model: a small model of the same vocabulary whose drafts the model checks (speculative decoding).
            streamer: gets the prompt (1, P), then the new ids (1,) of each step; one row, no beams.
            negative_prompt_ids, negative_prompt_attention_mask: (B, P') what guidance_scale leads away from.
            attention_mask: (B, P) with 0 at padding, which stands on the left.
            position_ids: (B, P) from 0; counted along the mask where not given.
            inputs_embeds: (B, P, D) in place of ids; the result then holds new tokens only.
            past_key_values: a Cache, or the tuples of transformers 4.x, of earlier tokens; grown in place.
            tokenizer: for stop_strings.
            assistant_tokenizer: must be `tokenizer`.
            seed: an int, or one per row: a row's draws are then the same alone and in any batch.
            generator: torch's, for draws without a seed.
            runner: "auto", "native" (the CPU engine), "torch", "plain" (torch without CUDA graphs), or a PaddedRunner.
            precision: of activations in the native engine: "fast" rounds them (8 bits beside packed weights, bfloat16
                beside bfloat16), "exact" keeps float32. torch computes in the model's dtype either way.
            settings: fields of GenerationConfig, such as max_new_tokens, shown with the library's defaults; the
                model's own generation_config wins over those. Without any length setting 20 new tokens come.

        Returns:
            ids (B * num_return_sequences, L), prompt included; with return_dict_in_generate an object with sequences,
            scores, logits and the cache.

        Raises:
            InputError: an unknown keyword, a value that cannot work, a prompt that fills the context
                (max_position_embeddings, unless RoPE is dynamic), logits without a finite value.

        Warns of padding on the right, and of settings that have no effect beside the others.
        Sources: the arguments and results of transformers 4.46 and 5.x; speculative decoding by Leviathan et al. 2023;
        the papers of the filters stand at their classes in `llama2.generation.sampler`.
        """

    @declares("generation.loop", "compute_transition_scores")
    def compute_transition_scores(
        self,
        sequences: "Tensor",
        scores: "Sequence[Tensor]",
        beam_indices: "Tensor | None" = None,
        normalize_logits: bool = False,
    ) -> "Tensor":
        """The score of each generated token (rows, new tokens), 0 behind the end of a beam.

        Args:
            sequences: ids (rows, L) of the output of generate().
            scores: its scores, (rows, V) a step.
            beam_indices: of beams, its beam_indices (rows, new tokens).
            normalize_logits: True makes log-probabilities of the scores, in nats.
        """


class ModelMethods(GenerationMethods):
    """from_pretrained, save_pretrained, push_to_hub and dequantize."""

    @overload
    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | PathLike[str] | None,
        *model_args: Any,
        output_loading_info: Literal[False] = False,
        **options: Unpack[LoadOptions],
    ) -> Self: ...

    @overload
    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | PathLike[str] | None,
        *model_args: Any,
        output_loading_info: Literal[True],
        **options: Unpack[LoadOptions],
    ) -> tuple[Self, LoadingInfo]: ...

    @classmethod
    @showing(LoadOptions, LOAD_DEFAULTS, more=True)
    @declares("checkpoint.load", "from_pretrained")
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | PathLike[str] | None,
        *model_args: Any,
        output_loading_info: bool = False,
        **options: Unpack[LoadOptions],
    ) -> Self | tuple[Self, LoadingInfo]:
        """A model in eval mode from a folder, a file, a hub id, or the folder of an adapter.

        Args:
            pretrained_model_name_or_path: a folder of transformers' or of Meta's files, a .safetensors, .bin or GGUF
                file, a hub id, or the folder or hub id of a LoRA adapter, whose base model is then loaded with the
                adapter attached. None where config and state_dict are given.
            model_args: handed to the constructor of the class behind the configuration.
            config: stands in place of the checkpoint's: a LlamaConfig, or a path of one.
            dtype, torch_dtype: "auto" and None mean the dtype that the weights are stored in (config.json's where it
                names one); a torch.dtype or its name converts.
            dequantize: of a GGUF file with quantised blocks. None keeps them for a LlamaForCausalLM on a CPU, which
                then computes in float32, and unpacks them where a dtype is given, on a GPU and for the other classes
                (to bfloat16 without a dtype); True always unpacks, False never, and dtype is then what is computed in.
            device_map: one device ("cpu", "cuda", 0, {"": "cuda:0"}), or "auto" for the GPU where there is one.
            attn_implementation: "eager", "sdpa" or "flash_attention_2".
            output_loading_info: True gives a pair, the model and a LoadingInfo.
            ignore_mismatched_sizes: tensors of another shape are drawn anew, with a warning.
            use_safetensors: True takes safetensors only, False .bin files only, None what there is.
            weights_only: False reads .bin files whose pickles hold more than tensors.
            variant: the part of file names before the ending, such as "fp16".
            gguf_file: the name of the GGUF file in the folder or repository.
            state_dict: tensors by name in place of the checkpoint's.
            generation_config: stands in place of the checkpoint's.
            key_mapping: patterns of tensor names (regular expressions) and what they become.
            quantization_config: a BitsAndBytesConfig or GPTQConfig, or its dict; matrices are quantised one at a time
                as they load. A checkpoint of packed linears stays packed without it.
            load_in_4bit, load_in_8bit: short for a BitsAndBytesConfig.
            disable_mmap: True reads the weights into memory, for files that may be cut while they are mapped.
            revision, cache_dir, token, local_files_only, force_download, subfolder: settings of the hub.
            Any other keyword must be a field of the configuration and wins over the file's.

        Raises:
            CheckpointError: there is no checkpoint, or its files are damaged.
            ConfigError: the configuration is not that of a Llama model, or cannot work.
            MismatchError: a parameter has no tensor, or a tensor no parameter; lists both.
            InputError: an unknown keyword, or a value that cannot work.

        Warns where a missing head, or what a subclass adds, is newly initialised.
        Sources: the formats of transformers 4.46 and 5.x, of Meta's llama repository, of GGUF v3 and of PEFT.
        """

    @declares("checkpoint.save", "save_pretrained")
    def save_pretrained(
        self,
        save_directory: str | PathLike[str],
        *,
        is_main_process: bool = True,
        state_dict: "Mapping[str, Tensor] | None" = None,
        push_to_hub: bool = False,
        max_shard_size: int | str = "5GB",
        safe_serialization: bool = True,
        variant: str | None = None,
        token: str | bool | None = None,
        repo_id: str | None = None,
        commit_message: str = "Upload model",
        private: bool | None = None,
        **kwargs: Any,
    ) -> None:
        """Writes the model as transformers 4.46 and 5.x read it; of a model with an adapter the adapter alone.

        Args:
            save_directory: made where it does not exist; shards of an earlier save are removed.
            is_main_process: False writes nothing.
            state_dict: weights to save instead of the model's own.
            push_to_hub: True uploads the folder too.
            max_shard_size: bytes of a file, or "500MB" (10^6), "5GiB" (2^30); a larger tensor gets a file of its own.
            safe_serialization: False writes .bin files.
            variant: the part of file names before the ending, such as "fp16".
            repo_id: where to upload; the folder's name where not given.
            token, commit_message, private: settings of the upload.
            kwargs: those of transformers' method that have no effect here, with a warning.

        Raises:
            InputError: a bad argument or an unknown keyword.

        All files get their names together, or none does. Tied tensors are written once.
        """

    @declares("checkpoint.save", "push_to_hub")
    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str = "Upload model",
        private: bool | None = None,
        token: str | bool | None = None,
        max_shard_size: int | str = "5GB",
        safe_serialization: bool = True,
        variant: str | None = None,
    ) -> str:
        """Uploads what save_pretrained writes to the hub; returns the address of the commit.

        Args:
            repo_id: the repository, made where it does not exist.
            commit_message, private, token: settings of the upload.
            max_shard_size, safe_serialization, variant: as for save_pretrained.
        """

    @declares("checkpoint.quantized", "dequantize")
    def dequantize(self, dtype: "torch.dtype | None" = None) -> Self:
        """Unpacks every packed linear in place, in `dtype` or the model's own; returns the model.

        Raises InputError where none is packed.
        """
