"""Runs every suite, one after the other, and prints one line per suite: plain / bridged / failed / cannot apply.

    python suites.py [PART OF A SUITE'S NAME ...]

PEERS_ROOT, PROJECT and the PEER_ variables as for run.sh. With PEER_STRICT=1 (nothing bridged) the exit code is 1 where
a test that can apply fails.
"""

import os
import subprocess
import sys
from pathlib import Path

from show import line, totals

HERE = Path(__file__).resolve().parent
MODEL = ["tests/models/llama/test_modeling_llama.py"]
TOKENIZER = ["tests/models/llama/test_tokenization_llama.py"]
GENERATION = [f"tests/generation/test_{name}.py" for name in ("logits_process", "stopping_criteria", "streamers")]
GENERATION.append("tests/generation/test_configuration_utils.py")
INTEGRATION = [f"tests/generation/test_{name}.py" for name in ("utils", "beam_search", "beam_constraints")]
PEFT = ["tests/test_decoder_models.py", "-k", "LlamaForCausalLM and LoraConfig"]
SUITES: dict[str, tuple[str, list[str], dict[str, str]]] = {  # name: (version, arguments of pytest, environment)
    "446-model-gelu": ("446", MODEL, {"PEER_ACT": "gelu"}),
    "446-model-silu": ("446", MODEL, {"PEER_ACT": "silu"}),
    "446-tokenizer": ("446", TOKENIZER, {}),
    "446-generation": ("446", GENERATION, {}),
    "446-integration": ("446", INTEGRATION, {}),
    "5-model-gelu": ("5", MODEL, {"PEER_ACT": "gelu"}),
    "5-model-silu": ("5", MODEL, {"PEER_ACT": "silu"}),
    "5-tokenizer": ("5", TOKENIZER, {}),
    "5-generation": ("5", GENERATION, {}),
    "peft-lora": ("peft", PEFT, {}),
    "peft-lora-torch": ("peft", PEFT, {"PEER_RUNNER": "torch"}),
}


def run(name: str, work: Path) -> dict[str, int] | None:
    """The counts of one suite; None where it wrote no report. Its output goes to a file beside the report."""
    version, arguments, more = SUITES[name]
    report = work / f"{name}.json"
    report.unlink(missing_ok=True)
    environment = {**os.environ, **more, "PEER_WORK": str(work), "PEER_REPORT": report.name}
    with (work / f"{name}.log").open("w") as log:
        command = [str(HERE / "run.sh"), version, *arguments, "--timeout", "120"]
        subprocess.run(command, env=environment, stdout=log, stderr=subprocess.STDOUT, check=False)
    return totals(report) if report.exists() else None


def main() -> int:
    strict = bool(os.environ.get("PEER_STRICT"))
    root = Path(os.environ.get("PEER_WORK") or Path(os.environ["PEERS_ROOT"]) / "work")
    chosen = [name for name in SUITES if not sys.argv[1:] or any(part in name for part in sys.argv[1:])]
    bad = not chosen
    for name in chosen:
        work = root / name.split("-")[0]  # one stand-in for the hub per version
        work.mkdir(parents=True, exist_ok=True)
        counts = run(name, work)
        if counts is None:
            bad = True
            print(f"{name:<34} no report: see {work / name}.log", flush=True)
            continue
        bad |= strict and counts["failed"] > 0
        print(line(name, counts), flush=True)
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
