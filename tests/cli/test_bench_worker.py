"""A worker's end of the pipes to `bench kvcache`."""

import os

import msgspec
import pytest

from lmcache.cli.commands.bench.messages import Message, Plan, Waiting
from lmcache.cli.commands.bench.worker import Parent
from lmcache.cli.commands.bench.workload import Workload

PLAN = Plan(
    url="tcp://localhost:1",
    timeout_seconds=1.0,
    inline=False,
    workload=Workload(salt="0" * 16, seed=7, chunk_bytes=4096, chunks_per_prompt=2),
    lane=0,
    num_lanes=1,
    num_prompts=1,
)


@pytest.fixture
def pipes():
    """The worker's `Parent`, where its words are written, and where its messages are read."""
    words_read, words_write = os.pipe()
    messages_read, messages_write = os.pipe()
    yield Parent(words_read, messages_write), words_write, messages_read
    for fd in (words_read, words_write, messages_read, messages_write):
        os.close(fd)


@pytest.mark.parametrize(("word", "may_go"), [(b"go\n", True), (b"stop\n", False)])
@pytest.mark.parametrize("at_once", [True, False])
def test_a_word_that_comes_along_with_the_plan_is_heard(pipes, word, may_go, at_once):
    parent, words, messages = pipes
    line = msgspec.json.encode(PLAN) + b"\n"
    os.write(words, line + word if at_once else line)
    assert parent.receive_plan() == PLAN
    if not at_once:
        os.write(words, word)
    else:
        assert parent.wants_stop is not may_go
    assert parent.wait_for_go() is may_go
    if may_go or not at_once:
        assert msgspec.json.decode(os.read(messages, 1 << 16), type=Message) == Waiting()
