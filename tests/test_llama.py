"""`llama2.Llama`, and the commands that run GGUF files, with torch and in processes in which it cannot be imported."""

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from llama2 import AutoModelForCausalLM, Llama, cpu
from llama2.cli import main
from llama2.errors import InputError, MissingDependencyError

pytestmark = pytest.mark.skipif(not cpu.available(), reason="the native engine is not built")
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer"}},
    "required": ["name", "age"],
}


@pytest.fixture(scope="module")
def llm(smollm2: Path) -> Iterator[Llama]:
    with Llama(smollm2, context=1024) as made:
        yield made


def test_text_goes_on_as_generate_says(llm: Llama, smollm2: Path) -> None:
    prompts = ["The capital of France is", "Water boils at"]
    answers = llm.generate(prompts, max_new_tokens=12, temperature=0)
    model = AutoModelForCausalLM.from_pretrained(smollm2)
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = llm.tokenizer(prompt, return_tensors="pt").input_ids
        wanted = model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
        assert answer.tokens == wanted.tolist() and answer.finish in ("length", "eos")
        assert prompt + answer.text == llm.detokenize([*ids[0].tolist(), *answer.tokens])
    one = llm.generate(llm.tokenize(prompts[0]), max_new_tokens=12, temperature=0)
    assert one.tokens == answers[0].tokens
    assert "".join(llm.stream(prompts[0], max_new_tokens=12, temperature=0)) == one.text


def test_seeds_and_stops(llm: Llama) -> None:
    def say(**settings: object) -> str:
        text: str = llm.generate("Once upon a time", max_new_tokens=16, **settings).text
        return text

    assert say(temperature=1.0, seed=1) == say(temperature=1.0, seed=1) != say(temperature=1.0, seed=2)
    three = llm.generate(["Once upon a time"] * 3, max_new_tokens=16, temperature=1.0, seed=1)
    assert [three[0].text, three[1].text] == [say(temperature=1.0, seed=1), say(temperature=1.0, seed=2)]
    whole = say(temperature=0)
    stop = whole.split()[2]
    assert say(temperature=0, stop=stop) == whole[: whole.index(stop)]
    assert len(llm.generate("A", max_new_tokens=4, logprobs=0, temperature=0).logprobs) == 4


def test_a_chat_and_its_forms(llm: Llama) -> None:
    pytest.importorskip("llguidance")
    yes = llm.chat("Is fire hot? Answer yes or no.", regex="(yes|no)", max_new_tokens=8, temperature=0)
    assert yes.text in ("yes", "no") and yes.finish == "eos"
    found = json.loads(llm.chat("Describe a person.", schema=SCHEMA, max_new_tokens=60, temperature=0).text)
    assert set(found) == {"name", "age"} and isinstance(found["age"], int) and len(found["name"]) <= 8
    assert llm.chat("Say it.", grammar='start: "a" "b"', max_new_tokens=8, temperature=0).text == "ab"
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "Who?"},
    ]
    pieces = "".join(llm.stream_chat(messages, system="Be kind.", max_new_tokens=8, temperature=0))
    assert pieces == llm.chat(messages, system="Be kind.", max_new_tokens=8, temperature=0).text
    ids = llm.render("</s><|im_end|>")
    assert ids.count(llm.tokenizer.convert_tokens_to_ids("<|im_end|>")) == llm.render("x").count(
        llm.tokenizer.convert_tokens_to_ids("<|im_end|>")
    )


def test_many_at_once_in_an_event_loop(llm: Llama) -> None:
    async def go() -> list[str]:
        answers = await asyncio.gather(
            *(llm.agenerate("One, two,", max_new_tokens=6, temperature=0) for _ in range(3)),
            llm.achat("Hi", max_new_tokens=6, temperature=0),
        )
        streamed = [piece async for piece in llm.astream("One, two,", max_new_tokens=6, temperature=0)]
        return [*(answer.text for answer in answers), "".join(streamed)]

    found = asyncio.run(go())
    assert (
        found[0] == found[1] == found[2] == found[4] == llm.generate("One, two,", max_new_tokens=6, temperature=0).text
    )
    assert found[3] == llm.chat("Hi", max_new_tokens=6, temperature=0).text


def test_what_cannot_be_asked(llm: Llama, smollm2: Path) -> None:
    for settings, message in (
        ({"temprature": 1}, "did you mean 'temperature'"),
        ({"temperature": 0, "do_sample": True}, "drop one"),
        ({"regex": "a", "schema": {}}, "give one of them"),
        ({"regex": "(("}, "cannot be used|regular expression"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
    ):
        with pytest.raises(InputError, match=message):
            llm.generate("x", **settings)
    with pytest.raises(InputError, match="prompt is empty"):
        llm.generate("")
    with pytest.raises(InputError, match="context is 0; it must lie between 1 and"):
        Llama(smollm2, context=0)
    llm.tokenizer.chat_template, kept = None, llm.tokenizer.chat_template
    try:
        with pytest.raises(InputError, match="has no chat template"):
            llm.chat("Hi")
    finally:
        llm.tokenizer.chat_template = kept


WITHOUT = 'import sys\nsys.modules["torch"] = None\n'
SAY = """
import json
from llama2 import Llama
with Llama(sys.argv[1], context=512) as llm:
    one = llm.generate("The capital of France is", max_new_tokens=8, temperature=0)
    two = llm.generate("Once", max_new_tokens=8, temperature=1.0, top_p=0.9, seed=5)
    print(json.dumps([one.tokens, two.tokens]))
try:
    from llama2 import LlamaForCausalLM
except ImportError as error:
    print(error)
"""


def test_the_same_without_torch(llm: Llama, smollm2: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT + SAY, str(smollm2)], capture_output=True, text=True, timeout=250
    )
    assert done.returncode == 0, done.stderr
    tokens, error = done.stdout.splitlines()
    wanted = [
        llm.generate("The capital of France is", max_new_tokens=8, temperature=0).tokens,
        llm.generate("Once", max_new_tokens=8, temperature=1.0, top_p=0.9, seed=5).tokens,
    ]
    assert json.loads(tokens) == wanted
    assert error.startswith("LlamaForCausalLM needs torch, which is not installed: run `pip install 'llama2[torch]'`")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("generate", "The capital of France is", "--greedy", "-n", "8"), " Paris"),
        (("generate", "--chat", "Hi", "--temperature", "0.7", "--seed", "1", "-n", "4", "--stop", "zzz"), ""),
        (("chat", "-n", "4", "--greedy"), "> Hi"),
        (("tokenize", "Hello"), "19556"),
        (("info",), "GGUF version 3"),
    ],
)
def test_commands_without_torch(smollm2: Path, words: tuple[str, ...], said: str) -> None:
    code = WITHOUT + "from llama2.cli import main\nsys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, words[0], "-m", str(smollm2), *words[1:]]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250, input="Hi\n")
    assert done.returncode == 0 and said in done.stdout, done.stderr


def test_a_model_of_torch_says_what_it_needs(tmp_path: Path) -> None:
    from tiny import tiny_model

    tiny_model().save_pretrained(tmp_path)
    code = WITHOUT + "from llama2.cli import main\nsys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "perplexity", "-m", str(tmp_path), __file__]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert done.returncode == 2 and "torch" in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert issubclass(MissingDependencyError, ImportError)


def test_forms_on_the_command_line(smollm2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("llguidance")
    schema, grammar = tmp_path / "schema.json", tmp_path / "grammar.lark"
    schema.write_text(json.dumps(SCHEMA))
    grammar.write_text('start: "a" "b"')
    asked = ["generate", "-m", str(smollm2), "--greedy", "-n", "60", "--chat", "A person."]
    for flags, good in (
        (["--json-schema", str(schema)], lambda text: set(json.loads(text)) == {"name", "age"}),
        (["--regex", "(yes|no)"], lambda text: text.strip() in ("yes", "no")),
        (["--grammar", str(grammar)], lambda text: text.strip() == "ab"),
        (["--regex", "(yes|no)", "--runner", "torch"], lambda text: text.strip() in ("yes", "no")),
    ):
        assert main([*asked, *flags]) == 0
        assert good(capsys.readouterr().out), flags
    for flags, message in (
        (["--regex", "(("], "unclosed group"),
        (["--regex", "a", "--grammar", str(grammar)], "give one of them"),
        (["--json-schema", str(tmp_path / "none.json")], "No such file"),
        (["--json-schema", str(grammar)], "the JSON schema is no JSON"),
    ):
        assert main([*asked, *flags]) == 2
        assert message in capsys.readouterr().err
