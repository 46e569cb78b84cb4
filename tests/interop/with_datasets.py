"""datasets: map with these tokenizers finds its cache again; our trainer reads a Dataset."""

from pathlib import Path

from datasets import Dataset
from datasets.fingerprint import Hasher
from product import byte_model, byte_tokenizer, llama2

TEXTS = [f"The sky is {colour}" for colour in ("red", "blue", "green", "grey")]


def case_fingerprint_is_stable(folder: Path) -> None:
    tokenizer = byte_tokenizer(folder)
    before = Hasher.hash(tokenizer)
    tokenizer("hello", padding=True, truncation=True, max_length=4)
    tokenizer.decode(tokenizer.encode("hello there"))
    assert Hasher.hash(tokenizer) == before


def case_map_finds_its_cache(folder: Path) -> None:
    tokenizer = byte_tokenizer(folder)
    Dataset.from_list([{"text": text} for text in TEXTS]).save_to_disk(str(folder / "data"))
    files = []
    for _ in range(2):
        data = Dataset.load_from_disk(str(folder / "data"))
        mapped = data.map(lambda row: tokenizer(row["text"]))
        files.append(mapped.cache_files[0]["filename"])
        tokenizer("something in between", truncation=True, max_length=2)
    assert files[0] == files[1], files
    assert mapped[0]["input_ids"] == tokenizer(TEXTS[0])["input_ids"]


def case_our_trainer_reads_a_dataset(folder: Path) -> None:
    tokenizer = byte_tokenizer(folder)
    data = Dataset.from_list([{"prompt": text, "completion": " today"} for text in TEXTS])
    trainer = llama2.Trainer(
        model=byte_model(),
        args=llama2.TrainingArguments(output_dir=str(folder / "out"), max_steps=2, report_to="none"),
        train_dataset=data,
        processing_class=tokenizer,
    )
    trainer.train()
