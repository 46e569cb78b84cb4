"""The job: one layer's weights in memory at a time, from the embedding to the last, then the files.

For every layer its stages run over all stored sequences (layer.py); after each the linears of one group are replaced
by what their quantised form means, so that everything behind them sees their errors. Its tensors are written, the
journal notes the layer, and the next one begins. The result is then written as any converted checkpoint is, from a
view in which the new tensors have taken the place of the old ones.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama2.architecture import linear_shapes
from llama2.auto import AutoTokenizer
from llama2.checkpoint import Checkpoint, convert
from llama2.checkpoint.gguf_write import GgufTarget
from llama2.checkpoint.hf import map_safetensors
from llama2.checkpoint.hf_write import HfTarget
from llama2.checkpoint.merge import open_merged
from llama2.checkpoint.save import parse_size
from llama2.checkpoint.torch_tensors import DTYPES
from llama2.errors import CheckpointError, InputError, Llama2Error
from llama2.files import locked, write_text
from llama2.quantization.gptq_solver import Hessian
from llama2.quantization_config import GPTQConfig, QuantizationConfig
from llama2.quantize import measure
from llama2.quantize.calibration import Calibration, calibrate, encode, read_text
from llama2.quantize.hessian import make_hessian
from llama2.quantize.journal import Journal, layer_file, sweep
from llama2.quantize.layer import GROUPS, Stages, batch_of, norm
from llama2.quantize.methods import Made, errors, make_method
from llama2.quantize.options import QuantizationSettings, as_dict
from llama2.quantize.report import LinearReport, Report
from llama2.quantize.states import States
from llama2.quantize.view import QuantizedCheckpoint

Progress = Callable[[float, int, str], None]
_RESERVE = 64 << 20
_HEAD = "head.safetensors"


def quantize(
    source: str | Path,
    target: str | Path,
    method: str = "gptq",
    *,
    data: str | Path | Sequence[Any] | None = None,
    held_out: str | Path | None = None,
    tokenizer: Any = None,
    progress: Progress | None = None,
    **options: Any,
) -> Report:
    """Quantises the checkpoint `source` (path or hub id) to the new folder, or .gguf file, `target`.

    options: the fields of `Options`. data: what to calibrate with, see `calibration.calibrate`. held_out: a text file
    for the perplexity before and after (default: the end of the calibration text). tokenizer: the source's own where
    none is given. progress(layers done, layers, what) is called within every layer. An interrupted job goes on when it
    is called in the same way again. Raises InputError for arguments that cannot be, CheckpointError for a damaged
    source, a target that exists, an interrupted job of another call, or a disk that is too small.
    """
    settings = QuantizationSettings(method=method, **options)
    with locked(target):
        return Job(source, target, settings, data, held_out, tokenizer, progress).run()


class Job:
    """One quantisation."""

    def __init__(
        self,
        source: str | Path,
        target: str | Path,
        options: QuantizationSettings,
        data: str | Path | Sequence[Any] | None,
        held_out: str | Path | None,
        tokenizer: Any,
        progress: Progress | None,
    ) -> None:
        self.name, self.path, self.options = str(source), Path(target), options
        self.source = open_merged(source)
        self.config = self.source.config
        self.progress = progress or (lambda done, total, what: None)
        self._check_target()
        self.settings = options.settings(self.config, self.source.auto_dtype)
        self.blocks: GgufTarget | None = None
        if options.kind == "gguf":
            new_target = convert.make_target(self.source, self.path.name, self._writing())
            assert isinstance(new_target, GgufTarget)
            self.blocks = new_target
        self.method = make_method(options, self.settings, self.blocks.block_of if self.blocks else None)
        self.calibration = self._calibration(data, held_out, tokenizer)
        self.journal = Journal(self.path, self._identity())
        self.bfloat16 = _bfloat16(options.precision)
        self.dtype = torch.bfloat16 if self.bfloat16 else torch.float32

    def run(self) -> Report:
        """Does it, or goes on with it."""
        began, state = time.perf_counter(), self.journal.state
        measure.reset_peak()
        done = state["layers"]
        with torch.inference_mode():
            self._prepare()
            for index in range(done, self.config.num_hidden_layers):
                self._layer(index, began)
            self._head()
        before = sum(stored_bytes(stored.type, stored.shape) for stored in self.source.tensors.values())
        report = Report(
            self.options.method,
            self.name,
            str(self.path),
            as_dict(self.options),
            None if self.settings is None else self.settings.to_dict(),
            self._told_calibration(),
            [LinearReport(**row) for row in state["linears"]],
            bytes_before=before,
            resumed_layers=done,
            quantized_before=sorted(
                {type_name for n in self.source.tensors if (type_name := self.source.packed_type(n))}
            ),
        )
        shapes = linear_shapes(self.config)
        weights = sum(torch.Size(shapes[row.path]).numel() for row in report.linears if row.path in shapes)
        bits = sum(row.bits * torch.Size(shapes[row.path]).numel() for row in report.linears if row.path in shapes)
        report.bits_per_weight = bits / weights
        self._write(report)
        report.seconds = state.get("seconds", 0.0) + time.perf_counter() - began
        report.peak_memory = measure.peak_bytes()
        self._publish(report)
        return report

    # -- before the first layer ----------------------------------------------------------------------------------

    def _check_target(self) -> None:
        gguf, path = self.options.kind == "gguf", self.path
        if gguf != (path.suffix == ".gguf"):
            expected = "a path that ends in .gguf" if gguf else "the path of a new folder, not one that ends in .gguf"
            raise InputError(f"{self.options.method} is written to {expected}; the target is {path}")
        sweep(path)
        if path.exists() and (path.is_file() or any(path.iterdir())):
            raise CheckpointError(f"{path} exists and is not empty; give a new path, nothing is overwritten")
        home = self.source.path if self.source.path.is_dir() else self.source.path.parent
        if path.resolve() in (self.source.path.resolve(), home.resolve()):
            raise InputError(f"{path} is the source; give another place, the source is never written to")

    def _calibration(self, data: Any, held_out: str | Path | None, tokenizer: Any) -> Calibration | None:
        """The windows, and what is measured; None where neither is wanted, or only measuring without a tokenizer."""
        options = self.options
        if not options.calibrated and not options.eval_tokens:
            return None
        if tokenizer is None:
            path = self.source.path
            home = path if path.is_dir() or self.source.format == "gguf" else path.parent
            try:
                tokenizer = AutoTokenizer.from_pretrained(home)
            except Llama2Error:
                if options.calibrated or held_out is not None:
                    raise
                return None
        length = min(options.length, self.config.max_position_embeddings)
        calibration = calibrate(data, tokenizer, options.samples, length, options.seed)
        if held_out is None:
            return calibration
        ids = torch.tensor(encode(read_text(held_out), tokenizer))
        return Calibration(calibration.windows, ids, calibration.origin, calibration.digest, Path(held_out).name)

    def _identity(self) -> dict[str, Any]:
        calibration = self.calibration
        return {
            "source": convert.fingerprint(self.source, convert.ConversionSettings()),
            "options": as_dict(self.options),
            "text": None if calibration is None else calibration.digest,
            "held_out": None if calibration is None else _digest(calibration.held_out),
            "version": 1,
        }

    def _prepare(self) -> None:
        """A new job's folder with the embedded windows in it."""
        if self.journal.resumed:
            return
        self._check_space()
        self.journal.begin()
        if self.options.calibrated:
            self._embed()
        self.journal.record()

    def _check_space(self) -> None:
        options, config = self.options, self.config
        quantised = sum(torch.Size(shape).numel() for shape in linear_shapes(config).values())
        others = sum(stored_bytes(type_name, shape) for type_name, shape in _others(self.source))
        needed = _RESERVE + others + 2 * quantised * self._bits() // 8
        if options.calibrated and self.calibration is not None:
            tokens = self.calibration.windows.numel()
            needed += tokens * (8 * config.hidden_size + 4 * config.intermediate_size)
        parent = self.path.absolute().parent
        while not parent.exists():
            parent = parent.parent
        free = shutil.disk_usage(parent).free
        if free < needed:
            raise CheckpointError(
                f"quantising to {self.path} needs {needed / 1e9:.2f} GB (activations, layers and result) and its disk "
                f"has {free / 1e9:.2f} GB free; free some space, give a path on another disk, or fewer --samples"
            )

    def _bits(self) -> int:
        format_name = self.options.kind
        return {"gptq": self.options.bits + 1, "nf4": 5, "fp4": 5, "int8": 8}.get(format_name, 9)

    def _embed(self) -> None:
        assert self.calibration is not None
        windows, table = self.calibration.windows, "model.embed_tokens.weight"
        weight = self.source.read(table)
        step = batch_of(self.config, windows.shape[1])
        with self._states(0, new=True) as x:
            for start in range(0, len(windows), step):
                x.write(start, weight[windows[start : start + step]].float())
            x.sync()

    def _states(self, index: int, new: bool = False) -> States:
        assert self.calibration is not None
        shape = (*self.calibration.windows.shape, self.config.hidden_size)
        return States(self.journal.folder / f"states-{index}", shape, torch.float32, new)

    # -- layers --------------------------------------------------------------------------------------------------

    def _layer(self, index: int, began: float) -> None:
        rows: list[LinearReport] = []
        tensors: dict[str, Tensor] = {}
        if self.options.calibrated:
            self._calibrated_layer(index, rows, tensors)
        else:
            for number, name in enumerate(name for group in GROUPS for name in group):
                path = f"model.layers.{index}.{name}"
                self.progress(index + number / 7, self.config.num_hidden_layers, path)
                weight = self.source.read(f"{path}.weight", self._stored(path))
                self._make([path], [weight], None, rows, tensors)
        self.journal.save(layer_file(index), tensors)
        state = self.journal.state
        linears = [*state["linears"], *(vars(row) for row in rows)]
        self.journal.record(layers=index + 1, linears=linears)
        for name in (f"states-{index}", "inner"):
            (self.journal.folder / name).unlink(missing_ok=True)

    def _calibrated_layer(self, index: int, rows: list[LinearReport], tensors: dict[str, Tensor]) -> None:
        with self._states(index) as x, self._states(index + 1, new=True) as y:
            self._run_stages(index, x, y, rows, tensors)
            y.sync()

    def _run_stages(
        self, index: int, x: States, y: States, rows: list[LinearReport], tensors: dict[str, Tensor]
    ) -> None:
        count, length, _ = x.shape
        stages = Stages(self.source, index, self.dtype, (count, length), self.options.weighs_tokens)
        passes = 5 if self.options.true_sequential else 8
        batches = passes * -(-count // stages.batch)
        ticks = iter(range(1, batches + 1))
        layers, what = self.config.num_hidden_layers, f"layer {index}"

        def tick() -> None:
            self.progress(index + next(ticks) / batches, layers, what)

        def run(stage: int, hessian: Hessian | None) -> None:
            stages.run(stage, x, y, self.journal.folder, hessian, tick)

        def load(group: int) -> list[Tensor]:
            return [stages.load(name) for name in GROUPS[group]]

        def replace(group: int, weights: list[Tensor], hessian: Hessian) -> None:
            paths = [stages.path(name) for name in GROUPS[group]]
            hessians = self._make(paths, weights, hessian.matrix(), rows, tensors)
            for name, layer in zip(GROUPS[group], hessians, strict=True):
                stages.replace(name, layer.weight)

        if self.options.true_sequential:
            for stage in range(4):
                weights, hessian = load(stage), make_hessian(stages.width(stage), self.bfloat16)
                run(stage, hessian)
                if stage:
                    stages.drop(stage - 1)
                replace(stage, weights, hessian)
                del weights, hessian
            run(4, None)
        else:
            for name in (name for group in GROUPS for name in group):
                stages.load(name)
            hessians = [make_hessian(stages.width(stage), self.bfloat16) for stage in range(4)]
            for stage in range(4):
                run(stage, hessians[stage])
            for group in range(4):
                replace(group, load(group), hessians[group])
            for stage in range(1, 5):
                run(stage, None)

    def _make(
        self,
        paths: Sequence[str],
        weights: Sequence[Tensor],
        hessian: Tensor | None,
        rows: list[LinearReport],
        tensors: dict[str, Tensor],
    ) -> list[Made]:
        """Quantises linears that share their input, notes how well and what goes into the file."""
        began = time.perf_counter()
        every = self.method.make_group(paths, weights, hessian)
        took = (time.perf_counter() - began) / len(paths)
        for path, weight, layer in zip(paths, weights, every, strict=True):
            lost = errors(weight.float(), layer.weight, hessian)
            bits = 8 * sum(tensor.nbytes for tensor in layer.tensors.values()) / weight.numel()
            rows.append(LinearReport(path, layer.kind, bits, lost.output, lost.weight, layer.damp, took))
            tensors |= {f"{path}.{suffix}": tensor.contiguous() for suffix, tensor in layer.tensors.items()}
        return every

    def _stored(self, path: str) -> torch.dtype:
        """Returns the dtype of the weight in the source; bfloat16 for blocks."""
        return DTYPES.get(self.source.tensors[f"{path}.weight"].type, torch.bfloat16)

    def _head(self) -> None:
        """For GGUF the head, with the inputs that it sees in mind."""
        if self.blocks is None or not self.options.calibrated or self.journal.state.get("head"):
            return
        tied = self.config.tie_word_embeddings
        path = "model.embed_tokens" if tied else "lm_head"
        layers = self.config.num_hidden_layers
        self.progress(layers, layers, "head")
        final, hessian = norm(self.source, "model.norm"), make_hessian(self.config.hidden_size, self.bfloat16)
        with self._states(layers) as x:
            step = batch_of(self.config, x.shape[1])
            for start in range(0, x.shape[0], step):
                hessian.add(final(x.read(start, min(start + step, x.shape[0]))))
        rows: list[LinearReport] = []
        tensors: dict[str, Tensor] = {}
        weight = self.source.read(f"{path}.weight", torch.float32)
        self._make([path], [weight], hessian.matrix(), rows, tensors)
        self.journal.save(_HEAD, tensors)
        self.journal.record(head=True, linears=[*self.journal.state["linears"], *(vars(row) for row in rows)])

    # -- files ---------------------------------------------------------------------------------------------------

    def _view(self) -> QuantizedCheckpoint:
        files = [self.journal.folder / layer_file(i) for i in range(self.config.num_hidden_layers)]
        if self.journal.state.get("head"):
            files.append(self.journal.folder / _HEAD)
        names = [name for file in files for name in map_safetensors(file)]
        paths = [row["path"] for row in self.journal.state["linears"]]
        replaced = {f"{path}.weight": [name for name in names if name.startswith(f"{path}.")] for path in paths}
        blocks = {name: self.blocks.block_of(name).name for name in replaced} if self.blocks else {}
        return QuantizedCheckpoint(self.source, files, replaced, self.settings, blocks)

    def _writing(self) -> convert.ConversionSettings:
        if self.options.kind == "gguf":
            return convert.ConversionSettings("gguf", self.options.block_type, calibrated=self.options.calibrated)
        return convert.ConversionSettings("hf", shard_size=self.options.shard_size)

    def _write(self, report: Report) -> None:
        """The weights and all that goes with them, into result/."""
        view, result, options = self._view(), self.journal.folder / "result", self._writing()
        if self.blocks is not None:
            path = result / self.path.name
            target = convert.make_target(view, self.path.name, options)
        else:
            path = result
            target = PackedTarget(view, parse_size(self.options.shard_size), self.settings)
        layers = self.config.num_hidden_layers
        if not convert.ended(path, options.to):
            convert.write(target, view, path, options, lambda done, total, name: self.progress(layers, layers, "files"))
        files = [path] if path.is_file() else list(path.glob("*.safetensors"))
        report.bytes_after = sum(file.stat().st_size for file in files)

    def _publish(self, report: Report) -> None:
        result = self.journal.folder / "result"
        gguf = self.blocks is not None
        stem = f"{self.path.name}.report" if gguf else "report"
        json_file, picture = result / f"{stem}.json", result / f"{stem}.svg"
        self._measure(report, result / self.path.name if gguf else result)
        report.write(json_file, picture)
        if not gguf:
            convert.add_sums(result / convert.SUMS, (json_file, picture))
        self.journal.finish(self.path)

    def _told_calibration(self) -> dict[str, Any] | None:
        calibration = self.calibration
        if calibration is None or not self.options.calibrated:
            return None
        count, length = calibration.windows.shape
        products = "bfloat16" if self.bfloat16 else "float32"
        return {"text": calibration.origin, "windows": count, "length": length, "products": products}

    def _measure(self, report: Report, path: Path) -> None:
        calibration = self.calibration
        ids = torch.empty(0) if calibration is None else calibration.held_out[: self.options.eval_tokens]
        if calibration is None or len(ids) < 2:
            why = "eval_tokens is 0" if not self.options.eval_tokens else "there is no tokenizer, or no text"
            report.perplexity = {"not measured": why}
            return
        if reason := measure.why_not(self.name):
            report.perplexity = {"not measured": reason}
            return
        layers = self.config.num_hidden_layers
        self.progress(layers, layers, "measuring before")
        before = measure.measure(self.name, ids)
        self.progress(layers, layers, "measuring after")
        after = measure.measure(path, ids)
        report.perplexity = {"before": before.perplexity, "after": after.perplexity, "tokens": before.tokens}
        report.perplexity["text"] = calibration.held_out_origin
        report.tokens_per_second = {"before": before.speed, "after": after.speed}


class PackedTarget(HfTarget):
    """A folder of packed linears; of GPTQ with the quantize_config.json that older readers want."""

    def __init__(self, view: QuantizedCheckpoint, shard_size: int, settings: QuantizationConfig | None) -> None:
        dtypes = {
            name: DTYPES[view.tensors[name].type] if view.made(name) else convert.dtype_of(view, name, "keep")
            for name in view.tensors
        }
        super().__init__(view, dtypes, shard_size)
        self._settings = settings

    def describe(self, folder: Path) -> str:
        if isinstance(self._settings, GPTQConfig):
            write_text(folder / "quantize_config.json", json.dumps(self._settings.to_dict(), indent=2) + "\n")
        return super().describe(folder)


def _others(source: Checkpoint) -> list[tuple[str, tuple[int, ...]]]:
    """(type, shape) of what is not quantised."""
    paths, tensors = linear_shapes(source.config), source.tensors.items()
    return [(type_name, shape) for name, (shape, type_name) in tensors if name.removesuffix(".weight") not in paths]


def stored_bytes(kind: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor of this stored type; blocks counted as 16 bits."""
    dtype = DTYPES.get(kind, torch.bfloat16)
    return torch.Size(shape).numel() * dtype.itemsize


def _digest(ids: Tensor) -> str:
    return hashlib.sha256(ids.numpy().tobytes()).hexdigest()


def _bfloat16(precision: str) -> bool:
    """Whether products are of bfloat16: where asked for, or where the CPU multiplies it faster than float32."""
    return precision == "bfloat16" or (precision == "auto" and torch.ops.mkldnn._is_mkldnn_bf16_supported())
