"""What peft and trl of the interpreter that runs this file make of models, adapters and rows.

    python by_peft.py JOB.json

JOB: {"ids": token ids (rows, tokens), "make": [[name, base folder, arguments of LoraConfig]], "read": [[name, base
folder, adapter folder, "causal" or "labels"]], "train": [[name, "sft" or "dpo", base folder, dtype of the weights,
arguments of LoraConfig, arguments of the trainer's configuration, rows]], "out": a folder}.
OUT/NAME is the adapter that was made (random), for `train` the fresh one that it began with, OUT/NAME-after the one
that it ended with; OUT/NAME.json the losses of the steps; OUT/logits.safetensors the logits by NAME. Knows nothing of
this library.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

CLASSES = {"causal": AutoModelForCausalLM, "labels": AutoModelForSequenceClassification}
TRAINERS = {"sft": (SFTTrainer, SFTConfig), "dpo": (DPOTrainer, DPOConfig)}


def made(folder: str, settings: dict[str, Any], target: Path) -> Any:
    """A model with a random adapter of these settings, which is saved."""
    base = CLASSES["labels" if settings.get("task_type") == "SEQ_CLS" else "causal"]
    model = get_peft_model(base.from_pretrained(folder, dtype=torch.float32), LoraConfig(**settings)).eval()
    torch.manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_magnitude" in name:
                parameter.mul_(1 + 0.2 * torch.rand_like(parameter))
            elif "lora_" in name or "modules_to_save" in name:
                parameter.normal_(0, 0.3)
    model.save_pretrained(target)
    return model


def trained(
    task: str, folder: str, dtype: str, lora: dict[str, Any], settings: dict[str, Any], rows: Any, out: Path
) -> list[float]:
    """The losses of the steps; the adapter before and after is saved."""
    trainer_class, config = TRAINERS[task]
    trainer = trainer_class(
        model=AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)),
        args=config(output_dir=str(out) + "-run", **settings),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(folder),
        peft_config=LoraConfig(**lora),
    )
    trainer.model.save_pretrained(out)
    trainer.train()
    trainer.model.save_pretrained(f"{out}-after")
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    out, ids, logits = Path(job["out"]), torch.tensor(job["ids"]), {}

    @torch.no_grad()
    def run(name: str, model: Any) -> None:
        logits[name] = model(ids).logits
        logits[f"{name}-float64"] = model.double()(ids).logits

    for name, folder, settings in job["make"]:
        run(name, made(folder, settings, out / name))
    for name, folder, adapter, kind in job["read"]:
        base = CLASSES[kind].from_pretrained(folder, dtype=torch.float32)
        run(name, PeftModel.from_pretrained(base, adapter).eval())
    save_file({name: value.contiguous() for name, value in logits.items()}, out / "logits.safetensors")
    for name, *how in job["train"]:
        losses = trained(*how, out / name)
        (out / f"{name}.json").write_text(json.dumps(losses))


if __name__ == "__main__":
    main()
