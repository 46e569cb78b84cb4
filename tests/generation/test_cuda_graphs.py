"""CUDA graphs of the decoding step: which calls take them, and that their answers are those of the module.

Without a GPU the recorded step is a callable that replays by being called: all but CUDA itself is the same.
"""

import gc
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from tiny import tiny_ids, tiny_model
from torch import Tensor

from llama2 import LlamaForCausalLM, LoraConfig, lora
from llama2.cache import DynamicCache
from llama2.generation.loop import generate, stream
from llama2.layers import LlamaRMSNorm
from llama2.quantization import linear
from llama2.quantization.int8 import Linear8bit
from llama2.runners import cuda_graphs

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"


class Tape:
    """A recorded step; `made` counts recordings, `played` replays."""

    made = played = 0

    def __init__(self, step: Callable[[], Tensor], device: torch.device) -> None:
        type(self).made += 1
        self._inner = cuda_graphs.CudaGraph(step, device) if GPU else None
        self._step = step
        self.logits = step() if self._inner is None else self._inner.logits

    def replay(self) -> None:
        type(self).played += 1
        if self._inner is not None:
            self._inner.replay()
        else:
            self.logits.copy_(self._step())


@pytest.fixture(autouse=True)
def tape(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    Tape.made = Tape.played = 0
    monkeypatch.setattr(cuda_graphs, "record", Tape)
    if not GPU:
        monkeypatch.setattr(cuda_graphs, "can_record", lambda device: True)
        monkeypatch.setattr(cuda_graphs, "free_bytes", lambda device: 1 << 30)
    monkeypatch.setattr(cuda_graphs, "LEAST", 16)
    yield


def model_of(**changes: Any) -> LlamaForCausalLM:
    return tiny_model(torch.float32, max_position_embeddings=256, **changes).to(DEVICE)


def ids_of(rows: int = 1, tokens: int = 12, seed: int = 1) -> Tensor:
    return tiny_ids(rows, tokens, seed).to(DEVICE)


def both(model: LlamaForCausalLM, ids: Tensor, **kwargs: Any) -> Tensor:
    """What the graphs say, after it was compared with the module's answer."""
    settings = {"max_new_tokens": 24, "eos_token_id": None, "pad_token_id": 0, **kwargs}
    plain = generate(model, ids, runner="plain", **settings)
    found = generate(model, ids, runner="torch", **settings)
    assert torch.equal(plain, found)
    return found


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"do_sample": True, "seed": 3},
        {"num_beams": 3},
        {"num_beams": 2, "num_return_sequences": 2, "do_sample": True, "seed": 1},
        {"repetition_penalty": 1.3},
        {"prefill_chunk_size": 5},
        {"prompt_lookup_num_tokens": 3},
        {"guidance_scale": 1.5},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", [{}, {"num_key_value_heads": 4}, {"attention_bias": True}], ids=str)
def test_equal_to_the_module(settings: dict[str, Any], kind: dict[str, Any]) -> None:
    both(model_of(**kind), ids_of(), **settings)
    assert (Tape.made and Tape.played) or "prompt_lookup_num_tokens" in settings


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("settings", [{}, {"num_beams": 2}, {"do_sample": True, "seed": [1, 2, 3]}], ids=str)
def test_padded_batches(settings: dict[str, Any], implementation: str) -> None:
    model = model_of()
    model.set_attn_implementation(implementation)
    ids = ids_of(3)
    mask = torch.ones_like(ids)
    mask[1, :4], mask[2, :9] = 0, 0
    both(model, ids, attention_mask=mask, **settings)
    both(model, ids, **settings)  # the mask before it is gone
    both(model, ids, attention_mask=mask, **settings)
    assert Tape.played > 40


def test_grows_by_buckets_and_stays_with_the_model() -> None:
    model = model_of()
    both(model, ids_of(), max_new_tokens=100)  # 12 + 4 plain steps, then 32, 64, 128
    assert Tape.made == 3 and Tape.played == 99 - cuda_graphs.PATIENCE
    both(model, ids_of(seed=2), max_new_tokens=100)
    assert Tape.made == 4 and Tape.played == 99 - cuda_graphs.PATIENCE + 99  # from the first token, which needs 16
    both(model, ids_of(seed=2), max_new_tokens=200)
    assert Tape.made == 9  # new buffers: 16, 32, 64, 128, 256


def test_few_steps_are_not_worth_a_recording() -> None:
    model = model_of()
    both(model, ids_of(), max_new_tokens=cuda_graphs.PATIENCE + 1)
    assert Tape.made == 0
    both(model, ids_of(), max_new_tokens=cuda_graphs.PATIENCE + 1)
    assert Tape.made == 1


def adapt(model: LlamaForCausalLM) -> None:
    lora.add_adapter(model, LoraConfig(r=2, target_modules="all-linear"))
    for layer in lora.layers(model).values():
        for b in layer.lora_B.values():
            torch.nn.init.normal_(b, 0.0, 0.5)


def replace_weight(model: LlamaForCausalLM) -> None:
    model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))


def replace_config(model: LlamaForCausalLM) -> None:
    model.config.rms_norm_eps = 0.5
    for module in model.modules():
        if isinstance(module, LlamaRMSNorm):
            module.variance_epsilon = 0.5


def one_eps(model: LlamaForCausalLM) -> dict[str, Any]:
    model.model.layers[0].input_layernorm.variance_epsilon = 0.5
    return {}


CHANGES: dict[str, Callable[[LlamaForCausalLM], Any]] = {
    "a weight": replace_weight,
    "an eps": replace_config,
    "attention": lambda model: model.set_attn_implementation("eager"),
    "dtype": lambda model: model.double(),
    "an adapter": adapt,
}


@pytest.mark.parametrize("change", CHANGES)
def test_records_again_after_a_change(change: str) -> None:
    model, ids = model_of(), ids_of()
    first = both(model, ids)
    made = Tape.made
    CHANGES[change](model)
    second = both(model, ids)
    assert Tape.made > made
    assert change in ("attention", "dtype") or not torch.equal(first, second)


def test_adapters_are_switched() -> None:
    model, ids = model_of(), ids_of()
    base = both(model, ids)
    adapt(model)
    adapted = both(model, ids)
    with lora.disabled(model):
        assert torch.equal(both(model, ids), base)
    assert torch.equal(both(model, ids), adapted) and not torch.equal(base, adapted)


def test_weights_changed_in_place_need_no_recording() -> None:
    model, ids = model_of(), ids_of()
    before = both(model, ids)
    assert torch.equal(both(model, ids), before)
    made = Tape.made
    with torch.no_grad():
        model.lm_head.weight.normal_(0.0, 0.3)
    assert not torch.equal(both(model, ids), before) and Tape.made == made


def hooked(model: LlamaForCausalLM) -> dict[str, Any]:
    model.model.layers[0].register_forward_hook(lambda module, args, output: None)
    return {}


def forward_of_its_own(model: LlamaForCausalLM) -> dict[str, Any]:
    model.forward = model.forward  # type: ignore[method-assign]
    return {}


def foreign(model: LlamaForCausalLM) -> dict[str, Any]:
    class Norm(type(model.model.norm)):  # type: ignore[misc]
        pass

    model.model.norm.__class__ = Norm
    return {}


def packed(model: LlamaForCausalLM) -> dict[str, Any]:
    for path, layer in list(model.named_modules()):
        if path.endswith("down_proj"):
            model.set_submodule(path, Linear8bit.quantize(layer.weight.detach().cpu(), None, None).to(DEVICE).eval())
    return {}


REFUSED: dict[str, Callable[[LlamaForCausalLM], dict[str, Any]]] = {
    "hook": hooked,
    "a layer of another library": foreign,
    "forward": forward_of_its_own,
    "eps": one_eps,
    "training": lambda model: (model.train(), {})[1],
    "static cache": lambda model: {"cache_implementation": "static"},
    "no cache": lambda model: {"use_cache": False},
    "attentions": lambda model: {"output_attentions": True, "return_dict_in_generate": True},
    "embeddings": lambda model: {"inputs_embeds": model.get_input_embeddings()(ids_of()), "max_new_tokens": 4},
}


@pytest.mark.parametrize("reason", REFUSED)
def test_runs_plainly_where_it_must(reason: str) -> None:
    model = model_of()
    settings = {"max_new_tokens": 12, **REFUSED[reason](model)}
    changed = reason in ("hook", "a layer of another library", "forward", "eps")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(1 + changed):
            generate(model, None if "inputs_embeds" in settings else ids_of(), runner="torch", **settings)
    assert Tape.made == 0
    assert ["no CUDA graphs are recorded" in str(one.message) for one in said] == [True] * changed


def test_packed_weights_that_torch_unpacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "kernels_run", lambda device: False)
    model = model_of()
    packed(model)
    both(model, ids_of())
    assert Tape.made == 0


def test_dynamic_rope_runs_plainly() -> None:
    model = tiny_model(torch.float32, rope_scaling={"rope_type": "dynamic", "factor": 2.0}).to(DEVICE)
    both(model, ids_of())
    assert Tape.made == 0


def test_a_step_that_cannot_be_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def refuse(step: Any, device: Any) -> Any:
        tried.append(device)
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(cuda_graphs, "record", refuse)
    model = model_of()
    both(model, ids_of())
    both(model, ids_of())
    assert len(tried) == 1


def test_too_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_graphs, "free_bytes", lambda device: 100)
    both(model_of(), ids_of())
    assert Tape.made == 0


def test_a_cache_that_is_kept_stays_what_it_was() -> None:
    model, ids = model_of(), ids_of()
    settings = {"max_new_tokens": 20, "eos_token_id": None, "return_dict_in_generate": True}
    plain = generate(model, ids, runner="plain", **settings)
    both(model, ids)
    kept = generate(model, ids, runner="torch", **settings)
    assert isinstance(kept.past_key_values, DynamicCache)
    legacy = kept.past_key_values.to_legacy_cache()
    both(model, ids_of(seed=5))  # takes the buffers
    for wanted, cache, handed in zip(plain.past_key_values, kept.past_key_values, legacy, strict=True):
        for i in (0, 1):
            torch.testing.assert_close(cache[i], wanted[i])
            torch.testing.assert_close(handed[i], wanted[i])
    longer = torch.cat((kept.sequences, ids_of(tokens=3, seed=9)), 1)
    fresh = generate(model, longer, runner="plain", max_new_tokens=9, eos_token_id=None)
    assert torch.equal(generate(model, longer, past_key_values=kept.past_key_values, max_new_tokens=9), fresh)


def test_nan_does_not_stay() -> None:
    model, ids = model_of(), ids_of()
    answer = both(model, ids, max_new_tokens=40)
    head = model.lm_head.weight.detach().clone()
    held = cuda_graphs._HELD[model]._slots
    for slot in held.values():
        assert slot._buffers is not None
        slot._buffers.fill_(torch.nan)
    assert torch.equal(both(model, ids, max_new_tokens=40), answer) and torch.equal(head, model.lm_head.weight)


def test_two_streams_at_once() -> None:
    model, a, b = model_of(), ids_of(), ids_of(seed=2)
    settings = {"max_new_tokens": 20, "eos_token_id": None}
    wanted = [generate(model, x, runner="plain", **settings)[0, 12:].tolist() for x in (a, b)]
    both(model, a)
    streams = [stream(model, x, runner="torch", **settings) for x in (a, b)]
    found = [[int(step.tokens) for step in pair] for pair in zip(*streams, strict=True)]
    assert [list(row) for row in zip(*found, strict=True)] == wanted


def test_threads_do_not_share_the_buffers() -> None:
    model = model_of()
    settings = {"max_new_tokens": 30, "eos_token_id": None}
    prompts = [ids_of(seed=seed) for seed in range(4)]
    wanted = [generate(model, x, runner="plain", **settings).tolist() for x in prompts]
    found: dict[int, Any] = {}

    def work(i: int) -> None:
        found[i] = [generate(model, prompts[i], runner="torch", **settings).tolist() for _ in range(3)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[i] for i in range(4)] == [[x] * 3 for x in wanted]


def test_inference_mode_and_back() -> None:
    model = model_of()
    with torch.inference_mode():
        first = both(model, ids_of())
    assert torch.equal(both(model, ids_of()), first)
    with torch.inference_mode():
        assert torch.equal(both(model, ids_of()), first)


def test_gone_with_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    class Forgetful(Tape):
        """As CUDA: what is recorded does not hold the model."""

        def __init__(self, step: Callable[[], Tensor], device: torch.device) -> None:
            super().__init__(step, device)
            del self._step

        def replay(self) -> None:
            type(self).played += 1
            if self._inner is not None:
                self._inner.replay()

    monkeypatch.setattr(cuda_graphs, "record", Forgetful)
    model = model_of()
    generate(model, ids_of(), max_new_tokens=20, eos_token_id=None, runner="torch")
    held = cuda_graphs._HELD[model]
    alive = weakref.ref(held), weakref.ref(model)
    assert Forgetful.played
    del model, held
    gc.collect()
    assert alive[0]() is None and alive[1]() is None


def test_forgets_on_request_and_off_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of()
    both(model, ids_of())
    assert model in cuda_graphs._HELD
    cuda_graphs.forget(model)
    assert model not in cuda_graphs._HELD
    both(model, ids_of())
    monkeypatch.setattr(cuda_graphs, "can_record", lambda device: False)
    generate(model, ids_of(), max_new_tokens=1, runner="torch")
    assert model not in cuda_graphs._HELD


@pytest.mark.skipif(not GPU, reason="no CUDA device")
def test_a_step_that_waits_leaves_the_random_generator_usable() -> None:
    x = torch.ones(3, device="cuda")
    with pytest.raises(RuntimeError):
        cuda_graphs.CudaGraph(lambda: x * float(x.sum()), x.device)
    assert torch.rand(3, device="cuda").shape == (3,)
    assert cuda_graphs.CudaGraph(lambda: x + 1, x.device).logits.shape == (3,)
