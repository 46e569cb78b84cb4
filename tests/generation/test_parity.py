"""generate() beside transformers' own, on one tiny random model in float32."""

from typing import Any

import pytest
import torch
from tiny import tiny_ids, tiny_model

from llama2 import LlamaForCausalLM
from llama2.generation import processors as ours
from llama2.generation import sampler as warpers
from llama2.generation.loop import compute_transition_scores

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]
transformers = pytest.importorskip("transformers")
SORTED_DRAWS = tuple(int(n) for n in transformers.__version__.split(".")[:2]) >= (5, 24)
PAD, EOS = 2, 5  # not 0: transformers 5.23 pads finished beams with the end id then


@pytest.fixture(scope="module")
def models() -> tuple[LlamaForCausalLM, Any]:
    """Our tiny model and transformers' with the same weights."""
    mine = tiny_model(torch.float32, eos_token_id=EOS, pad_token_id=None)
    with torch.no_grad():
        for parameter in mine.parameters():
            if parameter.dim() > 1:
                parameter.mul_(0.45)
    config = transformers.LlamaConfig(**{k: v for k, v in mine.config.to_dict().items() if k != "model_type"})
    theirs = transformers.LlamaForCausalLM(config).eval()
    theirs.load_state_dict(mine.state_dict())
    for model in (mine, theirs):
        model.generation_config.pad_token_id = PAD
        model.generation_config.eos_token_id = EOS
        model.generation_config.bos_token_id = 1
    return mine, theirs


def left_padded() -> dict[str, torch.Tensor]:
    ids = tiny_ids(3, 9)
    mask = torch.ones_like(ids)
    for row, pads in enumerate((4, 0, 2)):
        ids[row, :pads] = PAD
        mask[row, :pads] = 0
    return {"input_ids": ids, "attention_mask": mask}


CASES: dict[str, dict[str, Any]] = {
    "default": {},
    "greedy": {"max_new_tokens": 30},
    "max_length": {"max_length": 25},
    "several_ends": {"max_new_tokens": 30, "eos_token_id": list(range(5, 25))},
    "min_new": {"max_new_tokens": 30, "min_new_tokens": 10, "eos_token_id": list(range(5, 45))},
    "min_length": {"max_new_tokens": 30, "min_length": 15, "eos_token_id": list(range(5, 45))},
    "repetition": {"max_new_tokens": 30, "repetition_penalty": 1.7},
    "encoder_repetition": {"max_new_tokens": 20, "encoder_repetition_penalty": 1.7},
    "ngram": {"max_new_tokens": 30, "no_repeat_ngram_size": 2},
    "unigram": {"max_new_tokens": 30, "no_repeat_ngram_size": 1},
    "encoder_ngram": {"max_new_tokens": 20, "encoder_no_repeat_ngram_size": 2},
    "bad_words": {"max_new_tokens": 20, "bad_words_ids": [[i] for i in range(20, 90, 2)] + [[3, 4], [EOS]]},
    "sequence_bias": {"max_new_tokens": 20, "sequence_bias": [[[7], 2.5], [[7, 9], 30.0], [[11], -4.0]]},
    "suppress": {"max_new_tokens": 20, "suppress_tokens": list(range(60)), "begin_suppress_tokens": [70, 71]},
    "forced": {"max_new_tokens": 12, "forced_eos_token_id": EOS},
    "decay": {"max_new_tokens": 30, "exponential_decay_length_penalty": (3, 1.6)},
    "beams": {"max_new_tokens": 12, "num_beams": 3},
    "beams_all": {"max_new_tokens": 12, "num_beams": 4, "num_return_sequences": 4, "eos_token_id": [5, 6, 7, 8, 9]},
    "beams_early": {"max_new_tokens": 15, "num_beams": 3, "early_stopping": True, "eos_token_id": list(range(5, 25))},
    "beams_never": {
        "max_new_tokens": 15,
        "num_beams": 3,
        "early_stopping": "never",
        "eos_token_id": list(range(5, 15)),
    },
    "beams_long": {"max_new_tokens": 15, "num_beams": 3, "length_penalty": 2.0, "eos_token_id": list(range(5, 15))},
    "beams_short": {"max_new_tokens": 15, "num_beams": 3, "length_penalty": -1.0, "eos_token_id": list(range(5, 15))},
    "beams_ngram": {"max_new_tokens": 15, "num_beams": 2, "no_repeat_ngram_size": 2, "repetition_penalty": 1.3},
    "sampled": {"max_new_tokens": 20, "do_sample": True, "temperature": 0.7, "top_k": 0, "top_p": 0.9},
    "sampled_default": {"max_new_tokens": 20, "do_sample": True},
    "sampled_many": {"max_new_tokens": 20, "do_sample": True, "num_return_sequences": 3, "min_p": 0.05},
    "sampled_rare": {"max_new_tokens": 20, "do_sample": True, "typical_p": 0.8, "epsilon_cutoff": 3e-4},
    "sampled_eta": {"max_new_tokens": 20, "do_sample": True, "eta_cutoff": 1e-2, "renormalize_logits": True},
    "sampled_beams": {"max_new_tokens": 10, "do_sample": True, "num_beams": 3, "num_return_sequences": 2},
    "static": {"max_new_tokens": 20, "cache_implementation": "static"},
    "no_cache": {"max_new_tokens": 8, "use_cache": False},
    "guidance": {"max_new_tokens": 10, "guidance_scale": 1.8},
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("padded", [False, True], ids=["single", "padded"])
def test_same_tokens(models: tuple[LlamaForCausalLM, Any], name: str, padded: bool) -> None:
    case = CASES[name]
    if padded and name in ("ngram", "unigram", "encoder_ngram", "encoder_repetition", "beams_ngram"):
        pytest.skip("transformers takes padding for text there, so a row alone differs from the row in a batch")
    inputs = left_padded() if padded else {"input_ids": tiny_ids(1, 9)}
    if name == "sampled_beams" and not SORTED_DRAWS:
        pytest.skip("transformers before 5.24 leaves drawn candidates in the order of the draw")
    mine, theirs = models
    extra = {"output_scores": True, "output_logits": True, "return_dict_in_generate": True}
    torch.manual_seed(3)
    want = theirs.generate(**inputs, **case, **extra)
    torch.manual_seed(3)
    got = mine.generate(**inputs, **case, **extra)
    assert got.sequences.tolist() == want.sequences.tolist()
    assert len(got.scores) == len(want.scores)
    for mine_step, their_step in zip(got.logits, want.logits, strict=True):
        if "beam" not in name:
            torch.testing.assert_close(mine_step, their_step, atol=1e-4, rtol=1e-4)
    if "beam" in name:
        torch.testing.assert_close(got.sequences_scores, want.sequences_scores, atol=1e-4, rtol=1e-4)
        assert got.beam_indices.tolist() == want.beam_indices.tolist()
    for normalize in (False, True):
        indices = want.get("beam_indices")
        theirs_scores = theirs.compute_transition_scores(want.sequences, want.scores, indices, normalize)
        ours_scores = compute_transition_scores(mine, want.sequences, want.scores, indices, normalize)
        torch.testing.assert_close(ours_scores, theirs_scores)


@pytest.mark.parametrize("case", [{}, {"repetition_penalty": 1.4}, {"no_repeat_ngram_size": 3}], ids=str)
def test_assisted_equals_their_assisted(models: tuple[LlamaForCausalLM, Any], case: dict[str, Any]) -> None:
    mine, theirs = models
    ids = tiny_ids(1, 9)
    want = theirs.generate(ids, max_new_tokens=30, prompt_lookup_num_tokens=4, **case)
    assert mine.generate(ids, max_new_tokens=30, prompt_lookup_num_tokens=4, **case).tolist() == want.tolist()
    assert mine.generate(ids, max_new_tokens=30, assistant_model=mine, **case).tolist() == want.tolist()


def test_hidden_states_and_attentions(models: tuple[LlamaForCausalLM, Any]) -> None:
    mine, theirs = models
    kwargs: dict[str, Any] = {
        "max_new_tokens": 4,
        "output_hidden_states": True,
        "output_attentions": True,
        "return_dict_in_generate": True,
    }
    theirs.set_attn_implementation("eager")
    want, got = theirs.generate(tiny_ids(2, 6), **kwargs), mine.generate(tiny_ids(2, 6), **kwargs)
    for name in ("hidden_states", "attentions"):
        for mine_step, their_step in zip(getattr(got, name), getattr(want, name), strict=True):
            for a, b in zip(mine_step, their_step, strict=True):
                torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_embeddings_and_nothing(models: tuple[LlamaForCausalLM, Any]) -> None:
    mine, theirs = models
    embeds = mine.get_input_embeddings()(tiny_ids(2, 7)).detach()
    for case in ({}, {"max_new_tokens": 9}, {"max_length": 20}, {"num_beams": 2, "max_new_tokens": 5}):
        want = theirs.generate(inputs_embeds=embeds, **case)
        assert mine.generate(inputs_embeds=embeds, **case).tolist() == want.tolist()
    assert mine.generate(max_new_tokens=5).tolist() == theirs.generate(max_new_tokens=5).tolist()


PROCESSORS: dict[str, tuple[Any, ...]] = {
    "TemperatureLogitsWarper": (0.7,),
    "TopKLogitsWarper": (5,),
    "TopPLogitsWarper": (0.8,),
    "TopHLogitsWarper": (0.6,),
    "MinPLogitsWarper": (0.1,),
    "TypicalLogitsWarper": (0.7,),
    "EpsilonLogitsWarper": (0.02,),
    "EtaLogitsWarper": (0.05,),
    "RepetitionPenaltyLogitsProcessor": (1.3,),
    "NoRepeatNGramLogitsProcessor": (2,),
    "NoBadWordsLogitsProcessor": ([[3], [4, 5], [7, 8, 9]], 3),
    "MinLengthLogitsProcessor": (10, 2),
    "MinNewTokensLengthLogitsProcessor": (4, 5, 2),
    "ForcedBOSTokenLogitsProcessor": (2,),
    "ForcedEOSTokenLogitsProcessor": (9, 2),
    "InfNanRemoveLogitsProcessor": (),
    "ExponentialDecayLengthPenalty": ((1, 1.5), 2, 3),
    "SuppressTokensLogitsProcessor": ([1, 2],),
    "SuppressTokensAtBeginLogitsProcessor": ([1, 2], 8),
    "SequenceBiasLogitsProcessor": ([[[1], 2.0], [[2, 3], -1.0]],),
    "LogitNormalization": (),
    "PrefixConstrainedLogitsProcessor": (lambda row, ids: [row, 7, 9], 1),
}


@pytest.mark.parametrize("name", PROCESSORS)
def test_processor_on_random_logits(name: str) -> None:
    arguments = PROCESSORS[name]
    generator = torch.Generator().manual_seed(0)
    theirs = getattr(transformers.generation.logits_process, name)(*arguments)
    mine = getattr(warpers, name, None) or getattr(ours, name)
    processor = mine(*arguments)
    for vocabulary in (12, 50, 4000):
        ids = torch.randint(0, 10, (6, 8), generator=generator)
        scores = 3 * torch.randn(6, vocabulary, generator=generator)
        if vocabulary == 4000 and name != "InfNanRemoveLogitsProcessor":  # theirs lifts bans of -inf to a finite low
            scores = scores.masked_fill(torch.rand(6, vocabulary, generator=generator) < 0.99, -torch.inf)
            scores[:, 7] = 1.0
        if name in ("SequenceBiasLogitsProcessor", "NoBadWordsLogitsProcessor"):  # both prepare for one vocabulary
            theirs, processor = type(theirs)(*arguments), mine(*arguments)
        before = scores.clone()
        torch.testing.assert_close(processor(ids, scores), theirs(ids, scores.clone()))
        assert torch.equal(scores, before)
