"""A policy to be made better: a tiny model that does not repeat itself, with a tokenizer of bytes."""

from pathlib import Path
from typing import Any

import torch
from bytewise import write_tokenizer
from tiny import tiny_model


def write_policy(folder: Path, **sizes: Any) -> None:
    """Its folder. The head is scaled down, so that samples differ from each other."""
    model = tiny_model(torch.float32, 0, **{"vocab_size": 260, "eos_token_id": 0, "bos_token_id": None, **sizes})
    with torch.no_grad():
        model.lm_head.weight.mul_(0.3)
    model.save_pretrained(folder)
    write_tokenizer(folder)
