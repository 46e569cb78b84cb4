"""PPOConfig, GRPOConfig and RLOOConfig: TrainingArguments with the fields of TRL's, and of the PPO that it had.

A field that changes nothing here is named, with the reason, in the one warning of TrainingArguments; one whose meaning
would change the result is refused by name.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from llama2.errors import InputError
from llama2.train.configs import TuningArguments

_ENGINE = "the engine samples from the weights in training"
_NO_EFFECT: dict[str, tuple[str, tuple[Any, ...]]] = {
    **TuningArguments.OWN_NO_EFFECT,
    **dict.fromkeys(
        ("use_vllm", "vllm_mode", "vllm_model_impl", "vllm_enable_sleep_mode", "vllm_server_base_url",
         "vllm_server_host", "vllm_server_port", "vllm_server_timeout", "vllm_group_port",
         "vllm_gpu_memory_utilization", "vllm_max_model_length", "vllm_tensor_parallel_size", "cache_implementation",
         "use_transformers_continuous_batching", "transformers_continuous_batching_config", "use_transformers_paged",
         "ds3_gather_for_generation"), (_ENGINE, ())),
    "log_multimodal": ("models here read text alone", (True,)),
    "log_unique_prompts": ("log_completions writes every one", ()),
    "num_completions_to_print": ("completions are not printed", ()),
    "num_generations_eval": ("a held-out prompt is answered once", (1,)),
    "max_length": ("prompts have max_prompt_length, answers max_completion_length", (1024,)),
}  # fmt: skip


@dataclass
class PolicyConfig(TuningArguments):
    """Settings of PPO, GRPO and RLOO alike. num_generations: answers to a prompt. generation_batch_size: answers of an
    iteration, of all ranks, by default per_device_train_batch_size times ranks times steps_per_generation;
    num_iterations: how often each is learnt from. temperature, top_p, top_k, min_p: of sampling; log-probabilities are
    those at the temperature. max_prompt_length: rows with a longer prompt are left out; without it they are an error.
    reward_weights: of several rewards. mask_truncated_completions: answers without an end token are not learnt from.
    safety_threshold: probability of being safe below which the safety reward takes the place of the rest.
    log_completions: every answer with its rewards and advantage is written to completions.jsonl."""

    learning_rate: float = 1e-6
    disable_dropout: bool = True
    max_prompt_length: int | None = None
    max_completion_length: int = 512
    num_generations: int = 8
    num_generations_eval: int | None = None
    generation_batch_size: int | None = None
    steps_per_generation: int | None = None
    num_iterations: int = 1
    shuffle_dataset: bool = True
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float | None = None
    repetition_penalty: float = 1.0
    generation_kwargs: dict[str, Any] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    epsilon: float = 0.2
    epsilon_high: float | None = None
    beta: float = 0.0
    reward_weights: list[float] | None = None
    reward_clip_range: tuple[float, float] | None = None
    mask_truncated_completions: bool = False
    safety_threshold: float = 0.15
    log_completions: bool = False
    sync_ref_model: bool = False
    ref_model_mixup_alpha: float = 0.6
    ref_model_sync_steps: int = 512
    cache_implementation: str | None = None
    use_vllm: bool = False
    vllm_mode: str = "colocate"
    vllm_model_impl: str = "vllm"
    vllm_enable_sleep_mode: bool = False
    vllm_server_base_url: str | None = None
    vllm_server_host: str = "0.0.0.0"
    vllm_server_port: int = 8000
    vllm_server_timeout: float = 240.0
    vllm_group_port: int = 51216
    vllm_gpu_memory_utilization: float = 0.3
    vllm_max_model_length: int | None = None
    vllm_tensor_parallel_size: int = 1
    use_transformers_continuous_batching: bool = False
    transformers_continuous_batching_config: dict[str, Any] | None = None
    use_transformers_paged: bool = False
    ds3_gather_for_generation: bool = True
    log_multimodal: bool = True
    log_unique_prompts: bool = False
    num_completions_to_print: int | None = None
    OWN_NO_EFFECT: ClassVar[dict[str, tuple[str, tuple[Any, ...]]]] = _NO_EFFECT

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("num_generations", 1), ("max_completion_length", 1), ("num_iterations", 1)):
            if getattr(self, name) < least:
                raise InputError(f"{name} is {getattr(self, name)!r}; it must be at least {least}")
        if self.temperature <= 0:
            raise InputError(f"temperature is {self.temperature}; answers are sampled, so it must be above 0")
        self._refuse(
            repetition_penalty="the probabilities that are learnt would not be those that are drawn from: leave it out",
            generation_kwargs="give temperature, top_p, top_k or min_p",
            chat_template_kwargs="put them into the template of the tokenizer",
            sync_ref_model="the reference stays as it is",
            disable_dropout="with dropout the policy would not be the one that was sampled; leave it out",
        )


@dataclass
class GRPOConfig(PolicyConfig):
    """How to learn from groups of answers (arXiv 2402.03300). loss_type: dapo (the mean over tokens), grpo (over
    answers), dr_grpo (over max_completion_length), cispo. scale_rewards: what advantages are divided by, the standard
    deviation of the group or the batch, or nothing ("none"). importance_sampling_level: "token" or "sequence" (GSPO).
    beta: of a KL loss to the reference; use_bias_correction_kl: k3 times the ratio, whose gradient is that of
    KL(pi || ref). importance_sampling_correction: tokens are weighed by pi_old / sampler, at most this.
    """

    loss_type: str = "dapo"
    scale_rewards: str | bool = "group"
    importance_sampling_level: str = "token"
    delta: float | None = None
    use_bias_correction_kl: bool = True
    importance_sampling_correction: float | None = None
    multi_objective_aggregation: str = "sum_then_normalize"
    top_entropy_quantile: float = 1.0
    entropy_coef: float = 0.0
    use_adaptive_entropy: bool = False
    max_tool_calling_iterations: int | None = None
    off_policy_mask_threshold: float | None = None
    vllm_importance_sampling_correction: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.scale_rewards, bool):
            self.scale_rewards = "group" if self.scale_rewards else "none"
        known = ("dapo", "grpo", "dr_grpo", "cispo")
        if self.loss_type not in known:
            told = "; bnpo changes with the micro-batch, use dapo" if self.loss_type == "bnpo" else ""
            raise InputError(f"loss_type is {self.loss_type!r}; it must be one of {', '.join(known)}{told}")
        if self.scale_rewards not in ("group", "batch", "none"):
            raise InputError(f"scale_rewards is {self.scale_rewards!r}; it must be one of group, batch, none")
        if self.importance_sampling_level not in ("token", "sequence"):
            raise InputError(
                f"importance_sampling_level is {self.importance_sampling_level!r}; it must be token or sequence"
            )
        self._refuse(
            multi_objective_aggregation="rewards are summed first: leave it out",
            top_entropy_quantile="leave it out",
            entropy_coef="leave it out",
            use_adaptive_entropy="leave it out",
            max_tool_calling_iterations="answers are of one turn: leave it out",
            off_policy_mask_threshold="give importance_sampling_correction",
        )


@dataclass
class RLOOConfig(PolicyConfig):
    """How to learn from the leave-one-out baseline (arXiv 2402.14740): the KL of the whole answer in the reward, one
    ratio of each answer. normalize_advantages: to mean 0 and standard deviation 1 over the batch.
    """

    num_generations: int = 2
    beta: float = 0.05
    normalize_advantages: bool = False


@dataclass
class PPOConfig(PolicyConfig):
    """How to learn with a critic (arXiv 1707.06347; Llama 2, section 3.2.3). An iteration has
    per_device_train_batch_size times gradient_accumulation_steps times ranks answers, in num_mini_batches steps,
    num_ppo_epochs times. kl_coef: of the KL to the reference in the reward, adaptive towards target_kl (nats of an
    answer) every kl_horizon answers where that is given. whiten_scores: the score of each answer, as the paper does;
    whiten_rewards: of each token, keeping the mean; whiten_advantages. missing_eos_penalty: taken off the (whitened)
    score of an answer without an end token. critic: shared, adapter or model (None: adapter beside LoRA, else model);
    critic_warmup: iterations in which it alone learns. early_stop_kl: ends the run where an answer's KL is beyond it.
    """

    learning_rate: float = 3e-6
    num_generations: int = 1
    max_completion_length: int = 53
    temperature: float = 0.7
    num_ppo_epochs: int = 4
    num_mini_batches: int = 1
    total_episodes: int | None = None
    kl_coef: float = 0.05
    kl_estimator: str = "k1"
    target_kl: float | None = None
    kl_horizon: int = 10000
    early_stop_kl: float | None = None
    cliprange: float = 0.2
    cliprange_value: float | None = 0.2
    vf_coef: float = 0.1
    gamma: float = 1.0
    lam: float = 0.95
    whiten_scores: bool = False
    whiten_rewards: bool = False
    whiten_advantages: bool = True
    missing_eos_penalty: float | None = None
    critic: str | None = None
    critic_warmup: int = 0
    response_length: int | None = None
    stop_token: str | None = None
    stop_token_id: int | None = None
    local_rollout_forward_batch_size: int = 64
    num_sample_generations: int = 10
    reward_model_path: str | None = None
    sft_model_path: str | None = None
    exp_name: str = "ppo_config"
    OWN_NO_EFFECT: ClassVar[dict[str, tuple[str, tuple[Any, ...]]]] = {
        **_NO_EFFECT,
        "local_rollout_forward_batch_size": ("passes are as large as memory makes sense", ()),
        "num_sample_generations": ("completions are not sampled for a table", (0,)),
        "exp_name": ("output_dir names the run", ()),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.response_length is not None:
            self.max_completion_length = self.response_length
        for name, low, high in (("gamma", 0, 1), ("lam", 0, 1), ("kl_coef", 0, None), ("cliprange", 0, None),
                                ("vf_coef", 0, None), ("num_ppo_epochs", 1, None), ("num_mini_batches", 1, None),
                                ("kl_horizon", 1, None), ("critic_warmup", 0, None)):  # fmt: skip
            value = getattr(self, name)
            if value < low or (high is not None and value > high):
                bound = f"at least {low}" if high is None else f"between {low} and {high}"
                raise InputError(f"{name} is {value!r}; it must be {bound}")
        if self.kl_estimator not in ("k1", "k3"):
            raise InputError(f"kl_estimator is {self.kl_estimator!r}; it must be k1 or k3")
        if self.target_kl is not None and self.target_kl <= 0:
            raise InputError(f"target_kl is {self.target_kl}; it must be above 0 nats")
        if self.stop_token not in (None, "eos"):
            raise InputError(f"stop_token is {self.stop_token!r}; answers end at the end token: leave it out")
        self._refuse(
            stop_token_id="answers end at the model's end tokens (generation_config.eos_token_id)",
            num_iterations="it is num_ppo_epochs here",
            steps_per_generation="it is num_mini_batches here",
            generation_batch_size="it is per_device_train_batch_size times gradient_accumulation_steps times ranks",
            beta="it is kl_coef here",
            epsilon="it is cliprange here",
        )


CONFIGS = (PPOConfig, GRPOConfig, RLOOConfig)
