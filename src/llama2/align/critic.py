"""The critic of PPO: the expected return after each token, from a value head of its own.

    shared    the head on the policy's hidden states, whose gradient stays in the head: next to no memory or time
    adapter   a second adapter over the policy's weights, and the head: one copy of the weights, a trunk of its own
    model     a whole model: of a value_model, or a copy of the policy

The head begins at zero, so that first advantages are those of rewards alone.
"""

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from llama2 import lora
from llama2.errors import InputError
from llama2.lora_config import LoraConfig
from llama2.rope import promoted
from llama2.train.fused_layer import fused
from llama2.train.losses import targets
from llama2.train.objectives import Batch, hidden_of

Kind = Literal["shared", "adapter", "model"]
ADAPTER = "critic"


class Critic(nn.Module):
    """Values (N,) of the answers' tokens. network: the trunk, None where it is the policy's."""

    def __init__(self, kind: Kind, policy: Any, network: Any = None, config: LoraConfig | None = None) -> None:
        """config: of the critic's adapter. Raises InputError where a kind needs what is not there."""
        super().__init__()
        if kind not in get_args(Kind):
            raise InputError(f"critic is {kind!r}; it must be one of {', '.join(get_args(Kind))}")
        first = next(policy.parameters())
        self.kind = kind
        dtype = first.dtype if first.itemsize > 2 else torch.float32
        self.head = nn.Linear(policy.config.hidden_size, 1, dtype=dtype, device=first.device)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.network = None
        if kind == "model":
            self.network = copy.deepcopy(policy) if network is None else network
            if self.network.config.hidden_size != policy.config.hidden_size:
                self.head = nn.Linear(self.network.config.hidden_size, 1, dtype=dtype, device=first.device)
                nn.init.zeros_(self.head.weight)
                nn.init.zeros_(self.head.bias)
            if self.network.config.vocab_size != policy.config.vocab_size:
                raise InputError(
                    f"the value model has {self.network.config.vocab_size} tokens and the policy "
                    f"{policy.config.vocab_size}; give one of the same vocabulary"
                )
            for name, parameter in self.network.named_parameters():
                parameter.requires_grad_(name.startswith("model."))
        elif kind == "adapter":
            _add(policy, config)

    def parameters_of(self, policy: nn.Module) -> dict[str, nn.Parameter]:
        """Returns the parameters trained besides the policy's, by name."""
        found = {f"critic.{name}": p for name, p in self.named_parameters() if p.requires_grad}
        if self.kind == "adapter":
            for path, layer in lora.layers(policy).items():
                for part in ("lora_A", "lora_B"):
                    if ADAPTER in (held := getattr(layer, part)):
                        found[f"{path}.{part}.{ADAPTER}"] = held[ADAPTER]
        return found

    def ready(self) -> AbstractContextManager[None]:
        """Returns the context for training: a separate trunk has fused layers too."""
        return nullcontext() if self.network is None else fused(self.network)

    def forward(self, policy: Any, batch: Batch, rows_ND: Tensor) -> Tensor:
        """Values (N,) before each token of the answers; rows_ND: the policy's hidden states there."""
        if self.kind == "adapter":
            with using(policy, ADAPTER):
                rows_ND = targets(*hidden_of(policy, batch))[0]
        elif self.kind == "model":
            rows_ND = targets(*hidden_of(self.network, batch))[0]
        else:
            rows_ND = rows_ND.detach()
        wide = promoted(rows_ND.dtype)
        values: Tensor = (rows_ND.to(wide) @ self.head.weight.to(wide).T).squeeze(-1) + self.head.bias.to(wide)
        return values


def _add(policy: Any, config: LoraConfig | None) -> None:
    if config is None or not lora.names(policy):
        raise InputError("critic='adapter' needs an adapter that is trained (peft_config); take 'shared' or 'model'")
    own = lora.current(policy)
    trained = {name for name, p in policy.named_parameters() if p.requires_grad}
    lora.add_adapter(policy, config, ADAPTER)
    lora.set_adapter(policy, own)
    for name, parameter in policy.named_parameters():
        parameter.requires_grad_(name in trained or f".{ADAPTER}" in name)


@contextmanager
def using(model: nn.Module, name: str) -> Iterator[None]:
    """Within it an adapter is the active one; what is trained stays as it is."""
    there = lora.layers(model).values()
    before = [layer.active for layer in there]
    for layer in there:
        layer.active = (name,) if name in layer.lora_A else ()
    try:
        yield
    finally:
        for layer, active in zip(there, before, strict=True):
            layer.active = active
