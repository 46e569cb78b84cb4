"""LoRA layers: the arithmetic, the gradients, switching, merging, and the files."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_ids, tiny_model

from llama2 import InputError, lora
from llama2.checkpoint.load import pack
from llama2.checkpoint.peft import load_adapter, save_adapter
from llama2.lora_config import LINEARS, LoraConfig
from llama2.quantization.int8 import Linear8bit
from llama2.quantization_config import BitsAndBytesConfig

ALL = LoraConfig(r=3, lora_alpha=6, target_modules="all-linear")


def adapted(config: LoraConfig = ALL, seed: int = 2, **changes: Any) -> Any:
    model = tiny_model(**changes)
    lora.add_adapter(model, config)
    randomise(model, seed)
    return model


def randomise(model: Any, seed: int, name: str = "default") -> None:
    torch.manual_seed(seed)
    with torch.no_grad():
        for layer in lora.layers(model).values():
            layer.lora_A[name].normal_(0, 0.2)
            layer.lora_B[name].normal_(0, 0.2)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(tiny_ids(2)).logits
    return found


def merged_by_hand(model: Any) -> Any:
    """The same model with plain weights W + s B A."""
    plain = tiny_model()
    for path, layer in lora.layers(model).items():
        total = plain.get_submodule(path).weight.data
        for name in layer.active:
            total += layer.scaling[name] * layer.lora_B[name].data @ layer.lora_A[name].data
    return plain


def test_a_new_adapter_changes_nothing() -> None:
    model = tiny_model()
    before = logits(model)
    lora.add_adapter(model, ALL)
    assert torch.equal(logits(model), before)
    trainable = [n for n, p in model.named_parameters() if p.requires_grad]
    assert len(trainable) == 2 * 14 and all("lora_" in n for n in trainable)


PATTERNS = LoraConfig(r=4, target_modules=r".*\.1\..*_proj", rank_pattern={"up_proj": 1}, alpha_pattern={"v_proj": 3})


@pytest.mark.parametrize("config", [ALL, LoraConfig(r=2, use_rslora=True), PATTERNS])
def test_attached_equals_merged(config: LoraConfig) -> None:
    model = adapted(config)
    assert torch.allclose(logits(model), logits(merged_by_hand(model)), atol=1e-12)
    before = logits(model)
    lora.merge(model)
    assert not lora.layers(model) and torch.allclose(logits(model), before, atol=1e-12)


def test_scaling_and_ranks_follow_the_configuration() -> None:
    config = LoraConfig(
        r=4, lora_alpha=8, use_rslora=True, rank_pattern={"v_proj": 16}, alpha_pattern={"0.*.q_proj": 2}
    )
    layers = lora.layers(adapted(config))
    q0, q1, v0 = (layers[f"model.layers.{i}.self_attn.{n}_proj"] for i, n in ((0, "q"), (1, "q"), (0, "v")))
    assert (q0.scaling["default"], q1.scaling["default"], v0.scaling["default"]) == (1.0, 4.0, 2.0)
    assert (len(q0.lora_A["default"]), len(v0.lora_A["default"])) == (4, 16)


def gradients(model: Any, loss: Any) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss(model).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("biases", [False, True])
def test_gradients_equal_autograd(biases: bool) -> None:
    model = adapted(attention_bias=biases, mlp_bias=biases)

    def loss(model: Any) -> torch.Tensor:
        found: torch.Tensor = model(tiny_ids(2), labels=tiny_ids(2)).loss
        return found

    fused = gradients(model, loss)
    for layer in lora.layers(model).values():
        layer.forward = layer._composed  # the same sum, step by step
    stepwise = gradients(model, loss)
    assert fused.keys() == stepwise.keys() and len(fused) == 28
    for name, grad in fused.items():
        assert torch.allclose(grad, stepwise[name], atol=1e-12, rtol=1e-9), name
        assert grad.abs().max() > 0


def test_several_adapters_add_up_and_can_be_switched_off() -> None:
    model = adapted()
    first, base = logits(model), logits(tiny_model())
    lora.add_adapter(model, LoraConfig(r=2, target_modules=("up_proj",)), "second")
    randomise_second = [layer for layer in lora.layers(model).values() if "second" in layer.lora_A]
    assert len(randomise_second) == 2
    with torch.no_grad():
        for layer in randomise_second:
            layer.lora_B["second"].normal_(0, 0.3)
    second = logits(model)
    assert not torch.allclose(first, second) and not torch.allclose(second, base)
    lora.set_adapter(model, "default", "second")
    assert torch.allclose(logits(model), logits(merged_by_hand(model)), atol=1e-12)
    with lora.disabled(model):
        assert torch.equal(logits(model), base)
    lora.set_adapter(model, "default")
    assert torch.equal(logits(model), first)
    assert lora.names(model) == ["default", "second"]
    lora.remove_adapter(model, "second")
    lora.remove_adapter(model, "default")
    assert not lora.layers(model) and torch.equal(logits(model), base)


def test_dora_keeps_the_length_of_rows() -> None:
    model = adapted(LoraConfig(r=3, target_modules="all-linear", use_dora=True))
    plain = tiny_model()
    for path, layer in lora.layers(model).items():
        weight = plain.get_submodule(path).weight
        changed = weight.data + layer.delta("default")
        length = layer.lora_magnitude_vector["default"].data
        assert torch.allclose(length, weight.data.norm(dim=1))
        weight.data = changed * (length / changed.norm(dim=1))[:, None]
    assert torch.allclose(logits(model), logits(plain), atol=1e-11)
    lora.merge(model)
    assert torch.allclose(logits(model), logits(plain), atol=1e-11)


def test_dropout_acts_in_training_only() -> None:
    model = adapted(LoraConfig(r=3, lora_dropout=0.5, target_modules="all-linear"))
    assert torch.allclose(logits(model), logits(merged_by_hand(model)), atol=1e-12)
    model.train()
    assert not torch.allclose(logits(model), logits(model))


def test_gradients_with_dropout_are_those_of_autograd() -> None:
    torch.manual_seed(0)
    layer = lora.LoraLinear(torch.nn.Linear(12, 20, bias=False).double().requires_grad_(False))
    layer.add("default", LoraConfig(r=3, lora_dropout=0.4, target_modules="all-linear"), "up_proj")
    layer.lora_B["default"].data.normal_()
    x, towards = torch.randn(2, 5, 12).double().requires_grad_(), torch.randn(2, 5, 20).double()
    given = (x, layer.lora_A["default"], layer.lora_B["default"])

    def by_hand() -> torch.Tensor:
        seen = torch.nn.functional.dropout(x.reshape(10, 12), 0.4).view(x.shape)
        low = seen @ layer.lora_A["default"].T @ layer.lora_B["default"].T
        return x @ layer.base_layer.weight.T + layer.scaling["default"] * low

    found = []
    for run in (lambda: layer(x), by_hand):
        torch.manual_seed(7)
        out = run()
        found.append((out, *torch.autograd.grad((out * towards).sum(), given)))
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(*found, strict=True))


def test_the_base_weight_is_not_kept_for_the_backward_pass() -> None:
    layer = lora.LoraLinear(torch.nn.Linear(64, 4096, bias=False))
    layer.add("default", ALL, "up_proj")
    out = layer(torch.randn(2, 64, requires_grad=True))
    saved = [t.numel() for t in out.grad_fn.saved_tensors if t is not None]
    assert max(saved) < 64 * 4096


@pytest.mark.parametrize("method", ["load_in_8bit"])
def test_over_packed_weights(method: str) -> None:
    from llama2.checkpoint.weights import GivenWeights
    from llama2.quantization_config import BitsAndBytesConfig

    model = tiny_model(torch.float32)
    state = model.state_dict()
    found = {name: name for name in state}
    pack(model, GivenWeights(state), found, BitsAndBytesConfig(**{method: True}), torch.float32)
    unpacked = copy.deepcopy(model).dequantize()
    lora.add_adapter(model, ALL)
    lora.add_adapter(unpacked, ALL)
    randomise(model, 4)
    randomise(unpacked, 4)
    ids = tiny_ids(2)
    ours, theirs = (gradients(m, lambda m: m(ids, labels=ids).loss) for m in (model, unpacked))
    assert ours.keys() == theirs.keys() and len(ours) == 28
    assert all(torch.allclose(grad, theirs[name], atol=1e-6, rtol=1e-4) for name, grad in ours.items())
    with pytest.raises(InputError, match="dequantize"):
        lora.merge(model)


def test_kernels_unpack_where_they_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """An adapter takes the packed weight as the layer's own product does, forward and backward."""
    layer = Linear8bit.quantize(torch.randn(48, 32), None, BitsAndBytesConfig(load_in_8bit=True))
    adapter = lora.LoraLinear(layer)
    adapter.add("default", ALL, "q_proj")
    x = torch.randn(20, 32, requires_grad=True)
    adapter(x).sum().backward()
    wanted, asked = (adapter(x).detach(), x.grad.clone()), []

    class Kernels:
        def multiplies(self, rows: int, dtype: torch.dtype) -> bool:
            return False

        def unpack(self, dtype: torch.dtype) -> torch.Tensor:
            asked.append(dtype)
            return layer.dequantize(dtype)

    monkeypatch.setattr("llama2.quantization.linear.kernels_run", lambda device: True)
    monkeypatch.setattr(Linear8bit, "fused", lambda self: Kernels())
    x.grad = None
    out = adapter(x)
    out.sum().backward()
    assert asked == [torch.float32, torch.float32]
    assert torch.equal(out, wanted[0]) and torch.equal(x.grad, wanted[1])


def test_saved_and_loaded(tmp_path: Path) -> None:
    model = adapted(dtype=torch.float32)
    save_adapter(model, tmp_path / "adapter", ALL)
    other = tiny_model(torch.float32)
    config = load_adapter(other, tmp_path / "adapter")
    assert config == replace(ALL, target_modules=LINEARS)  # written as peft writes it
    assert torch.equal(logits(other), logits(model))


def test_refusals(tmp_path: Path) -> None:
    model = adapted()
    with pytest.raises(InputError, match="there is an adapter 'default' already"):
        lora.add_adapter(model, ALL)
    with pytest.raises(InputError, match="cannot be called 'a.b'"):
        lora.add_adapter(model, ALL, "a.b")
    with pytest.raises(InputError, match="name none of"):
        lora.add_adapter(tiny_model(), LoraConfig(target_modules=("nothing",)))
    with pytest.raises(InputError, match="no adapter 'x'"):
        lora.set_adapter(model, "x")
    with pytest.raises(InputError, match="no adapter 'x'"):
        lora.remove_adapter(model, "x")
    with pytest.raises(InputError, match="no adapter 'x'"):
        save_adapter(model, tmp_path, ALL, "x")
    for given, message in (
        ({"r": 0}, "r is 0"),
        ({"lora_dropout": 1.0}, "lora_dropout"),
        ({"lora_alpha": "x"}, "alpha"),
    ):
        with pytest.raises(InputError, match=message):
            LoraConfig(**given)
