"""lm-eval's HFLM over these models: log-likelihoods and generation; it asks for transformers' tokenizer class."""

from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from product import byte_model, byte_tokenizer, demo


def _loglikelihood(lm: Any, pairs: list[tuple[str, str]]) -> list[tuple[float, bool]]:
    asked = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    found: list[tuple[float, bool]] = lm.loglikelihood(asked, disable_tqdm=True)
    return found


def _expected(model: Any, tokenizer: Any, context: str, continuation: str) -> float:
    before, ids = tokenizer.encode(context), tokenizer.encode(context + continuation)
    logits = model(torch.tensor([ids])).logits.float().log_softmax(-1)[0]
    return float(sum(logits[i - 1, ids[i]] for i in range(len(before), len(ids))))


def _check(model: Any, tokenizer: Any) -> None:
    lm = HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=2, device="cpu")
    pairs = [("The sky is", " blue"), ("The sea is", " a good deal deeper than that")]
    with torch.no_grad():
        for (score, _), pair in zip(_loglikelihood(lm, pairs), pairs, strict=True):
            assert abs(score - _expected(model, tokenizer, *pair)) < 1e-2
    asked = [Instance("generate_until", {}, ("The sky is", {"until": ["\n"], "max_gen_toks": 4}), 0)]
    assert isinstance(lm.generate_until(asked, disable_tqdm=True)[0], str)
    rolling = [Instance("loglikelihood_rolling", {}, ("The sky is blue today.",), 0)]
    assert lm.loglikelihood_rolling(rolling, disable_tqdm=True)[0] < 0


def case_tiny(folder: Path) -> None:
    _check(byte_model(), byte_tokenizer(folder).to_transformers())


def case_demo_model(folder: Path) -> None:
    model, tokenizer = demo()
    _check(model, tokenizer.to_transformers())
