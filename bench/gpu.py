"""What a CUDA machine must show: parity of attention and of packed weights, CUDA graphs, speed at 7B shape.

    python bench/gpu.py [--layers 32] [--tokens 128] [--only parity,packed] [--tiles]

Where there is no GPU it says so and exits 0. On one it prints a table for each part and, as the last line, JSON. A part
that fails prints its traceback and the others go on; exit code 1 where one failed or a parity bound breaks. Bandwidth
shares are against a device-to-device copy measured in the same run.
"""

import argparse
import copy
import importlib.util
import json
import platform
import statistics
import time
import traceback
from collections.abc import Callable
from typing import Any

import gpu_packed
import torch
from torch import Tensor

from llama2 import LlamaConfig, LlamaForCausalLM
from llama2.runners.padded import TorchRunner

# Relative error of the logits against float64, norm over norm: a dozen roundings of 2**-9 and 2**-12.
BOUNDS = {torch.bfloat16: 5e-2, torch.float16: 6e-3}


def random_model(config: LlamaConfig, dtype: torch.dtype, device: str) -> LlamaForCausalLM:
    """A model with weights N(0, 0.02) drawn on `device`; norms 1."""
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model = model.to(dtype).to_empty(device=device).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0) if name.endswith("norm.weight") else parameter.normal_(0.0, 0.02)
    model.tie_weights()
    return model


def parity(
    device: str, implementations: list[str], dtypes: list[torch.dtype], width: int = 512
) -> list[dict[str, Any]]:
    """Logits of every implementation and dtype against float64 eager, with and without padding, whole and cached."""
    config = LlamaConfig.preset(
        "tiny",
        hidden_size=width,
        intermediate_size=width * 43 // 16,
        num_attention_heads=8,
        num_key_value_heads=2,
        num_hidden_layers=4,
    )
    torch.manual_seed(0)
    model = random_model(config, torch.float32, device).double()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0.0, parameter.shape[1] ** -0.5)
    ids = torch.randint(1, 257, (3, 96), device=device)
    mask = torch.ones_like(ids)
    mask[1, :30], mask[2, :50] = 0, 0
    rows = []
    model.set_attn_implementation("eager")
    with torch.no_grad():
        truth = {None: model(ids).logits, "padded": model(ids, attention_mask=mask).logits}
        for dtype in dtypes:
            low = copy.deepcopy(model).to(dtype)
            for name in implementations:
                low.set_attn_implementation(name)
                for case, exact in truth.items():
                    kept = mask if case else None
                    whole = low(ids, attention_mask=kept).logits
                    cache = low(ids[:, :-1], attention_mask=None if kept is None else kept[:, :-1]).past_key_values
                    last = low(ids[:, -1:], attention_mask=kept, past_key_values=cache).logits
                    real = mask.bool() if case else torch.ones_like(mask, dtype=torch.bool)
                    error = _relative(whole[real], exact[real])
                    cached = _relative(last[:, 0], exact[:, -1])
                    rows.append(
                        {
                            "dtype": str(dtype).removeprefix("torch."),
                            "attention": name,
                            "case": case or "plain",
                            "error": error,
                            "cached_error": cached,
                            "bound": BOUNDS[dtype],
                            "ok": max(error, cached) < BOUNDS[dtype],
                        }
                    )
    return rows


def _relative(x: Tensor, exact: Tensor) -> float:
    return float((x.double() - exact).norm() / exact.norm())


def copy_bandwidth(device: str, gib: float = 2.0) -> float:
    """GB/s of a device-to-device copy, bytes read plus bytes written."""
    source = torch.empty(int(gib * 2**30), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(10):
        target.copy_(source)
    torch.cuda.synchronize()
    return 10 * 2 * source.numel() / (time.perf_counter() - start) / 1e9


def steps(model: LlamaForCausalLM, prompt: Tensor, tokens: int, graphs: bool) -> tuple[float, list[int]]:
    """Seconds of a greedy step that nothing waits for, and the tokens; with graphs, of the second answer."""
    runner, width = TorchRunner(model, graphs=graphs), prompt.shape[1]
    places = torch.arange(width + tokens, device=prompt.device)[None]
    seconds, chosen = 0.0, []
    for _ in range(2 if graphs else 1):
        cache = runner.new_cache(None, len(prompt), width + tokens)
        token = runner.step(prompt, places[:, :width], None, cache)[:, -1].argmax(-1, keepdim=True)
        chosen = []
        torch.cuda.synchronize()
        start = time.perf_counter()
        for place in range(width, width + tokens):
            token = runner.step(token, places[:, place : place + 1], None, cache)[:, -1].argmax(-1, keepdim=True)
            chosen.append(token)
        torch.cuda.synchronize()
        seconds = (time.perf_counter() - start) / tokens
    return seconds, torch.cat(chosen, 1).flatten().tolist()


def decode_speed(layers: int, tokens: int, limit: float, weights: str = "bfloat16") -> list[dict[str, Any]]:
    """Tokens per second at 7B shape, activations bfloat16: steps alone, then whole answers of generate().

    weights: "bfloat16" (then beside transformers, over the same tensors) or a format of gpu_packed. limit: GB/s of a
    copy.
    """
    config = LlamaConfig.preset("7b", num_hidden_layers=layers)
    torch.manual_seed(0)
    model = random_model(config, torch.bfloat16, "cuda")
    prompt = torch.randint(1, 32000, (1, 128), device="cuda")
    if weights == "bfloat16":
        read = model.get_memory_footprint() - 2 * config.vocab_size * config.hidden_size
    else:
        read = gpu_packed.pack_model(model, weights)
    rows, greedy = [], []
    with torch.inference_mode():
        for name, graphs in (("step, module", False), ("step, CUDA graph", True)):
            seconds, chosen = steps(model, prompt, tokens if graphs else min(tokens, 48), graphs)
            greedy.append(chosen)
            share = read / seconds / 1e9
            rows.append(
                {"weights": weights, "what": name, "tok/s": 1 / seconds, "GB/s": share, "of copy": share / limit}
            )
        same = sum(a == b for a, b in zip(*greedy, strict=False))
        rows[-1]["greedy tokens equal"] = f"{same} of {len(greedy[0])}"
        rivals = {"generate, module": (model, {"runner": "plain"}), "generate, CUDA graph": (model, {})}
        if weights == "bfloat16" and (theirs := transformers_model(model)) is not None:
            rivals["generate, transformers"] = (theirs, {})
        for batch in (1, 8) if weights == "bfloat16" else (1,):
            for name, rate in answers(rivals, prompt.repeat(batch, 1), min(tokens, 48)).items():
                rows.append({"weights": weights, "what": f"{name}, {batch} rows", "tok/s": rate})
    return [{**dict.fromkeys(rows[1], ""), **row} for row in rows]


def answers(rivals: dict[str, tuple[Any, dict[str, Any]]], prompt: Tensor, tokens: int) -> dict[str, float]:
    """New tokens per second of generate(), prompt included, the median of three rounds in which rivals take turns."""
    rates: dict[str, list[float]] = {name: [] for name in rivals}
    settings = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
    for _ in range(4):  # the first warms up and records
        for name, (model, more) in rivals.items():
            torch.cuda.synchronize()
            start = time.perf_counter()
            model.generate(prompt, eos_token_id=None, **settings, **more)
            torch.cuda.synchronize()
            rates[name].append(prompt.shape[0] * tokens / (time.perf_counter() - start))
    return {name: statistics.median(found[1:]) for name, found in rates.items()}


def transformers_model(model: LlamaForCausalLM) -> Any:
    """The model of transformers over the same tensors, None where that is not installed."""
    if importlib.util.find_spec("transformers") is None:
        return None
    import transformers

    names = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    sizes = {name: getattr(model.config, name) for name in (*names, "num_hidden_layers", "max_position_embeddings")}
    with torch.device("meta"):
        theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    theirs.load_state_dict(model.state_dict(), assign=True)
    rotary = theirs.model.rotary_emb
    theirs.model.rotary_emb = type(rotary)(theirs.config).to(model.device)
    return theirs.eval()


def table(rows: list[dict[str, Any]]) -> str:
    """Rows as a markdown table."""
    heads = list(rows[0])
    cells = [[f"{row[h]:.4g}" if isinstance(row[h], float) else str(row[h]) for h in heads] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in (heads, ["---"] * len(heads), *cells))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32, help="layers of the 7B shape")
    parser.add_argument("--tokens", type=int, default=128, help="tokens to decode")
    parser.add_argument("--only", default="", help="parts to run, by the beginnings of their names, comma separated")
    parser.add_argument("--tiles", action="store_true", help="also time other tiles of the packed kernels")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print(f"no CUDA device on this machine ({platform.machine()}, torch {torch.__version__}): nothing was checked")
        return 0
    limit = copy_bandwidth("cuda")
    report: dict[str, Any] = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "copy GB/s": limit}
    print(", ".join(f"{name} {value}" for name, value in report.items()) + "\n", flush=True)
    parts: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "parity": lambda: parity("cuda", ["eager", "sdpa", "flash_attention_2"], [torch.bfloat16, torch.float16]),
        "packed parity": gpu_packed.parity,
        "packed products": lambda: gpu_packed.products(limit),
        "packed unpacking": lambda: gpu_packed.unpacking(limit),
        **{
            f"decode {weights}": lambda weights=weights: decode_speed(args.layers, args.tokens, limit, weights)
            for weights in ("bfloat16", "nf4", "gptq 4 bits")
        },
    }
    if args.tiles:
        parts["tiles"] = lambda: gpu_packed.tiles(limit)
    wanted = tuple(args.only.split(","))
    failed = False
    for name, part in parts.items():
        if not name.startswith(wanted):
            continue
        start = time.perf_counter()
        try:
            report[name] = part()
            print(f"{name}\n{table(report[name])}")
            failed |= not all(row.get("ok", True) for row in report[name])
        except Exception:  # the other parts are worth their time on the device
            traceback.print_exc()
            failed = True
        torch.cuda.empty_cache()
        print(f"({time.perf_counter() - start:.0f} s)\n", flush=True)
    print(json.dumps(report))
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
