"""The models of `llama2 serve` where there are several: those that the command names, and those of a folder."""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama2.cli import terminal
from llama2.cli.loading import load_tokenizer, model_path, on_cpu
from llama2.errors import InputError

if TYPE_CHECKING:
    from llama2.cli.serve import ServeOptions
    from llama2.serve.facts import Facts
    from llama2.serve.model_pool import ModelPool, Offer
    from llama2.serve.policy import Policy
    from llama2.serve.served_model import ServedModel

MOST = 4  # models loaded at once
KEEP = "5m"
SHARE = 0.9  # of the memory that is free at the start, for all models together
LEVELS = 3  # of folders below --models
_PART = re.compile(r"-\d{5}-of-\d{5}$")
Make = Callable[["ServeOptions", int], tuple[Any, Any]]  # options and bytes of the cache -> engine and bounds


def several(options: "ServeOptions") -> bool:
    """Whether models come and go: several are named, or a folder of them, or how long one stays."""
    return len(options.paths) > 1 or options.models is not None or options.keep_alive is not None


def check(options: "ServeOptions") -> None:
    """Raises InputError for what can be said of one model only."""
    refused = {
        "--adapter": options.adapter is not None,
        "--lora-adapters": bool(options.lora_adapters),
        "--draft": options.draft is not None,
        "--tensor-parallel": options.tensor_parallel is not None and options.tensor_parallel > 1,
        "--revision": options.revision is not None,
        "--served-model-name": any(name != "*" for name in options.served_model_name) and not _alone(options),
    }
    if given := [name for name, on in refused.items() if on]:
        raise InputError(
            f"{given[0]} is of one model, and this server has several that come and go; serve that model by itself, "
            "without --models and --keep-alive"
        )
    if options.models is not None and not Path(options.models).is_dir():
        raise InputError(f"--models is {options.models!r}, which is no folder; give one that holds models")


def _alone(options: "ServeOptions") -> bool:
    return len(options.paths) < 2 and options.models is None


def make_pool(options: "ServeOptions", policy: "Policy", make: Make) -> "ModelPool":
    """The pool of a server's models. Raises InputError, CheckpointError for a named model that cannot be served."""
    from llama2.serve.model_pool import ModelPool
    from llama2.serve.numbers import seconds

    most = MOST if options.max_models is None else options.max_models
    memory = int(_free(options) * SHARE)
    maker = _Maker(options, policy, make, memory, most)
    named = [maker.offer(path, *_names(path, options)) for path in _named(options)]
    for offer in named:
        assert offer.describe is not None
        offer.facts = offer.describe()  # what is wrong with its files is told now

    def catalog() -> "Sequence[Offer]":
        return [*named, *(maker.in_folder(Path(options.models)) if options.models is not None else ())]

    try:
        keep = seconds(KEEP if options.keep_alive is None else options.keep_alive)
    except ValueError as error:
        raise InputError(f"--keep-alive: {error}") from None
    pool = ModelPool(catalog, most=most, keep=keep, memory=memory, room=lambda: _free(options))
    pool.put(catalog())
    _tell(pool, options)
    return pool


def _tell(pool: "ModelPool", options: "ServeOptions") -> None:
    if not pool.offers:
        terminal.notice(f"llama2: {options.models} holds no model yet; what is put there is offered at once")
        return
    names = "\n".join(f"  {offer.name}" for offer in pool.offers)
    terminal.notice(
        f"llama2: {len(pool.offers)} models, each loaded at its first request; {pool.most} at once at most, in "
        f"{pool.memory / 2**30:.1f} GiB\n{names}"
    )


def _named(options: "ServeOptions") -> list[str]:
    given = list(options.paths) or ([options.model] if options.model is not None else [])
    if not given and options.models is None:
        given = [model_path(None)]
    return list(dict.fromkeys(given))


def _names(path: str, options: "ServeOptions") -> tuple[tuple[str, ...], tuple[str, ...]]:
    from llama2.serve.names import ANY, names_of

    names, aliases = names_of(path, options.served_model_name if _alone(options) else ())
    catches = ANY in options.served_model_name and path == _named(options)[0]
    return names, (*aliases, ANY) if catches and ANY not in names else aliases


def _free(options: "ServeOptions") -> int:
    """Bytes that models can take now, where they run."""
    from llama2.memory import available_bytes

    if on_cpu(options.device):
        return available_bytes()
    import torch

    return int(torch.cuda.mem_get_info(torch.device("cuda" if options.device == "auto" else options.device))[0])


class _Maker:
    """Makes offers of paths."""

    def __init__(self, options: "ServeOptions", policy: "Policy", make: Make, memory: int, most: int) -> None:
        from llama2.serve.limits import CACHE_SHARE

        self.options, self.policy, self.make = options, policy, make
        self.cache = int(memory * CACHE_SHARE / most)  # bytes, of one model

    def offer(self, given: str, names: tuple[str, ...], aliases: tuple[str, ...]) -> "Offer":
        """One model; given: a path, a hub id or a name."""
        from llama2.serve.model_pool import Offer

        path = model_path(given)
        options = replace(self.options, model=given, paths=())
        key = (path, *_stamp(Path(path)))
        return Offer(names, aliases, lambda: self.load(options, names, aliases), lambda: self.describe(path), key)

    def load(self, options: "ServeOptions", names: tuple[str, ...], aliases: tuple[str, ...]) -> "ServedModel":
        """The model, behind its engine."""
        from llama2.serve.served_model import ServedModel

        engine, bounds = self.make(options, self.cache)
        return ServedModel(engine, bounds, self.policy, names, aliases)

    def describe(self, path: str) -> "Facts":
        """Reads the facts in a model's files. Raises CheckpointError, ConfigError, TokenizerError."""
        from llama2.cli.inspect import read
        from llama2.cpu import KvDtype, bytes_per_value
        from llama2.serve.facts import Facts, weight_type
        from llama2.stored_arrays import DTYPES, WIDTHS

        headers, options = read(path), self.options
        config = headers.config
        size = headers.file_bytes or 2 * headers.parameters
        held = size if options.dtype == "auto" else DTYPES[WIDTHS[options.dtype]].itemsize * headers.parameters
        context = min(options.max_total_tokens or config.max_position_embeddings, config.max_position_embeddings)
        wanted = options.wanted()
        kept: KvDtype = "bfloat16" if options.kv_cache == "auto" else options.kv_cache
        each = config.kv_bytes_per_token(bytes_per_value(kept, config.head_dim))
        cache = min(wanted.max_batch_size * context * each, self.cache)
        if wanted.max_batch_total_tokens is not None:
            cache = wanted.max_batch_total_tokens * each
        template = load_tokenizer(path).chat_template if Path(path).exists() else None
        return Facts(
            config,
            size,
            weight_type(size, headers.parameters, config.dtype_name or "float32"),
            context,
            needs=held + cache,
            template=template if isinstance(template, str) else None,
            tools=headers.chat_template,
            modified=_stamp(Path(path))[1] / 1e9,
            on_device=not on_cpu(options.device),
        )

    def in_folder(self, folder: Path) -> "list[Offer]":
        """The models of a folder, by the places that they have in it."""
        found = dict[str, Path]()
        for name, path in _models_in(folder, LEVELS):
            found.setdefault(name if name not in found else path.relative_to(folder).as_posix(), path)
        offers = []
        for name, path in sorted(found.items()):
            aliases = dict.fromkeys((name.rpartition("/")[2], path.name, path.relative_to(folder).as_posix()))
            offers.append(self.offer(str(path), (name,), tuple(alias for alias in aliases if alias != name)))
        return offers


def _models_in(folder: Path, levels: int, before: str = "") -> Iterator[tuple[str, Path]]:
    """(name, path) of every model in a folder and those below it, as many levels down."""
    from llama2.checkpoint import gguf_models
    from llama2.cli.store import kind_of

    for file in gguf_models(folder):
        yield before + _PART.sub("", file.stem), file
    for inner in sorted(place for place in folder.iterdir() if place.is_dir() and not place.name.startswith(".")):
        if kind_of(inner) not in (None, "adapter"):
            yield before + inner.name, inner
        elif levels > 1:
            yield from _models_in(inner, levels - 1, f"{before}{inner.name}/")


def _stamp(path: Path) -> tuple[int, int]:
    """Size and time, which tell whether a model's files were changed; (0, 0) of what is no path."""
    try:
        state = path.stat()
        return state.st_size, state.st_mtime_ns
    except OSError:
        return 0, 0
