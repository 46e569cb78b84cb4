"""The input of convert, quantize and verify: a checkpoint checked by the rules of loading.

`covered` raises where a parameter has no tensor or a tensor no parameter, and gives names and parts one spelling: the
base model's prefix is there, a tied head is the embedding alone, and harmless extras (`coverage.is_table`, biases of 0)
are gone.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from llama2.architecture import EMBEDDING, HEAD, parameter_shapes
from llama2.checkpoint import Checkpoint, RawTensor, Stored
from llama2.checkpoint.packed_names import with_prefix
from llama2.checkpoint.wrapper import SeenCheckpoint
from llama2.config import LlamaConfig
from llama2.coverage import Coverage, cover, listed
from llama2.errors import MismatchError
from llama2.quantization.formats import BLOCKS

WEIGHT_TYPES = frozenset({"F64", *(row.id for row in BLOCKS.values())})


def covered(source: Checkpoint) -> Checkpoint:
    """The checkpoint as its configuration describes it, names in one spelling. Raises MismatchError, listing what is
    missing, not used, of another shape or of a type that is no weight."""
    return CoveredCheckpoint(source)


def head_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """The shapes of the heads of models that are not causal language models."""
    labels, hidden = config.num_labels, config.hidden_size
    return {
        "score.weight": (labels, hidden),
        "score.bias": (labels,),
        "qa_outputs.weight": (2, hidden),
        "qa_outputs.bias": (2,),
    }


class CoveredCheckpoint(SeenCheckpoint):
    """Another checkpoint under the model's names, each tensor once."""

    def __init__(self, source: Checkpoint, packed: Sequence[str] = (), taken: Sequence[str] = ()) -> None:
        """packed: linears whose weights the source holds otherwise; taken: names of the source's tensors of those."""
        super().__init__(source)
        report, config = _report(source, packed, taken), source.config
        if config.tie_word_embeddings and {HEAD, EMBEDDING} <= set(report.found):
            _same_head(source, report)
            del report.found[HEAD]
        elif config.tie_word_embeddings and HEAD in report.found:  # safetensors' save_model kept one name of two
            report.found = {EMBEDDING: report.found.pop(HEAD), **report.found}
        self._names = report.found

    @cached_property
    def tensors(self) -> Mapping[str, Stored]:
        return {name: self.source.tensors[stored] for name, stored in self._names.items()}

    def kept_type(self, name: str) -> str:
        return self.source.kept_type(self._names[name])

    def packed_type(self, name: str) -> str:
        return self.source.packed_type(self._names[name])

    def read(self, name: str, dtype: Any = None) -> Any:
        return self.source.read(self._names[name], dtype)

    def read_rows(self, name: str, start: int, stop: int) -> Any:
        return self.source.read_rows(self._names[name], start, stop)

    def mapped(self, name: str) -> list[Any]:
        return self.source.mapped(self._names[name])

    def raw(self, name: str) -> RawTensor:
        return self.source.raw(self._names[name])


def _report(source: Checkpoint, packed: Sequence[str], taken: Sequence[str]) -> Coverage:
    config, used = source.config, set(taken)
    stored = {name: tensor for name, tensor in source.tensors.items() if name not in used}
    parameters = parameter_shapes(config)
    for path in packed:
        del parameters[f"{path}.weight"]
    names = {with_prefix(name): name for name in stored}
    parameters |= {name: shape for name, shape in head_shapes(config).items() if name in names}
    headless = "LlamaForCausalLM" not in (config.architectures or ()) and not config.tie_word_embeddings
    if HEAD in parameters and HEAD not in names and headless:
        del parameters[HEAD]  # of a base model or a classifier; a causal model without its head is damaged
    same = {HEAD: EMBEDDING} if config.tie_word_embeddings else {}
    report = cover(parameters, stored, names, same, lambda name: is_zero(source, name))
    report.refuse(str(source.path))
    if odd := not_weights(stored, report):
        raise MismatchError(f"{source.path}: {listed(odd)}; weights are floating-point numbers or GGUF's blocks")
    return report


def not_weights(stored: Mapping[str, Stored], report: Coverage) -> list[str]:
    """Returns a message for each tensor whose type holds no weights."""
    types = {name: stored[file].type for name, file in report.found.items()}
    return [f"type: {name} is stored as {kind}" for name, kind in types.items() if kind not in WEIGHT_TYPES]


def is_zero(source: Checkpoint, name: str) -> bool:
    """Whether a tensor is 0 throughout."""
    return source.library.is_zero(source.read(name))


def _same_head(source: Checkpoint, report: Coverage) -> None:
    """Raises MismatchError where the configuration ties a head to an embedding that differs from it."""
    head, embedding = report.found[HEAD], report.found[EMBEDDING]
    rows = source.tensors[head].shape[0]
    for start in range(0, rows, 4096):
        stop = min(start + 4096, rows)
        if not source.library.equal(source.read_rows(head, start, stop), source.read_rows(embedding, start, stop)):
            raise MismatchError(
                f"the configuration of {source.path} ties {HEAD} to {EMBEDDING}, but the file holds different tensors "
                "for them; set tie_word_embeddings to false in config.json if both are meant"
            )
