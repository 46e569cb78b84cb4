"""Settings of the operator, besides the model."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Policy:
    """Choices of the operator.

    names: of the model, as it is shown; aliases: others that it answers to. unknown_fields: warn, refuse or ignore.
    strict_roles: conversations are refused that the template does not take as they are. context_overflow: what happens
    to a prompt that is too long: refuse or truncate; shift truncates it, and an answer goes on beyond the context.
    """

    names: tuple[str, ...] = ("llama2",)
    aliases: tuple[str, ...] = ()
    revision: str | None = None
    unknown_fields: str = "warn"
    strict_roles: bool = False
    context_overflow: str = "refuse"
    parse_special: bool = True
    payload_limit: int = 2_000_000
    request_timeout: float = 0.0
    stall_timeout: float = 60.0
    cors_origins: tuple[str, ...] = ()
    public_metrics: bool = False
    allowed_hosts: tuple[str, ...] = ()
    workers: int = 2
    validation_timeout: float = 10.0
    body_timeout: float = 30.0
    max_unparsed_bytes: int = 64_000_000
    max_unread_bytes: int = 256_000_000
    max_concurrent_requests: int = 128
    max_requests_per_key: int | None = None
    tokens_per_minute: int | None = None
