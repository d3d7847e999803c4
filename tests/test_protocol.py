"""Messages: what is accepted, what is refused with which code, and how versions meet."""

import struct
import threading
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmcache import protocol
from lmcache.errors import ProtocolError, RemoteError
from lmcache.keys import KEY_BYTES, Namespace
from lmcache.layout import KVLayout
from lmcache.protocol import (
    MAX_CHUNK_BYTES,
    MAX_CHUNKS,
    MAX_HEADER_BYTES,
    PROTOCOL_VERSION,
    REQUESTS,
    ErrorInfo,
    HitStatus,
    Noop,
    NoopReply,
    Placement,
    Reply,
    count_keys,
    decode_reply,
    decode_request,
    encode,
    version_mismatch,
)

CLIENT = "0123456789abcdef" * 2
PLACE = [3, 4096, 100, 7, 9]
NAMESPACE = msgspec.to_builtins(Namespace(model="m", chunk_size=16))
LAYOUT = msgspec.to_builtins(KVLayout(num_layers=1, num_planes=2, block_bytes=512, block_size=16, dtype="f16"))
# One valid request of each operation, with every field that has to be there.
REQUIRED: dict[str, dict[str, Any]] = {
    "NOOP": {},
    "GET_CHUNK_SIZE": {},
    "HELLO": {"kind": "test"},
    "ATTACH": {"client": CLIENT, "cookie": bytes(16)},
    "GOODBYE": {"client": CLIENT},
    "REGISTER_KV_CACHE": {"client": CLIENT, "namespace": NAMESPACE, "layout": LAYOUT},
    "UNREGISTER_KV_CACHE": {"client": CLIENT},
    "FIND_WORKERS": {"client": CLIENT, "process": "p"},
    "REPORT": {"client": CLIENT},
    "LOOKUP": {},
    "FREE_LOOKUP_LOCKS": {"client": CLIENT, "request_id": "r"},
    "END_SESSION": {"request_id": "r"},
    "STORE": {"client": CLIENT, "chunk_bytes": 100},
    "COMMIT": {"client": CLIENT, "placements": [PLACE]},
    "ABORT": {"client": CLIENT, "placements": [PLACE]},
    "RETRIEVE": {"client": CLIENT},
    "RELEASE": {"client": CLIENT, "placements": [PLACE]},
    "PUT": {"client": CLIENT},
    "GET": {"client": CLIENT},
    "STATUS": {},
    "CLEAR": {},
    "EVICT": {},
}
OPTIONAL: dict[str, dict[str, Any]] = {
    "NOOP": {"client": CLIENT},
    "HELLO": {"pid": 7, "features": 5, "software": "lmcache 9"},
    "REGISTER_KV_CACHE": {
        "rank": 3,
        "world_size": 4,
        "processes": ["p", "q"],
        "backend": "cuda, Triton",
        "revision_parts": {"a": "b"},
    },
    "REPORT": {
        "failed_blocks": {"stale": 3},
        "failed_lookups": {"deadline": 1},
        "decode_chunks": 2,
        "loaded_chunks": 1,
        "pins": {"pool_bytes": 9, "pinned_bytes": 5, "unpinned_bytes": 1, "unpinned_copied_bytes": 2**62},
    },
    "LOOKUP": {"client": CLIENT, "request_id": "r", "world_size": 4, "places": True, "timeout_seconds": 1.5},
    "FREE_LOOKUP_LOCKS": {"start": 1, "end": 2},
    "END_SESSION": {"client": CLIENT},
    "STORE": {"namespace_id": 2**64 - 1, "rank": 3, "parent": bytes(32)},
    "RETRIEVE": {"request_id": "r", "rank": 3},
    "RELEASE": {"request_id": "r"},
    "PUT": {"namespace_id": 1, "rank": 3, "parent": bytes(32), "checksums": [1, 2**64 - 1]},
    "GET": {"rank": 3},
    "CLEAR": {"dry_run": True, "force": True, "timeout_seconds": 1.5, "tier": "l2"},
    "EVICT": {"dry_run": True, "num_bytes": 1, "ratio": 0.5, "model": "m", "older_than_seconds": 2.0, "timeout_seconds": 3.0},
}
# By field: values that have its type and are out of its range.
OUT_OF_RANGE: dict[str, list[Any]] = {
    "client": ["", CLIENT[:-1], CLIENT + "0", CLIENT[:-1] + "g", CLIENT.upper(), CLIENT + "\n", "../" + CLIENT[3:]],
    "cookie": [b"", bytes(15), bytes(17)],
    "kind": ["x" * 65],
    "pid": [-1, 2**63],
    "features": [-1],
    "namespace": [
        {},
        {"model": "m"},
        {**NAMESPACE, "chunk_size": 0},
        {**NAMESPACE, "model": "x" * 5000},
        {**NAMESPACE, "world_size": 0},
    ],
    "layout": [{}, {**LAYOUT, "num_layers": 0}, {**LAYOUT, "block_size": 0}, {**LAYOUT, "block_bytes": 2**41}],
    "rank": [-1, 1 << 16],
    "world_size": [0, -1, 1 << 16],
    "request_id": ["x" * 513],
    "start": [-1, 2**63],
    "end": [-1, 2**63],
    "chunk_bytes": [0, -1, MAX_CHUNK_BYTES + 1, 2**63],
    "namespace_id": [-1],
    "parent": [bytes(33)],
    "placements": [
        [PLACE] * (MAX_CHUNKS + 1),
        [[]],
        [[-1, 0, 1, 0]],
        [[0, -1, 1, 0]],
        [[0, 0, 0, 0]],
        [[0, 0, MAX_CHUNK_BYTES + 1, 0]],
        [[0, 0, 1, -1]],
        [[0, 0, 1, 0, -1]],
        [["0", 0, 1, 0]],
        [{"slot": 0}],
        [None],
    ],
    "checksums": [[-1], ["1"], [0] * (MAX_CHUNKS + 1)],
    "timeout_seconds": [-1.0, 86401.0, float("nan"), float("inf")],
    "tier": ["", "l3", "L1"],
    "num_bytes": [-1, 2**63],
    "ratio": [-0.1, 1.1, float("nan"), float("inf")],
    "model": ["x" * 513],
    "older_than_seconds": [-1.0, 86401.0, float("nan")],
    "failed_blocks": [{"bad luck": 1}, {"stale": -1}, {1: 1}, {"stale": "1"}],
    "failed_lookups": [{"bad luck": 1}, {"deadline": 2**32 + 1}],
    "software": ["x" * 513],
    "decode_chunks": [-1, 2**32 + 1],
    "loaded_chunks": [-1, MAX_CHUNKS + 1],
    "pins": [{"pool_bytes": -1}, {"pinned_bytes": 2**62 + 1}, {"unpinned_bytes": "1"}, {"unpinned_copied_bytes": 1.5}, 7],
    "backend": ["x" * 513],
    "revision_parts": [{"x" * 49: ""}, {"x": "y" * 49}, {"x": 1}, {str(number): "" for number in range(129)}, []],
    "process": ["", "x" * 513],
    "processes": [["x" * 513], ["p"] * 5, [1]],
}
WRONG_TYPES = [1.5, "text", b"\xff", True, [1], {"a": 1}, None]
NULL_ALLOWED = {
    ("NOOP", "client"),
    ("LOOKUP", "client"),
    ("LOOKUP", "timeout_seconds"),
    ("END_SESSION", "client"),
    ("REPORT", "pins"),
} | {("EVICT", field) for field in ("num_bytes", "ratio", "model", "older_than_seconds")}


def header(op: str, **fields: Any) -> bytes:
    return msgspec.msgpack.encode({"v": PROTOCOL_VERSION, "op": op, **fields})


def full(op: str) -> dict[str, Any]:
    return {**REQUIRED[op], **OPTIONAL.get(op, {})}


def code_of(raw: bytes) -> str:
    with pytest.raises(ProtocolError) as caught:
        decode_request(raw)
    assert caught.value.message
    assert len(caught.value.message) < 2000
    return caught.value.code


CASES = [(op, field) for op in REQUIRED for field in full(op)]


def test_the_tables_above_name_every_operation_and_every_field():
    assert set(REQUIRED) == set(REQUESTS)
    for op, request in REQUESTS.items():
        assert set(full(op)) == set(request.__struct_fields__) - {"v"}
    assert {field for _, field in CASES} <= set(OUT_OF_RANGE) | {"dry_run", "force", "places"}


@pytest.mark.parametrize("op", REQUIRED)
def test_a_request_with_every_field_is_read_as_it_was_written(op: str):
    request = decode_request(header(op, **full(op)))
    assert type(request) is REQUESTS[op]
    assert {"op": op, "v": PROTOCOL_VERSION, **full(op)} == msgspec.msgpack.decode(encode(request))
    assert decode_request(encode(request)) == request


@pytest.mark.parametrize("op", REQUIRED)
def test_a_request_with_only_what_it_needs_is_read(op: str):
    request = decode_request(header(op, **REQUIRED[op]))
    assert decode_request(encode(request)) == request


@pytest.mark.parametrize("op", REQUIRED)
def test_fields_of_a_later_version_are_ignored(op: str):
    assert decode_request(header(op, **full(op), novelty={"x": [1]})) == decode_request(header(op, **full(op)))


@pytest.mark.parametrize(("op", "field"), [(op, field) for op in REQUIRED for field in REQUIRED[op]])
def test_a_missing_field_is_named(op: str, field: str):
    fields = {name: value for name, value in REQUIRED[op].items() if name != field}
    with pytest.raises(ProtocolError, match=f"bad {op} request: .*{field}") as caught:
        decode_request(header(op, **fields))
    assert caught.value.code == "bad_field"


@pytest.mark.parametrize(("op", "field"), [case for case in CASES if case[1] in OUT_OF_RANGE])
def test_a_value_out_of_range_is_refused_and_its_field_named(op: str, field: str):
    for value in OUT_OF_RANGE[field]:
        with pytest.raises(ProtocolError, match=f"(?s)bad {op} request: .*{field}") as caught:
            decode_request(header(op, **{**full(op), field: value}))
        assert caught.value.code == "bad_field"


@pytest.mark.parametrize(("op", "field"), CASES)
def test_a_value_of_another_type_is_refused(op: str, field: str):
    good = full(op)[field]
    for value in WRONG_TYPES:
        is_number = isinstance(value, int | float) and isinstance(good, float)
        if type(value) is type(good) or is_number or (value is None and (op, field) in NULL_ALLOWED):
            continue
        if type(value) is str and isinstance(good, bytes):
            continue  # text stands for base64 where bytes are expected: its length is checked like theirs
        assert code_of(header(op, **{**full(op), field: value})) == "bad_field"


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\x00",
        b"GET / HTTP/1.1\r\n\r\n",
        b"\xc1" * 10,
        b"\x81\xa1v",
        msgspec.msgpack.encode([1, "NOOP"]),
        msgspec.msgpack.encode({"op": "NOOP"}),
        msgspec.msgpack.encode({"v": 1}),
        msgspec.msgpack.encode({"v": "1", "op": "NOOP"}),
        msgspec.msgpack.encode({"v": 1, "op": 7}),
        msgspec.msgpack.encode({"v": 1.5, "op": "NOOP"}),
        b"\x82\xa1v\x01\xa2op\xa2\xff\xfe",  # not UTF-8
        b"\x91" * 100_000,
        b"\x82\xa1v\x01\xa2op" + b"\x81\xa1x" * 50_000 + b"\xc0",
        b"\xdd\xff\xff\xff\xff",  # an array of 4 G entries that are not there
    ],
)
def test_bytes_that_are_no_request_are_refused(raw: bytes):
    assert code_of(raw) == "bad_header"


@pytest.mark.parametrize("op", ["", "noop", "NOOP ", "SHUTDOWN", "x" * 100_000, "\0"])
def test_an_unknown_operation_is_named_and_the_known_ones_offered(op: str):
    with pytest.raises(ProtocolError, match="unknown operation") as caught:
        decode_request(header(op))
    assert caught.value.code == "unknown_op"
    assert all(known in caught.value.hint for known in REQUESTS)
    assert len(caught.value.message) < 400


def test_a_header_is_read_up_to_its_limit_and_not_beyond():
    padding = MAX_HEADER_BYTES - len(header("NOOP", pad=b"")) - 3
    assert isinstance(decode_request(header("NOOP", pad=bytes(padding))), Noop)
    assert code_of(header("NOOP", pad=bytes(MAX_HEADER_BYTES))) == "oversized"


def read_or_refuse(raw: bytes) -> None:
    """Any other exception, or another code, fails the test."""
    code = "none"
    try:
        decode_request(raw)
    except ProtocolError as error:
        code = error.code
    assert code in ("none", "bad_header", "bad_field", "unknown_op", "version_mismatch")


@settings(max_examples=300)
@given(raw=st.binary(max_size=200))
def test_any_bytes_give_a_request_or_a_protocol_error(raw: bytes):
    read_or_refuse(raw)


@settings(max_examples=300)
@given(op=st.sampled_from(sorted(REQUIRED)), data=st.data())
def test_a_valid_request_with_some_bytes_changed_gives_a_request_or_a_protocol_error(op: str, data: st.DataObject):
    raw = bytearray(header(op, **full(op)))
    for at, value in data.draw(st.lists(st.tuples(st.integers(0, len(raw) - 1), st.integers(0, 255)), max_size=4)):
        raw[at] = value
    read_or_refuse(bytes(raw))


# -- keys in the payload ----------------------------------------------------------------------------------------------


def test_keys_are_counted_up_to_the_limit():
    assert [count_keys(bytes(KEY_BYTES * count)) for count in (0, 1, MAX_CHUNKS)] == [0, 1, MAX_CHUNKS]


@pytest.mark.parametrize(
    ("length", "code"), [(1, "bad_keys"), (31, "bad_keys"), (33, "bad_keys"), (KEY_BYTES * (MAX_CHUNKS + 1), "oversized")]
)
def test_a_partial_key_and_too_many_keys_are_refused(length: int, code: str):
    with pytest.raises(ProtocolError) as caught:
        count_keys(bytes(length))
    assert caught.value.code == code
    assert str(length if code == "bad_keys" else MAX_CHUNKS) in caught.value.message


# -- versions ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("theirs", [0, 1, 2, 3, 4, -1, 2**40])
def test_a_server_of_versions_1_to_3_answers_exactly_those(theirs: int):
    raw = msgspec.msgpack.encode({"v": theirs, "op": "NOOP"})
    if 1 <= theirs <= 3:
        assert isinstance(decode_request(raw, 1, 3), Noop)
        return
    with pytest.raises(ProtocolError) as caught:
        decode_request(raw, 1, 3)
    assert caught.value.code == "version_mismatch"
    assert caught.value.message == f"the client speaks protocol {theirs}, the server speaks 1 to 3"
    assert caught.value.hint == f"upgrade lmcache on the {'client' if theirs < 1 else 'server'}'s side"


def test_a_version_is_told_before_anything_else_of_the_request_is_believed():
    raw = msgspec.msgpack.encode({"v": 9, "op": "AN_OPERATION_OF_VERSION_9", "fields": {"unknown": [1, 2]}})
    assert code_of(raw) == "version_mismatch"


def test_both_sides_get_the_same_sentence():
    error = version_mismatch(1, 2, 3)
    reply = encode(Reply(boot="b", error=ErrorInfo(error.code, error.message, error.hint)))
    with pytest.raises(RemoteError) as caught:
        decode_reply(reply, Noop())
    assert (caught.value.message, caught.value.hint, caught.value.code) == (error.message, error.hint, "version_mismatch")
    assert "protocol 1" in error.message
    assert "2 to 3" in error.message


# -- replies ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", REQUIRED)
def test_every_reply_type_is_read_as_it_was_written(op: str):
    request = decode_request(header(op, **REQUIRED[op]))
    reply = type(request).reply_type(boot="b")
    assert decode_reply(encode(reply), request) == reply


def test_fields_of_a_later_servers_reply_are_ignored():
    raw = msgspec.msgpack.encode({"boot": "b", "version": "9.9", "novelty": 1})
    assert decode_reply(raw, Noop()) == NoopReply(boot="b", version="9.9")


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\xc1",
        b"HTTP/1.1 400 Bad Request",
        msgspec.msgpack.encode({}),
        msgspec.msgpack.encode({"boot": ""}),
        msgspec.msgpack.encode({"boot": 7}),
        msgspec.msgpack.encode({"boot": "b", "problems": "x"}),
        msgspec.msgpack.encode({"boot": "b", "error": {"message": "without a code"}}),
        b"\x91" * 100_000,
    ],
)
def test_bytes_that_are_no_reply_are_a_protocol_error_with_a_hint(raw: bytes):
    with pytest.raises(ProtocolError, match="not one of this protocol") as caught:
        decode_reply(raw, Noop())
    assert caught.value.hint


def test_a_servers_error_keeps_its_code_sentence_and_hint():
    raw = encode(Reply(boot="b", error=ErrorInfo("wrong_pool", "the cookie is not this pool's", "another file")))
    with pytest.raises(RemoteError) as caught:
        decode_reply(raw, Noop())
    assert (caught.value.code, str(caught.value), caught.value.hint) == (
        "wrong_pool",
        "the cookie is not this pool's",
        "another file",
    )


# -- the wire format that other versions depend on --------------------------------------------------------------------


def test_the_wire_format_of_version_1_stays():
    """Peers of this version are out there: what they send must still be read, byte for byte."""
    assert PROTOCOL_VERSION == 1
    assert encode(Noop()).hex() == "83a26f70a44e4f4f50a6636c69656e74c0a17601"
    assert msgspec.msgpack.encode(Placement(1, 2, 3, 4, 5)) == bytes([0x95, 1, 2, 3, 4, 5])
    assert [outcome.value for outcome in protocol.StoreOutcome] == [0, 1, 2, 3]
    assert {status.value for status in HitStatus} == {"HIT", "PENDING", "MISS"}
    assert struct.calcsize("<32s") == KEY_BYTES


def test_two_threads_never_build_a_decoder_at_the_same_time(monkeypatch):
    """msgspec lets others see a nested struct that it has not taken in yet; decoding with that ended the process."""
    inside, overlapped = [], threading.Event()

    def build(message):
        inside.append(message)
        if len(inside) > 1:
            overlapped.set()
        overlapped.wait(0.2)  # time for another to come in
        inside.remove(message)
        return message

    monkeypatch.setattr(msgspec.msgpack, "Decoder", build)
    messages = [protocol.StoreReply, protocol.RetrieveReply, protocol.LookupReply]
    threads = [threading.Thread(target=protocol._decoder.__wrapped__, args=(message,)) for message in messages]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not overlapped.is_set()
