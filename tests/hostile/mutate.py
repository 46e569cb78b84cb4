"""Changes to files that a stranger could make: to bytes, to JSON, to headers, to what a name in a folder stands for."""

import io
import json
import os
import random
import re
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

DEEP = "[" * 5000
WORDS = ["", "..", "/etc/passwd", "../config.json", "a" * 5000, "\0", "\ud800", "\u2028", "</s>", "{{ 1/0 }}", "(a+)+$",
         "{% for i in range(10**9) %}{% endfor %}", "{{ ''.__class__ }}", "F32", "llama3", "-1",
         "é" * 300]  # fmt: skip
NUMBERS = [0, 1, -1, 2, 3, 7, 255, 4096, 2**16, 100_000, 10**7, 2**31, 2**32, 2**40, 2**63, 2**64, 2**70, -(2**63),
           10**400, 0.5, -0.5, 1e-300, 1e308, float("inf"), float("nan")]  # fmt: skip
NAMES = ("to_dict", "validate", "__class__", "__dict__", "_dtype_name", "num_labels", "id2label", "self",
         "rope_parameters", "head_dim", "dtype", "from_pretrained", "quantization_config", "num_parameters", "dynamic",
         "rank_pattern", "modules_to_save", "vocab_file", "trainable_token_indices", "layers_to_transform",
         "tokenizer_object", "rope_scaling", "eos_token_ids")  # fmt: skip


def odd(rng: random.Random, depth: int = 0) -> Any:
    """A value that is of another kind than what was there, or far away from it."""
    choice = rng.randrange(8)
    if choice < 2:
        return rng.choice(NUMBERS)
    if choice < 4:
        return rng.choice(WORDS)
    if choice == 4 or depth > 2:
        return rng.choice([None, True, False])
    if choice == 5:
        return [odd(rng, depth + 1) for _ in range(rng.randrange(4))]
    if choice == 6:
        return {rng.choice([*WORDS, *NAMES]): odd(rng, depth + 1) for _ in range(rng.randrange(4))}
    inner: Any = 1
    for _ in range(rng.choice((30, 300, 900))):
        inner = [inner] if rng.random() < 0.5 else {"a": inner}
    return inner


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path to everything in a JSON value; of long lists and objects a few."""
    found = [path]
    items = list(value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ())
    for key, inner in () if len(path) > 12 else items if len(items) < 40 else [*items[:10], *items[-10:]]:
        found += places(inner, (*path, key))
    return found


def changed(value: Any, rng: random.Random) -> Any:
    """A JSON value with one to three changes."""
    value = json.loads(json.dumps(value))
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        path = rng.choice(places(value))
        if not path:
            if rng.random() < 0.2:
                return odd(rng)
            if isinstance(value, dict):
                value[rng.choice(NAMES)] = odd(rng)
            continue
        home = value
        for key in path[:-1]:
            home = home[key]
        way = rng.randrange(6)
        if way == 0:
            del home[path[-1]]
        elif way == 1 and isinstance(home, dict):
            home[rng.choice([*WORDS, *NAMES])] = home.pop(path[-1])
        elif way == 2 and isinstance(home[path[-1]], list):
            home[path[-1]] = home[path[-1]] * rng.choice((2, 50))
        else:
            home[path[-1]] = odd(rng)
    return value


def as_json(value: Any, rng: random.Random) -> bytes:
    text = json.dumps(value)
    return text.encode() if rng.random() < 0.97 else text.replace("[", DEEP, 1).encode()


def json_file(data: bytes, rng: random.Random) -> bytes:
    try:
        value = json.loads(data)
    except ValueError:
        return raw(data, rng)
    if b'"Regex"' in data and rng.random() < 0.7:
        return _REGEX.sub(lambda found: b'"Regex": ' + json.dumps(cut(rng)).encode(), data)
    return as_json(changed(value, rng), rng)


_REGEX = re.compile(rb'"Regex": "(?:[^"\\]|\\.)*"')


def cut(rng: random.Random, depth: int = 0) -> str:
    """A regular expression that may try for ever."""
    found = ""
    for _ in range(rng.randrange(1, 5)):
        atom = rng.choice(("a", "b", ".", r"\s", r"\S", r"\p{L}", r"\w", "[^b]", r"\n", "(?!x)", r"\1", "$", "é"))
        if depth < 4 and rng.random() < 0.4:
            atom = rng.choice(("({})", "(?:{})", "(?={})", "(?!{})", "(?>{})", "(?<={})")).format(cut(rng, depth + 1))
        found += atom + rng.choice(("", "", "*", "+", "?", "+?", "*+", "{3}", "{1,200}", "{999}", "|"))
    return found


def raw(data: bytes, rng: random.Random) -> bytes:
    """Bits, cuts, numbers and repeats anywhere, oftener near the front."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        if not out:
            break
        at = rng.randrange(min(len(out), rng.choice((16, 64, 512, 1 << 20))))
        way = rng.randrange(8)
        if way < 2:
            out[at] ^= 1 << rng.randrange(8)
        elif way < 4:
            size, code = rng.choice(((4, "<I"), (8, "<Q")))
            out[at : at + size] = struct.pack(code, rng.choice((0, 1, 2**28, 2**31, 2**32 - 1, len(out))))
        elif way == 4:
            out[at : at + 8] = struct.pack("<Q", rng.choice((2**28, 2**40, 2**61, 2**63, 2**64 - 1)))
        elif way == 5:
            del out[at:]
        elif way == 6:
            del out[at : at + rng.randrange(1, 64)]
        else:
            out[at:at] = out[at : at + rng.randrange(1, 64)] * rng.choice((1, 3))
    return bytes(out)


def safetensors(data: bytes, rng: random.Random) -> bytes:
    """The header as JSON, its length kept right."""
    length = int.from_bytes(data[:8], "little")
    try:
        header = json.loads(data[8 : 8 + length])
    except ValueError:
        return raw(data, rng)
    text = as_json(changed(header, rng), rng)
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


def archive(data: bytes, rng: random.Random) -> bytes:
    """What torch.save wrote: the pickle changed, its numbers above all; entries compressed, renamed or lost."""
    try:
        old = zipfile.ZipFile(io.BytesIO(data))
    except zipfile.BadZipFile:
        return raw(data, rng)
    out, kind = io.BytesIO(), rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
    with zipfile.ZipFile(out, "w", kind) as new:
        for entry in old.namelist():
            content, name = old.read(entry), entry
            if entry.endswith("data.pkl") and rng.random() < 0.8:
                content = _numbers(content, rng) if rng.random() < 0.7 else raw(content, rng)
            elif rng.random() < 0.1:
                content = rng.choice((b"", raw(content, rng), bytes(1 << 20)))
            if rng.random() < 0.03:
                name = rng.choice(WORDS[:5]).replace("\0", "") or "x"
            if rng.random() > 0.03:
                new.writestr(name, content)
    return out.getvalue()


def _numbers(content: bytes, rng: random.Random) -> bytes:
    """A pickle with some of its one- and two-byte numbers replaced by others, larger ones too."""
    found = [i for i, byte in enumerate(content[:-3]) if byte in (0x4B, 0x4D)]
    for at in rng.sample(found, min(len(found), rng.choice((1, 2, 8)))):
        if content[at] == 0x4B:
            content = content[: at + 1] + bytes([rng.choice((0, 1, 255))]) + content[at + 2 :]
        else:
            big = b"J" + struct.pack("<i", rng.choice((0, 1, 2**30, 2**31 - 1)))
            content = content[:at] + big + content[at + 3 :]
    return content


def text(data: bytes, rng: random.Random) -> bytes:
    return rng.choice(
        (raw(data, rng), data + rng.choice(WORDS).encode("utf-8", "replace"), data * 1000, b"\xff\xfe" + data)
    )


def rows(data: bytes, rng: random.Random) -> bytes:
    """JSON lines, one or all of them changed in their values."""
    lines = [json.loads(line) for line in data.splitlines()]
    for number in rng.sample(range(len(lines)), rng.choice((1, len(lines)))):
        lines[number] = changed(lines[number], rng)
    return b"\n".join(as_json(line, rng) for line in lines)


def table(data: bytes, rng: random.Random) -> bytes:
    """Comma-separated fields, some long, some beyond the line."""
    fields = rng.choice((b"x" * 200_000, b'"' + b"x" * 9000, b'"a\nb"', b"\0", b",,,", b"1e400", b"\xff"))
    return data.replace(rng.choice((b"c", b"d", b"output", b",")), fields, rng.choice((1, -1)))


def mutate(file: Path, rng: random.Random) -> str:
    """Changes a file of a folder in one way and says which."""
    if rng.random() < 0.04:
        return special(file, rng)
    data, way = file.read_bytes(), raw
    if rng.random() < 0.75:
        way = _BY_SUFFIX.get(file.suffix, raw)
    file.write_bytes(way(data, rng))
    return way.__name__


def special(file: Path, rng: random.Random) -> str:
    """What a name stands for: nothing, a folder, a FIFO, a link to a device or out of the folder."""
    kind = rng.choice(("empty", "missing", "folder", "fifo", "device", "loop", "outside"))
    file.unlink()
    if kind == "empty":
        file.touch()
    elif kind == "folder":
        file.mkdir()
    elif kind == "fifo":
        os.mkfifo(file)
    elif kind in ("device", "loop", "outside"):
        file.symlink_to({"device": "/dev/zero", "loop": file, "outside": "/etc/hostname"}[kind])
    return kind


_BY_SUFFIX: dict[str, Callable[[bytes, random.Random], bytes]] = {
    ".json": json_file, ".jsonl": rows, ".csv": table, ".jinja": text, ".safetensors": safetensors, ".bin": archive,
    ".pth": archive, ".pt": archive,
}  # fmt: skip
