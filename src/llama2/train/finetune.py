"""From a model, a file of rows and a recipe to a folder that others load: what `llama2 finetune` runs.

    job = Finetune(Recipe(task="sft", model="path", data="rows.jsonl", output_dir="out", lora=LoraConfig(r=16)),
                   TrainingArguments(output_dir="out", max_steps=100))
    print(job.data.text())       # rows left out, by number, before the model is loaded
    result = job.run()           # result.before, result.after: losses of the rows that were held out

OUT holds the adapter (or the whole model) and the tokenizer, log.jsonl, loss.svg, finetune.json, and the checkpoints
that --resume goes on from.
"""

import errno
import json
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from llama2 import lora
from llama2.auto import AutoModelForCausalLM, AutoModelForSequenceClassification
from llama2.checkpoint.arguments import resolve_device
from llama2.checkpoint.load import head_follows
from llama2.checkpoint.peft import save_adapter
from llama2.checkpoint.peft_files import CONFIG as ADAPTER_CONFIG
from llama2.checkpoint.quantized import packed_layers
from llama2.checkpoint.source import revision_of
from llama2.errors import InputError
from llama2.files import locked, saving, write_text
from llama2.pretrained import PreTrainedModel
from llama2.protocols import TokenizerLike
from llama2.train import checkpoints
from llama2.train.chart import loss_chart
from llama2.train.data import Row, held_out, read, renamed
from llama2.train.distributed import join
from llama2.train.mixing import mixed, shares_of
from llama2.train.origin import Origin, check_device, check_place
from llama2.train.precomputed import with_reference
from llama2.train.recipe import LENGTH, Data, Recipe, TrainingResult
from llama2.train.samples import SampledAnswers, prompts_of_items
from llama2.train.tasks import Outcome, ScoreHead
from llama2.train.trainer import Trainer, TrainingArguments

__all__ = ["LENGTH", "Data", "Finetune", "Recipe", "TrainingResult"]

SUMMARY, CHART = "finetune.json", "loss.svg"
# What a run would replace, or what would be taken for a part of its result.
_WRITTEN = ("*.safetensors", "*.bin", "*.gguf", ADAPTER_CONFIG, "config.json", "tokenizer*", SUMMARY, CHART)


class Finetune:
    """One job. `data` is read and checked when the job is made, the model is loaded by `run`."""

    summary = SUMMARY  # the file that says what came of the run

    def __init__(self, recipe: Recipe, args: TrainingArguments, tell: Callable[[str], None] | None = None) -> None:
        """tell: receives the findings on the rows (`data.text()`) and how the model is computed; without it a warning
        says where answers are cut. Raises InputError for whatever can be known to be wrong before a model is loaded."""
        self.recipe, self.task, self.args = recipe, recipe.of_task, args
        self.folder = Path(recipe.output_dir)
        self.ranks = join()
        self.device = self.ranks.device(recipe.device)
        args.use_cpu = args.use_cpu or recipe.device == "cpu"
        if self.ranks.restarts and not args.resume_from_checkpoint:
            args.resume_from_checkpoint = True
        self._check_folder()
        place = check_device("cpu" if args.fsdp else self.device, args.fp16 and not args.fsdp)
        self.origin = Origin(recipe)
        self.dtype, said = self.origin.dtype(place, args.bf16)
        self.tokenizer = self._tokenizer()
        self.data = self._data()
        self.tell = tell
        if recipe.samples_every and (args.fsdp or self.task.head(self.data.learnt) is not None):
            raise InputError("samples_every needs a language model whose weights are whole; leave it, or fsdp, out")
        if recipe.samples_every:
            prompts_of_items(self.data.eval_items or self.data.items)
        if self.ranks.first:
            self._tell(tell, said)

    def _tell(self, tell: Callable[[str], None] | None, said: str) -> None:
        if tell is not None:
            tell("\n".join([self.data.text(), said]).rstrip())
        elif lines := [*self.data.cuts(), *([said] if said else [])]:
            warnings.warn(f"{self.recipe.data}: {'; '.join(lines)}", stacklevel=3)

    def _check_folder(self) -> None:
        there = checkpoints.found(Path(self.args.output_dir))
        if there and not self.args.resume_from_checkpoint:
            raise InputError(
                f"{self.args.output_dir} holds {there[-1].name} of an earlier run; go on from it (--resume, "
                "resume_from_checkpoint=True) or give another folder"
            )
        check_place(self.folder)
        check_place(Path(self.args.output_dir or self.folder))
        if Path(self.recipe.model).exists() and Path(self.recipe.model).resolve() == self.folder.resolve():
            raise InputError(f"{self.folder} is the model itself, which would be overwritten; give a new folder")
        held = [path.name for pattern in _WRITTEN for path in sorted(self.folder.glob(pattern))]
        ours = self.args.resume_from_checkpoint and (there or (self.folder / self.summary).exists())
        if held and not ours:
            raise InputError(f"{self.folder} holds {held[0]} already, of a model or another run; give a new folder")

    def _tokenizer(self) -> TokenizerLike:
        tokenizer = self.origin.tokenizer()
        if self.task.chat_template is not None:
            tokenizer.chat_template = self.task.chat_template
        return tokenizer

    # -- rows ----------------------------------------------------------------------------------------------------

    def _data(self) -> Data:
        recipe = self.recipe
        context = self.origin.config.max_position_embeddings
        length = min(LENGTH, context) if recipe.max_length is None else recipe.max_length
        if length > context:
            raise InputError(f"max_length is {length}, beyond the model's context of {context}; lower it")
        rows, rest, mixture = self._rows()
        learnt = self.task.learnt_of(rows)
        items, report = self.task.items(rows, self.tokenizer, length, learnt)
        if not items:
            raise InputError(f"no row of {recipe.data} can be used. {report.text()}")
        data = Data(items, report, mixture=mixture, learnt=learnt)
        if rest:
            data.eval_items, data.eval_report = self.task.items(rest, self.tokenizer, length, learnt)
            if not data.eval_items:
                raise InputError(f"no row that is held out can be used. {data.eval_report.text()}")
        return data

    def _rows(self) -> tuple[list[Row], list[Row], list[str]]:
        """The rows to train on, mixed, those to measure on, and a line on each further data set."""
        recipe, seed = self.recipe, self.args.seed
        rest = [] if recipe.eval_data is None else self._read(recipe.eval_data)

        def parted(rows: list[Row]) -> list[Row]:
            if recipe.eval_split is None:
                return rows
            kept, out = held_out(rows, recipe.eval_split, seed)
            rest.extend(out)
            return kept

        rows = parted(self._read(recipe.data))
        others = [(name, share, parted(self._read(name))) for name, share in shares_of(recipe.mix)]
        found, lines = mixed(rows, others, seed)
        return found, rest, lines

    def _read(self, source: str) -> list[Row]:
        recipe = self.recipe
        beside = source != recipe.data and Path(source).exists()  # a file to measure on, for a data set of the hub
        where = (None, None) if beside else (recipe.data_config, recipe.data_dir)
        named = {name: column for name, column in self.task.own_columns().items() if column}
        return renamed(read(source, recipe.split, *where), {**recipe.columns, **named})

    # -- the model -----------------------------------------------------------------------------------------------

    def _model(self) -> PreTrainedModel:
        recipe, head = self.recipe, self.task.head(self.data.learnt)
        torch.manual_seed(self.args.seed)  # for the fresh weights of a head, an adapter or a model
        if self.task.fresh:
            return AutoModelForCausalLM.from_config(self.origin.config, dtype="float32").to(self._place())
        settings: dict[str, Any] = {"dtype": self.dtype, "device_map": str(self._place())}
        settings |= revision_of(recipe.model, recipe.revision)
        if self.origin.lora is not None:
            settings["dequantize"] = False  # a GGUF file's blocks stay beneath an adapter
        if self.origin.packing is not None:
            settings["quantization_config"] = self.origin.packing_in(self.dtype)
        if head is None:
            return AutoModelForCausalLM.from_pretrained(recipe.model, **settings)
        return self._classifier(head, settings)

    def _classifier(self, head: ScoreHead, settings: dict[str, Any]) -> PreTrainedModel:
        names = dict(enumerate(head.names))
        settings |= {"id2label": names, "label2id": {name: i for i, name in names.items()}}
        with head_follows():
            model = AutoModelForSequenceClassification.from_pretrained(
                self.recipe.model, problem_type=head.problem_type, **settings
            )
        self._set_pad(model)
        return model

    def _place(self) -> torch.device:
        if self.args.fsdp:  # the GPU has room for a part alone
            return torch.device("cpu")
        return resolve_device(self.device)

    def _set_pad(self, model: PreTrainedModel) -> None:
        """A saved classifier names the token that others pad with."""
        tokenizer = self.tokenizer
        if self.task.pads_apart and tokenizer.pad_token in (None, tokenizer.eos_token):
            ends = (tokenizer.eos_token, tokenizer.bos_token)
            special = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
            others = (token for token in (tokenizer.unk_token, *reversed(special)) if token not in (None, *ends))
            tokenizer.pad_token = next(others, tokenizer.pad_token)
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        model.config.pad_token_id = tokenizer.pad_token_id

    def loaded(self) -> PreTrainedModel:
        """The model as it is trained: with its new adapter or head."""
        model = self._model()
        if self.recipe.lora is not None:
            lora.add_adapter(model, self.recipe.lora)
        if self.origin.lora is not None and hasattr(model, "score"):
            model.score.requires_grad_(True)
        return model

    def trainer(self, model: PreTrainedModel, report: Callable[[dict[str, Any]], None] | None = None) -> Trainer:
        """A trainer of this job over a model that `loaded` gave; its checkpoints hold no files for others."""
        return self._trainer(model, None, report)

    # -- the run -------------------------------------------------------------------------------------------------

    def run(self, report: Callable[[dict[str, Any]], None] | None = None) -> TrainingResult:
        """Trains to the end, or to a signal, which leaves a checkpoint. report: called after every step.

        Raises InputError where the disk is full, with what is kept, and where another process writes into the folder.
        """
        with ExitStack() as stack:
            self.ranks.broadcast(lambda: stack.enter_context(locked(self.folder)))
            return self._run(report)

    def _trainer(
        self,
        model: PreTrainedModel,
        save: Callable[[Path], Any] | None,
        report: Callable[[dict[str, Any]], None] | None,
    ) -> Trainer:
        """The trainer of this job over a model that is loaded."""
        objective = self.task.objective(self.data.items)
        self._precompute(objective, model)
        return Trainer(
            model,
            self.args,
            objective=objective,
            rows=self.data.items,
            eval_rows=self.data.eval_items,
            save=save,
            report=report,
            callbacks=self._samples(),
        )

    def _samples(self) -> list[SampledAnswers]:
        """Answers to held-out prompts on the way, where the recipe asks for them."""
        if not self.recipe.samples_every:
            return []
        prompts = prompts_of_items(self.data.eval_items or self.data.items)
        return [SampledAnswers(prompts, self.recipe.samples_every, self.tokenizer, self.folder, self.tell)]

    def _run(self, report: Callable[[dict[str, Any]], None] | None) -> TrainingResult:
        begin, recipe, args = time.perf_counter(), self.recipe, self.args
        model = self.loaded()
        if self.data.eval_items and args.eval_strategy == "no":
            args.eval_strategy = "epoch"
        save = None if self.origin.lora is None else lambda folder: self._write_adapter(model, folder)
        trainer = self._trainer(model, save, report)
        if (least := min(self.task.least_warmup, trainer.steps // 2)) > args.get_warmup_steps(trainer.steps) > 0:
            args.warmup_steps = least
        try:
            trainer.train()
            state, finished = trainer.state, not trainer.interrupted
            outcome = Outcome()
            if finished:
                with trainer.gathered(every=self.origin.lora is None or recipe.merge):
                    if self.ranks.first:
                        outcome = self.task.report(model, self.data.eval_items, self.data.items)
                        self._write(model)
            result = TrainingResult(
                self.folder, finished, state.step, trainer.steps, time.perf_counter() - begin, state.tokens
            )
            measured = [_measured(entry) for entry in state.history if "eval_runtime" in entry]
            if measured:
                result.before, result.after = measured[0], measured[-1]
            if self.ranks.first:
                result.report, result.lines = outcome.values, outcome.lines
                self._summarise(result, state.history, outcome.files)
            self.ranks.wait()
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            kept = checkpoints.found(Path(args.output_dir))
            raise InputError(
                f"the disk of {self.folder} is full, so nothing could be saved; "
                + (f"{kept[-1].name} is kept: make room and go on with --resume" if kept else "make room and try again")
            ) from error
        return result

    def _precompute(self, objective: Any, model: PreTrainedModel) -> None:
        """Gives the items what the reference gives them, where the task asks for that."""
        if not getattr(objective, "precomputed", False):
            return
        data, size = self.data, self.args.per_device_train_batch_size
        sets = with_reference(objective, model, (data.items, data.eval_items), self.ranks, self.folder, size)
        data.items, data.eval_items = list(sets[0]), list(sets[1])

    def _write(self, model: PreTrainedModel) -> None:
        whole = self.origin.lora is None or self.recipe.merge
        if whole and self.origin.lora is not None:
            if packed_layers(model):
                model.dequantize()
            lora.merge(model)
        with saving(self.folder) as save:
            if whole:
                save.remove([ADAPTER_CONFIG])
                model.save_pretrained(save.stage)
            else:
                self._write_adapter(model, save.stage)
            self.tokenizer.save_pretrained(save.stage)

    def _write_adapter(self, model: PreTrainedModel, folder: Path) -> None:
        assert self.origin.lora is not None
        base = Path(self.origin.base)
        name = str(base.resolve()) if base.exists() else self.origin.base
        written = replace(self.origin.lora, base_model_name_or_path=name, revision=self.origin.hub.get("revision"))
        save_adapter(model, folder, written)

    def _summarise(self, result: TrainingResult, history: Sequence[dict[str, Any]], files: Mapping[str, str]) -> None:
        content = {
            "recipe": asdict(self.recipe),
            "arguments": asdict(self.args),
            "data": {**vars(self.data.report), "kinds": dict(self.data.report.kinds)},
            "labels": self.data.learnt and asdict(self.data.learnt),
            "result": {**asdict(result), "folder": str(result.folder)},
        }
        with saving(self.folder) as save:
            write_text(save.stage / SUMMARY, json.dumps(content, indent=2, default=str) + "\n")
            if picture := loss_chart(history):
                write_text(save.stage / CHART, picture)
            for name, text in files.items():
                write_text(save.stage / name, text)


def _measured(entry: dict[str, Any]) -> dict[str, float]:
    speeds = ("eval_runtime", "eval_samples_per_second", "eval_steps_per_second")
    return {name: value for name, value in entry.items() if name.startswith("eval_") and name not in speeds}
