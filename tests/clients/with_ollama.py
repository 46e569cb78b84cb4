"""ollama: chats, prompts, forms, tools, models, vectors."""

import json

import ollama
from run_cases import Server
from shared import MESSAGES, SCHEMA, TOOLS

OPTIONS = {"temperature": 0, "num_predict": 12}


def case_chat(server: Server) -> None:
    client = ollama.Client(host=server.url)
    whole = client.chat(server.model, MESSAGES, options=OPTIONS)
    chunks = list(client.chat(server.model, MESSAGES, options=OPTIONS, stream=True))
    assert "".join(chunk.message.content for chunk in chunks) == whole.message.content and chunks[-1].done
    assert chunks[-1].eval_count == whole.eval_count


def case_generate(server: Server) -> None:
    client = ollama.Client(host=server.url)
    whole = client.generate(server.model, "Name a color.", options=OPTIONS)
    assert client.generate(server.model, "And another.", context=whole.context, options=OPTIONS).eval_count
    raw = client.generate(server.model, "The sky is", raw=True, options=OPTIONS)
    chunks = list(client.generate(server.model, "The sky is", raw=True, options=OPTIONS, stream=True))
    assert "".join(chunk.response for chunk in chunks) == raw.response


def case_forms_and_tools(server: Server) -> None:
    client = ollama.Client(host=server.url)
    found = client.chat(server.model, MESSAGES, format=SCHEMA, options={"temperature": 0, "num_predict": 100})
    assert json.loads(found.message.content)["a"] in range(10)
    assert client.chat(server.model, MESSAGES, tools=TOOLS, options={"temperature": 0, "num_predict": 60}).done


def case_models_and_vectors(server: Server) -> None:
    client = ollama.Client(host=server.url)
    assert f"{server.model}:latest" in [model.model for model in client.list().models]
    assert client.show(server.model).modelinfo["general.architecture"] == "llama" and client.ps().models
    try:
        assert len(client.embed(server.model, ["a", "b"]).embeddings) == 2
    except ollama.ResponseError as error:  # packed weights alone may have none
        assert error.status_code == 501
