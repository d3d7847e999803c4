"""`lmcache ping`: is it alive, and how long does one round trip take?"""

from __future__ import annotations

import time
from argparse import Namespace

from lmcache.cli.base import duration_seconds, positive_int

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

    from lmcache.cli.base import CommandParser, Url
    from lmcache.cli.http import HttpAnswer, HttpClient
    from lmcache.cli.output import Result

RETRY_SECONDS = 0.2
# The last try may go on for so long beyond --wait: a busy server needs some time, too.
LAST_TRY_SECONDS = 2.0


def register_command(subparsers: Any) -> None:
    description = "Measure one round trip, and say OK or FAIL."
    subparsers.add_parser("ping", help="is it alive?", description=description, populate=add_targets)


def add_targets(parser: CommandParser) -> None:
    """Add what can be pinged."""
    targets = parser.add_subparsers(title="targets", metavar="TARGET", required=True)
    kvcache = targets.add_parser(
        "kvcache",
        help="the cache server",
        description="Ping the cache server: one NOOP over ZMQ, or one GET of its health page.",
        populate=add_ping_options,
    )
    kvcache.set_defaults(func=ping_kvcache)
    engine = targets.add_parser(
        "engine",
        help="an inference engine, such as vLLM",
        description="Ping an inference engine: one GET of /health, or of /api/healthcheck where there is none.",
        populate=add_ping_options,
    )
    engine.set_defaults(func=ping_engine)


def add_ping_options(parser: CommandParser) -> None:
    """Add the options that every target of ping has."""
    parser.add_argument("--count", type=positive_int, default=1, metavar="N", help="ping N times (default: 1)")
    parser.add_argument(
        "--interval",
        type=duration_seconds,
        default=1.0,
        metavar="SECONDS",
        help="pause between two pings (default: 1)",
    )
    parser.add_argument(
        "--wait",
        type=duration_seconds,
        default=0.0,
        metavar="SECONDS",
        help="keep trying for so long until the answer is OK",
    )


class Ping:
    """What pings found: the server's problems at any of them (none: OK) and the time of each round trip."""

    def __init__(self, problems: list[str], seconds: list[float]) -> None:
        self.problems = problems
        self.seconds = seconds

    def add(self, problems: Sequence[str], seconds: float) -> None:
        """Take in one more."""
        self.problems += [problem for problem in problems if problem not in self.problems]
        self.seconds.append(seconds)


def ping_kvcache(args: Namespace) -> int:
    """Ping the cache server and report."""
    from lmcache.cli.base import kvcache_url
    from lmcache.cli.output import report

    url = kvcache_url(args)
    ping = ping_http if url.is_http else ping_zmq
    found = until_ok(lambda timeout: ping(url, timeout, args.count, args.interval), args)
    return report(ping_result("Ping KV Cache", url, found), args)


def ping_engine(args: Namespace) -> int:
    """Ping an inference engine and report."""
    from lmcache.cli.base import engine_url
    from lmcache.cli.output import report

    url = engine_url(args)
    found = until_ok(lambda timeout: ping_health(url, timeout, args.count, args.interval), args)
    return report(ping_result("Ping Engine", url, found), args)


def until_ok(ping: Callable[[float], Ping], args: Namespace) -> Ping:
    """Return what `ping` finds, trying again until it is good or `--wait` has passed.

    A proxy in front of a server that is yet to come may answer anything: only a wrong call or a wrong token end it at once.

    Raises: LMCacheError: that of the last try.
    """
    from lmcache.errors import LMCacheError, UsageError

    give_up_at = time.monotonic() + args.wait

    def left() -> float:
        return float(give_up_at - time.monotonic())

    while True:
        try:
            found = ping(min(args.timeout, max(left(), LAST_TRY_SECONDS)) if args.wait else args.timeout)
            if not found.problems or left() <= RETRY_SECONDS:
                return found
        except LMCacheError as exc:
            if left() <= RETRY_SECONDS or isinstance(exc, UsageError) or exc.code == "unauthorized":
                raise
        time.sleep(RETRY_SECONDS)


def ping_zmq(url: Url, timeout: float, count: int = 1, interval: float = 0.0) -> Ping:
    """Send NOOPs on one connection; one that is not counted opens it.

    Raises: UnreachableError, RemoteError, ProtocolError.
    """
    from lmcache.cli.base import ask, connect
    from lmcache.protocol import Noop

    deadline = time.monotonic() + timeout
    request = Noop()
    ping = Ping([], [])
    with connect(url, timeout) as client:
        ask(client, request, timeout=deadline - time.monotonic())
        for index in range(count):
            if index:
                time.sleep(interval)
                deadline = time.monotonic() + timeout
            answer = ask(client, request, timeout=deadline - time.monotonic())
            ping.add(answer.reply.problems, answer.round_trip_seconds)
    return ping


def ping_http(url: Url, timeout: float, count: int = 1, interval: float = 0.0) -> Ping:
    """Get the cache server's health page; a request that is not counted opens the connection.

    Raises: UnreachableError, LMCacheError.
    """
    from lmcache.cli.http import HttpClient

    path = "/api/healthcheck"
    with HttpClient(url, timeout) as client:
        client.request("GET", "/livez", accept=(200, 503))
        return _ping_again_and_again(
            client, path, count, interval, lambda answer: own_problems(url, client.document(path, answer, accept=(200, 503)))
        )


def ping_health(url: Url, timeout: float, count: int = 1, interval: float = 0.0) -> Ping:
    """Get the engine's health page; the request that finds out where it is opens the connection.

    Raises: UnreachableError, LMCacheError.
    """
    from lmcache.cli.engine import Unknown, find_health, health_problems
    from lmcache.cli.http import ENGINE, HttpClient, wrong_peer

    with HttpClient(url, timeout, ENGINE) as client:
        found = find_health(client)
        if isinstance(found, Unknown):
            raise wrong_peer(url, found.because, ENGINE)
        path, _ = found
        return _ping_again_and_again(client, path, count, interval, lambda answer: health_problems(client, path, answer))


def _ping_again_and_again(
    client: HttpClient, path: str, count: int, interval: float, problems_of: Callable[[HttpAnswer], list[str]]
) -> Ping:
    """Get a page several times; return what any answer complained about, and the round trip of each."""
    ping = Ping([], [])
    for index in range(count):
        if index:
            time.sleep(interval)
        answer = client.send("GET", path)
        ping.add(problems_of(answer), answer.round_trip_seconds)
    return ping


def own_problems(url: Url, health: dict[str, Any]) -> list[str]:
    """Return what a health page complains about.

    Raises: LMCacheError for a page that is not a health page of ours.
    """
    from lmcache.cli.http import wrong_peer

    status, problems = health.get("status"), health.get("problems")
    if status not in ("ok", "fail") or not isinstance(problems, list):
        raise wrong_peer(url, "/api/healthcheck has no 'status' and 'problems'")
    return [str(problem) for problem in problems] or ([] if status == "ok" else ["no reason given"])


def ping_result(title: str, url: Url, ping: Ping) -> Result:
    """Return the report of one ping, or of several with their spread."""
    from lmcache.cli.output import Result

    result = Result(title, width=30, value_start=25)
    result.row("Status", "FAIL" if ping.problems else "OK", key="status")
    for problem in ping.problems:
        result.row("Problem", problem)
    result.put("problems", ping.problems)
    result.put("url", url.text)
    _add_times(result, sorted(seconds * 1000 for seconds in ping.seconds))
    if ping.problems:
        result.fail(f"{url} answers and is not healthy: {'; '.join(ping.problems)}", code="unhealthy")
    return result


def _add_times(result: Result, times: list[float]) -> None:
    """Several pings get their spread; `round_trip_ms` is then the median."""
    from lmcache.cli.output import percentile

    median = percentile(times, 0.5)
    if len(times) == 1:
        _add_time(result, "Round trip time (ms)", "round_trip_ms", median)
        return
    result.put("round_trip_ms", round(median, 4))
    result.row("Pings", len(times), key="count")
    result.section("Round trip time (ms)", key="spread_ms")
    _add_time(result, "Min", "min", times[0])
    _add_time(result, "Median", "median", median)
    _add_time(result, "p99", "p99", percentile(times, 0.99))
    _add_time(result, "Max", "max", times[-1])


def _add_time(result: Result, label: str, key: str, milliseconds: float) -> None:
    digits = 2 if milliseconds < 10 else 1
    result.row(label, round(milliseconds, 4), key=key, text=f"{milliseconds:.{digits}f}")
