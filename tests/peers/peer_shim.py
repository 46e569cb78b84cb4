"""pytest plugin: upstream's own tests, run on llama2's classes. See README.md; run.sh loads it.

Replaces the classes before a test module is imported, counts whose code each test ran, and writes the report.
"""

import inspect
import json
import os
import re
import shutil
import sys
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import peer_bridges
import peer_count
import peer_hub
import peer_replace
import pytest
from peer_count import RAN
from peer_environment import ACTIVATION, MODEL_FILE, NO_SKIPS, REPORT, RUNNER, STRICT, V5, WORK, llama2
from peer_rules import RULES

peer_replace.install()
peer_count.install(peer_replace.OURS, peer_replace.REPLACED)
if RUNNER:  # of generate(): "torch" leaves the native engine out
    _request = llama2.generation.request
    _make_runner = _request.make_runner
    _request.make_runner = lambda runner, *a, **k: _make_runner(RUNNER if runner == "auto" else runner, *a, **k)
peer_bridges.always()
if not STRICT:
    peer_bridges.install()

RESULTS: list[dict[str, Any]] = []
ADAPTED: set[str] = set()
COMMON = (
    "tests.test_configuration_common",
    "tests.test_modeling_common",
    "tests.generation.test_utils",
    "tests.test_tokenization_common",
)


# -- test modules -------------------------------------------------------------------------------------------------


def adapt(module: Any) -> None:
    """Puts the real vocabulary in the place of fixtures, and the classes that llama2 has in the place of upstream's."""
    if module.__name__ in ADAPTED:
        return
    ADAPTED.add(module.__name__)
    if hasattr(module, "SAMPLE_VOCAB"):
        module.SAMPLE_VOCAB = str(MODEL_FILE)
    if hasattr(module, "hf_hub_download"):
        module.hf_hub_download = lambda repo_id, filename, local_dir, **_: shutil.copy(
            MODEL_FILE, Path(local_dir) / filename
        )
    for part in [m for name, m in sys.modules.items() if name.startswith("tests.") or m is module]:
        if hasattr(part, "hub_online_once"):  # peft's helper asks the hub once per model
            part.hub_online_once = lambda *_: nullcontext()
    for value in list(vars(module).values()):
        if inspect.isclass(value) and value.__module__ == module.__name__:
            _keep_ours(value)
    for name in COMMON:
        if name in sys.modules and name not in ADAPTED:
            ADAPTED.add(name)
            _adapt_common(sys.modules[name])
    tester = getattr(module, "LlamaModelTester", None)
    if tester is not None:
        _adapt_tester(tester)


def _is_ours(cls: Any) -> bool:
    return getattr(cls, "__module__", "").startswith("llama2.")


def _keep_ours(test_class: Any) -> None:
    for field in ("all_model_classes", "all_generative_model_classes"):
        if isinstance(vars(test_class).get(field), tuple):
            setattr(test_class, field, tuple(filter(_is_ours, vars(test_class)[field])))
    mapping = vars(test_class).get("pipeline_model_mapping")
    if isinstance(mapping, dict):
        test_class.pipeline_model_mapping = {task: cls for task, cls in mapping.items() if _is_ours(cls)}


def _adapt_tester(tester: Any) -> None:
    if hasattr(tester, "_verify_and_infer_model_attributes"):  # 5.x infers the classes from names of modules
        tester._verify_and_infer_model_attributes = classmethod(lambda cls: None)
        tester.config_class, tester.causal_lm_class = llama2.LlamaConfig, llama2.LlamaForCausalLM
        tester.sequence_classification_class = llama2.LlamaForSequenceClassification
        for field, name in (
            ("token_classification_class", "LlamaForTokenClassification"),
            ("question_answering_class", "LlamaForQuestionAnswering"),
        ):
            if hasattr(llama2, name):
                setattr(tester, field, getattr(llama2, name))
    if ACTIVATION:  # upstream's tiny models have gelu, which the native engine leaves to torch; silu brings it in
        make = tester.get_config

        def get_config(self: Any) -> Any:
            config = make(self)
            config.hidden_act = ACTIVATION
            return config

        tester.get_config = get_config


def _adapt_common(part: Any) -> None:
    if hasattr(part, "TokenizersBackend"):  # 5.x asks by this class what overflow looks like, and LlamaTokenizer is one
        part.TokenizersBackend = llama2.tokenizer.PreTrainedTokenizer
    elif not STRICT and hasattr(part, "TokenizerTesterMixin"):
        part.PreTrainedTokenizerFast = peer_bridges.FastByOverflow("PreTrainedTokenizerFast", (), {})
    if hasattr(part, "ConfigTester"):
        part.ConfigTester.run_common_tests = config_steps
    if hasattr(part, "Cache"):
        kinds = (llama2.DynamicCache, llama2.StaticCache)
        part.Cache = type("AnyCache", (type,), {"__instancecheck__": lambda cls, x: isinstance(x, kinds)})(
            "Cache", (), {}
        )
    if hasattr(part, "ModelTesterMixin"):
        mixin = part.ModelTesterMixin
        check = mixin.check_training_gradient_checkpointing

        def without_base(self: Any, *args: Any, **kwargs: Any) -> Any:
            """Upstream leaves out the base model by a skip inside a subTest, which ends the test."""
            self.all_model_classes = tuple(c for c in self.all_model_classes if c is not llama2.LlamaModel)
            return check(self, *args, **kwargs)

        mixin.check_training_gradient_checkpointing = without_base


class _Declining(llama2.LlamaConfig):
    """Where upstream tries hidden_size=0: it takes NotImplementedError for a refusal, ours is a ConfigError."""

    def __init__(self, **fields: Any) -> None:
        try:
            super().__init__(**fields)
        except llama2.ConfigError as error:
            raise NotImplementedError from error


def config_steps(self: Any) -> None:
    """Every step of upstream's ConfigTester, not only those up to the first failure."""
    # A width of 37 for 32 heads is no model: llama2 refuses it, and so does transformers 5.23.
    self.inputs_dict = {**self.inputs_dict, "hidden_size": 64}
    steps = [n for n in dir(type(self)) if n.startswith(("create_and_test_config_", "check_config_"))]
    failed = []
    for name in steps:
        self.config_class = _Declining if name.endswith("common_properties") else llama2.LlamaConfig
        try:
            getattr(self, name)()
        except Exception as error:
            failed.append(f"{name}: {error!r}"[:300])
    RAN["ours:config steps"] += 1
    if failed:
        raise AssertionError(f"{len(failed)} of {len(steps)} steps: " + " || ".join(failed))


# -- pytest -------------------------------------------------------------------------------------------------------


def pytest_configure() -> None:
    WORK.mkdir(parents=True, exist_ok=True)
    peer_hub.make()
    warnings.filterwarnings("ignore")


def rule_for(nodeid: str) -> str | None:
    """Why this test cannot apply; None where it can."""
    for rule in RULES:
        if rule.only in (None, "5" if V5 else "4.46") and re.search(rule.pattern, nodeid):
            return f"[{rule.group}] {rule.reason}"
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        reason = rule_for(item.nodeid)
        if reason and not NO_SKIPS:
            item.add_marker(pytest.mark.skip(reason=reason))


def pytest_collectstart(collector: Any) -> None:
    if inspect.ismodule(getattr(collector, "_obj", None)):
        adapt(collector._obj)


def pytest_pycollect_makeitem(collector: Any) -> None:
    if inspect.ismodule(getattr(collector, "obj", None)):
        adapt(collector.obj)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_protocol() -> Iterator[None]:
    RAN.clear()
    yield


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: Any) -> Iterator[None]:
    outcome: Any = yield
    report = outcome.get_result()
    if report.when != "call" and not (report.when == "setup" and report.outcome != "passed"):
        return
    text: Any = ""
    if report.outcome == "failed":
        text = described(call.excinfo)
    elif report.outcome == "skipped":
        text = str(report.longrepr[2]) if isinstance(report.longrepr, tuple) else str(report.longrepr)
    ran = {
        kind: sorted(label for label in RAN if label.startswith(starts))
        for kind, starts in (("ours", "ours:"), ("theirs", "theirs:"), ("met", ("bridged:", "assumed:")))
    }
    RESULTS.append({"id": item.nodeid, "outcome": report.outcome, **ran, "text": text})


def described(excinfo: Any) -> dict[str, str]:
    """A failure: its kind and message, the last line of llama2, of the test, and of all."""
    if excinfo is None:
        return dict.fromkeys(("kind", "text", "product", "where", "test"), "")
    lines = [(str(entry.path), entry.lineno + 1) for entry in reversed(list(excinfo.traceback))]
    product = (f"{p}:{n}" for p, n in lines if "llama2" in p and "site-packages" not in p and "/tests/" not in p)
    test = (f"{Path(p).name}:{n}" for p, n in lines if "/tests/" in p and "/peers/" not in p)
    return {
        "kind": excinfo.typename,
        "text": str(excinfo.value)[:600],
        "product": next(product, ""),
        "where": "{}:{}".format(*lines[0]),
        "test": next(test, ""),
    }


def folded(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per test: failed where any of its subtests failed, skipped where nothing ran."""
    rows: dict[str, dict[str, Any]] = {}
    for result in results:
        old = rows.setdefault(result["id"], result)
        if old is result:
            continue
        worst = next(o for o in ("failed", "passed", "skipped") if o in (old["outcome"], result["outcome"]))
        kept = old if old["outcome"] == worst else result
        lists = {key: sorted({*old[key], *result[key]}) for key in ("ours", "theirs", "met")}
        rows[result["id"]] = {**kept, **lists}
    return list(rows.values())


def pytest_sessionfinish() -> None:
    REPORT.write_text(json.dumps(folded(RESULTS), indent=1))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    show = Path(__file__).with_name("show.py")
    terminalreporter.write_line(f"report: {REPORT} ({os.path.relpath(show)} groups its failures by cause)")
