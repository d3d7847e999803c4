"""`lmcache describe kvcache` against a real server."""

import json
import re

import msgspec
import pytest

from lmcache import __version__
from lmcache.client.kvcache import KVCacheClient
from lmcache.keys import chunk_keys
from lmcache.layout import shown_sessions
from lmcache.protocol import StatusReply
from tests.cli.conftest import CHUNK_BYTES, LAYOUT, MODEL, Cli, namespace
from tests.cli.peers import http_peer, zmq_peer
from tests.server_process import LmcacheServer, running_lmcache

PROMISED = [
    "Health",
    "ZMQ endpoint",
    "HTTP endpoint",
    "Engine type",
    "Chunk size",
    "L1 capacity (GB)",
    "L1 used (GB)",
    "Eviction policy",
    "Cached objects",
    "Uptime",
]


def fields(text: str) -> dict[str, str]:
    """Label -> value of the box's rows."""
    rows = (line.partition(": ") for line in text.splitlines() if ": " in line)
    return {label.strip(): value.strip() for label, _, value in rows}


def test_the_page_starts_with_the_promised_rows_in_their_order(cli: Cli, server: LmcacheServer):
    done = cli("describe", "kvcache")
    assert (done.returncode, done.stderr) == (0, "")
    assert "= LMCache KV Cache Service =" in done.stdout.splitlines()[0]
    found = fields(done.stdout)
    assert list(found)[: len(PROMISED)] == PROMISED
    assert found["Health"] == "OK"
    assert found["ZMQ endpoint"] == server.zmq_url
    assert found["HTTP endpoint"] == server.http_url
    assert found["L1 capacity (GB)"] == "0.062"
    assert found["Chunk size"] == "256"
    assert found["Process id"] == str(server.pid)
    assert found["KV groups supported"] == "FullAttentionSpec, MLAAttentionSpec"
    assert found["Pool"] == server.pool_path
    assert {"Version", "Protocol", "Hit rate", "Pins", "Sessions", "Pool resident (GB)", "L2"} <= set(found)
    assert len({len(line) for line in done.stdout.splitlines() if line[0] in "=-"}) == 1


def test_json_is_the_servers_own_document_over_either_transport(cli: Cli, server: LmcacheServer):
    document = cli.json("describe", "kvcache")
    own = server.status()
    assert set(own) <= set(document)
    assert document["boot"] == own["boot"]
    assert document["l1"]["capacity_bytes"] == own["l1"]["capacity_bytes"]
    assert document["healthy"] is True


def test_models_clients_and_use_are_shown(cli: Cli, engine: KVCacheClient):
    keys = chunk_keys(namespace(), list(range(512)))
    engine.store(keys, [bytes(CHUNK_BYTES)] * 2)
    found = fields(cli("describe", "kvcache").stdout)
    assert found["Cached objects"] == "2"
    assert found["L1 used (GB)"] == "0.000 (0.2%)"
    assert found["Name"] == MODEL
    assert found["KB per token"] == "0.2"
    assert found["Enough for"] == shown_sessions(int(found["Tokens that L1 holds"]))
    assert found["Engine"] == "connected"
    assert found["Ranks registered"] == "1/1"
    assert any(label.startswith("test-engine ") and "shared memory" in value for label, value in found.items())


def test_the_layout_and_what_moves_it_are_shown_in_words(cli: Cli, server: LmcacheServer):
    together = msgspec.structs.replace(
        LAYOUT, num_layers=1, num_planes=1, block_bytes=2 << 20, order="together", layers_per_block=32
    )
    with KVCacheClient(server.zmq_url) as apart, KVCacheClient(server.zmq_url) as joined:
        apart.register(namespace(), LAYOUT, backend="cpu")
        assert page_of(cli, MODEL) == {
            "KV layout": "4 layers apart, in 2 planes each",
            "Page size": "512 bytes (16 tokens, bfloat16)",
            "Transfer backend": "cpu",
        }
        joined.register(
            msgspec.structs.replace(namespace("joined"), layout=together.fingerprint), together, backend="cuda, Triton"
        )
        assert page_of(cli, "joined") == {
            "KV layout": "32 layers together in each block",
            "Page size": "2.0 MiB (16 tokens, bfloat16)",
            "Transfer backend": "cuda, Triton",
        }
        (model,) = [m for m in cli.json("describe", "kvcache")["models"] if m["namespace"]["model"] == "joined"]
        assert model["layout"]["layers_per_block"] == 32
        assert model["transfer_backends"] == ["cuda, Triton"]


def page_of(cli: Cli, model: str) -> dict[str, str]:
    """The rows about the layout in a model's section."""
    text = cli("describe", "kvcache").stdout.partition(f" {model}\n")[2]
    found = fields(text.partition("Tokens that L1 holds")[0])
    return {label: found[label] for label in ("KV layout", "Page size", "Transfer backend")}


def test_how_much_of_the_pool_each_gpu_has_pinned_is_shown():
    pins = {"pool_bytes": 20 << 30, "pinned_bytes": 15 << 30, "unpinned_bytes": 0, "unpinned_copied_bytes": 0}
    halfway = {"id": "1", "kind": "engine-worker", "pid": 7, "gpu_pins": pins}
    failed = {**halfway, "pid": 8, "gpu_pins": {**pins, "unpinned_bytes": 5 << 30, "unpinned_copied_bytes": 3 << 30}}
    on_a_cpu = {**halfway, "pid": 9, "gpu_pins": None}
    for client, told in (
        (halfway, {"Pool pinned (GB)": "15.0 (75.0%), going on"}),
        (failed, {"Pool pinned (GB)": "15.0 (75.0%)", "Pool not pinnable (GB)": "5.0 (25.0%)", "Copied unpinned (GB)": "3.0"}),
        (on_a_cpu, {}),
    ):
        status = {"healthy": True, "l1": {"capacity_bytes": 20 << 30, "used_bytes": 0}, "clients": [client]}
        with http_peer(200, json.dumps(status).encode()) as port:
            found = fields(Cli(f"http://localhost:{port}")("describe", "kvcache").stdout)
        assert {label: value for label, value in found.items() if "inn" in label} == told


@pytest.mark.parametrize("gpu", [[], ["CUDA 12.8", "driver for CUDA 13.0"]])
def test_the_software_of_each_engine_rank_is_shown(cli: Cli, server: LmcacheServer, gpu: list[str]):
    """VER-2."""
    with KVCacheClient(server.zmq_url, kind="engine-worker", software=["vllm 8", "LMCacheMPConnector", *gpu]) as engine:
        engine.register(namespace(), LAYOUT)
        found = fields(cli("describe", "kvcache").stdout)
    assert found["Software"] == ", ".join([f"lmcache {__version__}", "vllm 8", "LMCacheMPConnector", *gpu])


def test_the_commands_own_version_is_shown_beside_the_servers():
    """VER-2."""
    status = {"healthy": True, "version": "9.8", "l1": {"capacity_bytes": 1, "used_bytes": 0}}
    with http_peer(200, json.dumps(status).encode()) as port:
        cli = Cli(f"http://localhost:{port}")
        found, document = fields(cli("describe", "kvcache").stdout), cli.json("describe", "kvcache")
    assert (found["Version"], found["Command's version"]) == ("9.8", __version__)
    assert (document["version"], document["command_version"]) == ("9.8", __version__)


def test_config_shows_each_value_and_its_source(cli: Cli):
    found = fields(cli("describe", "kvcache", "--config").stdout)
    assert found["l1_size_gb"] == "0.0625 (flag)"
    assert found["chunk_size"] == "256 (default)"
    config = cli.json("describe", "kvcache", "--config")["config"]
    assert config["l1_size_gb"] == {"value": 0.0625, "source": "flag"}


def test_a_value_from_the_environment_says_so():
    with LmcacheServer(http=False, env={"LMCACHE_CHUNK_SIZE": "512"}) as server:
        cli = Cli(server.zmq_url)
        assert cli.json("describe", "kvcache", "--config")["config"]["chunk_size"] == {"value": 512, "source": "environment"}
        assert fields(cli("describe", "kvcache").stdout)["HTTP endpoint"] == "off"


def watch(server: LmcacheServer, *words: str):
    return running_lmcache("describe", "kvcache", "--watch", "0.05", "--url", server.zmq_url, *words)


def test_watch_prints_one_line_a_sample_when_piped(server: LmcacheServer):
    with watch(server) as process:
        lines = [process.stdout.readline() for _ in range(3)]
    assert all(re.match(r"\d\d:\d\d:\d\d  OK  used ", line) for line in lines)
    assert "stored 0.00 GB/s" not in lines[0]
    assert "stored 0.00 GB/s  retrieved 0.00 GB/s" in lines[2]


def test_watch_in_json_prints_one_document_a_line(server: LmcacheServer):
    with watch(server, "--format", "json") as process:
        documents = [json.loads(process.stdout.readline()) for _ in range(2)]
    assert all(document["ok"] and document["schema_version"] == 1 for document in documents)


def test_watch_says_that_the_server_is_away_and_goes_on():
    with LmcacheServer(http=False) as server, watch(server, "--timeout", "3") as process:
        assert "OK" in process.stdout.readline()
        server.freeze()
        assert process.stderr.readline().startswith("error: no reply from")
        server.thaw()
        assert any("OK" in line for line in process.stdout)


def test_a_server_with_problems_exits_with_1():
    status = {"healthy": False, "problems": ["L2 is full"], "l1": {"capacity_bytes": 100, "used_bytes": 50}}
    with http_peer(200, json.dumps(status).encode()) as port:
        cli = Cli(f"http://localhost:{port}")
        done = cli("describe", "kvcache")
        document = cli.json("describe", "kvcache", code=1)
    assert done.returncode == 1
    assert fields(done.stdout)["Health"] == "FAIL"
    assert fields(done.stdout)["Problem"] == "L2 is full"
    assert "the server is not healthy: L2 is full" in done.stderr
    assert document["problems"] == ["L2 is full"]


@pytest.mark.parametrize(
    "status",
    [
        '{"healthy": true, "hit_rate": NaN, "l1": {"capacity_bytes": 100, "used_bytes": 50}}',
        '{"healthy": true, "uptime_seconds": 1e999, "l1": {"capacity_bytes": 100, "used_bytes": 50}}',
        '{"healthy": true, "l1": {"capacity_bytes": 1' + "0" * 400 + ', "used_bytes": 50}}',
        '{"healthy": true, "hit_rate": 1.5, "l1": {"capacity_bytes": 100, "used_bytes": 50}}',
    ],
    ids=["NaN", "infinite", "401 digits", "ratio"],
)
@pytest.mark.parametrize("words", [[], ["--config"]])
def test_numbers_that_cannot_be_are_not_the_answer_of_a_server(status, words):
    with http_peer(200, status.encode()) as port:
        error = Cli(f"http://localhost:{port}").refused("describe", "kvcache", *words, code=1)
    assert "does not answer like an lmcache server" in error


def test_numbers_that_cannot_be_are_found_over_zmq_too():
    status = {"healthy": True, "l1": {"capacity_bytes": 1, "used_bytes": 0}, "l2": [{"put_seconds": float("nan")}]}
    with zmq_peer(lambda frames: [frames[0], msgspec.msgpack.encode(StatusReply(boot="0" * 32, status=status))]) as port:
        error = Cli(f"localhost:{port}").refused("describe", "kvcache", code=1)
    assert "its status is not one that this version reads: it has a number that is nan" in error


def test_tiers_and_hit_rate_are_shown_with_their_units():
    status = {
        "healthy": True,
        "hit_rate": 0.923,
        "l1": {"capacity_bytes": 60 << 30, "used_bytes": 42 << 30},
        "l2": [{"name": "disk", "used_bytes": 3 << 20, "hit_rate": 0.678, "up": True, "error": None}],
    }
    with http_peer(200, json.dumps(status).encode()) as port:
        found = fields(Cli(f"http://localhost:{port}")("describe", "kvcache").stdout)
    assert found["L1 used (GB)"] == "42.0 (70.0%)"
    assert found["Hit rate"] == "67.8%"  # the tier's own comes last
    assert (found["Used"], found["Up"], found["Error"]) == ("3.0 MiB", "yes", "none")
