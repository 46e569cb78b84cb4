"""SageMaker's dialect: /invocations takes a TGI body, a chat or a completion, told apart by their fields."""

from starlette.responses import Response

from llama2.serve import openai_chat, openai_completions, tgi
from llama2.serve.dialect import Dialect, Handler, Route, get, post
from llama2.serve.errors import Refusal
from llama2.serve.service import RouteCall
from llama2.serve.state import ready

_DIALECTS: dict[str, tuple[Dialect, Handler]] = {  # by the field that tells a body apart; the first that it has
    "messages": (openai_chat.DIALECT, openai_chat.chat),
    "prompt": (openai_completions.DIALECT, openai_completions.completions),
    "inputs": (tgi.DIALECT, tgi.compat),
}


async def invocations(call: RouteCall) -> Response:
    """/invocations."""
    names = await call.peek()
    for name, (dialect, handler) in _DIALECTS.items():
        if name in names:
            call.dialect = dialect
            return await handler(call)
    raise Refusal("validation", "the body has neither inputs (text generation), messages (chat) nor prompt; send one")


DIALECT = tgi.TGI(
    "sagemaker",
    post("/invocations", invocations, tgi.GenerateBody, "any of the three bodies, for SageMaker", counted=True),
    Route("POST", "/ping", ready, "the same, as vLLM has it", access="open", any_type=True),
    get("/ping", ready, "whether requests should be sent here, for SageMaker", "open"),
)
