"""Rewards of answers: a reward model, a function of the user's, or a running server; one or several, and safety.

A reward model reads an answer as it was trained to: the row of prompt and answer, encoded by its own tokenizer. A
function is called as TRL calls one: function(prompts=[...], completions=[...], completion_ids=[...], and each other
column of the rows), and returns a number, or None, for each answer.
"""

import inspect
import json
import math
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import torch

from llama2.align.advantages import GATE, gated
from llama2.align.prompts import PromptRow, columns_of
from llama2.align.rollout import Rollout, resting
from llama2.auto import AutoModelForSequenceClassification, AutoTokenizer
from llama2.checkpoint.load import head_follows
from llama2.errors import InputError
from llama2.scoring import Scorer

_PATIENCE = 600  # seconds for an answer of a server
_BATCH = 32  # rows of a request to a server

Function = Callable[..., Any]


class Source(Protocol):
    """Where a reward comes from."""

    name: str

    def __call__(self, prompts: Sequence[PromptRow], answers: Sequence[Rollout]) -> list[float]:
        """A number for each answer, NaN where there is none. Raises InputError where one cannot be had."""


class FunctionReward:
    """A Python function."""

    def __init__(self, function: Function, name: str = "") -> None:
        self.function = function
        self.name = name or getattr(function, "__name__", type(function).__name__)

    def __call__(self, prompts: Sequence[PromptRow], answers: Sequence[Rollout]) -> list[float]:
        """As Source. Raises InputError where the function raises, or returns NaN or another count."""
        given: dict[str, Any] = {
            "prompts": [prompt.content for prompt in prompts],
            "completions": [p.said(a.text) for p, a in zip(prompts, answers, strict=True)],
            "completion_ids": [list(a.ids) for a in answers],
            **columns_of(prompts),
        }
        taken = inspect.signature(self.function).parameters.values()
        if not any(p.kind is p.VAR_KEYWORD for p in taken):
            names = {p.name for p in taken}
            given = {name: value for name, value in given.items() if name in names}
        try:
            found = list(self.function(**given))
        except Exception as error:
            raise InputError(
                f"the reward function {self.name} raised {type(error).__name__}: {error}; mend it and go on with "
                "--resume (resume_from_checkpoint=True)"
            ) from error
        if len(found) != len(answers):
            raise InputError(
                f"the reward function {self.name} returned {len(found)} values for {len(answers)} answers; it must "
                "return one for each"
            )
        return [self._number(value, answer) for value, answer in zip(found, answers, strict=True)]

    def _number(self, value: Any, answer: Rollout) -> float:
        if value is None:
            return math.nan
        try:
            number = float(value)
        except (TypeError, ValueError) as error:
            raise InputError(
                f"the reward function {self.name} returned {value!r}, which is no number; None leaves an answer out"
            ) from error
        if not math.isfinite(number):
            raise InputError(
                f"the reward function {self.name} returned {number} for the answer {answer.text[:80]!r} (row "
                f"{answer.row}); None leaves an answer out. Mend it and go on with --resume "
                "(resume_from_checkpoint=True)"
            )
        return number


class ModelReward:
    """A classifier with one output, of a folder or given."""

    def __init__(self, model: Any, tokenizer: Any, policy_tokenizer: Any, name: str = "reward model") -> None:
        """Raises InputError for a model of several outputs or of another vocabulary than the policy's."""
        self.name, self._score = name, Scorer(model, tokenizer)
        _check_vocabulary(name, tokenizer, policy_tokenizer)
        model.requires_grad_(False)

    @classmethod
    def load(cls, path: str, policy_tokenizer: Any, device: str = "auto", dtype: str = "auto") -> "ModelReward":
        """Of a folder or a hub id. Raises InputError for a model without a classifier's head."""
        tokenizer = AutoTokenizer.from_pretrained(path)
        with head_follows():  # or there is none, which is an error below
            model, info = AutoModelForSequenceClassification.from_pretrained(
                path, dtype=dtype, device_map=device, output_loading_info=True
            )
        if "score.weight" in info["missing_keys"] and not hasattr(model, "_adapter_parameters"):
            raise InputError(f"{path} has no head that gives a reward; `llama2 finetune reward` trains one")
        return cls(model, tokenizer, policy_tokenizer, path)

    def __call__(self, prompts: Sequence[PromptRow], answers: Sequence[Rollout]) -> list[float]:
        """As Source."""
        rows = [prompt.answered(answer.text) for prompt, answer in zip(prompts, answers, strict=True)]
        with resting(self._score.model):
            return [rewards[0] for rewards in self._score(rows)]


class ServerReward:
    """A running server, asked at its /v1/score: {"input": rows}, answered by {"data": [{"index", "score"}, ...]}."""

    def __init__(self, url: str, key: str | None = None) -> None:
        base = url.rstrip("/")
        self.name = base
        self._url, self._key = base if base.endswith("/v1/score") else f"{base}/v1/score", key

    def __call__(self, prompts: Sequence[PromptRow], answers: Sequence[Rollout]) -> list[float]:
        """As Source. Raises InputError where the server does not answer, or not with a number for each row."""
        rows = [p.answered(a.text) for p, a in zip(prompts, answers, strict=True)]
        found: list[float] = []
        for start in range(0, len(rows), _BATCH):
            found += self._asked(rows[start : start + _BATCH])
        return found

    def _asked(self, rows: list[dict[str, Any]]) -> list[float]:
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self._key}"} if self._key else {})
        request = urllib.request.Request(self._url, json.dumps({"input": rows}).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=_PATIENCE) as answer:
                content = json.load(answer)
            data = sorted(content["data"], key=lambda entry: entry["index"])
            found = [float(entry["score"]) for entry in data]
        except urllib.error.HTTPError as error:
            said = error.read(500).decode(errors="replace")
            raise InputError(f"{self._url} answered {error.code}: {said}; serve a reward model there") from error
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise InputError(
                f"{self._url} gave no rewards ({error}); is a server of a reward model running there? Then go on "
                "with --resume"
            ) from error
        if len(found) != len(rows) or not all(map(math.isfinite, found)):
            raise InputError(f"{self._url} gave {found[:4]}... for {len(rows)} answers; it must give a number for each")
        return found


def _check_vocabulary(name: str, tokenizer: Any, policy_tokenizer: Any) -> None:
    if policy_tokenizer is not None and tokenizer.get_vocab() != policy_tokenizer.get_vocab():
        raise InputError(
            f"{name} has another vocabulary ({len(tokenizer):,} tokens) than the policy "
            f"({len(policy_tokenizer):,}); train a reward model from a checkpoint of the policy's family"
        )


def _kind(text: str) -> str:
    """Returns the kind of a named reward: "server", "function" or "model"."""
    if text.startswith(("http://", "https://")):
        return "server"
    return "function" if ":" in text and not Path(text).exists() else "model"


def check_rewards(names: Sequence[str], policy_tokenizer: Any) -> None:
    """Raises InputError for a reward that is known to be wrong before any model is loaded: a function that is not
    there, a reward model of another vocabulary than the policy's. A server is asked once there is something to ask."""
    for name in names:
        if _kind(name) == "function":
            _function(name)
        elif _kind(name) == "model":
            _check_vocabulary(name, AutoTokenizer.from_pretrained(name), policy_tokenizer)


def source_of(reward: Any, policy_tokenizer: Any, device: str = "auto", tokenizer: Any = None) -> Source:
    """The reward that is named: a folder or hub id of a reward model, module:function, an URL; or given as a function,
    or as a model with its tokenizer. Raises InputError for anything else."""
    if isinstance(reward, str | Path):
        text = str(reward)
        kind = _kind(text)
        if kind == "server":
            return ServerReward(text)
        if kind == "function":
            return FunctionReward(_function(text), text)
        return ModelReward.load(text, policy_tokenizer, device)
    if hasattr(reward, "classify"):
        return ModelReward(reward, tokenizer or policy_tokenizer, policy_tokenizer)
    if callable(reward):
        return FunctionReward(reward)
    raise InputError(
        f"a reward is {reward!r}; give the folder of a reward model, module:function, a server's URL, or a function"
    )


def _function(text: str) -> Function:
    module, _, name = text.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")  # a module beside the command, as `python -m` finds it
    try:
        found = import_module(module)
    except ImportError as error:
        raise InputError(f"--reward {text}: the module {module!r} cannot be imported ({error})") from error
    function = getattr(found, name, None)
    if not callable(function):
        raise InputError(f"--reward {text}: {module} has no function {name!r}")
    made: Function = function
    return made


@dataclass
class Judge:
    """The reward of answers: a weighted sum of sources, and where there is a safety model the paper's gate."""

    sources: Sequence[Source]
    weights: Sequence[float] = ()
    safety: Source | None = None
    threshold: float = GATE
    _names: list[str] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        self.weights = list(self.weights) or [1.0] * len(self.sources)
        if len(self.weights) != len(self.sources):
            raise InputError(
                f"there are {len(self.weights)} reward weights for {len(self.sources)} rewards; give as many"
            )
        names = [source.name for source in self.sources]
        self._names = [n if names.count(n) == 1 else f"{n} {i}" for i, n in enumerate(names)]
        gated(torch.zeros(1), torch.zeros(1), torch.zeros(1, dtype=torch.bool), self.threshold)

    @property
    def name(self) -> str:
        """A description of the rewards."""
        told = [f"{w:g} {n}" if w != 1 else n for n, w in zip(self._names, self.weights, strict=True)]
        return " + ".join(told) + (f", safety {self.safety.name} below {self.threshold:g}" if self.safety else "")

    def __call__(self, prompts: Sequence[PromptRow], answers: Sequence[Rollout]) -> None:
        """Gives each answer its score and its parts; prompts are those of the answers, one for each."""
        if not answers:
            return
        total = torch.zeros(len(answers), dtype=torch.float64)
        none = torch.ones(len(answers), dtype=torch.bool)
        for source, name, weight in zip(self.sources, self._names, self.weights, strict=True):
            values = source(prompts, answers)
            for answer, value in zip(answers, values, strict=True):
                answer.parts[name] = value
            found = torch.tensor(values, dtype=torch.float64)
            none &= found.isnan()
            total += weight * found.nan_to_num(nan=0.0)  # as TRL: one that has no opinion does not count
        total[none] = math.nan
        if self.safety is not None:
            safe = self.safety(prompts, answers)
            for answer, value in zip(answers, safe, strict=True):
                answer.parts["safety"] = value
            tagged = torch.tensor([prompt.tagged for prompt in prompts])
            total = gated(total, torch.tensor(safe, dtype=torch.float64), tagged, self.threshold)
        for answer, value in zip(answers, total.tolist(), strict=True):
            answer.score = value
