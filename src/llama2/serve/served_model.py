"""One model that is served: what reads requests for it, in any process, and with it the engine that answers them."""

import time
from collections.abc import Iterable
from functools import partial
from typing import Any

from llama2.engine.engine import Engine, EngineRequest
from llama2.errors import InputError
from llama2.generation.config import GenerationConfig
from llama2.serve.constraint import Compiler
from llama2.serve.errors import Refusal
from llama2.serve.names import ALIASES, answers_to
from llama2.serve.policy import Policy
from llama2.serve.reader import Resident
from llama2.serve.request import Bounds, GenerationRequest
from llama2.serve.roles import alternates
from llama2.serve.tool_calls import dialect_of

_OF_THE_SERVER = ("engine", "compiler", "number", "_pickled")  # what other processes have no use for


class TextModel:
    """All of a model that reading a request takes: tokenizer, bounds, names and settings. No weights, so that it can be
    sent to another process. Parsers of every dialect take one; its attributes do not change."""

    def __init__(
        self,
        tokenizer: Any,
        bounds: Bounds,
        policy: Policy,
        names: tuple[str, ...],
        aliases: tuple[str, ...],
        settings: GenerationConfig,
        vocab_size: int,
        adapters: tuple[str, ...],
        own_adapter: str | None,
    ) -> None:
        """names: those it is shown under, aliases: further ones that it answers to. settings: the checkpoint's.
        vocab_size: columns of the logits. adapters: names that a request can choose; own_adapter: the one that the
        model was loaded with."""
        self.tokenizer, self.bounds, self.policy = tokenizer, bounds, policy
        self.names, self.aliases = names, aliases
        self.settings, self.vocab_size = settings, vocab_size
        self.adapters, self.own_adapter = adapters, own_adapter
        self.alternates = tokenizer.chat_template is not None and alternates(tokenizer)
        template = tokenizer.get_chat_template() if tokenizer.chat_template is not None else None
        self.tool_dialect = dialect_of(template)
        tokens = range(len(tokenizer))
        special = max((len(text.encode()) for text in tokenizer.special_contents), default=1)
        # Bytes of text that one token can stand for: composing characters makes three bytes of nine at most.
        self.longest = max(special, 3 * max((len(tokenizer.token_bytes(i)) for i in tokens), default=1))

    def adapter(self, name: str | None) -> str | None:
        """The adapter that a model name asks for; None for the model alone. Raises Refusal for another name."""
        if name is None or name in ALIASES or self.answers_to(name):
            return self.own_adapter
        if name.removesuffix(":latest") in self.adapters:
            return name.removesuffix(":latest")
        known = ", ".join((*self.names, *self.adapters))
        raise Refusal("model", f"the model {name[:100]!r} is not served here; there is {known}", "model")

    def answers_to(self, name: str) -> bool:
        """Whether a name is this model's; that of an adapter is not."""
        return name.removesuffix(":latest") not in self.adapters and answers_to(name, (*self.names, *self.aliases))

    def check_texts(self, texts: Iterable[str]) -> None:
        """Raises Refusal for prompts that are too long however they are tokenised, before that is done: of 2 MB that
        takes seconds. Where what is too long is cut, nothing is."""
        if self.policy.context_overflow != "refuse":
            return
        least = sum(map(len, texts)) // self.longest  # a character has a byte at least
        if least > self.bounds.max_input_tokens:
            raise Refusal(
                "context",
                f"the prompt has {least} tokens or more but at most {self.bounds.max_input_tokens} are taken "
                "(max_input_tokens); shorten it",
            )

    def check(self, request: GenerationRequest) -> None:
        """Raises Refusal for what the bounds forbid."""
        request.check(self.bounds, self.vocab_size)


class ServedModel(TextModel, Resident):
    """A model behind its engine; for writers and whatever else runs in the server's process."""

    def __init__(
        self,
        engine: Engine,
        bounds: Bounds,
        policy: Policy,
        names: tuple[str, ...] | None = None,
        aliases: tuple[str, ...] | None = None,
    ) -> None:
        """names, aliases: as `TextModel`; the policy's if None.

        Raises InputError for an engine without tokenizer.
        """
        if engine.tokenizer is None:
            raise InputError("a server needs the tokenizer: Engine(model, tokenizer)")
        own = engine.model
        TextModel.__init__(
            self,
            engine.tokenizer,
            bounds,
            policy,
            names or policy.names,
            policy.aliases if aliases is None else aliases,
            own.generation_config,
            own.config.vocab_size,
            tuple(engine.runner.weights.adapters) if engine.runner.weights is not None else (),
            getattr(own, "adapter", None),
        )
        Resident.__init__(self)
        self.engine = engine
        eos = own.generation_config.eos_token_ids
        self.compiler = Compiler(self.tokenizer, self.vocab_size, eos) if eos else None
        self.pickled()  # now: the tokenizer's library keeps the interpreter's lock for up to a tenth of a second

    def sent(self) -> TextModel:
        """Returns the part that other processes read requests with."""
        text_model = TextModel.__new__(TextModel)
        fields = {name: value for name, value in vars(self).items() if name not in _OF_THE_SERVER}
        text_model.__dict__.update(fields)
        return text_model

    def engine_requests(self, request: GenerationRequest, compiled: Any) -> list[EngineRequest]:
        """A checked request as the engine takes it; compiled: its constraint, where it has one. Raises InputError."""
        held = None
        if compiled is not None and self.compiler is not None:
            held = partial(self.compiler.processor, compiled)
        return request.engine_requests(self.engine, self.bounds, held)

    def alive(self) -> bool:
        """Whether the engine is moving, or has nothing to do, and has not lost a process of its model."""
        engine = self.engine
        lost = engine.runner.failed is not None
        return not lost and (not engine.running or time.monotonic() - engine.beat < 120)

    def close(self) -> None:
        """Ends the engine; what runs is cancelled."""
        if self.compiler is not None:
            self.compiler.close()
        self.engine.close(wait=False)
