"""Who is connected, what they hold, and when they are gone. Owner thread only.

A client on this host lives as long as the kernel holds the lock of its presence file; a remote one as long as it renews its
lease. Pins belong to (client, request id) and go one by one, with the request, or with the client.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterable

import msgspec

from lmcache.pool import PresenceWatch
from lmcache.protocol import PinReport, Placement, RegisterKVCache


class LookupPins(msgspec.Struct):
    """What one LOOKUP pinned: slots in token order, `per_chunk` of them (the ranks') a chunk; freed ones are None."""

    slots: list[int | None]
    per_chunk: int

    @property
    def is_empty(self) -> bool:
        """Whether all were freed."""
        return all(slot is None for slot in self.slots)


class Session(msgspec.Struct):
    """The pins of one request of one client. No lookup in it is empty."""

    lookups: list[LookupPins]
    retrieved: dict[int, int]
    last_used_at: float

    def slots(self) -> list[int]:
        """Return every slot once for each pin."""
        held = [slot for lookup in self.lookups for slot in lookup.slots if slot is not None]
        for slot, count in self.retrieved.items():
            held += [slot] * count
        return held

    @property
    def is_empty(self) -> bool:
        """Whether no pin is left."""
        return not self.retrieved and not self.lookups


class Client(msgspec.Struct):
    """One introduced client."""

    id: str
    kind: str
    pid: int
    since: float
    renewed_at: float
    software: str = ""
    presence: PresenceWatch | None = None
    registration: RegisterKVCache | None = None
    pins: PinReport | None = None
    sessions: dict[str, Session] = msgspec.field(default_factory=dict)
    reservations: dict[int, Placement] = msgspec.field(default_factory=dict)

    @property
    def owner(self) -> bytes:
        """The id as it stands in the slot table."""
        return bytes.fromhex(self.id)


class Sessions:
    """All clients.

    Args:
        lease_seconds: how long a remote client may be silent.
        pin_timeout_seconds: how long a request may hold pins without a word.
    """

    def __init__(self, lease_seconds: float, pin_timeout_seconds: float) -> None:
        self.lease_seconds = lease_seconds
        self.pin_timeout_seconds = pin_timeout_seconds
        self.clients: dict[str, Client] = {}

    def introduce(self, kind: str, pid: int, software: str = "") -> Client:
        """Return a new client with an id that nobody can guess."""
        now = time.monotonic()
        client = Client(id=secrets.token_hex(16), kind=kind, pid=pid, since=now, renewed_at=now, software=software)
        self.clients[client.id] = client
        return client

    def find(self, client_id: str) -> Client | None:
        """Return the client and renew its lease."""
        client = self.clients.get(client_id)
        if client is not None:
            client.renewed_at = time.monotonic()
        return client

    def session(self, client: Client, request_id: str) -> Session:
        """Return the request's session, opening it if there is none."""
        session = client.sessions.get(request_id)
        if session is None:
            session = client.sessions[request_id] = Session([], {}, time.monotonic())
        session.last_used_at = time.monotonic()
        return session

    def free_lookup(self, client: Client, request_id: str, start: int, end: int) -> list[int]:
        """Take the pins of chunks [start, end) out of the request's lookups; return their slots."""
        session = client.sessions.get(request_id)
        if session is None:
            return []
        freed: list[int] = []
        for lookup in session.lookups:
            first, last = start * lookup.per_chunk, end * lookup.per_chunk
            freed += [slot for slot in lookup.slots[first:last] if slot is not None]
            lookup.slots[first:last] = [None] * len(lookup.slots[first:last])
        session.lookups = [lookup for lookup in session.lookups if not lookup.is_empty]
        self._drop_if_empty(client, request_id, session)
        return freed

    def forget_lookup(self, client: Client, request_id: str, pins: LookupPins) -> list[int]:
        """Take one lookup, just made, out of the request; return its slots."""
        session = client.sessions[request_id]
        session.lookups = [lookup for lookup in session.lookups if lookup is not pins]
        self._drop_if_empty(client, request_id, session)
        return [slot for slot in pins.slots if slot is not None]

    def free_retrieved(self, client: Client, request_id: str, slots: Iterable[int]) -> list[int]:
        """Take one retrieve pin of each slot out of the request; return those that were held."""
        session = client.sessions.get(request_id)
        if session is None:
            return []
        freed: list[int] = []
        for slot in slots:
            count = session.retrieved.get(slot, 0)
            if count:
                freed.append(slot)
                if count == 1:
                    del session.retrieved[slot]
                else:
                    session.retrieved[slot] = count - 1
        self._drop_if_empty(client, request_id, session)
        return freed

    def end_session(self, client: Client, request_id: str) -> list[int]:
        """Take the whole request out; return a slot for each pin."""
        session = client.sessions.pop(request_id, None)
        return [] if session is None else session.slots()

    def remove(self, client: Client) -> list[int]:
        """Take a client out; return a slot for each of its pins. Its reservations are the caller's to free."""
        del self.clients[client.id]
        if client.presence is not None:
            client.presence.close()
            client.presence = None
        return [slot for session in client.sessions.values() for slot in session.slots()]

    def dead_clients(self) -> list[Client]:
        """Return the clients whose process is gone, or whose lease ran out."""
        silent_since = time.monotonic() - self.lease_seconds
        return [
            client
            for client in self.clients.values()
            if (client.renewed_at < silent_since if client.presence is None else not client.presence.is_alive)
        ]

    def expired_sessions(self) -> list[tuple[Client, str, float]]:
        """Return the requests that hold pins longer than they may, and for how many seconds without a word."""
        now = time.monotonic()
        return [
            (client, request_id, now - session.last_used_at)
            for client in self.clients.values()
            for request_id, session in client.sessions.items()
            if now - session.last_used_at > self.pin_timeout_seconds
        ]

    @property
    def num_sessions(self) -> int:
        """Requests that hold pins."""
        return sum(len(client.sessions) for client in self.clients.values())

    def close(self) -> None:
        """Let go of what is open; the server ends."""
        for client in list(self.clients.values()):
            self.remove(client)

    def _drop_if_empty(self, client: Client, request_id: str, session: Session) -> None:
        if session.is_empty:
            client.sessions.pop(request_id, None)
