"""`lmcache bench engine`: `vllm bench serve`, and what the cache did meanwhile.

Comes in: our flags, and in `args.rest` those of `vllm bench serve`. Goes out: vLLM's table with one section more, or one JSON
document. Next: `serve.py` runs vLLM's benchmark and calls the `CacheObserver`, which reads counters (`counters.py`), sends what
the figures need besides (`phases.py`), and leaves them to `section.py`.
"""

from __future__ import annotations

import contextlib
import math
import os
import secrets
import statistics
import sys
import time
from argparse import ArgumentTypeError, Namespace
from collections.abc import Iterator, Mapping
from typing import Any

from lmcache.cli.base import DEBUG_VARIABLE, ENGINE_TOKEN_VARIABLE, CommandParser, Url, engine_url, http_url, positive_int
from lmcache.cli.corpora import corpus_option, expand_prompt
from lmcache.errors import LMCacheError, UnreachableError, UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from lmcache.cli.commands.bench.phases import AnswerCheck, Calibration
    from lmcache.cli.commands.bench.section import CacheRun
    from lmcache.cli.commands.bench.serve import ServeBench
    from lmcache.cli.counters import CacheReader, EngineCounters
    from lmcache.cli.engine import Unknown

DEFAULT_VERIFY_PROMPTS = 8
READY_STEP_SECONDS = 0.5
ENDPOINT_FLAGS = ("--base-url", "--host", "--port")
# With these vLLM's flags decide whether the engine is reached at all.
CONNECTION_FLAGS = (*ENDPOINT_FLAGS, "--ready-check-timeout-sec", "--insecure")
DATASET_FLAGS = ("--dataset-name", "--dataset-path")
DESCRIPTION = (
    "Run 'vllm bench serve' against an engine, with all its flags and its output, and add what the KV cache did in this run: "
    "hit rates, bandwidth, tokens by origin, and the TTFT that it saved. The flags of vLLM: --help-vllm."
)


# -- flags --------------------------------------------------------------------------------------------------------------


def add_arguments(parser: CommandParser) -> None:
    """Add our own flags; vLLM's are added when vLLM is there."""
    parser.add_argument(
        "--help-vllm", action="store_true", help="show the flags of vLLM's benchmark, which all work here, and exit"
    )
    prompts = parser.add_argument_group("prompts of your own")
    prompts.add_argument(
        "--prompt",
        action="append",
        metavar="TEXT",
        help="send this instead of a data set; {name} stands for a corpus, '{{' for a brace; several are sent in turn",
    )
    prompts.add_argument("--corpus", type=corpus_option, action="append", metavar="NAME=PATH", help="a corpus of your own")
    cache = parser.add_argument_group("KV cache")
    cache.add_argument(
        "--kvcache-url",
        metavar="URL",
        help="the cache server, for its counters (default: $LMCACHE_URL, then localhost:5555)",
    )
    cache.add_argument(
        "--reset-prefix-cache",
        action="store_true",
        help="empty the engine's own prefix cache before the run, so that hits come from the cache server; "
        "needs VLLM_SERVER_DEV_MODE=1 in the engine's environment",
    )
    cache.add_argument(
        "--cold", action="store_true", help="send all requests with a cache salt of this run: nothing cached before can hit"
    )
    cache.add_argument(
        "--no-estimate", action="store_true", help="send no requests after the run to learn what a computed token costs"
    )
    checking = parser.add_argument_group("checking")
    checking.add_argument(
        "--verify",
        type=positive_int,
        nargs="?",
        const=DEFAULT_VERIFY_PROMPTS,
        metavar="N",
        help="after the run, ask N of the prompts cold and warm and compare the answers; exit code 4 when nothing was loaded "
        f"(default: {DEFAULT_VERIFY_PROMPTS})",
    )
    checking.add_argument("--allow-failures", action="store_true", help="exit with 0 although requests failed")


def engine_address(args: Namespace, vllm_args: Namespace) -> Url:
    """Return where the engine is: `--url`, or vLLM's own flags, or the defaults of every engine command.

    Raises: UsageError
    """
    from lmcache.cli.commands.bench.serve import has_flag

    if not has_flag(args.rest, *ENDPOINT_FLAGS):
        return engine_url(args)
    if args.url is not None:
        raise UsageError(f"--url and {', '.join(ENDPOINT_FLAGS)} both say where the engine is", "pass --url alone")
    if vllm_args.base_url is not None:
        return http_url(vllm_args.base_url)
    host = f"[{vllm_args.host}]" if ":" in vllm_args.host else vllm_args.host
    return http_url(f"http://{host}:{vllm_args.port}")


def check_engine(url: Url, timeout: float, wait: float = 0.0) -> str:
    """Return what the engine's `/health` says against it, if anything; while silent or ill it has `wait` seconds to get well.

    Raises: UnreachableError, LMCacheError.
    """
    from lmcache.cli.http import ENGINE, HttpClient

    give_up_at = time.monotonic() + wait
    while True:
        is_last = time.monotonic() >= give_up_at
        try:
            with HttpClient(url, timeout, ENGINE) as client:
                status = client.send("GET", "/health").status
            if status < 500 or is_last:
                return f"/health of {url} answered HTTP {status}" if status == 404 or status >= 500 else ""
        except LMCacheError as exc:
            if is_last and not has_proxy(url):
                raise
            if is_last:
                return f"{exc.message}: vLLM's requests go through a proxy, those for the engine's counters do not"
        time.sleep(READY_STEP_SECONDS)


def has_proxy(url: Url) -> bool:
    """Whether vLLM's requests to an address go through a proxy that the environment names."""
    from urllib.request import getproxies, proxy_bypass

    return url.text.partition(":")[0] in getproxies() and not proxy_bypass(url.host)


# -- running ------------------------------------------------------------------------------------------------------------


def run(args: Namespace) -> int:
    """Benchmark and report."""
    from lmcache.cli.commands.bench import serve
    from lmcache.cli.counters import CacheReader

    serve.check_installed()
    if args.help_vllm:
        print(serve.make_parser(serve.load(), args.parser.prog).format_help(), end="")
        return 0
    prompts = expand_prompts(args)
    cache = CacheReader(args.kvcache_url, args.timeout)
    cache.check()
    if not serve.has_flag(args.rest, *CONNECTION_FLAGS):
        check_engine(engine_url(args), args.timeout)
    with results_alone_on_stdout(args):
        module = serve.load()
        vllm_args = serve.parse(serve.make_parser(module, args.parser.prog), args.rest, args.parser.options())
        url = engine_address(args, vllm_args)
        url.checks_certificate = not vllm_args.insecure
        if vllm_args.base_url is None:  # else as it was written: --endpoint is appended to it
            vllm_args.base_url = url.text
        vllm_args.disable_tqdm |= args.quiet
        if prompts:
            vllm_args.dataset_name = "custom"
        health = check_engine(url, args.timeout, vllm_args.ready_check_timeout_sec)
        name_model(vllm_args, url, args.timeout)
        observer = CacheObserver(args, vllm_args, url, cache, [health] if health else [])
        observer.prepare(vllm_args.backend)
        table: list[str] | None = [] if args.output is not None and args.format == "text" else None
        salt = secrets.token_hex(8) if args.cold else ""
        bench = serve.ServeBench(module, observer, table_lines=table, prompts=prompts, salt=salt)
        result = run_vllm(bench, vllm_args)
    return report(args, result, observer, table)


def expand_prompts(args: Namespace) -> list[str]:
    """Return the texts of `--prompt`.

    Raises: UsageError
    """
    from lmcache.cli.commands.bench.serve import has_flag

    if args.prompt and has_flag(args.rest, *DATASET_FLAGS):
        raise UsageError("--prompt stands in the place of a data set", f"drop --prompt, or {' and '.join(DATASET_FLAGS)}")
    if args.corpus and not args.prompt:
        raise UsageError("--corpus names a text for --prompt", "add --prompt '{name} ...'")
    return [expand_prompt(template, dict(args.corpus or ())).text for template in args.prompt or ()]


def name_model(vllm_args: Namespace, url: Url, timeout: float) -> None:
    """Fill in the engine's first model where vLLM would ask for it, and could not: it asks without the token.

    Raises: UnreachableError, LMCacheError.
    """
    from lmcache.cli.engine import Unknown, served_models
    from lmcache.cli.http import ENGINE, HttpClient

    headers = getattr(vllm_args, "header", None) or ()
    is_authorized = any(header.partition("=")[0].strip().lower() == "authorization" for header in headers)
    if vllm_args.model is not None or is_authorized or not os.environ.get(ENGINE_TOKEN_VARIABLE):
        return
    with HttpClient(url, timeout, ENGINE) as client:
        models = served_models(client)
    if not isinstance(models, Unknown) and models:
        vllm_args.served_model_name = models[0].id
        vllm_args.model = models[0].root or models[0].id


def meaning_of_hits(args: Namespace, vllm_args: Namespace) -> str:
    """Return what it means when tokens come from a cache, where none should: in a cold run; else nothing."""
    if args.cold:
        return "--cold was given, so the prompts of this run share text with each other"
    is_random = vllm_args.dataset_name in ("random", "random-mm") and not vllm_args.random_prefix_len
    if is_random and not args.reset_prefix_cache:
        return "random prompts share nothing, so these were sent before; for a cold run pass --cold, or another --seed"
    return ""


def run_vllm(bench: ServeBench, vllm_args: Namespace) -> dict[str, Any]:
    """Return vLLM's result, or our error for what it raised.

    Raises: LMCacheError
    """
    try:
        return bench.run(vllm_args)
    except LMCacheError:
        raise
    except (Exception, SystemExit) as exc:  # vLLM's benchmark and its data sets raise and exit as they like
        if os.environ.get(DEBUG_VARIABLE) == "1":
            import traceback

            traceback.print_exc()
        reason = (str(exc).strip() or type(exc).__name__).splitlines()[0]
        if bench.was_entered and vllm_args.ready_check_timeout_sec:
            raise UnreachableError(f"the engine did not get ready: {reason}", "see --ready-check-timeout-sec") from exc
        if bench.was_entered:
            raise LMCacheError(f"vLLM's benchmark stopped: {reason}", f"see why with {DEBUG_VARIABLE}=1", "vllm") from exc
        raise UsageError(f"vLLM's benchmark did not start: {reason}", start_hint(exc, vllm_args), "vllm") from exc


def start_hint(exc: BaseException, vllm_args: Namespace) -> str:
    """Return what to do when vLLM's benchmark refuses to start."""
    from lmcache.cli.commands.bench.serve import INSTALL_HINT

    if isinstance(exc, ImportError):
        return f"{INSTALL_HINT}, or vLLM with its extra 'bench'"
    if isinstance(exc, FileNotFoundError) and vllm_args.dataset_path is not None:
        return "check --dataset-path"
    is_refusal = isinstance(exc, (ValueError, ArgumentTypeError))
    if is_refusal and not any(word in str(exc).lower() for word in ("model", "tokenizer", "repo")):
        return "correct the flag; see --help-vllm"
    return "pass --model, --served-model-name and --tokenizer as the engine has them; see --help-vllm"


def effective_settings(args: Namespace, vllm_args: Namespace, kvcache_url: Url) -> dict[str, Any]:
    """Return vLLM's flags and ours as they took effect, for JSON; of headers, which may hold a key, only the names."""
    found = {name: _plain(value) for name, value in vars(vllm_args).items()}
    if found.get("header"):
        found["header"] = [header.partition("=")[0] + "=..." for header in found["header"]]
    for name in ("prompt", "reset_prefix_cache", "cold", "no_estimate", "verify", "allow_failures", "timeout"):
        found[name] = getattr(args, name)
    return {**found, "corpus": dict(args.corpus or ()), "kvcache_url": kvcache_url.text}


def _plain(value: Any) -> Any:
    """Return the value as JSON has it; what JSON has not, such as an endless rate, as text."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    is_plain = value is None or isinstance(value, (bool, int, str)) or (isinstance(value, float) and math.isfinite(value))
    return value if is_plain else str(value)


def read_version(url: Url, timeout: float) -> str | None:
    """Return the engine's version; None where it does not tell."""
    from lmcache.cli.engine import Unknown, engine_version
    from lmcache.cli.http import ENGINE, HttpClient

    try:
        with HttpClient(url, timeout, ENGINE) as client:
            version = engine_version(client)
    except LMCacheError:
        return None
    return None if isinstance(version, Unknown) else version


@contextlib.contextmanager
def results_alone_on_stdout(args: Namespace) -> Iterator[None]:
    """With `--format json` all that vLLM and its libraries print goes to stderr, with `-q` nowhere.

    By descriptor: loggers keep the stream that they found when they were made.
    """
    if args.format != "json" and not args.quiet:
        yield
        return
    sys.stdout.flush()
    kept = os.dup(1)
    target = os.open(os.devnull, os.O_WRONLY) if args.quiet else os.dup(2)
    os.dup2(target, 1)
    os.close(target)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)


class CacheObserver:
    """Watches one benchmark: reads the counters around it, and makes the section of what they say."""

    def __init__(self, args: Namespace, vllm_args: Namespace, url: Url, cache: CacheReader, notes: list[str]) -> None:
        self._args = args
        self._vllm_args = vllm_args
        self._url = url
        self._cache = cache
        self._meaning_of_hits = meaning_of_hits(args, vllm_args)
        self._engine_version: str | None = None
        self._notes = notes
        self.is_vllm = False
        self.seen: CacheRun | None = None

    def prepare(self, backend: str) -> None:
        """Look at the engine, and refuse what it cannot do before anything is sent.

        Raises: LMCacheError
        """
        from lmcache.cli.commands.bench.serve import SALTED_BACKENDS
        from lmcache.cli.counters import EngineCounters
        from lmcache.cli.engine import reset_prefix_cache

        self.is_vllm = isinstance(self._read_engine(), EngineCounters)
        self._engine_version = read_version(self._url, self._args.timeout)
        if self._args.cold and not (self.is_vllm and backend in SALTED_BACKENDS):
            raise UsageError("--cold needs vLLM, and one of the backends " + ", ".join(SALTED_BACKENDS), "drop --cold")
        if self._args.reset_prefix_cache:
            reset_prefix_cache(self._url, self._args.timeout)

    def starts(self) -> None:
        """Read the counters, with what the warm-up left in the engine's cache removed if so asked."""
        from lmcache.cli.engine import reset_prefix_cache

        if self._args.reset_prefix_cache:
            try:
                reset_prefix_cache(self._url, self._args.timeout)
            except LMCacheError as exc:
                self._notes.append(exc.message)
        self._engine_before = self._read_engine()
        self._cache_before = self._cache.read()

    def ended(self, num_answered: int) -> None:
        """Read the counters again, once the engine has counted the last answers."""
        from lmcache.cli.counters import settled_origins

        self._tokens = settled_origins(self._engine_before, self._read_engine, num_answered)
        self._cache_after = self._cache.read()

    async def after(self, bench: ServeBench, result: Mapping[str, Any]) -> tuple[list[str], dict[str, Any]]:
        """Send what the figures need besides, and return the section's lines and its document."""
        from lmcache.cli.commands.bench import section
        from lmcache.cli.commands.bench.serve import last_line
        from lmcache.cli.counters import cache_use

        good = [sent for sent in bench.sent if sent.output.success]
        ttfts = [sent.output.ttft for sent in good if sent.output.ttft > 0]
        self.seen = section.CacheRun(
            tokens=self._tokens,
            cache=cache_use(self._cache_before, self._cache_after),
            calibration=await self._calibrate(bench),
            check=await self._verify(bench),
            duration=float(result.get("duration", 0.0)),
            num_requests=len(bench.requests),
            answered=len(good),
            short_requests=sum(sent.is_short for sent in bench.sent),
            failed_warm_ups=bench.failed_warm_ups,
            answered_probes=bench.answered_probes,
            mean_ttft=statistics.fmean(ttfts) if ttfts else 0.0,
            first_error=next((last_line(sent.output.error) for sent in bench.sent if not sent.output.success), ""),
            meaning_of_hits=self._meaning_of_hits,
            notes=self._notes,
            circumstances=self._circumstances(),
        )
        return section.lines(self.seen), section.document(self.seen)

    async def _calibrate(self, bench: ServeBench) -> Calibration | Unknown:
        from lmcache.cli.commands.bench.phases import calibrate
        from lmcache.cli.counters import TokenOrigins
        from lmcache.cli.engine import Unknown

        if self._args.no_estimate:
            return Unknown("--no-estimate")
        if not isinstance(self._tokens, TokenOrigins) or not self._tokens.external:
            return Unknown("no token was saved")
        return await calibrate(bench)

    async def _verify(self, bench: ServeBench) -> AnswerCheck | None:
        from lmcache.cli.commands.bench.phases import AnswerCheck, Verifier
        from lmcache.cli.engine import Unknown

        if self._args.verify is None:
            return None
        if isinstance(self._cache_after, Unknown):
            return AnswerCheck(inconclusive_because=self._cache_after.because)
        return await Verifier(bench, self._url, self._args.timeout, self._cache_after.chunk_size).check(self._args.verify)

    def _circumstances(self) -> dict[str, Any]:
        """Return what `bench kvcache` says of a run too: every setting as it took effect, versions and the machine."""
        from lmcache.cli.commands.bench.measure import machine, server_config, versions
        from lmcache.cli.engine import Unknown

        status = None if isinstance(self._cache_before, Unknown) else self._cache_before
        vllm_version = getattr(sys.modules.get("vllm"), "__version__", None)
        return {
            "settings": effective_settings(self._args, self._vllm_args, self._cache.url),
            "versions": {**versions(status.version if status else None), "vllm": vllm_version, "engine": self._engine_version},
            "environment": {**machine(), "server_config": server_config(status.config) if status else None},
        }

    def _read_engine(self) -> EngineCounters | Unknown:
        from lmcache.cli.counters import read_engine

        return read_engine(self._url, self._args.timeout)


# -- report -------------------------------------------------------------------------------------------------------------


def report(args: Namespace, result: dict[str, Any], observer: CacheObserver, table: list[str] | None) -> int:
    """Say what is left to say: vLLM has printed its table; return the exit code."""
    from lmcache.cli.commands.bench import section
    from lmcache.cli.commands.bench.serve import RESULT_KEY
    from lmcache.cli.output import Result, print_error, printable, write
    from lmcache.cli.output import report as report_result

    if observer.seen is None:
        raise LMCacheError("vLLM ended without a benchmark", "use vLLM 0.32 or 0.33", "vllm")
    cache = result.pop(RESULT_KEY)
    failed = observer.seen.num_requests - int(result.get("completed", 0))
    error = section.verdict(observer.seen, failed, args.allow_failures)
    if args.format == "json":
        answer = Result("Bench Engine")
        answer.error = error
        answer.put("benchmark", jsonable(result))
        answer.put(RESULT_KEY, jsonable(cache))
        return report_result(answer, args)
    if table is not None and not args.quiet:
        write("\n".join(table), args.output)
    if not args.quiet:
        for warning in cache["warnings"]:
            print(f"warning: {printable(warning)}", file=sys.stderr)
        if error is not None:
            print_error(error)
    return 0 if error is None else error.exit_code


def jsonable(value: Any) -> Any:
    """Return the value with None for each number that JSON has not."""
    if isinstance(value, dict):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(item) for item in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    return value
