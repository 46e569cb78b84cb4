"""Llama 2-Chat's recipe from end to end, on preferences whose true reward a program knows. 40 minutes on two cores.

    python examples/llama2_chat.py [MODEL] [OUT] [--quick]

Asked for one sentence in which somebody is asked something, an answer is worth 1 where it is polite ("please",
"thank"), 0.5 where it ends within 20 words, and -2 where it speaks of a dragon, the unsafe topic. The stages:
instruction tuning; a reward model and a safety model from rated pairs, some of them rated the wrong way round; two
rounds of rejection sampling, each tuned from the base; PPO. After each stage: true reward, reward-model score, unsafe
share, KL to the tuned model and win rate against it, on held-out prompts. A stage that is done is not done again;
--quick makes all of it small.
"""

import json
import math
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from llama2 import AutoModelForCausalLM, AutoTokenizer, LoraConfig, PPOConfig, TrainingArguments
from llama2.align.job import Alignment, AlignmentGoal
from llama2.align.policy import Item, PolicyGradient
from llama2.align.prompts import prompt_of
from llama2.align.rejection import ROWS, Rejection, Round
from llama2.align.rollout import Rollout, RolloutSampler, RolloutSettings, seed_of
from llama2.cli.loading import model_path
from llama2.scoring import Scorer
from llama2.train.distributed import Ranks
from llama2.train.finetune import Finetune, Recipe

QUICK = "--quick" in sys.argv
GIVEN = [word for word in sys.argv[1:] if word != "--quick"]
MODEL, OUT = (GIVEN + [model_path(None), "out-llama2-chat"][len(GIVEN) :])[:2]
FOLDER = Path(OUT)
WHO = ("a friend", "the teacher", "my sister", "a neighbour", "the driver", "the cook", "our guest", "a waiter",
       "the nurse", "my boss")  # fmt: skip
ACTS = ("open the window", "close the door", "bring some water", "wait for a minute", "call back later",
        "turn off the light", "read the letter", "carry the bag", "write the address down",
        "come to the party")  # fmt: skip
FRAMES = ("Write one short sentence asking {who} to {act}.", "Ask {who} to {act}, in one sentence.")
HELD_OUT = ACTS[:2]  # whole acts, so that nothing of them is seen
LONGEST = 28  # tokens of an answer
RATINGS = ((1.5, "significantly_better"), (1.0, "better"), (0.5, "slightly_better"), (-math.inf, "negligibly_better"))
ADAPTER = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
SIZES = {"sft": 400, "pairs": 900, "iterations": 25, "prompts": 32} if not QUICK else {
    "sft": 32, "pairs": 48, "iterations": 1, "prompts": 4}  # fmt: skip


# -- the true reward, and data that follows it -------------------------------------------------------------------


def polite(text: str) -> bool:
    """Whether an answer is polite."""
    return "please" in text.lower() or "thank" in text.lower()


def unsafe(text: str) -> bool:
    """Whether an answer speaks of the forbidden topic."""
    return "dragon" in text.lower()


def truth(text: str, ended: bool) -> float:
    """What an answer is worth."""
    return 1.0 * polite(text) + 0.5 * (ended and len(text.split()) <= 20) - 2.0 * unsafe(text)


def prompts(held_out: bool) -> list[dict[str, Any]]:
    """Chats that ask for a sentence."""
    acts = [act for act in ACTS if (act in HELD_OUT) == held_out]
    texts = [frame.format(who=who, act=act) for frame in FRAMES for act in acts for who in WHO]
    random.Random(1).shuffle(texts)
    return [{"prompt": [{"role": "user", "content": text}]} for text in texts]


def synthetic(prompt: str, rng: random.Random) -> str:
    """An answer of the kinds that there are: polite 40 %, short 50 %, with a dragon 15 %."""
    act = next(act for act in ACTS if act in prompt)
    text = f"Could you {act}" if rng.random() < 0.5 else f"I want you to {act}"
    if rng.random() < 0.4:
        text = f"Please, {text[0].lower()}{text[1:]}" if rng.random() < 0.5 else f"{text}, thank you"
    if rng.random() < 0.15:
        text += " before the dragon comes"
    if rng.random() < 0.5:
        text += (" because it is getting late and there is so much more to do today that nobody can say how long it"
                 " will take us all to be ready")  # fmt: skip
    return text + "."


def pairs(count: int, rng: random.Random) -> list[dict[str, Any]]:
    """Rated pairs; the smaller the difference the more often the label is wrong."""
    rows = []
    asked = prompts(held_out=False)
    while len(rows) < count:
        prompt = asked[len(rows) % len(asked)]["prompt"]
        one, two = synthetic(prompt[0]["content"], rng), synthetic(prompt[0]["content"], rng)
        if one == two:
            continue
        gap = truth(one, True) - truth(two, True)
        chosen, rejected = (one, two) if rng.random() < 1 / (1 + math.exp(-gap / 0.5)) else (two, one)
        rating = next(name for least, name in RATINGS if abs(gap) >= least)
        rows.append({"prompt": prompt, "chosen": [{"role": "assistant", "content": chosen}],
                     "rejected": [{"role": "assistant", "content": rejected}], "rating": rating,
                     "chosen_safe": not unsafe(chosen), "rejected_safe": not unsafe(rejected)})  # fmt: skip
    return rows


def safety_pairs(count: int, rng: random.Random) -> list[dict[str, Any]]:
    """Pairs of which one answer is safe: what the safety model learns from."""
    rows = [row for row in pairs(8 * count, rng) if row["chosen_safe"] != row["rejected_safe"]]
    for row in rows:
        if row["rejected_safe"]:
            row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
            row["chosen_safe"], row["rejected_safe"] = True, False
        row["rating"] = "significantly_better"
    return rows[:count]


def write(name: str, rows: Sequence[dict[str, Any]]) -> str:
    """Rows as a file of the example's folder."""
    path = FOLDER / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


# -- stages ------------------------------------------------------------------------------------------------------


def done(name: str) -> bool:
    """Whether a stage has left its result."""
    return any((FOLDER / name / file).exists() for file in ("model.safetensors", "rejection.json"))


def tune(name: str, rows: Sequence[dict[str, Any]], task: str = "sft", model: str = MODEL, rate: float = 1e-3) -> str:
    """Trains a stage from rows: an adapter, merged into the model."""
    out = str(FOLDER / name)
    if not done(name):
        recipe = Recipe(task=task, model=model, data=write(f"{name}.jsonl", rows), output_dir=out, lora=ADAPTER,
                        merge=True, dtype="bfloat16", max_length=256,
                        eval_split=0.1 if task == "reward" else None)  # fmt: skip
        args = TrainingArguments(out, per_device_train_batch_size=16, num_train_epochs=2 if task == "sft" else 1,
                                 learning_rate=rate, lr_scheduler_type="cosine", warmup_steps=5, seed=0,
                                 resume_from_checkpoint=(FOLDER / name).exists())  # fmt: skip
        result = Finetune(recipe, args, lambda _: None).run()
        if not result.finished:
            raise SystemExit(f"{name} was stopped at step {result.step}; start the example again to go on")
        for line in result.lines:
            print(f"  {name}: {line}")
    return out


def reject(name: str, policy: str, rewards: str, safety: str, pool: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    """A round of rejection sampling; its rows."""
    out = FOLDER / name
    if not done(name):
        asked = prompts(held_out=False)[: 2 * SIZES["prompts"]]
        settings = Round(policy=policy, prompts=write(f"{name}-prompts.jsonl", asked), output_dir=str(out),
                         pool=pool, rewards=(rewards,), safety=safety, count=8, max_new_tokens=LONGEST,
                         dtype="bfloat16")  # fmt: skip
        for line in Rejection(settings, resume=out.exists()).run().lines():
            print(f"  {name}: {line}")
    return [json.loads(line) for line in (out / ROWS).read_text().splitlines()]


def improve(name: str, policy: str, rewards: str, safety: str) -> str:
    """PPO, as the paper has it."""
    out = str(FOLDER / name)
    if not done(name):
        recipe = Recipe(task="sft", model=policy, data=write(f"{name}-prompts.jsonl", prompts(held_out=False)),
                        output_dir=out, lora=ADAPTER, merge=True, dtype="bfloat16")  # fmt: skip
        size = SIZES["prompts"] * 4
        config = PPOConfig(
            out, per_device_train_batch_size=8, gradient_accumulation_steps=size // 8, num_generations=4,
            num_mini_batches=2, num_ppo_epochs=1, max_steps=2 * SIZES["iterations"], learning_rate=3e-4,
            lr_scheduler_type="constant_with_warmup", warmup_steps=5, adam_beta2=0.95, adam_epsilon=1e-5, kl_coef=0.03,
            whiten_scores=True, critic_warmup=min(3, SIZES["iterations"] - 1), temperature=1.0, seed=0,
            max_completion_length=LONGEST, cliprange_value=None, missing_eos_penalty=1.0, logging_steps=2,
            save_steps=10, resume_from_checkpoint=Path(out).exists(),
        )  # fmt: skip
        Alignment(AlignmentGoal(method="ppo", rewards=(rewards,), safety=safety), recipe, config, lambda _: None).run()
    return out


# -- measuring ---------------------------------------------------------------------------------------------------


def answers(policy: str) -> tuple[Any, list[Rollout]]:
    """One answer to each held-out prompt, several times over."""
    tokenizer = AutoTokenizer.from_pretrained(policy)
    model = AutoModelForCausalLM.from_pretrained(policy, dtype=torch.bfloat16)
    rows = [prompt_of(row, tokenizer) for row in prompts(held_out=True)]
    sampler = RolloutSampler(model, tokenizer, RolloutSettings(max_new_tokens=LONGEST), Ranks())
    repeats = 1 if QUICK else 4
    groups = sampler([(i, row.ids) for i, row in enumerate(rows)], [[seed_of("held out", i, k) for k in range(repeats)]
                     for i in range(len(rows))])  # fmt: skip
    return model, [answer for group in groups for answer in group]


@torch.no_grad()
def divergence(model: Any, start: Any, said: Sequence[Rollout]) -> float:
    """The mean of log p - log p of the start, of whole answers: KL in nats."""
    objective, total = PolicyGradient(), 0.0
    for begin in range(0, len(said), 16):
        items = [Item(a.prompt_ids, a.ids, torch.zeros(len(a.ids))) for a in said[begin : begin + 16]]
        batch = objective.collate(items)
        total += float((objective.log_probs(model, batch)[0] - objective.log_probs(start, batch)[0]).double().sum())
    return total / len(said)


class Table:
    """What held-out prompts say after each stage."""

    def __init__(self, start: str, rewards: str) -> None:
        self.scorer = Scorer(*_reward_model(rewards))
        self.start, first = answers(start)
        self.before = [truth(a.text, a.ended) for a in first]
        print(f"{'stage':<12}{'true reward':>18}{'score':>9}{'unsafe':>9}{'KL':>8}{'wins':>8}")
        self.row("tuned", self.start, first)

    def add(self, name: str, policy: str) -> float:
        """Measures a stage; its true reward."""
        return self.row(name, *answers(policy))

    def row(self, name: str, model: Any, said: Sequence[Rollout]) -> float:
        """Prints a line."""
        real = [truth(a.text, a.ended) for a in said]
        mean = sum(real) / len(real)
        error = math.sqrt(sum((r - mean) ** 2 for r in real) / (len(real) - 1) / len(real))
        asked = prompts(held_out=True)
        rows = [{"messages": [*asked[a.row]["prompt"], {"role": "assistant", "content": a.text}]} for a in said]
        score = sum(rewards[0] for rewards in self.scorer(rows)) / len(rows)
        wins = sum((r > b) + 0.5 * (r == b) for r, b in zip(real, self.before, strict=True)) / len(real)
        bad = sum(unsafe(a.text) for a in said) / len(said)
        kl = divergence(model, self.start, said)
        print(f"{name:<12}{mean:>9.3f} +- {error:.3f}{score:>10.3f}{bad:>9.1%}{kl:>8.2f}{wins:>8.1%}", flush=True)
        return mean


def _reward_model(folder: str) -> tuple[Any, Any]:
    from llama2 import AutoModelForSequenceClassification

    return AutoModelForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def main() -> None:
    """All stages, in order."""
    rng = random.Random(0)
    asked = prompts(held_out=False)
    chats = []
    for i in range(SIZES["sft"]):
        prompt = asked[i % len(asked)]["prompt"]
        chats.append({"messages": [*prompt, {"role": "assistant", "content": synthetic(prompt[0]["content"], rng)}]})
    tuned = tune("sft", chats)
    helpful = tune("reward", pairs(SIZES["pairs"], rng), "reward", tuned, 5e-4)
    safe = tune("safety", safety_pairs(SIZES["pairs"] // 3, rng), "reward", tuned, 5e-4)
    table = Table(tuned, helpful)
    policy, pool = tuned, tuple[str, ...]()
    for number in (1, 2):
        rows = reject(f"round{number}", policy, helpful, safe, pool)
        pool = (*pool, str(FOLDER / f"round{number}"))
        policy = tune(f"rejection{number}", [{"messages": row["messages"]} for row in rows] * 4)
        table.add(f"rejection {number}", policy)
    table.add("ppo", improve("ppo", policy, helpful, safe))


if __name__ == "__main__":
    main()
