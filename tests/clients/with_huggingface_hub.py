"""huggingface_hub: text generation and chats."""

from huggingface_hub import InferenceClient
from run_cases import Server
from shared import MESSAGES


def case_text_generation(server: Server) -> None:
    client = InferenceClient(server.url)
    text = client.text_generation("The sky is", max_new_tokens=8, return_full_text=False)
    assert "".join(client.text_generation("The sky is", max_new_tokens=8, return_full_text=False, stream=True)) == text
    assert client.text_generation("The sky is", max_new_tokens=8, details=True).details.generated_tokens == 8


def case_chat(server: Server) -> None:
    client = InferenceClient(server.url)
    whole = client.chat_completion(MESSAGES, max_tokens=8, temperature=0)
    chunks = client.chat_completion(MESSAGES, max_tokens=8, temperature=0, stream=True)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole.choices[0].message.content
