"""The server's status as the command line reads it: fetched over either transport, then typed.

Comes in: an address. Goes out: the server's own document, and a `View` of what commands use of it. A
field that an older server lacks has its default; one of another type makes it no lmcache server.
"""

from __future__ import annotations

import math
from typing import Annotated, Any

import msgspec

from lmcache.cli.base import Url, send_request
from lmcache.keys import Namespace
from lmcache.layout import KVLayout
from lmcache.protocol import PinReport, Status

# Why the server removes chunks by itself; the other reasons are requests.
EVICTED_BY_POLICY = ("demand", "watermark")


class ProtocolRange(msgspec.Struct):
    """The protocol versions that the server answers."""

    min: int = 0
    max: int = 0


class L1View(msgspec.Struct):
    """The pool."""

    capacity_bytes: int
    used_bytes: int
    resident_bytes: int = 0
    reserved_bytes: int = 0
    chunks: int = 0
    pins: int = 0
    eviction_policy: str = ""
    pool_path: str = ""
    persistent: bool = False

    @property
    def free_bytes(self) -> int:
        """What can be stored before anything is evicted."""
        return max(0, self.capacity_bytes - self.used_bytes)


class ClientView(msgspec.Struct):
    """One client that the server knows."""

    id: str
    kind: str = ""
    pid: int = 0
    software: str = ""
    mapped: bool = False
    age_seconds: float = 0.0
    pins: int = 0
    reservations: int = 0
    gpu_pins: PinReport | None = None


class ModelView(msgspec.Struct):
    """One model that engines registered."""

    namespace: Namespace
    namespace_id: int = 0
    bytes_per_token: int = 0
    layout: KVLayout | None = None
    transfer_backends: list[str] = []
    world_size: int = 1
    ranks: list[int] = []
    l1_tokens: int = 0
    live: bool = False


class Counters(msgspec.Struct):
    """What `describe --watch` makes rates of, and what made room."""

    stored_bytes: int = 0
    retrieved_bytes: int = 0
    evicted_chunks: dict[str, int] = {}

    @property
    def num_evicted(self) -> int:
        """Chunks that the policy has evicted; others were asked for."""
        return sum(self.evicted_chunks.get(reason, 0) for reason in EVICTED_BY_POLICY)


class Setting(msgspec.Struct):
    """One value of the configuration: source is default, environment or flag."""

    value: Any = None
    source: str = ""


class SupportedView(msgspec.Struct):
    """What engines can be cached."""

    kv_groups: list[str] = []
    devices: list[str] = []


class View(msgspec.Struct):
    """What commands read of the status."""

    healthy: bool
    l1: L1View
    problems: list[str] = []
    version: str = ""
    protocol: ProtocolRange = msgspec.field(default_factory=ProtocolRange)
    boot: str = ""
    pid: int = 0
    uptime_seconds: float = 0.0
    engine_type: str = ""
    supported: SupportedView = msgspec.field(default_factory=SupportedView)
    chunk_size: int = 0
    zmq_endpoint: str = ""
    http_endpoint: str = ""
    l2: list[dict[str, Any]] = []
    hit_rate: Annotated[float, msgspec.Meta(ge=0, le=1)] | None = None
    sessions: int = 0
    clients: list[ClientView] = []
    models: list[ModelView] = []
    counters: Counters = msgspec.field(default_factory=Counters)
    config: dict[str, Setting] = {}

    @property
    def watermark_ratio(self) -> float:
        """The share of L1 in use above which the server evicts."""
        value = self.config["eviction_watermark"].value if "eviction_watermark" in self.config else 1.0
        return value if isinstance(value, float) else 1.0


def fetch_status(url: Url, timeout: float) -> tuple[dict[str, Any], View]:
    """Return the server's document and the view of it.

    Raises: UnreachableError, RemoteError, LMCacheError.
    """
    if url.is_http:
        from lmcache.cli.http import http_request

        document = http_request(url, "GET", "/api/status", timeout=timeout)
    else:
        document = send_request(url, Status(), timeout=timeout).reply.status
    try:
        _check_finite(document)
        return document, msgspec.convert(document, View)
    except ValueError as exc:  # msgspec's is one
        from lmcache.cli.http import wrong_peer

        raise wrong_peer(url, f"its status is not one that this version reads: {exc}") from exc


def _check_finite(found: Any) -> None:
    """Raises: ValueError for a number that JSON has not, and no figure can be made of."""
    if isinstance(found, float) and not math.isfinite(found):
        raise ValueError(f"it has a number that is {found}")
    for part in found.values() if isinstance(found, dict) else found if isinstance(found, list) else ():
        _check_finite(part)
