"""Files written at the end of a run: measures, the state, and a model card."""

import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, SupportsFloat

from llama2.files import write_text
from llama2.protocols import CausalLM
from llama2.train.arguments import TrainingArguments
from llama2.train.callbacks import TrainerState
from llama2.train.distributed import Ranks

CARD, ALL = "README.md", "all_results.json"


class Results:
    """The part of a trainer that scripts call at their end."""

    args: TrainingArguments
    network: CausalLM
    ranks: Ranks
    state: TrainerState

    def log_metrics(self, split: str, metrics: Mapping[str, Any]) -> None:
        """Prints measures for people, on rank 0."""
        if self.ranks.first:
            shown = {name: _shown(name, value) for name, value in sorted(metrics.items())}
            width = max((len(name) for name in shown), default=0)
            print("\n".join([f"***** {split} metrics *****", *(f"  {k:<{width}} = {v}" for k, v in shown.items())]))

    def save_metrics(self, split: str, metrics: Mapping[str, Any], combined: bool = True) -> None:
        """Writes measures to SPLIT_results.json and, with combined, into all_results.json, of output_dir."""
        if not self.ranks.first:
            return
        folder = Path(self.args.output_dir)
        _write(folder / f"{split}_results.json", metrics)
        if combined:
            there = json.loads((folder / ALL).read_text()) if (folder / ALL).exists() else {}
            _write(folder / ALL, {**there, **metrics})

    def save_state(self) -> None:
        """Writes trainer_state.json to output_dir."""
        if self.ranks.first:
            Path(self.args.output_dir).mkdir(parents=True, exist_ok=True)
            self.state.save_to_json(Path(self.args.output_dir) / "trainer_state.json")

    def get_num_trainable_parameters(self) -> int:
        """Parameters that are trained."""
        return sum(p.numel() for p in self.network.parameters() if p.requires_grad)

    def create_model_card(
        self,
        language: str | Sequence[str] | None = None,
        license: str | None = None,
        tags: str | Sequence[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | Sequence[str] | None = None,
        dataset_tags: str | Sequence[str] | None = None,
        dataset: str | Sequence[str] | None = None,
        dataset_args: str | Sequence[str] | None = None,
    ) -> None:
        """Writes README.md to output_dir: what the hub reads of a model, the main arguments, the last measures."""
        if not self.ranks.first:
            return
        base = finetuned_from or getattr(self.network, "name_or_path", None) or None
        head = {"language": language, "license": license, "base_model": base, "tags": tags,
                "datasets": dataset_tags, "pipeline_tag": tasks}  # fmt: skip
        lines = ["---", *(f"{name}: {json.dumps(_plain(value))}" for name, value in head.items() if value), "---", ""]
        lines += [f"# {model_name or Path(self.args.output_dir).name}", ""]
        origin = f"Fine-tuned from {base}" if base else "Trained"
        lines += [f"{origin} on {', '.join(_listed(dataset)) or 'a data set that is not named'}.", ""]
        chosen = ("learning_rate", "per_device_train_batch_size", "gradient_accumulation_steps", "num_train_epochs",
                  "max_steps", "lr_scheduler_type", "warmup_steps", "optim", "seed")  # fmt: skip
        lines += ["## Arguments", "", *(f"- {name}: {getattr(self.args, name)}" for name in chosen), ""]
        measured = [entry for entry in self.state.log_history if any(name.startswith("eval_") for name in entry)]
        if measured:
            values = {name: value for name, value in measured[-1].items() if name.startswith("eval_")}
            lines += ["## Measured", "", *(f"- {name}: {value:.4g}" for name, value in values.items()), ""]
        write_text(Path(self.args.output_dir) / CARD, "\n".join(lines))


def _listed(value: str | Sequence[str] | None) -> list[str]:
    return [] if value is None else [value] if isinstance(value, str) else list(value)


def _plain(value: str | Iterable[str]) -> str | list[str]:
    return value if isinstance(value, str) else list(value)


def _shown(name: str, value: SupportsFloat | str) -> str:
    if name.endswith("_runtime"):
        return str(timedelta(seconds=round(float(value), 2)))
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def _write(path: Path, content: Mapping[str, Any]) -> None:
    write_text(path, json.dumps(dict(content), indent=4, sort_keys=True, default=float) + "\n")
