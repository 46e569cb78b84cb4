"""Heads on the decoder that do not write text: labels of texts, of tokens, and the place of an answer.

Shapes as in `layers`: B batch, T tokens, D model.
"""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama2.config import LlamaConfig
from llama2.errors import InputError
from llama2.model import LlamaModel, PastKeyValues, as_dict, causal_lm_loss
from llama2.outputs import (
    QuestionAnsweringModelOutput,
    SequenceClassifierOutputWithPast,
    TokenClassifierOutput,
)
from llama2.pretrained import PreTrainedModel
from llama2.rope import promoted


class LlamaForSequenceClassification(PreTrainedModel):
    """LlamaModel with a linear classifier on the last real token of each row."""

    loss_type: ClassVar[str | None] = "ForSequenceClassification"

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        config = self.config
        self.num_labels = config.num_labels
        self.model = LlamaModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self._init_weights(self.score)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: PastKeyValues | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> SequenceClassifierOutputWithPast | tuple[Any, ...]:
        """Logits (B, num_labels) at the last real token, and with labels the loss of config.problem_type.

        The last real token is the last one that a 2D attention_mask keeps; without a mask, the right-most id that is
        not config.pad_token_id. A problem_type of None is inferred from num_labels and the labels' dtype, and kept.
        """
        hidden = self.model(
            input_ids,
            attention_mask,
            position_ids,
            past_key_values,
            inputs_embeds,
            use_cache,
            output_attentions,
            output_hidden_states,
            True,
        )
        x_BTD = hidden.last_hidden_state
        last_B = self._last_token(input_ids, attention_mask, x_BTD)
        # Only the pooled rows go through the classifier: the other T - 1 results would be thrown away.
        logits, loss = self.classify(x_BTD[torch.arange(len(x_BTD), device=x_BTD.device), last_B], labels)
        output = SequenceClassifierOutputWithPast(
            loss, logits, hidden.past_key_values, hidden.hidden_states, hidden.attentions
        )
        return output if as_dict(self.config, return_dict) else output.to_tuple()

    def classify(self, last_BD: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Logits (B, num_labels) of the hidden states at the last tokens, and with labels the loss."""
        logits: Tensor = self.score(last_BD)
        return logits, None if labels is None else self._loss(logits, labels.to(logits.device))

    def _last_token(self, input_ids: Tensor | None, attention_mask: Tensor | None, x_BTD: Tensor) -> Tensor:
        batch, new_tokens = x_BTD.shape[:2]
        pad = self.config.pad_token_id
        if attention_mask is not None and attention_mask.dim() == 2:
            real = attention_mask[:, -new_tokens:] != 0
        elif input_ids is not None and pad is not None:
            real = input_ids != pad
        elif batch > 1 and input_ids is not None:
            raise InputError(
                f"Cannot handle batch sizes > 1 if no padding token is defined. The batch has {batch} rows: pass the "
                "attention_mask, or set one with model.add_pad_token(tokenizer)"
            )
        else:
            real = torch.ones((batch, new_tokens), dtype=torch.bool, device=x_BTD.device)
        places = torch.arange(new_tokens, device=x_BTD.device)
        return torch.where(real.to(x_BTD.device), places, 0).amax(dim=1)

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        config = self.config
        if config.problem_type is None:
            if self.num_labels == 1:
                config.problem_type = "regression"
            elif not labels.is_floating_point() and labels.dim() == 1:
                config.problem_type = "single_label_classification"
            else:
                config.problem_type = "multi_label_classification"
        logits = logits.to(promoted(logits.dtype))
        if config.problem_type == "regression":
            return F.mse_loss(logits.reshape(-1), labels.reshape(-1).to(logits.dtype))
        if config.problem_type == "single_label_classification":
            return F.cross_entropy(logits.view(-1, self.num_labels), labels.view(-1))
        if config.problem_type == "multi_label_classification":
            return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))
        raise InputError(
            f"problem_type is {config.problem_type!r}; it must be 'regression', 'single_label_classification' or "
            "'multi_label_classification'"
        )


class LlamaForTokenClassification(PreTrainedModel):
    """LlamaModel with a linear classifier on every token."""

    loss_type: ClassVar[str | None] = "ForTokenClassification"

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        config = self.config
        self.num_labels = config.num_labels
        self.model = LlamaModel(config)
        rates = (getattr(config, name, None) for name in ("classifier_dropout", "hidden_dropout"))
        self.dropout = nn.Dropout(next((rate for rate in rates if rate is not None), 0.1))
        self.score = nn.Linear(config.hidden_size, config.num_labels)
        self._init_weights(self.score)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: PastKeyValues | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> TokenClassifierOutput | tuple[Any, ...]:
        """Logits (B, T, num_labels), and with labels (B, T) the mean cross entropy of those that are not -100."""
        hidden = self.model(
            input_ids,
            attention_mask,
            position_ids,
            past_key_values,
            inputs_embeds,
            use_cache,
            output_attentions,
            output_hidden_states,
            True,
        )
        logits: Tensor = self.score(self.dropout(hidden.last_hidden_state))
        loss = None if labels is None else causal_lm_loss(logits, labels, shift=False)
        output = TokenClassifierOutput(loss, logits, hidden.hidden_states, hidden.attentions)
        return output if as_dict(self.config, return_dict) else output.to_tuple()


class LlamaForQuestionAnswering(PreTrainedModel):
    """LlamaModel with two scores per token: that the answer begins, and that it ends there."""

    loss_type: ClassVar[str | None] = "ForQuestionAnswering"

    base_model_prefix = "transformer"

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        config = self.config
        self.transformer = LlamaModel(config)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self._init_weights(self.qa_outputs)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: PastKeyValues | None = None,
        inputs_embeds: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> QuestionAnsweringModelOutput | tuple[Any, ...]:
        """start_logits and end_logits (B, T); with both positions (B,) the mean of their cross entropies.

        A position at or beyond T lies outside the text that is shown and does not count.
        """
        hidden = self.transformer(
            input_ids,
            attention_mask,
            position_ids,
            past_key_values,
            inputs_embeds,
            use_cache,
            output_attentions,
            output_hidden_states,
            True,
        )
        start_BT, end_BT = self.qa_outputs(hidden.last_hidden_state).unbind(-1)
        loss = None
        if start_positions is not None and end_positions is not None:
            loss = (_position_loss(start_BT, start_positions) + _position_loss(end_BT, end_positions)) / 2
        output = QuestionAnsweringModelOutput(loss, start_BT, end_BT, hidden.hidden_states, hidden.attentions)
        return output if as_dict(self.config, return_dict) else output.to_tuple()


def _position_loss(logits_BT: Tensor, positions: Tensor) -> Tensor:
    """Mean cross entropy of one position (B,) or (B, 1) a row; 0 where none lies inside the T tokens."""
    positions_B = positions.reshape(-1).to(logits_BT.device)
    inside_B = positions_B < logits_BT.shape[1]
    return causal_lm_loss(logits_BT, positions_B.clamp(min=0).masked_fill(~inside_B, -100), shift=False)
