"""SFTTrainer, DPOTrainer and RewardTrainer: TRL 1.16's losses for the same weights and rows, recorded."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from bytewise import write_tokenizer
from tiny import tiny_config, tiny_model

from llama2 import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    CPOConfig,
    DPOConfig,
    DPOTrainer,
    InputError,
    KTOConfig,
    LlamaForSequenceClassification,
    LoraConfig,
    ORPOConfig,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
    TrainingArguments,
    get_peft_model,
    lora,
)
from llama2.train import fields
from llama2.train.configs import CONFIGS

QUICK = {"per_device_train_batch_size": 2, "max_steps": 3, "logging_steps": 1, "learning_rate": 1e-3,
         "save_strategy": "no", "train_sampling_strategy": "sequential", "lr_scheduler_type": "constant"}  # fmt: skip
TEXTS = [{"text": f"cup {i} of tea"} for i in range(6)]
ANSWERS = [{"prompt": f"say {i}: ", "completion": f"it is {i}"} for i in range(6)]
CHATS = [{"messages": [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": f"it is {i}"}]}
         for i in range(6)]  # fmt: skip
ASKED = [{"q": f"say {i}: ", "a": f"it is {i}"} for i in range(6)]
PAIRS = [{"prompt": f"say {i}: ", "chosen": f"it is {i}", "rejected": f"no {i} here"} for i in range(6)]


@pytest.fixture
def tok(tmp_path: Path) -> Any:
    """The byte-level tokenizer, with a pad token of its own."""
    (tmp_path / "tok").mkdir()
    write_tokenizer(tmp_path / "tok")
    found = AutoTokenizer.from_pretrained(tmp_path / "tok")
    found.pad_token = "<|system|>"
    return found


def ranker() -> LlamaForSequenceClassification:
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(tiny_config(vocab_size=260, num_labels=1, pad_token_id=0)).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if name.endswith("norm.weight") else 0.0, 0.3)
    return model.float()


def causal() -> Any:
    return tiny_model(torch.float32, vocab_size=260)


def losses(trainer: Any, name: str = "loss") -> list[float]:
    trainer.train()
    return [entry[name] for entry in trainer.state.log_history if name in entry]


@pytest.mark.parametrize(
    ("rows", "changes", "wanted"),
    [
        (TEXTS, {}, [8.16934, 7.27174, 5.85722]),
        (ANSWERS, {}, [8.83926, 7.64697, 6.58973]),
        (ANSWERS, {"completion_only_loss": False}, [8.84867, 7.3729, 6.87514]),
        (CHATS, {}, [7.83444, 7.10425, 6.22809]),
        (ASKED, {"formatting_func": lambda row: f"{row['q']}={row['a']}"}, [8.03886, 7.07486, 6.783]),
        (ANSWERS, {"loss_type": "dft"}, [0.00457, 0.00653, 0.0268]),
        (TEXTS, {"packing": True, "max_length": 32}, [8.01336, 6.45096, 6.01619]),
        ([{"words": row["text"]} for row in TEXTS], {"dataset_text_field": "words"}, [8.16934, 7.27174, 5.85722]),
    ],
)
def test_losses_of_sft_are_trls(tmp_path: Path, tok: Any, rows: Any, changes: Any, wanted: list[float]) -> None:
    changes = dict(changes)
    function = changes.pop("formatting_func", None)
    args = SFTConfig(str(tmp_path), **QUICK, **changes)
    trainer = SFTTrainer(causal(), args, train_dataset=rows, processing_class=tok, formatting_func=function)
    assert losses(trainer) == pytest.approx(wanted, abs=1e-3)


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"max_length": 8}, [7.9346, 7.03286, 5.54672]),
        ({"max_length": 8, "truncation_mode": "keep_end"}, [8.24228, 6.31618, 4.75457]),
        ({"max_seq_length": 8}, [7.9346, 7.03286, 5.54672]),
    ],
)
def test_rows_that_are_cut(tmp_path: Path, tok: Any, changes: Any, wanted: list[float]) -> None:
    args = SFTConfig(str(tmp_path), **QUICK, **changes)
    with pytest.warns(UserWarning, match=r"train_dataset, of 6 rows: 6 answers are cut at .* of 8 tokens"):
        trainer = SFTTrainer(causal(), args, train_dataset=TEXTS, processing_class=tok)
    assert losses(trainer) == pytest.approx(wanted, abs=1e-3)


def test_answers_alone_are_learnt_of_chats_where_that_is_said(tmp_path: Path, tok: Any) -> None:
    args = SFTConfig(str(tmp_path), **QUICK, assistant_only_loss=True)
    trainer = SFTTrainer(causal(), args, train_dataset=CHATS, processing_class=tok)
    kept = [token for token in trainer.rows[0].labels if token != -100]
    assert tok.decode(kept) == "it is 0<|end|>"
    with pytest.raises(InputError, match="assistant_only_loss is for chats"):
        SFTTrainer(causal(), args, train_dataset=TEXTS, processing_class=tok)
    args = SFTConfig(str(tmp_path), **QUICK, completion_only_loss=True)
    with pytest.raises(InputError, match="completion_only_loss is for rows of prompt and completion"):
        SFTTrainer(causal(), args, train_dataset=CHATS, processing_class=tok)


def test_a_function_of_a_batch_of_rows_as_in_trl_0(tmp_path: Path, tok: Any) -> None:
    def texts(batch: Any) -> list[str]:
        return [f"{batch['q'][i]}={batch['a'][i]}" for i in range(len(batch["q"]))]

    args = SFTConfig(str(tmp_path), **QUICK)
    trainer = SFTTrainer(causal(), args, train_dataset=ASKED, tokenizer=tok, formatting_func=texts)
    assert tok.decode(trainer.rows[3].input_ids) == "say 3: =it is 3<|end|>"


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({}, [0.69315, 0.26144, 0.09969]),
        ({"loss_type": ["ipo"]}, [25.0, 13.18389, 5.87363]),
        ({"loss_type": "hinge"}, [1.0, 0.03571, 0.0]),
        ({"loss_type": "robust", "label_smoothing": 0.1}, [0.69315, 0.1056, -0.18758]),
    ],
)
def test_losses_of_dpo_are_trls(tmp_path: Path, tok: Any, changes: Any, wanted: list[float]) -> None:
    args = DPOConfig(str(tmp_path), **QUICK, **changes)
    trainer = DPOTrainer(causal(), args=args, train_dataset=PAIRS, processing_class=tok)
    assert losses(trainer) == pytest.approx(wanted, abs=2e-3)
    assert {"rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"} <= set(
        trainer.state.log_history[0]
    )


def test_pairs_that_are_cut(tmp_path: Path, tok: Any) -> None:
    for mode, wanted in (("keep_start", [0.69315, 0.30402, 0.14043]), ("keep_end", [0.69315, 0.38766, 0.36746])):
        args = DPOConfig(str(tmp_path), **QUICK, max_length=14, truncation_mode=mode)
        with pytest.warns(UserWarning, match="are cut at the longest length"):
            trainer = DPOTrainer(causal(), args=args, train_dataset=PAIRS, processing_class=tok)
        assert losses(trainer) == pytest.approx(wanted, abs=1e-3)
    args = DPOConfig(str(tmp_path), **QUICK, max_prompt_length=3, max_completion_length=5)
    trainer = DPOTrainer(causal(), args=args, train_dataset=PAIRS, processing_class=tok)
    assert tok.decode(trainer.rows[2].chosen.input_ids) == "2: it is"
    assert trainer.rows[2].chosen.labels[:3] == [-100] * 3 and trainer.rows[2].rejected.labels[3] != -100


def test_the_reference_is_the_one_that_is_given(tmp_path: Path, tok: Any) -> None:
    other = tiny_model(torch.float32, seed=3, vocab_size=260)
    before = {name: p.clone() for name, p in other.named_parameters()}
    args = DPOConfig(str(tmp_path), **QUICK)
    trainer = DPOTrainer(causal(), other, args, train_dataset=PAIRS, tokenizer=tok)
    assert losses(trainer)[0] != pytest.approx(0.69315, abs=1e-3)
    assert all(torch.equal(p, before[name]) and not p.requires_grad for name, p in other.named_parameters())
    model = causal()
    with pytest.raises(InputError, match="ref_model is the model itself"):
        DPOTrainer(model, model, args, train_dataset=PAIRS, tokenizer=tok)
    with pytest.raises(InputError, match="compute_metrics is not supported by DPOTrainer"):
        DPOTrainer(model, None, args, train_dataset=PAIRS, tokenizer=tok, compute_metrics=print)


@pytest.mark.parametrize(
    ("changes", "rows", "wanted"),
    [
        ({}, PAIRS, [1.87285, 0.01847, 0.00089]),
        ({"center_rewards_coefficient": 0.1}, PAIRS, [3.29779, 1.35897, 0.15196]),
        ({}, [{**row, "margin": 0.5 * i} for i, row in enumerate(PAIRS)], [2.10329, 0.0617, 0.01075]),
    ],
)
def test_losses_of_rewards_are_trls(tmp_path: Path, tok: Any, changes: Any, rows: Any, wanted: list[float]) -> None:
    args = RewardConfig(str(tmp_path), **QUICK, **changes, eval_strategy="steps", eval_steps=3)
    trainer = RewardTrainer(ranker(), args, train_dataset=rows, eval_dataset=rows[:2], processing_class=tok)
    assert losses(trainer) == pytest.approx(wanted, abs=1e-3)
    first = trainer.state.log_history[0]
    assert first["mean_reward"] == pytest.approx(1.75894, abs=1e-3)
    assert first["margin"] == pytest.approx(-1.68281, abs=1e-3) and first["accuracy"] == 0
    assert (first["min_reward"], first["max_reward"]) == pytest.approx((0.50456, 3.55629), abs=1e-3)
    assert trainer.evaluate()["eval_accuracy"] == 1.0


def test_rows_of_rewards(tmp_path: Path, tok: Any) -> None:
    ids = [{"chosen_ids": [5, 6, 7], "rejected_ids": [5, 6]}, {"chosen_ids": [5] * 9, "rejected_ids": [5]}]
    args = RewardConfig(str(tmp_path), **QUICK, max_length=8)
    with pytest.warns(UserWarning, match=r"an answer is longer than 8 tokens \(max_length\): rows 1"):
        trainer = RewardTrainer(ranker(), args, train_dataset=ids, processing_class=tok)
    assert len(trainer.rows) == 1
    with pytest.raises(InputError, match="margin is 'wide'; it must be a number"):
        RewardTrainer(ranker(), args, train_dataset=[{**PAIRS[0], "margin": "wide"}], processing_class=tok)
    model = LlamaForSequenceClassification(tiny_config(vocab_size=260, num_labels=2))
    with pytest.raises(InputError, match="the model has 2 labels, and a reward is one number"):
        RewardTrainer(model, args, train_dataset=PAIRS, processing_class=tok)


def test_a_reward_model_with_an_adapter_is_saved_with_its_head(tmp_path: Path, tok: Any) -> None:
    ranker().save_pretrained(tmp_path / "base")
    tok.save_pretrained(tmp_path / "base")
    args = RewardConfig(str(tmp_path / "out"), **{**QUICK, "save_strategy": "steps"})
    trainer = RewardTrainer(str(tmp_path / "base"), args, train_dataset=PAIRS, peft_config=LoraConfig(r=2))
    assert trainer.network.score.weight.requires_grad and trainer.network.config.num_labels == 1
    trainer.train()
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / "checkpoint-3")
    assert torch.equal(again.score.weight, trainer.network.score.weight)


# -- what is given -----------------------------------------------------------------------------------------------


def test_a_model_as_a_path_and_the_keywords_of_trl_0(tmp_path: Path, tok: Any) -> None:
    causal().save_pretrained(tmp_path / "base")
    tok.save_pretrained(tmp_path / "base")
    args = TrainingArguments(str(tmp_path / "out"), **QUICK)
    trainer = SFTTrainer(
        model=str(tmp_path / "base"), args=args, train_dataset=[{"words": row["text"]} for row in TEXTS],
        dataset_text_field="words", max_seq_length=64, packing=False, peft_config=LoraConfig(r=2),
    )  # fmt: skip
    assert isinstance(trainer.args, SFTConfig) and trainer.args.max_length == 64 and trainer.args.max_steps == 3
    assert lora.names(trainer.network) == ["default"] and trainer.processing_class.pad_token == "<|system|>"
    assert losses(trainer)[0] == pytest.approx(8.16934, abs=1e-3)
    trainer.save_model(str(tmp_path / "adapter"))
    assert lora.names(AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")) == ["default"]
    dpo = DPOTrainer(
        causal(), None, beta=0.2, args=DPOConfig(str(tmp_path), **QUICK), train_dataset=PAIRS, tokenizer=tok
    )
    assert dpo.args.beta == dpo.objective.beta == 0.2
    with pytest.raises(InputError, match="SFTTrainer has no 'max_sequence'"):
        SFTTrainer(causal(), args, train_dataset=TEXTS, tokenizer=tok, max_sequence=3)
    with pytest.raises(InputError, match="the model has an adapter already, and there is a peft_config"):
        adapted = get_peft_model(causal(), LoraConfig(r=2))
        SFTTrainer(adapted, SFTConfig(str(tmp_path)), train_dataset=TEXTS, tokenizer=tok, peft_config=LoraConfig(r=3))
    same = SFTTrainer(
        adapted, SFTConfig(str(tmp_path)), train_dataset=TEXTS, tokenizer=tok, peft_config=LoraConfig(r=2)
    )
    assert lora.names(same.network) == ["default"]  # scripts give both
    with pytest.raises(InputError, match="the model does not know where it is from; pass processing_class"):
        SFTTrainer(causal(), SFTConfig(str(tmp_path)), train_dataset=TEXTS)


def test_rows_of_ids_with_masks(tmp_path: Path, tok: Any) -> None:
    rows = [{"input_ids": [5, 6, 7, 8], "completion_mask": [0, 0, 1, 1]}, {"input_ids": [5, 6], "labels": [5, 6]}]
    trainer = SFTTrainer(causal(), SFTConfig(str(tmp_path), **QUICK), train_dataset=rows, processing_class=tok)
    assert [row.labels for row in trainer.rows] == [[-100, -100, 7, 8], [-100, 6]]


def test_tokens_and_templates_of_the_configuration(tmp_path: Path, tok: Any) -> None:
    (tmp_path / "chat.jinja").write_text("{% for m in messages %}{{ m['content'] }}<|user|>{% endfor %}")
    args = SFTConfig(str(tmp_path), **QUICK, eos_token="<|user|>", chat_template_path=str(tmp_path / "chat.jinja"))
    trainer = SFTTrainer(causal(), args, train_dataset=CHATS, processing_class=tok)
    assert tok.decode(trainer.rows[1].input_ids) == "say 1<|user|>it is 1<|user|>"
    with pytest.raises(InputError, match="eos_token is '<never>', which the tokenizer does not have"):
        SFTTrainer(causal(), SFTConfig(str(tmp_path), eos_token="<never>"), train_dataset=CHATS, processing_class=tok)


# -- configurations ----------------------------------------------------------------------------------------------

# The fields of TRL 1.16 besides those of TrainingArguments.
FIELDS = {
    SFTConfig: """model_init_kwargs trust_remote_code router_aux_loss_coef chat_template_path dataset_text_field
    dataset_kwargs dataset_num_proc eos_token max_length truncation_mode shuffle_dataset packing packing_strategy
    padding_free pad_to_multiple_of eval_packing completion_only_loss assistant_only_loss loss_type
    activation_offloading pad_token max_seq_length dataset_batch_size num_of_sequences chars_per_token use_liger""",
    DPOConfig: """model_init_kwargs trust_remote_code router_aux_loss_coef disable_dropout dataset_num_proc max_length
    truncation_mode padding_free pad_to_multiple_of precompute_ref_log_probs precompute_ref_batch_size loss_type
    loss_weights ld_alpha f_divergence_type f_alpha_divergence_coef label_smoothing beta use_weighting discopop_tau
    activation_offloading sync_ref_model ref_model_mixup_alpha ref_model_sync_steps pad_token max_prompt_length
    max_completion_length reference_free rpo_alpha ref_model_init_kwargs model_adapter_name ref_adapter_name
    generate_during_eval force_use_ref_model label_pad_token_id padding_value is_encoder_decoder""",
    RewardConfig: """model_init_kwargs trust_remote_code chat_template_path disable_dropout dataset_num_proc eos_token
    max_length pad_to_multiple_of center_rewards_coefficient activation_offloading pad_token""",
    KTOConfig: """model_init_kwargs trust_remote_code router_aux_loss_coef disable_dropout dataset_num_proc max_length
    pad_to_multiple_of precompute_ref_log_probs precompute_ref_batch_size loss_type beta desirable_weight
    undesirable_weight activation_offloading sync_ref_model ref_model_mixup_alpha ref_model_sync_steps""",
    ORPOConfig: """max_length max_completion_length beta disable_dropout padding_value generate_during_eval
    is_encoder_decoder model_init_kwargs trust_remote_code dataset_num_proc""",
    CPOConfig: """max_length max_completion_length beta label_smoothing loss_type disable_dropout cpo_alpha simpo_gamma
    alpha generate_during_eval is_encoder_decoder model_init_kwargs trust_remote_code dataset_num_proc""",
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_fields_of_trl(kind: Any, tmp_path: Path) -> None:
    names = {f.name for f in dataclasses.fields(kind)}
    assert set(FIELDS[kind].split()) <= names and set(kind.OWN_NO_EFFECT) <= names
    for f in dataclasses.fields(kind):
        if any(word in str(f.type) for word in ("int", "float")) and f.name not in ("loss_weights",):
            assert f.name in fields.NUMBERS or f.name == "pad_to_multiple_of", f.name
    made = kind(str(tmp_path))
    rates = {SFTConfig: 2e-5, RewardConfig: 1e-4}
    assert made.learning_rate == rates.get(kind, 1e-6) and made.logging_steps == 10 and made.max_length == 1024


@pytest.mark.parametrize(
    ("kind", "given", "said"),
    [
        (DPOConfig, {"beta": 0}, "beta is 0; it must be above 0"),
        (DPOConfig, {"label_smoothing": 0.1, "loss_type": "ipo"}, "label_smoothing is 0.1, which ipo does not have"),
        (DPOConfig, {"label_smoothing": 0.1, "loss_type": "hinge"}, "which hinge does not have; use sigmoid or robust"),
        (DPOConfig, {"label_smoothing": 0.5}, r"must lie in \[0, 0.5\)"),
        (DPOConfig, {"loss_type": "kto_pair"}, "loss_type is 'kto_pair'; it must be one of sigmoid, ipo"),
        (DPOConfig, {"loss_type": ["sigmoid", "sft"]}, "it must be one of sigmoid"),
        (DPOConfig, {"rpo_alpha": 1.0}, "rpo_alpha is 1.0, which is not supported"),
        (DPOConfig, {"sync_ref_model": True}, "sync_ref_model is True, which is not supported; the reference stays"),
        (DPOConfig, {"ref_adapter_name": "x"}, "ref_adapter_name is 'x', which is not supported"),
        (SFTConfig, {"packing": True, "max_length": None}, "packing needs max_length"),
        (SFTConfig, {"packing_strategy": "tight"}, "packing_strategy is 'tight'; it must be one of bfd"),
        (SFTConfig, {"truncation_mode": "middle"}, "truncation_mode is 'middle'"),
        (SFTConfig, {"max_length": 0}, "max_length is 0; it must be a whole number, at least 1"),
        (SFTConfig, {"loss_type": "mse"}, "loss_type is 'mse'; it must be nll or dft"),
        (SFTConfig, {"max_len": 5}, "SFTConfig has no 'max_len'; did you mean max_length"),
        (RewardConfig, {"center_rewards_coefficient": -1}, "center_rewards_coefficient is -1"),
    ],
)
def test_settings_that_cannot_be(kind: Any, given: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=said):
        kind(str(tmp_path), **given)


def test_fields_of_trl_without_effect_are_named_once(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="DPOConfig: these have no effect here: dataset_num_proc=4") as found:
        DPOConfig(str(tmp_path), precompute_ref_log_probs=True, dataset_num_proc=4)
    assert len(found) == 1 and "precompute_ref_log_probs=True (the reference is" in str(found[0].message)
