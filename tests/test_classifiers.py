"""Heads for tokens and for answers: the values of transformers 5.23 on the same weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_config, tiny_ids, tiny_model

from llama2 import (
    AutoModelForQuestionAnswering,
    AutoModelForTokenClassification,
    LlamaForQuestionAnswering,
    LlamaForTokenClassification,
)

LABELS = torch.tensor([[0, 1, 2, -100, 1, 0], [2, 2, -100, 0, 1, 1]])


def _model(kind: Any) -> Any:
    torch.manual_seed(0)
    model = kind(tiny_config(num_labels=3)).double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if name.endswith("norm.weight") else 0.0, 0.3)
    return model


def test_token_classification_has_the_values_of_transformers() -> None:
    out = _model(LlamaForTokenClassification)(tiny_ids(2, 6), labels=LABELS)
    assert list(out.keys()) == ["loss", "logits"] and out.logits.shape == (2, 6, 3)
    assert out.loss.item() == pytest.approx(2.0602662563323975, abs=1e-5)
    expected = [2.599628885930981, -2.8379781138362583, -2.9613941384431914]
    assert out.logits[0, 0].tolist() == pytest.approx(expected, abs=1e-5)


def test_question_answering_has_the_values_of_transformers() -> None:
    """A position behind the text that is shown (9 of 6 tokens) does not count."""
    out = _model(LlamaForQuestionAnswering)(
        tiny_ids(2, 6), start_positions=torch.tensor([1, 9]), end_positions=torch.tensor([[4], [2]])
    )
    assert list(out.keys()) == ["loss", "start_logits", "end_logits"]
    assert out.loss.item() == pytest.approx(3.5507237012787884, abs=1e-5)
    assert out.start_logits[0, :2].tolist() == pytest.approx([1.741449964062065, -1.355841524956416], abs=1e-5)
    assert out.end_logits[0, :2].tolist() == pytest.approx([0.4788759554345109, -4.07263953568298], abs=1e-5)


def test_dropout_of_the_token_classifier() -> None:
    assert LlamaForTokenClassification(tiny_config()).dropout.p == 0.1
    assert LlamaForTokenClassification(tiny_config(hidden_dropout=0.2)).dropout.p == 0.2
    assert LlamaForTokenClassification(tiny_config(classifier_dropout=0.0, hidden_dropout=0.2)).dropout.p == 0.0


@pytest.mark.parametrize("auto", [AutoModelForTokenClassification, AutoModelForQuestionAnswering])
def test_a_causal_checkpoint_gets_a_new_head(auto: Any, tmp_path: Path) -> None:
    """Its decoder is taken over, under whatever name the class has for it."""
    base = tiny_model(torch.float32)
    base.save_pretrained(tmp_path / "base")
    with pytest.warns(UserWarning, match="newly initialised"):
        model = auto.from_pretrained(tmp_path / "base")
    assert torch.equal(model.base_model.norm.weight, base.model.norm.weight)
    model.save_pretrained(tmp_path / "own")
    again = auto.from_pretrained(tmp_path / "own")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
