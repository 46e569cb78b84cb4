"""`llama2 info`: what a model is and what it needs, from headers alone."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llama2.checkpoint.adapter_header import facts
from llama2.checkpoint.foreign import Foreign, recognise
from llama2.cli.args import option
from llama2.cli.inspect import WEIGHTS, Headers, main_type, read
from llama2.cli.loading import ModelOptions, model_path
from llama2.config import LlamaConfig
from llama2.errors import InputError

# Bits per weight of the linear layers; embeddings, head and norms stay in 16 bits where the layers are quantised.
PRECISIONS: dict[str, tuple[float, float]] = {  # name -> (linear layers, the rest)
    "float32": (32, 32),
    "bfloat16": (16, 16),
    "int8": (8, 16),
    "4-bit": (4.5, 16),
}


@dataclass(frozen=True, kw_only=True)
class InfoOptions(ModelOptions):
    """Describe a model: parameters, architecture, what its file holds, and the memory it needs. Reads headers only.

    Also knows the published sizes without any file: `llama2 info -m 7b` (13b, 34b, 70b, ...)."""

    file: tuple[str, ...] = option((), "the same as -m MODEL", metavar="MODEL", positional=True, replaces="model")
    json: bool = option(False, "one JSON object instead of text")


def run(options: InfoOptions) -> int:
    """Runs the command."""
    if len(options.file) + (options.model is not None) > 1:
        raise InputError(f"info describes one model, but {[*options.file, options.model or '']} were given; give one")
    path = model_path(options.file[0] if options.file else options.model)
    if Path(path).is_file():
        known = recognise(Path(path))
        if known is None and (said := facts(Path(path))) is not None:
            known = Foreign("GGUF LoRA adapter", "", said, "gguf")
        if known is not None:
            return _show_foreign(Path(path), known, options.json)
    headers = read(path, options.revision)
    if options.json:
        import json

        print(json.dumps(as_dict(headers), indent=2))
    else:
        print(as_text(headers))
    return 0


def _show_foreign(path: Path, known: Foreign, as_json: bool) -> int:
    """Prints the header of another program's file, and whether it can be run here."""
    facts = {"format": f"{known.format}, {size(path.stat().st_size)}", **known.facts}
    facts |= {} if known.reader else {"not run here": known.remedy}
    if as_json:
        import json

        facts = {"name": path.name, **facts, "format": known.format, "file_bytes": str(path.stat().st_size)}
        print(json.dumps(facts, indent=2))
    else:
        print("\n".join([path.name, *_rows(facts)]))
    return 0


def linear_parameters(config: LlamaConfig) -> int:
    """Weights of the layers' matrices: what quantisation shrinks."""
    attention = 2 * config.head_dim * (config.num_attention_heads + config.num_key_value_heads) * config.hidden_size
    return config.num_hidden_layers * (attention + 3 * config.hidden_size * config.intermediate_size)


def weight_bytes(headers: Headers) -> dict[str, int]:
    """Bytes of the weights at each precision."""
    linear = linear_parameters(headers.config)
    rest = headers.parameters - linear
    return {name: int((linear * a + rest * b) / 8) for name, (a, b) in PRECISIONS.items()}


def as_dict(headers: Headers) -> dict[str, Any]:
    """Everything that the text shows, as plain numbers."""
    config = headers.config
    return {
        "name": headers.name,
        "format": headers.format,
        "file_bytes": headers.file_bytes,
        "parameters": headers.parameters,
        "parameters_by_config": config.num_parameters,
        "tensor_types": {kind: asdict(share) for kind, share in headers.types.items()},
        "tokenizer": headers.tokenizer,
        "chat_template": headers.chat_template,
        "licence": headers.licence,
        "quantisation": headers.quantisation,
        "weight_bytes": weight_bytes(headers),
        "kv_bytes_per_token": config.kv_bytes_per_token(),
        "kv_bytes_full_context": config.kv_bytes_per_token() * config.max_position_embeddings,
        "config": config.to_diff_dict(),
    }


def as_text(headers: Headers) -> str:
    """The report for people."""
    config = headers.config
    lines = [headers.name, *_rows(_about(headers))]
    if headers.types:
        lines += ["", *_tensor_table(headers)]
    memory = {name: size(count) for name, count in weight_bytes(headers).items()}
    memory["int8"] += "   (embeddings and head in 16 bits)"
    memory["4-bit"] += "   (4.5 bits per weight with the scales; embeddings and head in 16 bits)"
    lines += ["", "memory of the weights", *_rows(memory)]
    per_token = config.kv_bytes_per_token()
    context = config.max_position_embeddings
    cache = {"per token": f"{per_token:,} bytes", f"{context:,} tokens": f"{size(per_token * context)}"}
    lines += ["", "KV cache in 16 bits", *_rows(cache)]
    if headers.types and headers.countable and headers.parameters != config.num_parameters:
        lines += ["", f"note: by its configuration the model has {config.num_parameters:,} parameters"]
    return "\n".join(lines)


def _about(headers: Headers) -> dict[str, str]:
    config = headers.config
    bits = 8 * sum(share.bytes for share in headers.types.values()) / max(1, headers.parameters)
    heads = f"{config.num_attention_heads} heads of {config.head_dim}"
    if config.num_key_value_heads != config.num_attention_heads:
        heads += f" ({config.num_key_value_heads} for keys and values)"
    rope = {key: value for key, value in config.rope_parameters.items() if key not in ("rope_type", "rope_theta")}
    rope_text = f"RoPE {config.rope_parameters['rope_type']}, base {config.rope_theta:g}"
    about = {"format": headers.format}
    if headers.quantisation is not None:
        about["quantisation"] = headers.quantisation + ("" if headers.runs else ": not run here")
    if headers.types:
        about["format"] += f", {size(headers.file_bytes)}, mostly {main_type(headers)}, {bits:.2f} bits per weight"
    about |= {
        "parameters": f"{headers.parameters:,}" + ("" if headers.countable else " by the configuration"),
        "architecture": f"Llama: {config.num_hidden_layers} layers, width {config.hidden_size}, "
        f"feed-forward {config.intermediate_size}, {heads}",
        "vocabulary": f"{config.vocab_size:,}, {'tied' if config.tie_word_embeddings else 'separate'} head",
        "context": f"{config.max_position_embeddings:,} tokens, {rope_text}" + (f" {rope}" if rope else ""),
    }
    if headers.types:
        about["tokenizer"] = headers.tokenizer or "none beside the weights"
        about["chat template"] = "yes" if headers.chat_template else "no"
        about["licence"] = headers.licence or "not stated"
    return about


def _tensor_table(headers: Headers) -> list[str]:
    lines = [f"  {'type':<18}{'tensors':>8}{'weights':>18}{'bytes':>18}"]
    for kind, share in sorted(headers.types.items(), key=lambda item: -item[1].bytes):
        weights = f"{share.parameters:,}" if headers.countable or kind in WEIGHTS else "-"
        lines.append(f"  {kind:<18}{share.tensors:>8,}{weights:>18}{share.bytes:>18,}")
    return lines


def _rows(table: dict[str, str]) -> list[str]:
    return [f"  {name:<14}{value}" for name, value in table.items()]


def size(count: float) -> str:
    """Bytes for people, in powers of ten: 98.9 MB."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 999.5:  # else three digits round up to 1e+03
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
