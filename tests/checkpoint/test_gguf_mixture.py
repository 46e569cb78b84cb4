"""Which type each tensor of a GGUF file gets: by hand, and as llama.cpp's own quantiser chooses."""

import ctypes
import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_config, tiny_model

import llama2.checkpoint as checkpoint
from llama2 import LlamaConfig
from llama2.checkpoint.convert import ConversionSettings, convert
from llama2.checkpoint.gguf import GgufFile, read_metadata
from llama2.checkpoint.gguf_mixture import FILE_TYPES, file_type, tensor_type
from llama2.checkpoint.imatrix import from_importance, write_imatrix
from llama2.checkpoint.names import hf_to_gguf
from llama2.quantization.formats import BLOCKS, BY_ID
from llama2.quantization.ggml import dequantize
from llama2.quantization.ggml_encode import quantize

pytestmark = pytest.mark.filterwarnings("ignore:there is no tokenizer")
QUANTISED = [name for name, kind in FILE_TYPES.items() if BY_ID[kind.block].weights > 1]
SEVEN_B = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
           "num_key_value_heads": 32, "vocab_size": 32000}  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    "7B": SEVEN_B,
    "1.1B": SEVEN_B | {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22,
                       "num_key_value_heads": 4},
    "70B": SEVEN_B | {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
                      "num_attention_heads": 64, "num_key_value_heads": 8},
    "SmolLM2": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
                "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True},
    "narrow": {"hidden_size": 72, "intermediate_size": 96, "num_attention_heads": 6, "num_key_value_heads": 2},
}  # fmt: skip


def matrices(config: LlamaConfig) -> dict[str, tuple[int, int]]:
    """Shapes of the matrices by name."""
    width, inner, head = config.hidden_size, config.intermediate_size, config.head_dim
    queries, keys = config.num_attention_heads * head, config.num_key_value_heads * head
    found = {"model.embed_tokens.weight": (config.vocab_size, width)}
    if not config.tie_word_embeddings:
        found["lm_head.weight"] = (config.vocab_size, width)
    for i in range(config.num_hidden_layers):
        for name, shape in (
            ("self_attn.q_proj", (queries, width)), ("self_attn.k_proj", (keys, width)),
            ("self_attn.v_proj", (keys, width)), ("self_attn.o_proj", (width, queries)),
            ("mlp.gate_proj", (inner, width)), ("mlp.up_proj", (inner, width)), ("mlp.down_proj", (width, inner)),
        ):  # fmt: skip
            found[f"model.layers.{i}.{name}.weight"] = shape
    return found


def ours(config: LlamaConfig, kind: str, calibrated: bool) -> dict[str, str]:
    return {name: tensor_type(name, shape[1], kind, config, calibrated) for name, shape in matrices(config).items()}


def test_q4_k_m_of_7b() -> None:
    """Q6_K for the values and down projections of layers 0-3, 28-31 and 6, 9, ..., 27, and for the head."""
    config = tiny_config(**SEVEN_B)
    found = ours(config, "Q4_K_M", False)
    more = {0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31}
    for i in range(32):
        for linear in ("self_attn.v_proj", "mlp.down_proj"):
            assert found[f"model.layers.{i}.{linear}.weight"] == ("Q6_K" if i in more else "Q4_K")
    assert found["lm_head.weight"] == "Q6_K"
    assert found["model.embed_tokens.weight"] == found["model.layers.0.mlp.up_proj.weight"] == "Q4_K"
    assert file_type("q4_k") == "Q4_K_M" and file_type("Q6_K") == "Q6_K" and file_type("q9_k") is None


def test_calibration_spares_the_first_down_projections() -> None:
    config = tiny_config(**SEVEN_B)
    for kind, better in (("Q4_0", "Q4_1"), ("Q5_0", "Q5_1")):
        found = ours(config, kind, True)
        assert [i for i in range(32) if found[f"model.layers.{i}.mlp.down_proj.weight"] == better] == [0, 1, 2, 3]
        assert better not in ours(config, kind, False).values()


@pytest.mark.parametrize(("kind", "number"), [("q4_k_m", 15), ("q4_k", 15), ("q4_k_s", 14), ("q6_k", 18), ("q2_k", 10)])
def test_convert_writes_the_mixture(tmp_path: Path, kind: str, number: int) -> None:
    model = tiny_model(torch.float32, hidden_size=256, intermediate_size=512, num_hidden_layers=9)
    model.save_pretrained(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "x.gguf", ConversionSettings("gguf", dtype=kind))
    stored = checkpoint.open(tmp_path / "x.gguf").tensors
    for name, expected in ours(model.config, file_type(kind) or "", False).items():
        assert stored[name].type == expected, name
    assert read_metadata(tmp_path / "x.gguf")["general.file_type"] == number


def test_convert_with_an_importance_matrix(tmp_path: Path) -> None:
    """The rows are those of the encoder with the importance of their tensor; others stay plain."""
    model = tiny_model(torch.float32, hidden_size=256, intermediate_size=512, num_hidden_layers=8)
    model.save_pretrained(tmp_path / "hf")
    name = "model.layers.0.mlp.down_proj.weight"
    importance = torch.rand(512) ** 4
    write_imatrix(tmp_path / "i.gguf", from_importance({name: importance}, 64, 32, "words.txt"))
    convert(
        tmp_path / "hf", tmp_path / "x.gguf", ConversionSettings("gguf", dtype="q4_0", imatrix=str(tmp_path / "i.gguf"))
    )
    file, state = checkpoint.open(tmp_path / "x.gguf"), model.state_dict()
    assert file.tensors[name].type == "Q4_1"
    assert torch.equal(file.read(name), dequantize(quantize(state[name], "Q4_1", importance), "Q4_1"))
    other = "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(file.read(other), dequantize(quantize(state[other], "Q4_0"), "Q4_0"))


# -- llama.cpp ---------------------------------------------------------------------------------------------------


class Description(ctypes.Structure):
    """llama_quant_model_desc of src/llama-ext.h."""

    _fields_ = (
        ("architecture", ctypes.c_char_p),
        *((name, ctypes.c_uint32) for name in ("embd", "ff", "layers", "heads", "heads_kv", "experts", "k", "v")),
    )


class InitParams(ctypes.Structure):
    """ggml_init_params."""

    _fields_ = (("size", ctypes.c_size_t), ("buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


Chooser = Callable[[LlamaConfig, str], dict[str, str]]


@pytest.fixture(scope="module")
def llama_cpp_types() -> Iterator[Chooser]:
    """llama.cpp's own choice of types for the shapes of a model, without weights."""
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or spec.origin is None:
        pytest.skip("needs llama-cpp-python (`make bench` installs it)")
    importlib.import_module("llama_cpp")
    folder = Path(spec.origin).parent / "lib"
    library, ggml = ctypes.CDLL(str(folder / "libllama.so")), ctypes.CDLL(str(folder / "libggml-base.so"))
    make = getattr(library, "_Z31llama_quant_model_from_metadataPK22llama_quant_model_desc", None)
    if make is None:
        pytest.skip("this llama.cpp does not export its choice of types")
    init = library._Z16llama_quant_initPK11llama_modelPK27llama_model_quantize_params
    choose = library._Z25llama_quant_compute_typesP19quantize_state_impl11llama_ftypePP11ggml_tensorP9ggml_typem
    for function in (make, init, ggml.ggml_init, ggml.ggml_new_tensor_2d):
        function.restype = ctypes.c_void_p
    ggml.ggml_new_tensor_2d.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    ggml.ggml_set_name.argtypes = [ctypes.c_void_p, ctypes.c_char_p]
    params = importlib.import_module("llama_cpp").llama_model_quantize_default_params()

    def run(config: LlamaConfig, kind: str) -> dict[str, str]:
        layers, heads, keys = config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads
        described = Description(b"llama", config.hidden_size, config.intermediate_size, layers, heads, keys, 0,
                                config.head_dim, config.head_dim)  # fmt: skip
        model = ctypes.c_void_p(make(ctypes.byref(described)))
        context = ctypes.c_void_p(ggml.ggml_init(InitParams(1 << 22, None, True)))
        shapes = matrices(config)
        tensors = (ctypes.c_void_p * len(shapes))()
        for i, (name, (rows, columns)) in enumerate(shapes.items()):
            tensors[i] = ggml.ggml_new_tensor_2d(context, 1, columns, rows)
            ggml.ggml_set_name(tensors[i], (hf_to_gguf(name) or "").encode())
        found = (ctypes.c_int * len(shapes))()
        state = ctypes.c_void_p(init(model, ctypes.byref(params)))
        choose(state, FILE_TYPES[kind].id, tensors, found, ctypes.c_size_t(len(shapes)))
        return {name: BLOCKS[found[i]].name for i, name in enumerate(shapes)}

    yield run


@pytest.mark.parity
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", QUANTISED)
def test_types_are_llama_cpps(kind: str, shape: str, llama_cpp_types: Chooser) -> None:
    config = tiny_config(**SHAPES[shape])
    assert ours(config, kind, False) == llama_cpp_types(config, kind)


@pytest.mark.parity
@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("kind", QUANTISED)
def test_types_are_those_of_its_files(tmp_path: Path, kind: str, calibrated: bool, tiny_file: Path) -> None:
    """What llama_model_quantize writes, with and without an importance matrix; the file type too."""
    llama_cpp: Any = pytest.importorskip("llama_cpp")
    source = checkpoint.open(tiny_file)
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread = FILE_TYPES[kind].id, 1
    kept = []
    if calibrated:
        entries = []
        for name, (_, columns) in matrices(source.config).items():
            values = (ctypes.c_float * columns)(*[1.0 + i % 3 for i in range(columns)])
            kept.append(values)
            entries.append(((hf_to_gguf(name) or "").encode(), values, columns))
        array = (llama_cpp.llama_model_imatrix_data * (len(entries) + 1))(*entries)
        params.imatrix = array
    theirs = tmp_path / "theirs.gguf"
    assert llama_cpp.llama_model_quantize(str(tiny_file).encode(), str(theirs).encode(), ctypes.byref(params)) == 0
    convert(tiny_file, tmp_path / "ours.gguf", ConversionSettings("gguf", dtype=kind, calibrated=calibrated))
    found, expected = (GgufFile(path).tensors for path in (tmp_path / "ours.gguf", theirs))
    assert {name: info.type_id for name, info in found.items()} == {n: info.type_id for n, info in expected.items()}
    numbers = [read_metadata(path)["general.file_type"] for path in (tmp_path / "ours.gguf", theirs)]
    assert numbers == [FILE_TYPES[kind].id] * 2


@pytest.fixture(scope="module")
def tiny_file(tmp_path_factory: pytest.TempPathFactory, tokenizer_model: Path) -> Path:
    """A float16 GGUF file of 16 layers with grouped heads; its down projections are rows of 288, for the fallback."""
    root = tmp_path_factory.mktemp("tiny")
    model = tiny_model(torch.float32, hidden_size=256, intermediate_size=288, num_hidden_layers=16, vocab_size=32000)
    model.save_pretrained(root / "hf")
    (root / "hf" / "tokenizer.model").write_bytes(tokenizer_model.read_bytes())
    return convert(root / "hf", root / "x.gguf", ConversionSettings("gguf", dtype="float16")).path
