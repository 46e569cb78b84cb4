"""Direct preference optimisation with LoRA: short answers rather than long ones. About 4 minutes on two cores.

    python examples/preferences.py [MODEL] [OUT]

Of two right answers to a sum the shorter is preferred. The 24 sums that it is measured on are not among the training's.
"""

import json
import random
import sys
from pathlib import Path

from llama2 import AutoModelForCausalLM, AutoTokenizer, LoraConfig, TrainingArguments, lora, pipeline
from llama2.cli.loading import model_path
from llama2.train.finetune import Finetune, Recipe

MODEL, OUT = (sys.argv[1:] + [model_path(None), "out-preferences"][len(sys.argv) - 1 :])[:2]
LONG = ("That is a good question. If we take {a} and then add {b} to it, we see that the answer is {c}.",
        "To find the sum of {a} and {b}, we add the two numbers: {a} + {b} = {c}. So the sum is {c}.")  # fmt: skip


def row(a: int, b: int, draw: random.Random) -> str:
    prompt = draw.choice(("What is {a} plus {b}?", "How much is {a} and {b}?", "Add {a} and {b}.")).format(a=a, b=b)
    long = draw.choice(LONG).format(a=a, b=b, c=a + b)
    sides = {"chosen": f"{a + b}.", "rejected": long}
    return json.dumps({"prompt": prompt, **{k: [{"role": "assistant", "content": v}] for k, v in sides.items()}})


def mean_length(model: object, prompts: list[str]) -> float:
    """Characters of the greedy answers, of at most 60 tokens."""
    answer = pipeline("text-generation", model, tokenizer=AutoTokenizer.from_pretrained(MODEL))
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    found = [answer(chat, max_new_tokens=60, do_sample=False)[0]["generated_text"][-1]["content"] for chat in chats]
    return sum(map(len, found)) / len(found)


draw = random.Random(0)
sums = draw.sample([(a, b) for a in range(2, 20) for b in range(2, 20)], 144)
rows = [row(a, b, draw) for a, b in sums]
Path(OUT).mkdir(parents=True, exist_ok=True)
train, held_out = Path(OUT, "train.jsonl"), Path(OUT, "held-out.jsonl")
train.write_text("\n".join(rows[24:]))
held_out.write_text("\n".join(rows[:24]))
prompts = [json.loads(line)["prompt"] for line in rows[:12]]

recipe = Recipe(task="dpo", model=MODEL, data=str(train), eval_data=str(held_out), output_dir=OUT, beta=0.1,
                lora=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))  # fmt: skip
args = TrainingArguments(output_dir=OUT, per_device_train_batch_size=4, num_train_epochs=1, learning_rate=1e-4,
                         lr_scheduler_type="cosine", warmup_ratio=0.1, eval_on_start=True)  # fmt: skip
job = Finetune(recipe, args)
print(job.data.text())
before = mean_length(AutoModelForCausalLM.from_pretrained(MODEL), prompts)
result = job.run(lambda e: print(e["step"], *(f"{k} {e[k]:.3f}" for k in ("loss", "eval_loss") if k in e), flush=True))
tuned = AutoModelForCausalLM.from_pretrained(OUT)
lora.merge(tuned)  # the native engine runs plain weights
for name in ("eval_loss", "eval_rewards/accuracies", "eval_rewards/margins"):
    print(f"held out, {name.removeprefix('eval_')}: {result.before[name]:.3f} before, {result.after[name]:.3f} after")
after = mean_length(tuned, prompts)
print(f"characters of an answer: {before:.0f} before, {after:.0f} after; {result.seconds:.0f} s of training")
