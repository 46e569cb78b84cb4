"""SFTConfig, DPOConfig and RewardConfig: TrainingArguments with the fields of TRL's, of 0.x and 1.x. No torch here.

A field that changes nothing here is named, with the reason, in the one warning of TrainingArguments; one whose meaning
would change the result is refused by name.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

from llama2.errors import InputError
from llama2.train.arguments import OptionalFlag, TrainingArguments
from llama2.train.preference import Preference, check_preference

Truncation = Literal["keep_start", "keep_end"]
_SHARED_NO_EFFECT: dict[str, tuple[str, tuple[Any, ...]]] = {
    "trust_remote_code": ("remote code never runs", ()),
    "router_aux_loss_coef": ("a Llama model has no experts", ()),
    "dataset_num_proc": ("rows are encoded by one process", (1,)),
    "dataset_batch_size": ("rows are encoded one by one", ()),
    "pad_to_multiple_of": ("padding changes no result", ("auto",)),
    "padding_free": ("no padding is computed in any case", (True,)),
    "activation_offloading": ("use activation_checkpointing", ()),
    "label_pad_token_id": ("labels are made here", ()),
    "padding_value": ("padding changes no result", ()),
}


@dataclass
class TuningArguments(TrainingArguments):
    """Base class of SFTConfig, DPOConfig and RewardConfig.

    bf16=None computes in bfloat16 on a GPU that can, and in the weights' own dtype on a CPU. Layers are recomputed in
    the backward pass only where that is asked for (TRL does so unasked), which changes no result.
    """

    logging_steps: float = 10
    bf16: OptionalFlag = None  # type: ignore[assignment]
    model_init_kwargs: dict[str, Any] | None = None
    max_length: int | None = 1024
    truncation_mode: Truncation = "keep_start"
    pad_token: str | None = None
    trust_remote_code: bool = False
    router_aux_loss_coef: float | None = None
    dataset_num_proc: int | None = None
    dataset_batch_size: int | None = None
    pad_to_multiple_of: int | str | None = "auto"
    padding_free: bool = False
    activation_offloading: bool = False
    label_pad_token_id: int = -100
    padding_value: int | None = None
    OWN_NO_EFFECT: ClassVar[dict[str, tuple[str, tuple[Any, ...]]]] = _SHARED_NO_EFFECT

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bf16 is None:
            self.bf16 = self._on_gpu() and not self.fp16
        if self.truncation_mode not in get_args(Truncation):
            raise InputError(
                f"truncation_mode is {self.truncation_mode!r}; it must be one of {', '.join(get_args(Truncation))}"
            )

    def _on_gpu(self) -> bool:
        import torch

        return bool(self.device.type == "cuda" and torch.cuda.is_bf16_supported())

    def _refuse(self, **instead: str) -> None:
        """Raises InputError for a field that is set to something that would change the result."""
        for name, remedy in instead.items():
            if getattr(self, name) != type(self).__dataclass_fields__[name].default:
                raise InputError(f"{name} is {getattr(self, name)!r}, which is not supported; {remedy}")


@dataclass
class SFTConfig(TuningArguments):
    """How to tune on texts, completions and chats.

    max_length (max_seq_length in TRL 0.x): tokens of a row, None for no bound. packing: several rows in one of
    max_length, none seeing another. completion_only_loss: of {"prompt", "completion"} the completion alone is learnt,
    which is the default; False learns both. assistant_only_loss: of {"messages"} the answers alone; by default, as in
    TRL, the whole chat. eos_token: ends a row. chat_template_path: a file. loss_type: "nll" or "dft".
    """

    learning_rate: float = 2e-5
    chat_template_path: str | None = None
    dataset_text_field: str = "text"
    dataset_kwargs: dict[str, Any] | None = None
    eos_token: str | None = None
    shuffle_dataset: bool = False
    packing: bool = False
    packing_strategy: str = "bfd"
    eval_packing: OptionalFlag = None
    completion_only_loss: OptionalFlag = None
    assistant_only_loss: bool = False
    loss_type: str = "nll"
    max_seq_length: int | None = None
    num_of_sequences: int = 1024
    chars_per_token: float = 3.6
    use_liger: bool = False
    OWN_NO_EFFECT: ClassVar[dict[str, tuple[str, tuple[Any, ...]]]] = {
        **_SHARED_NO_EFFECT,
        "num_of_sequences": ("rows are packed by their tokens", ()),
        "chars_per_token": ("rows are packed by their tokens", ()),
        "shuffle_dataset": ("each epoch has an order of its own", (True,)),
        "use_liger": ("the loss is computed in chunks in any case", ()),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        self.max_length = self.max_length if self.max_seq_length is None else self.max_seq_length
        strategies = ("bfd", "bfd_split", "bfd-requeue", "wrapped")
        if self.packing_strategy not in strategies:
            raise InputError(
                f"packing_strategy is {self.packing_strategy!r}; it must be one of {', '.join(strategies)}"
            )
        self.loss_type = "nll" if self.loss_type == "chunked_nll" else self.loss_type
        if self.loss_type not in ("nll", "dft"):
            raise InputError(f"loss_type is {self.loss_type!r}; it must be nll or dft")
        if self.packing and self.max_length is None:
            raise InputError("packing needs max_length, the tokens of a packed row; give it")


@dataclass
class DPOConfig(TuningArguments):
    """How to learn from preferences. beta, loss_type and label_smoothing: see `losses.dpo_loss`.

    max_prompt_length and max_completion_length (TRL 0.x) cut the prompt at its beginning and an answer at its end.
    """

    learning_rate: float = 1e-6
    beta: float = 0.1
    loss_type: str | list[str] = "sigmoid"
    loss_weights: list[float] | None = None
    label_smoothing: float = 0.0
    reference_free: bool = False
    disable_dropout: bool = True
    max_prompt_length: int | None = None
    max_completion_length: int | None = None
    precompute_ref_log_probs: bool = False
    precompute_ref_batch_size: int | None = None
    ref_model_init_kwargs: dict[str, Any] | None = None
    model_adapter_name: str | None = None
    ref_adapter_name: str | None = None
    force_use_ref_model: bool = False
    ld_alpha: float | None = None
    f_divergence_type: str = "reverse_kl"
    f_alpha_divergence_coef: float = 0.5
    use_weighting: bool = False
    discopop_tau: float = 0.05
    sync_ref_model: bool = False
    ref_model_mixup_alpha: float = 0.6
    ref_model_sync_steps: int = 512
    rpo_alpha: float | None = None
    generate_during_eval: bool = False
    is_encoder_decoder: OptionalFlag = None
    use_logits_to_keep: bool = False
    base_model_attribute_name: str = "model"
    tools: list[Any] | None = None
    OWN_NO_EFFECT: ClassVar[dict[str, tuple[str, tuple[Any, ...]]]] = {
        **_SHARED_NO_EFFECT,
        "precompute_ref_log_probs": ("the reference is computed with each batch, to the same values", ()),
        "precompute_ref_batch_size": ("the reference is computed with each batch, to the same values", ()),
        "force_use_ref_model": ("a ref_model that is given is used", ()),
        "f_alpha_divergence_coef": ("it is of alpha divergences", ()),
        "discopop_tau": ("it is of another loss", ()),
        "ref_model_mixup_alpha": ("the reference stays as it is", ()),
        "ref_model_sync_steps": ("the reference stays as it is", ()),
        "generate_during_eval": ("nothing is generated; a callback can", ()),
        "is_encoder_decoder": ("a Llama model is a decoder", (False,)),
        "use_logits_to_keep": ("logits are computed where there are targets alone", (True,)),
        "base_model_attribute_name": ("the decoder is known", ()),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        kinds = [self.loss_type] if isinstance(self.loss_type, str) else list(self.loss_type)
        if len(kinds) != 1:
            raise InputError(f"loss_type is {self.loss_type!r}; it must be one of {', '.join(get_args(Preference))}")
        check_preference(kinds[0], self.beta, self.label_smoothing)
        self.loss_type = kinds[0]
        if self.loss_weights is not None and list(self.loss_weights) != [1.0]:
            raise InputError(f"loss_weights is {self.loss_weights!r}; there is one loss: leave it out")
        self._refuse(
            model_adapter_name="train the adapter that is active",
            ref_adapter_name="the reference is the model as it is now; give ref_model for another",
            ld_alpha="leave it out",
            f_divergence_type="leave it at reverse_kl",
            use_weighting="leave it out",
            sync_ref_model="the reference stays as it is",
            rpo_alpha="leave it out",
            tools="give each row its column tools",
        )


@dataclass
class RewardConfig(TuningArguments):
    """How to train a reward model: the pairwise loss, less the margin of a row where it has one.

    center_rewards_coefficient: weight of (r_chosen + r_rejected)^2, which keeps rewards around 0 (arXiv 2312.09244).
    max_length: pairs with a longer answer are left out.
    """

    learning_rate: float = 1e-4
    chat_template_path: str | None = None
    eos_token: str | None = None
    disable_dropout: bool = True
    center_rewards_coefficient: float | None = None


@dataclass
class KTOConfig(TuningArguments):
    """How to learn from answers with a label. beta, desirable_weight and undesirable_weight: see `tasks.kto`.

    z0 compares with the answer of the row before in another prompt, over a whole step.
    """

    learning_rate: float = 1e-6
    beta: float = 0.1
    loss_type: str = "kto"
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    disable_dropout: bool = True
    precompute_ref_log_probs: bool = False
    precompute_ref_batch_size: int | None = None
    max_prompt_length: int | None = None
    max_completion_length: int | None = None
    sync_ref_model: bool = False
    ref_model_mixup_alpha: float = 0.6
    ref_model_sync_steps: int = 512
    generate_during_eval: bool = False
    OWN_NO_EFFECT: ClassVar[dict[str, tuple[str, tuple[Any, ...]]]] = {
        **_SHARED_NO_EFFECT,
        "precompute_ref_log_probs": ("the reference is computed with each batch, to the same values", ()),
        "precompute_ref_batch_size": ("the reference is computed with each batch, to the same values", ()),
        "ref_model_mixup_alpha": ("the reference stays as it is", ()),
        "ref_model_sync_steps": ("the reference stays as it is", ()),
        "generate_during_eval": ("nothing is generated; a callback can", ()),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        self._refuse(
            loss_type="leave it at kto",
            sync_ref_model="the reference stays as it is",
            max_prompt_length="give max_length",
            max_completion_length="give max_length",
            disable_dropout="the dropout of adapters would tell policy and reference apart: leave it on",
        )


@dataclass
class ORPOConfig(TuningArguments):
    """How to tune and learn preferences in one. beta: the paper's lambda, see `tasks.orpo`.

    The likelihood is that of the chosen answer, as in the paper; TRL adds that of its prompt.
    """

    learning_rate: float = 1e-6
    beta: float = 0.1
    disable_dropout: bool = True
    max_prompt_length: int | None = None
    max_completion_length: int | None = None
    generate_during_eval: bool = False
    is_encoder_decoder: OptionalFlag = None
    OWN_NO_EFFECT: ClassVar[dict[str, tuple[str, tuple[Any, ...]]]] = {
        **_SHARED_NO_EFFECT,
        "generate_during_eval": ("nothing is generated; a callback can", ()),
        "is_encoder_decoder": ("a Llama model is a decoder", (False,)),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        self._refuse(
            max_prompt_length="give max_length",
            max_completion_length="give max_length",
            disable_dropout="leave it on",
        )


@dataclass
class CPOConfig(ORPOConfig):
    """How to learn preferences without a reference. loss_type: "sigmoid" (CPO) or "simpo", with simpo_gamma and
    cpo_alpha=0; see `tasks.cpo` and `tasks.simpo`."""

    loss_type: str = "sigmoid"
    label_smoothing: float = 0.0
    cpo_alpha: float = 1.0
    simpo_gamma: float = 0.5
    alpha: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.loss_type not in ("sigmoid", "simpo"):
            raise InputError(f"loss_type is {self.loss_type!r}; it must be sigmoid or simpo")
        self._refuse(label_smoothing="leave it at 0", alpha="leave it at 0")


CONFIGS = (SFTConfig, DPOConfig, RewardConfig, KTOConfig, ORPOConfig, CPOConfig)
