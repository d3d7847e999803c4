"""Options and fixtures that the whole test suite shares."""

import signal
from pathlib import Path

import pytest
from hypothesis import settings

from lmcache.client.kvcache import KVCacheClient
from lmcache.client.mq import MessageQueueClient
from tests.fakes import PATIENCE_SECONDS

# Other work shares the machine, so an example may take any time; nothing is kept between runs.
settings.register_profile("lmcache", deadline=None, database=None, max_examples=100)
settings.load_profile("lmcache")

# Where the tests run in the background, the commands that they start would ignore Ctrl-C as they themselves do.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Nor is a call whose deadline is of no interest to its test to fail because the machine is busy.
KVCacheClient.__init__.__kwdefaults__["timeout_seconds"] = PATIENCE_SECONDS
MessageQueueClient.__init__.__defaults__ = (PATIENCE_SECONDS, *MessageQueueClient.__init__.__defaults__[1:])


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--fuzz-seconds",
        type=float,
        default=15.0,
        help="how long the tests under tests/fuzz keep going in all (default: %(default)s)",
    )
    parser.addoption(
        "--chaos-seconds",
        type=float,
        default=0.0,
        help="how long the chaos with a real vLLM goes on; 0, the default, leaves it out",
    )
    parser.addoption(
        "--chaos-class",
        choices=["ours", "later", "built-in"],
        default="ours",
        help="the connector class that vLLM uses in the chaos; later: ours, with copies beside the steps, as on a GPU",
    )
    parser.addoption(
        "--chaos-clients", type=int, default=12, help="how many clients ask at once in the chaos (default: %(default)s)"
    )
    parser.addoption(
        "--soak-seconds", type=float, default=0.0, help="how long engines go on side by side; 0, the default, for a moment"
    )
    parser.addoption("--soak-engines", type=int, default=8, help="how many, where they go on (default: %(default)s)")
    parser.addoption("--chaos-seed", help="draw the prompts and faults of the run that printed this seed (default: a new one)")
    parser.addoption("--fuzz-seed", help="repeat the run that printed this seed (default: a new one)")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What goes on for as long as it is told may take that much longer."""
    for item in items:
        for place, option in {"chaos_vllm/": "--chaos-seconds", "test_soak.py": "--soak-seconds"}.items():
            if place in item.nodeid:
                item.add_marker(pytest.mark.timeout(900 + 2 * config.getoption(option)))


@pytest.fixture(scope="session")
def tiny_tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small tokenizer with a chat template; needs transformers, not torch."""
    from tests.tiny_model import make_tiny_tokenizer

    return make_tiny_tokenizer(tmp_path_factory.mktemp("tiny_tokenizer"))


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random four-layer Llama and its tokenizer; skips where torch is not installed."""
    pytest.importorskip("torch", reason="needs torch: make setup-vllm")
    from tests.tiny_model import make_tiny_model

    return make_tiny_model(tmp_path_factory.mktemp("tiny_model"))
