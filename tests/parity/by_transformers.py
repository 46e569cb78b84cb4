"""What the transformers of the interpreter that runs this file makes of checkpoint folders.

    python by_transformers.py JOB.json RESULT.npz

JOB: {"ids": token ids (rows, tokens), "folders": {name: path}, "texts": [text]}. RESULT: logits (rows, tokens, V) of
each folder in float32 under its name; for folders with a tokenizer the ids of each text under "name/0", "name/1", ...;
and the version under "version". Knows nothing of this library, so that any version can be asked.
"""

import json
import sys
from pathlib import Path

import numpy
import torch
import transformers


def main(job: str, result: str) -> None:
    """Runs the job."""
    asked = json.loads(Path(job).read_text())
    found = {"version": numpy.array(transformers.__version__)}
    for name, folder in asked["folders"].items():
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            folder, torch_dtype=torch.float32, output_loading_info=True
        )
        assert not any(info.values()), f"{name}: {info}"
        with torch.no_grad():
            found[name] = model.eval()(torch.tensor(asked["ids"])).logits.numpy()
        if (Path(folder) / "tokenizer.json").exists():
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
            for i, text in enumerate(asked["texts"]):
                found[f"{name}/{i}"] = numpy.array(tokenizer(text)["input_ids"])
    numpy.savez(result, **found)


if __name__ == "__main__":
    main(*sys.argv[1:])
