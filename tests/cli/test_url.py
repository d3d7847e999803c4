"""Addresses: what is accepted, which transport it means, and where the defaults come from."""

import os
from argparse import Namespace

import pytest

from lmcache.cli.base import CommandParser, check_name, engine_url, http_url, kvcache_url, parse_url, zmq_url
from lmcache.errors import UnreachableError, UsageError
from tests.cli.peers import http_peer


@pytest.mark.parametrize(
    ("text", "canonical", "is_http", "host", "port"),
    [
        ("localhost:5555", "tcp://localhost:5555", False, "localhost", 5555),
        ("tcp://10.0.0.1:65535", "tcp://10.0.0.1:65535", False, "10.0.0.1", 65535),
        ("TCP://host:1", "tcp://host:1", False, "host", 1),
        ("[::1]:5555", "tcp://[::1]:5555", False, "::1", 5555),
        ("tcp://[fe80::1%eth0]:5555", "tcp://[fe80::1%eth0]:5555", False, "fe80::1%eth0", 5555),
        ("ipc:///run/lmcache.sock", "ipc:///run/lmcache.sock", False, "", 0),
        ("http://localhost:8080", "http://localhost:8080", True, "localhost", 8080),
        ("http://cache.example/", "http://cache.example", True, "cache.example", 80),
        ("https://cache.example/kv/", "https://cache.example/kv", True, "cache.example", 443),
        (" localhost:5555 ", "tcp://localhost:5555", False, "localhost", 5555),
    ],
)
def test_the_scheme_decides_the_transport(text, canonical, is_http, host, port):
    url = parse_url(text)
    assert (url.text, url.is_http, url.host, url.port) == (canonical, is_http, host, port)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "localhost",
        "localhost:",
        ":5555",
        "localhost:0",
        "localhost:65536",
        "localhost:99999999",
        "localhost:-1",
        "localhost:five",
        "localhost:5555/path",
        "tcp://localhost",
        "tcp://",
        "tcp://*:5555",
        "ipc://",
        "redis://localhost:6379",
        "://localhost:5555",
        "http://",
        "http://:80",
        "http://host:0",
        "http://host:80:80",
        "http://user:secret@host:80",
        "http://host/?query=1",
        "http://host/#part",
        "http://host/a b",
        "::1:5555",
        "[::1]",
        "[::zz]:5555",
        "[1.2.3.4]:5555",
        "tcp://tcp://host:1",
        "ho st:5555",
        "host:\uff15",
    ],
)
def test_anything_else_is_refused_with_the_rule(text):
    with pytest.raises(UsageError, match="is not an address") as refused:
        parse_url(text)
    assert "host:port for ZMQ" in refused.value.hint


def arguments(url=None, prog="lmcache ping engine"):
    return Namespace(url=url, parser=CommandParser(prog=prog))


def test_the_flag_wins_over_the_variable_and_the_variable_over_the_default(monkeypatch):
    assert kvcache_url(arguments()).text == "tcp://localhost:5555"
    assert engine_url(arguments()).text == "http://localhost:8000"
    monkeypatch.setenv("LMCACHE_URL", "cache:1")
    monkeypatch.setenv("LMCACHE_ENGINE_URL", "http://engine:2")
    assert kvcache_url(arguments()).text == "tcp://cache:1"
    assert engine_url(arguments()).text == "http://engine:2"
    assert kvcache_url(arguments("http://other:3")).text == "http://other:3"
    assert engine_url(arguments("http://other:3")).text == "http://other:3"


def test_an_engine_command_refuses_a_zmq_address_and_names_the_command_that_fits():
    with pytest.raises(UsageError, match="an inference engine speaks HTTP, and tcp://h:5555 is a ZMQ address") as refused:
        engine_url(arguments("h:5555"))
    assert refused.value.hint == "did you mean 'lmcache ping kvcache --url h:5555'?"
    with pytest.raises(UsageError):
        http_url("tcp://h:1")


def test_a_name_that_does_not_resolve_is_unreachable():
    with pytest.raises(UnreachableError, match=r"cannot resolve 'no\.such\.host\.invalid'"):
        check_name(parse_url("no.such.host.invalid:5555"), 30)


@pytest.mark.parametrize("text", ["127.0.0.1:1", "localhost:1", "[::1]:1", "ipc:///x"])
def test_addresses_that_need_no_resolver_are_not_resolved(text):
    check_name(parse_url(text), 0)


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        ("tcp://127.0.0.1:5555", "tcp://localhost:5555"),
        ("tcp://0.0.0.0:5555", "tcp://localhost:5555"),
        ("tcp://*:5555", "tcp://localhost:5555"),
        ("tcp://10.1.2.3:5555", "tcp://10.1.2.3:5555"),
        ("ipc:///run/lmcache", "ipc:///run/lmcache"),
    ],
)
def test_an_http_address_leads_to_the_zmq_address_as_seen_from_here(told, expected):
    with http_peer(200, b'{"zmq_endpoint": "%s"}' % told.encode()) as port:
        assert zmq_url(parse_url(f"http://localhost:{port}"), 30).text == expected


def test_a_zmq_address_is_its_own():
    url = parse_url("localhost:1")
    assert zmq_url(url) is url
    assert "LMCACHE_URL" not in os.environ
