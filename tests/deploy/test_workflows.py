"""The public CI files: valid, and true of this tree (targets, files, Pythons)."""

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

yaml = pytest.importorskip("yaml")

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / ".github" / "workflows"
FILES = sorted(path.name for path in FOLDER.glob("*.yml"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
TARGETS = set(re.findall(r"^([\w-]+):(?!=)", (ROOT / "Makefile").read_text(), re.M))


def workflow(name: str) -> dict[Any, Any]:
    """YAML 1.1 reads the key `on` as True."""
    found: dict[Any, Any] = yaml.safe_load((FOLDER / name).read_text())
    return found


def steps(name: str) -> list[dict[str, Any]]:
    return [step for job in workflow(name)["jobs"].values() for step in job.get("steps", [])]


def test_the_files_are_there() -> None:
    assert FILES == ["release.yml", "test.yml", "wheels.yml"]


@pytest.mark.parametrize("name", FILES)
def test_jobs_are_whole(name: str) -> None:
    found = workflow(name)
    assert set(found) <= {"name", True, "concurrency", "permissions", "jobs"}
    assert found["permissions"] == {"contents": "read"}  # a job asks for more where it needs more
    for job in found["jobs"].values():
        assert ("uses" in job) != ("runs-on" in job and bool(job["steps"]))
        needs = job.get("needs", [])
        assert {needs} <= set(found["jobs"]) if isinstance(needs, str) else set(needs) <= set(found["jobs"])
        if "uses" in job:
            assert (
                True in workflow(Path(job["uses"]).name) and "workflow_call" in workflow(Path(job["uses"]).name)[True]
            )
        matrix = job.get("strategy", {}).get("matrix", {})
        asked = set(re.findall(r"\$\{\{ *matrix\.(\w+) *\}\}", str(job)))
        assert asked <= set(matrix) - {"include", "exclude"}


@pytest.mark.parametrize("name", FILES)
def test_steps_do_one_thing_with_a_version_and_with_what_this_tree_has(name: str) -> None:
    for step in steps(name):
        assert ("run" in step) != ("uses" in step), step
        if "uses" in step:
            assert re.fullmatch(r"[\w-]+/[\w-]+@(v\d+|release/v\d+)", step["uses"]), step
            continue
        assert "${{" not in step["run"], f"a value of the event would be run as a command: {step}"
        for target in re.findall(r"\bmake ([\w-]+)", step["run"]):
            assert target in TARGETS, f"make {target}"


def test_the_suite_runs_on_every_python_that_the_metadata_allows() -> None:
    pythons = workflow("test.yml")["jobs"]["suite"]["strategy"]["matrix"]["python"]
    assert pythons[0] == PROJECT["project"]["requires-python"].removeprefix(">=")
    assert pythons == [f"3.{minor}" for minor in range(11, 11 + len(pythons))]
    commands = [step["run"] for step in steps("test.yml") if "run" in step]
    wanted = [line for line in (ROOT / ".ci" / "run").read_text().splitlines() if line.startswith("make ")]
    assert commands == [*wanted, "make docs"]  # one list of what must pass, and the site


def test_wheels_are_built_for_the_first_python_and_for_the_stable_abi() -> None:
    config = PROJECT["tool"]["cibuildwheel"]
    stable = PROJECT["tool"]["scikit-build"]["wheel"]["py-api"]
    assert config["build"] == ["cp311-*", f"{stable}-*"]
    script = re.fullmatch(r"python \{project\}/(\S+)", config["test-command"])
    assert script is not None and (ROOT / script[1]).is_file()
    runners = workflow("wheels.yml")["jobs"]["wheel"]["strategy"]["matrix"]["runner"]
    assert {"ubuntu-24.04", "ubuntu-24.04-arm"} <= set(runners)


def test_nothing_is_published_with_a_stored_token() -> None:
    publish = workflow("release.yml")["jobs"]["publish"]
    assert publish["permissions"] == {"id-token": "write"}
    for name in FILES:
        assert "secrets." not in (FOLDER / name).read_text()
