"""Builds the server from its settings, runs it in the foreground and takes it down. All state is made here and passed in."""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import functools
import logging
import os
import queue
import resource
import secrets
import signal
import socket
import stat
import sys
import time
from collections.abc import Iterable
from concurrent import futures
from pathlib import Path
from typing import Any

from lmcache import __version__
from lmcache.errors import LMCacheError, PoolError, PoolSizeError, UsageError
from lmcache.log import configure_logging, init_logger
from lmcache.metrics import Metrics
from lmcache.pool import KEPT_SECONDS, NAME_PREFIX, PoolFile, remove_stale_pools
from lmcache.protocol import Status
from lmcache.server import http_frontend
from lmcache.server.args import ServerConfig, add_arguments, config_from_args
from lmcache.server.http_frontend import HttpFrontend
from lmcache.server.log_writer import LogWriter
from lmcache.server.service import CacheService, Endpoints
from lmcache.server.sessions import Sessions
from lmcache.server.watchdog import LOOK_SECONDS, Watchdog
from lmcache.server.zmq_frontend import OWNER_DEADLINE_SECONDS, ZmqFrontend
from lmcache.storage import sizing
from lmcache.storage.l2.spec import make_adapter
from lmcache.storage.l2.tier import TierConfig
from lmcache.storage.manager import RemovalReason, StorageManager
from lmcache.storage.tiers import NamedAdapter, Tiers

logger = init_logger(__name__)

# What malloc may keep for the next inline messages.
KEPT_BYTES = 128 << 20
# For so long a server waits for engines to let go of the last one's pool, and so much more for each GiB of it.
ROOM_SECONDS = 10.0
ROOM_SECONDS_PER_GIB = 2.0
ROOM_POLL_SECONDS = 0.5
ROOM_LOG_SECONDS = 10.0


class RunningServer:
    """A server whose threads run: `endpoints` says where. `stop` ends everything and removes what must not stay."""

    def __init__(
        self,
        endpoints: Endpoints,
        service: CacheService,
        owner: ZmqFrontend,
        frontends: Iterable[HttpFrontend],
        drain_seconds: float,
    ) -> None:
        self.endpoints = endpoints
        self.service = service
        self._owner = owner
        self._frontends = frontends
        self._drain_seconds = drain_seconds
        self._is_stopped = False

    @property
    def is_alive(self) -> bool:
        """Whether the owner thread runs."""
        return self._owner.is_alive

    @property
    def num_steps(self) -> int:
        """A count that goes up as long as the owner thread goes on."""
        return self._owner.num_steps

    def stop(self) -> None:
        """Stop listening, end the threads, close the pool. Doing it again does nothing."""
        if self._is_stopped:
            return
        self._is_stopped = True
        for frontend in self._frontends:
            frontend.stop()
        self._owner.stop_loop()
        if self.service.tiers is not None:
            self.service.tiers.close(self._drain_seconds)
        self._owner.stop()
        self.service.sessions.close()
        self.service.storage.close()


class StopRequest:
    """Set by a signal's handler. It may interrupt the thread that waits for it, which with an Event would wait for itself."""

    def __init__(self) -> None:
        self.is_set = False
        self._asked: queue.SimpleQueue[None] = queue.SimpleQueue()  # its `put` may interrupt its `get`

    def set(self) -> None:
        """Ask for it."""
        self.is_set = True
        self._asked.put(None)

    def wait(self, seconds: float) -> bool:
        """Wait until it is asked for, at most so long; tell whether it was."""
        with contextlib.suppress(queue.Empty):
            if not self.is_set:
                self._asked.get(timeout=seconds)
        return self.is_set


def wait_for_room(config: ServerConfig, stop: StopRequest) -> None:
    """Return when engines have let go of the last server's pool, if that is what stands in the way of this one's.

    They notice that a server has gone within 3 s, and take 1 s a GiB to unpin and unmap its pool while they compute.
    """
    directory = Path(config.storage.pool_dir)
    remove_stale_pools(directory)
    began_at, told_at = time.monotonic(), float("-inf")
    while 0 < _lacking_bytes(config) <= (held := sizing.held_bytes(directory)):
        if time.monotonic() - began_at > ROOM_SECONDS + ROOM_SECONDS_PER_GIB * held / sizing.GIB:
            return  # they are somebody else's
        if time.monotonic() - told_at >= ROOM_LOG_SECONDS:
            told_at = time.monotonic()
            logger.warning(
                "waiting for room: removed files of %.2f GiB in %s are still mapped; engines will let go of an earlier pool",
                held / sizing.GIB,
                directory,
            )
        if stop.wait(ROOM_POLL_SECONDS):
            return


def _lacking_bytes(config: ServerConfig) -> int:
    """Return how much more must be free for the pool that is to be made; 0 where none is, or its size is not given."""
    if not config.capacity_bytes or (config.storage.pool_name and _pool_path(config).exists()):
        return 0
    num_slots = config.storage.max_chunks or sizing.default_slots(config.capacity_bytes)
    directory, overcommits = Path(config.storage.pool_dir), config.storage.allow_overcommit
    return sizing.lacking_bytes(config.capacity_bytes, num_slots, directory, overcommits)


def start_server(config: ServerConfig) -> RunningServer:
    """Start everything and return; the server answers when this returns.

    Raises: UsageError (a port in use, a size that does not fit, a pool in use): nothing is left behind.
    """
    remove_stale_pools(Path(config.storage.pool_dir))
    with contextlib.ExitStack() as undo:
        owner = ZmqFrontend(config.server.host, config.server.port)
        undo.callback(owner.stop)
        listener: socket.socket | None = None
        if not config.http.no_http:
            listener = http_frontend.bind(config.http.http_host, config.http.http_port, "http")
            undo.callback(listener.close)
        metrics_listener: socket.socket | None = None
        if config.prometheus.metrics_port:
            metrics_listener = http_frontend.bind(config.prometheus.metrics_host, config.prometheus.metrics_port, "metrics")
            undo.callback(metrics_listener.close)
        adapters = _make_adapters(config)
        for named in adapters:
            undo.callback(named.adapter.close)
        metrics = Metrics([named.name for named in adapters])
        pool = _open_pool(config)
        undo.callback(_give_up, pool)
        server = _run_on(config, pool, owner, listener, metrics_listener, metrics, adapters)
        undo.pop_all()
    return server


def _make_adapters(config: ServerConfig) -> list[NamedAdapter]:
    """Return the tiers' adapters, named after their kinds: fs, redis, fs-2."""
    adapters: list[NamedAdapter] = []
    for spec in config.storage.l2_adapter:
        number = 1 + sum(named.name.partition("-")[0] == spec.name for named in adapters)
        name = spec.name if number == 1 else f"{spec.name}-{number}"
        adapters.append(NamedAdapter(name, spec.redacted, make_adapter(spec)))
    return adapters


def _make_tiers(
    config: ServerConfig, adapters: list[NamedAdapter], storage: StorageManager, metrics: Metrics, owner: ZmqFrontend
) -> Tiers | None:
    if not adapters:
        return None
    settings = config.storage
    tier_config = TierConfig(
        chunk_size=config.server.chunk_size,
        lookup_timeout_seconds=settings.l2_lookup_timeout_seconds,
        min_tokens_per_second=settings.l2_min_tokens_per_second,
        inflight_ratio=settings.l2_inflight_ratio,
        write_on_evict=settings.l2_policy == "write-on-evict",
        read_threads=settings.l2_read_threads,
        write_threads=settings.l2_write_threads,
    )
    return Tiers(adapters, storage, tier_config, metrics, owner.wake)


def _give_up(pool: PoolFile) -> None:
    """Close the pool of a server that could not start; only what an earlier one left under this name stays."""
    pool.close()
    if not pool.adopted:
        pool.path.unlink(missing_ok=True)


def _run_on(
    config: ServerConfig,
    pool: PoolFile,
    owner: ZmqFrontend,
    listener: socket.socket | None,
    metrics_listener: socket.socket | None,
    metrics: Metrics,
    adapters: list[NamedAdapter],
) -> RunningServer:
    try:
        storage = StorageManager(
            pool,
            policy_name=config.storage.eviction_policy,
            high_watermark_ratio=config.storage.eviction_watermark,
            eviction_ratio=config.storage.eviction_ratio,
            on_removed=functools.partial(_count_removed, metrics),
        )
    except OSError as exc:
        raise PoolSizeError(f"cannot allocate the pool {pool.path}: {exc.strerror}", "use a smaller --l1-size-gb") from exc
    endpoints = Endpoints(owner.endpoint, http_frontend.endpoint_of(listener) if listener is not None else "")
    service = CacheService(
        storage=storage,
        sessions=Sessions(config.server.client_lease_seconds, config.server.pin_timeout_seconds),
        metrics=metrics,
        tiers=_make_tiers(config, adapters, storage, metrics, owner),
        chunk_size=config.server.chunk_size,
        engine_type=config.server.engine_type,
        endpoints=endpoints,
        config=config.describe(),
        status_interval_seconds=config.telemetry.status_interval_seconds,
    )
    owner.start(service)
    frontends = _make_frontends(config, owner, metrics, listener, metrics_listener)
    for frontend in frontends:
        frontend.start()
    _log_start(endpoints, _metrics_url(config, endpoints, metrics_listener), pool, storage)
    for named in adapters:
        logger.info("L2 %s: %s, %s", named.name, named.shown, config.storage.l2_policy)
    return RunningServer(endpoints, service, owner, frontends, config.storage.l2_drain_seconds)


def _count_removed(metrics: Metrics, reason: RemovalReason, num_chunks: int, num_bytes: int) -> None:
    metrics.count("lmcache_evicted_chunks", reason.value, by=num_chunks)
    metrics.count("lmcache_evicted_bytes", reason.value, by=num_bytes)


class _FreshRegistry:
    """All metrics, after the owner thread has brought them up to date; where it does not answer, the server is not healthy.

    As much of prometheus_client's `CollectorRegistry` as its HTTP server uses, on threads of its own.
    """

    def __init__(self, metrics: Metrics, owner: ZmqFrontend) -> None:
        self._metrics = metrics
        self._owner = owner

    def collect(self) -> Any:
        """Return every metric."""
        self._bring_up_to_date()
        return self._metrics.registry.collect()

    def restricted_registry(self, names: Iterable[str]) -> Any:
        """Return those of these names."""
        self._bring_up_to_date()
        return self._metrics.registry.restricted_registry(names)

    def _bring_up_to_date(self) -> None:
        try:
            self._owner.call(Status()).result(OWNER_DEADLINE_SECONDS)
        except (futures.TimeoutError, futures.CancelledError, LMCacheError):
            self._metrics.set("lmcache_healthy", 0)


def _make_frontends(
    config: ServerConfig,
    owner: ZmqFrontend,
    metrics: Metrics,
    listener: socket.socket | None,
    metrics_listener: socket.socket | None,
) -> list[HttpFrontend]:
    frontends = []

    def make_routes(listener: socket.socket) -> Any:
        from lmcache.server.http_routes import make_app

        may_change = bool(config.http_token) or http_frontend.is_loopback(listener)
        return make_app(owner, None if config.prometheus.no_metrics else metrics, config.http_token, may_change)

    def make_metrics() -> Any:
        from prometheus_client import make_asgi_app

        registry: Any = _FreshRegistry(metrics, owner)
        return make_asgi_app(registry)

    if listener is not None:
        frontends.append(HttpFrontend(listener, functools.partial(make_routes, listener), "lmcache-http"))
    if metrics_listener is not None:
        frontends.append(HttpFrontend(metrics_listener, make_metrics, "lmcache-metrics"))
    return frontends


def _pool_path(config: ServerConfig) -> Path:
    """A named pool always has the same path; others get one of their own, so that two servers fit on one host."""
    name = config.storage.pool_name or f"tmp-{secrets.token_hex(6)}"
    return Path(config.storage.pool_dir) / f"{NAME_PREFIX}{name}"


def _open_pool(config: ServerConfig) -> PoolFile:
    path = _pool_path(config)
    pool = _adopt_pool(config, path) if config.storage.pool_name and path.exists() else None
    return pool or _create_pool(config, path)


def _adopt_pool(config: ServerConfig, path: Path) -> PoolFile | None:
    """Return the pool that an earlier server left; None when it was of no use and is removed."""
    try:
        pool = PoolFile.adopt(path)
        time.sleep(KEPT_SECONDS)  # no slot could rest in its place: a damaged one does not say where its chunk is
    except PoolError as exc:
        if exc.code in ("pool_in_use", "pool_unavailable"):
            raise UsageError(exc.message, exc.hint, exc.code) from exc
        logger.warning("starting with an empty pool: %s", exc)
        _remove(path)
        return None
    if config.capacity_bytes and pool.header.capacity_bytes != config.capacity_bytes:
        logger.warning(
            "%s keeps its %.2f GiB; hint: stop the server and remove the file to change its size",
            path,
            pool.header.capacity_bytes / sizing.GIB,
        )
    if config.storage.max_chunks and pool.header.num_slots != config.storage.max_chunks:
        logger.warning(
            "%s keeps its %d slots; hint: stop the server and remove the file to change that", path, pool.header.num_slots
        )
    try:
        if stat.S_IMODE(os.fstat(pool.fileno()).st_mode) != config.storage.pool_mode:
            os.fchmod(pool.fileno(), config.storage.pool_mode)
    except OSError as exc:
        logger.warning("%s keeps its mode: %s; hint: its owner may change it", path, exc.strerror)
    return pool


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as exc:
        raise UsageError(f"cannot remove {path}: {exc.strerror}", "choose another --pool-name", "pool_unavailable") from exc


def _create_pool(config: ServerConfig, path: Path) -> PoolFile:
    capacity_bytes = config.capacity_bytes or sizing.default_capacity_bytes(path.parent)
    num_slots = config.storage.max_chunks or sizing.default_slots(capacity_bytes)
    held = 0 if config.capacity_bytes else sizing.held_bytes(path.parent)
    if held > capacity_bytes:
        logger.warning(
            "L1 gets %.2f GiB of what is free, while removed files that are still mapped take %.2f; hint: set --l1-size-gb",
            capacity_bytes / sizing.GIB,
            held / sizing.GIB,
        )
    sizing.check_size(capacity_bytes, num_slots, path.parent, config.storage.allow_overcommit)
    try:
        return PoolFile.create(
            path,
            capacity_bytes=capacity_bytes,
            num_slots=num_slots,
            persistent=bool(config.storage.pool_name),
            mode=config.storage.pool_mode,
        )
    except PoolError as exc:
        raise UsageError(exc.message, exc.hint, exc.code) from exc


def _metrics_url(config: ServerConfig, endpoints: Endpoints, metrics_listener: socket.socket | None) -> str:
    """Return where to scrape: the port for metrics alone, or else the HTTP port's route; "off" where there is neither."""
    if metrics_listener is not None:
        return f"{http_frontend.endpoint_of(metrics_listener)}/metrics"
    return f"{endpoints.http}/metrics" if endpoints.http and not config.prometheus.no_metrics else "off"


def _log_start(endpoints: Endpoints, metrics_url: str, pool: PoolFile, storage: StorageManager) -> None:
    l1 = storage.l1
    if pool.adopted:
        logger.info(
            "adopted %s: %d chunks served again, %d reservations dropped",
            pool.path,
            l1.adopted_chunks,
            l1.dropped_reservations,
        )
    logger.info(
        "lmcache %s is ready: ZMQ %s, HTTP %s, metrics %s, L1 %.2f GiB in %s",
        __version__,
        endpoints.zmq,
        endpoints.http or "off",
        metrics_url,
        pool.header.capacity_bytes / sizing.GIB,
        pool.path,
    )


def _keep_freed_memory() -> None:
    """Let malloc reuse the buffers of large messages: new pages for each cost an inline store half its speed.

    glibc's M_TRIM_THRESHOLD (-1) and M_MMAP_THRESHOLD (-3), the latter at its maximum. Elsewhere nothing happens.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(-1, KEPT_BYTES)
        mallopt(-3, 32 << 20)


def _allow_many_descriptors() -> None:
    """Take all that the hard limit allows: each connection costs one, and the soft limit is 1024 as a rule."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def run(args: argparse.Namespace) -> int:
    """Run a server in the foreground until SIGINT, SIGTERM or SIGHUP; return the exit code.

    A stop that was asked for is a success: 0. 1 when the owner thread ended by itself. One that is stuck for longer than it may
    ends the process at once, with status 1: what is left is what a killed server leaves.
    """
    stop = StopRequest()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:  # as `nohup` has left it
            signal.signal(number, lambda *_: stop.set())
    config = config_from_args(args)
    with contextlib.closing(LogWriter(sys.stderr.fileno())) as log:
        configure_logging(config.telemetry.log_level, config.telemetry.log_format == "json", log)
        return _serve(config, stop)


def _serve(config: ServerConfig, stop: StopRequest) -> int:
    _keep_freed_memory()
    _allow_many_descriptors()
    wait_for_room(config, stop)
    if stop.is_set:
        return 0
    server = start_server(config)
    watchdog = Watchdog(lambda: server.num_steps, config.server.exit_when_stuck_seconds)
    try:
        while not stop.wait(LOOK_SECONDS):
            if not server.is_alive:
                logger.error("the owner thread ended; this is a bug")
                return 1
            if watchdog.is_time_to_exit():
                logging.shutdown()  # what was logged is still to be written
                os._exit(1)  # a stop would wait for the thread, and takes from it what it may be using
    finally:
        server.stop()
    logger.info("stopped")
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run without the command line's front door: `python -m lmcache.server.app`."""
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115 - as after `2>&-`; lives as long as the process
    parser = argparse.ArgumentParser(prog="python -m lmcache.server.app", allow_abbrev=False)
    add_arguments(parser)
    try:
        return run(parser.parse_args(argv))
    except UsageError as exc:
        print(f"error: {exc.message}\nhint: {exc.hint}", file=sys.stderr)
        return exc.exit_code


if __name__ == "__main__":
    sys.exit(main())
