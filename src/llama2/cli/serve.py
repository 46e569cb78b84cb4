"""`llama2 serve`: many users at once over HTTP."""

import gc
import math
import os
import resource
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args, get_type_hints

from llama2.cli import offers, parallel, terminal
from llama2.cli.args import option, revision_option
from llama2.cli.loading import RunOptions, adapter_folder, load, model_path
from llama2.cli.registry import registered
from llama2.errors import InputError, Llama2Error, MissingDependencyError

if TYPE_CHECKING:
    from llama2.engine.engine import Engine
    from llama2.serve.connection import Connections
    from llama2.serve.lifecycle import Life, Server
    from llama2.serve.limits import Wanted
    from llama2.serve.request import Bounds
    from llama2.serve.service import Service

OTHER_FILES = 128  # beside the connections: the model's files, the engine's, the log's
Loader = Callable[[Any], tuple[Any, Any]]
SAGEMAKER_MODEL = Path("/opt/ml/model")


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """lengths and memory; what is not given follows from the model and the free memory."""

    max_input_tokens: int | None = option(None, "tokens of a prompt at most (default: max-total-tokens less 1)")
    max_total_tokens: int | None = option(None, "tokens of prompt and answer at most (default: the model's context)")
    max_batch_total_tokens: int | None = option(
        None, "tokens that the cache holds for all requests together (default: what 40 % of the free memory holds)"
    )
    max_batch_prefill_tokens: int | None = option(None, "tokens of one step at most (default: 512)")
    max_batch_size: int | None = option(None, "requests in one step at most (default: 64)")
    draft: str | None = option(
        None,
        "a smaller model with the same vocabulary that guesses tokens ahead; answers stay the same",
        metavar="MODEL",
    )
    speculate: int | None = option(
        None, "tokens guessed in a step at most: by --draft (default: 4), else from the text so far (default: 0)"
    )
    no_prefix_cache: bool = option(False, "forget a prompt once it is answered, so that none starts faster for it")

    def wanted(self) -> "Wanted":
        """As the server takes it."""
        from llama2.serve.limits import Wanted

        names = {f.name for f in fields(Wanted)}
        return Wanted(**{n: v for n in names if (v := getattr(self, n, None)) is not None})


@dataclass(frozen=True, kw_only=True)
class ServeOptions(EngineOptions, RunOptions):
    """Serve a model over HTTP: the APIs of OpenAI (/v1/chat/completions, /v1/responses, ...), Anthropic (/v1/messages),
    Ollama (/api/chat, ...), llama.cpp's server (/completion, ...), vLLM, text-generation-inference (/generate, ...) and
    SageMaker (/invocations), with a page at /ui.

    Every option can be given in the environment as LLAMA2_NAME (LLAMA2_MAX_TOTAL_TOKENS), and under the names that TGI
    and SageMaker use (HF_MODEL_ID, MAX_TOTAL_TOKENS, PORT, API_KEY, ...); an option on the command line wins."""

    # Names that TGI's launcher and SageMaker's recipes use.
    VARIABLES: ClassVar[dict[str, tuple[str, ...]]] = {
        "model": ("HF_MODEL_ID", "MODEL_ID"),
        "revision": ("HF_MODEL_REVISION", "REVISION"),
        "max_input_tokens": ("MAX_INPUT_TOKENS", "MAX_INPUT_LENGTH"),
        "port": ("SAGEMAKER_BIND_TO_PORT", "PORT"),
        "tensor_parallel": ("SM_NUM_GPUS", "NUM_SHARD"),
        "shutdown_timeout": ("GRACEFUL_TERMINATION_TIMEOUT",),
    } | {
        name: (name.upper(),)
        for name in (
            "max_total_tokens", "max_batch_total_tokens", "max_batch_prefill_tokens", "max_batch_size",
            "max_concurrent_requests", "max_best_of", "max_stop_sequences", "max_top_n_tokens",
            "max_client_batch_size", "payload_limit", "validation_workers", "speculate", "api_key", "cors_allow_origin",
            "lora_adapters",
        )
    }  # fmt: skip

    paths: tuple[str, ...] = option(
        (), "the same as -m MODEL; of several each is loaded at its first request", metavar="MODEL", positional=True,
        replaces="model",
    )  # fmt: skip
    models: str | None = option(
        None, "a folder of models: each is offered under its name, and loaded at its first request", metavar="FOLDER"
    )
    max_models: int | None = option(
        None, "of several models those that are loaded at once at most; the one that has been idle longest goes "
        "(default: 4)",
    )  # fmt: skip
    keep_alive: str | None = option(
        None, "how long an idle model stays loaded, as seconds, 5m or 1h30m; -1 for ever, 0 not at all; a request's "
        "keep_alive counts before it (default: of several models 5m, of one for ever)", metavar="DURATION",
    )  # fmt: skip
    host: str | None = option(
        None, "the address to listen on (default: 127.0.0.1, on SageMaker 0.0.0.0)", metavar="HOST"
    )
    port: int | None = option(None, "the port (default: 8000, on SageMaker 8080); 0 takes a free one")
    served_model_name: tuple[str, ...] = option((), "the model's name for clients; may be given several times")
    revision: str | None = revision_option("MODEL", besides=", told by /info")
    lora_adapters: tuple[str, ...] = option(
        (), "an adapter that requests can choose by name; may be given several times", metavar="NAME=ADAPTER"
    )
    tensor_parallel: int | None = option(
        None, "processes, each with its own part of every layer and its own GPU where there are some (default: 1)"
    )
    chat_template: str | None = option(
        None, "a file with a Jinja template, or llama2 (default: the one the model ships)", metavar="FILE"
    )
    api_key: tuple[str, ...] = option((), "a key that requests need; may be given several times", metavar="KEY")
    api_key_file: str | None = option(
        None, "a file of keys, one per line as KEY or NAME: KEY, read again when it changes", metavar="FILE"
    )
    metrics_key: tuple[str, ...] = option(
        (), "a key that reads /metrics and nothing else, in place of the others; may be given several times",
        metavar="KEY",
    )  # fmt: skip
    allowed_hosts: tuple[str, ...] = option(
        (), "a name that this server answers to, * for any; may be given several times (default: on a loopback address "
        "that address and localhost, else any)", metavar="HOST",
    )  # fmt: skip
    ssl_certfile: str | None = option(None, "the certificate, for HTTPS", metavar="FILE")
    ssl_keyfile: str | None = option(None, "its private key", metavar="FILE")
    cors_allow_origin: tuple[str, ...] = option(
        (), "a web page that may call this server, * for any; may be given several times", metavar="ORIGIN"
    )
    public_metrics: bool = option(False, "let /metrics be read without a key")
    max_connections: int | None = option(None, "connections open at most; more get 503 (default: 512)")
    header_timeout: float | None = option(
        None, "seconds in which the headers of a request must arrive; a silent connection is closed (default: 10)"
    )
    body_timeout: float | None = option(None, "seconds in which a body must arrive; 0 for no bound (default: 30)")
    max_unparsed_bytes: int | None = option(
        None, "bytes of bodies that are being received, of all requests (default: 64000000)"
    )
    max_unread_bytes: int | None = option(
        None, "bytes of large answers that their clients have not read yet (default: 256000000)"
    )
    max_concurrent_requests: int | None = option(None, "requests inside at most; more get 429 (default: 128)")
    max_waiting: int | None = option(None, "answers in the engine's queue at most; more get 429 (default: 1024)")
    max_requests_per_key: int | None = option(
        None, "requests of one key inside at most; more get 429 (default: no bound)"
    )
    max_waiting_per_key: int | None = option(None, "answers of one key in the queue at most (default: no bound)")
    max_running_per_key: int | None = option(None, "answers of one key in one step at most (default: no bound)")
    max_cache_per_key: int | None = option(None, "tokens of one key in the cache at most (default: no bound)")
    step_stretch: float | None = option(
        None,
        "time of a step at most where several keys have answers, in that of equal shares; 0 for no bound (default: 2)",
    )
    tokens_per_minute: int | None = option(
        None, "tokens of prompts and answers of one key in a minute; more get 429 (default: no bound)"
    )
    max_best_of: int | None = option(None, "answers of one prompt at most (default: 8)")
    max_stop_sequences: int | None = option(None, "stop strings of a request at most (default: 16)")
    max_top_n_tokens: int | None = option(None, "likeliest tokens told at most (default: 20)")
    max_client_batch_size: int | None = option(None, "prompts of one request at most (default: 32)")
    payload_limit: int | None = option(None, "bytes of a body at most (default: 2000000)")
    validation_workers: int | None = option(None, "threads that check and tokenise requests (default: 2)")
    validation_timeout: float | None = option(
        None, "seconds that checking, rendering and tokenising a request may take; 0 for no bound (default: 10)"
    )
    request_timeout: float | None = option(None, "seconds after which an answer is given up; 0 for never (default: 0)")
    stall_timeout: float | None = option(
        None, "seconds that a client may stop reading before it is dropped (default: 60)"
    )
    drain_delay: float | None = option(None, "seconds that SIGTERM still lets requests in (default: 0)")
    shutdown_timeout: float | None = option(None, "seconds that running answers have after SIGTERM (default: 25)")
    unknown_fields: Literal["warn", "refuse", "ignore"] | None = option(
        None, "what to do with fields of a body that are not known; warn: ignore them and say so (default: warn)"
    )
    strict_roles: bool = option(
        False, "refuse conversations that the chat template does not take as they are, which are merged else"
    )
    context_overflow: Literal["refuse", "truncate", "shift"] | None = option(
        None, "prompts that are too long: refused, or without their oldest turns or tokens (default: refuse); shift: "
        "and full answers go on without the older half",
    )  # fmt: skip
    literal_prompts: bool = option(False, "in raw prompts, text such as </s> is text and no control token")
    log_level: Literal["debug", "info", "warning", "error"] | None = option(None, "how much is logged (default: info)")


# Port 0 is a free one, SageMaker says SM_NUM_GPUS=0 where there is no GPU, and the last two may be forbidden.
_MAY_BE_ZERO = ("port", "tensor_parallel", "max_stop_sequences", "max_top_n_tokens")


def check_numbers(options: ServeOptions) -> None:
    """Raises InputError for a number of the server's own options that bounds nothing, before anything is loaded."""
    for name, hint in get_type_hints(ServeOptions).items():
        value = getattr(options, name)
        if name not in ServeOptions.__annotations__ or value is None or not {int, float} & set(get_args(hint)):
            continue
        flag = "--" + name.replace("_", "-")
        least = 1 if int in get_args(hint) and name not in _MAY_BE_ZERO else 0
        most = 65535 if name == "port" else math.inf
        if not least <= value <= most or math.isinf(value):
            bound = f"between 0 and {most}" if name == "port" else f"at least {least}, and finite"
            raise InputError(f"{flag} is {value}; it must be {bound}")
    if options.step_stretch is not None and 0 < options.step_stretch < 1:
        raise InputError(f"--step-stretch is {options.step_stretch}; it must be 0 for no bound, or at least 1")


def run(options: ServeOptions) -> int:
    """Runs the command."""
    environment = os.environ
    check_numbers(options)
    container = SAGEMAKER_MODEL.is_dir() or any(name.startswith("SAGEMAKER_") for name in environment)
    several_models = offers.several(options)
    if several_models:
        offers.check(options)
    options = _with_model(options, container)
    _heed(environment)
    several = parallel.ranks(options.tensor_parallel, environment)
    if several is not None:
        parallel.check(options)
        if several.rank:
            return parallel.follow(options, several)
    need_server()
    from llama2.serve import logs
    from llama2.serve.app import make_app
    from llama2.serve.lifecycle import Life
    from llama2.serve.proof import STACK

    sys.setswitchinterval(0.001)  # a step of the engine takes the interpreter's lock often: see docs/LOG.md
    threading.stack_size(4 * STACK)  # of every thread from here on: see serve/proof.py
    life = Life(options.drain_delay or 0.0, 25.0 if options.shutdown_timeout is None else options.shutdown_timeout)
    host = options.host or ("0.0.0.0" if container else "127.0.0.1")
    service = _service(options, life, host)
    if host not in ("127.0.0.1", "localhost", "::1") and not service.keys.wanted and not container:
        terminal.notice(f"llama2: anyone who can reach {host} can use this model; --api-key asks for a key")
    server = _server(options, host, 8080 if container else 8000, service, make_app(service))
    listener = logs.start(options.log_level or "info")

    def failed(error: Exception) -> None:
        life.failure, server.should_exit = error, True

    others = None
    if several is not None and "WORLD_SIZE" not in environment:
        others = parallel.Others(several, failed)
        several = replace(several, store=others.store)
    loader: Loader = load
    if several is not None:
        loader = partial(parallel.load_part, ranks=several)
    if several_models:
        service.offer(offers.make_pool(options, service.policy, partial(_made, service)))
    else:
        threading.Thread(target=_open, args=(options, service, failed, loader), name="llama2-load", daemon=True).start()
    try:
        with ExitStack() as listed:
            server.listening = lambda address: listed.enter_context(registered(address, service.names))
            server.run()
    finally:
        service.close()
        if others is not None:
            others.close()
        listener.stop()
    if life.failure is not None:
        raise life.failure
    return 0


def _with_model(options: ServeOptions, container: bool) -> ServeOptions:
    given = [*options.paths, *([options.model] if options.model is not None else [])]
    if options.paths and options.model not in (None, options.paths[0]):
        raise InputError(f"{options.paths[0]} and -m {options.model} were given; give the models in one of both ways")
    if not given and container and SAGEMAKER_MODEL.is_dir() and any(SAGEMAKER_MODEL.iterdir()):
        given = [str(SAGEMAKER_MODEL)]
    return replace(options, model=given[0] if given else None)


def _heed(environment: Mapping[str, str]) -> None:
    """Says what TGI's variables cannot do here."""
    if kind := environment.get("HF_MODEL_QUANTIZE") or environment.get("QUANTIZE"):
        terminal.notice(
            f"llama2: QUANTIZE={kind}: a model is served as its checkpoint is stored; quantise that beforehand"
        )


def need_server() -> None:
    try:
        import fastapi  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError(f"serving needs {error.name}; run `pip install 'llama2[serve]'`") from error


def _service(options: ServeOptions, life: "Life", host: str) -> "Service":
    from llama2.serve.auth import Keys
    from llama2.serve.names import names_of
    from llama2.serve.origin import allowed_hosts
    from llama2.serve.policy import Policy
    from llama2.serve.service import Service

    given: dict[str, Any] = {
        "revision": options.revision,
        "unknown_fields": options.unknown_fields,
        "strict_roles": options.strict_roles,
        "context_overflow": options.context_overflow,
        "parse_special": not options.literal_prompts,
        "payload_limit": options.payload_limit,
        "request_timeout": options.request_timeout,
        "stall_timeout": options.stall_timeout,
        "cors_origins": options.cors_allow_origin,
        "public_metrics": options.public_metrics,
        "allowed_hosts": allowed_hosts(options.allowed_hosts, host),
        "workers": options.validation_workers,
        "validation_timeout": options.validation_timeout,
        "body_timeout": options.body_timeout,
        "max_unparsed_bytes": options.max_unparsed_bytes,
        "max_unread_bytes": options.max_unread_bytes,
        "max_concurrent_requests": options.max_concurrent_requests,
        "max_requests_per_key": options.max_requests_per_key,
        "tokens_per_minute": options.tokens_per_minute,
    }
    names, aliases = names_of(options.model or model_path(None), options.served_model_name)
    policy = Policy(names=names, aliases=aliases, **{name: value for name, value in given.items() if value is not None})
    keys = Keys(options.api_key, Path(options.api_key_file) if options.api_key_file else None)
    return Service(policy, keys, life, Keys(options.metrics_key))


def _server(options: ServeOptions, host: str, port: int, service: "Service", app: Any) -> "Server":
    import uvicorn

    from llama2.serve.connection import guarded
    from llama2.serve.lifecycle import Server

    if (options.ssl_certfile is None) != (options.ssl_keyfile is None):
        raise InputError("HTTPS needs both --ssl-certfile and --ssl-keyfile; one of them is missing")
    config = uvicorn.Config(
        app,
        host=host,
        port=port if options.port is None else options.port,
        log_config=None,
        access_log=False,
        server_header=False,
        ws="none",
        timeout_keep_alive=75,
        timeout_graceful_shutdown=2,
        backlog=128,
        http=guarded(_connections(options)),
        ssl_certfile=options.ssl_certfile,
        ssl_keyfile=options.ssl_keyfile,
    )
    return Server(config, service.life, service.cut)


def _connections(options: ServeOptions) -> "Connections":
    """The bounds on connections, of which there are fewer where the process may open fewer files."""
    from llama2.serve.connection import Connections

    files, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = options.max_connections or Connections.most
    if 0 <= files < wanted + OTHER_FILES:
        most = wanted + OTHER_FILES if hard < 0 else min(wanted + OTHER_FILES, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
        if most < wanted + OTHER_FILES:
            terminal.notice(f"llama2: at most {most - OTHER_FILES} connections, because {hard} files may be open")
            wanted = max(most - OTHER_FILES, 1)
    given: dict[str, Any] = {"header_timeout": options.header_timeout, "stall_timeout": options.stall_timeout}
    return Connections(most=wanted, **{name: value for name, value in given.items() if value is not None})


def _open(options: ServeOptions, service: "Service", failed: Callable[[Exception], None], loader: Loader) -> None:
    """Loads the model beside the server, which answers 503 meanwhile; a failure ends the server."""
    try:
        open_model(options, options.chat_template, options.lora_adapters, service, options.max_waiting, loader=loader)
    except (Llama2Error, OSError, RuntimeError) as error:
        failed(error)


def open_model(
    options: Any,
    chat_template: str | None,
    adapters: tuple[str, ...],
    service: "Service",
    waiting: int | None = None,
    tell: Callable[[str], None] = terminal.notice,
    loader: Loader = load,
) -> None:
    """Loads the model, makes the engine within the memory, tells the table of limits and opens the service.

    options: RunOptions and EngineOptions. Raises as `load`."""
    made = make_engine(options, chat_template, adapters, waiting or 1024, tell, loader)
    gc.collect()
    gc.freeze()  # what is loaded stays: looking through it again held up every stream for 0.3 s
    service.open(*made)


def _made(service: "Service", options: ServeOptions, cache_bytes: int) -> tuple["Engine", "Bounds"]:
    """One of several models: its engine and bounds."""

    def tell(text: str) -> None:
        from llama2.serve.logs import logger

        logger.info(text)

    made = make_engine(options, options.chat_template, (), options.max_waiting or 1024, tell, load, cache_bytes)
    gc.freeze()  # as in `open_model`, without a collection: others are served; what has no cycles is freed all the same
    return made


def make_engine(
    options: Any,
    chat_template: str | None,
    adapters: tuple[str, ...],
    waiting: int,
    tell: Callable[[str], None],
    loader: Loader,
    cache_bytes: int | None = None,
) -> tuple["Engine", "Bounds"]:
    """Loads the model and makes its engine within the memory, and the bounds that follow.

    cache_bytes: of its cache at most; None for a share of the free memory. Raises as `load`.
    """
    from llama2.engine.engine import Engine
    from llama2.engine.fairness import STRETCH
    from llama2.serve import limits

    model, tokenizer = loader(options)
    if chat_template == "llama2":
        from llama2.tokenizer import LLAMA2_CHAT_TEMPLATE

        tokenizer.chat_template = LLAMA2_CHAT_TEMPLATE
    elif chat_template is not None:
        tokenizer.chat_template = Path(chat_template).read_text(encoding="utf-8")
    wanted = options.wanted()
    alone = replace(options, model=options.draft, adapter=None, revision=None)
    draft = None if options.draft is None else load(alone)[0]
    each = limits.bytes_per_token(model, options.runner, options.cache_dtype, draft)
    tokens, source = limits.cache_tokens(model, wanted, each, cache_bytes)
    engine = Engine(
        model,
        tokenizer,
        cache_tokens=tokens,
        budget=wanted.max_batch_prefill_tokens,
        width=wanted.max_batch_size,
        waiting=waiting,
        prefix_cache=not options.no_prefix_cache,
        runner=options.runner,
        kv_cache=options.cache_dtype,
        precision=options.precision,
        draft=draft,
        guesses=options.speculate,
        each_waiting=getattr(options, "max_waiting_per_key", None),
        each_running=getattr(options, "max_running_per_key", None),
        each_tokens=getattr(options, "max_cache_per_key", None),
        stretch=STRETCH if getattr(options, "step_stretch", None) is None else options.step_stretch,
    )
    for adapter in adapters:
        _add_adapter(engine, adapter)
    bounds = limits.bounds(engine, wanted)
    if tokenizer.chat_template is None:
        _without_template(tokenizer, model_path(options.model), tell)
    tell(f"llama2: what fits\n{limits.table(engine, bounds, source)}")
    return engine, bounds


def _without_template(tokenizer: Any, name: str, tell: Callable[[str], None]) -> None:
    """Gives a GGUF file of Llama 2's vocabulary Llama 2's chat template, and says so, or that there are no chats."""
    from llama2.tokenizer import LLAMA2_CHAT_TEMPLATE

    marker = [b" [", b"INST", b"]", b" q", b" [", b"/", b"INST", b"]"]
    ids = tokenizer("[INST] q [/INST]", add_special_tokens=False)["input_ids"]
    own = len(tokenizer) >= 32_000 and [tokenizer.token_bytes(i) for i in ids] == marker
    if own and (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2) and name.endswith(".gguf"):
        tokenizer.chat_template = LLAMA2_CHAT_TEMPLATE
        tell("llama2: the file has no chat template; its vocabulary is Llama 2's, so chats have Llama 2's")
    else:
        tell(
            "llama2: the model has no chat template, so chats are refused; --chat-template FILE gives one, or "
            "--chat-template llama2 that of Llama 2"
        )


def _add_adapter(engine: Any, adapter: str) -> None:
    from llama2.checkpoint.peft_adapter import engine_pairs

    name, sign, folder = adapter.partition("=")
    weights = engine.runner.weights
    if not (sign and name.strip() and folder.strip()):
        raise InputError(
            f"--lora-adapters is {adapter!r}; write it as NAME=ADAPTER, a folder that peft wrote or a GGUF file"
        )
    if weights is None:
        raise InputError(
            "adapters for each request need the native engine, and torch runs this model; merge one instead"
        )
    place = adapter_folder(folder.strip())
    weights.add_adapter(name.strip(), engine_pairs(place, engine.model.config))
