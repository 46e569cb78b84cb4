"""The tasks of `llama2 finetune`, one row each. What a task is stands in `base`."""

from llama2.train.tasks.base import Outcome, ScoreHead, Task
from llama2.train.tasks.classify import Classify
from llama2.train.tasks.cpo import Cpo
from llama2.train.tasks.dpo import Dpo
from llama2.train.tasks.kto import Kto
from llama2.train.tasks.orpo import Orpo
from llama2.train.tasks.pretrain import Pretrain
from llama2.train.tasks.reward import Reward
from llama2.train.tasks.sft import Sft
from llama2.train.tasks.simpo import Simpo

__all__ = ["TASKS", "Outcome", "ScoreHead", "Task"]

_ROWS = (Sft, Dpo, Kto, Orpo, Simpo, Cpo, Reward, Classify, Pretrain)
TASKS: dict[str, type[Task]] = {task.name: task for task in _ROWS}
