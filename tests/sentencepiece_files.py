"""A SentencePiece model in the form of Llama 2's tokenizer.model, trained on a few sentences."""

import io
from pathlib import Path

import sentencepiece

SENTENCES = (
    "The sky is blue and the sea is green.",
    "A small model answers a short question.",
    "Paris is the capital of France, and Rome is the capital of Italy.",
)


def write_llama_model(path: Path, pieces: int) -> None:
    """BPE with byte fallback and Llama 2's control tokens: <unk>, <s>, </s> are 0, 1, 2."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 4), model_writer=model, model_type="bpe", vocab_size=pieces,
        byte_fallback=True,        normalization_rule_name="identity", remove_extra_whitespaces=False,
        pad_id=-1, hard_vocab_limit=True, minloglevel=2,
    )  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(model.getvalue())
