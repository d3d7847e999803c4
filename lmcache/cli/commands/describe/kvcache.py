"""`lmcache describe kvcache`: the cache server's identity, memory, clients and models on one page."""

from __future__ import annotations

import time
from argparse import Namespace

from lmcache import __version__
from lmcache.cli.commands.describe.watch import Sample

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from lmcache.cli.base import CommandParser, Url
    from lmcache.cli.output import Result
    from lmcache.cli.status import ClientView, L1View, ModelView, View
    from lmcache.layout import KVLayout
    from lmcache.protocol import PinReport


def add_options(parser: CommandParser) -> None:
    """Add the options of `describe kvcache`."""
    from lmcache.cli.commands.describe.watch import add_watch_option

    add_watch_option(parser)
    parser.add_argument("--config", action="store_true", help="show each setting and where its value comes from")


def describe_kvcache(args: Namespace) -> int:
    """Ask for the status and report it, once or until interrupted."""
    from lmcache.cli.base import kvcache_url
    from lmcache.cli.commands.describe.watch import describe
    from lmcache.cli.output import report
    from lmcache.cli.status import fetch_status

    url = kvcache_url(args)
    if args.config and args.watch is None:
        return report(config_result(fetch_status(url, args.timeout)[1]), args)
    return describe(lambda: ServerSample(url, *fetch_status(url, args.timeout)), args)


class ServerSample(Sample):
    """The server's status at one moment."""

    def __init__(self, url: Url, document: dict[str, Any], view: View) -> None:
        self.url = url
        self.document = document
        self.view = view

    def result(self) -> Result:
        return status_result(self.url, self.document, self.view)

    def line(self, before: Sample | None) -> str:
        return sample_line(self.view, before.view if isinstance(before, ServerSample) else None)


# -- one page --------------------------------------------------------------------------------------


def status_result(url: Url, document: dict[str, Any], view: View) -> Result:
    """Return the page; its JSON is the server's own document."""
    from lmcache.cli.output import Result

    result = Result("LMCache KV Cache Service", width=50, value_end=45)
    for key, value in document.items():
        if key != "schema_version":  # the report's own comes first
            result.put(key, value)
    result.put("url", url.text)
    _add_service(result, view)
    _add_process(result, view)
    _add_tiers(result, view.l2)
    for model in view.models:
        _add_model(result, model)
    _add_clients(result, view.clients)
    if not view.healthy:
        reasons = "; ".join(view.problems) or "no reason given"
        result.fail(f"the server is not healthy: {reasons}", code="unhealthy")
    return result


def _add_service(result: Result, view: View) -> None:
    from lmcache.cli.output import format_duration

    result.row("Health", "OK" if view.healthy else "FAIL")
    for problem in view.problems:
        result.row("Problem", problem, indent=2)
    result.row("ZMQ endpoint", view.zmq_endpoint)
    result.row("HTTP endpoint", view.http_endpoint or "off")
    result.row("Engine type", view.engine_type)
    result.row("Chunk size", view.chunk_size)
    result.row("L1 capacity (GB)", gib(view.l1.capacity_bytes))
    result.row("L1 used (GB)", amount(view.l1.used_bytes, view.l1.capacity_bytes))
    result.row("Eviction policy", view.l1.eviction_policy)
    result.row("Cached objects", view.l1.chunks)
    result.row("Uptime", format_duration(view.uptime_seconds))


def _add_process(result: Result, view: View) -> None:
    result.section("Process")
    result.row("Version", view.version)
    result.row("Command's version", __version__, key="command_version")
    result.row("Protocol", f"{view.protocol.min} to {view.protocol.max}")
    if view.supported.kv_groups:
        result.row("KV groups supported", ", ".join(view.supported.kv_groups))
        result.row("KV devices supported", ", ".join(view.supported.devices))
    result.row("Process id", view.pid)
    result.row("Hit rate", hit_rate(view))
    result.row("Pins", view.l1.pins)
    result.row("Sessions", view.sessions)
    _add_pool(result, view.l1)


def _add_pool(result: Result, l1: L1View) -> None:
    result.row("Pool", l1.pool_path)
    result.row("Pool resident (GB)", amount(l1.resident_bytes, l1.capacity_bytes))
    result.row("Pool outlives the server", "yes" if l1.persistent else "no")


def _add_tiers(result: Result, tiers: list[dict[str, Any]]) -> None:
    if not tiers:
        result.row("L2", "none")
    for tier in tiers:
        result.section(f"L2 {tier.get('name') or tier.get('type') or 'tier'}")
        for key, value in tier.items():
            if key not in ("name", "type"):
                result.row(*labelled(key, value))


def _add_model(result: Result, model: ModelView) -> None:
    from lmcache.layout import shown_sessions

    result.section("Model")
    result.row("Name", model.namespace.model)
    result.row("Ranks registered", f"{len(model.ranks)}/{model.world_size}")
    result.row("Engine", "connected" if model.live else "gone")
    if model.layout is not None:
        _add_layout(result, model.layout)
    if model.transfer_backends:
        result.row("Transfer backend", "; ".join(model.transfer_backends))
    result.row("KB per token", f"{model.bytes_per_token / 1024:.1f}")
    result.row("Tokens that L1 holds", model.l1_tokens)
    result.row("Enough for", shown_sessions(model.l1_tokens))


def _add_layout(result: Result, layout: KVLayout) -> None:
    """What lies in one run of bytes in the engine's memory: the less that is, the more there is to gather."""
    from lmcache.cli.output import format_bytes

    num_layers = layout.num_layers * layout.layers_per_block
    if layout.layers_per_block > 1:
        how = "together in each block"
    elif layout.num_planes > 1:
        how = f"apart, in {layout.num_planes} planes each"
    else:
        how = "apart"
    result.row("KV layout", f"{num_layers} layers {how}" if num_layers > 1 else "1 layer")
    result.row("Page size", f"{format_bytes(layout.block_bytes)} ({layout.block_size} tokens, {layout.dtype})")


def _add_clients(result: Result, clients: list[ClientView]) -> None:
    from lmcache.cli.output import format_duration

    result.section("Clients")
    if not clients:
        result.line("none")
    for client in clients:
        path = "shared memory" if client.mapped else "socket"
        held = f"{client.pins} pins, {client.reservations} reservations"
        since = format_duration(client.age_seconds)
        result.row(f"{client.kind} {client.pid}", f"{path}, {held}, {since}")
        if client.software:
            result.row("Software", client.software, indent=2)
        if client.gpu_pins is not None:
            _add_pins(result, client.gpu_pins)


def _add_pins(result: Result, pins: PinReport) -> None:
    """How much of the pool a GPU reaches at the speed of the wire."""
    if pins.pool_bytes:
        is_going_on = pins.pinned_bytes + pins.unpinned_bytes < pins.pool_bytes
        pinned = amount(pins.pinned_bytes, pins.pool_bytes)
        result.row("Pool pinned (GB)", pinned + (", going on" if is_going_on else ""), indent=2)
    if pins.unpinned_bytes:
        result.row("Pool not pinnable (GB)", amount(pins.unpinned_bytes, pins.pool_bytes), indent=2)
    if pins.unpinned_copied_bytes:
        result.row("Copied unpinned (GB)", gib(pins.unpinned_copied_bytes), indent=2)


def gib(num_bytes: float) -> str:
    """Return bytes in the unit of `--l1-size-gb`; small pools keep more digits."""
    return f"{num_bytes / (1 << 30):.{1 if num_bytes >= 1 << 30 or not num_bytes else 3}f}"


def amount(part: float, whole: float) -> str:
    """Return `42.3 (70.5%)`."""
    from lmcache.cli.output import format_ratio

    return f"{gib(part)} ({format_ratio(part / whole if whole else 0.0)})"


def hit_rate(view: View) -> str:
    """Return the share of looked-up chunks that were there."""
    from lmcache.cli.output import format_ratio

    return "n/a (no lookup yet)" if view.hit_rate is None else format_ratio(view.hit_rate)


def labelled(key: str, value: Any) -> tuple[str, str]:
    """Return a label and a text for an entry of a map whose keys end in their unit."""
    from lmcache.cli.output import format_bytes, format_ratio

    label = key.replace("_", " ").capitalize()
    if key.endswith("_bytes_per_second"):
        shown = f"{value / 1e9:.2f}" if value else "n/a (nothing yet)"
        return f"{label.removesuffix(' bytes per second')} (GB/s)", shown
    if key.endswith("_seconds"):
        return f"{label.removesuffix(' seconds')} (ms)", f"{value * 1000:.2f}" if value else "n/a (nothing yet)"
    if value is None and key.endswith(("_bytes", "_rate", "objects")):
        return label.removesuffix(" bytes"), "n/a (not known)"
    if isinstance(value, bool):
        return label, "yes" if value else "no"
    if isinstance(value, (int, float)) and key.endswith("_bytes"):
        return label.removesuffix(" bytes"), format_bytes(value)
    if isinstance(value, (int, float)) and key.endswith(("_ratio", "_rate")):
        return label.removesuffix(" ratio"), format_ratio(value)
    return label, str(value) if value or value == 0 else "none"


def config_result(view: View) -> Result:
    """Return each setting with its value and where that came from."""
    from lmcache.cli.output import Result

    result = Result("LMCache KV Cache Settings", width=50)
    result.section("", key="config")
    for name, setting in sorted(view.config.items()):
        value = setting.value if setting.value not in (None, "", []) else "none"
        entry = {"value": setting.value, "source": setting.source}
        result.row(name, entry, key=name, text=f"{value} ({setting.source})")
    return result


# -- again and again -------------------------------------------------------------------------------


def sample_line(view: View, before: View | None) -> str:
    """Return one sample on a line; rates are those since `before`, if of the same server life."""
    fields = [
        time.strftime("%H:%M:%S"),
        "OK" if view.healthy else "FAIL",
        f"used {amount(view.l1.used_bytes, view.l1.capacity_bytes)} GB",
        f"objects {view.l1.chunks}",
        f"hit rate {hit_rate(view)}",
        f"pins {view.l1.pins}",
        f"clients {len(view.clients)}",
    ]
    if before is not None and before.boot == view.boot:
        seconds = max(1e-3, view.uptime_seconds - before.uptime_seconds)
        stored = (view.counters.stored_bytes - before.counters.stored_bytes) / seconds
        retrieved = (view.counters.retrieved_bytes - before.counters.retrieved_bytes) / seconds
        fields += [f"stored {stored / 1e9:.2f} GB/s", f"retrieved {retrieved / 1e9:.2f} GB/s"]
    return "  ".join(fields)
