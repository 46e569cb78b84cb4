"""Counters and histograms in Prometheus' text format, under TGI's names where TGI has them.

Written here and not with prometheus-client, which ends every counter's name in `_total`: TGI's have no such ending, and
a dashboard made for it would stay empty. Everything is plain arithmetic in the event loop: nothing here waits for
anything. Labels come from fixed lists, or are the names of models that are offered: their number is bounded.
"""

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence

from llama2.serve.model_pool import Offer
from llama2.serve.session import Session

DURATIONS = tuple(0.00015 * 1.5**i for i in range(35))  # seconds; TGI's
SIZES = tuple(float(2**i) for i in range(1, 17))  # tokens


def labelled(label: str, value: str) -> str:
    """A label as the format has it; nothing for an empty value."""
    escaped = value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
    return f'{{{label}="{escaped}"}}' if value else ""


class Counter:
    """A number that grows, one for each value of its label."""

    def __init__(self, name: str, help: str, label: str = "", values: Sequence[str] = ()) -> None:
        self.name, self.help, self.label = name, help, label
        self.values = dict.fromkeys(values or ("",), 0.0)

    def add(self, amount: float = 1.0, value: str = "") -> None:
        """Raises KeyError for a label that is not in its list."""
        self.values[value] += amount

    def lines(self) -> list[str]:
        """The text format."""
        rows = [f"# HELP {self.name} {self.help}", f"# TYPE {self.name} counter"]
        for value, amount in self.values.items():
            rows.append(f"{self.name}{labelled(self.label, value)} {amount!r}")
        return rows


class Gauge:
    """A number that is asked for when the page is made, or one for each model."""

    def __init__(self, name: str, help: str, read: Callable[[], float | Mapping[str, float]]) -> None:
        self.name, self.help, self.read = name, help, read

    def lines(self) -> list[str]:
        """The text format."""
        found = self.read()
        values = found if isinstance(found, Mapping) else {"": found}
        rows = [f"{self.name}{labelled('model', value)} {number!r}" for value, number in values.items()]
        return [f"# HELP {self.name} {self.help}", f"# TYPE {self.name} gauge", *rows]


class Histogram:
    """How often values fell at or below each bound."""

    def __init__(self, name: str, help: str, bounds: Sequence[float] = DURATIONS) -> None:
        self.name, self.help, self.bounds = name, help, tuple(bounds)
        self.counts, self.sum = [0] * (len(bounds) + 1), 0.0

    def add(self, value: float) -> None:
        """Counts one value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def lines(self) -> list[str]:
        """The text format."""
        rows, total = [f"# HELP {self.name} {self.help}", f"# TYPE {self.name} histogram"], 0
        for bound, count in zip((*self.bounds, float("inf")), self.counts, strict=True):
            total += count
            rows.append(f'{self.name}_bucket{{le="{"+Inf" if bound == float("inf") else f"{bound:g}"}"}} {total}')
        return [*rows, f"{self.name}_sum {self.sum!r}", f"{self.name}_count {total}"]


FAILURES = (
    "validation", "overloaded", "dropped", "generation", "incomplete", "template", "authentication", "other",
)  # fmt: skip
_FAILURE_OF = {
    "busy": "overloaded", "rate": "overloaded", "closing": "overloaded", "starting": "overloaded",
    "generation": "generation", "constraint": "generation",
    "internal": "incomplete", "deadline": "incomplete", "template": "template", "key": "authentication",
    "load": "other", "memory": "overloaded", "gone": "dropped", "route": "other", "method": "other", "unable": "other",
    "host": "other",
}  # fmt: skip


class Metrics:
    """All of the server's."""

    def __init__(self) -> None:
        self.count = Counter("tgi_request_count", "Requests for text that came in.")
        self.success = Counter("tgi_request_success", "Requests that were answered to their end.")
        self.failure = Counter("tgi_request_failure", "Requests that were not, by reason.", "err", FAILURES)
        self.duration = Histogram("tgi_request_duration", "Seconds from arrival to the end of the answer.")
        self.validation = Histogram("tgi_request_validation_duration", "Seconds of checking and tokenising.")
        self.queued = Histogram("tgi_request_queue_duration", "Seconds in the queue.")
        self.inference = Histogram("tgi_request_inference_duration", "Seconds from the first step to the end.")
        self.per_token = Histogram("tgi_request_mean_time_per_token_duration", "Mean seconds per token, per request.")
        self.generated = Histogram("tgi_request_generated_tokens", "New tokens of a request.", SIZES)
        self.input_length = Histogram("tgi_request_input_length", "Prompt tokens of a request.", SIZES)
        self.max_new = Histogram("tgi_request_max_new_tokens", "New tokens that a request allowed.", SIZES)
        self.first_token = Histogram("llama2_time_to_first_token_seconds", "Seconds from arrival to the first token.")
        self.between = Histogram("llama2_time_between_tokens_seconds", "Seconds between tokens of an answer.")
        self.prompt_tokens = Counter("llama2_prompt_tokens_total", "Prompt tokens taken in.")
        self.new_tokens = Counter("llama2_generation_tokens_total", "Tokens generated.")
        self.reused = Counter("llama2_prefix_cache_tokens_total", "Prompt tokens found in the prefix cache.")
        self.gauges: list[Gauge] = []
        # By model, where there are several; their names are those of files that whoever runs the server has.
        self.of_models = {
            name: Counter(f"llama2_model_{name}_total", help, "model")
            for name, help in (
                ("requests", "Requests that a model took in."),
                ("prompt_tokens", "Prompt tokens that a model took in."),
                ("generation_tokens", "Tokens that a model generated."),
                ("loaded", "Times that a model was loaded."),
                ("load_seconds", "Seconds that loading a model took, of all times."),
                ("failed", "Times that a model could not be loaded."),
                ("unloaded", "Times that a model was unloaded."),
            )
        }

    def add_of_model(self, model: str, **amounts: float) -> None:
        """Counts for one of several models; "" for the only one, which has the counters without a label."""
        if not model:
            return
        for counter in self.of_models.values():
            counter.values.pop("", None)
            counter.values.setdefault(model, 0.0)
        for name, amount in amounts.items():
            self.of_models[name].add(amount, model)

    def model_event(self, offer: Offer, event: str, took: float) -> None:
        """Counts what happened to a model: "loaded", "failed" or "unloaded"."""
        self.add_of_model(offer.name, **{event: 1.0}, load_seconds=took if event == "loaded" else 0.0)

    def watch(self, name: str, help: str, read: Callable[[], float | Mapping[str, float]]) -> None:
        """Adds a gauge."""
        self.gauges.append(Gauge(name, help, read))

    def failed(self, kind: str) -> None:
        """Counts a refusal by its kind, or "gone" for a client that went away."""
        self.failure.add(value=_FAILURE_OF.get(kind, "validation"))

    def taken(self, prompt: int, new: int, model: str = "") -> None:
        """Counts an accepted request; model: its name, where there are several."""
        self.add_of_model(model, requests=1, prompt_tokens=prompt)
        self.input_length.add(prompt)
        self.prompt_tokens.add(prompt)
        self.max_new.add(new)

    def done(self, session: Session, ended: bool, model: str = "") -> None:
        """Counts what a session did; ended: whether it came to its end. model: its name, where there are several."""
        times = session.times
        self.add_of_model(model, generation_tokens=session.tokens)
        self.new_tokens.add(session.tokens)
        self.reused.add(session.reused)
        for gap in session.gaps:
            self.between.add(gap)
        if times.first:
            self.first_token.add(times.first - times.came)
            self.queued.add(max(times.began - times.checked, 0.0))
        if ended:
            self.success.add()
            self.duration.add(times.ended - times.came)
            self.validation.add(times.checked - times.came)
            self.inference.add(times.ended - times.began)
            self.generated.add(session.tokens)
            self.per_token.add((times.ended - times.began) / max(session.tokens, 1))

    def page(self) -> str:
        """The exposition, version 0.0.4."""
        own = [m for m in vars(self).values() if isinstance(m, Counter | Histogram)]
        own += [counter for counter in self.of_models.values() if "" not in counter.values]
        return "\n".join(line for metric in (*own, *self.gauges) for line in metric.lines()) + "\n"
