"""Chat templates: Jinja in a sandbox, the Llama 2 template, loss masks, and prompts safe from user text."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from llama2.errors import TokenizerError
from llama2.tokenizer import marks
from llama2.tokenizer.added import TokenMatcher
from llama2.tokenizer.sandbox import reads_parts, render
from llama2.tokenizer.special import SpecialTokens
from llama2.tokenizer.tools import as_schema

Message = Mapping[str, Any]
Span = tuple[int, int]

# Meta's chat format (llama/generation.py): ids are those of encode("[INST] q [/INST] a ", bos, eos) a turn.
LLAMA2_CHAT_TEMPLATE = (
    "{% if messages[0]['role'] == 'system' %}"
    "{% set turns = messages[1:] %}"
    "{% set system = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' %}"
    "{% else %}{% set turns = messages %}{% set system = '' %}{% endif %}"
    "{% for message in turns %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% set content = (system if loop.first else '') + message['content'] %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + content.strip() + ' ' + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles may follow the system message') }}{% endif %}"
    "{% endfor %}"
)
LLAMA2_MARKERS = ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>")


class ChatPrompt(str):
    """A rendered chat. It has its special tokens already: a call adds none to it, nor to it with more text behind."""

    __slots__ = ()

    def __add__(self, text: str) -> ChatPrompt:
        return ChatPrompt(str(self) + text)


class ChatTemplates(SpecialTokens):
    """Mixin of both classes: apply_chat_template."""

    chat_template: str | dict[str, str] | None
    _added: dict[str, Any]
    _encode_parts: Callable[[Sequence[str | int]], list[int]]
    _encode_inside: Callable[[str], list[int]]
    encode_bytes: Callable[[bytes], list[int]]

    def get_chat_template(self, chat_template: str | None = None, tools: Any = None) -> str:
        """The template to use: the one given, or by its name, or the tokenizer's own ("tool_use" where tools are)."""
        own = self.chat_template
        if isinstance(own, dict):
            if chat_template is not None:
                return own.get(chat_template, chat_template)
            name = "tool_use" if tools is not None and "tool_use" in own else "default"
            if name not in own:
                raise TokenizerError(f"this tokenizer has the templates {', '.join(own)}; name one in chat_template=")
            return own[name]
        if chat_template is not None:
            return chat_template
        if own is None:
            raise TokenizerError(
                "this tokenizer has no chat template: set tokenizer.chat_template, or pass chat_template= "
                "(llama2.tokenizer.LLAMA2_CHAT_TEMPLATE is that of Llama-2-chat)"
            )
        return own

    def apply_chat_template(
        self,
        conversation: Any,
        tools: Sequence[Mapping[str, Any] | Callable[..., Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        tokenize: bool = True,
        padding: bool | str = False,
        truncation: bool | str = False,
        max_length: int | None = None,
        return_tensors: str | None = None,
        return_dict: bool = False,
        return_assistant_tokens_mask: bool = False,
        tokenizer_kwargs: dict[str, Any] | None = None,
        safe: bool = False,
        **kwargs: Any,
    ) -> Any:
        """A conversation, or a list of them, as a prompt: ids, or text with tokenize=False; kwargs go to the template.

        A tool is a JSON schema, or a Python function: then its signature and Google-style docstring make the schema. A
        content may be a list of text parts; a template that does not look into them gets their texts as lines.
        return_dict gives a BatchEncoding; with return_assistant_tokens_mask it has `assistant_masks`, 1 on the answers
        and the token that ends each. safe=True: special-token strings in messages are plain text, and so are the
        markers of the Llama 2 format ([INST], <<SYS>>, ...): they become other ids than those that templates write.
        """
        if not isinstance(conversation, (list, tuple)) or not conversation:
            raise TokenizerError(f"a conversation is a non-empty list of messages, got {conversation!r}")
        batched = isinstance(conversation[0], (list, tuple))
        chats = [_checked(chat) for chat in (conversation if batched else [conversation])]
        if continue_final_message and (add_generation_prompt or return_assistant_tokens_mask):
            other = "add_generation_prompt" if add_generation_prompt else "return_assistant_tokens_mask"
            raise TokenizerError(f"continue_final_message and {other} exclude each other; pass one")
        if return_assistant_tokens_mask and not (return_dict and tokenize):
            raise TokenizerError("return_assistant_tokens_mask=True needs return_dict=True and tokenize=True")
        renderer = _Renderer(self, self.get_chat_template(chat_template, tools), tools, documents, kwargs)
        cut = _continued if continue_final_message else _whole
        texts = [cut(renderer, chat, add_generation_prompt) for chat in chats]
        if not tokenize:
            if safe:
                raise TokenizerError("safe=True needs tokenize=True: in a text, injected tokens cannot be told apart")
            prompts = [ChatPrompt(text) for text in texts]
            return prompts if batched else prompts[0]
        options = {"padding": padding, "truncation": truncation, "max_length": max_length, **(tokenizer_kwargs or {})}
        rows = [
            self._encode_safely(renderer, chat, text, add_generation_prompt) if safe else None
            for chat, text in zip(chats, texts)
        ]
        masks = None
        if return_assistant_tokens_mask:
            masks = [renderer.answers(chat, text, add_generation_prompt) for chat, text in zip(chats, texts)]
        result = self._encode_chats(texts, rows, masks, options, return_tensors, batched)
        return result if return_dict else result["input_ids"]

    def _encode_chats(
        self,
        texts: list[str],
        rows: list[list[int] | None],
        spans: list[list[Span]] | None,
        options: dict[str, Any],
        tensors: str | None,
        batched: bool,
    ) -> Any:
        tok: Any = self
        encoded: dict[str, list[Any]] = {}
        for i, text in enumerate(texts):
            given = rows[i]
            if given is not None and spans is not None:
                raise TokenizerError("safe=True and return_assistant_tokens_mask=True exclude each other; pass one")
            limits = {k: v for k, v in options.items() if k not in ("padding", "pad_to_multiple_of", "padding_side")}
            if given is None:
                row = tok(text, add_special_tokens=False, return_offsets_mapping=spans is not None, **limits)
            else:
                row = tok.prepare_for_model(given, add_special_tokens=False, **limits)
            columns = dict(row)
            if spans is not None:
                offsets = columns.pop("offset_mapping")
                columns["assistant_masks"] = [
                    int(any(a < end and start < b for start, end in spans[i]) and a < b) for a, b in offsets
                ]
            for name, column in columns.items():
                encoded.setdefault(name, []).append(column)
        return self._finish(encoded, options, tensors, batched)

    def _finish(
        self, encoded: dict[str, list[Any]], options: dict[str, Any], tensors: str | None, batched: bool
    ) -> Any:
        tok: Any = self
        pads = {k: options[k] for k in ("padding", "max_length", "pad_to_multiple_of", "padding_side") if k in options}
        masks = encoded.pop("assistant_masks", None)
        batch = tok.pad(encoded, **pads)
        if masks is not None:
            side = options.get("padding_side") or tok.padding_side
            fill = [[0] * (len(row) - len(mask)) for row, mask in zip(batch["input_ids"], masks)]
            batch["assistant_masks"] = [f + m if side == "left" else m + f for f, m in zip(fill, masks)]
        if not batched and tensors is None:
            batch.data = {name: rows[0] for name, rows in batch.data.items()}
        return batch.convert_to_tensors(tensors)

    @property
    def special_contents(self) -> list[str]:
        """The texts that become special tokens."""
        return [content for content, entry in self._added.items() if entry[1].special]

    def _encode_safely(self, renderer: _Renderer, chat: list[Message], text: str, prompt: bool) -> list[int]:
        """Ids of a rendered chat where only the template's own text may become special tokens."""
        markers = [marker for marker in LLAMA2_MARKERS if marker in renderer.source]
        raw = {content: entry for content, entry in self._added.items() if entry[1].special}
        matcher = TokenMatcher(raw)
        parts: list[str | int] = []
        apart = (
            False  # whether a marker was written out since the last special token: what follows stands inside a text
        )
        for fragment, literal in renderer.fragments(chat, text, prompt, markers):
            for piece, is_marker in _marked(fragment, markers) if literal else [(fragment, False)]:
                if is_marker:
                    parts += [token_id for character in piece for token_id in self.encode_bytes(character.encode())]
                    apart = True
                    continue
                for token_id, start, stop in [(None, 0, len(piece))] if literal else matcher.split(piece):
                    if token_id is not None:
                        parts.append(token_id)
                        apart = False
                    elif apart:
                        parts += self._encode_inside(piece[start:stop])
                    elif parts and isinstance(parts[-1], str):
                        parts[-1] += piece[start:stop]
                    elif start < stop:
                        parts.append(piece[start:stop])
        return self._encode_parts(parts)


class _Renderer:
    """One template with its variables."""

    def __init__(self, tok: ChatTemplates, source: str, tools: Any, documents: Any, variables: Mapping[str, Any]):
        self.source, self.tok = source, tok
        self.parts = reads_parts(source)
        specials = dict(tok.special_tokens_map)
        shown = None if tools is None else [as_schema(tool) for tool in tools]
        self.variables = {**specials, "tools": shown, "documents": documents, **variables}

    def __call__(self, chat: Sequence[Message], prompt: bool) -> str:
        messages = [dict(message) if self.parts else _as_text(message) for message in chat]
        return render(self.source, {"messages": messages, "add_generation_prompt": prompt, **self.variables})

    def fragments(
        self, chat: list[Message], text: str, prompt: bool, markers: Sequence[str] = ()
    ) -> list[tuple[str, bool]]:
        """The rendered chat in (text, whether it comes from the request) pieces."""
        given = [*chat, self.variables["tools"], self.variables["documents"]]
        pair = marks.unused((self.source, *marks.strings(given)))
        test = marks.risky([*self.tok.special_contents, *markers])
        shown = {name: marks.marked(self.variables[name], pair, test) for name in ("tools", "documents")}
        with_marks = _Renderer(self.tok, self.source, None, None, self.variables | shown)
        return marks.split(with_marks([marks.message(m, pair, test) for m in chat], prompt), pair, text)

    def answers(self, chat: list[Message], text: str, prompt: bool) -> list[Span]:
        """Character spans of the assistant's answers, each with the special token that ends it."""
        if "generation" in _tags(self.source):
            return _generation_spans(self, chat, prompt)
        spans = []
        for i, message in enumerate(chat):
            if message["role"] != "assistant":
                continue
            before, through = self(chat[:i], True), self(chat[: i + 1], False)
            if not (through.startswith(before) and text.startswith(through)):
                raise TokenizerError(
                    f"message {i}: the chat template renders its past differently as the chat goes on, so answers "
                    "cannot be found by position; mark them with {% generation %} ... {% endgeneration %}"
                )
            answer = through[len(before) :]
            ends = [answer.rfind(t) + len(t) for t in self.tok.all_special_tokens if t in answer]
            if ends and not answer[max(ends) :].strip():
                answer = answer[: max(ends)]
            spans.append((len(before), len(before) + len(answer)))
        return spans


def _marked(text: str, markers: Sequence[str]) -> Iterator[tuple[str, bool]]:
    """A text in pieces, each marker in it one of its own, and whether a piece is one."""
    pattern = "|".join(re.escape(marker) for marker in sorted(markers, key=len, reverse=True))
    pieces = re.split(f"({pattern})", text) if markers else [text]
    yield from ((piece, i % 2 == 1) for i, piece in enumerate(pieces) if piece)


def _whole(renderer: _Renderer, chat: list[Message], prompt: bool) -> str:
    return renderer(chat, prompt)


def _continued(renderer: _Renderer, chat: list[Message], prompt: bool) -> str:
    """The chat up to the end of its last message's text, for the model to go on from there."""
    content = _last_text(chat[-1])
    core = content.rstrip()
    mark = next(chr(c) for c in range(0xE000, 0xF8FF) if chr(c) not in content + renderer.source)
    rendered = renderer([*chat[:-1], _with_last_text(chat[-1], core + mark + content[len(core) :])], False)
    before, found, after = rendered.rpartition(mark)
    if not found:
        raise TokenizerError("continue_final_message=True: the chat template does not print the last message")
    tail = content[len(core) :]
    return before + tail if tail and after.startswith(tail) else before


def _last_text(message: Message) -> str:
    """The text that a message ends in: its content, or the last part of it."""
    content = message.get("content")
    last = content[-1] if isinstance(content, (list, tuple)) and content else content
    text = last.get("text") if isinstance(last, Mapping) else last
    if not isinstance(text, str):
        raise TokenizerError("continue_final_message=True needs a last message with a text")
    return text


def _with_last_text(message: Message, text: str) -> Message:
    content = message["content"]
    if isinstance(content, str):
        return {**message, "content": text}
    last = {**content[-1], "text": text} if isinstance(content[-1], Mapping) else text
    return {**message, "content": [*content[:-1], last]}


def _generation_spans(renderer: _Renderer, chat: list[Message], prompt: bool) -> list[Span]:
    """Spans of {% generation %} blocks: rendered with marks around them."""
    used = renderer.source + "".join(_text_of(m) for m in chat)
    marks = [chr(c) for c in range(0xE000, 0xF8FF) if chr(c) not in used][:2]
    if len(marks) < 2:
        raise TokenizerError("{% generation %} needs two private-use characters that no message contains")
    renderer.variables["_generation_marks"] = marks
    rendered = renderer(chat, prompt)
    del renderer.variables["_generation_marks"]
    spans, at = [], 0
    for i, piece in enumerate(rendered.replace(marks[1], marks[0]).split(marks[0])):
        if i % 2:
            spans.append((at, at + len(piece)))
        at += len(piece)
    return spans


def _checked(chat: Any) -> list[Message]:
    if hasattr(chat, "messages"):
        chat = chat.messages
    if not chat:
        raise TokenizerError("an empty conversation; pass at least one message")
    for i, message in enumerate(chat):
        if not isinstance(message, Mapping) or "role" not in message:
            raise TokenizerError(f"message {i} is {message!r}; a message is a dict with 'role' and 'content'")
    return list(chat)


def _as_text(message: Message) -> dict[str, Any]:
    """The message with a content of parts as one text, for a template that prints a content as it is."""
    content = message.get("content")
    if not isinstance(content, (list, tuple)):
        return dict(message)
    texts = [part if isinstance(part, str) else part.get("text") for part in content]
    for part, text in zip(content, texts, strict=True):
        if not isinstance(text, str) or (isinstance(part, Mapping) and part.get("type", "text") != "text"):
            raise TokenizerError(
                f"a {message['role']} message has the part {str(part)[:80]}, and this chat template takes text only"
            )
    return {**message, "content": "\n".join(str(text) for text in texts)}


def _text_of(message: Message) -> str:
    content = message.get("content") or ""
    return content if isinstance(content, str) else json.dumps(content, ensure_ascii=False, default=str)


def _tags(source: str) -> set[str]:
    return {name for name in ("generation",) if "{%" in source and "endgeneration" in source}
