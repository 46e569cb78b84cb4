"""Which layer holds the weights of which quantisation method: the one table of the packed formats."""

from llama2.errors import InputError
from llama2.quantization.gguf import GgufLinear
from llama2.quantization.gptq import GptqLinear
from llama2.quantization.int8 import Linear8bit
from llama2.quantization.linear import PackedLinear
from llama2.quantization.nf4 import Linear4bit
from llama2.quantization_config import BitsAndBytesConfig, GgufConfig, GPTQConfig, QuantizationConfig


def layer_class(config: QuantizationConfig) -> type[PackedLinear]:
    """The layer of a checkpoint with this configuration."""
    if isinstance(config, BitsAndBytesConfig):
        return Linear8bit if config.load_in_8bit else Linear4bit
    if isinstance(config, GPTQConfig):
        return GptqLinear
    if isinstance(config, GgufConfig):
        return GgufLinear
    raise InputError(f"{config.quant_method} has no packed layer here")
