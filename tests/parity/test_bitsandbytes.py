"""Packed linears beside transformers with bitsandbytes, in another Python (make parity-bitsandbytes).

Bytes of weights, files in both directions, and the logits of both.
"""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_ids, tiny_model

from llama2 import LlamaForCausalLM
from llama2.checkpoint.quantized import packed_layers
from llama2.quantization.formats import layer_class, parse
from llama2.quantization.nf4 import TABLES
from llama2.quantization_config import BitsAndBytesConfig

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]
INTERPRETER = os.environ.get("LLAMA2_BITSANDBYTES", "")
FOUR = {"load_in_4bit": True}
SETTINGS: dict[str, dict[str, Any]] = {
    "nf4": {**FOUR, "bnb_4bit_quant_type": "nf4"},
    "nf4 double": {**FOUR, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": FOUR,
    "fp4 double": {**FOUR, "bnb_4bit_use_double_quant": True},
    "nf4 in bfloat16": {**FOUR, "bnb_4bit_quant_type": "nf4", "bnb_4bit_quant_storage": "bfloat16"},
    "fp4 double in float16": {**FOUR, "bnb_4bit_use_double_quant": True, "bnb_4bit_quant_storage": "float16"},
    "nf4 double in float32": {
        **FOUR,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_quant_storage": "float32",
    },
    "int8": {"load_in_8bit": True},
}
SHAPES = [(128, 384), (7, 96), (6, 45), (3, 5), (256, 1024), (40, 64)]
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
IDS = tiny_ids(2, 24)
# Where the model differs from tiny_model's: rows of a multiple of 64, which bitsandbytes 0.50 needs on a CPU.
CHANGES: dict[str, Any] = {"intermediate_size": 192, "attention_bias": True}


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal bit for bit: codes that are kept as floats may look like NaN."""
    bits = [each.reshape(-1).view(torch.uint8) for each in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*bits)


def weights() -> dict[str, torch.Tensor]:
    """Matrices whose rows differ in size, with rows and blocks of zeros, outliers, ties and values next to them."""
    torch.manual_seed(11)
    made = {}
    for rows, cols in SHAPES:
        weight = torch.randn(rows, cols) * torch.rand(rows, 1) ** 4
        weight[0], weight[1, 0] = 0.0, 40.0
        weight[-1] *= 1e-18
        made |= {f"{rows}x{cols} {name}": weight.to(dtype) for name, dtype in DTYPES.items()}
    for kind in ("nf4", "fp4"):  # every middle of two values of the table, and its neighbours
        table = torch.tensor(sorted(TABLES[kind]))
        middles = (table[1:] + table[:-1]) / 2
        far = torch.tensor(9.0)
        near = torch.cat((middles, middles.nextafter(far), middles.nextafter(-far)))
        ties = torch.ones(3, 64)
        ties[:, 1 : 1 + len(middles)] = near.view(3, -1)
        made[f"ties {kind}"] = ties
    return made


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """What the other interpreter makes: see by_bitsandbytes.py. One process for all tests."""
    if not INTERPRETER:
        pytest.skip("needs LLAMA2_BITSANDBYTES, a Python with bitsandbytes; `make parity-bitsandbytes` makes one")
    root = tmp_path_factory.mktemp("bitsandbytes")
    save_file(weights(), root / "weights.safetensors")
    tiny_model(torch.float32, **CHANGES).save_pretrained(root / "plain")
    make, read = [], []
    for name, how in SETTINGS.items():
        for dtype in DTYPES if name in ("nf4 double", "int8") else ("bfloat16",):
            make.append([str(root / "plain"), name, dtype, str(root / f"theirs {name} {dtype}")])
            ours = LlamaForCausalLM.from_pretrained(
                root / "plain", quantization_config=BitsAndBytesConfig(**how), dtype=dtype
            )
            ours.save_pretrained(root / f"ours {name} {dtype}")
            read.append(str(root / f"ours {name} {dtype}"))
    job = {"ids": IDS.tolist(), "weights": str(root / "weights.safetensors"), "settings": SETTINGS}
    job |= {"make": make, "read": read, "result": str(root / "result.safetensors")}
    (root / "job.json").write_text(json.dumps(job))
    script = Path(__file__).with_name("by_bitsandbytes.py")
    # One thread and no compiler: a mean of many scales depends on the former, and the latter takes minutes.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"}
    ran = subprocess.run(
        [INTERPRETER, str(script), str(root / "job.json")], capture_output=True, text=True, env=environment
    )
    assert ran.returncode == 0, ran.stderr
    return root, load_file(root / "result.safetensors")


@pytest.mark.parametrize("way", SETTINGS)
def test_bytes_of_weights(found: tuple[Path, dict[str, torch.Tensor]], way: str) -> None:
    config, compared = BitsAndBytesConfig(**SETTINGS[way]), 0
    for name, weight in weights().items():
        theirs = {k.split("/")[-1]: t for k, t in found[1].items() if k.startswith(f"{name}/{way}/")}
        parts = {k: t for k, t in theirs.items() if not k.startswith("values-")}
        if not theirs:  # its bytes fill no whole numbers of this storage
            assert way.split()[-2] == "in" and weight.shape in ((6, 45), (3, 5))
            continue
        made = layer_class(config).quantize(weight, None, config)
        packed = {k: t for k, t in made.packed.items() if k != "weight_format"}
        assert set(packed) == set(parts)
        assert [k for k in parts if not same(packed[k], parts[k])] == [], name
        again = layer_class(config).from_file(parts, (weight.shape[0], weight.shape[1]), None, config)
        for dtype in DTYPES.values() if config.load_in_4bit else [torch.float32]:
            values = theirs[f"values-{dtype}"]
            assert torch.equal(made.dequantize(dtype), values) and torch.equal(again.dequantize(dtype), values), name
            compared += 1
    assert compared >= len(weights()) - 6


FOLDERS = [(w, d) for w in SETTINGS for d in (DTYPES if w in ("nf4 double", "int8") else ("bfloat16",))]


@pytest.mark.parametrize(("way", "dtype"), FOLDERS)
def test_files(found: tuple[Path, dict[str, torch.Tensor]], way: str, dtype: str) -> None:
    root, theirs = found
    made, ours = root / f"theirs {way} {dtype}", root / f"ours {way} {dtype}"
    mine, other = load_file(ours / "model.safetensors"), load_file(made / "model.safetensors")
    assert set(mine) == set(other) and [name for name in other if not same(mine[name], other[name])] == []
    configs = [json.loads((folder / "config.json").read_text()) for folder in (ours, made)]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]
    assert torch.equal(theirs[f"{ours}/logits"], theirs[f"{made}/logits"])

    model = LlamaForCausalLM.from_pretrained(made, dtype="float32")
    assert len(packed_layers(model)) == 14 and parse(model.config.quantization_config).quant_method == "bitsandbytes"
    with torch.no_grad():
        logits = model(IDS).logits
    scale = logits.abs().max()
    assert scale > 1
    for which in ("logits", "unpacked"):
        assert (logits - theirs[f"{made}/{which}"]).abs().max() < 1e-5 * scale
    model.save_pretrained(root / "again")
    again = load_file(root / "again" / "model.safetensors")
    assert all(same(again[n], other[n]) for n in other if "weight." in n or other[n].dtype in (torch.uint8, torch.int8))
