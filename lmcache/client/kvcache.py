"""Store and retrieve chunks: through the mapped pool on the server's host, over the socket elsewhere.

Comes in: chunk keys and buffers. Goes out: bytes in the pool, or a copy of them. The two verbs are paired:
`reserve` -> write the extents -> `commit`, and `pin` -> copy the extents -> `verify` -> `release`. Next on the path:
`client/mq.py` for the messages, `pool.py` for the bytes.
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import xxhash

from lmcache import __version__
from lmcache.client.mapping import PoolMapping, Shared, WatchMapping
from lmcache.client.mq import DEFAULT_TIMEOUT_SECONDS, MessageQueueClient, ReplyFuture, diagnose
from lmcache.errors import (
    ChecksumError,
    DeadlineError,
    LayoutMismatchError,
    LMCacheError,
    PoolError,
    RemoteError,
    StaleReadError,
    UnreachableError,
)
from lmcache.keys import KEY_BYTES, Namespace
from lmcache.layout import KVLayout
from lmcache.log import RateLimitedLog, init_logger
from lmcache.pool import PoolView, Presence, is_same_chunk
from lmcache.protocol import (
    MAX_CHUNKS,
    Abort,
    Attach,
    Commit,
    EndSession,
    FailureReason,
    FindWorkers,
    FreeLookupLocks,
    Get,
    Goodbye,
    Hello,
    HelloReply,
    Lookup,
    LookupReply,
    Noop,
    PinReport,
    PinsReply,
    Placement,
    Put,
    R,
    RegisterKVCache,
    RegisterReply,
    Release,
    Report,
    Request,
    Retrieve,
    Store,
    StoreOutcome,
)

logger = init_logger(__name__)

UNKNOWN_CLIENT = "unknown_client"
MAX_HEARTBEAT_SECONDS = 1.0
BACKOFF_MAX_SECONDS = 2.0
UNMAP_SECONDS = 30.0
# One inline message holds at most this many bytes of chunks: enough to stream, little enough to keep in flight.
INLINE_BATCH_BYTES = 32 << 20

Buffer = bytes | bytearray | memoryview
# (client id, checksums) -> the request
MakePut = Callable[[str, list[int]], Put]


def checksum(data: Buffer) -> int:
    """Return the content checksum that travels with a chunk: XXH3, 64 bits; 0 is kept for "none"."""
    return xxhash.xxh3_64_intdigest(data) or 1


class Attachment(Shared):
    """One introduction to one server life: the client id, the mapped pool and the proof that we live.

    It stays mapped and locked while any reservation or pin taken through it is in use, also after the server has changed:
    a server that adopts the pool gives no extent away that this process may still be writing.
    """

    def __init__(self, hello: HelloReply, mapping: PoolMapping | None, presence: Presence | None) -> None:
        super().__init__()
        self.client_id = hello.client
        self.boot = hello.boot
        self.chunk_size = hello.chunk_size
        self.lease_seconds = hello.lease_seconds
        self.pin_timeout_seconds = hello.pin_timeout_seconds
        self.mapping = mapping
        self._presence = presence
        self.num_writers = 0
        """Reservations through which the pool may still be written."""
        # What this life of ours has told the server, and what was copied, and told, before it.
        self.told_pins: PinReport | None = None
        self.copied_before_bytes = 0

    @property
    def view(self) -> PoolView | None:
        """The pool, where it is mapped."""
        return self.mapping.view if self.mapping is not None else None

    def count_writer(self, by: int) -> None:
        """One reservation more, or less."""
        with self._lock:
            self.num_writers += by

    def _close(self) -> None:
        """End the proof of life, and let go of the pool."""
        try:
            if self._presence is not None:
                self._presence.close()
        finally:
            if self.mapping is not None:
                self.mapping.release()


class Reservation:
    """Places to write chunks to. Leaving the `with` block without `commit` gives them back, and the acquired `attachment`.

    `outcomes` has one entry a key, `extents` one writable view for each of them that is RESERVED, in order.
    """

    def __init__(
        self,
        client: KVCacheClient,
        attachment: Attachment,
        outcomes: list[StoreOutcome],
        placements: list[Placement],
        extents: list[memoryview],
    ) -> None:
        self.outcomes = outcomes
        self.extents = extents
        self._client = client
        self._attachment = attachment
        self._placements = placements
        self._is_open = True
        attachment.count_writer(+1)

    def reserved_indices(self) -> list[int]:
        """Return the positions, among the keys asked for, that `extents` belong to."""
        return [i for i, outcome in enumerate(self.outcomes) if outcome is StoreOutcome.RESERVED]

    def commit(self, with_checksums: bool = False) -> int:
        """Publish what was written; return how many chunks became visible.

        Raises: UnreachableError, RemoteError: nothing is known to be visible.
        """
        placements = self._placements
        if with_checksums:
            placements = [
                Placement(p.slot, p.offset, p.length, p.generation, checksum(extent))
                for p, extent in zip(placements, self.extents, strict=True)
            ]
        try:
            return self._publish(placements)
        finally:
            self._close()

    def _publish(self, placements: list[Placement]) -> int:
        if not placements:
            return 0
        try:
            return self._client.mq.call(Commit(client=self._attachment.client_id, placements=placements)).committed
        except UnreachableError as exc:
            self._client.note_unreachable(self._attachment, exc)
            raise

    def abort(self) -> None:
        """Give the places back; they never become visible. Does nothing after `commit`."""
        if self._is_open:
            try:
                self._give_back()
            except UnreachableError as exc:
                self._client.note_unreachable(self._attachment, exc)
            except RemoteError as exc:
                self._client.note_failure(exc)
            finally:
                self._close()

    def keep_for_ever(self) -> None:
        """Never give the places back while this process lives: something may still write to them."""
        self._is_open = False

    def _give_back(self) -> None:
        if self._placements:
            self._client.mq.call(Abort(client=self._attachment.client_id, placements=self._placements))

    def _close(self) -> None:
        if self._is_open:
            self._is_open = False
            _release_views(self.extents)
            self._attachment.count_writer(-1)
            self._attachment.release()

    def __enter__(self) -> Reservation:
        return self

    def __exit__(self, *_: object) -> None:
        self.abort()


class InlineReservation(Reservation):
    """The same over the socket: the extents are private buffers, and committing sends them."""

    def __init__(self, client: KVCacheClient, attachment: Attachment, keys: bytes, chunk_bytes: int, put: MakePut) -> None:
        count = len(keys) // KEY_BYTES
        extents = [memoryview(bytearray(chunk_bytes)) for _ in range(count)]
        super().__init__(client, attachment, [StoreOutcome.RESERVED] * count, [], extents)
        self._keys = keys
        self._put = put

    def commit(self, with_checksums: bool = False) -> int:
        """Send the chunks; `outcomes` then says what became of each."""
        try:
            self.outcomes = self._client.put(self._keys, self.extents, self._put, with_checksums)
        finally:
            self._close()
        return self.outcomes.count(StoreOutcome.RESERVED)


class PinnedChunks:
    """Chunks to read, until `release` gives the acquired `attachment` back.

    After the copy `verify` tells whether the bytes were the chunks' all the time.
    `extents` holds one read-only view for each leading chunk that is present.
    """

    def __init__(
        self,
        client: KVCacheClient,
        attachment: Attachment,
        request_id: str,
        placements: list[Placement],
        extents: list[memoryview],
        is_inline: bool,
    ) -> None:
        self.extents = extents
        self.placements = placements
        self._client = client
        self._attachment = attachment
        self._request_id = request_id
        self._is_inline = is_inline
        self._is_open = True

    def verify(self, check_content: bool = False) -> None:
        """Return if every extent belonged to its chunk until now. Call it after the copy has completed.

        Args:
            check_content: also compare the bytes with the checksum that was stored, where one was.
        Raises: StaleReadError, ChecksumError: throw away what was copied.
        """
        self.compare(check_content)

    def compare(self, with_content: bool) -> None:
        """Do what `verify` does, which counts the chunks as read; before the copy too.

        Raises: StaleReadError, ChecksumError.
        """
        for placement, extent in zip(self.placements, self.extents, strict=True):
            differs = with_content and placement.checksum and checksum(extent) != placement.checksum
            # After the bytes were read, and first to be told: other bytes are no wonder in a slot that was freed.
            if not is_same_chunk(self._generation(placement), placement.generation):
                raise StaleReadError(f"slot {placement.slot} was freed while it was read")
            if differs:
                raise ChecksumError(
                    f"chunk in slot {placement.slot} differs from what was stored",
                    hint="look for faulty memory, or who else writes to the pool; lmcache kvcache clear removes it",
                )

    @property
    def are_kept(self) -> bool:
        """Whether all chunks are there and pinned. If so, they can be read for KEPT_SECONDS, whatever happens."""
        are_pinned = all(self._generation(placement) == placement.generation for placement in self.placements)
        view = self._attachment.view
        return are_pinned and (self._is_inline or view is None or view.boot_id.hex() == self._attachment.boot)

    def _generation(self, placement: Placement) -> int:
        """The slot's generation now. What came over the socket is ours, and stays."""
        view = self._attachment.view
        return placement.generation if self._is_inline or view is None else view.generation(placement.slot)

    def release(self) -> None:
        """Unpin, without waiting for the reply. Never raises for a server that is gone: its pins are gone with it."""
        if not self._is_open:
            return
        self._is_open = False
        _release_views(self.extents)
        try:
            self._unpin()
        except UnreachableError as exc:
            self._client.note_unreachable(self._attachment, exc)
        finally:
            self._attachment.release()

    def _unpin(self) -> None:
        if self.placements and not self._is_inline:
            request = Release(
                client=self._attachment.client_id,
                request_id=self._request_id,
                placements=self.placements,
            )
            self._client.mq.post(request)

    def __enter__(self) -> PinnedChunks:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


class BorrowedChunks(PinnedChunks):
    """Chunks at places that another client of this host was told, and has pinned: nothing is asked, and nothing unpinned."""

    def verify(self, check_content: bool = False) -> None:
        """The same. Whether the pins were still there does not matter. The chunks are counted for the next report."""
        super().verify(check_content)
        self._client.tally.add(loaded_chunks=len(self.extents))

    def _unpin(self) -> None:
        pass


def failure_reason(exc: Exception) -> FailureReason:
    """Return what kind of failure it is, for metrics."""
    kinds: list[tuple[type[Exception], FailureReason]] = [
        (StaleReadError, FailureReason.STALE),
        (ChecksumError, FailureReason.CHECKSUM),
        (LayoutMismatchError, FailureReason.LAYOUT),
        (DeadlineError, FailureReason.DEADLINE),
        (UnreachableError, FailureReason.UNREACHABLE),
        (RemoteError, FailureReason.REFUSED),
    ]
    return next((reason for kind, reason in kinds if isinstance(exc, kind)), FailureReason.ERROR)


class Tally:
    """What an engine counts until it is reported. Any thread."""

    def __init__(self) -> None:
        self._lock = threading.RLock()  # garbage collection closes clients in any thread
        self._failed_blocks: Counter[FailureReason] = Counter()
        self._failed_lookups: Counter[FailureReason] = Counter()
        self._decode_chunks = 0
        self._loaded_chunks = 0

    def add(
        self,
        failed_blocks: Mapping[FailureReason, int] | None = None,
        failed_lookups: Mapping[FailureReason, int] | None = None,
        decode_chunks: int = 0,
        loaded_chunks: int = 0,
    ) -> None:
        """Count more."""
        with self._lock:
            self._failed_blocks.update(failed_blocks or {})
            self._failed_lookups.update(failed_lookups or {})
            self._decode_chunks += decode_chunks
            self._loaded_chunks += loaded_chunks

    def take(self, client_id: str, pins: PinReport | None = None) -> Report | None:
        """Return what was counted and begin anew; None when there is nothing to report, `pins` neither."""
        with self._lock:
            report = Report(
                client=client_id,
                failed_blocks=dict(self._failed_blocks),
                failed_lookups=dict(self._failed_lookups),
                decode_chunks=self._decode_chunks,
                loaded_chunks=min(self._loaded_chunks, MAX_CHUNKS),
                pins=pins,
            )
            self._failed_blocks.clear()
            self._failed_lookups.clear()
            self._decode_chunks = 0
            self._loaded_chunks -= report.loaded_chunks
        counted = report.failed_blocks or report.failed_lookups or report.decode_chunks or report.loaded_chunks
        return report if counted or pins is not None else None

    def give_back(self, report: Report) -> None:
        """Count a report that was not delivered again."""
        self.add(report.failed_blocks, report.failed_lookups, report.decode_chunks, report.loaded_chunks)


class PendingLookup:
    """A lookup under way. Belongs to the thread that started it."""

    def __init__(self, client: KVCacheClient, client_id: str, future: ReplyFuture[LookupReply]) -> None:
        self._client = client
        self._client_id = client_id
        self._future = future
        # By request, so that it would take the pins of the request's next lookup along.
        future.is_undone_late = False

    @property
    def is_settled(self) -> bool:
        """Whether `result` would return or raise at once, as far as the replies read so far tell."""
        return self._future.is_settled

    def wait(self, seconds: float) -> bool:
        """Read replies until this one has come, for at most `seconds`; return `is_settled`."""
        return self._future.wait(seconds)

    def result(self) -> LookupReply:
        """Return the reply, once it is settled.

        Raises: DeadlineError, RemoteError, ProtocolError: a miss. The answer may still come, and pin.
        """
        try:
            return self._future.result()
        except DeadlineError as exc:
            self._client.note_silence(exc)
            raise
        except RemoteError as exc:
            self._client.note_refusal(self._client_id, exc)
            raise

    def abandon(self) -> None:
        """Stop waiting. What it still pins goes when the request frees its locks, or ends: before the answer or after it."""
        self._future.abandon()


class KVCacheClient:
    """One user of the cache. Introduces itself on first use, and again by itself after the server restarted.

    Args:
        url: the server's ZMQ address.
        kind: what this client is, for `describe`: "cli", "engine-worker", ...
        inline: do not map the pool even where it could be.
        heartbeat: keep the lease alive and notice a restart from a background thread. While the server is away, calls then
            fail at once instead of waiting for their deadline.
        heartbeat_seconds: the longest pause between two heartbeats.
        on_beat: called after each heartbeat, in its thread.
        software: what the client is made of beside lmcache, for `describe`.
    """

    def __init__(
        self,
        url: str,
        *,
        kind: str = "client",
        timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS,
        inline: bool = False,
        heartbeat: bool = False,
        heartbeat_seconds: float = MAX_HEARTBEAT_SECONDS,
        on_beat: Callable[[KVCacheClient], None] = lambda client: None,
        software: Sequence[str] = (),
    ) -> None:
        self.mq = MessageQueueClient(url, timeout_seconds, self._on_late_reply)
        self._kind = kind
        self._software = ", ".join([f"lmcache {__version__}", *software])
        self._inline = inline
        self._inline_reason = ""  # why the pool could not be mapped, as it was logged last
        self.tally = Tally()
        self._posted: list[tuple[str, Report]] = []  # since the last heartbeat, with the server life that was told
        # Garbage collection may close this client in any thread, also in one that holds these.
        self._lock = threading.RLock()
        self._pause = threading.Condition(threading.RLock())
        self._is_leaving = False
        self._introducing = threading.Lock()
        self._attachment: Attachment | None = None
        # The pool of the last introduction, which the next one may find again; and those that may not be undone yet.
        self._mapping: PoolMapping | None = None
        self._mappings: list[PoolMapping] = []
        self._registration: Callable[[Attachment], RegisterKVCache] | None = None
        self._watch: WatchMapping | None = None
        self._ask_pins: Callable[[], PinReport | None] = lambda: None
        self._copied_bytes = 0
        self._down_reason = ""
        self._log = RateLimitedLog(logger)
        self._heartbeat_seconds = heartbeat_seconds
        self._on_beat = on_beat
        self._heartbeat: threading.Thread | None = None
        if heartbeat:
            self._heartbeat = threading.Thread(target=self._beat, name="lmcache-heartbeat", daemon=True)
            self._heartbeat.start()

    # -- connection ---------------------------------------------------------------------------------------------------

    def attach(self) -> Attachment:
        """Return the current introduction, making one if there is none.

        Raises: UnreachableError (at once while the heartbeat knows that the server is away), RemoteError.
        """
        attachment = self._attachment
        if attachment is None:
            self._check_up()
            if not self._introducing.acquire(timeout=self.mq.timeout_seconds):
                raise DeadlineError(f"no introduction to {self.mq.url} within its deadline")
            try:
                attachment = self._attachment or self._introduce_and_register()
            finally:
                self._introducing.release()
        return attachment

    def present(self) -> Attachment:
        """Return the current introduction at once. Making one is the heartbeat's business, where there is one.

        Raises: UnreachableError at once; without a heartbeat as `attach` does.
        """
        attachment = self._attachment
        if attachment is None and self._heartbeat is not None:
            raise UnreachableError(self._down_reason or f"not introduced to {self.mq.url} yet")
        return attachment or self.attach()

    def _hold(self) -> Attachment:
        """The current introduction, acquired: a heartbeat that fails meanwhile cannot close it."""
        self.mq.check_open()
        attachment = self.attach()
        while not attachment.try_acquire():
            attachment = self.attach()
        return attachment

    def _check_up(self) -> None:
        if self._down_reason:
            raise UnreachableError(self._down_reason)

    @property
    def is_inline(self) -> bool:
        """Whether chunks travel over the socket, because the pool is not or cannot be mapped."""
        return self.attach().view is None

    def watch_mapping(self, watch: WatchMapping) -> None:
        """Tell of the pool that is mapped now, and of each that will be: a GPU's driver has to know of it."""
        self._watch = watch  # an introduction under way will see it
        if self._introducing.acquire(timeout=self.mq.timeout_seconds):
            try:
                attachment = self._attachment
                if attachment is not None and attachment.try_acquire():
                    try:
                        if attachment.mapping is not None:
                            attachment.mapping.watch(watch)
                    finally:
                        attachment.release()
            finally:
                self._introducing.release()

    def watch_pins(self, ask: Callable[[], PinReport | None]) -> None:
        """Tell the server with each heartbeat what `ask` answers, if that is new.

        Any thread may call `ask`. It answers at once, and counts what was copied for as long as this client lives.
        """
        self._ask_pins = ask

    def _new_pins(self, attachment: Attachment) -> PinReport | None:
        """Return what the server has not been told yet. An introduction begins to count anew, so that nothing counts twice."""
        pins = self._ask_pins()
        if pins is None:
            return None
        copied_bytes = max(0, pins.unpinned_copied_bytes - attachment.copied_before_bytes)
        pins = msgspec.structs.replace(pins, unpinned_copied_bytes=copied_bytes)
        return pins if pins != attachment.told_pins else None

    def _note_told(self, attachment: Attachment, pins: PinReport | None) -> None:
        if pins is not None:
            attachment.told_pins = pins
            self._copied_bytes = attachment.copied_before_bytes + pins.unpinned_copied_bytes

    def _introduce_and_register(self) -> Attachment:
        self._check_up()
        attachment = self._introduce()
        try:
            if self._registration is not None:
                self.mq.call(self._registration(attachment))
            if self._watch is not None and attachment.mapping is not None:
                attachment.mapping.watch(self._watch)
        except RemoteError:
            self._attachment = attachment  # refused: known to the server, and of no use to this engine
            raise
        except BaseException:
            attachment.release()
            raise
        attachment.copied_before_bytes = self._copied_bytes
        with self._lock:
            if not self._is_leaving:
                self._attachment = attachment
                return attachment
        attachment.release()
        raise UnreachableError(f"the client of {self.mq.url} is closed")

    def _introduce(self) -> Attachment:
        hello = self.mq.call(Hello(kind=self._kind, pid=os.getpid(), software=self._software))
        if self._inline or not hello.pool_path:
            return Attachment(hello, None, None)
        path = Path(hello.pool_path)
        mapping: PoolMapping | None = None
        presence: Presence | None = None
        try:
            mapping = self._map(path)
            presence = Presence(path, hello.client)
            self.mq.call(Attach(client=hello.client, cookie=mapping.view.header.cookie))
            return Attachment(hello, mapping, presence)
        except BaseException as exc:
            with contextlib.ExitStack() as undo:
                if mapping is not None:
                    undo.callback(mapping.release)
                if presence is not None:
                    undo.callback(presence.close)
            if not isinstance(exc, (PoolError, RemoteError)):
                raise
            self._let_go_of_mapping()
            if exc.with_hint != self._inline_reason:
                self._inline_reason = exc.with_hint
                logger.warning("using the socket for chunks, the pool cannot be mapped: %s", exc.with_hint)
            return Attachment(hello, None, None)

    def _map(self, path: Path) -> PoolMapping:
        """Return the pool's mapping, acquired: that of the last introduction, if it is the same file."""
        mapping = self._mapping
        if mapping is not None and mapping.is_of(path) and mapping.try_acquire():
            return mapping
        self._let_go_of_mapping()
        mapping = PoolMapping(path)
        self._mappings = [*(other for other in self._mappings if not other.is_undone), mapping]
        with self._lock:
            if not self._is_leaving and mapping.try_acquire():
                self._mapping = mapping
        return mapping

    def _let_go_of_mapping(self, unless_served: bool = False, is_gone: bool = False) -> None:
        """Keep it only for those who use it.

        Args:
            unless_served: but not if a server may serve it again, as one that is silent, or the next one over a kept pool.
            is_gone: the server that did has ended.
        """
        with self._lock:
            mapping = self._mapping
            if mapping is None or (unless_served and mapping.may_be_served_again(is_gone)):
                return
            self._mapping = None
        mapping.release()

    def _retire(self, attachment: Attachment) -> None:
        """End an introduction that is of no more use; while we leave it is `close` who ends it, with a goodbye."""
        if self.mq.is_anothers:
            return
        with self._lock:
            if self._attachment is attachment and not self._is_leaving:
                self._attachment = None
                attachment.release()

    def _call(self, make: Callable[[Attachment], Request[R]], payload: Sequence[Buffer] = ()) -> R:
        """Send what `make` returns; introduce ourselves again, once, if the server does not know us."""
        attachment, reply, _ = self._call_holding(make, payload)
        attachment.release()
        return reply

    def _call_holding(
        self, make: Callable[[Attachment], Request[R]], payload: Sequence[Buffer] = ()
    ) -> tuple[Attachment, R, list[memoryview]]:
        """The same; the attachment that the reply was given to is acquired, and the caller's to release."""
        try:
            return self._call_once(make, payload)
        except RemoteError as exc:
            if exc.code != UNKNOWN_CLIENT:
                raise
        return self._call_once(make, payload)

    def _call_once(
        self, make: Callable[[Attachment], Request[R]], payload: Sequence[Buffer]
    ) -> tuple[Attachment, R, list[memoryview]]:
        attachment = self._hold()
        try:
            future = self.mq.submit(make(attachment), payload, may_wait=True)
            return attachment, future.result(), future.payload
        except BaseException as exc:
            if isinstance(exc, UnreachableError):
                self.note_unreachable(attachment, exc)
            elif isinstance(exc, RemoteError) and exc.code == UNKNOWN_CLIENT:
                self._note_forgotten(attachment)
            attachment.release()
            raise

    def note_unreachable(self, attachment: Attachment, exc: UnreachableError) -> None:
        """What the server granted to the lost request is found by nobody: end this client's life, so that it is freed."""
        self.note_failure(exc)
        if self._heartbeat is not None:
            self._down_reason = exc.message
        self._retire(attachment)

    def note_silence(self, exc: UnreachableError) -> None:
        """A reply did not come in time: until the heartbeat hears from the server, nobody else waits for it."""
        self.note_failure(exc)
        if self._heartbeat is not None:
            self._down_reason = exc.message

    def note_refusal(self, client_id: str, exc: RemoteError) -> None:
        """An error reply to what was asked as `client_id`; if the server does not know that, we introduce ourselves again."""
        attachment = self._attachment
        if exc.code == UNKNOWN_CLIENT and attachment is not None and attachment.client_id == client_id:
            self._note_forgotten(attachment)

    def note_failure(self, exc: Exception) -> None:
        """Log a failure that the caller does not see, at most once per interval."""
        self._log.warning(type(exc).__name__, str(exc))

    def _beat(self) -> None:
        """Heartbeat thread: renews the lease, notices a new boot id, tries again with back-off while the server is away."""
        wait, backoff = 0.0, 0.1
        while self._stays_after(wait):
            attachment = self._attachment
            try:
                try:
                    wait, backoff = self._beat_once(attachment), 0.1
                except LMCacheError as exc:
                    if self._is_leaving:
                        return  # it was `close` that ended the wait
                    self._note_missed_beat(attachment, exc)
                    wait, backoff = backoff, min(backoff * 2, BACKOFF_MAX_SECONDS)
            except Exception as exc:  # no memory, or no thread: without this one the engine would never have a cache again
                if self._attachment is None:
                    self._down_reason = f"a heartbeat failed: {exc!r}"
                self._log.warning("heartbeat", f"a heartbeat failed, and is tried again: {exc!r}")
                wait = BACKOFF_MAX_SECONDS

    def _stays_after(self, seconds: float) -> bool:
        with self._pause:
            if not self._is_leaving:
                self._pause.wait(timeout=seconds)
            return not self._is_leaving

    def _note_missed_beat(self, attachment: Attachment | None, exc: LMCacheError) -> None:
        # Something else may answer there, now or later. Who was connected and is silent is frozen: no need to look.
        is_worth_a_look = not self._down_reason or not isinstance(exc, DeadlineError)
        self._down_reason = str(exc)
        if attachment is not None and isinstance(exc, RemoteError) and exc.code == UNKNOWN_CLIENT:
            self._note_forgotten(attachment)
        elif attachment is not None:
            self._retire(attachment)
        self._let_go_of_mapping(unless_served=True, is_gone=not isinstance(exc, DeadlineError))
        found = (diagnose(self.mq.url) if is_worth_a_look else None) or exc
        self._down_reason = found.with_hint
        self.note_failure(UnreachableError(self._down_reason))

    def _beat_once(self, attachment: Attachment | None) -> float:
        with self._lock:
            posted = [*self._posted]
        reply = self.mq.call(
            Noop(client=attachment.client_id if attachment else None),
            timeout_seconds=min(self.mq.timeout_seconds, BACKOFF_MAX_SECONDS),
        )
        if attachment is not None and reply.boot != attachment.boot:
            self._retire(attachment)
        for boot, report in self._take_posted(posted):
            if boot != reply.boot:  # counted by nobody
                self.tally.give_back(report)
        self._down_reason = ""
        attachment = self.attach()
        self._report(attachment)
        self._on_beat(self)
        return min(attachment.lease_seconds / 3, self._heartbeat_seconds)

    def _report(self, attachment: Attachment) -> None:
        report = self.tally.take(attachment.client_id, self._new_pins(attachment))
        if report is not None:
            try:
                self.mq.call(report, timeout_seconds=min(self.mq.timeout_seconds, BACKOFF_MAX_SECONDS))
            except DeadlineError:  # it is on its way
                self._note_posted(attachment, report)
                self._note_told(attachment, report.pins)
                raise
            except LMCacheError:
                self.tally.give_back(report)
                raise
            self._note_told(attachment, report.pins)

    def post_report(self) -> None:
        """Tell the server now what was counted, without waiting for the reply; what cannot be sent is told by the heartbeat."""
        attachment = self._attachment
        report = self.tally.take(attachment.client_id) if attachment is not None else None
        if attachment is not None and report is not None:
            try:
                self.mq.post(report)
                self._note_posted(attachment, report)
                self.mq.read_what_came()  # an engine that only loads would never read what it is answered
            except UnreachableError:
                self.tally.give_back(report)

    def _note_posted(self, attachment: Attachment, report: Report) -> None:
        """Let the heartbeat find out whether a report reached the server before that ended."""
        if self._heartbeat is not None:
            with self._lock:
                self._posted.append((attachment.boot, report))

    def _note_forgotten(self, attachment: Attachment) -> None:
        """The server lives and does not know us any more, nor count what we told it since."""
        with self._lock:
            posted = [entry for entry in self._posted if entry[1].client == attachment.client_id]
        for _, report in self._take_posted(posted):
            self.tally.give_back(report)
        self._retire(attachment)

    def _take_posted(self, entries: Sequence[tuple[str, Report]]) -> list[tuple[str, Report]]:
        """Take out those that nobody else has taken out."""
        ids = set(map(id, entries))
        with self._lock:
            taken = [entry for entry in self._posted if id(entry) in ids]
            self._posted = [entry for entry in self._posted if id(entry) not in ids]
        return taken

    def _on_late_reply(self, late: ReplyFuture[Any]) -> None:
        """Give back what the server granted to a request whose caller had stopped waiting."""
        with contextlib.suppress(LMCacheError):
            reply = late.result()
            request = late.request
            if isinstance(request, Store) and reply.placements:
                self.mq.post(Abort(client=request.client, placements=reply.placements))
            elif isinstance(request, Retrieve) and reply.placements:
                self.mq.post(Release(client=request.client, request_id=request.request_id, placements=reply.placements))
            elif isinstance(request, Lookup) and request.client is not None and reply.hit_chunks:
                # Of `lookup`, whose deadline ended that life of ours: whatever it still holds for the request is nobody's.
                self.mq.post(FreeLookupLocks(client=request.client, request_id=request.request_id))

    def close(self) -> None:
        """Leave: the server releases our pins and reservations. Never raises for a server that is gone.

        While something may still be written to a reserved place (a store that does not end in time, or never), all stay ours:
        the server frees them when the last one is given back, or this process has ended.

        Any thread, the heartbeat's too: as a finalizer it runs in whichever one garbage collection begins. In a process forked
        from the client's there is nothing to leave.
        """
        if self.mq.is_anothers:
            return
        with self._pause:
            self._is_leaving = True
            self._pause.notify_all()
        if self._heartbeat is not None:
            self.mq.begin_close()
            if self._heartbeat is not threading.current_thread():
                self._heartbeat.join(timeout=BACKOFF_MAX_SECONDS + 1)
        with self._lock:
            attachment, self._attachment = self._attachment, None
        if attachment is not None:
            try:
                self._report(attachment)
                if attachment.view is None or not attachment.num_writers:
                    self.mq.call(
                        Goodbye(client=attachment.client_id),
                        timeout_seconds=min(1.0, self.mq.timeout_seconds),
                    )
            except (UnreachableError, RemoteError) as exc:
                logger.debug("the server did not take our goodbye: %s", exc)
            attachment.release()
        self._let_go_of_mapping()
        give_up_at = time.monotonic() + UNMAP_SECONDS
        for mapping in self._mappings:
            mapping.join(max(0.0, give_up_at - time.monotonic()))
        self.mq.close()

    def __enter__(self) -> KVCacheClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- engine's registration ----------------------------------------------------------------------------------------

    def register(
        self,
        namespace: Namespace,
        layout: KVLayout,
        rank: int = 0,
        world_size: int = 1,
        processes: Sequence[str] = (),
        backend: str = "",
        revision_parts: Mapping[str, str] | None = None,
    ) -> RegisterReply:
        """Tell the server what this rank's KV looks like, by which processes `find_workers` finds it, and what moves it.

        The namespace's chunk size is replaced by the server's. After an error too, the next life of
        the server is told by itself: it may accept, or be there.

        Args:
            revision_parts: what the namespace's revision was made of: the server's log names what has changed.
        Raises: RemoteError when the server refuses (chunk size, layout), UnreachableError.
        """

        def request(attachment: Attachment) -> RegisterKVCache:
            return RegisterKVCache(
                client=attachment.client_id,
                namespace=msgspec.structs.replace(namespace, chunk_size=attachment.chunk_size),
                layout=layout,
                rank=rank,
                world_size=world_size,
                processes=list(processes),
                backend=backend,
                revision_parts=dict(revision_parts or {}),
            )

        self._registration = request
        return self._call(request)

    def find_workers(self, process: str) -> list[RegisterKVCache]:
        """Return what each rank of an engine registered whose workers are `process` or its children; [] until all have.

        Raises: UnreachableError, RemoteError.
        """
        found = self._call(lambda a: FindWorkers(client=a.client_id, process=process)).registrations
        ranks = {registration.rank: registration for registration in found}  # one that lost its lease may be there twice
        return list(ranks.values()) if found and len(ranks) == found[0].world_size else []

    # -- lookup -------------------------------------------------------------------------------------------------------

    def lookup(self, keys: bytes, request_id: str = "", world_size: int = 1, pin: bool = True) -> LookupReply:
        """Return the prefix hit of `keys`; with `pin` it stays readable until the request's locks are freed."""
        return self._call(
            lambda a: Lookup(
                client=a.client_id if pin else None,
                request_id=request_id,
                world_size=world_size,
                timeout_seconds=self.mq.timeout_seconds,
            ),
            [keys],
        )

    def start_lookup(
        self, keys: bytes, request_id: str, world_size: int, timeout_seconds: float, places: bool = False
    ) -> PendingLookup:
        """Start a lookup that pins what it finds for `request_id`; nothing is waited for. The pins are the caller's to free,
        also when it does not wait for the answer.

        Args:
            places: ask where the chunks lie, for whoever may `borrow` them.
        Raises: UnreachableError at once when there is no connection now.
        """
        attachment = self.present()
        self._check_up()
        request = Lookup(
            client=attachment.client_id,
            request_id=request_id,
            world_size=world_size,
            places=places,
            timeout_seconds=timeout_seconds,
        )
        return PendingLookup(self, attachment.client_id, self.mq.submit(request, [keys], timeout_seconds))

    def post_free_lookup_locks(self, request_id: str, end: int = MAX_CHUNKS) -> None:
        """Unpin the first `end` chunks of what the request's lookup found, without waiting for the reply.

        Raises: UnreachableError at once when there is no connection now.
        """
        self.mq.post(FreeLookupLocks(client=self.present().client_id, request_id=request_id, end=end))

    def post_end_session(self, request_id: str) -> None:
        """Release every pin that this client holds for the request, without waiting for the reply.

        Raises: UnreachableError at once when there is no connection now.
        """
        self.mq.post(EndSession(client=self.present().client_id, request_id=request_id))

    def free_lookup_locks(self, request_id: str, start: int = 0, end: int = MAX_CHUNKS) -> int:
        """Unpin chunks [start, end) of the request's lookup; return how many pins went."""
        return self._call(
            lambda a: FreeLookupLocks(client=a.client_id, request_id=request_id, start=start, end=end),
        ).released

    def end_session(self, request_id: str) -> PinsReply:
        """Release every pin that this client holds for the request."""
        return self._call(lambda a: EndSession(client=a.client_id, request_id=request_id))

    # -- store --------------------------------------------------------------------------------------------------------

    def reserve(
        self,
        keys: bytes,
        chunk_bytes: int,
        namespace_id: int = 0,
        rank: int = 0,
        parent: bytes = b"",
    ) -> Reservation:
        """Return places for the chunks that are not stored yet.

        Args:
            parent: the key before the first of `keys`, so that a prompt stored in steps is evicted from its end.
        Raises: UnreachableError, RemoteError.
        """
        if self.is_inline:
            return InlineReservation(self, self._hold(), keys, chunk_bytes, _make_put(namespace_id, rank, parent))
        attachment, reply, _ = self._call_holding(
            lambda a: Store(
                client=a.client_id,
                namespace_id=namespace_id,
                rank=rank,
                parent=parent,
                chunk_bytes=chunk_bytes,
            ),
            [keys],
        )
        outcomes = [StoreOutcome(outcome) for outcome in reply.outcomes]
        return Reservation(self, attachment, outcomes, reply.placements, _extents(attachment, reply.placements))

    def put(self, keys: bytes, chunks: Sequence[Buffer], make: MakePut, with_checksums: bool) -> list[StoreOutcome]:
        """Send chunks over the socket, in messages of at most INLINE_BATCH_BYTES or one chunk."""
        sums = [checksum(chunk) for chunk in chunks] if with_checksums else []
        outcomes: list[StoreOutcome] = []
        for start, end in _batches([len(chunk) for chunk in chunks]):
            payload = [keys[start * KEY_BYTES : end * KEY_BYTES], *chunks[start:end]]
            reply = self._call(functools.partial(_put_as, make, sums[start:end]), payload)
            outcomes += [StoreOutcome(outcome) for outcome in reply.outcomes]
        return outcomes

    def store(
        self, keys: bytes, chunks: Sequence[Buffer], namespace_id: int = 0, rank: int = 0, with_checksums: bool = False
    ) -> list[StoreOutcome]:
        """Copy chunks, all of one length, into the cache; return what became of each (RESERVED: stored).

        Raises: UnreachableError, RemoteError.
        """
        if not chunks:
            return []
        if self.is_inline:
            return self.put(keys, chunks, _make_put(namespace_id, rank), with_checksums)
        with self.reserve(keys, len(chunks[0]), namespace_id, rank) as reservation:
            for extent, index in zip(reservation.extents, reservation.reserved_indices(), strict=True):
                extent[:] = chunks[index]
            reservation.commit(with_checksums)
            return reservation.outcomes

    # -- retrieve -----------------------------------------------------------------------------------------------------

    def pin(self, keys: bytes, request_id: str = "", rank: int = 0) -> PinnedChunks:
        """Return the leading chunks of `keys` that are present, pinned for reading.

        Raises: UnreachableError, RemoteError.
        """
        if self.is_inline:
            return self._get(keys, request_id, rank)
        attachment, reply, _ = self._call_holding(
            lambda a: Retrieve(client=a.client_id, request_id=request_id, rank=rank), [keys]
        )
        extents = [extent.toreadonly() for extent in _extents(attachment, reply.placements)]
        return PinnedChunks(self, attachment, request_id, reply.placements, extents, is_inline=False)

    def borrow(self, placements: list[Placement], boot: str) -> BorrowedChunks | None:
        """Return chunks at the places that a LOOKUP of the server life `boot` told another client of this host.

        No message is sent for them but for `post_report` afterwards. What `verify` accepts has been the chunks' all the time,
        whether or not the other client's pins were there, and whatever became of the server.

        Returns: None when this client has not mapped the pool of that life: `pin` finds the chunks, or does not.
        Raises: PoolError for places outside the pool.
        """
        attachment = self._attachment
        if not placements or attachment is None or attachment.boot != boot:
            return None
        if attachment.view is None or not attachment.try_acquire():
            return None
        extents = [extent.toreadonly() for extent in _extents(attachment, placements)]
        return BorrowedChunks(self, attachment, "", placements, extents, is_inline=False)

    def _get(self, keys: bytes, request_id: str, rank: int) -> PinnedChunks:
        placements: list[Placement] = []
        extents: list[memoryview] = []
        while len(extents) * KEY_BYTES < len(keys):
            attachment, reply, frames = self._call_holding(
                lambda a: Get(client=a.client_id, rank=rank), [keys[len(extents) * KEY_BYTES :]]
            )
            attachment.release()
            if not frames:
                break
            placements += [
                Placement(0, 0, length, 0, sum_) for length, sum_ in zip(reply.lengths, reply.checksums, strict=True)
            ]
            extents += [frame.toreadonly() for frame in frames]
        return PinnedChunks(self, self._hold(), request_id, placements, extents, is_inline=True)

    def retrieve(
        self,
        keys: bytes,
        buffers: Sequence[bytearray | memoryview],
        request_id: str = "",
        rank: int = 0,
        check_content: bool = False,
    ) -> int:
        """Copy the leading chunks that are present into `buffers`; return how many.

        Raises: StaleReadError, ChecksumError: what is in the buffers is not to be used. UnreachableError, RemoteError.
        """
        with self.pin(keys, request_id, rank) as pinned:
            for buffer, extent in zip(buffers, pinned.extents):  # noqa: B905 - a miss ends the shorter one
                memoryview(buffer)[:] = extent
            pinned.verify(check_content)
            return min(len(buffers), len(pinned.extents))


def _make_put(namespace_id: int, rank: int, parent: bytes = b"") -> MakePut:
    def make(client_id: str, sums: list[int]) -> Put:
        return Put(client=client_id, namespace_id=namespace_id, rank=rank, parent=parent, checksums=sums)

    return make


def _put_as(make: MakePut, sums: list[int], attachment: Attachment) -> Put:
    return make(attachment.client_id, sums)


def _extents(attachment: Attachment, placements: list[Placement]) -> list[memoryview]:
    """The bytes of each place; on an error the attachment is given back."""
    try:
        if attachment.view is None:  # the server restarted out of our sight, and this life cannot be mapped
            raise PoolError("the pool can no longer be mapped", hint="try again: chunks will travel over the socket")
        return [attachment.view.extent(place.offset, place.length) for place in placements]
    except PoolError:
        attachment.release()
        raise


def _release_views(extents: list[memoryview]) -> None:
    """What the caller still looks at (an array made from it) stays mapped until it goes; the place is given back now."""
    for extent in extents:
        with contextlib.suppress(BufferError):
            extent.release()


def _batches(lengths: list[int]) -> Iterator[tuple[int, int]]:
    start = total = 0
    for index, length in enumerate(lengths):
        if index > start and total + length > INLINE_BATCH_BYTES:
            yield start, index
            start, total = index, 0
        total += length
    if lengths:
        yield start, len(lengths)
