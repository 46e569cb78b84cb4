"""What example scripts take beside the trainers."""

import warnings
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from bytewise import write_tokenizer
from tiny import tiny_model

import llama2
from llama2 import (
    AutoTokenizer,
    ConstantLengthDataset,
    InputError,
    LlamaConfig,
    LoraConfig,
    ModelConfig,
    PeftConfig,
    ScriptArguments,
    SFTConfig,
    SFTTrainer,
    TrlParser,
    get_kbit_device_map,
    get_peft_config,
    get_peft_model,
    get_peft_model_state_dict,
    get_quantization_config,
    logging,
    set_peft_model_state_dict,
    setup_chat_format,
)

# -- logging, availability --------------------------------------------------------------------------------------------


def test_verbosity_keeps_warnings_back_and_lets_them_out_again() -> None:
    assert logging.get_verbosity() == logging.WARNING == 30
    try:
        logging.set_verbosity(logging.CRITICAL)
        assert logging.get_verbosity() == 50 and not logging.get_logger().isEnabledFor(logging.ERROR)
        warnings.warn("kept back", stacklevel=1)  # an error in this suite, were it said
        logging.set_verbosity_error()
        logging.set_verbosity_warning()
        with pytest.raises(UserWarning, match="said"):
            warnings.warn("said", stacklevel=1)
        logging.set_verbosity_info()
        assert logging.get_logger("llama2.serve").isEnabledFor(logging.INFO)
    finally:
        logging.set_verbosity(logging.WARNING)
    with pytest.raises(InputError, match=r"verbosity is 7; it must be one of 10, 20, 30, 40, 50"):
        logging.set_verbosity(7)


def test_what_is_available() -> None:
    assert llama2.is_torch_available() and llama2.is_safetensors_available() and llama2.is_tokenizers_available()
    assert llama2.is_sentencepiece_available()
    assert not llama2.is_torch_npu_available() and not llama2.is_torch_xpu_available()
    assert llama2.is_torch_cuda_available() == torch.cuda.is_available() == llama2.is_flash_attn_2_available()
    for package in ("peft", "bitsandbytes", "datasets", "accelerate"):
        try:
            __import__(package)
            there = True
        except ImportError:
            there = False
        assert getattr(llama2, f"is_{package}_available")() == there


# -- adapters ---------------------------------------------------------------------------------------------------------


def test_adapter_state_dicts_go_out_and_in(tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=("q_proj",), init_lora_weights=False, task_type="CAUSAL_LM")
    plain, again = tiny_model(torch.float32), tiny_model(torch.float32)
    torch.manual_seed(1)
    model = get_peft_model(plain, config)
    state = get_peft_model_state_dict(model)
    assert set(state) == {
        f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora_{part}.weight"
        for layer in range(model.config.num_hidden_layers)
        for part in "AB"
    }
    torch.manual_seed(2)
    other = get_peft_model(again, config)
    ids = torch.tensor([[4, 5, 6]])
    assert not torch.equal(other(ids).logits, model(ids).logits)
    assert set_peft_model_state_dict(other, state) == ([], [])
    assert torch.equal(other(ids).logits, model(ids).logits)
    first = min(state)
    found = set_peft_model_state_dict(other, {"nowhere": torch.ones(1), first: state[first]})
    assert found.unexpected_keys == ["nowhere"] and len(found.missing_keys) == len(state) - 1
    with pytest.raises(InputError, match=r"has shape \(1, 1\), but \(2, "):
        set_peft_model_state_dict(other, {first: torch.ones(1, 1)})
    with pytest.raises(InputError, match="no adapter 'other'"):
        get_peft_model_state_dict(model, adapter_name="other")
    live = {name: torch.zeros_like(value) for name, value in model.state_dict().items()}
    zeros = get_peft_model_state_dict(model, live)
    assert set(zeros) == set(state) and all((value == 0).all() for value in zeros.values())

    model.save_pretrained(tmp_path)
    read = PeftConfig.from_pretrained(tmp_path)
    assert isinstance(read, PeftConfig) and isinstance(read, LoraConfig) and read.r == 2
    from safetensors.torch import load_file

    written = load_file(tmp_path / "adapter_model.safetensors")
    assert set(written) == set(state) and all(torch.equal(written[name], state[name]) for name in written)


# -- options ----------------------------------------------------------------------------------------------------------


def test_options_of_model_and_data(tmp_path: Path) -> None:
    file = tmp_path / "options.yaml"
    file.write_text("lora_r: 4\nuse_peft: true\nlearning_rate: 1.0e-3\nlora_target_modules: [all-linear]\n")
    parser = TrlParser((ScriptArguments, SFTConfig, ModelConfig))
    words = ["--config", str(file), "--dataset_name", "rows", "--output_dir", "out", "--load_in_4bit", "--lora_r", "6"]
    script, training, model = parser.parse_args_and_config(words)
    assert script.dataset_name == "rows" and script.dataset_train_split == "train"
    assert training.learning_rate == 1e-3 and training.output_dir == "out"
    adapter = get_peft_config(model)
    assert (adapter.r, adapter.lora_alpha, adapter.lora_dropout, adapter.target_modules) == (6, 32, 0.05, "all-linear")
    packing = get_quantization_config(model)
    assert packing.load_in_4bit and packing.bnb_4bit_quant_type == "nf4" and not packing.bnb_4bit_use_double_quant
    assert get_peft_config(ModelConfig()) is None and get_quantization_config(ModelConfig()) is None
    assert get_quantization_config(ModelConfig(load_in_8bit=True)).load_in_8bit
    assert get_peft_config(ModelConfig(use_peft=True)).target_modules == LoraConfig().target_modules
    assert get_kbit_device_map() is None or torch.cuda.is_available()
    with pytest.raises(InputError, match="exclude each other"):
        ModelConfig(load_in_4bit=True, load_in_8bit=True)


def test_options_that_are_unknown(tmp_path: Path) -> None:
    @dataclass
    class Own:
        name: str
        size: int = 1

    file = tmp_path / "options.json"
    file.write_text('{"name": "n", "sise": 3}')
    words = ["--config", str(file)]
    with pytest.raises(InputError, match=r"options.json sets sise, which no option is called"):
        TrlParser(Own).parse_args_and_config(words)
    assert TrlParser(Own).parse_args_and_config(words, fail_with_unknown_args=False) == (Own("n"),)
    found = TrlParser(Own).parse_args_and_config([*words, "--more", "1"], return_remaining_strings=True)
    assert found == (Own("n"), ["sise", "--more", "1"])
    with pytest.raises(InputError, match="nowhere.yaml does not exist"):
        TrlParser(Own).parse_args_and_config(["--config", "nowhere.yaml"])


# -- texts ------------------------------------------------------------------------------------------------------------


def test_rows_of_one_length(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    tok = AutoTokenizer.from_pretrained(tmp_path)
    texts = [{"text": "abcd"}, {"text": "efg"}, {"text": "hi"}]
    encode = lambda text: tok(text)["input_ids"]  # noqa: E731
    whole = [i for row in texts for i in (*encode(row["text"]), tok.eos_token_id)]
    rows = list(ConstantLengthDataset(tok, texts, dataset_text_field="text", seq_length=4, shuffle=False))
    assert [row["input_ids"].tolist() for row in rows] == [whole[i : i + 4] for i in range(0, len(whole) - 3, 4)]
    assert all(torch.equal(row["input_ids"], row["labels"]) for row in rows)
    asked = ConstantLengthDataset(tok, texts, formatting_func=lambda row: row["text"] * 2, seq_length=4, infinite=True)
    stream = iter(asked)
    assert len([next(stream) for _ in range(50)]) == 50
    bare = ConstantLengthDataset(tok, texts, "text", seq_length=2, append_concat_token=False, add_special_tokens=False,
                                 shuffle=False)  # fmt: skip
    assert tok.decode([int(i) for row in bare for i in row["input_ids"]]) == "abcdefgh"
    with pytest.raises(InputError, match="a row has no column 'words'"):
        next(iter(ConstantLengthDataset(tok, texts, "words")))
    with pytest.raises(InputError, match="fill no row of 99 tokens"):
        next(iter(ConstantLengthDataset(tok, texts, "text", seq_length=99, chars_per_token=1e-4, infinite=True)))
    with pytest.raises(InputError, match="the data set has no rows"):
        next(iter(ConstantLengthDataset(tok, [], "text", infinite=True)))
    with pytest.raises(InputError, match="seq_length is 0"):
        ConstantLengthDataset(tok, texts, "text", seq_length=0)
    with pytest.raises(InputError, match="which text is meant"):
        ConstantLengthDataset(tok, texts)


def test_a_model_gets_a_chat_format(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    tok = AutoTokenizer.from_pretrained(tmp_path)
    with pytest.raises(InputError, match="has a chat template"):
        setup_chat_format(tiny_model(torch.float32), tok)
    tok.chat_template = None
    model, tok = setup_chat_format(tiny_model(torch.float32, vocab_size=260), tok, resize_to_multiple_of=8)
    text = tok.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True)
    assert text == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    end = tok.convert_tokens_to_ids("<|im_end|>")
    assert (
        tok.eos_token_id == tok.pad_token_id == model.config.eos_token_id == model.generation_config.eos_token_id == end
    )
    assert model.get_input_embeddings().num_embeddings % 8 == 0 and len(tok) <= model.config.vocab_size
    model.save_pretrained(tmp_path / "m")
    assert LlamaConfig.from_pretrained(tmp_path / "m").eos_token_id == end
    with pytest.raises(InputError, match="format is 'alpaca'"):
        setup_chat_format(model, tok, "alpaca")


def test_a_trainer_reads_an_endless_stream(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    tok = AutoTokenizer.from_pretrained(tmp_path)
    tok.pad_token = tok.eos_token
    rows = [{"asked": f"{i} and {i}", "told": str(2 * i)} for i in range(9)]

    def text(row: dict[str, str]) -> str:
        return f"{row['asked']}? {row['told']}"

    made = {"formatting_func": text, "seq_length": 32}
    args = SFTConfig(str(tmp_path / "out"), max_steps=4, per_device_train_batch_size=2, logging_steps=1, save_steps=0,
                     learning_rate=1e-2, report_to="none")  # fmt: skip
    trainer = SFTTrainer(
        tiny_model(torch.float32, vocab_size=260),
        args,
        train_dataset=ConstantLengthDataset(tok, rows, infinite=True, **made),
        eval_dataset=ConstantLengthDataset(tok, rows, **made),
        processing_class=tok,
        formatting_func=text,
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.9 * before
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-4"]
