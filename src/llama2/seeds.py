"""Seeds of every generator of random numbers at once."""

import random

import numpy as np
import torch

from llama2.errors import InputError


def set_seed(seed: int, deterministic: bool = False) -> None:
    """Seeds random, numpy and torch with all its devices; `deterministic` also forbids kernels that are not.

    Raises InputError for a seed outside [0, 2**32), which numpy does not take.
    """
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise InputError(f"seed is {seed!r}; it must be an integer in [0, 2**32)")
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)  # of every device
    if deterministic:
        torch.use_deterministic_algorithms(True)
