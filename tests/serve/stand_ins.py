"""What stands for a served model where no engine is needed."""

from types import SimpleNamespace
from typing import Any

from llama2.serve.policy import Policy
from llama2.serve.roles import alternates


def like(tokenizer: Any, **policy: Any) -> Any:
    """A served model as far as rendering a conversation goes."""
    return SimpleNamespace(tokenizer=tokenizer, policy=Policy(**policy), alternates=alternates(tokenizer))
