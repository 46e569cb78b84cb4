"""Facts about a model that several APIs report, loaded or not: its size, its parameters, how its weights are kept."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

from llama2.config import LlamaConfig
from llama2.cpu import CpuModel
from llama2.serve.served_model import ServedModel


@dataclass(frozen=True)
class Facts:
    """One model. bytes: of its weights. needs: bytes of memory that it takes once it is loaded, its cache included.
    context: tokens of prompt and answer at most. settings: of its generation_config, as far as they are known.
    modified: seconds since 1970. tools: whether its chats may call functions."""

    config: LlamaConfig
    bytes: int
    weight_type: str
    context: int
    needs: int = 0
    template: str | None = None
    tools: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)
    modified: float = 0.0
    on_device: bool = False

    @property
    def format(self) -> str:
        """The format of its files, as Ollama names it."""
        return "gguf" if self.weight_type.startswith("Q") else "safetensors"

    @property
    def parameter_size(self) -> str:
        """The number of parameters, as 6.7B or 134.5M."""
        count = self.config.num_parameters
        return f"{count / 1e9:.1f}B" if count >= 1e9 else f"{count / 1e6:.1f}M"

    def digest(self, name: str, revision: str | None) -> str:
        """Tells one model from another: 64 hexadecimal digits of its name, revision and sizes."""
        known = f"{name}\0{revision or ''}\0{sorted(self.config.to_dict().items(), key=str)}"
        return hashlib.sha256(known.encode()).hexdigest()


def facts_of(model: ServedModel, modified: float) -> Facts:
    """Those of a loaded model."""
    settings = model.engine.model.generation_config
    size, config = weight_bytes(model), model.engine.model.config
    stored = dtype_name(model)
    template = model.tokenizer.chat_template
    return Facts(
        config,
        size,
        weight_type(size, config.num_parameters, stored),
        model.bounds.max_total_tokens,
        template=template if isinstance(template, str) else None,
        tools=template is not None and model.compiler is not None,
        settings={k: settings.value(k) for k in ("temperature", "top_k", "top_p") if settings.is_set(k)},
        modified=modified,
        on_device=device_type(model) != "cpu",
    )


def measured(known: Facts, model: ServedModel) -> Facts:
    """The facts in a model's files, with those known once it is loaded."""
    now, engine = facts_of(model, known.modified), model.engine
    drafts = engine.drafter.runner.bytes_per_page if engine.drafter else 0
    needs = now.bytes + engine.runner.pages * (engine.runner.bytes_per_page + drafts)
    return replace(known, needs=needs, context=now.context, settings=now.settings, template=now.template)


def weight_bytes(model: ServedModel) -> int:
    """Bytes of the weights in memory."""
    weights = model.engine.runner.weights
    return int(weights.nbytes if weights is not None else sum(p.nbytes for p in model.engine.model.parameters()))


def dtype_name(model: ServedModel) -> str:
    """The dtype of its weights, where they are not packed."""
    own = model.engine.model
    return str(own.config.dtype_name if isinstance(own, CpuModel) else own.dtype).removeprefix("torch.")


def device_type(model: ServedModel) -> str:
    """Where it runs: cpu or cuda."""
    own = model.engine.model
    return "cpu" if isinstance(own, CpuModel) else str(own.device.type)


def weight_type(size: int, parameters: int, stored: str) -> str:
    """F32, BF16 or F16, or for packed weights Q and the bits of one weight, rounded.

    size: bytes of all weights. stored: the name of their dtype.
    """
    bits = size * 8 / parameters
    if bits > 12:
        return {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}.get(stored, f"{bits:.0f} bits")
    return f"Q{bits:.0f}"


def timestamp(seconds: float) -> str:
    """A time as RFC 3339 has it, in UTC."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
