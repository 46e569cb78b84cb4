"""pipeline("text-generation" | "text-classification"): model and tokenizer behind one call, as `transformers` has it.

generator = pipeline("text-generation", model="path/to/folder")
generator("Once upon a time", max_new_tokens=20)            # [{"generated_text": "Once upon a time ..."}]
generator([{"role": "user", "content": "Hi"}])              # [{"generated_text": [..., {"role": "assistant", ...}]}]
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from inspect import signature
from pathlib import Path
from typing import Any

import torch

from llama2.auto import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from llama2.checkpoint.arguments import resolve_device
from llama2.config import LlamaConfig
from llama2.errors import InputError
from llama2.generation.call_settings import CALL_ARGUMENTS
from llama2.generation.config import DEFAULTS
from llama2.keywords import NO_EFFECT

Record = dict[str, Any]
DEFAULT_NEW_TOKENS = 256  # where neither the call nor the model says a length, as transformers 5.x
SCORES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "softmax": lambda logits: logits.softmax(-1),
    "sigmoid": torch.sigmoid,
    "none": lambda logits: logits,
}
_TOKENIZER_OPTIONS = ("add_special_tokens", "truncation", "max_length", "padding", "stride", "return_token_type_ids")


class Pipeline:
    """Base class of pipelines: inputs in, batches through the model, one result per input."""

    task: str
    framework = "pt"

    def __init__(self, model: Any, tokenizer: Any, batch_size: int = 1, **defaults: Any) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.batch_size, self._defaults = _checked_batch_size(batch_size), defaults
        self.check(defaults)

    @classmethod
    def check(cls, options: Mapping[str, Any]) -> None:
        """Raises InputError for a keyword that no call knows."""
        unknown = sorted(set(options) - cls._options())
        if unknown:
            raise InputError(f"{cls.task} does not know {', '.join(map(repr, unknown))}; {cls._takes()}")

    @classmethod
    def _options(cls) -> set[str]:
        """Every keyword of a call."""
        raise NotImplementedError

    @classmethod
    def _takes(cls) -> str:
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        device: torch.device = self.model.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        """The model's dtype."""
        dtype: torch.dtype = self.model.dtype
        return dtype

    torch_dtype = dtype

    def _batches(self, inputs: Sequence[Any], batch_size: int | None) -> Iterator[Sequence[Any]]:
        size = self.batch_size if batch_size is None else _checked_batch_size(batch_size)
        if size > 1 and len(inputs) > 1 and self.tokenizer.pad_token_id is None:
            raise InputError(
                f"batch_size is {size} but the tokenizer has no pad token to fill shorter rows with; "
                "set pipe.tokenizer.pad_token = pipe.tokenizer.eos_token, or batch_size=1"
            )
        return (inputs[i : i + size] for i in range(0, len(inputs), size))


class TextGenerationPipeline(Pipeline):
    """Continues texts and answers chats."""

    task = "text-generation"

    @classmethod
    def _options(cls) -> set[str]:
        own = {name for name, value in signature(cls._run).parameters.items() if value.kind is value.KEYWORD_ONLY}
        return {*own, *DEFAULTS, *CALL_ARGUMENTS, *NO_EFFECT["generate"], "generation_config", "num_workers"}

    @classmethod
    def _takes(cls) -> str:
        return "it takes the options of its calls and the settings of generate()"

    def __call__(self, text_inputs: Any, **options: Any) -> Any:
        """A list of {"generated_text"} (or, with return_tensors, {"generated_token_ids"}) for one input, one such list
        an input for several. An input is a text, or a chat: a list of {"role", "content"}, whose result is the chat
        with the answer behind it, or with return_full_text=False the answer's text.

        Options, here or at construction: return_full_text, return_tensors, return_text, return_type,
        clean_up_tokenization_spaces, skip_special_tokens, continue_final_message, prefix, add_special_tokens,
        truncation, stop_sequence, batch_size, and for chats tools and documents. Other keywords are those of
        `generate()`; without any length 256 new tokens come. A chat that ends with the assistant is continued unless
        continue_final_message=False. truncation=True cuts a prompt on the left, so that it and the new tokens fit the
        context.
        """
        returns = ("return_full_text", "return_tensors", "return_text", "return_type")
        asked = any(options.get(name) is not None for name in returns)
        defaults = {k: v for k, v in self._defaults.items() if not (asked and k in returns)}
        options = {**defaults, **options}
        options.pop("num_workers", None)  # rows are made in this process
        return self._run(text_inputs, **options)

    def _run(
        self,
        text_inputs: Any,
        *,
        return_full_text: bool | None = None,
        return_tensors: bool | None = None,
        return_text: bool | None = None,
        return_type: Any = None,
        clean_up_tokenization_spaces: bool | None = None,
        skip_special_tokens: bool = True,
        continue_final_message: bool | None = None,
        prefix: str = "",
        add_special_tokens: bool = True,
        truncation: bool = False,
        handle_long_generation: str | None = None,
        stop_sequence: str | Sequence[str] | None = None,
        batch_size: int | None = None,
        tools: Any = None,
        documents: Any = None,
        tokenizer_encode_kwargs: dict[str, Any] | None = None,
        **generate_kwargs: Any,
    ) -> Any:
        if isinstance(text_inputs, Iterator):
            call = {
                key: value for key, value in locals().items() if key not in ("self", "text_inputs", "generate_kwargs")
            }
            return (self._run(one, **call, **generate_kwargs) for one in text_inputs)
        return_full_text, return_tensors = _returned(return_type, return_full_text, return_tensors)
        if return_text is not None and (return_full_text is not None or return_tensors is not None):
            raise InputError("return_text excludes return_full_text and return_tensors; give one of them")
        if return_full_text is not None and return_tensors is not None:
            raise InputError("return_full_text and return_tensors exclude each other; give one of them")
        inputs, single = _as_list(text_inputs)
        settings = self._settings(dict(generate_kwargs), stop_sequence)
        chat: dict[str, Any] = {"tools": tools, "documents": documents}
        encode = {"add_special_tokens": add_special_tokens, **(tokenizer_encode_kwargs or {})}
        prompts = [self._encode(one, prefix, encode, continue_final_message, chat) for one in inputs]
        if truncation or _holes(handle_long_generation):
            prompts = [self._cut(ids, settings) for ids in prompts]

        def record(results: Any, prompt: list[int], new: list[int]) -> Record:
            if return_tensors:
                return {"generated_token_ids": prompt + new}
            text = self._continuation(prompt, new, skip_special_tokens, clean_up_tokenization_spaces)
            if return_full_text is False:
                return {"generated_text": text}
            return {"generated_text": _whole(results, text, continue_final_message)}

        results: list[list[Record]] = []
        for rows in self._batches(range(len(inputs)), batch_size):
            news = self._generate([prompts[i] for i in rows], settings)
            results += [
                [record(inputs[i], prompts[i], new) for new in each] for i, each in zip(rows, news, strict=True)
            ]
        return results[0] if single else results

    def _settings(self, kwargs: dict[str, Any], stop_sequence: str | Sequence[str] | None) -> dict[str, Any]:
        if stop_sequence is not None:
            kwargs["stop_strings"] = [stop_sequence] if isinstance(stop_sequence, str) else list(stop_sequence)
        if kwargs.get("stop_strings") is not None:
            kwargs.setdefault("tokenizer", self.tokenizer)
        sources = [config for config in (kwargs.get("generation_config"), self.model.generation_config) if config]
        lengths = ("max_new_tokens", "max_length")
        if not any(name in kwargs or any(c.is_set(name) for c in sources) for name in lengths):
            kwargs["max_new_tokens"] = DEFAULT_NEW_TOKENS
        if self.tokenizer.pad_token_id is not None and not any(c.is_set("pad_token_id") for c in sources):
            kwargs.setdefault("pad_token_id", self.tokenizer.pad_token_id)
        return kwargs

    def _encode(
        self, given: Any, prefix: str, options: dict[str, Any], continue_final: bool | None, chat: dict[str, Any]
    ) -> list[int]:
        if is_chat(given):
            continues = _continues(given, continue_final)
            ids: list[int] = self.tokenizer.apply_chat_template(
                given,
                add_generation_prompt=not continues,
                continue_final_message=continues,
                return_dict=False,
                **{name: value for name, value in chat.items() if value is not None},
            )
        elif isinstance(given, str):
            # without a prefix the very object: a rendered chat knows that it has its BOS
            ids = self.tokenizer(prefix + given if prefix else given, **options)["input_ids"]
        else:
            raise InputError(
                f"an input is a {type(given).__name__}; give a text, a chat (a list of dicts with 'role' and "
                "'content'), or a list of these"
            )
        if not ids:
            raise InputError("the prompt is empty and the tokenizer adds no token of its own; give some text")
        return ids

    def _cut(self, ids: list[int], settings: dict[str, Any]) -> list[int]:
        new = settings.get("max_new_tokens") or self.model.generation_config.max_new_tokens or 1
        room = self.model.config.max_position_embeddings - new
        if room < 1:
            raise InputError(
                f"max_new_tokens is {new}, which leaves no room for a prompt in the context of "
                f"{self.model.config.max_position_embeddings}; set it lower"
            )
        return ids[-room:]

    def _generate(self, prompts: list[list[int]], settings: dict[str, Any]) -> list[list[list[int]]]:
        """New ids of each returned sequence of each prompt, up to the first end id."""
        width = max(map(len, prompts))
        pad = self.tokenizer.pad_token_id or 0
        ids = torch.tensor([[pad] * (width - len(row)) + row for row in prompts], device=self.device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prompts], device=self.device)
        output = self.model.generate(ids, attention_mask=mask, **settings)
        rows = [row[width:] for row in getattr(output, "sequences", output).tolist()]
        ends = self._end_ids(settings)
        cut = [next((row[: i + 1] for i, token in enumerate(row) if token in ends), row) for row in rows]
        each = len(cut) // len(prompts)
        return [cut[i : i + each] for i in range(0, len(cut), each)]

    def _end_ids(self, settings: dict[str, Any]) -> set[int]:
        given = settings.get("eos_token_id")
        if given is not None:
            return set(given) if isinstance(given, list | tuple) else {int(given)}
        config = settings.get("generation_config")
        own = config if config is not None and config.is_set("eos_token_id") else self.model.generation_config
        return set(own.eos_token_ids)

    def _continuation(self, prompt: list[int], new: list[int], skip: bool, clean: bool | None) -> str:
        """The text of the new ids behind the prompt: decoded alone they would lose their leading space."""
        options = {"skip_special_tokens": skip, "clean_up_tokenization_spaces": clean}
        before, whole = (self.tokenizer.decode(ids, **options) for ids in (prompt, prompt + new))
        text: str = whole[len(before) :] if whole.startswith(before) else self.tokenizer.decode(new, **options)
        return text


class TextClassificationPipeline(Pipeline):
    """Labels texts."""

    task = "text-classification"

    @classmethod
    def _options(cls) -> set[str]:
        return {*_TOKENIZER_OPTIONS, "top_k", "function_to_apply", "batch_size", "return_all_scores", "num_workers"}

    @classmethod
    def _takes(cls) -> str:
        return "it takes top_k, function_to_apply, batch_size and the tokenizer's " + ", ".join(_TOKENIZER_OPTIONS)

    def __call__(self, inputs: Any, *, batch_size: int | None = None, **kwargs: Any) -> Any:
        """[{"label", "score"}] for a text, and one {"label", "score"} a text for a list.

        With top_k (an int, or None for all labels) each result is a list, the best first. function_to_apply is
        "softmax", "sigmoid" or "none"; by default what fits the labels: nothing for regression, sigmoid for one label
        or for multi-label models, else softmax. An input may be {"text", "text_pair"}, or a chat (a list of {"role",
        "content"}), which goes through the chat template. Other keywords are the tokenizer's.
        """
        options = {**self._defaults, **kwargs}
        options.pop("num_workers", None)
        if (every := options.pop("return_all_scores", None)) is not None:  # the name before top_k
            options.setdefault("top_k", None if every else 1)
        legacy = "top_k" not in options
        top_k, function = options.pop("top_k", 1), options.pop("function_to_apply", None)
        if top_k is not None and (not isinstance(top_k, int) or isinstance(top_k, bool) or top_k < 1):
            raise InputError(f"top_k is {top_k!r}; give the number of labels to return, or None for all of them")
        unknown = sorted(set(options) - set(_TOKENIZER_OPTIONS))
        if unknown:
            raise InputError(f"{self.task} does not know {', '.join(map(repr, unknown))}; {self._takes()}")
        if isinstance(inputs, Iterator):
            return (self(one, batch_size=batch_size, **kwargs) for one in inputs)
        single = isinstance(inputs, str | Mapping) or is_chat(inputs)
        texts = [inputs] if single else list(inputs)
        results: list[list[Record]] = []
        for batch in self._batches(texts, batch_size):
            scores = self._scores(batch, function, options)
            results += [self._labels(row, top_k) for row in scores.tolist()]
        if legacy:
            return [row[0] for row in results]
        return results[0] if single else results

    @torch.inference_mode()
    def _scores(self, batch: Sequence[Any], function: str | None, options: dict[str, Any]) -> torch.Tensor:
        rows = [self._encode(one, options) for one in batch]
        columns = self.tokenizer.pad(rows) if len(rows) > 1 else {name: [column] for name, column in rows[0].items()}
        tensors = {name: torch.tensor(column, device=self.device) for name, column in columns.items()}
        logits = self.model(**tensors).logits
        scores: torch.Tensor = SCORES[self._function(function)](logits.float())
        return scores

    def _encode(self, one: Any, options: dict[str, Any]) -> dict[str, Any]:
        if isinstance(one, str):
            encoded = self.tokenizer(one, **options)
        elif is_chat(one):
            given = {name: value for name, value in options.items() if name in ("truncation", "max_length")}
            encoded = self.tokenizer.apply_chat_template(one, return_dict=True, **given)
        elif isinstance(one, Mapping) and isinstance(one.get("text"), str) and set(one) <= {"text", "text_pair"}:
            encoded = self.tokenizer(one["text"], one.get("text_pair"), **options)
        else:
            raise InputError(
                f"an input is {one!r}; give a text, a dict {{'text': ..., 'text_pair': ...}}, a chat, or a list"
            )
        if not encoded["input_ids"]:
            raise InputError("the text is empty and the tokenizer adds no token of its own; give some text")
        return {name: encoded[name] for name in ("input_ids", "attention_mask")}

    def _function(self, wanted: str | None) -> str:
        if wanted is not None:
            name = str(getattr(wanted, "value", wanted)).lower()
            if name not in SCORES:
                raise InputError(f"function_to_apply is {wanted!r}; it must be one of {', '.join(SCORES)}")
            return name
        config = self.model.config
        if config.problem_type == "regression":
            return "none"
        return "sigmoid" if config.problem_type == "multi_label_classification" or config.num_labels == 1 else "softmax"

    def _labels(self, scores: list[float], top_k: int | None) -> list[Record]:
        names = self.model.config.id2label
        ordered = sorted(range(len(scores)), key=lambda i: -scores[i])
        return [{"label": names[i], "score": scores[i]} for i in ordered[:top_k]]


def _returned(kind: Any, full: bool | None, tensors: bool | None) -> tuple[bool | None, bool | None]:
    """(return_full_text, return_tensors) of transformers' ReturnType: 0 tensors, 1 new text, 2 full text."""
    if kind is None:
        return full, tensors
    number = getattr(kind, "value", kind)
    if number not in (0, 1, 2):
        raise InputError(f"return_type is {kind!r}; it must be 0 (tensors), 1 (new text) or 2 (full text)")
    return (None, True) if number == 0 else (number == 2, None)


def _holes(handle: str | None) -> bool:
    """Whether a prompt that is too long is cut, under transformers' name for that."""
    if handle not in (None, "hole"):
        raise InputError(f"handle_long_generation is {handle!r}; it must be None or 'hole'")
    return handle == "hole"


def is_chat(value: Any) -> bool:
    """Whether the value is one conversation: a list of messages."""
    return (
        isinstance(value, list | tuple)
        and len(value) > 0
        and all(isinstance(m, Mapping) and "role" in m and "content" in m for m in value)
    )


def _as_list(inputs: Any) -> tuple[list[Any], bool]:
    """The inputs as a list, and whether there was a single one."""
    if isinstance(inputs, str) or is_chat(inputs):
        return [inputs], True
    if not isinstance(inputs, list | tuple):
        raise InputError(f"the input is a {type(inputs).__name__}; give a text, a chat, or a list of these")
    return list(inputs), False


def _continues(chat: Any, asked: bool | None) -> bool:
    return chat[-1]["role"] == "assistant" if asked is None else asked


def _whole(given: Any, text: str, continue_final: bool | None) -> Any:
    """The input with the new text behind it."""
    if isinstance(given, str):
        return given + text
    if _continues(given, continue_final):
        last = dict(given[-1])
        return [*given[:-1], {**last, "content": last["content"] + text}]
    return [*given, {"role": "assistant", "content": text}]


def _checked_batch_size(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InputError(f"batch_size is {value!r}; it must be an integer of at least 1")
    return value


TASKS: dict[str, tuple[type[Pipeline], Any]] = {
    "text-generation": (TextGenerationPipeline, AutoModelForCausalLM),
    "text-classification": (TextClassificationPipeline, AutoModelForSequenceClassification),
}
_ALIASES = {"sentiment-analysis": "text-classification"}


def pipeline(
    task: str | None = None,
    model: Any = None,
    config: LlamaConfig | str | Path | None = None,
    tokenizer: Any = None,
    *,
    framework: str | None = None,
    device: int | str | torch.device | None = None,
    device_map: Any = None,
    dtype: Any = None,
    torch_dtype: Any = None,
    revision: str | None = None,
    token: str | bool | None = None,
    use_fast: bool = True,
    trust_remote_code: bool | None = None,
    model_kwargs: dict[str, Any] | None = None,
    **kwargs: Any,
) -> Pipeline:
    """A callable for a task. model: a path, a hub id or a model object; tokenizer: the same, by default the model's.

    device: -1 or "cpu", a CUDA index, "cuda:1". Other keywords (batch_size, settings of `generate()`, top_k, ...)
    become the defaults of its calls. Raises InputError for an unknown task or a missing part. Nothing here runs remote
    code, so trust_remote_code makes no difference.
    """
    kind, loader = _task(task, model)
    if framework not in (None, "pt"):
        raise InputError(f"framework is {framework!r}; there is only 'pt' (PyTorch)")
    if device is not None and device_map is not None:
        raise InputError(f"device {device!r} and device_map {device_map!r} are both given; give one of them")
    kind.check(kwargs)
    place = _device(device)
    hub = {name: value for name, value in (("revision", revision), ("token", token)) if value is not None}
    path = model if isinstance(model, str | Path) else None
    if path is not None:
        options: dict[str, Any] = {"dtype": dtype, "torch_dtype": torch_dtype, "config": config, **hub}
        options |= {"device_map": place if device_map is None else device_map, **(model_kwargs or {})}
        model = loader.from_pretrained(path, **options)
    elif place is not None:
        model = model.to(place)
    return kind(model, _tokenizer(tokenizer, path, hub, use_fast), **kwargs)


def _task(task: str | None, model: Any) -> tuple[type[Pipeline], Any]:
    name = "text-generation" if task is None else _ALIASES.get(task, task)
    if name not in TASKS:
        raise InputError(f"task is {task!r}; there are {' and '.join(map(repr, TASKS))}")
    if model is None:
        raise InputError(f"pipeline({task!r}) needs model=: a checkpoint folder, a GGUF file, a hub id or a model")
    return TASKS[name]


def _tokenizer(tokenizer: Any, path: str | Path | None, hub: dict[str, Any], use_fast: bool) -> Any:
    source = path if tokenizer is None else tokenizer
    if source is None:
        raise InputError("a model object comes without its tokenizer; pass tokenizer= as a path or an object")
    if not isinstance(source, str | Path):
        return source
    choice: dict[str, Any] = {} if use_fast else {"use_fast": False}
    return AutoTokenizer.from_pretrained(source, **hub, **choice)


def _device(device: int | str | torch.device | None) -> torch.device | None:
    """The device that `device` names; -1 is the CPU, as in transformers."""
    return None if device is None else resolve_device("cpu" if device == -1 else device)
