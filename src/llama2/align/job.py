"""PPO, GRPO and RLOO from files: a policy, prompts and rewards to a folder that others load; what `llama2 align` runs.

OUT holds the adapter (or the whole model) and the tokenizer, log.jsonl, reward.svg, align.json, and the checkpoints
that --resume goes on from.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from llama2.align.configs import GRPOConfig, PolicyConfig, PPOConfig, RLOOConfig
from llama2.align.prompts import prompts_of
from llama2.align.rewards import check_rewards
from llama2.align.trainers import GRPOTrainer, PPOTrainer, RLOOTrainer
from llama2.errors import InputError
from llama2.files import saving, write_text
from llama2.train.callbacks import EarlyStoppingCallback
from llama2.train.chart import chart
from llama2.train.data import DataReport, held_out
from llama2.train.finetune import Finetune
from llama2.train.recipe import Data, Recipe, TrainingResult

Method = Literal["ppo", "grpo", "rloo"]
CONFIGS: dict[Method, type[PolicyConfig]] = {"ppo": PPOConfig, "grpo": GRPOConfig, "rloo": RLOOConfig}
SUMMARY, CHART = "align.json", "reward.svg"


@dataclass(frozen=True, kw_only=True)
class AlignmentGoal:
    """How answers are judged: rewards (folders of reward models, module:function, URLs) and safety, one more for
    the gate. chat: prompts that are texts are what a user says. patience: measurements without a better held-out reward
    after which the run ends."""

    method: Method
    rewards: tuple[str, ...]
    safety: str | None = None
    chat: bool = False
    patience: int | None = None

    def __post_init__(self) -> None:
        if not self.rewards:
            raise InputError("there is no reward; give one (--reward: a reward model, module:function, or an URL)")


class Alignment(Finetune):
    """One job of policy optimisation. Prompts are read and checked when it is made, models are loaded by `run`."""

    args: PolicyConfig
    summary = SUMMARY

    def __init__(
        self, goal: AlignmentGoal, recipe: Recipe, args: PolicyConfig, tell: Callable[[str], None] | None = None
    ) -> None:
        """recipe: of "sft", which says how the policy is loaded and what is trained. Raises as Finetune."""
        self.goal = goal
        super().__init__(recipe, args, tell)
        check_rewards([*goal.rewards, *([] if goal.safety is None else [goal.safety])], self.tokenizer)

    def _data(self) -> Data:
        recipe, args = self.recipe, self.args
        rows = self._read(recipe.data)
        rest: Sequence[Any] = ()
        if recipe.eval_data is not None:
            rest = self._read(recipe.eval_data)
        elif recipe.eval_split is not None:
            rows, rest = held_out(rows, recipe.eval_split, args.seed)
        data = Data(*self._prompts(rows, recipe.data))
        if rest:
            data.eval_items, data.eval_report = self._prompts(rest, recipe.eval_data or recipe.data)
        return data

    def _prompts(self, rows: Sequence[Any], source: str) -> tuple[list[Any], DataReport]:
        args, room = self.args, self.origin.config.max_position_embeddings - self.args.max_completion_length
        made, report = prompts_of(rows, self.tokenizer, room, args.max_prompt_length, self.goal.chat)
        if not made:
            raise InputError(f"no row of {source} can be used. {report.text()}")
        return made, report

    def _trainer(self, model: Any, save: Any, report: Any) -> Any:
        goal, data = self.goal, self.data
        rewards = list(goal.rewards)
        stops = [*self._samples(), *([] if goal.patience is None else [EarlyStoppingCallback(goal.patience)])]
        shared: dict[str, Any] = {"safety_reward": goal.safety, "save": save, "report": report, "callbacks": stops}
        if goal.method == "ppo":
            assert isinstance(self.args, PPOConfig)
            return PPOTrainer(
                self.args, self.tokenizer, model, None, rewards, data.items, eval_dataset=data.eval_items or None,
                **shared,
            )  # fmt: skip
        kind = RLOOTrainer if goal.method == "rloo" else GRPOTrainer
        return kind(model, rewards, self.args, data.items, data.eval_items or None, self.tokenizer, **shared)  # type: ignore[arg-type]

    def _summarise(self, result: TrainingResult, history: Sequence[dict[str, Any]], files: Mapping[str, str]) -> None:
        content = {
            "goal": asdict(self.goal),
            "recipe": asdict(self.recipe),
            "arguments": asdict(self.args),
            "data": {**vars(self.data.report), "kinds": dict(self.data.report.kinds)},
            "result": {**asdict(result), "folder": str(result.folder)},
        }
        with saving(self.folder) as save:
            write_text(save.stage / SUMMARY, json.dumps(content, indent=2, default=str) + "\n")
            for name, text in {**files, CHART: reward_chart(history)}.items():
                if text:
                    write_text(save.stage / name, text)


def reward_chart(history: Sequence[Mapping[str, Any]]) -> str:
    """The SVG of reward, held-out reward and KL over the steps; "" where nothing was logged."""
    names = {"reward": "reward", "eval_reward": "held-out reward", "objective/kl": "KL to the start, nats"}
    lines = {
        said: [(e["step"], e[name]) for e in history if name in e and math.isfinite(e[name])]
        for name, said in names.items()
    }
    return chart({said: line for said, line in lines.items() if line}, "step")
