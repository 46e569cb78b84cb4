"""Everything that runs without torch, in an environment that has none: `python run.py GGUF FOLDER` (`make test-slim`).

FOLDER holds what make_models.py wrote. Each step prints its name and seconds; the first that fails ends the script.
"""

import asyncio
import importlib.util
import json
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

GGUF, MODELS = sys.argv[1], Path(sys.argv[2]).resolve()
PROMPT = "The capital of France is"
WORK = Path(tempfile.mkdtemp())


def llama2(*words: str, given: str | None = None, code: int = 0) -> str:
    """What a command prints; its last error line where a code other than 0 is expected."""
    done = subprocess.run(
        [sys.executable, "-m", "llama2", *words], input=given, capture_output=True, text=True, timeout=300, cwd=WORK
    )
    assert done.returncode == code, (words, done.returncode, done.stdout[-800:], done.stderr[-2000:])
    assert "Traceback" not in done.stderr, done.stderr
    return done.stdout if code == 0 else done.stderr.strip().splitlines()[-1]


# -- steps -----------------------------------------------------------------------------------------------------------


def nothing_of_torch_is_here() -> None:
    assert importlib.util.find_spec("torch") is None
    import llama2 as library

    for name, extra in (("LlamaForCausalLM", "torch"), ("Trainer", "train")):
        try:
            getattr(library, name)
        except ImportError as error:
            assert str(error) == f"{name} needs torch, which is not installed: run `pip install 'llama2[{extra}]'`"
        else:
            raise AssertionError(name)


def commands_that_need_torch_say_so_at_once() -> None:
    for words, extra in (
        (("convert", "a", "b"), "torch"),
        (("quantize", "a", "b"), "torch"),
        (("finetune", "sft", "a", "b", "c"), "train"),
        (("align", "ppo", "a", "b", "c"), "train"),
        (("generate", "x", "--runner", "torch"), "torch"),
        (("generate", "x", "--dtype", "float32"), "torch"),
    ):
        said = llama2(*words, code=2)
        assert said.startswith("llama2: ") and f"pip install 'llama2[{extra}]'" in said, said


def headers_and_texts() -> None:
    assert "134" in llama2("info", "-m", GGUF)
    assert "28120" in llama2("tokenize", "-m", GGUF, "hello")
    assert "usage" in llama2("--help")
    llama2("list")
    llama2("config")
    report = json.loads(subprocess.run([sys.executable, "-m", "llama2", "doctor", "--no-measure", "--json"],
                                       capture_output=True, text=True).stdout)  # fmt: skip
    assert "not installed" in json.dumps(report["gpu"]) and not any("torch" in p for p in report["problems"]), report


def every_kind_of_model_generates() -> None:
    kinds = [GGUF, *(str(MODELS / name) for name in ("hf", "hf/model.safetensors", "meta", "gptq", "nf4"))]
    for model in (*kinds, str(MODELS / "q8_0.gguf"), str(MODELS / "q6_k.gguf")):
        text = llama2("generate", "-m", model, "--temperature", "0", "--max-new-tokens", "8", PROMPT)
        assert "Paris" in text, (model, text)
    assert llama2("chat", "-m", GGUF, "--max-new-tokens", "8", given="What is the capital of France?\n").strip()
    said = llama2(
        "generate", "-m", str(MODELS / "hf"), "--adapter", str(MODELS / "adapter"), "--max-new-tokens", "4", "x"
    )
    assert said


def forms() -> None:
    said = llama2("generate", "-m", GGUF, "--chat", "--max-new-tokens", "8", "--regex", "(yes|no)", "Is water wet?")
    assert said.strip() in ("yes", "no"), said


def measuring() -> None:
    text = WORK / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog near the bank of the river. " * 40)
    found = json.loads(llama2("perplexity", "-m", GGUF, "--json", "--window", "64", str(text)))
    assert found and "perplexity" in json.dumps(found)
    assert "same first choice" in llama2(
        "compare", GGUF, str(MODELS / "q8_0.gguf"), str(text), "--window", "64", "--md"
    )
    assert "tg4" in llama2("bench", GGUF, "-p", "8", "-n", "4", "-r", "1", "--no-start")
    llama2("embed", "-m", GGUF, "--output", str(WORK / "x.npy"), "hello")
    assert np.load(WORK / "x.npy").shape == (1, 576)


def packing() -> None:
    file = WORK / "packed.gguf"
    file.write_bytes((MODELS / "q8_0.gguf").read_bytes())
    llama2("pack", "--quiet", str(file))
    assert "matches" in llama2("pack", "--quiet", "--check", str(file))
    assert "Paris" in llama2("generate", "-m", str(file), "--temperature", "0", "--max-new-tokens", "8", PROMPT)


def a_file_of_requests() -> None:
    lines = [{"prompt": PROMPT, "max_tokens": 6, "temperature": 0}, {"messages": [{"role": "user", "content": "Hi"}]}]
    (WORK / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    llama2("batch", "-m", GGUF, "--quiet", "in.jsonl", "out.jsonl")
    assert len((WORK / "out.jsonl").read_text().splitlines()) == 2


def the_python_api() -> None:
    from llama2 import Engine, Llama

    assert Engine
    with Llama(GGUF, context=512) as llm:
        text = llm.generate(PROMPT, max_new_tokens=8, temperature=0).text
        assert "Paris" in text and "".join(llm.stream(PROMPT, max_new_tokens=8, temperature=0)) == text
        assert llm.chat("What is the capital of France?", max_new_tokens=8, temperature=0).text
        assert llm.embed(["a", "b"]).shape == (2, 576) and llm.detokenize(llm.tokenize("hello")) == "hello"
        assert asyncio.run(llm.agenerate(PROMPT, max_new_tokens=8, temperature=0)).text == text
        assert "torch" not in sys.modules
    with Llama(MODELS / "gptq", context=512) as llm:
        assert "Paris" in llm.generate(PROMPT, max_new_tokens=8, temperature=0).text


def asked(port: str, path: str, body: Any) -> Any:
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as response:
        return json.load(response)


def serving() -> None:
    """Every dialect, an adapter, a form, vectors and speculation, over HTTP."""
    words = ["serve", str(MODELS / "hf"), "--port", "0", "--lora-adapters", f"tuned={MODELS / 'adapter'}"]
    words += ["--draft", GGUF, "--max-total-tokens", "512", "--max-batch-size", "4"]
    process = subprocess.Popen([sys.executable, "-m", "llama2", *words], stderr=subprocess.PIPE, text=True, cwd=WORK)
    said: list[str] = []
    assert process.stderr is not None
    ready = threading.Event()
    address: list[str] = []

    def listen() -> None:
        for line in process.stderr:  # type: ignore[union-attr]
            said.append(line)
            if "http://127.0.0.1:" in line and not address:
                address.append(line.partition("http://127.0.0.1:")[2].split()[0].strip('/",.})'))
                ready.set()

    threading.Thread(target=listen, daemon=True).start()
    try:
        assert ready.wait(120), said
        port, talk = address[0], [{"role": "user", "content": "What is the capital of France?"}]
        for _ in range(240):  # 503 until the model is loaded
            try:
                asked(port, "/v1/completions", {"prompt": PROMPT, "max_tokens": 1})
                break
            except urllib.error.HTTPError as error:
                assert error.code == 503, error
                time.sleep(0.25)
        greedy = {"temperature": 0, "max_tokens": 12}
        text = asked(port, "/v1/completions", {"prompt": PROMPT, **greedy})["choices"][0]["text"]
        assert "Paris" in text
        assert asked(port, "/v1/chat/completions", {"messages": talk, **greedy})["choices"][0]["message"]["content"]
        assert asked(port, "/v1/completions", {"prompt": PROMPT, "model": "tuned", **greedy})["choices"][0]["text"]
        schema = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 12}}, "required": ["city"]}
        form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        told = asked(port, "/v1/chat/completions", {"messages": talk, "response_format": form, "max_tokens": 60})
        assert "city" in json.loads(told["choices"][0]["message"]["content"])
        assert len(asked(port, "/v1/embeddings", {"input": "hello"})["data"][0]["embedding"]) == 576
        messages = {"messages": talk, "max_tokens": 12, "model": "hf"}
        chat = {"messages": talk, "stream": False, "model": "hf", "options": {"num_predict": 8}}
        assert asked(port, "/v1/messages", messages)["content"][0]["text"]
        assert asked(port, "/api/chat", chat)["message"]["content"]
        assert "Paris" in json.dumps(asked(port, "/generate", {"inputs": PROMPT, "parameters": {"max_new_tokens": 8}}))
        assert "Paris" in json.dumps(asked(port, "/completion", {"prompt": PROMPT, "n_predict": 8, "temperature": 0}))
    except BaseException:
        print("".join(said)[-4000:])
        raise
    finally:
        process.terminate()
        process.wait(60)


STEPS: tuple[Callable[[], None], ...] = (
    nothing_of_torch_is_here, commands_that_need_torch_say_so_at_once, headers_and_texts, every_kind_of_model_generates,
    forms, measuring, packing, a_file_of_requests, the_python_api, serving,
)  # fmt: skip

for step in STEPS:
    began = time.perf_counter()
    step()
    print(f"{step.__name__.replace('_', ' ')}: {time.perf_counter() - began:.1f} s", flush=True)
