"""The server as a Ray Serve application: replicas that share nothing, behind Ray's own proxy.

    serve run llama2.serve.ray:build model=meta-llama/Llama-2-7b-chat-hf replicas=4 num_gpus=1

The routes are those of `llama2 serve`. Replicas keep no state of clients, so any of them can answer any request. One
that dies takes its running answers with it: their connections end, and Ray starts another replica.
"""

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from llama2.auto import AutoModelForCausalLM, AutoTokenizer
from llama2.engine.engine import Engine
from llama2.errors import MissingDependencyError
from llama2.runners.native import NativeModel
from llama2.serve import limits
from llama2.serve.app import make_app
from llama2.serve.auth import Keys
from llama2.serve.policy import Policy
from llama2.serve.service import Service


class Settings(BaseModel):
    """Settings, given as NAME=VALUE after `serve run llama2.serve.ray:build`."""

    model_config = ConfigDict(extra="forbid")
    model: str
    replicas: int = Field(1, ge=1)
    num_cpus: float = Field(1.0, ge=0)  # what Ray reserves for a replica
    num_gpus: float = Field(0.0, ge=0)
    threads: int | None = Field(None, ge=1)  # of the native engine; None: as many as the machine or container has
    served_model_name: str | None = None
    dtype: str = "auto"
    api_key_file: str | None = None
    max_concurrent_requests: int = Field(128, ge=1)  # of a replica; more wait at Ray's proxy
    max_total_tokens: int | None = None
    max_batch_total_tokens: int | None = None
    max_batch_prefill_tokens: int = Field(512, ge=1)
    max_batch_size: int = Field(64, ge=1)
    shutdown_timeout: float = Field(25.0, ge=0)

    def service(self) -> Service:
        """A service with its model, ready."""
        name = self.served_model_name or self.model
        keys = Keys((), Path(self.api_key_file) if self.api_key_file else None)
        service = Service(Policy(names=(name,), max_concurrent_requests=self.max_concurrent_requests), keys)
        wanted = limits.Wanted(
            max_total_tokens=self.max_total_tokens,
            max_batch_total_tokens=self.max_batch_total_tokens,
            max_batch_prefill_tokens=self.max_batch_prefill_tokens,
            max_batch_size=self.max_batch_size,
        )
        model = self._load()
        tokens, _ = limits.cache_tokens(model, wanted, limits.bytes_per_token(model, "auto", None))
        engine = Engine(
            model,
            AutoTokenizer.from_pretrained(self.model),
            cache_tokens=tokens,
            budget=self.max_batch_prefill_tokens,
            width=self.max_batch_size,
        )
        service.open(engine, limits.bounds(engine, wanted))
        return service

    def _load(self) -> Any:
        device = "cuda" if self.num_gpus else "cpu"
        model = AutoModelForCausalLM.from_pretrained(self.model, dtype=self.dtype, device_map=device).eval()
        return model if self.threads is None or self.num_gpus else NativeModel.from_module(model, self.threads)


class Replica:
    """The methods that Ray calls on a replica besides its routes; `app` is the wrapper's."""

    app: Any

    def check_health(self) -> None:
        """Raises RuntimeError where the engine has stopped moving: Ray then replaces the replica."""
        if not self.app.state.service.alive():
            raise RuntimeError("the engine has not moved for two minutes")

    def __del__(self) -> None:
        if hasattr(self, "_asgi_app"):  # not where loading the model failed
            self.app.state.service.close()


def build(settings: Settings) -> Any:
    """The application, for `serve run`, a Serve config file or `ray.serve.run`."""
    try:
        from ray import serve
    except ImportError as error:
        raise MissingDependencyError("this needs Ray Serve; run `pip install 'ray[serve]'`") from error

    def app() -> Any:
        return make_app(settings.service())

    deployment = serve.deployment(
        serve.ingress(app)(Replica),
        name="llama2",
        num_replicas=settings.replicas,
        ray_actor_options={"num_cpus": settings.num_cpus, "num_gpus": settings.num_gpus},
        max_ongoing_requests=settings.max_concurrent_requests,
        graceful_shutdown_timeout_s=settings.shutdown_timeout,
        health_check_period_s=10,
    )
    return deployment.bind()
