"""Two replicas behind Ray's proxy: the routes' own tests, and the death of a replica under load."""

import inspect
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from http.client import HTTPException
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from serve import test_routes
from wire import post

ray = pytest.importorskip("ray", reason="needs `pip install 'ray[serve]'`")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def served(extra: None, tiny_folder: Path) -> Iterator[Any]:
    """Two replicas; only what is on the wire can be asked of them."""
    from ray import serve

    from llama2.serve.ray import Settings, build

    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    ray.init(num_cpus=4, include_dashboard=False, configure_logging=False, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    settings = Settings(
        model=str(tiny_folder), served_model_name="tiny", replicas=2, num_cpus=0.5, max_batch_total_tokens=16384
    )
    serve.run(build(settings), name="llama2", route_prefix="/")
    yield SimpleNamespace(port=port, url=f"http://127.0.0.1:{port}")
    serve.shutdown()
    ray.shutdown()


NOT_OURS = ("test_request_ids_and_security_headers",)  # the proxy replaces x-request-id by a rule of its own


def _on_the_wire(test: Any) -> bool:
    return list(inspect.signature(test).parameters) == ["served"] and "served." not in inspect.getsource(test).replace(
        "served.port", ""
    ).replace("served.url", "")


for _name, _test in vars(test_routes).items():
    if _name.startswith("test_") and _name not in NOT_OURS and callable(_test) and _on_the_wire(_test):
        globals()[_name] = _test


def pids() -> list[int]:
    """Processes of our replicas: grandchildren of this process, whose child is Ray's node."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdecimal() and (entry / "cmdline").read_bytes().startswith(b"ray::ServeReplica"):
                parent = _parent(int(entry.name))
                if _parent(parent) == os.getpid():
                    found.append(int(entry.name))
        except OSError:
            continue  # it has just ended
    return found


def _parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def test_a_replica_killed_under_load_leaves_nobody_waiting(served: Any) -> None:
    body = {"prompt": "Hi", "max_tokens": 900, "temperature": 1.5, "ignore_eos": True, "stream": True}
    ends: list[str] = []

    def client(seed: int) -> None:
        try:
            reply = post(served.port, "/v1/completions", body | {"seed": seed})
            ends.append("whole" if reply.status == 200 and b"[DONE]" in reply.content else "broken")
        except (OSError, HTTPException):
            ends.append("broken")

    if not Path("/proc/self/stat").exists():
        pytest.skip("finds the replicas' processes in /proc")
    before = pids()
    assert len(before) == 2
    threads = [threading.Thread(target=client, args=(i,), daemon=True) for i in range(8)]
    for thread in threads:
        thread.start()
    time.sleep(1.0)
    os.kill(before[0], signal.SIGKILL)
    for thread in threads:
        thread.join(90)
    assert len(ends) == 8, "a request hangs"
    assert "whole" in ends  # those of the other replica
    for _ in range(100):
        if len(now := pids()) == 2 and before[0] not in now:
            break
        time.sleep(0.5)
    assert before[0] not in pids()
    for seed in range(4):
        assert post(served.port, "/v1/completions", {"prompt": "Hi", "max_tokens": 4, "seed": seed}).status == 200
