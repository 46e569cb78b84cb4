"""What TRL's trainers of the interpreter that runs this file make of a model and rows, all weights trained.

    python by_trl.py JOB.json

JOB: {"folder": a language model, "scores": a sequence classifier, "runs": {name: [trainer, arguments of its
configuration, rows]}, "reads": {name: folder of a reward model}, "ids": rows of token ids, "out": a file}. OUT: the
losses of the steps by name of the run, and by name of the folder the logits of transformers' sequence classifier for
the ids, padded with the configuration's pad token. Knows nothing of this library.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl import KTOConfig, KTOTrainer, RewardConfig, RewardTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

TRAINERS = {"kto": (KTOTrainer, KTOConfig), "orpo": (ORPOTrainer, ORPOConfig), "cpo": (CPOTrainer, CPOConfig),
            "reward": (RewardTrainer, RewardConfig)}  # fmt: skip


def trained(kind: str, folder: str, settings: dict[str, Any], rows: Any) -> list[float]:
    """The losses of the steps."""
    trainer_class, config = TRAINERS[kind]
    scores = kind == "reward"
    load = AutoModelForSequenceClassification if scores else AutoModelForCausalLM
    model = load.from_pretrained(folder, dtype=torch.float32)
    with tempfile.TemporaryDirectory() as out:
        trainer = trainer_class(
            model=model,
            args=config(output_dir=out, **settings),
            train_dataset=Dataset.from_list(rows),
            processing_class=AutoTokenizer.from_pretrained(folder),
        )
        trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    found: dict[str, Any] = {}
    for name, (kind, settings, rows) in job["runs"].items():
        found[name] = trained(kind, job["scores" if kind == "reward" else "folder"], settings, rows)
    for name, folder in job["reads"].items():
        model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
        longest, pad = max(map(len, job["ids"])), model.config.pad_token_id
        ids = torch.tensor([[*row, *[pad] * (longest - len(row))] for row in job["ids"]])
        with torch.no_grad():
            found[name] = model(ids).logits[:, 0].tolist()
    Path(job["out"]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
