"""SageMaker's dialect: /invocations takes a TGI body, a chat or a completion, told apart by their fields."""

import json
from typing import Any

from starlette.responses import Response

from llama2.serve import openai_chat, openai_completions, tgi
from llama2.serve.dialect import get, post
from llama2.serve.errors import Refusal
from llama2.serve.service import RouteCall
from llama2.serve.state import ready
from llama2.serve.validation import check_depth, check_values


def kind_of_body(data: bytes) -> str:
    """Which body this is: "messages", "prompt" or "inputs". Raises Refusal."""
    check_depth(data)
    check_values(data)
    try:
        content: Any = json.loads(data)
    except (ValueError, RecursionError):
        raise Refusal("malformed", "the body is not JSON") from None
    for name in ("messages", "prompt", "inputs"):
        if isinstance(content, dict) and name in content:
            return name
    raise Refusal("validation", "the body has neither inputs (text generation), messages (chat) nor prompt; send one")


async def invocations(call: RouteCall) -> Response:
    """/invocations."""
    name = await call.look(kind_of_body)
    call.dialect = tgi.DIALECT if name == "inputs" else openai_chat.DIALECT
    if name == "messages":
        return await openai_chat.chat(call)
    if name == "prompt":
        return await openai_completions.completions(call)
    return await tgi.compat(call)


DIALECT = tgi.TGI(
    "sagemaker",
    post("/invocations", invocations, tgi.GenerateBody, "any of the three bodies, for SageMaker", counted=True),
    get("/ping", ready, "whether requests should be sent here, for SageMaker", "open"),
)
