"""The manifests: valid, and true about the server they start."""

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from llama2.cli.args import parse
from llama2.cli.serve import ServeOptions

yaml = pytest.importorskip("yaml", reason="needs pyyaml")
FOLDER = Path(__file__).resolve().parents[2] / "deploy" / "kubernetes"
FILES = sorted(p for p in FOLDER.glob("*.yaml") if p.name != "kustomization.yaml")


def read(name: str) -> Any:
    return yaml.safe_load((FOLDER / f"{name}.yaml").read_text())


@pytest.fixture(scope="module")
def pod() -> Any:
    return read("deployment")["spec"]["template"]["spec"]


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_fits_the_schema(path: Path) -> None:
    validate = pytest.importorskip("kubernetes_validate", reason="needs `pip install kubernetes-validate`")
    validate.validate(yaml.safe_load(path.read_text()), validate.latest_version(), strict=True)


def test_the_map_of_options_is_what_the_server_takes(pod: Any) -> None:
    given = read("configmap")["data"]
    found = parse(ServeOptions, "llama2 serve", (), given)
    assert found.model == given["HF_MODEL_ID"] and found.max_total_tokens == 4096 and found.public_metrics
    names = {f"LLAMA2_{name.upper()}" for name in ServeOptions.__dataclass_fields__}
    assert {name for name in given if name.startswith("LLAMA2_")} <= names
    folder, _, name = given["LLAMA2_API_KEY_FILE"].rpartition("/")
    mounts = {m["name"]: m["mountPath"] for m in pod["containers"][0]["volumeMounts"]}
    assert mounts["keys"] == folder and read("kustomization")["secretGenerator"][0]["files"] == [name]
    assert found.drain_delay and found.shutdown_timeout  # and five seconds to cut what is left
    assert found.drain_delay + found.shutdown_timeout + 5 < pod["terminationGracePeriodSeconds"]


def test_probes_and_metrics_are_the_servers(pod: Any) -> None:
    pytest.importorskip("fastapi", reason="serving needs the extra `serve`")
    from llama2.serve.app import make_app
    from llama2.serve.service import Service

    service = Service()
    app = make_app(service)
    paths = {getattr(route, "path", "") for route in app.routes}
    container = pod["containers"][0]
    ports = {p["name"]: p["containerPort"] for p in container["ports"]}
    probes = [container[f"{kind}Probe"]["httpGet"] for kind in ("startup", "readiness", "liveness")]
    assert [p["path"] for p in probes] == ["/ready", "/ready", "/health"] and {p["path"] for p in probes} <= paths
    assert {p["port"] for p in probes} == {"http"} == {read("service")["spec"]["ports"][0]["targetPort"]}
    told = read("deployment")["spec"]["template"]["metadata"]["annotations"]
    assert told["prometheus.io/path"] in paths and told["prometheus.io/port"] == str(ports["http"])
    service.close()


def test_the_autoscaler_goes_by_a_metric_that_there_is(pod: Any) -> None:
    from llama2.serve import service as module

    source = Path(module.__file__).read_text()
    (metric,) = read("hpa")["spec"]["metrics"]
    assert f'watch("{metric["pods"]["metric"]["name"]}"' in source
    assert read("hpa")["spec"]["scaleTargetRef"]["name"] == read("deployment")["metadata"]["name"]


def test_selectors_select_the_pods() -> None:
    labels = read("deployment")["spec"]["template"]["metadata"]["labels"]
    for selector in (
        read("deployment")["spec"]["selector"]["matchLabels"],
        read("service")["spec"]["selector"],
        read("pdb")["spec"]["selector"]["matchLabels"],
    ):
        assert selector.items() <= labels.items()


def test_kubectl_puts_them_together(tmp_path: Path) -> None:
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("needs kubectl on the PATH")
    shutil.copytree(FOLDER, tmp_path / "k")
    (tmp_path / "k" / "keys.txt").write_text("alice: secret\n")
    done = subprocess.run([kubectl, "kustomize", tmp_path / "k"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    kinds = [document["kind"] for document in yaml.safe_load_all(done.stdout)]
    assert sorted(kinds) == [
        "ConfigMap", "Deployment", "HorizontalPodAutoscaler", "PodDisruptionBudget", "Secret", "Service",
    ]  # fmt: skip
