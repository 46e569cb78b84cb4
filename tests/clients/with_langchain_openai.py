"""langchain-openai: chats, completions, tools, forms."""

from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI
from pydantic import BaseModel, Field
from run_cases import Server


class Digit(BaseModel):
    """A digit."""

    a: int = Field(ge=0, le=9)


def chat(server: Server, **more: object) -> ChatOpenAI:
    given = {"max_tokens": 12, "temperature": 0, **more}
    return ChatOpenAI(model=server.model, base_url=f"{server.url}/v1", api_key="none", max_retries=0, **given)


def case_chat(server: Server) -> None:
    text = chat(server).invoke("Name a color.").content
    assert "".join(str(chunk.content) for chunk in chat(server).stream("Name a color.")) == text
    assert len(chat(server).batch(["a", "b"])) == 2
    assert chat(server, use_responses_api=True).invoke("Name a color.").text == text


def case_completions(server: Server) -> None:
    model = OpenAI(model=server.model, base_url=f"{server.url}/v1", api_key="none", max_tokens=8, temperature=0)
    text = model.invoke("The sky is")
    assert "".join(model.stream("The sky is")) == text


def case_tools_and_forms(server: Server) -> None:
    @tool
    def pick(a: int) -> str:
        """Picks a digit."""
        return str(a)

    made = chat(server, max_tokens=200).bind_tools([pick], tool_choice="required").invoke("Pick one.")
    assert made.tool_calls[0]["name"] == "pick" and isinstance(made.tool_calls[0]["args"]["a"], int)
    for method in ("json_schema", "function_calling"):
        found = chat(server, max_tokens=200).with_structured_output(Digit, method=method).invoke("Pick one.")
        assert found.a in range(10)
