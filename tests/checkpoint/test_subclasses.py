"""Subclasses of a caller's own, as scripts for transformers write them: what they add is new, the network is loaded."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_config, tiny_model
from torch import nn

from llama2 import (
    CheckpointError,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    LlamaPreTrainedModel,
    MismatchError,
    Trainer,
    TrainingArguments,
)


class Regression(LlamaPreTrainedModel):
    """A number behind each text."""

    config_class = LlamaConfig

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.model = LlamaModel(config)
        self.scale = nn.LayerNorm(config.hidden_size)
        self.head = nn.Linear(config.hidden_size, 1)
        self.post_init()

    def forward(self, input_ids: Any, attention_mask: Any = None, labels: Any = None) -> dict[str, Any]:
        hidden = self.model(input_ids, attention_mask=attention_mask).last_hidden_state[:, -1]
        found = self.head(self.scale(hidden)).squeeze(-1)
        return {"loss": None if labels is None else ((found - labels) ** 2).mean(), "logits": found}


class Probed(LlamaForCausalLM):
    """A language model with a probe."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.probe = nn.Linear(config.hidden_size, 3)
        self.post_init()


class Steered(LlamaForCausalLM):
    """A parameter that no module's class knows how to begin."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.direction = nn.ParameterList([nn.Parameter(torch.ones(config.hidden_size))])


@pytest.fixture
def base(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    tiny_model(torch.float32).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def test_the_network_is_loaded_and_the_rest_is_new(base: Path) -> None:
    with pytest.warns(UserWarning, match=r"scale.weight, scale.bias, head.weight, head.bias of Regression .* newly"):
        model = Regression.from_pretrained(base)
    wanted = LlamaForCausalLM.from_pretrained(base).state_dict()
    for name, value in model.model.state_dict().items():
        assert torch.equal(value, wanted[f"model.{name}"]), name
    assert (model.scale.weight == 1).all() and (model.scale.bias == 0).all() and (model.head.bias == 0).all()
    assert 0.01 < model.head.weight.std() < 0.04  # initializer_range is 0.02


def test_a_language_model_with_more_parts_still_generates(base: Path) -> None:
    with pytest.warns(UserWarning, match="probe.weight, probe.bias of Probed"):
        model = Probed.from_pretrained(base)
    with pytest.warns(UserWarning, match="torch runs this model, not the native engine: the model is a .*Probed"):
        found = model.generate(torch.tensor([[5, 6]]), max_new_tokens=3, do_sample=False)
    plain = LlamaForCausalLM.from_pretrained(base).generate(torch.tensor([[5, 6]]), max_new_tokens=3, do_sample=False)
    assert found.tolist() == plain.tolist()


def test_round_trip_and_training(base: Path, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="newly initialised"):
        model = Regression.from_pretrained(base)
    rows = [{"input_ids": [5, 6, 7 + i], "attention_mask": [1, 1, 1], "labels": float(i)} for i in range(8)]
    args = TrainingArguments(str(tmp_path / "out"), max_steps=8, logging_steps=1, learning_rate=1e-2, report_to="none")
    trainer = Trainer(model, args, train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.6 * losses[0]
    model.save_pretrained(tmp_path / "tuned")
    again = Regression.from_pretrained(tmp_path / "tuned")
    ids = torch.tensor([[5, 6, 9]])
    assert torch.equal(again.eval()(ids)["logits"], model.eval()(ids)["logits"])


def test_what_is_missing_of_the_network_is_still_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(MismatchError, match="missing: model.layers.2"):
        Regression.from_pretrained(base, config=tiny_config(num_hidden_layers=3))


def test_a_parameter_without_a_beginning_is_refused_by_name(base: Path) -> None:
    with (
        pytest.warns(UserWarning, match="newly initialised"),
        pytest.raises(CheckpointError, match=r"direction.0 of Steered is in no checkpoint.*ParameterList a reset"),
    ):
        Steered.from_pretrained(base)
