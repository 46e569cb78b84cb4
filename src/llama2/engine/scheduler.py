"""Which tokens of which sequences run in the next step: plan, run, commit. Standard library only, no torch.

    plan    what is decoding comes first, then prompts in chunks, then whoever waits, oldest first; pages are given as
            sequences grow, and when none is left the youngest sequence goes back to the queue (its pages stay
            remembered, so that it usually finds most of them again)
    run     somebody else's: the runner computes the plan's tokens
    commit  positions are counted as cached, full pages are remembered, sampled tokens appended

Nothing is reserved ahead, yet every sequence ends: it was refused at the door if it could not fit alone.
"""

from collections import deque
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field

from llama2.engine.blocks import BlockPool
from llama2.errors import InputError

SCORED_AT_ONCE = 64  # tokens of a chunk whose logits are all wanted: they are rows of a whole vocabulary


@dataclass(eq=False)
class Sequence:
    """One text that grows: `tokens`, of which the first `computed` are in the cache.

    limit: tokens it may come to have, the prompt included. salt: sequences of another salt share no pages with it
    (tenant, adapter). scored: the logits of its first `scored` tokens are wanted too, so they all run.
    """

    tokens: list[int]
    limit: int
    salt: bytes = b""
    scored: int = 0
    pages: list[int] = field(default_factory=list)
    computed: int = 0
    reused: int = 0  # positions that were found in the cache when it was first admitted
    preemptions: int = 0
    draft: list[int] = field(default_factory=list)  # guesses to be checked in the next step
    _keys: list[bytes] = field(default_factory=list)
    _admitted: bool = False

    @property
    def pending(self) -> int:
        """Tokens that are not in the cache yet; 1 while decoding."""
        return len(self.tokens) - self.computed


@dataclass(frozen=True)
class Chunk:
    """Part of a plan: `tokens` of a sequence at positions `start`, ...; with `sampled` its last pending one is among
    them, followed by the `drafted` guesses, and logits are wanted from it on; with `whole` those of every token are."""

    sequence: Sequence
    start: int
    tokens: list[int]
    sampled: bool
    drafted: int = 0
    whole: bool = False

    @property
    def wanted(self) -> int:
        """Of how many of its last tokens logits are wanted."""
        return len(self.tokens) if self.whole else (1 + self.drafted if self.sampled else 0)


class Scheduler:
    """Sequences over a pool.

    budget: tokens of one step at most; beside: tokens of prompts in a step in which others decode, who wait for the
    end of the step; width: sequences in one step at most.
    """

    def __init__(self, pool: BlockPool, budget: int = 512, width: int = 64, beside: int = 128) -> None:
        if budget < 1 or width < 1 or beside < 1:
            raise InputError(
                f"a step of {budget} tokens, {beside} beside others, of {width} sequences does nothing; give at least "
                "1 of each"
            )
        self.pool, self.budget, self.width, self.beside = pool, budget, width, beside
        self._most = budget  # tokens of the step that is being planned
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # in the order of admission

    # -- from outside --------------------------------------------------------------------------------------------

    def capacity(self) -> int:
        """Positions that one sequence alone can come to hold."""
        return self.pool.count * self.pool.size

    def check(self, sequence: Sequence) -> None:
        """Raises InputError for a sequence that is empty or could never fit."""
        if not sequence.tokens:
            raise InputError("a sequence needs at least one token, such as the BOS token")
        if sequence.limit <= len(sequence.tokens):
            raise InputError(
                f"a limit of {sequence.limit} tokens leaves no room behind a prompt of {len(sequence.tokens)}"
            )
        if sequence.limit - 1 > self.capacity():  # the last token is never computed
            raise InputError(
                f"{sequence.limit} tokens do not fit the cache of {self.capacity()}; ask for fewer new tokens, or make "
                "the cache larger"
            )

    def submit(self, sequence: Sequence) -> None:
        """Puts a new sequence at the end of the queue, checked."""
        self.check(sequence)
        sequence._keys = self.pool.keys(sequence.tokens, sequence.salt)
        self.waiting.append(sequence)

    def finish(self, sequence: Sequence) -> None:
        """Takes a sequence out, done or cancelled, whether it waits or runs; unknown ones are left alone."""
        if sequence in self.running:
            self.running.remove(sequence)
            self._release(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self.running and not self.waiting

    # -- plan ----------------------------------------------------------------------------------------------------

    def plan(self) -> list[Chunk]:
        """The next step; never empty while there is a sequence. Every chunk has its pages."""
        planned: dict[Sequence, Chunk] = {}
        crowded = False
        self._most = self.budget
        for prompts in (False, True):
            if planned:
                self._most = min(self.budget, self._spent(planned) + self.beside)
            for sequence in list(self.running):
                if (sequence.pending > 1) is prompts and sequence in self.running:
                    crowded |= self._plan_one(sequence, planned)
        if not crowded:
            self._admit(planned)
        return list(planned.values())

    def _spent(self, planned: dict[Sequence, Chunk]) -> int:
        return sum(len(chunk.tokens) for chunk in planned.values())

    def _left(self, planned: dict[Sequence, Chunk]) -> int:
        return self._most - self._spent(planned)

    def _plan_one(self, sequence: Sequence, planned: dict[Sequence, Chunk]) -> bool:
        """Plans what fits of a running sequence; whether somebody had to make room for it."""
        room = min(self._left(planned), sequence.pending)
        whole = sequence.computed < sequence.scored
        if whole:
            room = min(room, SCORED_AT_ONCE)
        if room < 1:
            return False
        sampled = room == sequence.pending
        free = min(self._left(planned) - room, sequence.limit - 1 - len(sequence.tokens))
        draft = sequence.draft[: max(free, 0)] if sampled else []
        tokens = sequence.tokens[sequence.computed : sequence.computed + room] + draft
        preempted = False
        while not self._grow(sequence, sequence.computed + len(tokens)):
            preempted = True
            victim = self.running[-1]
            planned.pop(victim, None)
            self._preempt(victim)
            if victim is sequence:
                return True
        planned[sequence] = Chunk(sequence, sequence.computed, tokens, sampled, len(draft), whole)
        return preempted

    def _grow(self, sequence: Sequence, length: int) -> bool:
        """Pages for the first `length` positions; False, and none taken, where there are not enough."""
        needed = -(-length // self.pool.size) - len(sequence.pages)
        if needed > self.pool.free:
            return False
        sequence.pages += [self.pool.take() for _ in range(needed)]
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._release(sequence)
        sequence.preemptions += 1
        self.waiting.appendleft(sequence)

    def _release(self, sequence: Sequence) -> None:
        self.pool.give_back(sequence.pages)
        sequence.pages, sequence.computed, sequence.draft = [], 0, []

    def _admit(self, planned: dict[Sequence, Chunk]) -> None:
        """Takes sequences in while they fit. One whose beginning another is just computing waits for its pages."""
        coming = {key for running in self.running for key in running._keys[running.computed // self.pool.size :]}
        for sequence in list(self.waiting):
            if len(self.running) >= self.width or self._left(planned) < 1:
                return
            found = self._remembered(sequence)
            keys = self._usable(sequence)
            if self.pool.remembers and len(found) < len(keys) and keys[len(found)] in coming:
                continue
            for page in found:
                self.pool.share(page)
            # Room for the whole text now, and for a page more of everyone: else it would soon be thrown out again.
            needed = -(-len(sequence.tokens) // self.pool.size) - len(found)
            if self.running and needed + len(self.running) > self.pool.free:
                self.pool.give_back(found)
                return
            self.waiting.remove(sequence)
            self.running.append(sequence)
            sequence.pages, sequence.computed = found, len(found) * self.pool.size
            if not sequence._admitted:
                sequence._admitted, sequence.reused = True, sequence.computed
            coming.update(keys[len(found) :])
            self._plan_one(sequence, planned)

    def _usable(self, sequence: Sequence) -> list[bytes]:
        """Keys of the pages that may be taken over: the last token has to run, for its logits."""
        if sequence.scored:
            return []
        return sequence._keys[: (len(sequence.tokens) - 1) // self.pool.size]

    def _remembered(self, sequence: Sequence) -> list[int]:
        found: list[int] = []
        for i, key in enumerate(self._usable(sequence)):
            page = self.pool.find(key, sequence.tokens[i * self.pool.size : (i + 1) * self.pool.size])
            if page is None:
                break
            found.append(page)
        return found

    # -- commit --------------------------------------------------------------------------------------------------

    def commit(self, chunk: Chunk, new: SequenceOf[int] = ()) -> None:
        """Counts a chunk that has run. new: of a sampled chunk the guesses that held, and one token more.

        A chunk whose sequence was finished since the plan changes nothing.
        """
        sequence = chunk.sequence
        if sequence not in self.running:
            return
        sequence.draft = []
        if chunk.sampled:
            if not 1 <= len(new) <= chunk.drafted + 1:
                raise InputError(
                    f"{len(new)} new tokens for a chunk with {chunk.drafted} guesses; give 1 and those kept"
                )
            sequence.tokens += new
            sequence.computed = len(sequence.tokens) - 1
        else:
            sequence.computed = chunk.start + len(chunk.tokens)
        size = self.pool.size
        sequence._keys = self.pool.keys(sequence.tokens, sequence.salt, sequence._keys)
        for i in range(chunk.start // size, sequence.computed // size):
            self.pool.remember(sequence.pages[i], sequence._keys[i], sequence.tokens[i * size : (i + 1) * size])
