"""What several APIs tell of a served model: its size, its parameters, how its weights are kept."""

import hashlib
from datetime import UTC, datetime

from llama2.serve.served_model import ServedModel


def weight_bytes(model: ServedModel) -> int:
    """Bytes of the weights in memory."""
    weights = getattr(model.engine.runner, "weights", None)
    return int(weights.nbytes if weights is not None else sum(p.nbytes for p in model.engine.model.parameters()))


def weight_type(model: ServedModel) -> str:
    """F32, BF16 or F16, or for packed weights Q and the bits of one weight, rounded."""
    bits = weight_bytes(model) * 8 / model.engine.model.config.num_parameters
    if bits > 12:
        return {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}.get(
            str(model.engine.model.dtype).removeprefix("torch."), f"{bits:.0f} bits"
        )
    return f"Q{bits:.0f}"


def parameter_size(model: ServedModel) -> str:
    """The number of parameters, as 6.7B or 134.5M."""
    count = model.engine.model.config.num_parameters
    return f"{count / 1e9:.1f}B" if count >= 1e9 else f"{count / 1e6:.1f}M"


def digest(model: ServedModel, name: str) -> str:
    """Tells one model from another: 64 hexadecimal digits of its name, revision and sizes."""
    known = f"{name}\0{model.policy.revision or ''}\0{sorted(model.engine.model.config.to_dict().items(), key=str)}"
    return hashlib.sha256(known.encode()).hexdigest()


def timestamp(seconds: float) -> str:
    """A time as RFC 3339 has it, in UTC."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
