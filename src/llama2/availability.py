"""Which packages and devices there are, under transformers' names: `is_bitsandbytes_available()`.

A package is looked up and not imported; a device is asked for through torch.
"""

from importlib.util import find_spec


def _found(package: str) -> bool:
    return find_spec(package) is not None


def is_torch_available() -> bool:
    """Whether torch is installed."""
    return _found("torch")


def is_torch_cuda_available() -> bool:
    """Whether torch sees a CUDA device."""
    import torch

    return torch.cuda.is_available()


def is_torch_npu_available() -> bool:
    """False: Ascend devices are not supported."""
    return False


def is_torch_xpu_available() -> bool:
    """False: models run on a CPU or on CUDA; Intel's GPUs are not supported."""
    return False


def is_torch_bf16_gpu_available() -> bool:
    """Whether there is a CUDA device that computes in bfloat16."""
    import torch

    return torch.cuda.is_available() and torch.cuda.is_bf16_supported()


def is_accelerate_available() -> bool:
    """Whether accelerate is installed. Nothing here needs it."""
    return _found("accelerate")


def is_bitsandbytes_available() -> bool:
    """Whether bitsandbytes is installed. Loading in 4 and 8 bits here does not need it."""
    return _found("bitsandbytes")


def is_datasets_available() -> bool:
    """Whether datasets is installed."""
    return _found("datasets")


def is_flash_attn_2_available() -> bool:
    """Whether attn_implementation="flash_attention_2" runs: a CUDA device, whose kernel is flash_attn's or torch's."""
    return is_torch_cuda_available()


def is_peft_available() -> bool:
    """Whether peft is installed. Adapters here do not need it."""
    return _found("peft")


def is_safetensors_available() -> bool:
    """Whether safetensors is installed."""
    return _found("safetensors")


def is_sentencepiece_available() -> bool:
    """Whether sentencepiece is installed."""
    return _found("sentencepiece")


def is_tokenizers_available() -> bool:
    """Whether tokenizers is installed."""
    return _found("tokenizers")
