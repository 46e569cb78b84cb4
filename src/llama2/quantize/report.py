"""Report of a quantisation: as JSON beside the result and as a picture of the errors."""

import html
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from llama2.files import write_text
from llama2.quantize.layer import GROUPS


@dataclass(frozen=True)
class LinearReport:
    """One linear. output_error: |X (W - Q)^T| / |X W^T| over the calibration inputs that the quantised layers before
    it give, tokens weighted as for the solver (None without calibration); weight_error: |W - Q| / |W|. bits: of the
    file per weight."""

    path: str
    kind: str
    bits: float
    output_error: float | None
    weight_error: float
    damp: float
    seconds: float


@dataclass
class Report:
    """The whole job. calibration and measured are said in words where there is none. Sizes are bytes of weights files,
    bits_per_weight of the linears that were quantised, peak_memory bytes of this run of the process. quantized_before:
    the types of a source that was quantised already, whose errors the result has too."""

    method: str
    source: str
    target: str
    options: dict[str, Any]
    settings: dict[str, Any] | None
    calibration: dict[str, Any] | None
    linears: list[LinearReport] = field(default_factory=list)
    bits_per_weight: float = 0.0
    bytes_before: int = 0
    bytes_after: int = 0
    perplexity: dict[str, Any] = field(default_factory=dict)
    tokens_per_second: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    peak_memory: int = 0
    resumed_layers: int = 0
    quantized_before: list[str] = field(default_factory=list)

    def write(self, json_file: Path, picture: Path) -> None:
        """Writes both files."""
        write_text(json_file, json.dumps(asdict(self), indent=2) + "\n")
        write_text(picture, draw(self.linears, f"{self.method}, {Path(self.source).name}"))

    def by_layer(self) -> list[dict[str, float]]:
        """For each layer {linear: error}: of the outputs where there was calibration, else of the weights."""
        layers: dict[int, dict[str, float]] = {}
        for linear in self.linears:
            parts = linear.path.split(".")
            if "layers" in parts:
                error = linear.weight_error if linear.output_error is None else linear.output_error
                layers.setdefault(int(parts[2]), {})[parts[-1]] = error
        return [layers[i] for i in sorted(layers)]


# -- the picture -------------------------------------------------------------------------------------------------

LINEARS = tuple(name.rpartition(".")[2] for group in GROUPS for name in group)
# Okabe and Ito's colours, which people who see colours differently can tell apart.
_COLOURS = ("#0072b2", "#56b4e9", "#009e73", "#e69f00", "#cc79a7", "#d55e00", "#555555")
_WIDTH, _HEIGHT, _LEFT, _TOP, _BOTTOM = 960, 360, 56, 48, 64


def draw(linears: Sequence[LinearReport], title: str) -> str:
    """An SVG bar chart: for each layer a bar per linear, its relative error in percent."""
    report = Report("", "", "", {}, None, None, list(linears))
    layers = report.by_layer()
    calibrated = any(linear.output_error is not None for linear in linears)
    top = max((error for layer in layers for error in layer.values()), default=0.0) or 1.0
    slot = (_WIDTH - _LEFT - 16) / max(1, len(layers))
    bar, floor = slot * 0.84 / len(LINEARS), _HEIGHT - _BOTTOM
    scale = (floor - _TOP) / top
    parts = [_text(_LEFT, 20, f"{title}: relative error of the {'outputs' if calibrated else 'weights'} by layer", 15)]
    for step in range(5):
        level = top * step / 4
        y = floor - level * scale
        parts.append(f'<line x1="{_LEFT}" y1="{y:.1f}" x2="{_WIDTH - 16}" y2="{y:.1f}" stroke="#ddd"/>')
        parts.append(_text(_LEFT - 6, y + 4, f"{100 * level:.3g} %", 11, "end"))
    every = max(1, len(layers) // 16)
    for i, layer in enumerate(layers):
        left = _LEFT + i * slot + slot * 0.08
        for j, name in enumerate(LINEARS):
            height = layer.get(name, 0.0) * scale
            label = f"layer {i}, {name}: {100 * layer.get(name, 0.0):.3g} %"
            parts.append(
                f'<rect x="{left + j * bar:.1f}" y="{floor - height:.1f}" width="{bar:.2f}" height="{height:.1f}" '
                f'fill="{_COLOURS[j]}"><title>{html.escape(label)}</title></rect>'
            )
        if i % every == 0:
            parts.append(_text(left + slot * 0.42, floor + 16, str(i), 11, "middle"))
    for j, name in enumerate(LINEARS):
        x = _LEFT + j * 125
        parts.append(f'<rect x="{x}" y="{_HEIGHT - 24}" width="11" height="11" fill="{_COLOURS[j]}"/>')
        parts.append(_text(x + 16, _HEIGHT - 14, name, 12))
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" font-family="sans-serif">\n'
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>\n{body}\n</svg>\n'
    )


def _text(x: float, y: float, text: str, size: int, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}">{html.escape(text)}</text>'
