"""What the cases of several clients have in common."""

from typing import Any

QUESTION = "Name a color."
MESSAGES: list[Any] = [{"role": "system", "content": "Be short."}, {"role": "user", "content": QUESTION}]
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["a"],
    "additionalProperties": False,
}
FUNCTION: dict[str, Any] = {"name": "pick", "description": "Picks a digit.", "parameters": SCHEMA}
TOOLS: list[Any] = [{"type": "function", "function": FUNCTION}]
