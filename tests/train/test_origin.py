"""What a run begins with and leaves: adapters that are trained on, packed weights remembered, early refusals."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from bytewise import write_tokenizer
from tiny import tiny_model

from llama2 import AutoModelForCausalLM, InputError, LoraConfig, Trainer, TrainingArguments, lora
from llama2.checkpoint.packing_note import PACKING
from llama2.checkpoint.peft import save_adapter
from llama2.train import precision
from llama2.train.finetune import Finetune, Recipe

ROWS = [{"prompt": f"{w} ", "completion": f"{w} sky"} for w in ("red", "blue", "green", "grey")] * 4
PAIRS = [{"prompt": f"{w} ", "chosen": f"{w} sky", "rejected": f"{w} sea"} for w in ("red", "blue", "green", "grey")]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """Widths that NF4 packs: multiples of 64."""
    model = tiny_model(torch.float32, vocab_size=300, intermediate_size=128)
    model.save_pretrained(tmp_path / "base")
    write_tokenizer(tmp_path / "base")
    return tmp_path / "base"


def job(model: Path, out: Path, rows: list[Any] | None = None, task: str = "sft", **more: Any) -> Finetune:
    data = out.parent / f"{out.name}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows or ROWS))
    own = {key: more.pop(key) for key in ("bf16", "resume_from_checkpoint", "fp16", "report_to") if key in more}
    args = TrainingArguments(output_dir=str(out), max_steps=6, per_device_train_batch_size=4, learning_rate=5e-3,
                             logging_steps=1, eval_on_start=True, save_strategy="no", **own)  # fmt: skip
    recipe = Recipe(task=task, model=str(model), data=str(data), output_dir=str(out), max_length=40, **more)  # type: ignore[arg-type]
    return Finetune(recipe, args)


def loss_of(model: Any, finetune: Finetune) -> float:
    args, data = TrainingArguments(output_dir=str(finetune.folder)), finetune.data
    objective = finetune.task.objective(data.items)
    trainer = Trainer(model=model, args=args, objective=objective, rows=data.items, eval_rows=data.eval_items)
    return float(trainer.evaluate()["eval_loss"])


# -- packed weights ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", ["load_in_4bit", "load_in_8bit"])
def test_the_model_that_was_measured_is_the_model_that_is_given(base: Path, tmp_path: Path, bits: str) -> None:
    from llama2.checkpoint.convert import ConversionSettings, convert

    made = job(base, tmp_path / "out", lora=LoraConfig(r=4, target_modules="all-linear"), eval_split=0.25,
               **{bits: True})  # fmt: skip
    measured = made.run().after["eval_loss"]
    said = json.loads((tmp_path / "out" / PACKING).read_text())
    assert said[bits] and (bits == "load_in_8bit" or said["bnb_4bit_use_double_quant"])
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.config.quantization_config[bits] and loss_of(loaded, made) == pytest.approx(measured, abs=1e-4)
    convert(base, tmp_path / "merged", ConversionSettings("hf", adapter=str(tmp_path / "out")))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert loss_of(merged, made) == pytest.approx(measured, abs=1e-4)
    plain = AutoModelForCausalLM.from_pretrained(base)
    with pytest.warns(UserWarning, match="was trained on packed weights .* where its answers are worse"):
        plain.load_adapter(tmp_path / "out", is_trainable=True)
    assert abs(loss_of(plain, made) - measured) > 1e-3  # what would be had without a word


def test_plain_adapters_have_no_packing(base: Path, tmp_path: Path) -> None:
    job(base, tmp_path / "out", lora=LoraConfig(r=4)).run()
    assert not (tmp_path / "out" / PACKING).exists()
    assert not hasattr(AutoModelForCausalLM.from_pretrained(tmp_path / "out").config, "quantization_config")


def test_packed_folders_need_an_adapter(base: Path, tmp_path: Path) -> None:
    packed = AutoModelForCausalLM.from_pretrained(base, load_in_4bit=True)
    packed.save_pretrained(tmp_path / "packed")
    write_tokenizer(tmp_path / "packed")
    with pytest.raises(InputError, match=r"is packed \(bitsandbytes\), and packed weights cannot be trained"):
        job(tmp_path / "packed", tmp_path / "out")
    job(tmp_path / "packed", tmp_path / "out", lora=LoraConfig(r=2)).run()
    with pytest.raises(InputError, match="packed weights cannot be trained themselves"):
        job(base, tmp_path / "other", load_in_4bit=True)


# -- an adapter as MODEL -----------------------------------------------------------------------------------------


def test_an_adapter_is_trained_on(base: Path, tmp_path: Path) -> None:
    first = job(
        base, tmp_path / "first", lora=LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"), eval_split=0.25
    )
    ended = first.run().after["eval_loss"]
    second = job(tmp_path / "first", tmp_path / "second", eval_split=0.25)
    result = second.run()
    assert result.before["eval_loss"] == pytest.approx(ended, abs=1e-5) and result.after["eval_loss"] < ended
    settings = json.loads((tmp_path / "second" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(base) and settings["r"] == 4
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "second")
    assert loss_of(loaded, second) == pytest.approx(result.after["eval_loss"], abs=1e-5)
    with pytest.raises(InputError, match="is an adapter, which is trained on as it is"):
        job(tmp_path / "first", tmp_path / "third", lora=LoraConfig(r=8))


def test_preferences_begin_with_the_adapter_that_is_given(base: Path, tmp_path: Path) -> None:
    job(base, tmp_path / "sft", lora=LoraConfig(r=4, target_modules="all-linear")).run()
    made = job(tmp_path / "sft", tmp_path / "dpo", PAIRS, "dpo")
    made.run()
    losses = [json.loads(line) for line in (tmp_path / "dpo" / "log.jsonl").read_text().splitlines()]
    losses = [entry["loss"] for entry in losses if "loss" in entry]
    assert losses[0] == pytest.approx(0.6931472, abs=1e-6) and losses[-1] < 0.69


def test_merging_what_an_adapter_became(base: Path, tmp_path: Path) -> None:
    job(base, tmp_path / "first", lora=LoraConfig(r=4), load_in_4bit=True).run()
    made = job(tmp_path / "first", tmp_path / "whole", merge=True, eval_split=0.25)
    assert made.origin.packing is not None  # on the weights that the adapter was trained on
    measured = made.run().after["eval_loss"]
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    assert not lora.names(whole) and loss_of(whole, made) == pytest.approx(measured, abs=1e-4)


# -- saving a model with an adapter ------------------------------------------------------------------------------


def test_save_pretrained_writes_the_adapter(base: Path, tmp_path: Path) -> None:
    """As transformers: adapter_config.json and adapter_model.safetensors, whatever the adapter is called."""
    model, ids = AutoModelForCausalLM.from_pretrained(base), torch.tensor([[5, 6, 7]])
    lora.add_adapter(model, LoraConfig(r=2, init_lora_weights=False), "mine")
    model.save_pretrained(tmp_path / "out")
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "out")(ids).logits, model(ids).logits)
    lora.add_adapter(model, LoraConfig(r=2), "other")
    save_adapter(model, tmp_path / "other")  # the active one
    lora.set_adapter(model, "mine", "other")
    with pytest.raises(InputError, match=r"has 2 adapters \(mine, other\); name one"):
        model.save_pretrained(tmp_path / "both")


def test_new_tokens_go_into_the_adapter(base: Path, tmp_path: Path) -> None:
    """As peft after a resize: embedding and head are in the adapter, and the loaded model has them."""
    from safetensors import safe_open

    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(304)
    with torch.no_grad():
        model.lm_head.weight[300:] += 1
    lora.add_adapter(model, LoraConfig(r=2))
    args = TrainingArguments(output_dir=str(tmp_path / "run"), max_steps=2)
    trainer = Trainer(model=model, args=args, train_dataset=[{"input_ids": [301, 302, 303]}])
    trainer.train()
    trainer.save_model(str(tmp_path / "out"))
    with safe_open(tmp_path / "out" / "adapter_model.safetensors", "pt") as file:
        names = set(file.keys())
    assert {"base_model.model.model.embed_tokens.weight", "base_model.model.lm_head.weight"} <= names
    for folder in (tmp_path / "out", tmp_path / "run" / "checkpoint-2"):
        loaded = AutoModelForCausalLM.from_pretrained(folder)
        ids = torch.tensor([[301, 5]])
        assert loaded.config.vocab_size == 304 and torch.allclose(loaded(ids).logits, model(ids).logits, atol=1e-5)


def test_modules_to_save_are_trained_and_come_back(base: Path, tmp_path: Path) -> None:
    made = job(
        base, tmp_path / "out", lora=LoraConfig(r=2, modules_to_save=("lm_head", "embed_tokens")), eval_split=0.25
    )
    result = made.run()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    before = AutoModelForCausalLM.from_pretrained(base)
    assert not torch.equal(loaded.lm_head.weight, before.lm_head.weight)
    assert loss_of(loaded, made) == pytest.approx(result.after["eval_loss"], abs=1e-5)


@pytest.mark.parametrize("adapted", [True, False])
def test_a_checkpoint_of_python_loads(base: Path, tmp_path: Path, adapted: bool) -> None:
    model = AutoModelForCausalLM.from_pretrained(base)
    if adapted:
        lora.add_adapter(model, LoraConfig(r=2))
    args = TrainingArguments(output_dir=str(tmp_path / "run"), max_steps=2, save_steps=1, learning_rate=1e-2)
    Trainer(model=model, args=args, train_dataset=[{"input_ids": [1, 2, 3]}]).train()
    loaded, ids = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint-2"), torch.tensor([[5, 6]])
    assert bool(lora.names(loaded)) == adapted
    assert torch.equal(loaded(ids).logits, model(ids).logits)


# -- number formats ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bf16", [True, False], ids=["bfloat16 by hardware", "without"])
def test_16_bits_beneath_an_adapter(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bf16: bool) -> None:
    best = torch.bfloat16 if bf16 else torch.float32
    monkeypatch.setattr(precision, "best_of_processor", lambda: best)
    for stored in ("float16", "bfloat16"):
        AutoModelForCausalLM.from_pretrained(base, dtype=stored).save_pretrained(tmp_path / stored)
        write_tokenizer(tmp_path / stored)
        changes = getattr(torch, stored) != best
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            made = job(tmp_path / stored, tmp_path / f"{stored}-out", lora=LoraConfig(r=2))
        wanted = f"the weights are stored in {stored} and compute in {precision.name_of(best)}"
        assert [wanted in str(w.message) for w in said] == [True] * changes
        assert made._model().dtype == best
    made = job(base, tmp_path / "asked", lora=LoraConfig(r=2), bf16=True)
    assert made._model().dtype == torch.bfloat16
    assert job(base, tmp_path / "plain", lora=LoraConfig(r=2))._model().dtype == torch.float32


def test_bf16_beside_an_adapter_is_a_flag_that_is_obeyed(base: Path, tmp_path: Path) -> None:
    from llama2.cli.finetune import TASKS, arguments, recipe_of

    paths = (str(base), "rows.jsonl", str(tmp_path / "out"))
    for options, dtype, casts in ((TASKS["sft"](paths=paths, bf16=True, lora_r=2), "bfloat16", False),
                                  (TASKS["sft"](paths=paths, bf16=True), "auto", True)):  # fmt: skip
        assert recipe_of(options).dtype == dtype and arguments(options).bf16 == casts


# -- before anything is loaded -----------------------------------------------------------------------------------


def test_what_can_be_known_is_told_before_a_model_is_loaded(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("a model is loaded"))
    (tmp_path / "file").write_text("")
    cases: list[tuple[Path, dict[str, Any], str]] = [
        (Path("/proc/out"), {}, "/proc/out cannot be written"),
        (tmp_path / "out", {"lora": LoraConfig(target_modules=("qproj",))}, "name none of"),
        (tmp_path / "out", {"device": "cuda:7"}, "cuda"),
        (tmp_path / "out", {"fp16": True, "lora": LoraConfig()}, "fp16 needs a CUDA device"),
    ]
    for out, more, said in cases:
        data = tmp_path / "rows.jsonl"
        data.write_text(json.dumps(ROWS[0]))
        args = TrainingArguments(output_dir=str(out), fp16=more.pop("fp16", False))
        with pytest.raises(InputError, match=said):
            Finetune(
                Recipe(task="sft", model=str(base), data=str(data), output_dir=str(out), max_length=40, **more), args
            )


def test_answers_that_are_cut_are_told_in_python_too(base: Path, tmp_path: Path) -> None:
    with pytest.warns(
        UserWarning, match=r"1 answers are cut at the longest length of 40 tokens \(max_length\): rows 0"
    ):
        job(base, tmp_path / "out", [{"prompt": "a", "completion": "b" * 100}, *ROWS])


@pytest.mark.skipif(torch.cuda.is_available(), reason="of models on the CPU")
@pytest.mark.parametrize("adapted", [True, False])
def test_a_float16_model_in_a_trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, adapted: bool) -> None:
    """What is trained becomes float32; weights beneath an adapter what the processor does fast. A warning says so."""
    monkeypatch.setattr(precision, "best_of_processor", lambda: torch.bfloat16)
    model = tiny_model(torch.float16)
    if adapted:
        lora.add_adapter(model, LoraConfig(r=2))
    wanted = "bfloat16" if adapted else "float32"
    with pytest.warns(UserWarning, match=f"the weights are float16, .* they are {wanted} from now on"):
        trainer = Trainer(model=model, args=TrainingArguments(output_dir=str(tmp_path), max_steps=2, learning_rate=1e-2,
                          save_strategy="no"), train_dataset=[{"input_ids": [1, 2, 3]}])  # fmt: skip
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert str(model.dtype) == f"torch.{wanted}" and losses and losses[0] == losses[0]


def test_a_loss_without_label_smoothing_refuses_it(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="label_smoothing is 0.1, which ipo does not have; use sigmoid or robust"):
        Recipe(task="dpo", model="m", data="d", output_dir=str(tmp_path), loss_type="ipo", label_smoothing=0.1)
