"""The job from end to end: every method, the driver against a whole model in memory, resume, the report."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llama2 import AutoModelForCausalLM, LlamaForCausalLM
from llama2.checkpoint import convert
from llama2.checkpoint import open as open_checkpoint
from llama2.checkpoint.quantized import unpacked
from llama2.errors import CheckpointError, InputError
from llama2.quantization.gptq_solver import Hessian
from llama2.quantize.calibration import calibrate
from llama2.quantize.hessian import make_hessian
from llama2.quantize.job import quantize
from llama2.quantize.layer import GROUPS
from llama2.quantize.methods import make_method
from llama2.quantize.options import QuantizationSettings

pytestmark = pytest.mark.filterwarnings("ignore:there is no tokenizer")

LENGTH = 32
COMMON: dict[str, Any] = {"samples": 12, "length": LENGTH, "precision": "float32", "eval_tokens": 64}
METHODS: dict[str, dict[str, Any]] = {
    "gptq": {},
    "gptq act-order": {"method": "gptq", "act_order": True, "group_size": 32, "mse": False, "passes": 1},
    "gptq asym": {"method": "gptq", "sym": False, "format": "gptq_v2", "true_sequential": False},
    "gptq 3 bits, whole rows": {"method": "gptq", "bits": 3, "group_size": -1},
    "nf4": {},
    "fp4": {"double_quant": True},
    "int8": {},
    "nf4 solved": {"method": "nf4", "calibrate": True, "double_quant": True},
    "int8 solved": {"method": "int8", "calibrate": True},
    "gguf:q4_0": {"solve": True},
    "gguf:q8_0": {"calibrate": False},
    "gguf:q4_k": {},
}  # fmt: skip


def target_of(method: str, tmp_path: Path) -> Path:
    return tmp_path / ("out.gguf" if method.startswith("gguf") else "out")


def run(source: Path, target: Path, text: str, letters: Any, method: str = "gptq", **options: Any) -> Any:
    return quantize(source, target, method, data=[text], tokenizer=letters, **{**COMMON, **options})


@pytest.mark.parametrize("name", METHODS)
def test_every_method(name: str, source: Path, tmp_path: Path, text: str, letters: Any) -> None:
    options = {"method": name, **METHODS[name]}
    method = options.pop("method")
    target = target_of(method, tmp_path)
    report = run(source, target, text, letters, method, **options)
    made = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    plain = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    ids = torch.tensor([letters(text[:LENGTH])["input_ids"]])
    with torch.inference_mode():
        wanted, found = plain(ids).logits, made(ids).logits
    change = (found - wanted).norm() / wanted.norm()
    assert 0 < change < (0.03 if "8" in name else 0.6)
    assert len(report.linears) == 21 + (method.startswith("gguf") and report.calibration is not None)
    assert report.perplexity["tokens"] == 63 and report.tokens_per_second["after"] > 0
    assert report.bytes_after < 0.8 * report.bytes_before
    assert not list(tmp_path.glob(".*"))
    stem = tmp_path / "out.gguf." if target.suffix else target / ""
    told = json.loads(Path(f"{stem}{'report.json' if target.suffix else '/report.json'}").read_text())
    assert told["linears"][0]["path"] == "model.layers.0.self_attn.q_proj" and told["method"] == method
    if not target.suffix:
        assert {"report.json", "report.svg"} <= set(convert.verify(target))


@pytest.mark.parametrize(("name", "worse"), [("nf4", "plain"), ("int8", "plain"), ("gguf:q4_0", "plain")])
def test_calibration_loses_less(name: str, worse: str, source: Path, tmp_path: Path, text: str, letters: Any) -> None:
    """The same file format, nearly the same scales, and a smaller error of the outputs in every linear of layer 0."""
    errors = []
    for calibrated in (True, False):
        target = target_of(name, tmp_path / str(calibrated))
        target.parent.mkdir()
        run(source, target, text, letters, name, calibrate=calibrated, solve=True, eval_tokens=0)
        errors.append(output_errors(source, target, text, letters))
    assert all(solved < plain for solved, plain in zip(*errors, strict=True))


def output_errors(source: Path, target: Path, text: str, letters: Any) -> list[float]:
    """|X (W - Q)^T| / |X W^T| of q, k, v of layer 0, from X itself."""
    before, after = (unpacked(open_checkpoint(path)) for path in (source, target))
    model = LlamaForCausalLM.from_pretrained(source)
    windows = calibrate([text], letters, COMMON["samples"], LENGTH, 0).windows
    with torch.inference_mode():
        x = model.model.layers[0].input_layernorm(model.model.embed_tokens(windows)).flatten(0, 1).double()
        found = []
        for name in GROUPS[0]:
            w, q = (c.read(f"model.layers.0.{name}.weight", torch.float32).double() for c in (before, after))
            found.append(float((x @ (w - q).T).norm() / (x @ w.T).norm()))
    return found


def test_reported_errors_are_those_of_the_outputs(source: Path, tmp_path: Path, text: str, letters: Any) -> None:
    report = run(source, tmp_path / "out", text, letters, eval_tokens=0, token_weights=False)
    wanted = output_errors(source, tmp_path / "out", text, letters)
    assert [row.output_error for row in report.linears[:3]] == pytest.approx(wanted, rel=1e-4)
    before, after = (unpacked(open_checkpoint(path)) for path in (source, tmp_path / "out"))
    name = "model.layers.1.mlp.down_proj.weight"
    w, q = (c.read(name, torch.float32) for c in (before, after))
    row = next(row for row in report.linears if f"{row.path}.weight" == name)
    assert row.weight_error == pytest.approx(float((w - q).norm() / w.norm()), rel=1e-5)
    assert report.bytes_after == (tmp_path / "out" / "model.safetensors").stat().st_size
    # Codes; 16 bits of scale and 4 of zero for 64 columns; 32 for each column of a linear's g_idx.
    numbers, columns = 3 * (64 * (64 + 32 + 32 + 64) + 3 * 64 * 128), 3 * (4 * 64 + 2 * 64 + 128)
    assert report.bits_per_weight == pytest.approx(4 + 20 / 64 + 32 * columns / numbers)


# -- the driver against a whole model in memory ------------------------------------------------------------------


def token_weights(group: int, x: Tensor, attention: Tensor) -> Tensor:
    """The weights (B, T) of tokens: none more than the median's energy; of q, k, v by the attention (B, H, T, S)."""
    energy = x.square().sum(-1)
    weights = torch.minimum(torch.ones(()), energy.median() / energy)
    return weights * (0.5 + attention.mean(1).sum(1) / 2) if group == 0 else weights


def in_memory(source: Path, windows: Tensor, options: QuantizationSettings) -> dict[str, Tensor]:
    """The weights that the job should make: hooks on a whole model collect the inputs of each group."""
    model = LlamaForCausalLM.from_pretrained(source, attn_implementation="eager")
    method = make_method(options, options.settings(model.config, "float32"), None)
    weights = {}
    for i, layer in enumerate(model.model.layers):
        seen: dict[int, Hessian] = {}
        steps = [(g,) for g in range(4)] if options.true_sequential else [tuple(range(4))]
        for step in steps:
            hooks, inputs = [], dict[int, Tensor]()
            for group in step:

                def look(module: Any, given: Any, group: int = group, inputs: dict[int, Tensor] = inputs) -> None:
                    inputs[group] = given[0]

                hooks.append(layer.get_submodule(GROUPS[group][0]).register_forward_pre_hook(look))
            with torch.inference_mode():
                attention = model(windows, output_attentions=True).attentions[i]
            for hook in hooks:
                hook.remove()
            for group, x in inputs.items():
                seen[group] = Hessian(x.shape[-1])
                weights_of = token_weights(group, x, attention) if options.token_weights else torch.ones(x.shape[:2])
                seen[group].add(x * weights_of.sqrt()[..., None])
            for group in step:
                linears = [layer.get_submodule(name) for name in GROUPS[group]]
                paths = [f"model.layers.{i}.{name}" for name in GROUPS[group]]
                made = method.make_group(paths, [linear.weight.detach() for linear in linears], seen[group].matrix())
                for path, linear, one in zip(paths, linears, made, strict=True):
                    linear.weight.data = one.weight
                    weights[path] = one.weight
    return weights


@pytest.mark.parametrize(("true_sequential", "weighted"), [(True, True), (False, True), (True, False)])
def test_equals_a_whole_model_in_memory(
    true_sequential: bool, weighted: bool, source: Path, tmp_path: Path, text: str, letters: Any
) -> None:
    chosen = {"true_sequential": true_sequential, "token_weights": weighted}
    run(source, tmp_path / "out", text, letters, **chosen, eval_tokens=0)
    options = QuantizationSettings(**{**COMMON, **chosen})
    wanted = in_memory(source, calibrate([text], letters, 12, LENGTH, 0).windows, options)
    made = unpacked(open_checkpoint(tmp_path / "out"))
    for path, weight in wanted.items():
        found = made.read(f"{path}.weight", torch.float32)
        # Sums in another order may tip a weight that lies between two values, and those behind it in its row.
        assert (found == weight).float().mean() > 0.97, path
        assert (found - weight).norm() < 0.05 * weight.norm()


def test_bfloat16_products_are_near(source: Path, tmp_path: Path, text: str, letters: Any) -> None:
    errors = []
    for precision in ("float32", "bfloat16"):
        report = run(source, tmp_path / precision, text, letters, precision=precision, eval_tokens=0)
        errors.append([row.output_error for row in report.linears])
    assert errors[1] == pytest.approx(errors[0], rel=0.08)


@pytest.mark.parametrize("width", [64, 600])
def test_hessian_of_bfloat16(width: int) -> None:
    x = torch.randn(3, 50, width, generator=torch.Generator().manual_seed(1)) * torch.linspace(0.1, 9, width)
    found = make_hessian(width, True)
    for part in x:
        found.add(part)
    flat = x.flatten(0, 1).double()
    wanted = 2 / 150 * flat.T @ flat
    assert (found.matrix().double() - wanted).norm() < 4e-3 * wanted.norm()
    assert torch.equal(found.matrix(), found.matrix().T)


# -- resume ------------------------------------------------------------------------------------------------------


class Stop(BaseException):
    """As a kill: nothing of ours catches it."""


def stopping(when: Callable[[float, str], bool]) -> Callable[[float, int, str], None]:
    def progress(done: float, total: int, what: str) -> None:
        if when(done, what):
            raise Stop

    return progress


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if not file.name.startswith(("report", "SHA"))}


STOPS: dict[str, Callable[[float, str], bool]] = {
    "first layer": lambda done, what: 0 < done < 1,
    "second layer, near its end": lambda done, what: done > 1.85,
    "third layer": lambda done, what: done > 2.3,
    "while files are written": lambda done, what: what == "files",
    "while it is measured": lambda done, what: what == "measuring after",
}  # fmt: skip


@pytest.fixture(scope="module")
def straight(
    source: Path, text: str, letters: Any, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, int], Path]:
    """What a job that nobody stops makes, with so many tokens to measure by."""

    @cache
    def made(method: str, eval_tokens: int) -> Path:
        target = target_of(method, tmp_path_factory.mktemp("straight"))
        run(source, target, text, letters, method, calibrate=True, eval_tokens=eval_tokens)
        return target

    return made


@pytest.mark.parametrize("method", ["gptq", "nf4", "gguf:q4_0"])
@pytest.mark.parametrize("stop", STOPS)
def test_resumed_equals_straight(
    stop: str,
    method: str,
    source: Path,
    tmp_path: Path,
    text: str,
    letters: Any,
    straight: Callable[[str, int], Path],
) -> None:
    options: dict[str, Any] = {"calibrate": True, "eval_tokens": 64 if "measured" in stop else 0}
    (tmp_path / "resumed").mkdir()
    resumed = target_of(method, tmp_path / "resumed")
    with pytest.raises(Stop):
        run(source, resumed, text, letters, method, progress=stopping(STOPS[stop]), **options)
    assert not resumed.exists()
    report = run(source, resumed, text, letters, method, **options)
    assert report.resumed_layers == {"f": 0, "s": 1, "t": 2, "w": 3}[stop[0]]
    assert len(report.linears) == 21 + method.startswith("gguf")
    whole = straight(method, options["eval_tokens"])
    pair = (whole, resumed) if whole.is_dir() else (whole.parent, resumed.parent)
    first, second = ({k: v for k, v in contents(each).items() if "report" not in k} for each in pair)
    assert first.keys() == second.keys() and first == second
    assert not list(resumed.parent.glob(".*"))


def test_another_command_is_refused(source: Path, tmp_path: Path, text: str, letters: Any) -> None:
    target = tmp_path / "out"
    with pytest.raises(Stop):
        run(source, target, text, letters, progress=stopping(lambda done, what: done > 1.5))
    for changes, said in (
        ({"bits": 3}, "bits was 4 and is 3"),
        ({"seed": 1}, "seed was 0 and is 1"),
        ({"text": text + "x"}, "calibration text is another"),
        ({"source": "other"}, "source has changed"),
    ):
        given: dict[str, Any] = {"text": text, **changes}
        home = source
        if given.pop("source", None):
            home = tmp_path / "other"
            LlamaForCausalLM.from_pretrained(source).save_pretrained(home)
        with pytest.raises(CheckpointError, match=said):
            run(home, target, given.pop("text"), letters, **given)
    journal = tmp_path / ".out.quantize" / "job.json"
    journal.write_text("{")
    with pytest.raises(CheckpointError, match="malformed"):
        run(source, target, text, letters)


# -- mistakes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"method": "hqq"}, "it must be one of gptq, .*awq.* or gguf"),
        ({"method": "gguf:q9"}, "gguf: takes one of"),
        ({"method": "gguf:f16"}, "gguf: takes one of"),
        ({"bits": 5}, "2, 3, 4 or 8"),
        ({"group_size": 48}, "does not divide hidden_size, 64; of the usual sizes 64, 32"),
        ({"group_size": 0}, "give 128, 64 or 32"),
        ({"precision": "int8"}, "float32 or bfloat16"),
        ({"passes": -1}, "at least 0"),
        ({"calibrate": False}, "made from calibration data"),
        ({"length": 2000}, None),
        ({"samples": 0}, "at least 1"),
        ({"damp": 0.0}, "between 0 and 1"),
    ],
)
def test_options_that_cannot_be(
    options: dict[str, Any], said: str | None, source: Path, tmp_path: Path, text: str, letters: Any
) -> None:
    if said is None:  # longer than the context: windows are as long as that
        assert run(source, tmp_path / "out", text, letters, eval_tokens=0, **options).calibration["length"] == 64
        return
    method = options.get("method", "gptq")
    with pytest.raises(InputError, match=said):
        run(source, target_of(method, tmp_path), text, letters, **options)
    assert not list(tmp_path.iterdir())


def test_targets_that_cannot_be(source: Path, tmp_path: Path, text: str, letters: Any) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("x")
    with pytest.raises(CheckpointError, match="not empty"):
        run(source, tmp_path / "full", text, letters)
    with pytest.raises(InputError, match=r"ends in \.gguf"):
        run(source, tmp_path / "out", text, letters, "gguf:q4_0")
    with pytest.raises(InputError, match="new folder"):
        run(source, tmp_path / "out.gguf", text, letters)
    with pytest.raises(CheckpointError, match="not empty"):
        run(source, source, text, letters)


def test_a_disk_that_is_too_small(
    source: Path, tmp_path: Path, text: str, letters: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda place: type("Usage", (), {"free": 1 << 20}))
    with pytest.raises(CheckpointError, match="fewer --samples"):
        run(source, tmp_path / "out", text, letters)
    assert not list(tmp_path.iterdir())


def test_widths_that_gptq_cannot_pack(tmp_path: Path, text: str, letters: Any, save_model: Any) -> None:
    odd = save_model(tmp_path / "odd", intermediate_size=72)
    with pytest.raises(InputError, match="intermediate_size is 72; GPTQ packs 32"):
        run(odd, tmp_path / "out", text, letters)


def test_a_source_that_was_quantised_is_named(source: Path, tmp_path: Path, text: str, letters: Any) -> None:
    """Its errors are in what is measured before and after, so the report says which types it had."""
    convert.convert(source, tmp_path / "x.gguf", convert.ConversionSettings("gguf", "q8_0"))
    assert run(source, tmp_path / "a", text, letters, "nf4", eval_tokens=0).quantized_before == []
    assert run(tmp_path / "x.gguf", tmp_path / "b", text, letters, "nf4", eval_tokens=0).quantized_before == ["Q8_0"]
