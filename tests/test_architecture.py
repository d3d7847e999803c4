"""The arrows of the design, read off the source: who imports whom, one home per library, and what no module may do."""

import ast
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent / "lmcache"
MODULES = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*.py"))

# What each part may import of ours, itself aside. The single-file modules at the top are the core.
ARROWS = {
    "core": set(),
    "client": {"core"},
    "storage": {"core"},
    "transfer": {"core"},
    "server": {"core", "storage"},
    "integration": {"core", "client", "transfer"},
    "cli": {"core", "client"},
    "v1": {"core", "server", "integration", "cli"},
}
# The command line reaches the server and the copiers only from inside a function: a bare `lmcache --help` loads none of them.
LAZY_ARROWS = {
    "cli/commands/server.py": {"server"},
    "cli/base.py": {"server"},  # to name the nearest variable when an unknown one is set
    "cli/paged.py": {"transfer"},  # --device cuda: an engine's path from and to a GPU
    "cli/commands/bench/memory.py": {"transfer"},  # for types
    "cli/commands/query/kvcache.py": {"transfer"},  # for types
}
CORE = {
    "__init__.py",
    "environment.py",
    "errors.py",
    "log.py",
    "keys.py",
    "layout.py",
    "pages.py",
    "pool.py",
    "protocol.py",
    "metrics.py",
    "numerals.py",
    "utils.py",
    "weights.py",
}

HOMES = {
    "zmq": ("client/mq.py", "server/zmq_frontend.py"),
    "fastapi": ("server/http_routes.py",),
    "starlette": (),
    "uvicorn": ("server/http_frontend.py",),
    "prometheus_client": ("metrics.py", "server/http_routes.py", "server/app.py", "cli/"),
    "torch": ("transfer/", "integration/"),
    "triton": ("transfer/",),
    "numpy": ("transfer/", "integration/", "cli/commands/bench/"),
    "vllm": ("integration/", "cli/commands/bench/"),
    "transformers": ("cli/",),
    "httpx": ("cli/",),
    "h11": ("cli/",),
    "redis": ("storage/l2/redis.py",),
    "obstore": ("storage/l2/s3.py",),
    "psutil": (),
    "requests": (),
}
HEAVY = {"torch", "triton", "vllm", "transformers", "fastapi", "uvicorn", "prometheus_client", "numpy", "redis", "obstore"}
# Whole modules that are themselves imported only where their library is wanted.
LOADED_ON_USE = (
    "server/http_routes.py",
    "transfer/",
    "integration/",
    "cli/commands/bench/",
    "storage/l2/redis.py",
    "storage/l2/s3.py",
)
# Loaded by name, when a setting asks for it; what it needs comes with an extra.
OPTIONAL_MODULES = {"storage/l2/redis.py", "storage/l2/s3.py"}

FORBIDDEN_IMPORTS = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "marshal", "shelve", "imp", "code", "pty"}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__", "input", "breakpoint"}
FORBIDDEN_ATTRIBUTES = {
    ("torch", "load"),
    ("os", "system"),
    ("os", "popen"),
    ("numpy", "load"),
    ("np", "load"),
    ("yaml", "load"),
}
WAITS = {"result", "wait", "join", "recv", "acquire", "get", "communicate"}

# Boundaries where anything may be thrown and nobody else could answer for it.
BROAD_EXCEPTS = {
    ("server/service.py", "handle"),  # a handler's bug costs its request an error
    ("server/service.py", "tick"),  # the loop lives on, and health tells
    ("server/service.py", "collect"),  # the same
    ("storage/l2/workers.py", "_run_job"),  # an adapter's bug, or its library's, costs one job
    ("metrics.py", "_export"),  # what fails in the exporter fails no request
    ("client/kvcache.py", "_beat"),  # without it the engine would never have a cache again
    ("client/kvcache.py", "_introduce_and_register"),  # gives the attachment back and raises again
    ("client/kvcache.py", "_introduce"),  # the same
    ("client/kvcache.py", "_call_once"),  # gives the attachment back and raises again
    ("cli/main.py", "_guarded"),  # a bug is one message and an exit code
    ("cli/prompts.py", "load_tokenizer"),  # the tokenizers library raises bare Exception
    ("cli/commands/bench/engine.py", "run_vllm"),  # vLLM's benchmark raises and exits as it likes
    ("integration/vllm/worker.py", "register"),  # an engine that we do not understand serves on without us
    ("integration/vllm/background.py", "_run"),  # vLLM must get back the blocks that wait to be stored
    ("integration/vllm/worker.py", "_begin_load"),  # vLLM must hear which blocks are not filled
    ("integration/vllm/worker.py", "_settle"),  # the same
    ("integration/vllm/worker.py", "_store_job"),  # a store that fails is a chunk that is not there next time
    ("transfer/kernels.py", "_triton_mover_if_it_works"),  # its compiler raises what it likes
    ("integration/vllm/lmcache_mp_connector.py", "_as_a_miss"),  # to the engine, a failing cache is a miss
}
# Waits without a deadline of their own, each with why it ends.
UNTIMED = {
    ("client/kvcache.py", "_call_once", "result"),  # ReplyFuture.result: by the request's deadline
    ("client/kvcache.py", "result", "result"),  # the same
    ("integration/vllm/scheduler.py", "_hit_chunks", "result"),  # PendingLookup.result of one that is settled
    ("integration/vllm/scheduler.py", "_end_lookup", "result"),  # the same
    ("client/kvcache.py", "_on_late_reply", "result"),  # its reply is there
    ("client/mq.py", "call", "result"),  # by the request's deadline
    ("client/mq.py", "_receive", "recv"),  # RCVTIMEO is set right before; further frames are there: ZMQ delivers whole messages
    ("server/zmq_frontend.py", "_receive_rest", "recv"),  # the same
    ("server/zmq_frontend.py", "_receive", "recv"),  # the same
    ("server/zmq_frontend.py", "_next_peer", "recv"),  # RCVTIMEO is set
    ("storage/l2/workers.py", "_run", "get"),  # until `close` puts None
    ("server/log_writer.py", "_run", "get"),  # the same
    ("cli/base.py", "ask", "result"),  # by the request's deadline
    ("cli/commands/describe/watch.py", "describe", "result"),  # Sample.result: a report, no wait
    ("cli/commands/describe/watch.py", "_show", "result"),  # the same
    ("cli/commands/bench/measure.py", "end", "wait"),  # of a process that was killed
}


class Import(NamedTuple):
    """One imported module; `is_lazy` inside a function, or for types only."""

    module: str
    name: str
    is_lazy: bool
    line: int


@cache
def tree_of(module: str) -> ast.Module:
    return ast.parse((ROOT / module).read_text(), module)


def part_of(module: str) -> str:
    """The part that a file, or a dotted name of ours, belongs to."""
    return "core" if module in CORE else module.split("/")[0]


def imports_of(module: str) -> Iterator[Import]:
    def walk(node: ast.AST, is_lazy: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                for alias in child.names:
                    yield Import(alias.name, "", is_lazy, child.lineno)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{module}:{child.lineno}: relative import"
                for alias in child.names:
                    yield Import(child.module or "", alias.name, is_lazy, child.lineno)
            is_function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            is_for_types = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test)
            yield from walk(child, is_lazy or is_function or is_for_types)

    return walk(tree_of(module), False)


def our_file(imported: Import) -> str | None:
    """The file of ours that an import names."""
    if imported.module.split(".")[0] != "lmcache":
        return None
    for dotted in (f"{imported.module}.{imported.name}", imported.module):
        path = dotted.removeprefix("lmcache").strip(".").replace(".", "/")
        for candidate in (f"{path}.py", f"{path}/__init__.py".lstrip("/")):
            if (ROOT / candidate).is_file():
                return candidate
    raise AssertionError(f"line {imported.line}: {imported.module}.{imported.name} is no module of ours")


def functions_of(module: str) -> Iterator[tuple[str, ast.AST]]:
    """Every node with the name of the function it is in."""

    def walk(node: ast.AST, name: str) -> Iterator[tuple[str, ast.AST]]:
        for child in ast.iter_child_nodes(node):
            inner = child.name if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) else name
            yield inner, child
            yield from walk(child, inner)

    return walk(tree_of(module), "")


def test_every_file_belongs_to_a_part_of_the_design():
    assert {part_of(module) for module in MODULES} <= set(ARROWS)
    assert {module for module in MODULES if "/" not in module} <= CORE


@pytest.mark.parametrize("module", MODULES)
def test_imports_follow_the_arrows(module: str):
    part = part_of(module)
    for imported in imports_of(module):
        target = our_file(imported)
        if target is None:
            continue
        allowed = ARROWS[part] | {part} | (LAZY_ARROWS.get(module, set()) if imported.is_lazy else set())
        assert part_of(target) in allowed, f"{module}:{imported.line} imports {target}"


@pytest.mark.parametrize("module", MODULES)
def test_each_library_is_imported_at_its_home_only(module: str):
    for imported in imports_of(module):
        homes = HOMES.get(imported.module.split(".")[0])
        assert homes is None or any(module.startswith(home) for home in homes), f"{module}:{imported.line}: {imported.module}"


@pytest.mark.parametrize("module", [module for module in MODULES if not module.startswith(LOADED_ON_USE)])
def test_heavy_libraries_are_imported_where_they_are_used(module: str):
    for imported in imports_of(module):
        is_heavy = imported.module.split(".")[0] in HEAVY
        assert imported.is_lazy or not is_heavy, f"{module}:{imported.line}: {imported.module} at the top"


@pytest.mark.parametrize("module", MODULES)
def test_nothing_received_can_be_unpickled_or_run(module: str):
    """SEC-2."""
    for imported in imports_of(module):
        assert imported.module.split(".")[0] not in FORBIDDEN_IMPORTS, f"{module}:{imported.line}: {imported.module}"
    for _, node in functions_of(module):
        if not isinstance(node, ast.Call):
            continue
        where = f"{module}:{node.lineno}"
        if isinstance(node.func, ast.Name):
            assert node.func.id not in FORBIDDEN_CALLS, f"{where}: {node.func.id}"
        if isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Name):
            assert (node.func.value.id, node.func.attr) not in FORBIDDEN_ATTRIBUTES, f"{where}: {node.func.attr}"
        for keyword in node.keywords:
            assert not (keyword.arg == "shell" and getattr(keyword.value, "value", True)), f"{where}: a shell"


@pytest.mark.parametrize("module", MODULES)
def test_nothing_runs_in_a_stream_s_callback_and_no_cuda_runtime_is_named(module: str):
    """HNG-2: what needs the GIL in a callback waits for who holds it in a call of the driver. INS-2: the driver's interface is
    stable, a runtime's version is not."""
    source = (ROOT / module).read_text()
    for name in ("HostFunc", "AddCallback", "libcudart", "cudart"):
        assert name not in source, f"{module}: {name}"


@pytest.mark.parametrize("module", MODULES)
def test_no_module_imports_an_optional_one(module: str):
    assert not OPTIONAL_MODULES & {our_file(imported) for imported in imports_of(module)}


def is_broad(handler: ast.ExceptHandler) -> bool:
    if handler.type is None:
        return True
    types = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
    return any(isinstance(kind, ast.Name) and kind.id in ("Exception", "BaseException") for kind in types)


def raises_again(handler: ast.ExceptHandler) -> bool:
    return isinstance(handler.body[-1], ast.Raise) and handler.body[-1].exc is None


@pytest.mark.parametrize("module", MODULES)
def test_errors_are_caught_by_name_except_at_the_boundaries(module: str):
    for function, node in functions_of(module):
        if isinstance(node, ast.ExceptHandler) and is_broad(node) and not raises_again(node):
            assert (module, function) in BROAD_EXCEPTS, f"{module}:{node.lineno} in {function}"


def test_every_boundary_on_the_list_is_there():
    found = {
        (module, function)
        for module in MODULES
        for function, node in functions_of(module)
        if isinstance(node, ast.ExceptHandler) and is_broad(node)
    }
    assert found >= BROAD_EXCEPTS


def untimed_waits(module: str) -> Iterator[tuple[str, str, int]]:
    for function, node in functions_of(module):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        if node.func.attr in WAITS and not node.args and not node.keywords:
            yield function, node.func.attr, node.lineno


@pytest.mark.parametrize("module", MODULES)
def test_every_wait_has_a_deadline(module: str):
    for function, name, line in untimed_waits(module):
        assert (module, function, name) in UNTIMED, f"{module}:{line}: {name}() in {function} waits for ever"


def test_every_reviewed_wait_is_there():
    found = {(module, function, name) for module in MODULES for function, name, _ in untimed_waits(module)}
    assert found >= UNTIMED


@pytest.mark.parametrize("module", MODULES)
def test_no_module_keeps_state_of_its_own(module: str):
    for function, node in functions_of(module):
        assert not isinstance(node, ast.Global), f"{module}:{node.lineno}: global in {function}"


def test_the_core_and_the_server_need_no_optional_library():
    """They are installed with nothing but the dependencies in pyproject.toml."""
    declared = {"fastapi", "httpx", "msgspec", "prometheus_client", "zmq", "uvicorn", "xxhash", "h11"}
    for module in MODULES:
        if part_of(module) in ("core", "client", "storage", "server") and module not in OPTIONAL_MODULES:
            for imported in imports_of(module):
                top = imported.module.split(".")[0]
                assert top in sys.stdlib_module_names | declared | {"lmcache", "__future__"}, f"{module}:{imported.line}: {top}"
