"""A GGUF file as a torch model whose weights stay packed: the same numbers as unpacked, on torch and on the engine."""

import copy
import gc
import io
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_ids, tiny_model
from train.test_trainer import losses_of, trainer

import llama2.checkpoint as checkpoint
from llama2 import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    LlamaForCausalLM,
    LoraConfig,
    cpu,
)
from llama2.checkpoint.convert import ConversionSettings, convert
from llama2.checkpoint.gguf import GgufFile
from llama2.checkpoint.quantized import packed_layers
from llama2.errors import CheckpointError, InputError
from llama2.plain_network import difference
from llama2.quantization.ggml import TYPES, dequantize
from llama2.quantization.ggml_encode import ENCODERS
from llama2.quantization.gguf import GgufEmbedding, GgufLinear, origin_of, rows_of
from llama2.runners.native import NativeModel, kept_in, native_weights

pytestmark = pytest.mark.filterwarnings("ignore:there is no tokenizer")
BLOCKS = [name for name, block in TYPES.items() if block.dense is None]
WRITTEN = [name for name in BLOCKS if name in ENCODERS]  # files of the others are made in test_codebook_blocks.py
WIDE = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1}
needs_engine = pytest.mark.skipif(not cpu.available(), reason="the native engine is not built")


def file_of(folder: Path, kind: str, **changes: Any) -> Path:
    """A GGUF file of the tiny model, its matrices of one type."""
    path = folder / f"{kind}.gguf"
    if not path.exists():
        tiny_model(torch.float32, **{**WIDE, **changes}).save_pretrained(folder / "plain")
        convert(folder / "plain", path, ConversionSettings("gguf", kind.lower()))
    return path


def packed(path: Path, **settings: Any) -> LlamaForCausalLM:
    model: LlamaForCausalLM = LlamaForCausalLM.from_pretrained(path, **{"dequantize": False, **settings})
    return model


def tokens(model: Any, **settings: Any) -> list[list[int]]:
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, :3] = 0
    asked = {"max_new_tokens": 12, "eos_token_id": None, "pad_token_id": 0, "do_sample": False, **settings}
    found: list[list[int]] = model.generate(tiny_ids(2, 9), attention_mask=mask, **asked).tolist()
    return found


@pytest.mark.parametrize("kind", WRITTEN)
def test_every_type_gives_the_logits_of_its_unpacked_weights(tmp_path: Path, kind: str) -> None:
    path = file_of(tmp_path, kind)
    plain = LlamaForCausalLM.from_pretrained(path, dtype="float32")
    model = packed(path)
    kinds = {layer.kind for layer in packed_layers(model).values()}
    assert kind in kinds and all(
        isinstance(layer, GgufLinear | GgufEmbedding) for layer in packed_layers(model).values()
    )
    assert model.dtype == torch.float32 == model.config.dtype and model.num_parameters() == plain.num_parameters()
    assert torch.equal(model(tiny_ids(2)).logits, plain(tiny_ids(2)).logits)
    narrow = packed(path, dtype="bfloat16")
    assert narrow.dtype == torch.bfloat16
    assert torch.equal(
        narrow(tiny_ids(2)).logits, LlamaForCausalLM.from_pretrained(path, dtype="bfloat16")(tiny_ids(2)).logits
    )
    model.dequantize()
    assert not packed_layers(model) and not hasattr(model.config, "quantization_config")
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), plain.state_dict().values(), strict=True))


@needs_engine
@pytest.mark.parametrize("kind", WRITTEN)
def test_the_engine_says_what_it_says_of_the_file(tmp_path: Path, kind: str) -> None:
    path = file_of(tmp_path, kind)
    model = LlamaForCausalLM.from_pretrained(path)
    assert difference(model) == "" and kept_in(model) == "bfloat16"
    if kind in ("Q2_K", "Q3_K"):
        with pytest.warns(UserWarning, match="Q[23]_K.* have no native kernel.*bfloat16"):
            found = tokens(model)
        narrow, own = (native_weights(m) for m in (LlamaForCausalLM.from_pretrained(path, dtype="bfloat16"), model))
        assert narrow is not None and own is not None
        assert 0.7 * narrow.nbytes < own.nbytes < narrow.nbytes  # some matrices are Q5_K and Q6_K
        assert [len(row) for row in found] == [21, 21]
        return
    assert tokens(model) == tokens(NativeModel.from_gguf(path))
    weights = native_weights(model)
    assert weights is not None and weights.nbytes == NativeModel.from_gguf(path).weights.nbytes


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}, {"attention_bias": True, "mlp_bias": True}])
def test_state_and_folder_come_back(tmp_path: Path, changes: dict[str, Any]) -> None:
    """q and k are in the file's order in memory, and in the model's in whatever leaves it."""
    path = file_of(tmp_path, "Q8_0", **changes)
    model, opened = packed(path), checkpoint.open(path)
    state, want = model.state_dict(), model(tiny_ids()).logits
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(state[f"{name}.Q8_0"], opened.raw(name).rows)
    assert not torch.equal(rows_of(model.model.layers[0].self_attn.q_proj), opened.raw(name).rows)
    twin = packed(file_of(tmp_path / "other", "Q8_0", **{**changes, "rms_norm_eps": 1e-5}))
    twin.load_state_dict(copy.deepcopy(state))
    model.save_pretrained(tmp_path / "saved")
    again = LlamaForCausalLM.from_pretrained(tmp_path / "saved")
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (twin, again, copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        assert other.state_dict().keys() == state.keys()
        assert torch.equal(other(tiny_ids()).logits, want)
        assert len(packed_layers(other)) == 9
        if changes.get("tie_word_embeddings"):
            assert other.lm_head.tied is other.model.embed_tokens
    assert all(torch.equal(again.state_dict()[key], value) for key, value in state.items())
    unpacked = LlamaForCausalLM.from_pretrained(tmp_path / "saved", dtype="float32")
    assert not packed_layers(unpacked)
    assert torch.allclose(unpacked(tiny_ids()).logits, want, atol=1e-4)  # a bias is added within the product there


@pytest.mark.parametrize("tied", [False, True])
def test_a_saved_model_becomes_the_same_gguf_file(tmp_path: Path, tied: bool) -> None:
    path = file_of(tmp_path, "Q4_K", tie_word_embeddings=tied)
    packed(path).save_pretrained(tmp_path / "saved")
    convert(tmp_path / "saved", tmp_path / "back.gguf", ConversionSettings("gguf"))
    one, two = checkpoint.open(path), checkpoint.open(tmp_path / "back.gguf")
    assert dict(one.tensors) == dict(two.tensors) and one.config == two.config
    assert all(torch.equal(one.raw(name).rows, two.raw(name).rows) for name in one.tensors)
    convert(tmp_path / "saved", tmp_path / "floats", ConversionSettings(dtype="float32"))
    plain = LlamaForCausalLM.from_pretrained(tmp_path / "floats")
    assert torch.equal(plain(tiny_ids()).logits, packed(path)(tiny_ids()).logits)


def test_the_file_is_mapped_and_not_copied(tmp_path: Path) -> None:
    model = packed(file_of(tmp_path, "Q4_0"))
    layers = packed_layers(model)
    assert all(origin_of(layer) is not None for layer in layers.values())
    q = model.model.layers[0].self_attn.q_proj
    with torch.no_grad():
        rows_of(q)[0].zero_()  # the map is private: the file stays, and the rows are no longer the file's
    assert origin_of(q) is None and origin_of(model.model.layers[0].self_attn.k_proj) is not None
    assert not torch.equal(model(tiny_ids()).logits, packed(file_of(tmp_path, "Q4_0"))(tiny_ids()).logits)


@needs_engine
def test_rows_that_were_changed_are_what_the_engine_reads(tmp_path: Path) -> None:
    path = file_of(tmp_path, "Q4_0")
    model = LlamaForCausalLM.from_pretrained(path)
    before = tokens(model)
    down = model.model.layers[0].mlp.down_proj
    with torch.no_grad():
        rows_of(down).copy_(rows_of(down).flip(0).clone())
    after = tokens(model)
    assert after != before and after == tokens(model, runner="torch")
    gc.collect()
    assert tokens(model) == after  # the pages of the file were given back, these were not


@needs_engine
@pytest.mark.parametrize("disable_mmap", [False, True])
def test_what_the_engine_gives_back_is_there_again(tmp_path: Path, disable_mmap: bool) -> None:
    """Pages of a mapped file are fetched from it once more; those of a file that was read whole are never lost."""
    path = file_of(tmp_path, "Q4_0", vocab_size=4096)  # the embedding has 144 kB, whole pages
    model = LlamaForCausalLM.from_pretrained(path, disable_mmap=disable_mmap)
    want, rows = model(tiny_ids()).logits, {name: t.clone() for name, t in model.state_dict().items()}
    tokens(model)
    assert native_weights(model) is not None
    assert torch.equal(model(tiny_ids()).logits, want)
    assert all(torch.equal(t, rows[name]) for name, t in model.state_dict().items())


@needs_engine
def test_packed_weights_beside_the_file_are_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = file_of(tmp_path, "Q4_0")
    want = tokens(LlamaForCausalLM.from_pretrained(path))
    cpu.write_packed(GgufFile(path))
    model = LlamaForCausalLM.from_pretrained(path)
    monkeypatch.setattr(cpu.CpuWeights, "pack", lambda *_: pytest.fail("packed again"))
    assert tokens(model) == want


def test_what_is_asked_for_decides(tmp_path: Path) -> None:
    path = file_of(tmp_path, "Q8_0")
    kept = cpu.available()
    assert bool(packed_layers(LlamaForCausalLM.from_pretrained(path))) == kept
    assert bool(packed_layers(AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name))) == kept
    assert bool(packed_layers(AutoModelForCausalLM.from_pretrained(path, dtype="auto"))) == kept
    for settings, reason in (
        ({"dtype": "float32"}, "to float32, because a dtype was given"),
        ({"torch_dtype": torch.bfloat16}, "to bfloat16, because a dtype was given"),
        ({"dequantize": True}, "to bfloat16, because dequantize=True was given"),
    ):
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            model = AutoModelForCausalLM.from_pretrained(path, **settings)
        assert not packed_layers(model)
        (warning,) = told
        assert f"its Q8_0 blocks are unpacked {reason}" in str(warning.message) and warning.filename == __file__
    assert packed_layers(packed(path, dtype="bfloat16")) and packed(path, dtype="bfloat16").dtype == torch.bfloat16
    four = AutoModelForCausalLM.from_pretrained(path, quantization_config=BitsAndBytesConfig(load_in_4bit=True))
    assert {type(layer).__name__ for layer in packed_layers(four).values()} == {"Linear4bit"}
    with_config = AutoModelForCausalLM.from_pretrained(path, config=AutoConfig.from_pretrained(path))
    assert bool(packed_layers(with_config)) == kept
    # The other classes run in torch: their weights are unpacked unless that is declined.
    assert not packed_layers(AutoModel.from_pretrained(path)) and packed_layers(packed(path).model)
    with pytest.warns(UserWarning, match="score.weight .* newly initialised"):
        classifier = AutoModelForSequenceClassification.from_pretrained(path, num_labels=3, dequantize=False)
    assert len(packed_layers(classifier)) == 8 and classifier(tiny_ids()).logits.shape == (1, 3)


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    path = file_of(tmp_path, "Q8_0")
    model = packed(path)
    with pytest.raises(InputError, match="dequantize"):
        model.resize_token_embeddings(120)
    with pytest.raises(InputError, match="llama2 quantize SRC"):
        LlamaForCausalLM.from_pretrained(tmp_path / "plain", quantization_config={"quant_method": "gguf"})
    with pytest.raises(InputError, match="packed by gguf and bitsandbytes is asked for"):
        model.save_pretrained(tmp_path / "saved")
        LlamaForCausalLM.from_pretrained(tmp_path / "saved", load_in_4bit=True)
    state = model.state_dict()
    state["lm_head.weight.Q4_0"] = state.pop("lm_head.weight.Q8_0")
    with pytest.raises(RuntimeError, match="lm_head.weight.Q8_0"):
        model.load_state_dict(state)
    for tensors, message in (
        ({"weight.Q8_0": torch.zeros(4, 33, dtype=torch.uint8)}, r"torch.uint8 \(4, 34\) is needed"),
        ({"weight.Q9": torch.zeros(4, 34, dtype=torch.uint8)}, "one tensor called weight.TYPE"),
        ({}, "no tensor"),
    ):
        with pytest.raises(CheckpointError, match=message):
            GgufLinear.from_file(tensors, (4, 32), None, None)


def test_other_float_types_are_kept_as_they_are(tmp_path: Path) -> None:
    """Matrices of F16 and BF16 within a quantised file cost no more memory than in the file."""
    from checkpoint.gguf_bytes import gguf, llama_metadata, llama_tensors

    small = tiny_model(torch.float32, vocab_size=40, intermediate_size=96)
    tensors = llama_tensors(small.state_dict(), "Q8_0")
    for name in ("token_embd.weight", "blk.0.attn_q.weight", "blk.1.ffn_up.weight"):
        tensors[name] = (tensors[name][0], "F16")
    tensors["output.weight"] = (tensors["output.weight"][0], "F32")
    path = tmp_path / "x.gguf"
    path.write_bytes(gguf(llama_metadata(), tensors))
    model = packed(path)
    assert model.model.layers[0].self_attn.q_proj.kind == "F16" == model.model.embed_tokens.kind  # type: ignore[union-attr]
    assert type(model.lm_head) is torch.nn.Linear
    ids = tiny_ids() % 40
    assert torch.equal(model(ids).logits, LlamaForCausalLM.from_pretrained(path, dtype="float32")(ids).logits)
    if cpu.available():
        runs = [m.generate(ids, max_new_tokens=8, do_sample=False) for m in (model, NativeModel.from_gguf(path))]
        assert torch.equal(*runs)


def test_unpacking_by_the_compiled_module_is_ggmls_bit_for_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random bytes: every code, scale and minimum that can be, NaN and infinite scales aside."""
    import llama2.quantization.ggml as ggml

    if not cpu.available():
        pytest.skip("the native engine is not built")
    generator = torch.Generator().manual_seed(3)
    for kind in BLOCKS:
        block = TYPES[kind]
        rows = torch.randint(256, (64, 3 * block.bytes), dtype=torch.uint8, generator=generator)
        ours = {dtype: dequantize(rows, kind, dtype) for dtype in (torch.float32, torch.bfloat16)}
        with monkeypatch.context() as patch:
            patch.setattr(ggml, "kernels", lambda: None)
            for dtype, found in ours.items():
                want = dequantize(rows, kind, dtype)
                assert torch.equal(found.isnan(), want.isnan()), kind
                same = found.nan_to_num().view(torch.uint8) == want.nan_to_num().view(torch.uint8)
                assert bool(same.all()), (kind, dtype)


def test_it_moves_and_changes_what_it_computes_in(tmp_path: Path) -> None:
    model = packed(file_of(tmp_path, "Q5_0", tie_word_embeddings=True))
    want = model(tiny_ids()).logits
    rows = {path: rows_of(layer).clone() for path, layer in packed_layers(model).items()}
    model.to(torch.bfloat16)
    assert model.dtype == torch.bfloat16 and model.model.embed_tokens(tiny_ids()).dtype == torch.bfloat16
    assert all(torch.equal(rows_of(layer), rows[path]) for path, layer in packed_layers(model).items())
    model.float()
    assert (model(tiny_ids()).logits - want).abs().max() < 0.05 * want.abs().max()  # norms went through bfloat16
    meta = model.to("meta")
    assert all(rows_of(layer).is_meta for layer in packed_layers(meta).values())


def test_an_adapter_learns_on_it_and_goes_with_the_file(tmp_path: Path) -> None:
    path = file_of(tmp_path, "Q4_0")
    model = packed(path)
    twin = LlamaForCausalLM.from_pretrained(path, dtype="float32")
    gradients = []
    for one in (model, twin):
        torch.manual_seed(0)
        one.add_adapter(LoraConfig(r=4, target_modules="all-linear"))
        one.train()
        loss = one(tiny_ids(2), labels=tiny_ids(2)).loss
        loss.backward()
        gradients.append({name: p.grad for name, p in one.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == {name for name in gradients[1] if "lora" in name} and len(gradients[0]) == 14
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][name], atol=1e-6), name
    model.save_pretrained(tmp_path / "adapter")
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "adapter")
    assert bool(packed_layers(loaded)) == cpu.available()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_trainer_learns_on_it_as_on_unpacked_weights(
    tmp_path: Path, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through the fused layers: each weight is unpacked where it is multiplied. The head is packed too."""
    from llama2.train.fused_layer import TrainingLayers

    path = file_of(tmp_path, "Q4_K", tie_word_embeddings=True)
    losses, fused = [], []
    call = TrainingLayers.__call__
    monkeypatch.setattr(TrainingLayers, "__call__", lambda *a, **k: fused.append(1) or call(*a, **k))
    for settings in ({"dequantize": False}, {"dequantize": True}):
        torch.manual_seed(0)
        model = LlamaForCausalLM.from_pretrained(path, dtype=dtype, **settings)
        assert bool(packed_layers(model)) is not settings["dequantize"]
        model.add_adapter(LoraConfig(r=4, target_modules="all-linear"))
        run = trainer(tmp_path / f"run-{settings['dequantize']}", model, learning_rate=1e-2)
        run.train()
        losses.append(losses_of(run))
        assert not run._trains_by_hand
    assert len(fused) == 12  # both runs, of 6 steps and 1 layer
    assert losses[0][-1] < losses[0][0] and len(losses[0]) == 6
    assert losses[0] == pytest.approx(losses[1], rel=1e-5 if dtype == "float32" else 2e-2)  # other orders of sums


def test_a_trainer_without_an_adapter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="only its norms would be trained; add an adapter"):
        trainer(tmp_path / "run", packed(file_of(tmp_path, "Q4_0"))).train()


def test_finetune_trains_an_adapter_on_the_file(smollm2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llama2.train import finetune
    from llama2.train.recipe import Recipe

    (tmp_path / "rows.jsonl").write_text('{"text": "A lamp in every window."}\n')
    kept: list[int] = []

    class Counting(finetune.Trainer):
        def __init__(self, model: Any, *rest: Any, **more: Any) -> None:
            kept.append(len(packed_layers(model)))
            super().__init__(model, *rest, **more)

    monkeypatch.setattr(finetune, "Trainer", Counting)
    out = tmp_path / "out"
    recipe = Recipe(task="pretrain", model=str(smollm2), data=str(tmp_path / "rows.jsonl"), output_dir=str(out),
                    dtype="float32",  # "auto" warns where the processor multiplies no bfloat16
                    lora=LoraConfig(r=2, target_modules=["q_proj"]))  # fmt: skip
    args = finetune.TrainingArguments(output_dir=str(tmp_path / "run"), max_steps=1)
    assert finetune.Finetune(recipe, args).run().finished
    assert kept == [212]
    loaded = AutoModelForCausalLM.from_pretrained(out)
    assert bool(packed_layers(loaded)) == cpu.available()


@needs_engine
def test_the_real_file_through_every_door(smollm2: Path) -> None:
    """README's lines and a pipeline give what the engine gives; perplexity is that of the engine too."""
    from llama2 import AutoTokenizer, pipeline
    from llama2.evaluate.perplexity import perplexity

    model, tokenizer = (cls.from_pretrained(smollm2) for cls in (AutoModelForCausalLM, AutoTokenizer))
    engine = NativeModel.from_gguf(smollm2)
    asked = tokenizer("The capital of France is", return_tensors="pt")
    out = model.generate(**asked, max_new_tokens=20)
    assert torch.equal(out, engine.generate(**asked, max_new_tokens=20))
    said = pipeline("text-generation", model=str(smollm2))(
        "The capital of France is", max_new_tokens=20, do_sample=False
    )
    assert said[0]["generated_text"] == tokenizer.decode(out[0], skip_special_tokens=True)
    ids = tokenizer("The lighthouse stands on a hill above the sea. " * 8).input_ids
    assert perplexity(model, ids, 32).value == perplexity(engine, ids, 32).value
    both = (perplexity(model, ids, 32, runner="torch").value, perplexity(model, ids, 32).value)
    assert both[0] == pytest.approx(both[1], rel=2e-2)  # activations of 8 bits
    assert native_weights(model).nbytes < 120e6  # type: ignore[union-attr]


def test_a_trainer_by_path_packs_beneath_an_adapter(smollm2: Path, tmp_path: Path) -> None:
    from llama2 import SFTConfig, SFTTrainer
    from llama2.train.precision import best_of_processor

    args = SFTConfig(output_dir=str(tmp_path), max_steps=1, max_length=16)
    rows = [{"text": "A lamp in every window."}]
    for peft_config, dtype, count in ((LoraConfig(r=2), best_of_processor(), 212), (None, torch.float32, 0)):
        run = SFTTrainer(model=str(smollm2), args=args, train_dataset=rows, peft_config=peft_config)
        assert len(packed_layers(run.network)) == count and run.network.dtype == dtype
