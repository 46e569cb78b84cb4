"""Instruction tuning with LoRA: sentences into records. 6 minutes on one busy core.

    python examples/instruction_tuning.py [MODEL] [OUT]

The model learns a notation that it has never seen, from 320 made-up sentences; names, things and colours of the
40 sentences it is measured on come in other combinations.
"""

import json
import random
import sys
from pathlib import Path

from llama2 import AutoModelForCausalLM, AutoTokenizer, LoraConfig, TrainingArguments, lora, pipeline
from llama2.cli.loading import model_path
from llama2.train.finetune import Finetune, Recipe

MODEL, OUT = (sys.argv[1:] + [model_path(None), "out-instruction"][len(sys.argv) - 1 :])[:2]
NAMES = ("Anna", "Bert", "Clara", "David", "Edda", "Frank", "Greta", "Hans")
THINGS = ("apples", "chairs", "lamps", "books", "cups", "shirts", "pens", "boxes")
COLOURS = ("red", "blue", "green", "white", "black", "yellow")


def row(draw: random.Random) -> dict[str, list[dict[str, str]]]:
    name, thing, colour, count = (draw.choice(x) for x in (NAMES, THINGS, COLOURS, range(2, 30)))
    sentence = draw.choice((f"{name} bought {count} {colour} {thing}.", f"{name} has {count} {thing}, all {colour}."))
    answer = f"{thing}/{colour} x{count} @{name.lower()}"
    return {"messages": [{"role": "user", "content": sentence}, {"role": "assistant", "content": answer}]}


def share_right(model: object, rows: list[dict[str, list[dict[str, str]]]]) -> float:
    """How many greedy answers are the wanted ones."""
    answer = pipeline("text-generation", model, tokenizer=AutoTokenizer.from_pretrained(MODEL))
    found = [answer(r["messages"][:1], max_new_tokens=24, do_sample=False)[0]["generated_text"][-1] for r in rows]
    return sum(f["content"].strip() == r["messages"][1]["content"] for f, r in zip(found, rows)) / len(rows)


draw = random.Random(0)
rows = list({json.dumps(row(draw)): None for _ in range(400)})[:360]
Path(OUT).mkdir(parents=True, exist_ok=True)
train, held_out = Path(OUT, "train.jsonl"), Path(OUT, "held-out.jsonl")
train.write_text("\n".join(rows[40:]))
held_out.write_text("\n".join(rows[:40]))
wanted = [json.loads(line) for line in rows[:20]]

recipe = Recipe(task="sft", model=MODEL, data=str(train), eval_data=str(held_out), output_dir=OUT,
                lora=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))  # fmt: skip
args = TrainingArguments(output_dir=OUT, per_device_train_batch_size=8, num_train_epochs=1, learning_rate=1e-3,
                         lr_scheduler_type="cosine", warmup_ratio=0.1, eval_on_start=True)  # fmt: skip
job = Finetune(recipe, args)
print(job.data.text())
before = share_right(AutoModelForCausalLM.from_pretrained(MODEL), wanted)
result = job.run(lambda e: print(e["step"], *(f"{k} {e[k]:.3f}" for k in ("loss", "eval_loss") if k in e), flush=True))
tuned = AutoModelForCausalLM.from_pretrained(OUT)
lora.merge(tuned)  # the native engine runs plain weights
print(f"held-out loss {result.before['eval_loss']:.3f} before, {result.after['eval_loss']:.3f} after")
print(f"right answers {before:.0%} before, {share_right(tuned, wanted):.0%} after; {result.seconds:.0f} s of training")
