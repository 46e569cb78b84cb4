"""instructor: objects by tools, by JSON and by schema."""

import instructor
import openai
from pydantic import BaseModel, Field
from run_cases import Server


class Digit(BaseModel):
    """A digit."""

    a: int = Field(ge=0, le=9)


def case_modes(server: Server) -> None:
    for mode in (instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA):
        client = instructor.from_openai(openai.OpenAI(base_url=f"{server.url}/v1", api_key="none"), mode=mode)
        messages = [{"role": "user", "content": "Pick a digit."}]
        found = client.chat.completions.create(
            model=server.model, messages=messages, response_model=Digit, max_tokens=200, temperature=0, max_retries=0
        )
        assert found.a in range(10)
