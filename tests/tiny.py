"""Tiny configurations and seeded models that the tests share: grouped heads, an odd vocabulary."""

from typing import Any

import torch

from llama2 import LlamaConfig, LlamaForCausalLM, LoraConfig, lora

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "gqa": {},
    "mha": {"num_key_value_heads": 4},
    "mqa": {"num_key_value_heads": 1},
    "head_dim": {"head_dim": 24},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "tied": {"tie_word_embeddings": True},
    "linear": {"rope_scaling": {"type": "linear", "factor": 2.0}},
    "dynamic": {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}, "max_position_embeddings": 32},
    "yarn": {
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    },
    "llama3": {"rope_scaling": LLAMA3},
}


def tiny_config(**changes: Any) -> LlamaConfig:
    """The tiny configuration with some fields changed."""
    return LlamaConfig(**{**SIZES, **changes})


def tiny_model(dtype: torch.dtype = torch.float64, seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    """A seeded model in eval mode whose weights are large enough for every mistake to show in the logits."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(tiny_config(**changes)).double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if name.endswith("norm.weight") else 0.0, 0.3)
    return model.to(dtype)


def tiny_ids(rows: int = 1, tokens: int = 12, seed: int = 1) -> torch.Tensor:
    """Token ids (rows, tokens) that avoid 0, the usual pad id."""
    return torch.randint(1, SIZES["vocab_size"], (rows, tokens), generator=torch.Generator().manual_seed(seed))


def random_adapter(model: Any, config: LoraConfig, seed: int) -> None:
    """Gives a model an adapter that changes its answers, as training would have left it."""
    lora.add_adapter(model, config)
    torch.manual_seed(seed)
    with torch.no_grad():
        for layer in lora.layers(model).values():
            layer.lora_B["default"].normal_(0, 0.3)
            for magnitude in layer.lora_magnitude_vector.values():
                magnitude.mul_(1 + 0.2 * torch.rand_like(magnitude))
