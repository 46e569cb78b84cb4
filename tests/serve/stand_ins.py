"""What stands for a served model where no engine is needed."""

from types import SimpleNamespace
from typing import Any

from llama2.serve.policy import Policy
from llama2.serve.roles import alternates
from llama2.serve.tool_calls import dialect_of


def like(tokenizer: Any, **policy: Any) -> Any:
    """A served model as far as rendering a conversation goes."""
    template = None if tokenizer.chat_template is None else tokenizer.get_chat_template()
    return SimpleNamespace(
        tokenizer=tokenizer,
        policy=Policy(**policy),
        alternates=alternates(tokenizer),
        tool_dialect=dialect_of(template),
    )
