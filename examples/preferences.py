"""Direct preference optimisation with LoRA: a word rather than a lecture. 11 minutes on one busy core.

    python examples/preferences.py [MODEL] [OUT]

Asked to name a fruit, the model talks; what it says is the rejected answer, a word the preferred one. It is measured on
kinds of things that the training does not ask for.
"""

import json
import random
import sys
from pathlib import Path

from llama2 import AutoModelForCausalLM, AutoTokenizer, LoraConfig, TrainingArguments, lora, pipeline
from llama2.cli.loading import model_path
from llama2.train.finetune import Finetune, Recipe

MODEL, OUT = (sys.argv[1:] + [model_path(None), "out-preferences"][len(sys.argv) - 1 :])[:2]
SEEN = {"fruit": "Apple", "animal": "Horse", "colour": "Blue", "city": "Paris", "river": "Danube", "metal": "Copper",
        "tool": "Hammer", "language": "Spanish", "vegetable": "Carrot", "planet": "Saturn", "month": "March",
        "country": "Norway", "tree": "Oak", "bird": "Sparrow", "drink": "Tea", "flower": "Rose", "season": "Autumn",
        "mountain": "Kilimanjaro", "shape": "Circle", "sport": "Tennis"}  # fmt: skip
UNSEEN = {
    "insect": "Bee",
    "fish": "Salmon",
    "spice": "Pepper",
    "fabric": "Cotton",
    "ocean": "Atlantic",
    "game": "Chess",
}
ASK = ("Name a {}.", "Tell me one {}.", "Can you name a {}?", "Give me an example of a {}.")


def answers(model: object, prompts: list[str]) -> list[str]:
    """Greedy answers of at most 40 tokens."""
    answer = pipeline("text-generation", model, tokenizer=AutoTokenizer.from_pretrained(MODEL))
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    return [answer(chat, max_new_tokens=40, do_sample=False)[0]["generated_text"][-1]["content"] for chat in chats]


def pairs(model: object, words: dict[str, str], file: Path) -> list[str]:
    """Writes the pairs; returns the prompts."""
    asked = [(ask.format(kind), word) for kind, word in words.items() for ask in ASK]
    random.Random(0).shuffle(asked)
    prompts = [prompt for prompt, _ in asked]
    rows = [
        {"prompt": prompt, "chosen": [{"role": "assistant", "content": f"{word}."}],
         "rejected": [{"role": "assistant", "content": said}]}
        for (prompt, word), said in zip(asked, answers(model, prompts))
    ]  # fmt: skip
    file.write_text("\n".join(map(json.dumps, rows)))
    return prompts


Path(OUT).mkdir(parents=True, exist_ok=True)
train, held_out = Path(OUT, "train.jsonl"), Path(OUT, "held-out.jsonl")
base = AutoModelForCausalLM.from_pretrained(MODEL)
pairs(base, SEEN, train)
prompts = pairs(base, UNSEEN, held_out)[:12]
before = answers(base, prompts)

recipe = Recipe(task="dpo", model=MODEL, data=str(train), eval_data=str(held_out), output_dir=OUT, beta=0.1,
                lora=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))  # fmt: skip
args = TrainingArguments(output_dir=OUT, per_device_train_batch_size=4, max_steps=30, learning_rate=2e-4,
                         lr_scheduler_type="cosine", warmup_ratio=0.1, eval_on_start=True)  # fmt: skip
job = Finetune(recipe, args)
print(job.data.text())
result = job.run(lambda e: print(e["step"], *(f"{k} {e[k]:.3f}" for k in ("loss", "eval_loss") if k in e), flush=True))
tuned = AutoModelForCausalLM.from_pretrained(OUT)
lora.merge(tuned)  # the native engine runs plain weights
after = answers(tuned, prompts)
for name in ("eval_loss", "eval_rewards/accuracies", "eval_rewards/margins"):
    print(f"held out, {name.removeprefix('eval_')}: {result.before[name]:.3f} before, {result.after[name]:.3f} after")
for prompt, one, other in list(zip(prompts, before, after))[:3]:
    print(f"{prompt}  before: {one!r}  after: {other!r}")
lengths = [sum(map(len, said)) / len(said) for said in (before, after)]
print(f"characters of an answer: {lengths[0]:.0f} before, {lengths[1]:.0f} after; {result.seconds:.0f} s of training")
