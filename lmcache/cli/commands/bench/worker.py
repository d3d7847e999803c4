"""One worker process of `bench kvcache`: a real client that stores, retrieves, looks up, checks and keeps time.

Comes in: a `Plan`, the first line of stdin, and later the words `go` and `stop`. Goes out: messages on stdout, the last a
`Finished`. The process is one client of the server as an engine's worker is one; being a process, its copies wait for no
other worker's interpreter lock. Next on the path: `client/kvcache.py`; at the other end of the pipe is `measure.py`.

    store the fill and the working set, warm up -> Waiting -> "go" -> measure -> Finished
    store one's share                           -> Waiting -> "go" -> verify the next worker's share -> Finished

Only the cache's part of an operation is timed, until the last byte is where it should be. Preparing the bytes, checking them,
making room in the working set and the raw copies happen between the operations.
"""

from __future__ import annotations

import contextlib
import os
import random
import select
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import TypeVar

import msgspec

from lmcache.cli.commands.bench.memory import ChunkMemory, make_memory
from lmcache.cli.commands.bench.messages import (
    BadChunk,
    CopyTally,
    Finished,
    LaneReport,
    Message,
    Plan,
    Progress,
    Refusal,
    Tally,
    Waiting,
)
from lmcache.cli.commands.bench.workload import (
    OperationKind,
    Workload,
    fill_prompt,
    first_difference,
    lane_item,
    lane_size,
    operations,
)
from lmcache.client.kvcache import KVCacheClient, checksum
from lmcache.client.mq import MessageQueueClient, check_reachable
from lmcache.errors import DeadlineError, LMCacheError, ProtocolError, RemoteError, UnreachableError
from lmcache.keys import KEY_BYTES
from lmcache.log import LEVEL_VARIABLE, configure_logging
from lmcache.protocol import Evict, LookupReply, Placement, StoreOutcome

OPEN, PIN, WARM_UP, MEASURE = "open", "pin", "warm up", "measure"
REQUEST_ID = "bench"
REPORT_SECONDS = 0.1
CLAIM_PROMPTS = 256
# All workers make raw copies at the same time: whenever the clock, which all processes share, passes a multiple of the period.
RAW_PERIOD_SECONDS = 0.4
RAW_SECONDS = 0.04
MAX_BAD_CHUNKS_TOLD = 10
MAX_FAILURES_IN_A_ROW = 3
# Few enough that the server's loop is not held up by one removal.
KEYS_PER_REMOVAL = 512
UNPIN_POLL_SECONDS = 0.01

T = TypeVar("T")


class Parent:
    """The worker's end of the pipes.

    Args:
        read_fd, write_fd: where the parent's words come from and where messages go.
    """

    def __init__(self, read_fd: int, write_fd: int) -> None:
        self._read_fd = read_fd
        self._write_fd = write_fd
        self._unread = b""
        self._may_go = False
        self.is_gone = False
        self.wants_stop = False

    def receive_plan(self) -> Plan:
        """Return the first line. The parent writes it before anything else, or is gone.

        Raises: EOFError
        """
        while b"\n" not in self._unread:
            data = os.read(self._read_fd, 1 << 16)
            if not data:
                raise EOFError("the plan did not come")
            self._unread += data
        line, _, self._unread = self._unread.partition(b"\n")
        self._understand()  # a word may have come along with the plan
        return msgspec.json.decode(line, type=Plan)

    def send(self, message: Message) -> None:
        """Write one line; a parent that is gone wants no more."""
        data = memoryview(msgspec.json.encode(message) + b"\n")
        try:
            while data:
                data = data[os.write(self._write_fd, data) :]
        except BrokenPipeError:
            self.is_gone = self.wants_stop = True

    def listen(self, timeout_seconds: float | None = 0.0) -> None:
        """Take in what the parent said."""
        if self.is_gone or not select.select([self._read_fd], [], [], timeout_seconds)[0]:
            return
        data = os.read(self._read_fd, 1 << 10)
        self._unread += data
        self.is_gone = not data
        self._understand()

    def _understand(self) -> None:
        self._may_go |= b"go\n" in self._unread
        self.wants_stop |= self.is_gone or b"stop\n" in self._unread

    def wait_for_go(self) -> bool:
        """Say that we are prepared; True for `go`, False for `stop`. A dead parent's pipe ends the wait."""
        if not self.wants_stop:
            self.send(Waiting())
        while not (self._may_go or self.wants_stop):
            self.listen(None)
        return not self.wants_stop


class LivePrompt(msgspec.Struct, frozen=True):
    """A prompt that this worker has stored: its place in the lane, its keys, and what they must contain."""

    number: int
    keys: bytes
    checksums: list[int]


class GiveUpError(Exception):
    """There is no point in going on; the cause is the failure that said so."""


class Lane:
    """One worker's state: its prompts, its buffers, its counts.

    Args:
        plan: what to do.
        client: the connection to the server.
        parent: who wants to know.
    """

    def __init__(self, plan: Plan, client: KVCacheClient, parent: Parent) -> None:
        workload = plan.workload
        self.report = LaneReport()
        self._plan = plan
        self._workload = workload
        self._client = client
        self._parent = parent
        self._live: deque[LivePrompt] = deque()
        self._room = lane_size(plan.num_prompts, plan.lane, plan.num_lanes)
        self._next_number = 0
        self._claimed = 0
        # The first prompt whose store failed: parts of it may have become visible all the same.
        self._in_doubt = sys.maxsize
        self._choices = random.Random(f"{workload.seed}/{plan.lane}/prompts")
        self._memory: ChunkMemory = make_memory(plan, client)
        self._content, self._landing = self._memory.content, self._memory.landing
        self._namespace_id = workload.namespace.id
        self._failures_in_a_row = 0
        self._promoted_chunks = 0
        self._reported_at = 0.0
        self._phase, self._phase_share = "store", 0.0
        self._clear_tallies()

    # -- phases -------------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Do the whole plan; what stops it early is in the report."""
        try:
            with contextlib.closing(self._memory):
                self._open()
                if self._plan.verify_only:
                    self._run_verify_only()
                else:
                    self._run_measurement()
        except GiveUpError as exc:
            self._give_up(exc.__cause__)
        except LMCacheError as exc:
            self._give_up(exc)

    def _open(self) -> None:
        self._tick(OPEN, 0.0, now=True)
        self.report.is_inline = self._client.is_inline
        self._memory.open(lambda share: not self._tick(PIN, share))
        self.report.device = self._memory.report()

    def _run_verify_only(self) -> None:
        if not self._plan.reuse:
            self._store_working_set()
        if self._parent.wait_for_go():
            self._verify_share((self._plan.lane + 1) % self._plan.num_lanes)

    def _run_measurement(self) -> None:
        plan = self._plan
        self._memory.open_raw(self._room * self._workload.prompt_bytes)
        self._store_fill()
        self._store_working_set()
        upcoming = operations(plan.mix, self._workload.seed, plan.lane)
        self._operate(upcoming, WARM_UP, plan.warmup_seconds, None)
        self._clear_tallies()
        if self._parent.wait_for_go():
            self._operate(upcoming, MEASURE, plan.duration_seconds, plan.max_operations)

    def _store_fill(self) -> None:
        total = lane_size(self._plan.num_fill_prompts, self._plan.lane, self._plan.num_lanes)
        fill = self.report.fill
        started = time.perf_counter()
        for number in range(total):
            if self._tick("fill", number / total):
                break
            keys = self._workload.keys(fill_prompt(self._item(number)))
            self._content.become(keys)
            self._memory.place()
            seconds = self._attempt(partial(self._store, keys))
            if seconds is not None:
                fill.num_chunks += self._workload.chunks_per_prompt
                fill.num_bytes += self._workload.prompt_bytes
                fill.longest_store_seconds = max(fill.longest_store_seconds, seconds)
        fill.seconds = time.perf_counter() - started

    def _store_working_set(self) -> None:
        for number in range(self._room):
            if self._tick("store", number / self._room):
                break
            self._do_store()

    def _operate(
        self, upcoming: Iterator[OperationKind], phase: str, seconds: float | None, max_operations: int | None
    ) -> None:
        """Run operations until the time is over, enough were done, or the parent says stop."""
        self._tick(phase, 0.0, now=True)
        do = {
            OperationKind.STORE: self._do_store,
            OperationKind.RETRIEVE: self._do_retrieve,
            OperationKind.LOOKUP: self._do_lookup,
        }
        started = time.perf_counter()
        done = 0
        next_raw = 0.0
        try:
            while True:
                if time.monotonic() >= next_raw:
                    next_raw = self._copy_raw()
                elapsed = time.perf_counter() - started
                share = max(_share(elapsed, seconds), _share(done, max_operations))
                if share >= 1 or self._tick(phase, share):
                    break
                do[next(upcoming)]()
                done += 1
        finally:
            self.report.measured_seconds = time.perf_counter() - started

    def _clear_tallies(self) -> None:
        """What was timed so far was preparation."""
        self.report.operations = {kind: Tally() for kind in OperationKind}
        self.report.raw_writes, self.report.raw_reads = CopyTally(), CopyTally()
        self.report.operation_seconds = self.report.measured_seconds = 0.0

    def _verify_share(self, lane: int) -> None:
        """Read what another process has written, where there is one."""
        total = lane_size(self._plan.num_prompts, lane, self._plan.num_lanes)
        for number in range(total):
            if self._tick("verify", number / total):
                break
            prompt = lane_item(number, lane, self._plan.num_lanes)
            keys = self._workload.keys(prompt)
            self._memory.blot()
            found = self._attempt(partial(self._retrieve, keys))
            if found is not None:
                seconds, placements = found
                tally = self._count(OperationKind.RETRIEVE, seconds)
                tally.l1_chunks += len(placements)
                tally.l2_chunks += self._promoted_chunks
                self._content.become(keys)
                self._check(prompt, keys, self._content.checksums(), placements)

    # -- operations ---------------------------------------------------------------------------------------------------

    def _do_store(self) -> None:
        while len(self._live) >= self._room:
            self.report.removed_chunks += remove(self._client.mq, self._live.popleft().keys)
        number = self._claim_number()
        keys = self._workload.keys(self._item(number))
        self._content.become(keys)
        checksums = self._content.checksums() if self._plan.check else []
        self._memory.place()
        seconds = self._attempt(partial(self._store, keys))
        if seconds is None:
            self._in_doubt = min(number, self._in_doubt)
        else:
            self._live.append(LivePrompt(number, keys, checksums))
            tally = self._count(OperationKind.STORE, seconds)
            tally.num_bytes += self._workload.prompt_bytes

    def _do_retrieve(self) -> None:
        if not self._live:
            return
        prompt = self._choices.choice(self._live)
        self._memory.blot()
        found = self._attempt(partial(self._retrieve, prompt.keys))
        if found is not None:
            seconds, placements = found
            tally = self._count(OperationKind.RETRIEVE, seconds)
            tally.l1_chunks += len(placements)
            tally.l2_chunks += self._promoted_chunks
            tally.num_bytes += len(placements) * self._workload.chunk_bytes
            self._check(self._item(prompt.number), prompt.keys, prompt.checksums, placements)

    def _do_lookup(self) -> None:
        if not self._live:
            return
        prompt = self._choices.choice(self._live)
        found = self._attempt(partial(self._lookup, prompt.keys))
        if found is not None:
            seconds, reply = found
            tally = self._count(OperationKind.LOOKUP, seconds)
            tally.l1_chunks += reply.l1_chunks
            tally.l2_chunks += reply.l2_chunks

    def _store(self, keys: bytes) -> float:
        """Store what was placed; return the seconds until all of it is visible."""
        started = time.perf_counter()
        with self._client.reserve(keys, self._workload.chunk_bytes, self._namespace_id) as reservation:
            self._memory.store(reservation)
            committed = reservation.commit()
        seconds = time.perf_counter() - started
        if committed < self._workload.chunks_per_prompt:
            remove(self._client.mq, keys)
            raise _store_refused(reservation.outcomes, committed)
        return seconds

    def _retrieve(self, keys: bytes) -> tuple[float, list[Placement]]:
        """Load the leading chunks that are there; return the seconds until they are unpinned again.

        Where there is an L2, a lookup has them loaded into L1 first, as an engine's does; its time is not counted here.
        """
        if not self._plan.has_l2:
            return self._read(keys)
        self._promoted_chunks = self._client.lookup(keys, REQUEST_ID).l2_chunks
        try:
            return self._read(keys)
        finally:
            self._client.free_lookup_locks(REQUEST_ID)

    def _read(self, keys: bytes) -> tuple[float, list[Placement]]:
        started = time.perf_counter()
        with self._client.pin(keys, REQUEST_ID) as pinned:
            for extent in pinned.extents:
                if len(extent) != self._workload.chunk_bytes:
                    raise ProtocolError(f"a chunk of {self._workload.chunk_bytes} bytes came back with {len(extent)}")
            self._memory.load(pinned.extents)
            pinned.verify()
        return time.perf_counter() - started, pinned.placements

    def _lookup(self, keys: bytes) -> tuple[float, LookupReply]:
        started = time.perf_counter()
        reply = self._client.lookup(keys, pin=False)
        return time.perf_counter() - started, reply

    def _attempt(self, operation: Callable[[], T]) -> T | None:
        """Return what the operation returns; None when it failed, which is counted.

        Raises: GiveUpError when nobody is there, or everything fails.
        """
        started = time.perf_counter()
        try:
            result = operation()
        except LMCacheError as exc:
            self.report.failures.add(exc)
            self._failures_in_a_row += 1
            if self._failures_in_a_row >= MAX_FAILURES_IN_A_ROW or not self._may_answer_again(exc):
                raise GiveUpError from exc
            return None
        finally:
            self.report.operation_seconds += time.perf_counter() - started
        self._failures_in_a_row = 0
        return result

    def _may_answer_again(self, exc: LMCacheError) -> bool:
        """A late answer is one failure; where nobody listens or a copy is stuck, all further operations would wait in vain."""
        if self._memory.is_stuck:
            return False
        if not isinstance(exc, DeadlineError):
            return not isinstance(exc, UnreachableError)
        try:
            check_reachable(self._plan.url, self._plan.timeout_seconds)
        except UnreachableError:
            return False
        return True

    # -- between the operations ---------------------------------------------------------------------------------------

    def _check(self, prompt: int, keys: bytes, expected: list[int], placements: list[Placement]) -> None:
        """Compare what was loaded with what was stored under these keys."""
        correctness = self.report.correctness
        correctness.missing += self._workload.chunks_per_prompt - len(placements)
        if not self._plan.check:
            return
        self._memory.fetch()
        wrong = [index for index in range(len(placements)) if checksum(self._landing.chunks[index]) != expected[index]]
        correctness.ok += len(placements) - len(wrong)
        correctness.bad += len(wrong)
        for index in wrong[: MAX_BAD_CHUNKS_TOLD - len(correctness.bad_chunks)]:
            correctness.bad_chunks.append(self._bad_chunk(prompt, index, keys, placements[index]))

    def _bad_chunk(self, prompt: int, index: int, keys: bytes, placement: Placement) -> BadChunk:
        self._content.become(keys)
        expected, found = self._content.chunks[index], self._landing.chunks[index]
        at = first_difference(expected, found)
        return BadChunk(
            prompt=prompt,
            chunk=index,
            key=keys[index * KEY_BYTES : (index + 1) * KEY_BYTES].hex(),
            pool_offset=None if self.report.is_inline else placement.offset,
            byte=at,
            expected=None if at is None else expected[at],
            found=None if at is None else found[at],
        )

    def _count(self, kind: OperationKind, seconds: float) -> Tally:
        tally = self.report.operations[kind]
        tally.seconds.append(seconds)
        tally.asked_chunks += self._workload.chunks_per_prompt
        return tally

    def _copy_raw(self) -> float:
        """Make the same copies without the cache for a while; return when it is time again."""
        until = time.monotonic() + RAW_SECONDS
        while True:
            self._count_raw(self.report.raw_writes, self._memory.raw_write())
            self._count_raw(self.report.raw_reads, self._memory.raw_read())
            now = time.monotonic()
            if now >= until:
                return (now // RAW_PERIOD_SECONDS + 1) * RAW_PERIOD_SECONDS

    def _count_raw(self, tally: CopyTally, seconds: float) -> None:
        tally.seconds += seconds
        tally.num_bytes += self._workload.prompt_bytes

    def _item(self, number: int) -> int:
        return lane_item(number, self._plan.lane, self._plan.num_lanes)

    def _claim_number(self) -> int:
        """Return the next prompt's number; the parent hears of it before the server does, so that it can clean up."""
        if self._next_number >= self._claimed:
            self._claimed += CLAIM_PROMPTS
            self._tell()
        self._next_number += 1
        return self._next_number - 1

    def _first_left(self) -> int:
        """The first prompt that may still be in the cache."""
        return min(self._live[0].number if self._live else self._next_number, self._in_doubt)

    def _tick(self, phase: str, share: float, now: bool = False) -> bool:
        """Report every now and then, or now; True when the parent wants us to stop."""
        if now or time.monotonic() - self._reported_at >= REPORT_SECONDS:
            self._reported_at = time.monotonic()
            self._phase, self._phase_share = phase, min(share, 1.0)
            self._tell()
            self._parent.listen()
        return self._parent.wants_stop

    def _tell(self) -> None:
        self._parent.send(Progress(self._phase, self._phase_share, self._first_left(), self._claimed))

    def _give_up(self, cause: BaseException | None) -> None:
        """What was timed before the measurement is no figure."""
        assert isinstance(cause, LMCacheError)
        if self._phase != MEASURE:
            self._clear_tallies()
        self.report.gave_up = Refusal(cause.code, cause.message, cause.hint, cause.exit_code)

    def remove_everything(self) -> None:
        """Remove what this worker stored: for when the parent, whose task it is, is gone."""
        prompts = [self._item(number) for number in range(self._first_left(), self._next_number)]
        fill = lane_size(self._plan.num_fill_prompts, self._plan.lane, self._plan.num_lanes)
        prompts += [fill_prompt(self._item(number)) for number in range(fill)]
        remove_prompts(self._client.mq, self._workload, prompts)


def _share(done: float, total: float | None) -> float:
    """How much of the total is done, 0 where there is no limit."""
    if total is None:
        return 0.0
    return done / total if total else 1.0


def _store_refused(outcomes: list[StoreOutcome], committed: int) -> RemoteError:
    names = ", ".join(f"{outcomes.count(outcome)} {outcome.name}" for outcome in StoreOutcome if outcome in outcomes)
    worst = max((o for o in outcomes if o is not StoreOutcome.RESERVED), default=StoreOutcome.RESERVED)
    code = "commit_rejected" if worst is StoreOutcome.RESERVED else f"store_{worst.name.lower()}"
    return RemoteError(f"{committed} of {len(outcomes)} chunks were stored: {names}", code=code)


def remove(mq: MessageQueueClient, keys: bytes) -> int:
    """Remove exactly these chunks; return how many there were.

    What is on its way over a socket is still pinned, so this asks again until the client's deadline.

    Raises: UnreachableError, RemoteError.
    """
    removed = 0
    deadline = time.monotonic() + mq.timeout_seconds
    while keys:
        reply = mq.call(Evict(), [keys])
        removed += reply.objects
        if not reply.kept_objects:
            break
        if time.monotonic() > deadline:
            raise RemoteError(f"{reply.kept_objects} chunks could not be removed: they stay pinned", code="pinned")
        time.sleep(UNPIN_POLL_SECONDS)
    return removed


def remove_prompts(mq: MessageQueueClient, workload: Workload, prompts: Iterable[int]) -> int:
    """Remove every chunk of these prompts, in requests that do not hold the server up; return how many there were.

    Raises: UnreachableError, RemoteError.
    """
    removed = 0
    batch = bytearray()
    for prompt in prompts:
        batch += workload.keys(prompt)
        if len(batch) >= KEYS_PER_REMOVAL * KEY_BYTES:
            removed += remove(mq, bytes(batch))
            batch.clear()
    return removed + remove(mq, bytes(batch))


def main() -> int:
    """Run one plan from stdin."""
    configure_logging(os.environ.get(LEVEL_VARIABLE, "ERROR"))
    # Whatever else prints must not end up between the messages.
    messages_fd = os.dup(1)
    os.dup2(2, 1)
    parent = Parent(0, messages_fd)
    try:
        plan = parent.receive_plan()
    except EOFError:
        return 1
    with KVCacheClient(plan.url, kind="bench", timeout_seconds=plan.timeout_seconds, inline=plan.inline) as client:
        lane = Lane(plan, client, parent)
        lane.run()
        parent.send(Finished(lane.report))
        if parent.is_gone and not plan.keep:
            with contextlib.suppress(LMCacheError):
                lane.remove_everything()
    return 0


if __name__ == "__main__":
    sys.exit(main())
