"""NEFTune: noise on the embeddings while a model trains."""

import contextlib
import math
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn

from llama2.pretrained import PreTrainedModel


def noisy(alpha: float, module: nn.Module, _: object, output: Tensor) -> Tensor:
    """NEFTune (arXiv 2310.05914): uniform noise on embeddings (B, T, D), alpha / sqrt(T D) at most."""
    if not module.training:
        return output
    most = alpha / math.sqrt(output.shape[1] * output.shape[2])
    return output + torch.zeros_like(output).uniform_(-most, most)


@contextlib.contextmanager
def neftune(model: PreTrainedModel, alpha: float | None) -> Iterator[None]:
    """Within it the model's embeddings are noisy while it trains."""
    if not alpha:
        yield
        return
    hook = model.get_input_embeddings().register_forward_hook(partial(noisy, alpha))
    try:
        yield
    finally:
        hook.remove()
