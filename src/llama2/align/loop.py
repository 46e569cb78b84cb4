"""The loop of PPO, GRPO and RLOO: the Trainer's own, whose rows are answers that the model has just sampled.

    iteration   sample answers to the next prompts, score them, ask policy, reference and critic for their tokens'
                log-probabilities and values, make advantages
    steps       of the Trainer, on mini-batches of these answers, each answer `passes` times

Which prompts, which seeds and which mini-batches is a function of the run's seed and the step alone; a checkpoint
between two steps of an iteration holds its answers. So a run that is resumed ends with the same bits.
"""

import math
import random
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama2.align import iteration as stored
from llama2.align.completions import Completions
from llama2.align.critic import Critic
from llama2.align.iteration import Iteration
from llama2.align.policy import Item, PolicyGradient
from llama2.align.prompts import PromptRow
from llama2.align.rewards import Judge
from llama2.align.rollout import Rollout, RolloutSampler, RolloutSettings, seed_of
from llama2.errors import InputError, Llama2Error
from llama2.pretrained import PreTrainedModel
from llama2.train.loop import PASS_TOKENS, Found
from llama2.train.objectives import Batch
from llama2.train.optim import AdamW
from llama2.train.reference import Start
from llama2.train.tuning import Tuner

Rolled = Callable[..., Any]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """prompts of an iteration, answers of each, steps on them (mini-batches times passes)."""

    prompts: int
    answers: int
    batches: int = 1
    passes: int = 1

    @property
    def steps(self) -> int:
        """Optimizer steps of an iteration."""
        return self.batches * self.passes


@dataclass
class Readings:
    """Results of the forward passes over answers: log-probabilities (T,) under the policy and the reference, values."""

    old: list[Tensor] | None = None
    reference: list[Tensor] | None = None
    values: list[Tensor] | None = None


class PolicyTrainer(Tuner):
    """Base class of PPOTrainer, GRPOTrainer and RLOOTrainer."""

    objective: PolicyGradient
    plan: Plan
    sampling: RolloutSettings
    judge: Judge
    rollout_func: Rolled | None = None
    critic: Critic | None = None
    critic_warmup = 0  # iterations in which the critic alone learns
    kl_coef = 0.0
    _iteration: Iteration | None = None
    _completions: Completions | None = None
    _start: Start | None = None
    _reference: Any = None
    _phases: dict[str, tuple[float, int]]

    # -- of a method ---------------------------------------------------------------------------------------------

    def _advantages(self, groups: Sequence[Sequence[Rollout]], found: Readings) -> tuple[list[Item], dict[str, float]]:
        """The items of an iteration, and what is told of them."""
        raise NotImplementedError

    @property
    def _wants_old(self) -> bool:
        """Whether log-probabilities before the first step are needed, beside those that the step itself computes."""
        return self.plan.steps > 1

    @property
    def _wants_reference(self) -> bool:
        return False

    # -- how long ------------------------------------------------------------------------------------------------

    @property
    def batch(self) -> int:
        """Answers of one step, of all ranks together."""
        return self.plan.prompts * self.plan.answers // self.plan.batches

    @property
    def _batches(self) -> int:
        """Batches of an epoch, which is a whole number of iterations."""
        iterations = math.ceil(len(self.rows) / self.plan.prompts)
        return int(iterations * self.plan.steps * self.args.gradient_accumulation_steps)

    @property
    def _at_once(self) -> int:
        """Answers of one pass, as of rows in other training; half as many where the critic has its own trunk, whose
        activations are kept for the backward pass beside the policy's."""
        size = int(self.args.per_device_train_batch_size)
        if self._iteration is None or any(p.device.type != "cpu" for p in self.updates.parameters.values()):
            return size
        trunks = 1 if self.critic is None or self.critic.kind == "shared" else 2
        return min(size, self._fitting(self._iteration.items, PASS_TOKENS // trunks))

    def _fitting(self, items: Sequence[Item], most: int) -> int:
        """Answers of a pass of at most so many tokens."""
        return max(1, most // max(map(self.objective.tokens, items)))

    # -- what is trained -----------------------------------------------------------------------------------------

    def _updates(self, given: Any) -> AdamW:
        if self._wants_reference and self._reference is None and self._start is None:
            self._start = Start(self.network)
        found = super()._updates(given)
        self.objective.lead(self.critic)
        if self.critic is not None and self._narrow is not None and self.critic.network is not None:
            self.critic.network.to(self._narrow)
        return found

    def _trainable(self) -> dict[str, torch.nn.Parameter]:
        held = super()._trainable()
        return held if self.critic is None else {**held, **self.critic.parameters_of(self.network)}

    # -- steps ---------------------------------------------------------------------------------------------------

    def _train(self, wanted: bool | str | None, ignored: list[str] | None) -> Any:
        if self.critic is None:
            return super()._train(wanted, ignored)
        with self.critic.ready():
            return super()._train(wanted, ignored)

    def _rows_of(self, step: int) -> list[Any]:
        """The answers of a step, sampled where it is the first one on them."""
        index, place = divmod(step, self.plan.steps)
        if self._iteration is None or self._iteration.index != index:
            self._iteration = self._made(index)
        self.objective.lead(self.critic, index < self.critic_warmup)
        turn, number = divmod(place, self.plan.batches)
        items = self._iteration.items
        order = list(range(len(items)))
        if self.plan.steps > 1:
            random.Random(f"{self.args.seed}/answers/{index}/{turn}").shuffle(order)
        # Answers to one prompt stand together: what they begin with is computed once.
        return [items[i] for i in sorted(order[number * self.batch : (number + 1) * self.batch])]

    def _by_objective(self) -> Found:
        begin = time.perf_counter()
        first = self.place % self.plan.steps == 0
        self._phases = {}
        found = super()._by_objective()
        iteration = self._iteration
        assert iteration is not None
        took = time.perf_counter() - begin - sum(seconds for seconds, _ in self._phases.values())
        logs = {**found.logs, **iteration.logs, "tokens_per_second/training": found.tokens / max(took, 1e-9)}
        if first:
            told = {f"seconds/{name}": seconds for name, (seconds, _) in self._phases.items()}
            iteration.logs |= told
            logs |= told
        logs["seconds/training"] = took
        return Found(found.loss, logs, found.tokens)

    @contextmanager
    def _phase(self, name: str, tokens: Callable[[], int]) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self._phases[name] = (time.perf_counter() - begin, tokens())

    # -- an iteration --------------------------------------------------------------------------------------------

    def _made(self, index: int) -> Iteration:
        plan, n = self.plan, len(self.rows)
        places = range(index * plan.prompts, (index + 1) * plan.prompts)
        rows = [self.order(place // n)[place % n] for place in places]
        seeds = [[seed_of(self.args.seed, place, k) for k in range(plan.answers)] for place in places]
        groups: list[list[Rollout]] = []
        training = self.network.training
        with self._phase("sampling", lambda: sum(len(a.ids) for group in groups for a in group)):
            groups = self._sampled([(row, self.rows[row]) for row in rows], seeds)
        tokens = sum(len(a.ids) for group in groups for a in group)
        with self._phase("scoring", lambda: tokens):
            groups = self._scored(groups)
        with self._phase("forward", lambda: tokens):
            found = self._measure([a for group in groups for a in group])
        self.network.train(training)
        items, logs = self._advantages(groups, found)
        if self.args.log_completions and self.ranks.first:
            flat = [a for group in groups for a in group]
            self._completions = self._completions or Completions(Path(self.args.output_dir))
            self._completions.add(index * plan.steps, [self.rows[a.row] for a in flat], flat, items)
        logs = {**self._told(groups, found), **logs}
        for name, (seconds, count) in self._phases.items():
            logs[f"tokens_per_second/{name}"] = count / max(seconds, 1e-9)
        return Iteration(index, items, logs)

    def _sampled(self, prompts: Sequence[tuple[int, PromptRow]], seeds: Sequence[Sequence[int]]) -> list[list[Rollout]]:
        if self.rollout_func is not None:
            return self._by_function(prompts, seeds)
        sampler = RolloutSampler(self.network, self.processing_class, self.sampling, self.ranks)
        return sampler([(row, prompt.ids) for row, prompt in prompts], seeds)

    def _by_function(
        self, prompts: Sequence[tuple[int, PromptRow]], seeds: Sequence[Sequence[int]]
    ) -> list[list[Rollout]]:
        """Answers of the caller's own: rollout_func(prompts, trainer), each prompt as often as it has answers, gives
        prompt_ids, completion_ids and logprobs (or None)."""
        assert self.rollout_func is not None
        pairs = [(row, prompt, k, seed) for (row, prompt), own in zip(prompts, seeds, strict=True)
                 for k, seed in enumerate(own)]  # fmt: skip
        given = self.rollout_func([prompt.content for _, prompt, _, _ in pairs], self)
        lists = [given.get("prompt_ids"), given.get("completion_ids")]
        if any(held is None or len(held) != len(pairs) for held in lists):
            raise InputError(
                f"rollout_func must return prompt_ids and completion_ids of {len(pairs)} answers, in the order of the "
                "prompts that it is given"
            )
        ends = {self.processing_class.eos_token_id}
        logs = given.get("logprobs") or [[]] * len(pairs)
        flat = [
            Rollout(row, k, seed, list(ids), list(answer),
                    self.processing_class.decode(answer, skip_special_tokens=True), answer[-1] in ends, list(log))
            for (row, _, k, seed), ids, answer, log in zip(pairs, *lists, logs, strict=True)
        ]  # fmt: skip
        rest = iter(flat)
        return [[next(rest) for _ in own] for own in seeds]

    def _scored(self, groups: Sequence[Sequence[Rollout]]) -> list[list[Rollout]]:
        """The groups with their scores, of which each rank makes a share. A failure leaves a checkpoint."""

        def share() -> list[list[Rollout]]:
            mine = self.ranks.share([list(group) for group in groups])
            flat = [answer for group in mine for answer in group]
            self.judge([self.rows[answer.row] for answer in flat], flat)
            return mine

        try:
            return self.ranks.joined(share)
        except Llama2Error:
            if self.state.global_step and self.is_in_train and self.args.save_strategy != "no":
                self._iteration = None
                self.save()  # so that nothing before the failure is lost
            raise

    # -- what the models say of answers --------------------------------------------------------------------------

    def _measure(self, answers: Sequence[Rollout]) -> Readings:
        """Log-probabilities from the training forward pass, of which each rank makes a share."""
        items = [Item(a.prompt_ids, a.ids, torch.zeros(len(a.ids))) for a in answers]
        found, critic = Readings(), self.critic is not None
        if self._wants_old or critic:
            both = self._passes(items, lambda batch: self.objective.log_probs(self.network, batch, values=critic))
            found.old = [pair[0] for pair in both]
            found.values = [pair[1] for pair in both] if critic else None
        if self._wants_reference:
            found.reference = [pair[0] for pair in self._passes(items, self._of_reference)]
        return found

    def _of_reference(self, batch: Batch) -> tuple[Tensor, None]:
        if self._reference is not None:
            return self.objective.log_probs(self._reference.to(batch["input_ids"].device), batch)[0], None
        assert self._start is not None
        with self._start.restored():
            return self.objective.log_probs(self.network, batch)[0], None

    @torch.no_grad()
    def _passes(
        self, items: Sequence[Item], of_batch: Callable[[Batch], tuple[Tensor, Tensor | None]]
    ) -> list[tuple[Tensor, Tensor]]:
        """For each answer what `of_batch` finds for its tokens, on the CPU."""
        size = min(int(self.args.per_device_train_batch_size), self._fitting(items, PASS_TOKENS))

        def share() -> list[tuple[Tensor, Tensor]]:
            made: list[tuple[Tensor, Tensor]] = []
            mine = self.ranks.share(items)
            for start in range(0, len(mine), size):
                part = mine[start : start + size]
                first, second = of_batch(self._prepare_inputs(self.objective.collate(part)))
                lengths = [len(item.ids) for item in part]
                other = first if second is None else second
                made += list(zip(first.cpu().split(lengths), other.cpu().split(lengths), strict=True))
            return made

        return self.ranks.joined(share)

    # -- telling -------------------------------------------------------------------------------------------------

    def _told(self, groups: Sequence[Sequence[Rollout]], found: Readings) -> dict[str, float]:
        answers = [answer for group in groups for answer in group]
        scores = torch.tensor([[a.score for a in group] for group in groups], dtype=torch.float64)
        valid = scores[~scores.isnan()]
        if not len(valid):
            raise InputError("no answer of this iteration has a reward: the reward functions returned None for all")
        lengths = [len(a.ids) for a in answers]
        ended = sum(a.ended for a in answers) / len(answers)
        logs = {
            "reward": float(valid.mean()),
            "reward_std": float(valid.std(correction=0)),
            "completions/mean_length": sum(lengths) / len(lengths),
            "completions/max_length": float(max(lengths)),
            "completions/clipped_ratio": 1 - ended,
        }
        for name in answers[0].parts:
            parts = [a.parts[name] for a in answers if not math.isnan(a.parts.get(name, math.nan))]
            if len(answers[0].parts) > 1 and parts:
                logs[f"rewards/{name}"] = sum(parts) / len(parts)
        if self.judge.safety is not None:
            least = math.log(self.judge.threshold / (1 - self.judge.threshold))
            logs["unsafe_ratio"] = sum(a.parts["safety"] < least for a in answers) / len(answers)
        if scores.shape[1] > 1:
            equal = [bool((group == group[0]).all()) for group in scores]
            logs["frac_reward_zero_std"] = sum(equal) / len(equal)
            if all(equal):
                warnings.warn(
                    "all answers of every prompt of an iteration have the same reward, so nothing is learnt from it; "
                    "sample more answers or at a higher temperature, or give a reward that tells them apart",
                    stacklevel=2,
                )
        if found.old is not None and found.reference is not None:
            kls = [float((old - ref).double().sum()) for old, ref in zip(found.old, found.reference, strict=True)]
            logs["objective/kl"] = sum(kls) / len(kls)
        return logs

    # -- measuring on held-out prompts ---------------------------------------------------------------------------

    def _measured(self, dataset: Any, prefix: str) -> tuple[dict[str, float], int]:
        """One answer to each held-out prompt: mean reward, its standard error, length, KL to the reference."""
        prompts: Sequence[PromptRow] = self._eval_items(dataset)[0]
        kept, rows = self.rows, list(range(len(prompts)))
        begin = self.network.training
        self._phases = {}
        try:
            self.rows = prompts
            seeds = [[seed_of(self.args.seed, "held out", row)] for row in rows]
            groups = self._scored(self._sampled(list(zip(rows, prompts, strict=True)), seeds))
            answers = [group[0] for group in groups]
            found = Readings()
            if self._wants_reference:
                items = [Item(a.prompt_ids, a.ids, torch.zeros(len(a.ids))) for a in answers]
                found.old = [
                    pair[0] for pair in self._passes(items, lambda b: self.objective.log_probs(self.network, b))
                ]
                found.reference = [pair[0] for pair in self._passes(items, self._of_reference)]
            told = self._told(groups, found)
        finally:
            self.rows = kept
            self.network.train(begin)
        told["reward_error"] = told.pop("reward_std") / math.sqrt(len(answers))
        told.pop("frac_reward_zero_std", None)
        return {f"{prefix}_{name}": value for name, value in told.items()}, len(answers)

    # -- checkpoints ---------------------------------------------------------------------------------------------

    def _write_state(self, made: Path) -> None:
        super()._write_state(made)
        left = self.place % self.plan.steps and self._iteration is not None
        stored.write(made, self.kl_coef, self._iteration if left else None)

    def _resume(self, wanted: bool | str | None) -> None:
        self._iteration = None
        place = None
        if wanted or self.ranks.restarts:
            place = self.ranks.broadcast(lambda: self._chosen(wanted or True))
        super()._resume(wanted)
        if place is not None:
            self.kl_coef, self._iteration = stored.read(place)


def inner(model: Any) -> PreTrainedModel:
    """The network itself, beneath peft's wrapper."""
    found: PreTrainedModel = model.get_base_model() if hasattr(model, "get_base_model") else model
    return found
