"""One model for people who want answers: text in, text out, on the native engine. No torch for what that engine holds.

llm = Llama("model.gguf")                      a path, or a hub id
llm.generate("The sky is", max_new_tokens=20).text
for piece in llm.stream("Once upon a time"): print(piece, end="")
llm.chat("Why is the sky blue?").text          or a list of messages
llm.embed("a text")                            its vector
await llm.agenerate("...")                     many at once share the engine's steps
"""

import json
import warnings
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np

from llama2 import checkpoint, cpu
from llama2.auto import AutoModelForCausalLM, AutoTokenizer
from llama2.checkpoint.native_files import NativeFiles
from llama2.checkpoint.source import locate_all
from llama2.engine.engine import Engine
from llama2.engine.request import Completion, EngineRequest
from llama2.engine.stream import Stream, complete
from llama2.errors import InputError
from llama2.evaluate.embedding import Embedder
from llama2.generation.call_settings import choosing
from llama2.lazy import door
from llama2.memory import available_bytes
from llama2.serve.constraint import Compiler, Constraint, json_schema

Prompt = str | Sequence[int]
Messages = str | Sequence[Mapping[str, Any]]
_FORMS: dict[str, Any] = {"schema": "json", "regex": "regex", "grammar": "lark"}
CACHE_SHARE = 0.4  # of the free memory, for keys and values


_gguf_tokenizer = door("tokenizer", "from_gguf", "A tokenizer from GGUF metadata.")


def _tokenizer(path: Path) -> Any:
    """The tokenizer of a folder, or of the one in which a file of weights is."""
    return AutoTokenizer.from_pretrained(path.parent if path.is_file() else path)


def constraint_of(kind: Any, value: Any) -> Constraint:
    """A form of answers: "json" with a schema (a dict, or its text), "regex", or "lark" with a grammar.

    Objects of a schema are closed unless `additionalProperties` says otherwise. Raises InputError.
    """
    if kind != "json":
        return Constraint(kind, str(value))
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise InputError(f"the JSON schema is no JSON: {error}") from error
    if not isinstance(value, Mapping):
        raise InputError(f"the JSON schema is {value!r}; it must be an object")
    return json_schema(value)


class Llama:
    """A model with its tokenizer and the engine that runs them; a context that closes it.

    Settings of a call are those of `GenerationConfig` (max_new_tokens, temperature, top_p, top_k, min_p,
    repetition_penalty, ...); temperature 0 takes the likeliest token every time, and any of temperature, top_p, top_k
    and min_p asks for a random choice. `seed` makes that choice repeatable, `stop` ends the text before a string,
    `logprobs=n` tells each token's log-probability. An answer is held to a form by `schema` (a JSON schema as a dict),
    `regex` or `grammar` (Lark syntax); that needs llguidance (`pip install 'llama2[serve]'`).
    """

    def __init__(
        self,
        model: str | Path,
        *,
        context: int | None = None,
        threads: int | None = None,
        kv_cache: cpu.KvDtype | None = None,
        precision: str = "fast",
        chat_template: str | None = None,
        revision: str | None = None,
    ) -> None:
        """model: a GGUF file, a folder of safetensors (GPTQ, AWQ and NF4 too) or of Meta's files, which need no torch,
        or any other checkpoint that AutoModelForCausalLM loads. context: tokens that the cache of keys and values holds
        for all texts together (default: the model's context, within 40 % of the free memory). threads: of the native
        engine (default: one per processor).
        chat_template: a Jinja template in place of the model's. Raises CheckpointError, InputError."""
        place = locate_all(str(model), revision)
        files = NativeFiles(checkpoint.find_gguf(place.path) or place.path)
        self.tokenizer: Any = _gguf_tokenizer(files.file.metadata) if files.file else _tokenizer(place.path)
        if chat_template is not None:
            self.tokenizer.chat_template = chat_template
        native = files.native_or_torch(threads)
        self.model: Any = native
        if native is None:
            self.model = AutoModelForCausalLM.from_pretrained(files.path)
        self.engine = Engine(
            self.model,
            self.tokenizer,
            cache_tokens=self._room(context),
            kv_cache=kv_cache,
            precision=precision,
        )
        self._compiler: Compiler | None = None
        self._embedder: Embedder | None = None

    def _room(self, context: int | None) -> int:
        """Positions of the cache."""
        config = self.model.config
        if context is not None:
            if not 1 <= context <= config.max_position_embeddings:
                raise InputError(
                    f"context is {context}; it must lie between 1 and the model's {config.max_position_embeddings}"
                )
            return max(context, cpu.PAGE)
        fits = int(available_bytes() * CACHE_SHARE) // config.kv_bytes_per_token()
        return max(min(config.max_position_embeddings, fits), cpu.PAGE)

    # -- text and ids --------------------------------------------------------------------------------------------

    def tokenize(self, text: str) -> list[int]:
        """The ids of a text, with those that the model wants at its beginning."""
        ids: list[int] = self.tokenizer(text, verbose=False)["input_ids"]
        return ids

    def detokenize(self, ids: Sequence[int]) -> str:
        """The text of ids, without control tokens."""
        text: str = self.tokenizer.decode(list(ids), skip_special_tokens=True)
        return text

    def embed(
        self, text: str | Sequence[str], *, pooling: Literal["mean", "last"] = "mean", normalise: bool = False
    ) -> Any:
        """The vector float32 (D,) of a text, or (n, D) of several: the mean of its final hidden states, or the last.

        normalise: of length 1. Raises InputError for a text without tokens, or longer than the context."""
        if self._embedder is None:
            self._embedder = Embedder(self.model)
        texts = [text] if isinstance(text, str) else list(text)
        found = [self._embedder.vector(self.tokenize(one), pooling, normalise) for one in texts]
        return found[0] if isinstance(text, str) else np.stack(found)

    def render(self, messages: Messages, *, system: str | None = None, tools: Sequence[Any] | None = None) -> list[int]:
        """The ids of a conversation whose next words are the model's. What messages hold is text, never a control
        token. Raises InputError for a model without a chat template."""
        if self.tokenizer.chat_template is None:
            raise InputError(
                "this model has no chat template: it continues text and was probably not trained to answer; use "
                "generate(), or give chat_template="
            )
        talk = [{"role": "user", "content": messages}] if isinstance(messages, str) else [dict(m) for m in messages]
        if system is not None:
            talk.insert(0, {"role": "system", "content": system})
        given = {} if tools is None else {"tools": list(tools)}
        ids: list[int] = self.tokenizer.apply_chat_template(
            talk, add_generation_prompt=True, return_dict=False, safe=True, **given
        )
        return ids

    # -- answers -------------------------------------------------------------------------------------------------

    def generate(self, prompt: Prompt | Sequence[Prompt], **settings: Any) -> Any:
        """Continues a prompt (a text, or ids), or several at once: a `Completion` (text, tokens, finish, logprobs), or
        a list of them. Prompt i of several takes the seed `seed` + i."""
        if isinstance(prompt, str) or (len(prompt) > 0 and isinstance(prompt[0], int)):
            one: Any = prompt
            return complete(self.engine, [self._ask(one, settings)])[0]
        several: Any = prompt
        seed = settings.pop("seed", None)
        return complete(
            self.engine,
            [
                self._ask(one, settings | ({} if seed is None else {"seed": seed + number}))
                for number, one in enumerate(several)
            ],
        )

    def stream(self, prompt: Prompt, **settings: Any) -> Iterator[str]:
        """Continues a prompt; the pieces of text as they come. Leaving the loop ends the work."""
        return self._pieces(self._ask(prompt, settings))

    def chat(
        self, messages: Messages, *, system: str | None = None, tools: Sequence[Any] | None = None, **settings: Any
    ) -> Completion:
        """Answers a message, or the last of a list of messages ({"role": ..., "content": ...})."""
        ids = self.render(messages, system=system, tools=tools)
        return complete(self.engine, [self._ask(ids, settings, continues=False)])[0]

    def stream_chat(
        self, messages: Messages, *, system: str | None = None, tools: Sequence[Any] | None = None, **settings: Any
    ) -> Iterator[str]:
        """As `chat`, the pieces of text as they come."""
        return self._pieces(self._ask(self.render(messages, system=system, tools=tools), settings, continues=False))

    async def agenerate(self, prompt: Prompt, **settings: Any) -> Completion:
        """As `generate` in an event loop, one prompt. Requests that run at once share the engine's steps."""
        return await self._fold(self._ask(prompt, settings))

    async def achat(self, messages: Messages, *, system: str | None = None, **settings: Any) -> Completion:
        """As `chat` in an event loop."""
        return await self._fold(self._ask(self.render(messages, system=system), settings, continues=False))

    async def astream(self, prompt: Prompt, **settings: Any) -> AsyncIterator[str]:
        """As `stream` in an event loop."""
        async for event in self.engine.astream(self._ask(prompt, settings)):
            if event.text:
                yield event.text

    def close(self) -> None:
        """Ends what runs, and the engine."""
        self.engine.close(wait=False)
        if self._compiler is not None:
            self._compiler.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # -- inside --------------------------------------------------------------------------------------------------

    def _ask(self, prompt: Prompt, settings: Mapping[str, Any], continues: bool = True) -> EngineRequest:
        """A checked request."""
        given = dict(settings)
        chosen = [(kind, value) for name, kind in _FORMS.items() if (value := given.pop(name, None)) is not None]
        if len(chosen) > 1:
            raise InputError("schema, regex and grammar each hold the whole answer to a form; give one of them")
        given = choosing(given)
        ids = self.tokenize(prompt) if isinstance(prompt, str) else [int(token) for token in prompt]
        if not ids:
            raise InputError("the prompt is empty and this tokenizer adds no token of its own; give some text")
        ask = replace(self.engine.ask(ids, **given), continues=continues)
        if chosen:
            kind, value = chosen[0]
            ask = replace(ask, processors=(self._constraint(constraint_of(kind, value), len(ids)),))
        return ask

    def _constraint(self, constraint: Constraint, prompt: int) -> Any:
        if self._compiler is None:
            eos = self.model.generation_config.eos_token_ids
            self._compiler = Compiler(self.tokenizer, self.model.config.vocab_size, eos)
        compiled = self._compiler.compiled(constraint)
        for text in compiled.warnings:
            warnings.warn(text, stacklevel=4)
        return self._compiler.processor(compiled, prompt)

    def _pieces(self, ask: EngineRequest) -> Iterator[str]:
        for event in Stream(self.engine, ask):
            if event.text:
                yield event.text

    async def _fold(self, ask: EngineRequest) -> Completion:
        result = Completion()
        async for event in self.engine.astream(ask):
            result.add(event)
        return result
