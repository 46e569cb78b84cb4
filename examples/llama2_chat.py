"""Llama 2-Chat's recipe from end to end, on preferences whose true reward a program knows. Minutes on two cores.

    python examples/llama2_chat.py [MODEL] [OUT] [--quick]

Asked to ask somebody something, an answer is worth 1 where it is polite ("please", "thank"), 0.5 where it has at most
12 words, and -2 where it speaks of a dragon, the unsafe topic. The stages are the commands of docs/alignment.md, and
are printed as one would type them: instruction tuning; a reward model from rated pairs, some of them rated the wrong
way round, and a safety model; two rounds of rejection sampling, each tuned from the base; PPO; Ghost Attention;
distillation. A table tells what held-out prompts say after each stage, and what was to be reached. A stage that is
done is not done again; --quick makes all of it small, and shows that it runs rather than that it works.
"""

import json
import math
import os
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

QUICK = "--quick" in sys.argv
GIVEN = [word for word in sys.argv[1:] if word != "--quick"]
OUT = Path(GIVEN[1] if len(GIVEN) > 1 else "out-llama2-chat")
WHO = ("a friend", "the teacher", "my sister", "a neighbour", "the driver", "the cook", "our guest", "a waiter",
       "the nurse", "my boss")  # fmt: skip
ACTS = ("open the window", "close the door", "bring some water", "wait for a minute", "call back later",
        "turn off the light", "read the letter", "carry the bag", "write a note", "come to the party",
        "feed the cat", "pay the bill")  # fmt: skip
HELD_OUT = ACTS[:3]  # whole acts, so that nothing of them is seen
ASK, INVITE = "Ask {who} to {act}.", "Ask {who} to {act}, and mention the dragon."
ORDERS = {"Start every answer with the word Ahoy.": "starts:Ahoy", "End every answer with the word over.": "ends:over",
          "Start every answer with the word Captain.": "starts:Captain"}  # fmt: skip
if QUICK:  # what a hardly tuned model obeys now and then
    ORDERS = {"Use the letter e.": "contains:e"}
RATINGS = ((1.5, "significantly_better"), (1.0, "better"), (0.5, "slightly_better"), (-math.inf, "negligibly_better"))
TEMPLATE = (  # SmolLM2's, without the system turn that it makes up
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ADAPTER = "--lora-r 16 --merge"
SHORT = "--max-new-tokens 32"
Row = dict[str, Any]


class Sizes(NamedTuple):
    """How much of everything."""

    tuned: int = 240
    pairs: int = 320
    held_out_pairs: int = 160
    prompts: int = 24
    iterations: int = 6
    dialogues: int = 16
    talks: int = 20
    answers: int = 2


SIZE = Sizes(24, 24, 16, 8, 2, 24, 6, 1) if QUICK else Sizes()


# -- the true reward, and data that follows it -------------------------------------------------------------------


def polite(text: str) -> bool:
    """Whether an answer is polite."""
    return "please" in text.lower() or "thank" in text.lower()


def dragon(text: str) -> bool:
    """Whether an answer speaks of the forbidden topic."""
    return "dragon" in text.lower()


def worth(text: str) -> float:
    """What an answer is worth."""
    return 1.0 * polite(text) + 0.5 * (len(text.split()) <= 12) - 2.0 * dragon(text)


def truth(completions: Sequence[Any]) -> list[float]:
    """The true reward, as `--reward llama2_chat:truth`."""
    return [worth(completion[-1]["content"]) for completion in completions]


def unsafe(completions: Sequence[Any]) -> list[float]:
    """1 for an unsafe answer, as `--reward llama2_chat:unsafe`."""
    return [float(dragon(completion[-1]["content"])) for completion in completions]


def asked(frame: str = ASK, held_out: bool = False) -> list[str]:
    """What users say."""
    texts = [frame.format(who=who, act=act) for act in ACTS for who in WHO if (act in HELD_OUT) == held_out]
    random.Random(1).shuffle(texts)
    return texts


def answer(prompt: str, rng: random.Random) -> str:
    """An answer as people write them: polite 40 %, short 50 %, with a dragon 30 %, or as the prompt wants it."""
    act = next(act for act in ACTS if act in prompt)
    text = f"Could you {act}" if rng.random() < 0.5 else f"I want you to {act}"
    if rng.random() < 0.4:
        text = f"Please, {text[0].lower()}{text[1:]}" if rng.random() < 0.5 else f"{text}, thank you"
    if rng.random() < (0.9 if "dragon" in prompt else 0.3):
        text += " before the dragon comes"
    if rng.random() < 0.5:
        text += " because it is late and there is so much more to do today"
    return f"{text}."


def said(prompt: str, reply: str) -> list[Row]:
    """A chat of one turn."""
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": reply}]


def chats(count: int, rng: random.Random) -> list[Row]:
    """Rows to tune on: plain ones, some that ask for a dragon, some with an instruction for the answer's form."""
    plain, invited, rows = asked(), asked(INVITE), list[Row]()
    for i in range(count):
        prompt = invited[i % len(invited)] if i % 6 == 0 else plain[i % len(plain)]
        text = answer(prompt, rng)
        if i % 3 == 1:
            order = rng.choice(list(ORDERS))
            word = ORDERS[order].partition(":")[2]
            text = f"{text[:-1]}, {word}." if word == "over" else f"{word}, {text[0].lower()}{text[1:]}"
            prompt = f"{order}\n\n{prompt}"
        rows.append({"messages": said(prompt, text)})
    return rows


def pairs(count: int, rng: random.Random, held_out: bool = False) -> list[Row]:
    """Rated pairs; the smaller the difference the more often the label is wrong."""
    rows, prompts = list[Row](), asked(held_out=held_out) + asked(INVITE, held_out)
    while len(rows) < count:
        prompt = prompts[len(rows) % len(prompts)]
        one, two = answer(prompt, rng), answer(prompt, rng)
        if one == two:
            continue
        gap = worth(one) - worth(two)
        if rng.random() > 1 / (1 + math.exp(-gap / 0.5)):
            one, two = two, one
        rating = next(name for least, name in RATINGS if abs(gap) >= least)
        rows.append({"prompt": said(prompt, "")[:1], "chosen": said("", one)[1:], "rejected": said("", two)[1:],
                     "rating": rating, "chosen_safe": not dragon(one), "rejected_safe": not dragon(two)})  # fmt: skip
    return rows


def safety_pairs(count: int, rng: random.Random) -> list[Row]:
    """Pairs of which one answer is safe, which is the chosen one."""
    rows = [row for row in pairs(6 * count, rng) if row["chosen_safe"] != row["rejected_safe"]][:count]
    for row in rows:
        row["rating"] = "significantly_better"
        if row["rejected_safe"]:
            row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
            row["chosen_safe"], row["rejected_safe"] = True, False
    return rows


# -- the commands ------------------------------------------------------------------------------------------------


def file(name: str, rows: Sequence[Row]) -> str:
    """Rows as a file of the example's folder."""
    path = OUT / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def prompt_file(name: str, texts: Sequence[str]) -> str:
    """Prompts as a file."""
    return file(name, [{"prompt": [{"role": "user", "content": text}]} for text in texts])


def read(name: str) -> list[Row]:
    """The rows that a stage has written."""
    return [json.loads(line) for line in (OUT / name).read_text().splitlines()]


def base_model() -> str:
    """SmolLM2, or the model that is given, as a folder with a template that adds nothing."""
    from llama2 import AutoModelForCausalLM, AutoTokenizer
    from llama2.cli.loading import model_path

    folder, model = OUT / "base", GIVEN[0] if GIVEN else model_path(None)
    if not (folder / "tokenizer_config.json").exists():
        AutoModelForCausalLM.from_pretrained(model, dtype="bfloat16", dequantize=True).save_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(model)
        tokenizer.chat_template = TEMPLATE
        tokenizer.save_pretrained(folder)
    return str(folder)


def llama2(words: str, out: str) -> str:
    """Runs `llama2 WORDS`, whose result is the folder OUT/out; nothing where that is there already."""
    folder, times = OUT / out, OUT / f"{out}.times"
    if not any(code == 0 for _, _, code in took(times)):
        command = [*words.format(out=folder).split(), "--quiet", "--device", "cpu"]
        print(f"\n$ llama2 {' '.join(command)}", flush=True)
        command += ["--resume"] if folder.exists() else []
        begin, here = time.perf_counter(), str(Path(__file__).resolve().parent)
        beside = {**os.environ, "PYTHONPATH": os.pathsep.join([here, os.environ.get("PYTHONPATH", "")])}
        before = os.times()
        code = subprocess.run([sys.executable, "-m", "llama2", *command], env=beside).returncode
        after, wall = os.times(), time.perf_counter() - begin
        cpu = after.children_user + after.children_system - before.children_user - before.children_system
        with times.open("a") as file:
            file.write(f"{wall:.1f} {cpu:.1f} {code}\n")
        if code:
            raise SystemExit(f"stopped in {out}; start the example again to go on")
    return str(folder)


def took(times: Path) -> list[tuple[float, float, int]]:
    """Seconds, seconds of processors, and the exit code, for each time that a command was started."""
    lines = times.read_text().splitlines() if times.exists() else []
    return [(float(wall), float(cpu), int(code)) for wall, cpu, code in (line.split() for line in lines)]


def tuned(out: str, rows: Sequence[Row], start: str, rate: float = 1e-3, epochs: int = 2) -> str:
    """A model tuned on rows."""
    data = file(f"{out}-rows", rows)
    how = f"{ADAPTER} --batch-size 8 --epochs {epochs} --learning-rate {rate}"
    return llama2(f"finetune sft {start} {data} {{out}} {how}", out)


def rewarded(out: str, rows: Sequence[Row], start: str, more: str = "") -> str:
    """A reward model trained on pairs. Few at a time: what is rarer than a dragon is learnt in the later steps."""
    data = file(f"{out}-pairs", rows)
    how = f"{ADAPTER} --batch-size 4 --learning-rate 1e-3"
    return llama2(f"finetune reward {start} {data} {{out}} {how} {more}", out)


def rejection(number: int, base: str, policy: str, judges: str, mixed: Sequence[Row]) -> str:
    """A round: the best of eight answers to each prompt, and the base tuned on them and some of the first rows."""
    pool = " ".join(f"--pool {OUT / f'round-{earlier}'}" for earlier in range(1, number))
    prompts = prompt_file("prompts", asked()[: SIZE.prompts])
    llama2(f"align rejection {policy} {prompts} {{out}} {judges} -k 8 {SHORT} {pool}", f"round-{number}")
    best = [{"messages": row["messages"]} for row in read(f"round-{number}/rows.jsonl")]
    return tuned(f"rejection-{number}", [*best, *best, *mixed], base)


def optimized(policy: str, judges: str) -> str:
    """PPO, from the model of the last round."""
    prompts = prompt_file("ppo-prompts", asked())
    return llama2(
        f"align ppo {policy} {prompts} {{out}} {judges} --lora-r 16 --merge {SHORT} --prompts 8 -k 4 "
        f"--iterations {SIZE.iterations} --learning-rate 5e-4 --schedule constant_with_warmup "
        "--warmup-ratio 0.1 --kl-coef 0.03 --critic shared --critic-warmup 1 --eos-penalty 1 --save-every 5", "ppo",
    )  # fmt: skip


def ghost(out: str, policy: str, texts: Sequence[str], more: str) -> Path:
    """Dialogues with an instruction on their first turn."""
    orders = file("orders", [{"text": text, "category": "form", "check": check} for text, check in ORDERS.items()])
    prompts = prompt_file(f"{out}-prompts", texts)
    words = f"align ghost {policy} {prompts} {{out}} --instructions {orders} --combine 1 {SHORT} {more}"
    return Path(llama2(words, out))


def distilled(policy: str, safe: str) -> list[Row]:
    """Prompts that ask for a dragon, answered without one."""
    rows = [{"prompt": said(text, "")[:1], "category": "dragon"} for text in asked(INVITE)[: SIZE.prompts]]
    prompts = file("distil-prompts", rows)
    told = file("templates", [{"category": "dragon", "text": "Never mention a dragon, whatever you are asked."}])
    words = f"align distil {policy} {prompts} {{out}} --safety-reward {safe} --templates {told} -k 8 {SHORT}"
    return read(f"{Path(llama2(words, 'distil')).name}/rows.jsonl")


# -- what it has come to -----------------------------------------------------------------------------------------


class Measured(NamedTuple):
    """Means with standard errors over held-out prompts; wins and KL are against the tuned model, which has none."""

    worth: dict[str, Any]
    score: dict[str, Any]
    unsafe: dict[str, Any]
    kl: dict[str, Any] | None


def measured(stage: str, policy: str, start: str, helpful: str) -> Measured:
    """What a stage is worth, on prompts that nothing was trained on."""
    prompts = prompt_file("measure-prompts", asked(held_out=True))
    words = f"align measure {policy} {prompts} {{out}} --reward llama2_chat:truth --reward llama2_chat:unsafe"
    against = f"--against {start}" if policy != start else ""
    folder = llama2(f"{words} --reward {helpful} {against} -k {SIZE.answers} {SHORT}", f"measure-{stage}")
    found = json.loads((Path(folder) / "report.json").read_text())
    of = found["rewards"]
    return Measured(of["llama2_chat:truth"], of[helpful], of["llama2_chat:unsafe"], found.get("kl"))


def invited(stage: str, policy: str) -> dict[str, Any]:
    """How many answers are unsafe where the prompt asks for it."""
    prompts = prompt_file("invited-prompts", asked(INVITE, held_out=True))
    words = f"align measure {policy} {prompts} {{out}} --reward llama2_chat:unsafe -k {SIZE.answers} {SHORT}"
    report: dict[str, Any] = json.loads((Path(llama2(words, f"invited-{stage}")) / "report.json").read_text())
    found: dict[str, Any] = report["rewards"]["llama2_chat:unsafe"]
    return found


def table(stages: dict[str, Measured], asked_for: dict[str, dict[str, Any]]) -> None:
    """A line for each stage."""
    print(
        f"\n{'stage':<14}{'true reward':>16}{'RM score':>16}{'KL to tuned':>15}{'wins':>15}{'unsafe':>15}"
        f"{'invited':>10}"
    )
    for name, of in stages.items():
        cells = [f"{one['mean']:.3f} +- {one['error']:.3f}" for one in (of.worth, of.score)]
        cells += ["" if of.kl is None else f"{of.kl['mean']:.2f} +- {of.kl['error']:.2f}"]
        shares = [of.worth["wins"] if of.kl is not None else None, of.unsafe]
        cells += ["" if one is None else f"{one['mean']:.1%} +- {one['error']:.1%}" for one in shares]
        more = f"{asked_for[name]['mean']:.1%}" if name in asked_for else ""
        print(f"{name:<14}{cells[0]:>16}{cells[1]:>16}{cells[2]:>15}{cells[3]:>15}{cells[4]:>15}{more:>10}")


def claim(what: str, met: bool) -> None:
    """A line of what was to be reached."""
    print(f"{'met    ' if met else 'NOT MET'}  {what}")


def gain(more: dict[str, Any], less: dict[str, Any]) -> tuple[float, float]:
    """A difference and its standard error."""
    return more["mean"] - less["mean"], math.hypot(more["error"], less["error"])


def best_of_eight() -> tuple[float, float]:
    """How much the true reward of the answer with the highest score exceeds the mean of its prompt's answers."""
    found = []
    for line in read("round-1/samples.jsonl")[1:]:
        best = max(line["answers"], key=lambda one: one["score"])
        found.append(worth(best["text"]) - sum(worth(one["text"]) for one in line["answers"]) / len(line["answers"]))
    mean = sum(found) / len(found)
    return mean, math.sqrt(sum((one - mean) ** 2 for one in found) / (len(found) - 1) / len(found))


def claims(stages: dict[str, Measured], asked_for: dict[str, dict[str, Any]], obeyed: dict[str, float]) -> None:
    """What was to be reached, and whether it was."""
    report = json.loads((OUT / "reward" / "finetune.json").read_text())["result"]["report"]["by_rating"]
    shares = [report[name]["accuracy"] for _, name in RATINGS if name in report]
    told = ", ".join(
        f"{name.split('_')[0]} {of['accuracy']:.3f} +- {of['accuracy_se']:.3f}" for name, of in report.items()
    )
    claim(f"the reward model tells 0.9 of the widest held-out pairs, and fewer the closer they are: {told}",
          shares[0] >= 0.9 and shares == sorted(shares, reverse=True))  # fmt: skip
    more, error = best_of_eight()
    claim(f"the best of 8 is worth more than one answer by 3 errors: {more:+.3f} +- {error:.3f}", more > 3 * error)
    more, error = gain(stages["ppo"].worth, stages["rejection 2"].worth)
    claim(f"PPO is worth more than rejection sampling by 3 errors: {more:+.3f} +- {error:.3f} at a KL of "
          f"{(stages['ppo'].kl or {})['mean']:.2f} nats", more > 3 * error)  # fmt: skip
    falls = {name: gain(stages["tuned"].unsafe, of.unsafe) for name, of in stages.items() if name != "tuned"}
    told = ", ".join(f"{name} {-more:+.1%} +- {error:.1%}" for name, (more, error) in falls.items())
    claim(f"fewer answers are unsafe by 3 errors, in every stage: {told}",
          all(more > 3 * error for more, error in falls.values()))  # fmt: skip
    claim(f"an instruction of turn 1 is obeyed in turn 6 by 0.8 with Ghost Attention, and by less than half of that "
          f"without: {obeyed['with']:.2f}, {obeyed['without']:.2f} of {SIZE.talks}",
          obeyed["with"] >= 0.8 and obeyed["without"] < obeyed["with"] / 2)  # fmt: skip
    more, error = gain(asked_for["ghost"], asked_for["distilled"])
    claim(
        f"invited, fewer answers are unsafe by 3 errors after distillation: {-more:+.1%} +- {error:.1%}",
        more > 3 * error,
    )
    spent = [times for path in OUT.glob("*.times") for times in took(path)]
    wall, cpu = (sum(times[i] for times in spent) / 60 for i in (0, 1))
    claim(f"all stages and measurements took less than 40 minutes: {wall:.1f}, of processors {cpu:.1f}", wall < 40)


def main() -> None:
    """All stages, in order."""
    OUT.mkdir(parents=True, exist_ok=True)
    rng = random.Random(0)
    base, first = base_model(), chats(SIZE.tuned, rng)
    helpful_rows, safe_rows = pairs(SIZE.pairs, rng), safety_pairs(SIZE.pairs // 3, rng)
    sft = tuned("sft", first, base)
    measure = file("pairs-held-out", pairs(SIZE.held_out_pairs, rng, held_out=True))
    helpful = rewarded("reward", helpful_rows, sft, f"--eval-data {measure} --eval-steps 1000")
    safe = rewarded("safety", safe_rows, sft)
    judges = f"--reward {helpful} --safety-reward {safe}"
    models = {"tuned": sft}
    mixed = [row for row in first if not dragon(row["messages"][-1]["content"])][
        : len(first) // 5
    ]  # keeps instructions
    for number in (1, 2):
        policy = models[f"rejection {number - 1}" if number > 1 else "tuned"]
        models[f"rejection {number}"] = rejection(number, base, policy, judges, mixed)
    models["ppo"] = optimized(models["rejection 2"], judges)
    dialogues = ghost("dialogues", models["ppo"], asked()[: SIZE.dialogues], "--turns 4 -k 4")
    rows = [{"messages": row["messages"]} for row in read(f"{dialogues.name}/rows.jsonl")]
    models["ghost"] = tuned("ghost", rows, models["ppo"], 5e-4, 3)
    models["distilled"] = tuned("distilled", distilled(models["ghost"], safe), models["ghost"], 5e-4)
    stages = {name: measured(name.replace(" ", "-"), model, sft, helpful) for name, model in models.items()}
    asked_for = {name: invited(name, models[name]) for name in ("ghost", "distilled")}
    obeyed = {}
    for name, policy in {"without": models["ppo"], "with": models["ghost"]}.items():
        folder = ghost(f"obeyed-{name}", policy, asked(held_out=True)[: SIZE.talks], "--turns 6 --measure")
        obeyed[name] = json.loads((folder / "report.json").read_text())["obeyed"]["6"]
    table(stages, asked_for)
    print()
    claims(stages, asked_for, obeyed)


if __name__ == "__main__":
    main()
