"""The loss of quantising quantised weights again: reported after a conversion, with its measure on a text."""

from collections.abc import Mapping
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

from llama2.cli.compare import CompareOptions, compared_with_model
from llama2.errors import Llama2Error

WINDOW = 512


def tell(loss: Mapping[str, Any], source: str, target: Path, tokens: int) -> None:
    """Prints the error of the weights, and what `compare` finds on the first `tokens` of the text in the package.

    source: what the weights were before; tokens: 0 for the weights' error alone."""
    kinds = ", ".join(f"{count} of {kind}" for kind, count in loss["kinds"].items())
    name, most = loss["worst"]
    print(
        f"quantised again: {kinds}; the weights moved by {100 * loss['error']:.2f} % (root mean square; most in "
        f"{name}, {100 * most:.2f} %), beside what they had lost before"
    )
    if tokens:
        print(f"measured: {_measured(source, target, tokens)}")


def _measured(source: str, target: Path, tokens: int) -> str:
    from llama2.auto import load_config
    from llama2.quantize.measure import why_not

    try:
        if reason := why_not(source):
            return f"nothing, {reason}; `llama2 compare {source} {target} TEXT` does on a larger machine"
        window = min(WINDOW, load_config(target).max_position_embeddings, tokens // 2)
        with as_file(files("llama2") / "quantize" / "calibration.txt") as text:
            options = CompareOptions(paths=(source, str(target), str(text)), window=window, chunks=tokens // window)
            report = compared_with_model(options)
    except Llama2Error as error:
        return f"nothing: {error}"
    rows = {row.test: row for row in report.rows}
    ratio, kl, same = (rows[name] for name in ("perplexity ratio", "mean KL divergence", "same first choice"))
    before, after = rows["perplexity of the base"].value, rows["perplexity"].value
    return (
        f"perplexity {before:.3f} before, {after:.3f} after ({100 * (ratio.value - 1):+.2f}{_error(ratio, 100)} %), "
        f"mean KL divergence {kl.value:.4f}{_error(kl)} nats, the same first choice for {same.value:.1f}{_error(same)} "
        f"% of {tokens // window * (window // 2)} tokens of the text in the package (`llama2 compare` takes yours)"
    )


def _error(row: Any, factor: float = 1.0) -> str:
    return "" if row.error is None else f" ± {factor * row.error:.2g}"
