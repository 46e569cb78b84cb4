"""lm-eval: log-likelihoods and generation over its two API models, with the server's own tokenizer."""

from lm_eval.api.instance import Instance
from lm_eval.models.openai_completions import LocalChatCompletion, LocalCompletionsAPI
from run_cases import Server


def remote(server: Server) -> LocalCompletionsAPI:
    return LocalCompletionsAPI(
        base_url=f"{server.url}/v1/completions", model=server.model, tokenizer_backend="remote", batch_size=2
    )


def ask(kind: str, *arguments: tuple[object, ...]) -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=given, idx=i) for i, given in enumerate(arguments)]


def case_loglikelihood(server: Server) -> None:
    model = remote(server)
    pairs = (("The sky is", " blue"), ("The sky is", " blue and wide"), ("Two and two are", " four"))
    found = model.loglikelihood(ask("loglikelihood", *pairs))
    assert len(found) == 3 and all(value < 0 for value, _ in found) and found[1][0] < found[0][0]
    rolling = model.loglikelihood_rolling(ask("loglikelihood_rolling", ("The sky is blue.",)))
    assert rolling[0] < 0


def case_the_backend_is_the_servers(server: Server) -> None:
    model = remote(server)
    assert model.tokenizer_backend == "remote"
    ids = model.tok_encode("The sky")
    assert len(ids) and model.decode_batch([ids])[0].strip() == "The sky"


def case_generate(server: Server) -> None:
    given = {"until": ["."], "max_gen_toks": 8, "temperature": 0}
    (text,) = remote(server).generate_until(ask("generate_until", ("The sky is", given)))
    assert isinstance(text, str) and "." not in text


def case_chat(server: Server) -> None:
    model = LocalChatCompletion(base_url=f"{server.url}/v1/chat/completions", model=server.model)
    given = {"until": ["\n\n"], "max_gen_toks": 8, "temperature": 0}
    history = model.apply_chat_template([{"role": "user", "content": "Name a color."}])
    (text,) = model.generate_until(ask("generate_until", (history, given)))
    assert isinstance(text, str)
