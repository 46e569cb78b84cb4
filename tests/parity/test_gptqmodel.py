"""Files exchanged with GPTQModel, which wants an environment of its own: another Python runs it.

LLAMA2_GPTQMODEL names that Python (python -m venv DIR; DIR/bin/pip install gptqmodel tokenizers).
"""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny_ids
from tokenizers import Tokenizer
from tokenizers.models import BPE

from llama2 import GPTQConfig, LlamaConfig, LlamaForCausalLM
from llama2.checkpoint.quantized import packed_layers
from llama2.quantization.gptq import GptqLinear, grid_of, pack, pack_zeros
from llama2.quantization.gptq_solver import Hessian, solve

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]
INTERPRETER = os.environ.get("LLAMA2_GPTQMODEL", "")
SIZES = {
    "vocab_size": 97,
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.08,
}
IDS = tiny_ids(2, 24)
PLAIN: dict[str, Any] = {"desc_act": False, "act_group_aware": False}
# GPTQModel's settings of each file that it makes.
THEIRS: dict[str, dict[str, Any]] = {
    "4-bit": {"bits": 4, "group_size": 32, **PLAIN},
    "4-bit-v2": {"bits": 4, "group_size": 32, "format": "gptq_v2", **PLAIN},
    "4-bit-act-order": {"bits": 4, "group_size": 32, "desc_act": True, "act_group_aware": False},
    "4-bit-asym-v1": {"bits": 4, "group_size": 32, "sym": False, **PLAIN},
    "4-bit-asym-v2": {"bits": 4, "group_size": 32, "sym": False, "format": "gptq_v2", **PLAIN},
    "4-bit-rows": {"bits": 4, "group_size": -1, **PLAIN},
    "2-bit": {"bits": 2, "group_size": 32, **PLAIN},
    "3-bit": {"bits": 3, "group_size": 32, **PLAIN},
    "8-bit": {"bits": 8, "group_size": 32, **PLAIN},
}
# Ours, asymmetric ones in v2 (GPTQModel takes v1 from itself only); the second of each pair: the solver's act_order.
OURS: dict[str, tuple[GPTQConfig, bool]] = {
    "4-bit": (GPTQConfig(bits=4, group_size=32), False),
    "4-bit-v2": (GPTQConfig(bits=4, group_size=32, format="gptq_v2"), False),
    "4-bit-act-order": (GPTQConfig(bits=4, group_size=32, desc_act=True), True),
    "4-bit-asym": (GPTQConfig(bits=4, group_size=32, sym=False), False),
    "4-bit-rows": (GPTQConfig(bits=4, group_size=-1), False),
    "2-bit": (GPTQConfig(bits=2, group_size=32), False),
    "3-bit-asym": (GPTQConfig(bits=3, group_size=32, sym=False), False),
    "8-bit": (GPTQConfig(bits=8, group_size=32), False),
}


def tokenizer(folder: Path) -> None:
    """GPTQModel loads no folder without one."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"t{i}": i for i in range(3, 97)}}
    Tokenizer(BPE(vocab, [], unk_token="<unk>")).save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>", "bos_token": "<s>"}
    settings |= {"eos_token": "</s>", "pad_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def solved(model: Any, config: GPTQConfig, act_order: bool) -> None:
    """Quantises in place by the solver, all inputs from the unquantised model."""
    hessians: dict[str, Hessian] = {}
    linears = {path: m for path, m in model.named_modules() if isinstance(m, torch.nn.Linear) and path != "lm_head"}

    def watch(path: str, columns: int) -> Any:
        hessians[path] = Hessian(columns)
        return lambda module, given: hessians[path].add(given[0])

    hooks = [m.register_forward_pre_hook(watch(path, m.in_features)) for path, m in linears.items()]
    with torch.inference_mode():
        model(tiny_ids(16, 64))
    for hook in hooks:
        hook.remove()
    for path, linear in linears.items():
        grid = grid_of(config, linear.in_features, search=True)
        found = solve(linear.weight.detach().float(), hessians[path].matrix(), grid, act_order=act_order)
        model.set_submodule(path, GptqLinear.of_solution(found, None, config))
    model.config.quantization_config = config.to_dict()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders theirs/NAME and ours/NAME; NAME.safetensors is what GPTQModel reads from each, all in one process."""
    if not INTERPRETER:
        pytest.skip("needs LLAMA2_GPTQMODEL, a Python with gptqmodel: pip install gptqmodel tokenizers in a venv")
    root = tmp_path_factory.mktemp("gptq")
    torch.manual_seed(5)
    plain = LlamaForCausalLM(LlamaConfig(**SIZES)).half()
    plain.save_pretrained(root / "plain")
    tokenizer(root / "plain")
    for name, (config, act_order) in OURS.items():
        model = LlamaForCausalLM.from_pretrained(root / "plain", dtype="float32")
        solved(model, config, act_order)
        model.half().save_pretrained(root / "ours" / name)
        tokenizer(root / "ours" / name)
    folders = [root / "theirs" / name for name in THEIRS] + [root / "ours" / name for name in OURS]
    job = {
        "make": {str(root / "theirs" / name): {"from": str(root / "plain"), **how} for name, how in THEIRS.items()},
        "read": {str(folder): f"{folder}.safetensors" for folder in folders},
    }
    (root / "job.json").write_text(json.dumps(job))
    script = Path(__file__).with_name("by_gptqmodel.py")
    command = [str(Path(INTERPRETER).absolute()), str(script), str(root / "job.json")]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=root)  # it writes a folder of logs where it is
    assert ran.returncode == 0, ran.stderr[-3000:]
    return root


def compare(folder: Path) -> Any:
    """Our layers beside the weights that GPTQModel takes from the same file, and the logits of both; our model."""
    theirs = load_file(f"{folder}.safetensors")
    model = LlamaForCausalLM.from_pretrained(folder, dtype="float32")
    assert len(packed_layers(model)) == 14
    for path, layer in packed_layers(model).items():
        assert torch.equal(layer.dequantize(), theirs[f"{path}.weight"]), path
    other = LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    assert not other.load_state_dict(theirs, strict=False).unexpected_keys
    with torch.inference_mode():
        ours, wanted = model(IDS).logits, other(IDS).logits
    assert wanted.abs().max() > 1
    torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-5)
    return model


@pytest.mark.parametrize("name", THEIRS)
def test_their_files(root: Path, name: str) -> None:
    model = compare(root / "theirs" / name)
    for layer in packed_layers(model).values():
        codes, zeros = layer.codes()
        assert torch.equal(pack(codes, layer.bits), layer.packed["qweight"])
        if int(zeros.min()) > 0 or layer.v2:
            assert torch.equal(pack_zeros(zeros, layer.bits, layer.v2), layer.packed["qzeros"])
        assert layer.in_order == ("act-order" not in name)


@pytest.mark.parametrize("name", OURS)
def test_our_files(root: Path, name: str) -> None:
    model = compare(root / "ours" / name)
    assert all(layer.in_order == ("act-order" not in name) for layer in packed_layers(model).values())


def test_ours_are_nearer(root: Path) -> None:
    """The same bits on the same calibration kind: the weights' error in the outputs is no larger than theirs."""
    wanted = LlamaForCausalLM.from_pretrained(root / "plain", dtype="float32")
    with torch.inference_mode():
        truth, far = wanted(IDS).logits, {}
        for side in ("ours", "theirs"):
            model = LlamaForCausalLM.from_pretrained(root / side / "4-bit", dtype="float32")
            far[side] = float((model(IDS).logits - truth).norm())
    assert far["ours"] < far["theirs"]
