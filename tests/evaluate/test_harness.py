"""The class for lm-evaluation-harness: numbers of the network, blocks that go on, the registry."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from bytewise import write_tokenizer
from tiny import tiny_model

from llama2.errors import InputError
from llama2.evaluate.score_blocks import BlockRunner, BlockStore, Scored, plan

pytest.importorskip("lm_eval", reason="needs `pip install llama2[evaluate]`")
from lm_eval.api.instance import Instance

from llama2.evaluate.harness import HarnessModel

PAIRS = [
    ("The sky is", " blue"),
    ("The sky is", " green and wide"),
    ("The sky is ", "red"),
    ("", "Once upon"),
    ("One of these letters:", " A"),
    ("One of these letters:", " B"),
    ("One of these letters:", " C"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_model(torch.float32, vocab_size=260, bos_token_id=None, eos_token_id=0).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def asked(kind: str, rows: list[Any]) -> list[Instance]:
    return [Instance(kind, {}, row if isinstance(row, tuple) else (row,), i) for i, row in enumerate(rows)]


def network(lm: HarnessModel, context: list[int], rest: list[int]) -> tuple[float, bool]:
    ids = (context + rest)[-(lm.max_length + 1) :]
    with torch.no_grad():
        logs = lm._model(torch.tensor([ids[:-1]])).logits[0].double().log_softmax(-1)[-len(rest) :]
    value = float(sum(row[token] for row, token in zip(logs, rest, strict=True)))
    return value, all(int(row.argmax()) == token for row, token in zip(logs, rest, strict=True))


def test_loglikelihood_is_the_networks(folder: Path) -> None:
    lm = HarnessModel(str(folder), dtype="float32")
    found = lm.loglikelihood(asked("loglikelihood", PAIRS), disable_tqdm=True)
    for (value, first), (context, rest) in zip(found, PAIRS, strict=True):
        spaces = len(context) - len(context.rstrip())
        rest = context[len(context) - spaces :] + rest
        ids = lm.tok_encode(context.rstrip()) or [lm.prefix_token_id]
        wanted = network(lm, ids, lm.tok_encode(rest))
        assert value == pytest.approx(wanted[0], abs=1e-3) and first == wanted[1]
    lm.close()


def test_rolling_and_cut_texts(folder: Path) -> None:
    lm = HarnessModel(str(folder), dtype="float32", max_length=16)
    text = "A text that is a good deal longer than sixteen bytes."
    (found,) = lm.loglikelihood_rolling(asked("loglikelihood_rolling", [text]), disable_tqdm=True)
    ids, total = lm.tok_encode(text), 0.0
    for start in range(0, len(ids), 16):
        part = ids[start : start + 16]
        window = ([lm.prefix_token_id, *ids] if start == 0 else ids)[max(start + len(part) - 17, 0) : start + len(part)]
        if start == 0:
            window = [lm.prefix_token_id, *part]
        total += network(lm, window[: -len(part)], part)[0]
    assert found == pytest.approx(total, abs=1e-3)
    (cut,) = lm.loglikelihood(asked("loglikelihood", [("x" * 100, "yz")]), disable_tqdm=True)
    assert cut[0] == pytest.approx(network(lm, lm.tok_encode("x" * 100), lm.tok_encode("yz"))[0], abs=1e-3)
    with pytest.raises(InputError, match="20 tokens"):
        lm.loglikelihood(asked("loglikelihood", [("x", "y" * 20)]), disable_tqdm=True)
    lm.close()


def test_generation_stops(folder: Path) -> None:
    lm = HarnessModel(str(folder), dtype="float32")
    settings = {"until": [], "max_gen_toks": 12, "do_sample": False}
    (whole,) = lm.generate_until(asked("generate_until", [("The sky", settings)]), disable_tqdm=True)
    assert whole
    middle = whole[len(whole) // 2]
    stopped = {"until": [middle], "max_gen_toks": 12}
    (text,) = lm.generate_until(asked("generate_until", [("The sky", stopped)]), disable_tqdm=True)
    assert text == whole.split(middle)[0]
    sampled = {"max_gen_toks": 12, "do_sample": True, "temperature": 1.5}
    twice = [lm.generate_until(asked("generate_until", [("The sky", sampled)]), disable_tqdm=True) for _ in range(2)]
    assert twice[0] == twice[1]
    with pytest.raises(InputError, match="max_gen_toks"):
        lm.generate_until(asked("generate_until", [("x", {"max_gen_toks": 64})]), disable_tqdm=True)
    lm.close()


def test_a_killed_run_goes_on_with_the_same_bits(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llama2.evaluate.score_blocks.BLOCK_REQUESTS", 5)
    rows = [(f"Question {i // 4}: what is it? " + "word " * (i % 3), f" choice {i}") for i in range(40)]
    whole = HarnessModel(str(folder), dtype="float32")
    wanted = whole.loglikelihood(asked("loglikelihood", rows), disable_tqdm=True)
    whole.close()
    store = str(tmp_path / "store.db")
    first = HarnessModel(str(folder), dtype="float32", store=store)
    ran: list[int] = []
    original = BlockRunner._score_block

    def killed(self: BlockRunner, *args: Any) -> Any:
        ran.append(1)
        if len(ran) == 4:
            raise KeyboardInterrupt
        return original(self, *args)

    monkeypatch.setattr(BlockRunner, "_score_block", killed)
    with pytest.raises(KeyboardInterrupt):
        first.loglikelihood(asked("loglikelihood", rows), disable_tqdm=True)
    first.close()
    second = HarnessModel(str(folder), dtype="float32", store=store)
    assert second.loglikelihood(asked("loglikelihood", rows), disable_tqdm=True) == wanted
    blocks = len(plan([Scored((*second.tok_encode(a), *second.tok_encode(b)), len(a)) for a, b in rows]))
    assert len(ran) == blocks + 1  # three that were kept did not run again; the one that was cut did
    second.close()
    monkeypatch.setattr(BlockRunner, "_score_block", lambda *_: pytest.fail("it ran again"))
    third = HarnessModel(str(folder), dtype="float32", store=store)
    assert third.loglikelihood(asked("loglikelihood", rows), disable_tqdm=True) == wanted
    third.close()


def test_an_adapter_counts_from_the_first_request_on(folder: Path, tmp_path: Path) -> None:
    """The numbers are those of the weights with the adapter in them; another adapter of the same path is another."""
    from checkpoint.adapter_files import tensors_for, write_adapter

    from llama2 import LlamaConfig
    from llama2.checkpoint.convert import ConversionSettings, convert

    tensors = tensors_for(LlamaConfig.from_pretrained(folder), ("q_proj", "v_proj"))
    place = write_adapter(tmp_path / "adapter", tensors)
    convert(folder, tmp_path / "merged", ConversionSettings(adapter=str(place)))
    write_tokenizer(tmp_path / "merged")
    found, store = {}, str(tmp_path / "store.db")
    for name, path, more in (
        ("base", folder, {}), ("merged", tmp_path / "merged", {}),
        ("attached", folder, {"adapter": str(place), "store": store}),
    ):  # fmt: skip
        lm = HarnessModel(str(path), dtype="float32", precision="exact", **more)
        found[name] = [value for value, _ in lm.loglikelihood(asked("loglikelihood", PAIRS), disable_tqdm=True)]
        lm.close()
    assert found["attached"] == pytest.approx(found["merged"], abs=1e-3)
    assert max(abs(a - b) for a, b in zip(found["attached"], found["base"], strict=True)) > 0.05
    write_adapter(place, {name: 2 * tensor for name, tensor in tensors.items()})
    lm = HarnessModel(str(folder), dtype="float32", precision="exact", adapter=str(place), store=store)
    again = [value for value, _ in lm.loglikelihood(asked("loglikelihood", PAIRS), disable_tqdm=True)]
    lm.close()
    assert again != found["attached"]


def test_blocks_share_inputs_and_hold_every_text_once() -> None:
    texts = [Scored((1, 2, 3, i), 3) for i in range(4)] + [Scored((1, 2), 1), Scored((1, 2, 3, 9, 9), 3)]
    (block,) = plan(texts)
    assert sorted(i for group in block for i in group.members) == list(range(6))
    assert sorted(len(group.members) for group in block) == [1, 1, 4]
    assert len(plan([Scored(tuple(range(i, i + 6000)), 10) for i in range(4)])) == 4


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"load_in_4bit": True}, "load_in_4bit"),
        ({"batch_size": "many"}, "auto or a number"),
        ({"batch_size": 0}, "at least 1"),
        ({"max_length": 65}, "between 2 and 64"),
        ({"trust_remote_code": True}, "no code"),
        ({"adapter": "a", "peft": "b"}, "two adapters"),
    ],
)
def test_wrong_arguments(folder: Path, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        HarnessModel(str(folder), **settings)


def test_the_gpu_that_lm_eval_asks_for_by_default_may_be_absent(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    lm = HarnessModel(str(folder), device="cuda:0")
    assert lm.loglikelihood(asked("loglikelihood", PAIRS[:1]), disable_tqdm=True)[0][0] < 0
    lm.close()


def test_a_damaged_store(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("no database, and longer than a header of one is")
    with pytest.raises(OSError, match="cannot keep results"):
        BlockStore(tmp_path / "x")


HOOK = Path(__file__).resolve().parents[2] / "src" / "llama2_lm_eval.pth"


def test_lm_eval_finds_the_class_when_its_table_is_imported() -> None:
    code = (
        f"exec({HOOK.read_text()!r}); import sys; assert not any(n.startswith('llama2.') for n in sys.modules);"
        "from lm_eval.api.registry import get_model; m = get_model('llama2'); get_model('dummy'); print(m.__module__)"
    )
    ran = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert ran.stdout.strip() == "llama2.evaluate.harness", ran.stderr
