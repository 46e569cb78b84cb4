"""Peak memory of PPO with an adapter beside that of instruction tuning with the same one, on the same tokens.

    python bench/align_memory.py [--shape 1.1b] [--rows 8] [--prompt 64] [--tokens 64] [--critic adapter]

Random bfloat16 weights of a shape, LoRA of rank 16 on all linears, rows of a pass alike in number and length. PPO draws
its answers, asks the reference (the adapter off) and its critic (a second adapter), and takes a step; its reward is a
function, since a reward model is one more model whoever trains. Each runs in a process of its own, and the peak is that
of the whole process, loading included. The last line is JSON.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from align import base
from train import SHAPES


def reward(completions: list[Any], **_: Any) -> list[float]:
    """The share of vowels, which no answer has quite as another."""
    return [sum(text.count(vowel) for vowel in "aeiou") / max(len(text), 1) for text in completions]


def work(args: argparse.Namespace) -> None:
    """One side, in its own process."""
    import torch

    from llama2 import (
        AutoTokenizer,
        LlamaConfig,
        LlamaForCausalLM,
        LoraConfig,
        PPOConfig,
        PPOTrainer,
        SFTConfig,
        SFTTrainer,
    )

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    sizes: dict[str, Any] = {**SHAPES[args.shape], "vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    model = LlamaForCausalLM(LlamaConfig(**sizes)) if args.shape != "135m" else LlamaForCausalLM.from_pretrained(
        args.model, dtype=torch.bfloat16)  # fmt: skip
    torch.set_default_dtype(torch.float32)
    loaded = _bytes("VmRSS")
    adapter = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
    shared: dict[str, Any] = {
        "output_dir": args.out, "per_device_train_batch_size": args.rows, "save_strategy": "no", "use_cpu": True,
        "learning_rate": 1e-5,
    }  # fmt: skip
    words = tokenizer("the quick brown fox jumps over a lazy dog and " * 200)["input_ids"]
    text = tokenizer.decode(words[: args.prompt])
    if args.worker == "sft":
        row = tokenizer.decode(words[: args.prompt + args.tokens])
        config = SFTConfig(**shared, max_steps=2, max_length=args.prompt + args.tokens)
        SFTTrainer(model, config, train_dataset=[{"text": row}] * 2 * args.rows, processing_class=tokenizer,
                   peft_config=adapter).train()  # fmt: skip
    else:
        own = PPOConfig(**shared, max_steps=2, num_generations=4, max_completion_length=args.tokens, temperature=1.0,
                        num_mini_batches=1, num_ppo_epochs=2, critic=args.critic)  # fmt: skip
        PPOTrainer(own, tokenizer, model, None, reward, [{"prompt": text}] * (args.rows // 4),
                   peft_config=adapter).train()  # fmt: skip
    print(json.dumps({"loaded": loaded, "peak": _bytes("VmHWM")}))


def _bytes(what: str) -> int:
    return int(Path("/proc/self/status").read_text().split(f"{what}:")[1].split()[0]) * 1024


def main() -> None:
    """Both sides, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="1.1b")
    parser.add_argument("--rows", type=int, default=8, help="rows, and answers, of a pass and a step; four a prompt")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of a prompt")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of an answer, at most")
    parser.add_argument("--critic", choices=["adapter", "shared"], default="adapter")
    parser.add_argument("--only", choices=["sft", "ppo"], help="one side alone")
    for name in ("--worker", "--model", "--out"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args)
        return
    found: dict[str, dict[str, int]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base(folder / "model")
        for side in ("sft", "ppo"):
            if args.only in (None, side):
                words = [sys.executable, __file__, *sys.argv[1:], "--worker", side, "--model", str(folder / "model"),
                         "--out", str(folder / side)]  # fmt: skip
                ran = subprocess.run(words, capture_output=True, text=True)
                if ran.returncode:
                    raise SystemExit(ran.stderr[-2000:])
                found[side] = json.loads(ran.stdout.splitlines()[-1])
                peak, loaded = (found[side][name] / 2**20 for name in ("peak", "loaded"))
                print(f"{side}: peak {peak:,.0f} MiB, {loaded:,.0f} loaded", flush=True)
    ratio = {"ratio": found["ppo"]["peak"] / found["sft"]["peak"]} if len(found) == 2 else {}
    if ratio:
        print(f"PPO takes {ratio['ratio']:.2f} times the memory of instruction tuning")
    print(json.dumps({"bench": "align_memory", "shape": args.shape, "critic": args.critic, **found, **ratio}))


if __name__ == "__main__":
    main()
