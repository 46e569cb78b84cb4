"""Which tokens of which sequences run in the next step: plan, run, commit. No torch.

    plan    what is decoding comes first, then prompts in chunks, then waiting sequences, oldest first; pages are given
            as sequences grow, and when none is left the youngest sequence goes back to the queue (its pages stay
            remembered, so that it usually finds most of them again); of several owners each has its share of places,
            pages and prompt tokens, who has more gives way to who has less, and the step is kept short enough for
            owners with little in it (see fairness.py)
    run     elsewhere: the runner computes the plan's tokens
    commit  positions are counted as cached, full pages are remembered, sampled tokens appended

Nothing is reserved ahead, yet every sequence ends: it was refused at the door if it could not fit alone.
"""

from collections import Counter, deque
from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field

from llama2.engine.blocks import BlockPool
from llama2.engine.fairness import STRETCH, Credits, StepTimes, above, share
from llama2.errors import ContextLengthError, InputError

PATIENT = 3  # times that a sequence gives way to another owner's; then it runs to its end
SCORED_AT_ONCE = 64  # tokens of a chunk whose logits are all wanted: they are rows of a whole vocabulary


@dataclass(eq=False)
class ScheduledSequence:
    """One text that grows: `tokens`, of which the first `computed` are in the cache.

    limit: tokens it may come to have, the prompt included. salt: sequences of another salt share no pages with it
    (tenant, adapter). owner: whose share of the engine it takes. scored: the logits of its first `scored` tokens from
    index `scored_from` on are wanted too, so these all run.
    """

    tokens: list[int]
    limit: int
    salt: bytes = b""
    scored: int = 0
    owner: str = ""
    scored_from: int = 0
    pages: list[int] = field(default_factory=list)
    computed: int = 0
    reused: int = 0  # positions that were found in the cache when it was first admitted
    preemptions: int = 0
    shifts: int = 0  # times that its older half was dropped
    planned: int = 0  # the number of the last step that it was part of
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
    them, followed by the `drafted` guesses, and logits are wanted from it on; with `whole` those of every token are but
    the first `skipped`."""

    sequence: ScheduledSequence
    start: int
    tokens: list[int]
    sampled: bool
    drafted: int = 0
    whole: bool = False
    skipped: int = 0

    @property
    def wanted(self) -> int:
        """Of how many of its last tokens logits are wanted."""
        return len(self.tokens) - self.skipped if self.whole else (1 + self.drafted if self.sampled else 0)


class Scheduler:
    """Sequences over a pool.

    budget: tokens of one step at most; beside: tokens of prompts in a step in which others decode, who wait for the
    end of the step; width: sequences in one step at most; each_running, each_pages: sequences in one step and pages of
    one owner at most; stretch: where there are several owners, the time of a step at most, in that which equal shares
    of it would take, 0 for no bound.
    """

    def __init__(
        self,
        pool: BlockPool,
        budget: int = 512,
        width: int = 64,
        beside: int = 128,
        each_running: int | None = None,
        each_pages: int | None = None,
        stretch: float = STRETCH,
    ) -> None:
        if budget < 1 or width < 1 or beside < 1:
            raise InputError(
                f"a step of {budget} tokens, {beside} beside others, of {width} sequences does nothing; give at least "
                "1 of each"
            )
        self.pool, self.budget, self.width, self.beside = pool, budget, width, beside
        self.each_running = width if each_running is None else each_running
        self.each_pages = pool.count if each_pages is None else min(each_pages, pool.count)
        self.stretch = stretch
        self.credits, self.times = Credits(), StepTimes()
        self._step = 0
        self._charged: dict[ScheduledSequence, int] = {}  # tokens of the plan that is being made
        self._owners = 1  # that have something to do
        self._most = budget  # tokens of the step that is being planned
        self.waiting: deque[ScheduledSequence] = deque()
        self.running: list[ScheduledSequence] = []  # in the order of admission

    # -- from outside --------------------------------------------------------------------------------------------

    def capacity(self) -> int:
        """Positions that one sequence alone can come to hold."""
        return self.each_pages * self.pool.size

    def check(self, sequence: ScheduledSequence) -> None:
        """Raises InputError for a sequence that is empty, ContextLengthError for one that could never fit."""
        if not sequence.tokens:
            raise InputError("a sequence needs at least one token, such as the BOS token")
        if sequence.limit <= len(sequence.tokens):
            raise ContextLengthError(
                f"a limit of {sequence.limit} tokens leaves no room behind a prompt of {len(sequence.tokens)}",
                len(sequence.tokens) + 1,
                sequence.limit,
            )
        if sequence.limit - 1 > self.capacity():  # the last token is never computed
            raise ContextLengthError(
                f"{sequence.limit} tokens do not fit the cache of {self.capacity()}; ask for fewer new tokens, or make "
                "the cache larger",
                sequence.limit,
                self.capacity() + 1,
            )

    def submit(self, sequence: ScheduledSequence) -> None:
        """Puts a new sequence at the end of the queue, checked."""
        self.check(sequence)
        sequence._keys = self.pool.keys(sequence.tokens, sequence.salt)
        self.waiting.append(sequence)

    def finish(self, sequence: ScheduledSequence) -> None:
        """Takes a sequence out, done or cancelled, whether it waits or runs; unknown ones are left alone."""
        if sequence in self.running:
            self.running.remove(sequence)
            self._release(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)

    def shift(self, sequence: ScheduledSequence, keep: int) -> None:
        """Drops the older half of what stands behind the first `keep` tokens of a running sequence, which waits then to
        be computed anew; pages of what it keeps in front are found again."""
        kept = sequence.tokens[:keep]
        dropped = max((len(sequence.tokens) - keep) // 2, 1)
        sequence.tokens = kept + sequence.tokens[keep + dropped :]
        sequence.scored, sequence.shifts = 0, sequence.shifts + 1
        self.running.remove(sequence)
        self._release(sequence)
        sequence._keys = self.pool.keys(sequence.tokens, sequence.salt)
        self.waiting.appendleft(sequence)

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self.running and not self.waiting

    # -- plan ----------------------------------------------------------------------------------------------------

    def plan(self) -> list[Chunk]:
        """The next step; never empty while there is a sequence. Every chunk has its pages."""
        planned: dict[ScheduledSequence, Chunk] = {}
        crowded = False
        self._most = self.budget
        counts = Counter(s.owner for s in (*self.running, *self.waiting))
        self.credits.keep(counts)
        self._owners = len(counts)
        self._step += 1
        rows, prompts = self._bounds(counts)
        for sequence in self._decoding(rows):
            if sequence in self.running:
                crowded |= self._plan_one(sequence, planned)
        if planned:
            self._most = min(self.budget, self._spent(planned) + (self.beside if prompts is None else prompts))
        each = self._each(planned)
        crowded |= self._plan_prompts(planned, each)
        if not crowded:
            self._admit(planned, each)
        if each is not None:
            self._plan_prompts(planned, None)  # what some owners did not need
        for chunk in planned.values():
            self.credits.charge(chunk.sequence.owner, len(chunk.tokens) - self._charged.pop(chunk.sequence, 0))
            chunk.sequence.planned = self._step
        for sequence, tokens in self._charged.items():  # thrown out again
            self.credits.charge(sequence.owner, -tokens)
        self._charged.clear()
        return list(planned.values())

    def ran(self, chunks: SequenceOf[Chunk], seconds: float) -> None:
        """Takes in how long a step took, from plan to commit."""
        rows = sum(chunk.sampled and len(chunk.tokens) == 1 + chunk.drafted for chunk in chunks)
        self.times.observe(rows, sum(len(chunk.tokens) for chunk in chunks) - rows, seconds)

    def _bounds(self, counts: Counter[str]) -> tuple[int | None, int | None]:
        """Decoding sequences and tokens of prompts in this step at most, where several owners share it: what takes
        `stretch` times as long as if each had as many sequences in it as the one that has fewest. None for no bound.

        counts: sequences of each owner, those that wait included, for they will soon be in it.
        """
        if self._owners < 2 or not self.stretch:
            return None, None
        fair = self._owners * min(min(counts.values()), share(self.width, self._owners))
        if (times := self.times.room(fair, self.stretch)) is None:
            return None, None
        seconds, row, token = times
        coming = bool(self.waiting) or any(s.pending > 1 for s in self.running)
        decoding = sum(s.pending <= 1 for s in self.running)
        rows = max(int((seconds / 2 if coming else seconds) / row), fair)
        prompts = int((seconds - row * min(rows, decoding)) / token)
        return rows, min(max(prompts, self._owners), self.beside)

    def _decoding(self, most: int | None) -> list[ScheduledSequence]:
        """Those that decode, in the order of admission; no more than `most`, by the credit of their owner, each owner's
        in turn."""
        decoding = [s for s in self.running if s.pending <= 1]
        if most is None or len(decoding) <= most:
            return decoding
        queues: dict[str, deque[ScheduledSequence]] = {}
        for sequence in sorted(decoding, key=lambda s: s.planned):
            queues.setdefault(sequence.owner, deque()).append(sequence)
        chosen: set[ScheduledSequence] = set()
        while len(chosen) < most:
            owner = self.credits.first(queues)
            sequence = queues[owner].popleft()
            if not queues[owner]:
                del queues[owner]
            self._charge(sequence, 1)
            chosen.add(sequence)
        return [s for s in decoding if s in chosen]

    def _charge(self, sequence: ScheduledSequence, tokens: int) -> None:
        """Counts tokens of the plan that is being made at once, since they decide who comes next in it."""
        self.credits.charge(sequence.owner, tokens)
        self._charged[sequence] = tokens

    def _each(self, planned: dict[ScheduledSequence, Chunk]) -> int | None:
        """Prompt tokens of one owner in this step; None where there is one owner."""
        if self._owners < 2:
            return None
        owners = {s.owner for s in self.running if s.pending > 1} | {s.owner for s in self.waiting}
        return share(self._left(planned), len(owners))

    def _plan_prompts(self, planned: dict[ScheduledSequence, Chunk], each: int | None) -> bool:
        """Plans the running prompts, of each owner so many tokens; whether a sequence was preempted."""
        crowded = False
        spent: Counter[str] = Counter()
        for sequence in list(self.running):
            done = planned.get(sequence)
            if sequence.pending <= 1 or sequence not in self.running or (done is not None and done.sampled):
                continue
            planned.pop(sequence, None)  # planned in part: now as far as there is room
            crowded |= self._plan_one(sequence, planned, None if each is None else each - spent[sequence.owner])
            if sequence in planned:
                spent[sequence.owner] += len(planned[sequence].tokens)
        return crowded

    def _spent(self, planned: dict[ScheduledSequence, Chunk]) -> int:
        return sum(len(chunk.tokens) for chunk in planned.values())

    def _left(self, planned: dict[ScheduledSequence, Chunk]) -> int:
        return self._most - self._spent(planned)

    def _plan_one(
        self, sequence: ScheduledSequence, planned: dict[ScheduledSequence, Chunk], most: int | None = None
    ) -> bool:
        """Plans what fits of a running sequence, `most` tokens; whether somebody had to make room for it."""
        room = min(self._left(planned), sequence.pending)
        room = room if most is None else min(room, most)
        whole = sequence.computed < sequence.scored
        skipped = min(max(sequence.scored_from - sequence.computed, 0), max(room, 0)) if whole else 0
        if whole:
            room = min(room, skipped + SCORED_AT_ONCE)
            whole = skipped < room
        if room < 1:
            return False
        sampled = room == sequence.pending
        free = min(self._left(planned) - room, sequence.limit - 1 - len(sequence.tokens))
        draft = sequence.draft[: max(free, 0)] if sampled else []
        tokens = sequence.tokens[sequence.computed : sequence.computed + room] + draft
        preempted = False
        while not self._grow(sequence, sequence.computed + len(tokens)):
            preempted = True
            victim = self._victim(sequence)
            planned.pop(victim, None)
            self._preempt(victim)
            if victim is sequence:
                return True
        planned[sequence] = Chunk(sequence, sequence.computed, tokens, sampled, len(draft), whole, skipped)
        return preempted

    def _grow(self, sequence: ScheduledSequence, length: int) -> bool:
        """Pages for the first `length` positions; False, and none taken, where there are not enough."""
        needed = -(-length // self.pool.size) - len(sequence.pages)
        if needed > self.pool.free or (needed > 0 and self._held()[sequence.owner] + needed > self.each_pages):
            return False
        sequence.pages += [self.pool.take() for _ in range(needed)]
        return True

    def _held(self) -> Counter[str]:
        """Pages of each owner."""
        pages: Counter[str] = Counter()
        for sequence in self.running:
            pages[sequence.owner] += len(sequence.pages)
        return pages

    def _victim(self, sequence: ScheduledSequence) -> ScheduledSequence:
        """Returns the sequence to preempt for a running one: the youngest of all, or of the owner that has more than
        its share."""
        if self._owners < 2 and self.each_pages == self.pool.count:
            return self.running[-1]
        pages = self._held()
        if pages[sequence.owner] >= self.each_pages:
            return next(s for s in reversed(self.running) if s.owner == sequence.owner)
        owner = above(pages, share(self.pool.count, self._owners), "")
        candidates = [s for s in self.running if s.owner == owner and s.preemptions < PATIENT]
        return candidates[-1] if candidates and owner is not None else self.running[-1]

    def _make_place(self, owner: str, planned: dict[ScheduledSequence, Chunk]) -> bool:
        """Takes a place in the step from the owner that has most, for one that has less than its share."""
        counts = Counter(s.owner for s in self.running)
        fair = share(self.width, self._owners)
        other = above(counts, fair, owner)
        if other is None or counts[owner] >= fair:
            return False
        candidates = [s for s in self.running if s.owner == other and s.preemptions < PATIENT]
        if candidates:
            planned.pop(candidates[-1], None)
            self._preempt(candidates[-1])
        return bool(candidates)

    def _make_room(self, owner: str, needed: int, planned: dict[ScheduledSequence, Chunk]) -> bool:
        """Takes pages from owners that have more than their share, for one that stays within its own."""
        fair, pages = share(self.pool.count, self._owners), self._held()
        if self._owners < 2 or pages[owner] + needed > fair:
            return False
        if sum(max(count - fair, 0) for count in pages.values()) + self.pool.free < needed + len(self.running):
            return False
        while needed + len(self.running) > self.pool.free:
            other = above(self._held(), fair, owner)
            candidates = [s for s in self.running if s.owner == other and s.preemptions < PATIENT]
            if other is None or not candidates:
                return False
            planned.pop(candidates[-1], None)
            self._preempt(candidates[-1])
        return True

    def _preempt(self, sequence: ScheduledSequence) -> None:
        self.running.remove(sequence)
        self._release(sequence)
        sequence.preemptions += 1
        self.waiting.appendleft(sequence)

    def _release(self, sequence: ScheduledSequence) -> None:
        self.pool.give_back(sequence.pages)
        sequence.pages, sequence.computed, sequence.draft = [], 0, []

    def _in_turn(self, passed: set[str]) -> Iterator[ScheduledSequence]:
        """Those that wait, by the credit of their owner and then as they came; owners in `passed` are left out."""
        queues: dict[str, deque[ScheduledSequence]] = {}
        for sequence in self.waiting:
            queues.setdefault(sequence.owner, deque()).append(sequence)
        while queues:
            owner = self.credits.first(queues) if len(queues) > 1 else next(iter(queues))
            if owner in passed or not queues[owner]:
                del queues[owner]
                continue
            yield queues[owner].popleft()

    def _admit(self, planned: dict[ScheduledSequence, Chunk], each: int | None) -> None:
        """Takes sequences in while they fit. One whose beginning another is just computing waits for its pages."""
        coming = {key for running in self.running for key in running._keys[running.computed // self.pool.size :]}
        spent = Counter({s.owner: 0 for s in self.running})
        for chunk in planned.values():
            spent[chunk.sequence.owner] += len(chunk.tokens) if chunk.sequence.pending > 1 else 0
        passed: set[str] = set()
        for sequence in self._in_turn(passed):
            if self._left(planned) < 1:
                return
            owner = sequence.owner
            if (each is not None and spent[owner] >= each) or self._count(owner) >= self.each_running:
                passed.add(owner)
                continue
            if len(self.running) >= self.width and not self._make_place(owner, planned):
                passed.add(owner)
                continue
            remembered = self._remembered(sequence)
            keys = self._usable(sequence)
            if self.pool.remembers and len(remembered) < len(keys) and keys[len(remembered)] in coming:
                continue
            for page in remembered:
                self.pool.share(page)
            # Room for the whole text now, and for a page more of everyone: else it would soon be thrown out again.
            needed = -(-len(sequence.tokens) // self.pool.size) - len(remembered)
            short = self.running and needed + len(self.running) > self.pool.free
            if self._held()[owner] + needed + len(remembered) > self.each_pages or (
                short and not self._make_room(owner, needed, planned)
            ):
                self.pool.give_back(remembered)
                if not self._count(owner):
                    return  # its turn: pages that come free are for it
                passed.add(owner)
                continue
            self.waiting.remove(sequence)
            self.running.append(sequence)
            sequence.pages, sequence.computed = remembered, len(remembered) * self.pool.size
            if not sequence._admitted:
                sequence._admitted, sequence.reused = True, sequence.computed
            coming.update(keys[len(remembered) :])
            self._plan_one(sequence, planned, None if each is None else each - spent[owner])
            tokens = len(planned[sequence].tokens) if sequence in planned else 0
            spent[owner] += tokens
            self._charge(sequence, tokens)

    def _count(self, owner: str) -> int:
        return sum(s.owner == owner for s in self.running)

    def _usable(self, sequence: ScheduledSequence) -> list[bytes]:
        """Keys of the pages that may be taken over: tokens whose logits are wanted have to run, the last one always."""
        last = len(sequence.tokens) - 1
        return sequence._keys[: (min(sequence.scored_from, last) if sequence.scored else last) // self.pool.size]

    def _remembered(self, sequence: ScheduledSequence) -> list[int]:
        pages: list[int] = []
        for i, key in enumerate(self._usable(sequence)):
            page = self.pool.find(key, sequence.tokens[i * self.pool.size : (i + 1) * self.pool.size])
            if page is None:
                break
            pages.append(page)
        return pages

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
