"""lm-evaluation-harness on these models: the class `llama2` of its `--model`.

    lm_eval --model llama2 --model_args pretrained=MODEL,dtype=float32 --tasks arc_easy

Requests run on `Engine`: the common context of a question's choices and few-shot headers are computed once, choices of
one token are read from the same logits, and what is computed together is packed without padding. Numbers are those of
the harness's own `hf` class.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

import llama2
from llama2.auto import AutoTokenizer, load_config
from llama2.checkpoint.source import locate, locate_all, revision_of
from llama2.cpu import PAGE, KvDtype
from llama2.engine.engine import Engine
from llama2.errors import InputError, TokenizerError
from llama2.evaluate import plugin
from llama2.evaluate.opening import open_model
from llama2.evaluate.score_blocks import BlockRunner, BlockStore, Generation, Scored, check_lengths
from llama2.memory import total_bytes

plugin.register()

STORED = 2  # the form of what a store keeps; 1 left adapters out
WIDTH = 64  # sequences in one step where batch_size is auto
CACHE_TOKENS = 16384
# Settings of gen_kwargs that lm-eval has for other classes and that mean nothing to `generate`.
_SETTINGS = ("until", "max_gen_toks")


class HarnessModel(TemplateLM):
    """A model for lm-eval, loaded when its first request comes: what is wrong with a task is told before."""

    def __init__(
        self,
        pretrained: Any,
        tokenizer: Any = None,
        revision: str | None = None,
        dtype: str = "auto",
        device: str | None = None,
        batch_size: int | str | None = "auto",
        max_batch_size: int | None = None,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        adapter: str | None = None,
        peft: str | None = None,
        runner: str = "auto",
        kv_cache: str = "auto",
        precision: str = "fast",
        store: str | None = None,
        trust_remote_code: bool = False,
        **unknown: Any,
    ) -> None:
        """pretrained: a folder, a file, a hub id, a model, or a function that gives one. batch_size: sequences in one
        step, "auto" for 64, with max_batch_size as its bound. max_length: tokens of the context (default: the model's).
        add_bos_token, prefix_token_id: as of lm-eval's hf class. adapter, or peft: a LoRA adapter. runner, kv_cache,
        precision: as of `llama2 generate`. store: a file that keeps finished requests, so that a killed run goes on.

        Raises InputError for an argument that it does not know or that cannot work.
        """
        super().__init__()
        if unknown:
            raise InputError(
                f"model_args {', '.join(unknown)} mean nothing to --model llama2; it takes pretrained, tokenizer, "
                "revision, dtype, max_length, max_gen_toks, add_bos_token, prefix_token_id, adapter, runner, kv_cache, "
                "precision and store"
            )
        if trust_remote_code:
            raise InputError("trust_remote_code=True: no code of a model's repository is run here; leave it out")
        if adapter is not None and peft is not None and adapter != peft:
            raise InputError(f"adapter={adapter} and peft={peft} name two adapters; give one")
        self._asked: dict[str, Any] = {
            "dtype": dtype,
            "device": _present(device),
            "runner": runner,
            "adapter": adapter or peft,
            "revision": revision,
        }
        self._pretrained, self._model = pretrained, None if isinstance(pretrained, str) else pretrained
        self._path = str(locate_all(pretrained, revision).path) if isinstance(pretrained, str) else ""
        self.tokenizer = self._tokenizer(tokenizer, revision)
        config = load_config(self._path) if self._path else pretrained.config
        self._config = config
        self._max_length = self._context(max_length, config.max_position_embeddings)
        self.batch_size = self._width(batch_size, max_batch_size)
        self.max_gen_toks, self.add_bos_token = int(max_gen_toks), add_bos_token
        self._prefix, self._runner, self._kv, self._precision = prefix_token_id, runner, kv_cache, precision
        about = [self._identity(), self._asked, kv_cache, precision, self._max_length, self.batch_size]
        self._blocks = BlockRunner(self._open, BlockStore(store, [llama2.__version__, STORED, about]))

    # -- what the harness asks of a model ------------------------------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        """The end of a text."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """The token in front of a text without context: BOS, or EOS where there is none."""
        if self._prefix is not None:
            return self._prefix
        bos = self.tokenizer.bos_token_id
        return int(self.tokenizer.eos_token_id if bos is None else bos)

    @property
    def max_length(self) -> int:
        """Tokens of the context."""
        return self._max_length

    @property
    def tokenizer_name(self) -> str:
        """A name for caches of requests: the tokenizer's path and a digest of its template."""
        template = str(getattr(self.tokenizer, "chat_template", ""))
        name = str(self._path or getattr(self.tokenizer, "name_or_path", "")).replace("/", "__")
        return f"{name}-{hashlib.sha256(template.encode()).hexdigest()[:8]}"

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """The ids of a text, with special tokens as the tokenizer says unless told otherwise, and never two BOS."""
        if add_special_tokens is None:
            add_special_tokens = self.add_bos_token
            if string.startswith(self.tokenizer.decode([self.prefix_token_id])):
                add_special_tokens = False
        settings = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        ids: list[int] = self.tokenizer(string, verbose=False, **settings)["input_ids"]
        return ids

    def tok_decode(self, tokens: Iterable[int] | int, skip_special_tokens: bool = True) -> str:
        """The text of ids."""
        ids = [tokens] if isinstance(tokens, int) else list(tokens)
        return str(self.tokenizer.decode(ids, skip_special_tokens=skip_special_tokens))

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The messages as the model's template renders them; without the system message where it refuses one."""
        if self.tokenizer.chat_template is None:
            raise InputError(f"{self._path or 'this model'} has no chat template; leave out --apply_chat_template")

        def rendered(messages: list[dict[str, str]]) -> str:
            return str(
                self.tokenizer.apply_chat_template(
                    messages,
                    tokenize=False,
                    add_generation_prompt=add_generation_prompt,
                    continue_final_message=not add_generation_prompt,
                )
            )

        try:
            return rendered(chat_history)
        except TokenizerError:
            rest = [message for message in chat_history if message["role"] != "system"]
            if len(rest) == len(chat_history):
                raise
            return rendered(rest)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, Sequence[int], Sequence[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        texts = [Scored((*context, *rest), len(context)) for _, context, rest in requests]

        def done(i: int, result: tuple[float, bool]) -> None:
            if requests[i][0] is not None:
                self.cache_hook.add_partial("loglikelihood", requests[i][0], result)

        return self._scored(texts, disable_tqdm, done)

    def _scored(
        self, texts: Sequence[Scored], quiet: bool, on_done: Callable[[int, tuple[float, bool]], None]
    ) -> list[tuple[float, bool]]:
        """Results of texts, with a bar."""
        texts = list(check_lengths(texts, self.max_length))
        with tqdm(total=len(texts), disable=quiet, desc="Running loglikelihood requests") as bar:

            def done(i: int, result: tuple[float, bool]) -> None:
                on_done(i, result)
                bar.update()

            return self._blocks.score(texts, done)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of whole texts, in windows of the context: each token is predicted once."""
        texts: list[Scored] = []
        counts = []
        for request in requests:
            (string,) = request.args
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(string),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            pairs = [make_disjoint_window(pair) for pair in windows]
            texts += [Scored((*context, *rest), len(context)) for context, rest in pairs]
            counts.append(len(pairs))
        results = iter(self._scored(texts, disable_tqdm, lambda i, result: None))
        totals = []
        for request, count in zip(requests, counts, strict=True):
            totals.append(sum(next(results)[0] for _ in range(count)))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, totals[-1])
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Completions of the requests' contexts up to their stop strings."""
        eos = self.tok_decode(self.eot_token_id, skip_special_tokens=False)
        prompts, stops = [], []
        for request in requests:
            context, asked = request.args
            settings = dict(normalize_gen_kwargs(asked, self.max_gen_toks))
            until = [stop for stop in handle_stop_sequences(settings.get("until"), eos=eos) if stop]
            most = int(settings["max_gen_toks"])
            if not 1 <= most < self.max_length:
                raise InputError(f"max_gen_toks is {most}; it must be between 1 and {self.max_length - 1}")
            tokens = self.tok_encode(context)[-(self.max_length - most) :]
            settings = {"max_new_tokens": most, **{k: v for k, v in settings.items() if k not in _SETTINGS}}
            if not settings.get("do_sample"):
                settings.pop("temperature", None)
            prompts.append(Generation(tuple(tokens), tuple(s for s in until if s != eos), settings, _seed(request)))
            stops.append(until)

        with tqdm(total=len(prompts), disable=disable_tqdm, desc="Running generate_until requests") as bar:

            def done(i: int, text: str) -> None:
                text = postprocess_generated_text(text, stops[i], None)
                self.cache_hook.add_partial("generate_until", requests[i].args, text)
                bar.update()

            found = self._blocks.generate(prompts, done)
        return [postprocess_generated_text(text, stop, None) for text, stop in zip(found, stops, strict=True)]

    def get_model_info(self) -> dict[str, Any]:
        """Returns the description of the model in a result."""
        return {"model_dtype": self._asked["dtype"], "precision": self._precision, "adapter": self._asked["adapter"]}

    def close(self) -> None:
        """Ends the engine."""
        self._blocks.close()

    # -- the model -----------------------------------------------------------------------------------------------

    def _tokenizer(self, tokenizer: Any, revision: str | None) -> Any:
        if tokenizer is not None and not isinstance(tokenizer, str):
            return tokenizer
        place = tokenizer or self._path
        if not place:
            raise InputError("a model object needs its tokenizer: HarnessModel(pretrained=model, tokenizer=tokenizer)")
        path = Path(place)
        if path.is_file() and path.suffix in (".safetensors", ".bin"):
            place = str(path.parent)
        return AutoTokenizer.from_pretrained(place, **revision_of(place, revision if tokenizer else None))

    def _context(self, asked: int | None, most: int) -> int:
        if asked is None:
            return int(most)
        if not 2 <= int(asked) <= most:
            raise InputError(f"max_length is {asked}; it must be between 2 and {most}, the context of this model")
        return int(asked)

    def _width(self, asked: int | str | None, most: int | None) -> int:
        """Sequences in one step. "auto:N", which has hf look for a batch size N times, is auto."""
        if isinstance(asked, str) and asked.split(":")[0] == "auto":
            return WIDTH if most is None else min(WIDTH, int(most))
        try:
            width = WIDTH if asked is None else int(asked)
        except ValueError:
            raise InputError(f"batch_size is {asked!r}; give auto or a number") from None
        if width < 1:
            raise InputError(f"batch_size is {width}; give auto or at least 1")
        return width

    def _identity(self) -> Any:
        """Identifies this model's files, and its adapter's, among others of the same paths."""
        if not self._path:
            return repr(type(self._pretrained))
        adapter = self._asked["adapter"]
        found: list[Any] = []
        for place in (Path(self._path), *(() if adapter is None else (locate(adapter, {}).path,))):
            files = [place] if place.is_file() else sorted(p for p in place.iterdir() if p.is_file())
            found += [str(place), [[p.name, p.stat().st_size, p.stat().st_mtime_ns] for p in files]]
        return found

    def _open(self) -> Engine:
        if self._model is None:
            self._model = open_model(self._path, **self._asked)
        elif not hasattr(self._model, "config") and callable(self._model):
            self._model = self._model()
        kv: KvDtype | None = None if self._kv == "auto" else self._kv  # type: ignore[assignment]
        config = self._config
        position = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4
        # By the machine's memory, not by what is free now: the same run has the same cache each time.
        room = total_bytes() // 8 // position
        tokens = max(min(CACHE_TOKENS, room), self.max_length + PAGE)
        return Engine(
            self._model,
            self.tokenizer,
            cache_tokens=tokens,
            width=self.batch_size,
            runner=self._runner,
            kv_cache=kv,
            precision=self._precision,
        )


def _present(device: str | None) -> str | None:
    """The device; None, which is the best one here, for a GPU that this machine lacks: lm-eval's command line asks for
    cuda:0 where its user says nothing, and its hf class falls back too."""
    if device is None or not device.startswith("cuda"):
        return device
    import torch

    if torch.cuda.is_available():
        return device
    logging.getLogger("lm_eval").warning("device %s is not here; the CPU computes", device)
    return None


def _seed(request: Any) -> int:
    """A seed for sampling that depends on the request and on lm-eval's seed alone."""
    import torch

    text = json.dumps([torch.initial_seed(), request.args, getattr(request, "idx", 0)], sort_keys=True, default=str)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")
