"""A text classifier with LoRA: what a customer writes about. 2 minutes on one busy core.

    python examples/text_classifier.py [MODEL] [OUT]

Three kinds of letters are made from parts; the 48 letters that it is measured on speak of things that no letter of the
training names, so that words alone do not give the label away.
"""

import json
import random
import sys
from pathlib import Path

from llama2 import AutoModelForSequenceClassification, AutoTokenizer, LoraConfig, TrainingArguments, pipeline
from llama2.cli.loading import model_path
from llama2.train.finetune import Finetune, Recipe

MODEL, OUT = (sys.argv[1:] + [model_path(None), "out-classifier"][len(sys.argv) - 1 :])[:2]
OPENINGS = ("Hello, ", "Good morning. ", "Dear team, ", "", "To whom it may concern: ")
SEEN = ("lamp", "chair", "jacket", "kettle", "bicycle", "radio", "clock", "desk")
UNSEEN = ("piano", "tent", "mirror", "printer", "carpet", "telescope")
LETTERS = {
    "payment": ("I was charged twice for the {}", "the price of the {} on my bill is wrong", "please give me my money "
                "back for the {}", "my card was declined when I ordered the {}"),
    "delivery": ("the {} has not arrived yet", "the parcel with the {} went to my neighbour", "can you bring the {} on "
                 "Friday instead", "where is the {} that I ordered last week"),
    "fault": ("the {} broke after two days", "a part of the {} is missing", "the {} makes a strange noise",
              "I cannot switch the {} on"),
}  # fmt: skip


def letters(things: tuple[str, ...], count: int, seed: int) -> list[str]:
    draw, made = random.Random(seed), dict[str, None]()
    while len(made) < count:
        label = draw.choice(list(LETTERS))
        text = draw.choice(OPENINGS) + draw.choice(LETTERS[label]).format(draw.choice(things)) + draw.choice(".!")
        made[json.dumps({"letter": text, "about": label})] = None
    return list(made)


Path(OUT).mkdir(parents=True, exist_ok=True)
train, held_out = Path(OUT, "train.jsonl"), Path(OUT, "held-out.jsonl")
train.write_text("\n".join(letters(SEEN, 320, 0)))
held_out.write_text("\n".join(letters(UNSEEN, 48, 1)))

recipe = Recipe(task="classify", model=MODEL, data=str(train), eval_data=str(held_out), output_dir=OUT,
                text_column="letter", label_column="about", lora=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))  # fmt: skip  # noqa: E501
args = TrainingArguments(output_dir=OUT, per_device_train_batch_size=8, num_train_epochs=1, learning_rate=5e-4,
                         lr_scheduler_type="cosine", warmup_ratio=0.1, eval_on_start=True)  # fmt: skip
job = Finetune(recipe, args)
print(job.data.text())
result = job.run(lambda e: print(e["step"], *(f"{k} {e[k]:.3f}" for k in ("loss", "eval_loss") if k in e), flush=True))
for name, before in result.before.items():
    print(f"held out, {name.removeprefix('eval_')}: {before:.3f} before, {result.after[name]:.3f} after")
label = pipeline("text-classification", AutoModelForSequenceClassification.from_pretrained(OUT),
                 tokenizer=AutoTokenizer.from_pretrained(OUT))  # fmt: skip
for text in ("Hello, where is the harmonica that I ordered?", "The harmonica broke yesterday."):
    print(text, label(text))
print(f"{result.seconds:.0f} s of training; try: llama2 classify {OUT}")
