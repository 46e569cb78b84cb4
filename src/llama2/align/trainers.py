"""PPOTrainer, GRPOTrainer and RLOOTrainer: the methods over the one loop, with TRL's arguments."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from llama2 import lora
from llama2.align import advantages as made_of
from llama2.align.configs import GRPOConfig, PolicyConfig, PPOConfig, RLOOConfig
from llama2.align.critic import Critic
from llama2.align.loop import Plan, PolicyTrainer, Readings, inner
from llama2.align.losses import kl
from llama2.align.policy import Item, PolicyGradient
from llama2.align.prompts import PromptRow, prompts_of
from llama2.align.rewards import Judge, source_of
from llama2.align.rollout import Rollout, RolloutSettings
from llama2.auto import AutoModelForCausalLM
from llama2.errors import InputError
from llama2.lora_config import LoraConfig
from llama2.train.distributed import join
from llama2.train.encoding import EVAL_ROWS, TRAINED, Encoder
from llama2.train.readers import taken


class PromptEncoder(Encoder):
    """Rows as prompts."""

    args: PolicyConfig

    def items(self, dataset: Iterable[Any], name: str) -> list[Any]:
        """As Encoder.items."""
        rows = taken(dataset, None if name == TRAINED else EVAL_ROWS, name)
        if not rows:
            raise InputError(f"{name} has no rows; give prompts to {'train' if name == TRAINED else 'measure'} on")
        if isinstance(rows[0], PromptRow):
            return rows
        context = int(self.model.config.max_position_embeddings)
        assert self.tokenizer is not None
        room = context - self.args.max_completion_length
        made, report = prompts_of(rows, self.tokenizer, room, self.args.max_prompt_length)
        if not made:
            raise InputError(f"no row of {name} can be used. {report.text()}")
        return made


class _Policy(PolicyTrainer):
    """How the three are made."""

    CONFIG: ClassVar[type[PolicyConfig]]
    ENCODER = PromptEncoder

    def _begin_with(self, model: Any, args: Any, ref_model: Any, quantization: Any, peft_config: Any) -> Any:
        """The policy, loaded where it is a path, its configuration, and the reference."""
        config, model = self._set_up(model, args, {}, quantization, peft_config)
        if config.fsdp:
            raise InputError(
                "fsdp is not supported while answers are sampled; train an adapter, or more memory per rank"
            )
        if ref_model is model:
            raise InputError("ref_model is the model itself; leave it out: the reference is the model as it is now")
        if isinstance(ref_model, str | Path):
            ref_model = AutoModelForCausalLM.from_pretrained(ref_model)
        self._reference = None if ref_model is None else inner(ref_model).requires_grad_(False).eval()
        self._peft = peft_config
        return config, model

    def _judged(self, rewards: Any, safety: Any, tokenizers: Any, config: PolicyConfig, model: Any) -> Judge:
        """The judge of what is given: one reward or a list; tokenizers: of reward models that are given as such."""
        given = list(rewards) if isinstance(rewards, list | tuple) else [rewards]
        own = list(tokenizers) if isinstance(tokenizers, list | tuple) else [tokenizers] * len(given)
        policy = self._policy_tokenizer
        device = str(inner(model).device)
        sources = [source_of(one, policy, device, t) for one, t in zip(given, own, strict=True)]
        return Judge(
            sources,
            config.reward_weights or [],
            None if safety is None else source_of(safety, policy, device),
            config.safety_threshold,
        )

    def _ready(self, model: Any, config: PolicyConfig, tokenizer: Any, judged: Callable[[], Judge], plan: Plan,
               objective: PolicyGradient, rollout_func: Any) -> None:  # fmt: skip
        """All that has to be known before the Trainer is made."""
        self._policy_tokenizer = self._tokenizer(tokenizer, model, config)
        self.plan, self.rollout_func = plan, rollout_func
        self.sampling = RolloutSettings(
            temperature=config.temperature,
            top_p=config.top_p,
            top_k=config.top_k,
            min_p=config.min_p,
            max_new_tokens=config.max_completion_length,
        )
        self.judge = judged()
        told = (
            f"{plan.prompts} prompts x {plan.answers} answers, {plan.batches} batches x {plan.passes}, "
            f"T {config.temperature:g}, top-p {config.top_p:g}, top-k {config.top_k}, {self.judge.name}"
        )
        self._goal = replace(objective, sampling=told)
        self._phases = {}

    def _encoder(self, objective: Any) -> Encoder:
        return super()._encoder(self._goal)

    def _valid(self, answers: Sequence[Rollout]) -> list[float]:
        """Which answers count: those with a score, and unless the configuration says otherwise also unended ones."""
        masked = self.args.mask_truncated_completions
        return [0.0 if math.isnan(a.score) or (masked and not a.ended) else 1.0 for a in answers]

    def _clipped(self, groups: Sequence[Sequence[Rollout]]) -> Tensor:
        """Scores (P, G), float64, within reward_clip_range."""
        scores = torch.tensor([[a.score for a in group] for group in groups], dtype=torch.float64)
        bounds = self.args.reward_clip_range
        return scores if bounds is None else scores.clamp(*bounds)

    def _items_of(self, answers: Sequence[Rollout], each: Tensor, found: Readings) -> list[Item]:
        """Items with one advantage for all tokens of an answer; each: (P, G)."""
        dtype = torch.float64 if self._dtype == torch.float64 else torch.float32
        items = []
        for i, (answer, advantage, counts) in enumerate(
            zip(answers, each.reshape(-1).tolist(), self._valid(answers), strict=True)
        ):
            item = Item(answer.prompt_ids, answer.ids, torch.full((len(answer.ids),), advantage, dtype=dtype), counts)
            items.append(self._completed(item, i, answer, found))
        return items

    def _completed(self, item: Item, i: int, answer: Rollout, found: Readings) -> Item:
        sampled = torch.tensor(answer.logs) if len(answer.logs) == len(answer.ids) else None
        return item._replace(
            old=None if found.old is None or not self._wants_old else found.old[i],
            reference=None if found.reference is None else found.reference[i],
            sampled=sampled,
        )

    @property
    def _dtype(self) -> torch.dtype:
        return next(self.network.parameters()).dtype


def _group_plan(config: PolicyConfig) -> Plan:
    """TRL's shape of an iteration. Raises InputError where its numbers do not divide each other."""
    world, each = join().world, config.per_device_train_batch_size
    accumulated, answers = config.gradient_accumulation_steps, config.num_generations
    size = config.generation_batch_size
    steps = config.steps_per_generation
    if size is not None and steps is not None and size != each * world * steps:
        raise InputError("generation_batch_size and steps_per_generation are both given, and differ; give one of them")
    if size is None:
        size = each * world * (accumulated if steps is None else steps)
    if size % answers:
        raise InputError(
            f"an iteration has {size} answers (per_device_train_batch_size x ranks x steps_per_generation), which "
            f"num_generations {answers} does not divide; change one of them"
        )
    one = each * world * accumulated
    if size % one:
        raise InputError(
            f"an iteration has {size} answers, which steps of {one} (per_device_train_batch_size x ranks x "
            "gradient_accumulation_steps) do not divide; change one of them"
        )
    return Plan(prompts=size // answers, answers=answers, batches=size // one, passes=config.num_iterations)


class GRPOTrainer(_Policy):
    """Learns from the rewards of several answers to each prompt, beside each other: see `GRPOConfig`.

    reward_funcs: functions as TRL's, reward models, folders, URLs, or module:function; one or a list. safety_reward:
    one more, for the paper's gate. rollout_func: samples in place of the engine.
    """

    CONFIG: ClassVar[type[PolicyConfig]] = GRPOConfig
    SUFFIX = "GRPO"

    def __init__(
        self,
        model: Any,
        reward_funcs: Any = None,
        args: GRPOConfig | None = None,
        train_dataset: Iterable[Any] | None = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        reward_processing_classes: Any = None,
        callbacks: Sequence[Any] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        quantization_config: Any = None,
        peft_config: LoraConfig | None = None,
        tools: Any = None,
        rollout_func: Any = None,
        environment_factory: Any = None,
        *,
        safety_reward: Any = None,
        ref_model: Any = None,
        save: Callable[[Path], Any] | None = None,
        report: Callable[[dict[str, Any]], None] | None = None,
    ) -> None:
        self._refuse("", tools=tools, environment_factory=environment_factory)
        config, model = self._begin_with(model, args, ref_model, quantization_config, peft_config)
        if config.num_generations < 2:
            raise InputError(f"num_generations is {config.num_generations}; a group has at least 2 answers")
        self._ready(
            model, config, processing_class,
            lambda: self._judged(reward_funcs, safety_reward, reward_processing_classes, config, model),
            plan_of(config), self._objective_of(config), rollout_func,
        )  # fmt: skip
        self._construct(model, config, (train_dataset, eval_dataset), self._policy_tokenizer, peft_config,
                        callbacks=callbacks, optimizers=optimizers, save=save, report=report)  # fmt: skip

    def _objective_of(self, config: Any) -> PolicyGradient:
        reductions: Mapping[str, Any] = {"grpo": "answer", "dr_grpo": "constant"}
        return PolicyGradient(
            epsilon=config.epsilon,
            epsilon_high=config.epsilon_high or (config.epsilon if config.loss_type == "cispo" else None),
            delta=config.delta,
            cispo=config.loss_type == "cispo",
            reduction=reductions.get(config.loss_type, "token"),
            level=config.importance_sampling_level,
            beta=config.beta,
            estimator="k3_ratio" if config.use_bias_correction_kl else "k3",
            cap=config.importance_sampling_correction,
            temperature=config.temperature,
            longest=config.max_completion_length,
            method="GRPO",
        )

    @property
    def _wants_reference(self) -> bool:
        return bool(self._goal.beta)

    def _advantages(self, groups: Sequence[Sequence[Rollout]], found: Readings) -> tuple[list[Item], dict[str, float]]:
        each = made_of.group_advantages(self._clipped(groups), self.args.scale_rewards)
        return self._items_of([a for group in groups for a in group], each, found), {}


class RLOOTrainer(GRPOTrainer):
    """Learns from the rewards of several answers to each prompt by REINFORCE with a leave-one-out baseline: see
    `RLOOConfig`. Arguments as of GRPOTrainer."""

    CONFIG, SUFFIX = RLOOConfig, "RLOO"

    def _objective_of(self, config: Any) -> PolicyGradient:
        return PolicyGradient(
            epsilon=config.epsilon,
            epsilon_high=config.epsilon_high,
            reduction="answer",
            level="answer",
            temperature=config.temperature,
            longest=config.max_completion_length,
            method="RLOO",
        )

    @property
    def _wants_old(self) -> bool:
        return super()._wants_old or self._wants_reference

    @property
    def _wants_reference(self) -> bool:
        return bool(self.args.beta)

    def _advantages(self, groups: Sequence[Sequence[Rollout]], found: Readings) -> tuple[list[Item], dict[str, float]]:
        scores = self._clipped(groups)
        if found.reference is not None and found.old is not None:
            away = [float((old - ref).double().sum()) for old, ref in zip(found.old, found.reference, strict=True)]
            scores = scores - self.args.beta * torch.tensor(away, dtype=torch.float64).view_as(scores)
        each = made_of.leave_one_out(scores)
        if self.args.normalize_advantages:
            valid = each[~scores.isnan()]
            each = torch.where(scores.isnan(), 0, (each - valid.mean()) / (valid.std() + 1e-4))
        return self._items_of([a for group in groups for a in group], each, found), {}


class PPOTrainer(_Policy):
    """Learns from rewards with a critic: see `PPOConfig`. reward_model, safety_reward: as GRPOTrainer's reward_funcs.
    value_model: what the critic begins as (critic="model"), by default a copy of the policy."""

    CONFIG, SUFFIX = PPOConfig, "PPO"

    def __init__(
        self,
        args: PPOConfig | None = None,
        processing_class: Any = None,
        model: Any = None,
        ref_model: Any = None,
        reward_model: Any = None,
        train_dataset: Iterable[Any] | None = None,
        value_model: Any = None,
        data_collator: Any = None,
        eval_dataset: Any = None,
        optimizers: tuple[Any, Any] = (None, None),
        callbacks: Sequence[Any] | None = None,
        peft_config: LoraConfig | None = None,
        *,
        reward_funcs: Any = None,
        reward_processing_classes: Any = None,
        safety_reward: Any = None,
        quantization_config: Any = None,
        rollout_func: Any = None,
        save: Callable[[Path], Any] | None = None,
        report: Callable[[dict[str, Any]], None] | None = None,
    ) -> None:
        self._refuse(", which samples its rows", data_collator=data_collator)
        if model is None:
            raise InputError("PPOTrainer needs a model; give the policy: a path or a model")
        reward = reward_model if reward_funcs is None else reward_funcs
        if args is not None:
            reward = args.reward_model_path if reward is None else reward
        config, model = self._begin_with(model, args, ref_model, quantization_config, peft_config)
        self._value_model = value_model
        self.kl_coef = config.kl_coef
        self.critic_warmup = config.critic_warmup
        self._ready(
            model, config, processing_class,
            lambda: self._judged(reward, safety_reward, reward_processing_classes, config, model),
            plan_of(config), _ppo_objective(config), rollout_func,
        )  # fmt: skip
        self._construct(model, config, (train_dataset, eval_dataset), self._policy_tokenizer, peft_config,
                        callbacks=callbacks, optimizers=optimizers, save=save, report=report)  # fmt: skip

    def _take(self, model: Any) -> None:
        super()._take(model)
        adapted = bool(lora.names(self.network))
        kind = self.args.critic or ("model" if self._value_model is not None or not adapted else "adapter")
        if kind == "adapter" and self.args.gradient_checkpointing:
            raise InputError(
                "gradient_checkpointing recomputes layers after the critic's adapter has been set aside; use "
                "critic='shared', or leave it out"
            )
        network = None if self._value_model is None else inner(self._value_model)
        torch.manual_seed(self.args.seed)
        self.critic = Critic(kind, self.network, network, _like(self.network, self._peft))  # type: ignore[arg-type]

    @property
    def _wants_reference(self) -> bool:
        return True

    def _advantages(self, groups: Sequence[Sequence[Rollout]], found: Readings) -> tuple[list[Item], dict[str, float]]:
        args, answers = self.args, [a for group in groups for a in group]
        assert found.old is not None and found.reference is not None and found.values is not None
        scores = self._clipped(groups).reshape(-1)
        if args.whiten_scores:
            scores = made_of.whitened(scores)
        if args.missing_eos_penalty is not None:
            scores = scores - args.missing_eos_penalty * torch.tensor([float(not a.ended) for a in answers])
        valid = torch.tensor(self._valid(answers)) > 0
        scores = torch.where(scores.isnan(), 0, scores)
        lengths = torch.tensor([len(a.ids) for a in answers])
        old, reference, values = (
            pad_sequence([one.double() for one in held], batch_first=True)
            for held in (found.old, found.reference, found.values)
        )
        mask = made_of.within(lengths, old.shape[1])
        away = kl(old, reference, args.kl_estimator)
        rewards = made_of.token_rewards(scores, away, lengths, self.kl_coef)
        if args.whiten_rewards:
            rewards = made_of.whitened(rewards, mask, centre=False)
        advantages, returns = made_of.gae(rewards, values, lengths, args.gamma, args.lam)
        explained = _explained(values, returns, mask)
        if args.whiten_advantages:
            advantages = made_of.whitened(advantages, mask & valid[:, None])
        dtype = torch.float64 if self._dtype == torch.float64 else torch.float32
        items = []
        for i, answer in enumerate(answers):
            own = slice(0, len(answer.ids))
            item = Item(
                answer.prompt_ids, answer.ids, advantages[i, own].to(dtype), float(valid[i]),
                values=found.values[i], returns=returns[i, own].to(dtype),
            )  # fmt: skip
            items.append(self._completed(item, i, answer, found))
        logs = {"kl_coef": self.kl_coef, "explained_variance": explained}
        self._follow(float(torch.where(mask, old - reference, 0).sum(1).mean()), len(answers))
        return items, logs

    def _follow(self, kl_of_answer: float, answers: int) -> None:
        """Adapts the coefficient to this iteration's KL, and decides whether the run continues."""
        args = self.args
        if args.target_kl is not None:
            self.kl_coef = made_of.adapted(self.kl_coef, kl_of_answer, args.target_kl, answers, args.kl_horizon)
        if args.early_stop_kl is not None and kl_of_answer > args.early_stop_kl:
            self.control.should_training_stop = True


def _like(network: Any, peft_config: LoraConfig | None) -> LoraConfig | None:
    """The configuration of the critic's adapter: the policy's, or of an adapter that was loaded its rank."""
    if peft_config is not None:
        return replace(peft_config, lora_dropout=0.0, init_lora_weights=True, modules_to_save=())
    held = lora.layers(network)
    if not held:
        return None
    name = lora.current(network)
    first = next(layer for layer in held.values() if name in layer.lora_A)
    rank = len(first.lora_A[name])
    targets = tuple(dict.fromkeys(path.rpartition(".")[2] for path in held))
    return LoraConfig(r=rank, lora_alpha=first.scaling[name] * rank, target_modules=targets)


def _explained(values: Tensor, returns: Tensor, mask: Tensor) -> float:
    """1 - var(return - value) / var(return), over valid tokens."""
    spread = float(returns[mask].var(correction=0))
    return 1 - float((returns - values)[mask].var(correction=0)) / spread if spread > 0 else 0.0


def plan_of(config: PolicyConfig) -> Plan:
    """The shape of an iteration. Raises InputError where its numbers do not divide each other."""
    return _ppo_plan(config) if isinstance(config, PPOConfig) else _group_plan(config)


def _ppo_plan(config: PPOConfig) -> Plan:
    world, answers = join().world, config.num_generations
    size = config.per_device_train_batch_size * config.gradient_accumulation_steps * world
    for name, value in (("num_generations", answers), ("num_mini_batches", config.num_mini_batches)):
        if size % value:
            raise InputError(
                f"an iteration has {size} answers (per_device_train_batch_size x gradient_accumulation_steps x ranks), "
                f"which {name} {value} does not divide; change one of them"
            )
    plan = Plan(prompts=size // answers, answers=answers, batches=config.num_mini_batches, passes=config.num_ppo_epochs)
    if config.total_episodes is not None and config.max_steps <= 0:
        config.max_steps = math.ceil(config.total_episodes / size) * plan.steps
    return plan


def _ppo_objective(config: PPOConfig) -> PolicyGradient:
    return PolicyGradient(
        epsilon=config.cliprange,
        epsilon_high=config.epsilon_high,
        vf_coef=config.vf_coef,
        value_clip=config.cliprange_value,
        temperature=config.temperature,
        longest=config.max_completion_length,
        method="PPO",
    )
