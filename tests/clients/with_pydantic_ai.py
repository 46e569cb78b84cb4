"""pydantic-ai: text, streams, and an answer of a type, over OpenAI's and Anthropic's APIs."""

from pydantic import BaseModel, Field
from pydantic_ai import Agent
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider
from run_cases import Server


class Digit(BaseModel):
    """A digit."""

    a: int = Field(ge=0, le=9)


def model(server: Server) -> OpenAIChatModel:
    return OpenAIChatModel(server.model, provider=OpenAIProvider(base_url=f"{server.url}/v1", api_key="none"))


def case_text(server: Server) -> None:
    agent = Agent(model(server), model_settings={"max_tokens": 12, "temperature": 0})
    assert isinstance(agent.run_sync("Name a color.").output, str)


def case_a_type(server: Server) -> None:
    agent = Agent(model(server), output_type=Digit, model_settings={"max_tokens": 200, "temperature": 0})
    assert agent.run_sync("Pick a digit.").output.a in range(10)
