"""One of several processes of tests/train/test_distributed.py: runs jobs one after another, and rank 0 keeps what came.

python ranks.py '[{"folder": ..., "kind": "plain", "dies": [rank, step], "arguments": {...}}, ...]'

The rank named by "tells" prints the number of each step before it logs, measures and saves.
"""

import json
import os
import signal
import sys
from glob import glob
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tiny import tiny_config, tiny_ids, tiny_model

from llama2 import LlamaForSequenceClassification, lora
from llama2.lora_config import LoraConfig
from llama2.train.answers import Preferences
from llama2.train.data import EncodedPair, Example
from llama2.train.distributed import join, shutdown
from llama2.train.objectives import Classification, NextToken, packed_rows
from llama2.train.trainer import Trainer, TrainingArguments

ROWS = 11  # no multiple of a step's rows, so that the last step of an epoch leaves a rank without any


class Hooked(Trainer):
    """Overrides a method of transformers', as users do."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)


def made(folder: Path, kind: str = "plain", **changes: Any) -> Trainer:
    """A run of a tiny model. Rows of different lengths, so that ranks have different numbers of targets."""
    given = {"per_device_train_batch_size": 2, "max_steps": 7, "learning_rate": 1e-3, "logging_steps": 1,
             "save_steps": 2, "max_grad_norm": 0.5, "eval_steps": 7, **changes}  # fmt: skip
    args = TrainingArguments(output_dir=str(folder), **given)
    texts = [tiny_ids(1, 4 + i % 5 * 3, seed=i)[0].tolist() for i in range(ROWS)]
    if kind == "classifier":
        torch.manual_seed(0)
        model = LlamaForSequenceClassification(tiny_config(num_labels=2, pad_token_id=0))
        return Trainer(
            model,
            args,
            objective=Classification(),
            rows=(rows := [(ids, i % 2) for i, ids in enumerate(texts)]),
            eval_rows=rows[:3],
        )
    model = tiny_model(torch.float32, tie_word_embeddings=kind == "tied")
    if kind in ("lora", "dpo", "seeds"):
        torch.manual_seed(7 + (join().rank if kind == "seeds" else 0))
        lora.add_adapter(model, LoraConfig(r=2, target_modules="all-linear"))
    examples = [Example(ids, [-100, -100, *ids[2:]]) for ids in texts]
    if kind == "dpo":
        pairs = [EncodedPair(a, Example(a.input_ids[:-1], a.labels[:-1])) for a in examples]
        return Trainer(model, args, objective=Preferences(), rows=pairs, eval_rows=pairs[:3])
    rows = packed_rows(examples, None)
    chosen = Hooked if kind == "hooked" else Trainer
    return chosen(model, args, objective=NextToken(), rows=rows, eval_rows=rows[:3])


def run(job: dict[str, Any]) -> None:
    """One job; what came of it goes to result.safetensors and result.json of its folder."""
    folder, dies = Path(job["folder"]), job.get("dies")
    trainer = made(folder, job.get("kind", "plain"), **job.get("arguments", {}))
    first, after = trainer.ranks.restarts == 0, trainer._after

    def dying(entry: dict[str, float], tokens: int, seconds: float) -> None:
        if trainer.ranks.rank == job.get("tells"):
            print(trainer.state.step, flush=True)
        after(entry, tokens, seconds)
        if dies and first and [trainer.ranks.rank, trainer.state.step] == dies:
            os.kill(os.getpid(), signal.SIGKILL)
        if [trainer.ranks.rank, trainer.state.step] == job.get("stops"):
            os.kill(os.getpid(), signal.SIGTERM)

    trainer._after = dying  # type: ignore[method-assign]
    trainer.train()
    state = trainer.state
    with trainer.gathered():
        if trainer.ranks.first:
            tied = trainer.model.state_dict()
            save_file({name: t.detach().clone() for name, t in tied.items()}, folder / "result.safetensors")
            history = [entry for entry in state.history if "train_loss" not in entry]
            content = {"history": history, "step": state.step, "world": trainer.ranks.world,
                       "accumulation": trainer.args.gradient_accumulation_steps}  # fmt: skip
            (folder / "result.json").write_text(json.dumps(content))


if __name__ == "__main__":
    torch.set_num_threads(1)
    join()
    for wanted in json.loads(sys.argv[1]):
        run(wanted)
    shutdown()
    threads = [Path(name).read_text().strip() for name in glob("/proc/self/task/*/comm")]
    assert not [name for name in threads if "gloo" in name], threads  # they would outlive Python
