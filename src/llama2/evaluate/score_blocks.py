"""Requests of an evaluation in blocks that always give the same numbers, on `Engine`, and a file that keeps them.

The last digits of a product depend on which rows are computed together. So the requests of a run are put in order, cut
into blocks, and every block runs alone: its requests begin in one step, and share pages among themselves only. What a
block gives depends on nothing but its content, so a run that was killed and goes on ends with the same numbers.
"""

import hashlib
import json
import sqlite3
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from llama2.engine.engine import Engine
from llama2.engine.request import EngineRequest, TokenEvent
from llama2.errors import CheckpointError, InputError
from llama2.generation.config import GenerationConfig

BLOCK_TOKENS = 8192  # that a block computes at most, as far as its order tells: what a kill can lose
BLOCK_REQUESTS = 256
BLOCK_GENERATIONS = 64


class Scored(NamedTuple):
    """Tokens of a text of which those from `start` on are scored."""

    tokens: tuple[int, ...]
    start: int


class Group(NamedTuple):
    """Texts (their indices) that differ in their last token at most, and are computed once."""

    members: list[int]
    start: int


class Generation(NamedTuple):
    """A prompt, where its text ends and the settings that generate() takes."""

    tokens: tuple[int, ...]
    stop: tuple[str, ...]
    settings: dict[str, Any]
    seed: int


def plan(texts: Sequence[Scored]) -> list[list[Group]]:
    """The blocks of the texts, in lexicographic order of their tokens: neighbours share their beginnings."""
    by_input: dict[tuple[int, ...], list[int]] = {}
    for i, text in enumerate(texts):
        by_input.setdefault(text.tokens[:-1], []).append(i)
    blocks: list[list[Group]] = []
    before: tuple[int, ...] = ()
    room = 0
    for tokens in sorted(by_input):
        members = by_input[tokens]
        new = len(tokens) - _common(before, tokens)
        before = tokens
        if not blocks or new > room or len(blocks[-1]) >= BLOCK_REQUESTS:
            blocks.append([])
            room, new = BLOCK_TOKENS, len(tokens)
        room -= new
        blocks[-1].append(Group(members, min(texts[i].start for i in members)))
    return blocks


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Tokens that two texts begin with alike."""
    for i, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return i
    return min(len(one), len(other))


class BlockStore:
    """Results of blocks by what they hold, in a SQLite file: a block is there whole or not at all."""

    def __init__(self, path: str | Path | None, about: Any = None) -> None:
        """path: None keeps nothing. about: what results depend on beside a block's content, as JSON takes it."""
        self._about, self._base = about, None
        if path is None:
            return
        try:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            self._base = sqlite3.connect(path, timeout=60, check_same_thread=False)
            self._base.execute("CREATE TABLE IF NOT EXISTS blocks (name TEXT PRIMARY KEY, results TEXT NOT NULL)")
        except (sqlite3.Error, OSError) as error:
            raise CheckpointError(f"{path} cannot keep results: {error}; give another file, or remove it") from error

    def name(self, kind: str, content: Any) -> str:
        """The name of a block."""
        text = json.dumps([self._about, kind, content], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def find(self, name: str) -> Any:
        """The results of a block, None where it has not run."""
        if self._base is None:
            return None
        row = self._base.execute("SELECT results FROM blocks WHERE name = ?", (name,)).fetchone()
        return None if row is None else json.loads(row[0])

    def keep(self, name: str, results: Any) -> None:
        """Keeps the results of a block, on the disk when this returns."""
        if self._base is not None:
            with self._base:
                self._base.execute("INSERT OR REPLACE INTO blocks VALUES (?, ?)", (name, json.dumps(results)))

    def close(self) -> None:
        """Closes the file."""
        if self._base is not None:
            self._base.close()


class BlockRunner:
    """Runs blocks on an engine, which `open_engine` makes when the first block is not found in the store."""

    def __init__(self, open_engine: Callable[[], Engine], store: BlockStore) -> None:
        self._open, self._store = open_engine, store
        self._engine: Engine | None = None
        self._blocks = 0  # that ran here: each is a tenant of its own, and shares no page with another

    def score(
        self, texts: Sequence[Scored], on_done: Callable[[int, tuple[float, bool]], None] | None = None
    ) -> list[tuple[float, bool]]:
        """For each text the sum of the log-probabilities of its scored tokens, and whether each was the likeliest one.

        on_done is told each text's index and result, block after block. A text without scored tokens is certain.
        """
        found: list[tuple[float, bool]] = [(0.0, True)] * len(texts)
        real = [i for i, text in enumerate(texts) if text.start < len(text.tokens)]
        for block in plan([texts[i] for i in real]):
            groups = [Group([real[i] for i in group.members], group.start) for group in block]
            content = [[texts[i] for i in group.members] for group in groups]
            name = self._store.name("score", content)
            results = self._store.find(name)
            if results is None:
                results = self._score_block(texts, groups)
                self._store.keep(name, results)
            members = [i for group in groups for i in group.members]
            for i, (value, first) in zip(members, results, strict=True):
                found[i] = (value, first)
                if on_done is not None:
                    on_done(i, found[i])
        if on_done is not None:
            for i in set(range(len(texts))) - set(real):
                on_done(i, found[i])
        return found

    def _score_block(self, texts: Sequence[Scored], groups: Sequence[Group]) -> list[tuple[float, bool]]:
        asks = []
        for group in groups:
            first, *others = (texts[i].tokens for i in group.members)
            endings = tuple(tokens[-1] for tokens in others)
            asks.append(self._ask(first, score_from=group.start, endings=endings))
        results = []
        for group, events in zip(groups, self._events(asks), strict=True):
            scores = events[-1].scores
            shared = scores[: len(texts[group.members[0]].tokens) - 1 - group.start]
            last = scores[len(shared) :]
            for i, ending in zip(group.members, last, strict=True):
                own = [*shared[texts[i].start - group.start :], ending]
                results.append((float(sum(score.logprob for score in own)), all(score.first for score in own)))
        return results

    def generate(self, prompts: Sequence[Generation], on_done: Callable[[int, str], None] | None = None) -> list[str]:
        """The completion of each prompt, up to its stop string; on_done as `score`."""
        found = [""] * len(prompts)
        order = sorted(range(len(prompts)), key=lambda i: (prompts[i].tokens, i))
        for start in range(0, len(order), BLOCK_GENERATIONS):
            block = order[start : start + BLOCK_GENERATIONS]
            name = self._store.name("generate", [prompts[i] for i in block])
            texts = self._store.find(name)
            if texts is None:
                texts = self._generate_block([prompts[i] for i in block])
                self._store.keep(name, texts)
            for i, text in zip(block, texts, strict=True):
                found[i] = text
                if on_done is not None:
                    on_done(i, text)
        return found

    def _generate_block(self, prompts: Sequence[Generation]) -> list[str]:
        engine, tenant = self.engine, self._tenant()
        asks = [
            engine.ask(
                list(prompt.tokens),
                seed=prompt.seed,
                stop=prompt.stop,
                tenant=tenant,
                **prompt.settings,
            )
            for prompt in prompts
        ]
        return ["".join(event.text for event in events) for events in self._events(asks)]

    def _tenant(self) -> str:
        self._blocks += 1
        return f"block {self._blocks}"

    def _ask(self, tokens: Sequence[int], **settings: Any) -> EngineRequest:
        tenant = f"block {self._blocks + 1}"
        return EngineRequest(tokens, _GREEDY, tenant=tenant, **settings)

    def _events(self, asks: Sequence[EngineRequest]) -> list[list[TokenEvent]]:
        """Every request's events when all have ended. Raises the first one's error."""
        heard: list[list[TokenEvent]] = [[] for _ in asks]
        ended = threading.Semaphore(0)

        def sink(events: list[TokenEvent]) -> Callable[[TokenEvent], None]:
            def hear(event: TokenEvent) -> None:
                events.append(event)
                if event.finish is not None:
                    ended.release()

            return hear

        lives = self.engine.submit_together([(ask, sink(events)) for ask, events in zip(asks, heard, strict=True)])
        self._blocks += 1
        try:
            for _ in asks:
                ended.acquire()
        except BaseException:  # Ctrl-C: the engine stops within a step
            for live in lives:
                self.engine.cancel(live)
            raise
        for events in heard:
            if events[-1].error is not None:
                raise events[-1].error
        return heard

    @property
    def engine(self) -> Engine:
        """The engine, made at its first use."""
        if self._engine is None:
            self._engine = self._open()
        return self._engine

    @property
    def tokens_reused(self) -> int:
        """Positions that came from the prefix cache."""
        return 0 if self._engine is None else self._engine.tokens_reused

    def close(self) -> None:
        """Ends the engine and the store."""
        if self._engine is not None:
            self._engine.close(wait=False)
        self._store.close()


_GREEDY = GenerationConfig()


def check_lengths(texts: Sequence[Scored], limit: int) -> Iterator[Scored]:
    """The texts, cut on their left to what a context of `limit` tokens holds: limit + 1, since the last is not read.

    Raises InputError for a text of which more is scored than the context holds.
    """
    for tokens, start in texts:
        scored = len(tokens) - start
        if scored > limit:
            raise InputError(
                f"a continuation has {scored} tokens and the context holds {limit}; give a larger max_length, or leave "
                "this task out"
            )
        cut = max(len(tokens) - limit - 1, 0)
        yield Scored(tokens[cut:], start - cut)
