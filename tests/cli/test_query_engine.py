"""`lmcache query engine` against peers that stream as engines do, and as they should not."""

import contextlib
import json
import re
import time

import pytest

from lmcache.cli.counters import CacheUse, TokenOrigins, settled_use
from lmcache.cli.engine import Unknown
from tests.cli.conftest import Cli
from tests.cli.peers import EngineHandler, engine_peer, letters, tcp_peer
from tests.server_process import LmcacheServer, free_port, run_lmcache

MODELS = (200, {"object": "list", "data": [{"id": "m", "root": "/models/m", "max_model_len": 100}]})
ASK = ["query", "engine", "--prompt", "hello"]


def event(**fields) -> str:
    return "data: " + json.dumps(fields)


def piece(text: str, reason: str | None = None) -> str:
    return event(choices=[{"index": 0, "text": text, "finish_reason": reason}])


def delta(reason: str | None = None, **fields: str) -> str:
    return event(choices=[{"index": 0, "delta": fields, "finish_reason": reason}])


def usage(prompt_tokens: int, completion_tokens: int) -> str:
    return event(choices=[], usage={"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens})


def streams(*lines: str, pause: float = 0.0):
    """A script that streams the lines as an engine does, and ends well."""

    def script(handler: EngineHandler) -> None:
        handler.start_stream()
        for line in lines:
            handler.send_line(line)
            time.sleep(pause)
        handler.end_stream()

    return script


def sends_at_once(*lines: str):
    """A script that sends them as one segment."""

    def script(handler: EngineHandler) -> None:
        handler.start_stream()
        handler.send_line("\n\n".join(lines))
        handler.end_stream()

    return script


ANSWER = streams(piece("One"), piece(" two"), piece(" three", "length"), usage(5, 3), "data: [DONE]", pause=0.02)
ENGINE = {"/v1/models": MODELS, "/tokenize": letters, "/v1/completions": ANSWER}


def refused(routes, *words: str, code: int = 1) -> str:
    with engine_peer(routes) as engine:
        return Cli("").refused(*ASK, "--url", engine.url, *words, code=code)


def answered_with(script, *words: str, code: int = 1) -> str:
    return refused({**ENGINE, "/v1/completions": script}, *words, code=code)


# -- the report ------------------------------------------------------------------------------------


def test_text_is_the_published_box(tmp_path):
    (tmp_path / "own.txt").write_text("x" * 30)
    words = ["--prompt", "{own} why?", "--corpus", f"own={tmp_path}/own.txt"]
    with engine_peer(ENGINE) as engine:
        done = run_lmcache("query", "engine", *words, "--url", engine.url)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[:6] == [
        "========== Query Engine Result ==========",
        "Prompt tokens:                         35",
        "  Corpus 'own':                        30",
        "  Query:                                5",
        "  By its usage:                         5",
        "Output tokens:                          3",
    ]
    assert [line.partition(":")[0] for line in lines[6:]] == [
        "-------------Latency Metrics-------------",
        "TTFT (ms)",
        "TPOT (ms/token)",
        "Total latency (ms)",
        "Throughput (tokens/s)",
        "=========================================",
    ]
    assert {len(line) for line in lines} == {41}


def test_json_has_the_figures_and_what_they_are_made_of():
    with engine_peer(ENGINE) as engine:
        found = Cli("").json(*ASK, "--url", engine.url)
    assert (found["prompt_tokens"], found["query_tokens"], found["corpora_tokens"], found["output_tokens"]) == (5, 5, {}, 3)
    assert (found["text"], found["finish_reason"], found["model"]) == ("One two three", "length", "m")
    assert found["tpot_ms"] == pytest.approx((found["latency_ms"] - found["ttft_ms"]) / 2, abs=1e-3)
    assert found["throughput_tokens_per_second"] == pytest.approx(3 / found["latency_ms"] * 1000, rel=1e-3)
    assert 0 < found["ttft_ms"] <= found["latency_ms"]


def test_the_request_is_greedy_unless_told_otherwise_and_asks_for_usage():
    with engine_peer(ENGINE) as engine:
        Cli("").json(*ASK, "--url", engine.url)
        Cli("").json(
            *ASK, "--url", engine.url, "--max-tokens", "7", "--temperature", "0.5", "--ignore-eos", "--cache-salt", "tenant"
        )
    first, second = (body for _, path, body in engine.requests if path == "/v1/completions")
    assert first == {
        "model": "m",
        "prompt": "hello",
        "max_tokens": 128,
        "temperature": 0.0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    assert (second["max_tokens"], second["temperature"], second["ignore_eos"], second["cache_salt"]) == (7, 0.5, True, "tenant")


def test_a_chat_counts_its_template_and_waits_for_the_first_word():
    script = streams(
        delta(role="assistant", content=""),
        delta(content="Hi"),
        delta("stop", content="!"),
        usage(15, 2),
        "data: [DONE]",
        pause=0.05,
    )
    with engine_peer({**ENGINE, "/v1/chat/completions": script}) as engine:
        found = Cli("").json(*ASK, "--chat", "--url", engine.url)
    assert (found["prompt_tokens"], found["query_tokens"], found["template_tokens"]) == (15, 5, 10)
    assert found["text"] == "Hi!"
    assert found["ttft_ms"] > 40
    assert engine.requests[-1][2]["messages"] == [{"role": "user", "content": "hello"}]


def test_without_tokenize_the_counts_are_those_of_the_usage_and_corpora_are_na(tmp_path):
    (tmp_path / "own.txt").write_text("x" * 30)
    words = ["query", "engine", "--prompt", "{own} why?", "--corpus", f"own={tmp_path}/own.txt"]
    with engine_peer({key: value for key, value in ENGINE.items() if key != "/tokenize"}) as engine:
        found = Cli("").json(*words, "--url", engine.url)
        text = Cli("")(*words, "--url", engine.url).stdout
    assert (found["prompt_tokens"], found["corpora_tokens"], found["query_tokens"]) == (5, {"own": None}, None)
    assert "n/a (the engine has no /tokenize)" in text


@pytest.mark.parametrize(
    ("answer", "because"),
    [
        ((400, {"error": {"message": "prompt is not a known field"}}), "prompt is not a known field"),
        ((422, {"detail": "content is missing"}), "/tokenize answered HTTP 422: content is missing"),
        ((200, {"tokens": []}), "/tokenize has no list of token ids"),
        ((200, {"tokens": ["hel", "lo"]}), "/tokenize has 'hel' at position 0, which is no token id"),
        ((200, "hello"), "/tokenize did not answer with a JSON object"),
    ],
    ids=["400", "422", "empty", "words", "text"],
)
@pytest.mark.parametrize("chat", [[], ["--chat"]], ids=["plain", "chat"])
def test_a_tokenize_that_refuses_or_speaks_otherwise_makes_the_counts_na(tmp_path, answer, because, chat):
    (tmp_path / "own.txt").write_text("x" * 30)
    words = ["query", "engine", "--prompt", "{own} why?", "--corpus", f"own={tmp_path}/own.txt", *chat]
    with engine_peer({**ENGINE, "/v1/chat/completions": ANSWER, "/tokenize": answer}) as engine:
        found = Cli("").json(*words, "--url", engine.url)
        text = Cli("")(*words, "--url", engine.url).stdout
    assert (found["prompt_tokens"], found["corpora_tokens"], found["query_tokens"]) == (5, {"own": None}, None)
    (line,) = [line for line in text.splitlines() if "Corpus 'own'" in line]
    assert "n/a (" in line
    assert because in line


def test_without_usage_the_refusal_is_why_the_prompts_tokens_are_na():
    script = streams(piece("One", "stop"), "data: [DONE]")
    with engine_peer({**ENGINE, "/tokenize": (400, {"error": "no"}), "/v1/completions": script}) as engine:
        found = Cli("").json(*ASK, "--url", engine.url)
    assert (found["prompt_tokens"], found["prompt_tokens_unknown_because"]) == (None, "no, the stream gave no usage")


def letters_without_chat(status: int, document):
    """Tokenize prompts, and answer with this to chats."""

    def script(handler: EngineHandler) -> None:
        if "messages" in handler.document:
            handler.reply(status, document)
        else:
            letters(handler)

    return script


@pytest.mark.parametrize(
    ("tokenize", "because"),
    [
        (letters_without_chat(400, {"error": {"message": "no chat template"}}), "no chat template"),
        (letters_without_chat(200, {"tokens": [1, 2]}), "/tokenize gave no count of a chat"),
    ],
    ids=["refused", "no count"],
)
def test_a_chat_that_cannot_be_tokenized_leaves_its_template_na_and_the_rest_counted(tokenize, because):
    script = streams(delta("stop", content="Hi"), usage(15, 1), "data: [DONE]")
    with engine_peer({**ENGINE, "/v1/chat/completions": script, "/tokenize": tokenize}) as engine:
        found = Cli("").json(*ASK, "--chat", "--url", engine.url)
        text = Cli("")(*ASK, "--chat", "--url", engine.url).stdout
    assert (found["prompt_tokens"], found["query_tokens"], found["template_tokens"]) == (15, 5, None)
    assert found["template_tokens_unknown_because"].endswith(because)
    assert re.search(r"^  Chat template: +n/a \(", text, re.MULTILINE)


def test_a_tokenize_that_falls_silent_is_exit_code_3():
    error = refused({**ENGINE, "/tokenize": lambda handler: time.sleep(20)}, "--timeout", "0.5", code=3)
    assert "within 0.5 s" in error


def test_without_usage_what_needs_it_is_na_and_nothing_is_invented():
    script = streams(": a comment", piece("One"), piece(" two", "stop"), "data: [DONE]")
    with engine_peer({**ENGINE, "/v1/completions": script}) as engine:
        found = Cli("").json(*ASK, "--url", engine.url)
    unknown = {key for key, value in found.items() if value is None}
    assert unknown == {"usage_prompt_tokens", "output_tokens", "tpot_ms", "throughput_tokens_per_second"}
    assert found["output_tokens_unknown_because"] == "the stream gave no usage"
    assert found["prompt_tokens"] == 5


def test_one_token_has_no_tpot():
    script = streams(piece("One", "length"), usage(5, 1), "data: [DONE]")
    with engine_peer({**ENGINE, "/v1/completions": script}) as engine:
        found = Cli("").json(*ASK, "--url", engine.url)
    assert (found["tpot_ms"], found["tpot_ms_unknown_because"]) == (None, "one output token")


@pytest.mark.parametrize(
    ("text", "tokens", "because"),
    [
        (
            sends_at_once(piece("One two"), piece(" three", "stop"), usage(5, 3), "data: [DONE]"),
            3,
            "the answer came in one piece",
        ),
        (streams(piece("One two three", "stop"), usage(5, 3), "data: [DONE]"), 3, "the answer came in one piece"),
        (
            streams(piece("One two"), piece("", "stop"), usage(5, 3), "data: [DONE]", pause=0.05),
            3,
            "the answer came in one piece",
        ),
        (streams(piece("", "stop"), usage(5, 0), "data: [DONE]"), 0, "no output token"),
    ],
    ids=["segment", "event", "event and end", "nothing"],
)
def test_an_answer_that_comes_at_once_has_no_tpot(text, tokens, because):
    with engine_peer({**ENGINE, "/v1/completions": text}) as engine:
        found = Cli("").json(*ASK, "--url", engine.url)
    assert (found["output_tokens"], found["tpot_ms"], found["tpot_ms_unknown_because"]) == (tokens, None, because)


def test_an_empty_last_token_has_its_time():
    script = streams(piece("One"), piece("", "stop"), usage(5, 2), "data: [DONE]", pause=0.05)
    with engine_peer({**ENGINE, "/v1/completions": script}) as engine:
        assert Cli("").json(*ASK, "--url", engine.url)["tpot_ms"] > 40


# -- which model -----------------------------------------------------------------------------------


def test_several_models_must_be_told_apart_and_adapters_are_not_the_default():
    several = (200, {"data": [{"id": "a"}, {"id": "b"}]})
    assert "serves several models: a, b" in refused({**ENGINE, "/v1/models": several})
    adapters = (200, {"data": [{"id": "base"}, {"id": "adapter", "parent": "base"}]})
    with engine_peer({**ENGINE, "/v1/models": adapters}) as engine:
        assert Cli("").json(*ASK, "--url", engine.url)["model"] == "base"
        assert Cli("").json(*ASK, "--url", engine.url, "--model", "adapter")["model"] == "adapter"


def test_an_unknown_model_lists_those_that_are_served():
    error = refused(ENGINE, "--model", "n")
    assert "the engine serves no model 'n'; it serves: m" in error


def test_an_engine_without_a_list_of_models_is_told_which():
    routes = {key: value for key, value in ENGINE.items() if key != "/v1/models"}
    assert "hint: pass --model" in refused(routes)
    with engine_peer(routes) as engine:
        assert Cli("").json(*ASK, "--url", engine.url, "--model", "any")["model"] == "any"


# -- what goes wrong -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "document",
    [
        {"error": {"message": "the context is 100 tokens, you asked for 133", "code": 400}},
        {"object": "error", "message": "the context is 100 tokens, you asked for 133", "code": 400},
    ],
    ids=["openai", "sglang"],
)
def test_a_prompt_that_is_too_long_is_the_engines_message_and_a_hint(document):
    error = answered_with((400, document))
    assert error.startswith("error: the context is 100 tokens, you asked for 133\nhint: the model's context is 100 tokens")


@pytest.mark.parametrize(
    ("status", "document", "lines"),
    [
        (429, {"error": {"message": "too many requests in this context"}}, ["error: too many requests in this context"]),
        (400, {"error": {"message": "unknown field 'ignore_eos'"}}, ["error: unknown field 'ignore_eos'"]),
        (500, {"error": {"message": "no token"}}, ["error: no token", "hint: see the engine's log"]),
    ],
)
def test_another_refusal_is_not_taken_for_a_prompt_that_is_too_long(status, document, lines):
    assert answered_with((status, document)).splitlines() == lines


@pytest.mark.parametrize("path", ["/v1/models", "/v1/completions"])
def test_an_engine_that_fails_is_an_engine_all_the_same(path):
    error = refused({**ENGINE, path: (500, "<html>Internal Server Error</html>")})
    assert f"{path} answered HTTP 500\nhint: see the engine's log" in error
    assert "does not answer like" not in error


@pytest.mark.parametrize("path", ["/v1/models", "/v1/completions"])
def test_a_redirect_is_named_and_not_followed(path):
    error = refused({**ENGINE, path: lambda handler: handler.redirect("http://elsewhere/v1\x1b[31m")})
    assert f"{path} answered HTTP 302, a redirect to http://elsewhere/v1\\x1b[31m\nhint: redirects are not followed" in error


def test_an_engine_that_dies_within_its_answer_is_exit_code_3():
    def script(handler):
        handler.start_stream()
        handler.send_line(piece("One"))
        handler.hang_up()

    assert "ended the connection within its answer, after 1 pieces" in answered_with(script, code=3)


@pytest.mark.parametrize("lines", [[], [piece("One")]], ids=["before the first token", "after it"])
def test_an_engine_that_falls_silent_is_exit_code_3_within_the_timeout(lines):
    def script(handler):
        handler.start_stream()
        for line in lines:
            handler.send_line(line)
        time.sleep(20)

    error = answered_with(script, "--timeout", "0.5", code=3)
    assert f"within 0.5 s, after {len(lines)} pieces of the answer" in error


def test_comments_that_keep_the_connection_alive_are_no_tokens():
    script = streams(*[": ping"] * 200, pause=0.05)
    assert "no token from" in answered_with(script, "--timeout", "3", code=3)


@pytest.mark.parametrize("line", [event(), event(choices=[])])
def test_documents_without_a_token_are_no_tokens_either(line):
    script = streams(piece("One"), *[line] * 200, pause=0.05)
    assert "no token from" in answered_with(script, "--timeout", "3", code=3)


def test_a_line_that_comes_a_byte_at_a_time_runs_into_the_deadline():
    def script(handler):
        handler.start_stream()
        with contextlib.suppress(OSError):  # the client has gone
            for _ in range(200):
                handler.wfile.write(b"1\r\nd\r\n")
                time.sleep(0.05)

    assert "no token from" in answered_with(script, "--timeout", "3", code=3)


@pytest.mark.parametrize("line", ["data: {broken", "data: [1]", "<html>", '{"choices": []}', "data: \x00"])
def test_lines_that_are_no_events_are_quoted(line):
    assert "did not answer with a stream of tokens: " in answered_with(streams(piece("One"), line))


def test_counts_that_nobody_can_have_counted_are_no_usage():
    script = streams(piece("One", "stop"), usage(5, 2**53 + 1), usage(2**60, 2**60), "data: [DONE]")
    with engine_peer({**ENGINE, "/v1/completions": script}) as engine:
        found = Cli("").json(*ASK, "--url", engine.url)
    assert (found["usage_prompt_tokens"], found["output_tokens"]) == (5, None)


@pytest.mark.parametrize("number", ["NaN", "1e999", "1" + "0" * 400])
def test_numbers_that_overflow_are_no_stream(number):
    line = 'data: {"choices": [], "usage": {"completion_tokens": ' + number + "}}"
    assert "did not answer with a stream of tokens" in answered_with(streams(piece("One", "stop"), line, "data: [DONE]"))


def test_an_error_within_the_stream_is_the_engines():
    script = streams(piece("One"), event(error={"message": "out of memory"}), "data: [DONE]")
    assert "the engine failed while it answered: out of memory" in answered_with(script)


def test_an_error_of_null_is_none():
    choice = {"index": 0, "text": "One", "finish_reason": "stop"}
    script = streams(event(choices=[choice], error=None), "data: [DONE]")
    tokenize = (404, {"detail": "Not Found", "error": None})
    with engine_peer({**ENGINE, "/v1/completions": script, "/tokenize": tokenize}) as engine:
        found = Cli("").json(*ASK, "--url", engine.url)
    assert found["text"] == "One"
    assert found["prompt_tokens_unknown_because"].startswith("the engine has no /tokenize")


@pytest.mark.parametrize("lines", [[], [piece("One")], ["data: [DONE]"], [event(choices=[])], [event(choices=["x"])]])
def test_an_answer_without_an_end_is_said(lines):
    assert "ended without finish_reason" in answered_with(streams(*lines))


def test_an_answer_that_is_no_stream_is_said():
    assert "did not answer with a stream of tokens" in answered_with((200, {"choices": [{"text": "all at once"}]}))


def test_nobody_and_silence_are_exit_code_3(server: LmcacheServer):
    Cli("").refused(*ASK, "--url", f"http://localhost:{free_port()}", code=3)
    with tcp_peer(b"") as port:
        assert "within 0.5 s" in Cli("").refused(*ASK, "--timeout", "0.5", "--url", f"http://localhost:{port}", code=3)
    assert "cannot connect to tcp://localhost" in refused(ENGINE, "--kvcache-url", f"localhost:{free_port()}", code=3)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--prompt", ""], "--prompt is missing or empty"),
        (["--prompt", "{nobody}"], "unknown corpus 'nobody'"),
        (["--prompt", "a { b"], "starts no {corpus}"),
        (["--temperature", "3"], "'3' is not a number from 0 to 2"),
        (["--temperature", "nan"], "'nan' is not a number from 0 to 2"),
        (["--temperature", "1_0"], "'1_0' is not a number from 0 to 2"),
        (["--max-tokens", "0"], "'0' is not a whole number above 0"),
        (["--verify", "--cache-salt", "x"], "--verify uses a cache salt of its own"),
        (["--verify", "--temperature", "1"], "--verify compares answers, which vary with --temperature"),
        (["--url", "localhost:5555"], "did you mean 'lmcache query kvcache --url localhost:5555'?"),
        (["--kvcache-url", "ftp://x"], "unknown scheme 'ftp'"),
    ],
)
def test_wrong_requests_are_refused(words, message):
    assert message in Cli("").refused(*ASK, *words)


# -- the cache server ------------------------------------------------------------------------------


def test_the_cache_servers_share_is_shown(server: LmcacheServer):
    with engine_peer(ENGINE) as engine:
        found = Cli("").json(*ASK, "--url", engine.url, "--kvcache-url", server.zmq_url)
        text = Cli("")(*ASK, "--url", engine.url, "--kvcache-url", server.http_url).stdout
    assert (found["retrieved_tokens"], found["retrieved_bytes"], found["stored_bytes"]) == (0, 0, 0)
    assert "Retrieved tokens:                       0\n" in text


# -- --verify --------------------------------------------------------------------------------------


class Counted:
    """An engine whose counters go as a script says: for each request where 100 prompt tokens come from, and the answer.

    `origins` are local_compute, local_cache_hit or external_kv_transfer.
    """

    def __init__(self, *script: tuple[str, str], reset=(200, {"success": True})) -> None:
        self.script = list(script)
        self.tokens = {"local_compute": 0, "local_cache_hit": 0, "external_kv_transfer": 0}
        self.salts: list[str] = []
        self.routes = {**ENGINE, "/v1/completions": self.answer, "/metrics": self.metrics, "/reset_prefix_cache": reset}

    def answer(self, handler: EngineHandler) -> None:
        origin, text = self.script.pop(0)
        self.tokens[origin] += 100
        self.salts.append(handler.document["cache_salt"])
        lines = [piece(text, "length"), usage(5, 1), "data: [DONE]"]
        streams(*lines)(handler)

    def metrics(self, handler: EngineHandler) -> None:
        lines = [f'vllm:prompt_tokens_by_source_total{{source="{name}"}} {count}' for name, count in self.tokens.items()]
        lines.append(f"vllm:request_success_total {len(self.salts)}")
        handler.reply(200, "\n".join(lines) + "\n")


COLD, OWN, LOADED = "local_compute", "local_cache_hit", "external_kv_transfer"
NO_RESET = (404, {"detail": "Not Found"})


def verify(engine: Counted, code: int, *words: str):
    with engine_peer(engine.routes) as peer:
        return Cli("").json(*ASK, "--verify", "--url", peer.url, *words, code=code)


@pytest.mark.parametrize(
    ("script", "reset", "reference"),
    [
        ([(COLD, "a"), (OWN, "a"), (LOADED, "a")], (200, {"success": True}), "the engine's own prefix cache"),
        # The order of sums differs between a computation and a cache, whoever's: no fault of ours.
        ([(COLD, "a"), (OWN, "b"), (LOADED, "b")], (200, {"success": True}), "the engine's own prefix cache"),
        ([(COLD, "a"), (LOADED, "a"), (LOADED, "a")], NO_RESET, "a full computation"),
    ],
)
def test_the_same_answer_with_loaded_kv_is_verified(script, reset, reference):
    engine = Counted(*script, reset=reset)
    document = verify(engine, 0)
    assert (document["verdict"], document["compared_with"], document["retrieved_tokens"]) == ("OK", reference, 100)
    assert len(set(engine.salts)) == 1
    assert len(engine.salts[0]) == 16


@pytest.mark.parametrize(
    "script",
    [[(COLD, "a"), (OWN, "ab"), (LOADED, "ac")], [(COLD, "ab"), (LOADED, "ac"), (LOADED, "ac")]],
    ids=["own", "computed"],
)
def test_another_answer_with_loaded_kv_fails(script):
    document = verify(Counted(*script), 1)
    assert (document["verdict"], document["is_same"], document["error"]["code"]) == ("FAIL", False, "mismatch")
    assert "differs from that of" in document["error"]["message"]
    assert document["error"]["message"].endswith("at character 2")


@pytest.mark.parametrize(
    ("script", "reset", "message"),
    [
        ([(COLD, "a")] * 3, (200, {"success": True}), "nothing was retrieved from the cache server"),
        ([(COLD, "a"), (OWN, "a"), (OWN, "a")], NO_RESET, "the engine's own prefix cache answered"),
        ([(OWN, "a"), (OWN, "a"), (LOADED, "a")], (200, {"success": True}), "the first answer was not cold"),
        ([(LOADED, "a"), (LOADED, "a"), (LOADED, "a")], (200, {"success": True}), "the first answer was not cold"),
        ([(COLD, "a"), (COLD, "b"), (COLD, "c")], (200, {"success": True}), "nothing was retrieved from the cache server"),
        ([(COLD, ""), (LOADED, ""), (LOADED, "")], (200, {"success": True}), "the answer is empty"),
    ],
)
def test_answers_that_prove_nothing_are_exit_code_4(script, reset, message):
    document = verify(Counted(*script, reset=reset), 4)
    assert (document["verdict"], document["error"]["code"]) == ("INCONCLUSIVE", "inconclusive")
    assert message in document["error"]["message"]
    assert document["error"]["hint"]


def test_an_engine_that_counts_nothing_is_exit_code_4():
    engine = Counted((COLD, "a"), (COLD, "a"), (COLD, "a"))
    engine.routes["/metrics"] = (404, "")
    assert "it is not known whether anything was retrieved" in verify(engine, 4)["error"]["message"]


def test_a_cache_server_that_was_named_has_the_last_word(server: LmcacheServer):
    engine = Counted((COLD, "a"), (LOADED, "a"), (LOADED, "a"))
    document = verify(engine, 4, "--kvcache-url", server.zmq_url)
    assert document["retrieved_tokens"] == 0
    assert "nothing was retrieved" in document["error"]["message"]


def test_what_the_engine_says_it_loaded_is_waited_for_at_the_server():
    """The engine tells the server without waiting, so the answer may be there before the server has counted."""
    origins = TokenOrigins(engine_cache=0, external=512, computed=10, finished_requests=1)
    seen = [0, 0, 512, 1024]
    found = settled_use(origins, lambda: CacheUse(0, 0, 0, 0, retrieved_tokens=seen.pop(0), has_l2=False, num_engines=1))
    assert (found.retrieved_tokens, seen) == (512, [1024])
    unknown = Unknown("nobody counts")
    assert settled_use(unknown, lambda: found) is found
    assert settled_use(origins, lambda: unknown) is unknown
