"""litellm: the same server under each of its providers."""

import litellm
from run_cases import Server
from shared import MESSAGES

litellm.suppress_debug_info = True


def both(server: Server, **given: object) -> None:
    common = {"messages": MESSAGES, "max_tokens": 8, "temperature": 0, "api_key": "none", **given}
    text = litellm.completion(**common).choices[0].message.content
    chunks = litellm.completion(**common, stream=True)
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == text


def case_openai(server: Server) -> None:
    both(server, model=f"openai/{server.model}", api_base=f"{server.url}/v1")


def case_hosted_vllm(server: Server) -> None:
    both(server, model=f"hosted_vllm/{server.model}", api_base=f"{server.url}/v1")


def case_anthropic(server: Server) -> None:
    both(server, model=f"anthropic/{server.model}", api_base=server.url)


def case_ollama_chat(server: Server) -> None:
    both(server, model=f"ollama_chat/{server.model}", api_base=server.url)


def case_text_completion(server: Server) -> None:
    given = {"model": f"text-completion-openai/{server.model}", "api_base": f"{server.url}/v1", "api_key": "none"}
    assert litellm.text_completion(prompt="The sky is", max_tokens=8, **given).choices[0].text
