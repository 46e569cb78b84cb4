"""The tasks `needle` and `position` of `llama2 evaluate`, and their pictures."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama2.cli import numbers, texts
from llama2.cli.loading import RunOptions, load, load_tokenizer
from llama2.cli.variants import Variant
from llama2.errors import InputError

if TYPE_CHECKING:
    from llama2.cli.evaluate import EvaluateOptions

ROPE_TYPES = ("linear", "dynamic", "yarn")


def read_text(options: "EvaluateOptions") -> str:
    """The text that prompts are cut from. Raises InputError where none is given."""
    if options.text is None:
        raise InputError("the tasks needle and position need a long text; add --text FILE")
    return texts.read([options.text])


def measure(options: "EvaluateOptions", variant: Variant, name: str, tasks: list[str], text: str) -> list[Any]:
    """The rows of one model: of `needle` the share found by length and depth, of `position` the loss by position."""
    from llama2.evaluate import long_context
    from llama2.evaluate.steps import make_steps

    lengths = numbers.read("--lengths", options.lengths, 1024, 8)
    depths = _depths(options.depths)
    prompts: Any = None
    if "needle" in tasks:  # refused before the model is loaded
        prompts = long_context.needles(
            load_tokenizer(variant.path), text, lengths, depths, options.trials, options.seed
        )
    model, tokenizer = _opened(options, variant)
    context = model.config.max_position_embeddings
    most = max(lengths) + (long_context.ANSWER_TOKENS if prompts is not None else 0)
    if most > context:
        raise InputError(f"--lengths {max(lengths)} and an answer need {most} positions and {name} has {context}")
    found = []
    if prompts is not None:
        from llama2.engine.engine import Engine

        with Engine(
            model, tokenizer, cache_tokens=max(4 * most, 4096), runner=options.runner, kv_cache=options.cache_dtype,
            precision=options.precision, waiting=len(prompts) + 64,
        ) as engine:  # fmt: skip
            hits = long_context.find_needles(engine, prompts)
        found += long_context.needle_rows(name, prompts, hits)[0]
    if "position" in tasks:
        ids = tokenizer(text, verbose=False)["input_ids"]
        runner = make_steps(model, options.runner, options.cache_dtype, options.precision)
        for length in lengths:
            losses = long_context.loss_by_position(model, ids, length, runner)
            found += long_context.position_rows(name, length, losses)
    return found


def _depths(text: str) -> list[float]:
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"--depths {text!r} are no numbers; give a list such as 0,0.5,1") from None
    if not all(0 <= depth <= 1 for depth in found):
        raise InputError(f"--depths {text!r}: each must lie between 0, the beginning, and 1, the end")
    return found


def rope_settings(text: str) -> tuple[str, float]:
    """TYPE:FACTOR of a variant's rope=. Raises InputError for others."""
    kind, _, factor = text.partition(":")
    if kind not in ROPE_TYPES or not factor.replace(".", "", 1).isdecimal() or float(factor) <= 1:
        raise InputError(f"rope={text!r}: give TYPE:FACTOR, a type of {', '.join(ROPE_TYPES)} and a factor above 1")
    return kind, float(factor)


def _opened(options: RunOptions, variant: Variant) -> tuple[Any, Any]:
    """Model and tokenizer, with its positions scaled where the variant says so."""
    if "rope" not in variant.settings:
        return load(options)
    from llama2.auto import AutoModelForCausalLM

    kind, factor = rope_settings(variant.settings["rope"])
    if options.adapter is not None:
        raise InputError("rope= and adapter= are two settings that do not go together; merge the adapter first")
    config_changes: dict[str, Any] = {"rope_scaling": {"rope_type": kind, "factor": factor}}
    from llama2.auto import load_config

    config = load_config(variant.path)
    config_changes["max_position_embeddings"] = int(config.max_position_embeddings * factor)
    if kind in ("yarn", "dynamic"):
        config_changes["rope_scaling"]["original_max_position_embeddings"] = config.max_position_embeddings
    if kind == "dynamic":  # its base grows beyond the context that the configuration names
        config_changes["max_position_embeddings"] = config.max_position_embeddings
    model = AutoModelForCausalLM.from_pretrained(
        variant.path, dtype=options.dtype, device_map=options.device, **config_changes
    )
    return model, load_tokenizer(variant.path)


def draw(rows: list[Any], folder: Path) -> None:
    """needle-MODEL.svg for each model, and position.svg with all of them."""
    from llama2.evaluate import picture
    from llama2.files import write_bytes

    series: dict[str, list[tuple[float, float, float | None]]] = {}
    cells: dict[str, dict[tuple[float, int], float]] = {}
    for row in rows:
        if row.test.startswith("loss near position "):
            window = row.details.get("window")
            place = (row.details["position"], row.value, row.error)
            series.setdefault(f"{row.model} @ {window}", []).append(place)
        elif row.test.startswith("needle found @ "):
            length, _, depth = row.test.removeprefix("needle found @ ").partition(" tokens, depth ")
            cells.setdefault(row.model, {})[float(depth.rstrip("%")) / 100, int(length)] = row.value / 100
    if series:
        made = picture.lines("Loss by position", "position in the window", "nats per token", series)
        write_bytes(folder / "position.svg", made.encode())
    for name, found in cells.items():
        depths, lengths = sorted({d for d, _ in found}), sorted({n for _, n in found})
        made = picture.shares(
            f"Needle found: {name}", "tokens of the prompt", "depth", [str(n) for n in lengths],
            [f"{d:.0%}" for d in depths], [[found[d, n] for n in lengths] for d in depths],
        )  # fmt: skip
        plain = "".join(c if c.isalnum() or c in "-_.=" else "_" for c in name)
        write_bytes(folder / f"needle-{plain}.svg", made.encode())
