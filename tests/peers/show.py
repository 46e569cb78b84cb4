"""Reads the reports of the peers' suites.

python show.py REPORT.json      failures by cause, then why tests were left out
python show.py --totals FOLDER  one line per report: plain / bridged / failed / cannot apply
"""

import collections
import json
import sys
from pathlib import Path
from typing import Any

STATES = ("plain", "bridged", "failed", "cannot apply", "none of our code")


def state(row: dict[str, Any]) -> str:
    """Of one test: one of STATES. A test that passed without running any code of llama2 says nothing about it."""
    if row["outcome"] == "failed":
        return "failed"
    if row["outcome"] == "skipped":
        return "cannot apply"
    if not row["ours"]:
        return "none of our code"
    bridged = any(label.startswith("bridged:") for label in row["met"]) or row["theirs"]
    return "bridged" if bridged else "plain"


def totals(report: Path) -> dict[str, int]:
    """How many tests of a report are in each state."""
    counts = collections.Counter(map(state, json.loads(report.read_text())))
    return {name: counts[name] for name in STATES}


def line(name: str, counts: dict[str, int]) -> str:
    """One suite, for people."""
    return f"{name:<34} " + "  ".join(f"{key} {counts[key]:>3}" for key in STATES)


def show(report: Path, width: int = 200) -> None:
    """Prints failures grouped by message and line, the reasons of skips, and what met a bridge."""
    rows = json.loads(report.read_text())
    print(line(report.stem, totals(report)))
    groups = collections.defaultdict(list)
    for row in rows:
        if row["outcome"] == "failed":
            text = row["text"]
            cause = (text["kind"], text["text"][:width].replace("\n", " | "), text["product"] or text["where"])
            groups[cause].append(f"{row['id'].split('::')[-1]} {text['test']}")
    for cause, tests in sorted(groups.items(), key=lambda pair: -len(pair[1])):
        print(len(tests), *cause, sep=" ## ")
        print(*(f"       {test}" for test in tests[:40]), sep="\n")
    skips, bridges = collections.defaultdict(list), collections.defaultdict(list)
    for row in rows:
        name = row["id"].split("::")[-1]
        if row["outcome"] == "skipped":
            skips[str(row["text"])[:160]].append(name)
        for label in row["met"]:
            if label.startswith("bridged:"):
                bridges[label].append(name)
    for title, found in (("cannot apply", skips), ("bridged", bridges)):
        print(f"--- {title}")
        for key, tests in sorted(found.items(), key=lambda pair: -len(pair[1])):
            print(len(tests), key, tests[:6])
    print("--- passed with none of our code, or with objects of theirs")
    for row in rows:
        if row["outcome"] == "passed" and (not row["ours"] or row["theirs"]):
            print("  ", row["id"].split("::")[-1], row["theirs"])


if __name__ == "__main__":
    if sys.argv[1] == "--totals":
        for path in sorted(Path(sys.argv[2]).glob("*.json")):
            print(line(path.stem, totals(path)))
    else:
        show(Path(sys.argv[1]), *map(int, sys.argv[2:3]))
