"""llama-index: its OpenAI-like and its Ollama models."""

from llama_index.core.llms import ChatMessage
from llama_index.llms.ollama import Ollama
from llama_index.llms.openai_like import OpenAILike
from run_cases import Server

MESSAGES = [ChatMessage(role="user", content="Name a color.")]


def case_openai_like(server: Server) -> None:
    model = OpenAILike(
        model=server.model, api_base=f"{server.url}/v1", api_key="none", is_chat_model=True, max_tokens=8, temperature=0
    )
    text = model.chat(MESSAGES).message.content
    assert "".join(chunk.delta or "" for chunk in model.stream_chat(MESSAGES)) == text
    plain = OpenAILike(model=server.model, api_base=f"{server.url}/v1", api_key="none", max_tokens=8, temperature=0)
    assert (
        "".join(chunk.delta or "" for chunk in plain.stream_complete("The sky is")) == plain.complete("The sky is").text
    )


def case_ollama(server: Server) -> None:
    more = {"num_predict": 8}
    model = Ollama(model=server.model, base_url=server.url, temperature=0, additional_kwargs=more, context_window=512)
    text = model.chat(MESSAGES).message.content
    assert "".join(chunk.delta or "" for chunk in model.stream_chat(MESSAGES)) == text
