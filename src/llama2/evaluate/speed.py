"""Speed of a model: prompts and generation as llama-bench measures them, and what share of the machine that is.

A test computes without sampling, through the runner that generation uses: `prompt` tokens at once and then `new` tokens
one after the other, behind `depth` cached ones, of `sequences` texts together.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from llama2 import cpu
from llama2.errors import InputError
from llama2.evaluate import machine, statistics
from llama2.evaluate.steps import Ids, make_steps

WARM_UP = 3  # tokens decoded before the clock starts


class SpeedTest(NamedTuple):
    """Tokens of a prompt, tokens generated behind it, positions cached before, texts at once."""

    prompt: int
    new: int
    depth: int = 0
    sequences: int = 1

    @property
    def name(self) -> str:
        """As llama-bench writes it: pp512, tg128, pp512+tg128, tg128 @ d1024; x16 for sequences at once."""
        parts = [f"pp{self.prompt}" if self.prompt else "", f"tg{self.new}" if self.new else ""]
        text = "+".join(part for part in parts if part)
        text += f" @ d{self.depth}" if self.depth else ""
        return text + (f" x{self.sequences}" if self.sequences > 1 else "")

    @property
    def positions(self) -> int:
        """Positions that each text comes to."""
        return self.depth + self.prompt + self.new


@dataclass
class Samples:
    """Timings of the repetitions of a test: seconds each; others' share of the processors and joules of all
    together."""

    test: SpeedTest
    seconds: list[float] = field(default_factory=list)
    taken: float | None = None
    joules: float | None = None
    began: float = field(default_factory=time.time)

    @property
    def tokens(self) -> int:
        """Tokens of one repetition, of all texts."""
        return (self.test.prompt + self.test.new) * self.test.sequences

    @property
    def rates(self) -> list[float]:
        """Tokens per second of each repetition."""
        return [self.tokens / seconds for seconds in self.seconds]

    @property
    def rate(self) -> float:
        """Tokens per second: the mean over the repetitions, as llama-bench's."""
        return sum(self.rates) / len(self.rates)

    @property
    def deviation(self) -> float | None:
        """Sample standard deviation of the rates."""
        return statistics.deviation(self.rates)


class SpeedBench:
    """A model ready to be timed. batch: tokens of a prompt in one step at most."""

    def __init__(
        self,
        model: Any,
        batch: int = 2048,
        runner: str = "auto",
        cache_dtype: cpu.KvDtype | None = None,
        precision: str = "fast",
        seed: int = 0,
    ) -> None:
        if batch < 1:
            raise InputError(f"a batch of {batch} tokens computes nothing; give at least 1")
        self.model, self.batch = model, batch
        self.steps = make_steps(model, runner, cache_dtype, precision)
        self.precision = precision
        self._draws = np.random.default_rng(seed)

    @property
    def native(self) -> bool:
        """Whether the native engine computes."""
        return self.steps.weights is not None

    @property
    def cache_dtype(self) -> str:
        """Number format of keys and values."""
        return self.steps.cache_dtype

    @property
    def threads(self) -> int:
        """Threads that compute."""
        return self.steps.threads

    def check(self, test: SpeedTest) -> None:
        """Raises InputError for a test that the model's context cannot hold, or that computes nothing."""
        check(test, self.model.config.max_position_embeddings)

    def ready(self, test: SpeedTest) -> "ReadyTest":
        """The test with its depth filled and its first, untimed repetition done."""
        self.check(test)
        with self.steps.scope():
            ready = ReadyTest(self, test)
        ready.warm_up()
        return ready

    def ids(self, rows: int, tokens: int) -> Ids:
        """Random ids (rows, tokens)."""
        return self._draws.integers(0, self.model.config.vocab_size, (rows, tokens))

    def limits(self) -> machine.Limits | None:
        """The machine's limits with these threads; None where torch computes, whose limits are its libraries'."""
        return None if self.steps.weights is None else machine.limits(self.steps.weights.pool)

    def arithmetic(self, packed: bool) -> int:
        """Which of machine's kinds of arithmetic the products are in. packed: whether most weights are blocks."""
        if self.precision == "exact" or (self.steps.weights_dtype == "float32" and not packed):
            return machine.FLOAT32
        return machine.INT8 if packed else machine.BFLOAT16

    def step_bytes(self, test: SpeedTest) -> float:
        """Bytes that one decoding step reads at least: the weights once, keys and values of the texts' positions."""
        config = self.model.config
        if self.steps.weights is not None:
            weights = self.steps.weights.decode_bytes
        else:
            weights = sum(p.nbytes for p in self.model.parameters())
        width = {"float32": 4, "float64": 8, "int8": 1}.get(self.cache_dtype, 2)
        position = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * width
        return float(weights + position * test.sequences * (test.depth + test.prompt + test.new / 2))

    def token_operations(self, test: SpeedTest) -> float:
        """Multiplications and additions of one prompt token: its products with the weights, attention to what stands
        before it. The head runs for the last token alone and is left out."""
        c = self.model.config
        heads, kv, width = c.num_attention_heads, c.num_key_value_heads, c.head_dim
        layer = c.hidden_size * width * (2 * heads + 2 * kv) + 3 * c.hidden_size * c.intermediate_size
        attention = 2 * heads * width * (test.depth + test.prompt / 2)
        return float(2 * c.num_hidden_layers * (layer + attention))


class ReadyTest:
    """A test over a cache that holds its depth; each call times one repetition."""

    def __init__(self, bench: SpeedBench, test: SpeedTest) -> None:
        self.bench, self.test = bench, test
        self.samples = Samples(test)
        # One position more: warming up decodes behind an empty prompt too.
        length = max(test.positions, test.depth + WARM_UP)
        self._cache = bench.steps.new_cache(test.sequences, length)
        self._prompt = bench.ids(test.sequences, test.prompt)
        self._new = bench.ids(test.sequences, max(test.new, WARM_UP))
        if test.depth:
            self._feed(bench.ids(test.sequences, test.depth), 0)

    def warm_up(self) -> None:
        """A repetition that is not timed: all of the prompt, a few tokens."""
        with self.bench.steps.scope():
            self._run(min(self.test.new, WARM_UP))

    def repeat(self) -> float:
        """Times one repetition; its seconds, which `samples` keeps."""
        start = time.perf_counter()
        with self.bench.steps.scope():
            self._run(self.test.new)
        seconds = time.perf_counter() - start
        self.samples.seconds.append(seconds)
        return seconds

    def _run(self, new: int) -> None:
        end = self._feed(self._prompt, self.test.depth)
        for i in range(new):
            self._step(self._new[:, i : i + 1], end + i)
        self.bench.steps.wait()
        self._cache.crop(self.test.depth)

    def _feed(self, tokens: Ids, start: int) -> int:
        """Runs tokens (rows, T) from position `start` on in steps of the batch; the position behind them."""
        size = max(self.bench.batch // self.test.sequences, 1)
        for first in range(0, tokens.shape[1], size):
            part = tokens[:, first : first + size]
            self._step(part, start + first)
        return start + tokens.shape[1]

    def _step(self, tokens: Ids, start: int) -> None:
        self.bench.steps.step(tokens, np.arange(start, start + tokens.shape[1])[None], self._cache)


def check(test: SpeedTest, context: int) -> None:
    """Raises InputError for a test that a context of so many tokens cannot hold, or that computes nothing."""
    if min(test) < 0 or test.sequences < 1 or test.prompt + test.new < 1:
        raise InputError(
            f"a test of {test.prompt} prompt and {test.new} new tokens, depth {test.depth}, {test.sequences} sequences "
            "computes nothing; give at least 1 token and 1 sequence"
        )
    if test.positions > context:
        raise InputError(
            f"test {test.name} needs {test.positions} positions and the model's context has {context}; lower its "
            "prompt, new tokens or depth"
        )


def tests(
    prompts: Sequence[int], new: Sequence[int], depths: Sequence[int], sequences: Sequence[int], both: Sequence[Any]
) -> list[SpeedTest]:
    """Every prompt and every generation alone, then pairs of `both` together, at every depth and count of texts."""
    shapes = [(p, 0) for p in prompts if p] + [(0, n) for n in new if n] + [tuple(pair) for pair in both]
    return [SpeedTest(p, n, depth, count) for depth in depths for count in sequences for p, n in shapes]


def measure(benches: Sequence[SpeedBench], test: SpeedTest, repetitions: int) -> Iterator[list[Samples]]:
    """Repeats a test on every bench in turns, so that what the machine does meanwhile meets all alike.

    Gives the samples so far after each round. Every other round goes backwards, so that nobody is always second.
    """
    ready = [bench.ready(test) for bench in benches]
    load, energy = machine.Load(), machine.Energy()
    taken: list[float] = []
    for number in range(repetitions):
        for each in reversed(ready) if number % 2 else ready:
            energy.used()
            each.repeat()
            if (joules := energy.used()) is not None:
                each.samples.joules = (each.samples.joules or 0.0) + joules
        if (part := load.taken()) is not None:
            taken.append(part)
        for each in ready:
            each.samples.taken = max(taken, default=None)
        yield [each.samples for each in ready]
