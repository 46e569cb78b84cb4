"""Answers of the model in training, beside its losses: what the figures mean.

OUT/samples.jsonl holds a line per prompt and time: {"step", "prompt", "answer", "wanted"}. Answers are greedy, so that
a resumed run writes what a straight one does.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from llama2.errors import InputError
from llama2.files import appending, replacing
from llama2.protocols import TokenizerLike
from llama2.train.arguments import TrainingArguments
from llama2.train.callbacks import TrainerCallback, TrainerControl, TrainerState
from llama2.train.data import IGNORED

FILE = "samples.jsonl"
COUNT, NEW_TOKENS = 4, 64


class SamplePrompt(NamedTuple):
    """A prompt's ids, and those of the answer that the row holds."""

    ids: list[int]
    wanted: list[int]


def prompts_of_items(items: Sequence[Any], most: int = COUNT) -> list[SamplePrompt]:
    """The prompts of the first items whose answers have one: of packed rows that of their first document.

    Raises InputError where none has: a text of which every token is learnt, or a classifier's.
    """
    found = [prompt for prompt in map(_prompt, items[: 50 * most]) if prompt is not None][:most]
    if not found:
        raise InputError(
            "samples_every needs rows with a prompt, and these have none (every token is learnt, or none is "
            "written); leave it out"
        )
    return found


def _prompt(item: object) -> SamplePrompt | None:
    example = getattr(item, "chosen", None) or getattr(item, "example", None) or item
    ids, labels = getattr(example, "input_ids", None), getattr(example, "labels", None)
    if ids is None or labels is None:
        bare = getattr(item, "ids", None)  # a prompt that rewards alone judge the answers of
        return None if not bare else SamplePrompt(list(bare), [])
    start = next((i for i, label in enumerate(labels) if label != IGNORED), len(labels))
    if not 1 < start < len(labels):  # a first token has no target anyhow
        return None
    end = next((i for i in range(start, len(labels)) if labels[i] == IGNORED), len(labels))
    return SamplePrompt(list(ids[:start]), list(ids[start:end]))


class SampledAnswers(TrainerCallback):
    """Answers every `every` steps, before the first one and after the last. heard: called for each."""

    def __init__(
        self,
        prompts: Sequence[SamplePrompt],
        every: int,
        tokenizer: TokenizerLike,
        folder: Path,
        heard: Callable[[str], None] | None = None,
    ) -> None:
        self._prompts, self._every, self._tokenizer, self._heard = prompts, every, tokenizer, heard
        self._file, self._last = folder / FILE, -1

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: object
    ) -> None:
        """Before the first step; lines of steps that are taken again are dropped."""
        if not state.is_world_process_zero:
            return
        kept = lines_until(self._file, state.global_step)
        self._file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(self._file) as file:
            file.write("".join(kept).encode())
        if state.global_step == 0:
            self._answer(0, given["model"])
        self._last = state.global_step

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: object
    ) -> None:
        """Every so many steps."""
        if state.is_world_process_zero and state.global_step % self._every == 0:
            self._answer(state.global_step, given["model"])
            self._last = state.global_step

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: object
    ) -> None:
        """After the last step, if that was none of them."""
        ended = state.global_step >= state.max_steps
        if state.is_world_process_zero and ended and self._last != state.global_step:
            self._answer(state.global_step, given["model"])

    def _answer(self, step: int, model: object) -> None:
        lines = []
        for prompt, answer in zip(self._prompts, _answers(model, self._tokenizer, self._prompts), strict=True):
            said = {"prompt": prompt.ids, "answer": answer, "wanted": prompt.wanted}
            texts = {name: self._tokenizer.decode(ids, skip_special_tokens=True) for name, ids in said.items()}
            lines.append({"step": step, **texts})
        with appending(self._file) as file:
            file.writelines((json.dumps(line, ensure_ascii=False) + "\n").encode() for line in lines)
        if self._heard is not None:
            told = [f"step {step}: {line['prompt'][-60:]!r} -> {line['answer'][:120]!r}" for line in lines]
            self._heard("\n".join(told))


@torch.no_grad()
def _answers(model: Any, tokenizer: TokenizerLike, prompts: Sequence[SamplePrompt]) -> list[list[int]]:
    """Greedy answers. The model is in evaluation mode meanwhile, which lets the native engine read its weights."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    found = []
    try:
        for prompt in prompts:
            room = int(model.config.max_position_embeddings) - len(prompt.ids)
            ids = torch.tensor([prompt.ids], device=model.device)
            made = model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=max(1, min(NEW_TOKENS, room)),
                pad_token_id=tokenizer.eos_token_id,
            )  # fmt: skip
            found.append(made[0, len(prompt.ids) :].tolist())
    finally:
        for module in training:
            module.training = True
    return found


def lines_until(file: Path, step: int) -> list[str]:
    """The lines of a file up to a step, each with its "step"; what a crash left unfinished is dropped."""
    if step <= 0 or not file.is_file():
        return []
    kept = []
    for line in file.read_text(encoding="utf-8").splitlines(keepends=True):
        try:
            if line.endswith("\n") and json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, LookupError, TypeError):
            continue
    return kept
