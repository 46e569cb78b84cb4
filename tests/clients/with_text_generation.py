"""text-generation: TGI's own client."""

import text_generation
from run_cases import Server


def case_generate(server: Server) -> None:
    client = text_generation.Client(server.url)
    text = client.generate("The sky is", max_new_tokens=8).generated_text
    events = list(client.generate_stream("The sky is", max_new_tokens=8))
    assert "".join(e.token.text for e in events if not e.token.special) == text == events[-1].generated_text


def case_chat(server: Server) -> None:
    client = text_generation.Client(server.url)
    messages = [text_generation.types.Message(role="user", content="Name a color.")]
    text = client.chat(messages, max_tokens=8, seed=1).choices[0].message.content
    chunks = list(client.chat(messages, max_tokens=8, seed=1, stream=True))
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == text
