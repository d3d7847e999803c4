"""`vllm bench serve` with hooks: the one module of the command line that imports vLLM.

Comes in: vLLM's own arguments, and an `Observer`. Goes out: vLLM's table on stdout with the observer's lines before its closing
rule, and vLLM's result with the observer's document under `RESULT_KEY`, so that `--save-result` has it too.

Nothing of vLLM is copied. For the time of one call, four globals of `vllm.benchmarks.serve` are replaced (0.32 and 0.33):
`benchmark` is awaited inside ours; `print` tells where the run is and holds the rule back; `ASYNC_REQUEST_FUNCS` lets us see
each request and its output; `get_samples` is replaced where the prompts are ours.
"""

from __future__ import annotations

import builtins
import enum
import importlib
import importlib.util
import json
import math
import os
import secrets
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

from lmcache.cli.base import ENGINE_TOKEN_VARIABLE, CommandParser, did_you_mean
from lmcache.errors import LMCacheError, UsageError

RESULT_KEY = "lmcache"
RULE = "=" * 50
TABLE_TITLE = " Serving Benchmark Result "
RUN_STARTS = "Starting main benchmark run..."
# Backends whose requests may carry vLLM's `cache_salt`.
SALTED_BACKENDS = ("vllm", "openai", "openai-chat")
# Those whose prompts may be token ids.
TOKEN_BACKENDS = ("vllm", "openai")
KEY_VARIABLE = "OPENAI_API_KEY"  # the only place from which vLLM's requests take a key
INSTALL_HINT = "pip install 'lmcache[vllm]'"


# -- vLLM ---------------------------------------------------------------------------------------------------------------


def check_installed() -> None:
    """Return if vLLM can be found; nothing is imported.

    Raises: UsageError that names the extra.
    """
    if importlib.util.find_spec("vllm") is None:
        raise UsageError("bench engine needs vLLM, which is not installed", INSTALL_HINT, "no_vllm")


def load() -> Any:
    """Return vLLM's module; takes 10 to 20 seconds.

    Raises: LMCacheError
    """
    try:
        platforms: Any = importlib.import_module("vllm.platforms")
        if platforms.current_platform.is_unspecified():
            # As the `vllm bench` command does: a benchmark's client needs no device.
            platforms.current_platform = importlib.import_module("vllm.platforms.cpu").CpuPlatform()
        serve = importlib.import_module("vllm.benchmarks.serve")
    except ImportError as exc:
        raise LMCacheError(f"vLLM cannot be imported: {exc}", INSTALL_HINT, "no_vllm") from exc
    missing = [name for name in ("add_cli_args", "main", "benchmark") if not hasattr(serve, name)]
    if missing:
        raise LMCacheError(f"this vLLM's benchmark has no {', '.join(missing)}", "use vLLM 0.32 or 0.33", "no_vllm")
    return serve


def make_parser(serve: Any, prog: str) -> CommandParser:
    """Return the parser of vLLM's flags, which like vLLM's own takes `--num_prompts` for `--num-prompts`."""
    parser = CommandParser(prog=prog, common=False, usage=f"{prog} [FLAGS]", description="The flags of 'vllm bench serve':")
    serve.add_cli_args(parser)
    for name, action in list(parser._option_string_actions.items()):
        parser._option_string_actions.setdefault("--" + name[2:].replace("-", "_"), action)
    return parser


def parse(parser: CommandParser, words: Sequence[str], ours: Sequence[str]) -> Namespace:
    """Return vLLM's Namespace.

    Args:
        ours: our own flags, which may be the ones meant.

    Raises: UsageError
    """
    args, rest = parser.parse_known_args(_undotted(parser, words))
    if rest:
        wrong = [word.partition("=")[0] for word in rest if word.startswith("-")]
        known = [*parser.options(), *ours]
        hint = next(filter(None, (did_you_mean(word, known) for word in wrong)), f"see '{parser.prog} --help-vllm'")
        raise UsageError(f"unrecognized arguments: {' '.join(rest)}", hint)
    del args.parser  # CommandParser's own; vLLM prints the Namespace
    return args  # type: ignore[no-any-return]


def _undotted(parser: CommandParser, words: Sequence[str]) -> list[str]:
    """Return the words with `--flag.key.key value` as `--flag` and a JSON object, as vLLM's own parser reads it.

    A `+` behind the last key adds items to a list; a value that is no JSON is text.

    Raises: UsageError
    """
    plain: list[str] = []
    objects: dict[str, dict[str, Any]] = {}
    left = iter(words)
    for word in left:
        name, is_whole, value = word.partition("=")
        flag, *keys = name.split(".")
        if not keys or flag not in parser._option_string_actions:
            plain.append(word)
            continue
        inner = objects.setdefault("--" + flag[2:].replace("_", "-"), {})
        for key in keys[:-1]:
            if not isinstance(inner.get(key), dict):
                inner[key] = {}
            inner = inner[key]
        text = value if is_whole else next(left, None)
        if text is None:
            raise UsageError(f"argument {name}: expected one argument", f"see '{parser.prog} --help-vllm'")
        last = keys[-1].removesuffix("+")
        before = inner.get(last)
        items = before if isinstance(before, list) else []
        inner[last] = [*items, *text.split(",")] if keys[-1] != last else _json_or_text(text)
    return plain + [word for flag, document in objects.items() for word in (flag, json.dumps(document))]


def _json_or_text(value: str) -> Any:
    try:
        return json.loads(value)
    except ValueError:
        return value


def has_flag(words: Sequence[str], *names: str) -> bool:
    """Tell whether one of vLLM's long flags is among the words."""
    given = {word.partition("=")[0].replace("_", "-") for word in words if word.startswith("--")}
    return not given.isdisjoint(names)


# -- one benchmark ------------------------------------------------------------------------------------------------------


@dataclass
class Sent:
    """One request of the measured run, as vLLM gave it out, and its output."""

    request: Any
    output: Any

    @property
    def is_short(self) -> bool:
        """Whether fewer tokens came than were asked for, although the end of the text was to be ignored."""
        return bool(self.request.ignore_eos and 0 < (self.output.output_tokens or 0) < self.request.output_len)


class Phase(enum.Enum):
    """Where a benchmark is: requests before the run proper are for warming up."""

    WARM_UP = enum.auto()
    RUN = enum.auto()
    AFTER = enum.auto()


class Observer(Protocol):
    """Who watches a benchmark. Nothing is in flight when one of these is called.

    `is_vllm` tells whether the engine takes vLLM's `cache_salt`.
    """

    is_vllm: bool

    def starts(self) -> None:
        """The run proper starts."""

    def ended(self, num_answered: int) -> None:
        """The run proper has ended, with so many answers, vLLM's probes among them."""

    async def after(self, bench: ServeBench, result: Mapping[str, Any]) -> tuple[list[str], dict[str, Any]]:
        """Return the lines to print before the closing rule, and the document for the result."""


class ServeBench:
    """One call of vLLM's benchmark.

    Args:
        table_lines: where the table goes instead of stdout.
        prompts: sent in turn, instead of a data set of vLLM's.
        salt: the `cache_salt` of all requests of the run; those for warming up always have one of their own.
    """

    def __init__(
        self,
        serve: Any,
        observer: Observer,
        *,
        table_lines: list[str] | None = None,
        prompts: Sequence[str] = (),
        salt: str = "",
    ) -> None:
        self._serve = serve
        self._observer = observer
        self._table = Table(table_lines, self._on_line)
        self._prompts = prompts
        self._salts = {Phase.WARM_UP: secrets.token_hex(8), Phase.RUN: salt, Phase.AFTER: ""}
        self.phase = Phase.WARM_UP
        self.sent: list[Sent] = []
        self.failed_warm_ups = 0
        self.answered_probes = 0
        self.was_entered = False
        self._arguments: dict[str, Any] = {}
        self._saw_start = self._saw_end = False

    @property
    def requests(self) -> list[Any]:
        """The data set's requests."""
        return list(self._arguments.get("input_requests", ()))

    @property
    def can_salt(self) -> bool:
        """Whether requests may carry a `cache_salt`."""
        return self._arguments.get("endpoint_type") in SALTED_BACKENDS and self._observer.is_vllm

    @property
    def counts_tokens(self) -> bool:
        """Whether each answer that is whole ends with its usage, as vLLM's answers of text do."""
        return self.can_salt

    @property
    def takes_token_ids(self) -> bool:
        """Whether a prompt may be token ids."""
        return self._arguments.get("endpoint_type") in TOKEN_BACKENDS

    def token_ids(self, prompt: Any) -> list[int] | None:
        """Return a prompt's tokens; None where vLLM has no tokenizer."""
        if isinstance(prompt, list):
            return prompt
        tokenizer = self._arguments.get("tokenizer")
        return None if tokenizer is None else [int(token) for token in tokenizer.encode(prompt)]

    def run(self, args: Namespace) -> dict[str, Any]:
        """Return vLLM's result."""
        replacements: dict[str, Any] = {"benchmark": self._benchmark, "print": self._table.print}
        functions = getattr(self._serve, "ASYNC_REQUEST_FUNCS", None)
        if functions is not None:
            replacements["ASYNC_REQUEST_FUNCS"] = {name: self._watched(function) for name, function in functions.items()}
        if self._prompts:
            replacements["get_samples"] = self._samples
        self._original = self._serve.benchmark
        with engine_key(), replaced(self._serve, replacements):
            return dict(self._serve.main(args))

    async def again(self, requests: Sequence[Any], **changes: Any) -> dict[str, Any]:
        """Send more requests one by one, as the benchmark did and without a word, and return vLLM's figures of them.

        A request of the run goes to the adapter that it had there: vLLM would draw lots again.

        Args:
            changes: of the arguments that vLLM gave to `benchmark`.
        """
        quiet: dict[str, Any] = {
            "num_warmups": 0,
            "ready_check_timeout_sec": 0,
            "disable_tqdm": True,
            "profile": False,
            "max_concurrency": 1,
            "request_rate": math.inf,
            "burstiness": 1.0,
            "ramp_up_strategy": None,
            "self_timed": False,
            "probe_request_rate": 0.0,
            "goodput_config_dict": {},
        }
        if self._arguments.get("lora_modules"):
            quiet |= {"lora_modules": [self._adapter(request) for request in requests], "lora_assignment": "round-robin"}
        arguments = {**self._arguments, **{name: value for name, value in quiet.items() if name in self._arguments}}
        with replaced(self._serve, {"print": lambda *values, **options: None}):
            return dict(await self._original(**{**arguments, "input_requests": list(requests), **changes}))

    def extra_body(self, **fields: Any) -> dict[str, Any]:
        """Return the benchmark's own extra fields of each request, and these."""
        return {**(self._arguments.get("extra_body") or {}), **fields}

    def _adapter(self, request: Any) -> str:
        """Return the LoRA adapter that a request of the run had; the first where it is not known."""
        names = (sent.request.model for sent in self.sent if sent.request.request_id == request.request_id)
        return str(next(names, next(iter(self._arguments["lora_modules"]))))

    async def _benchmark(self, **arguments: Any) -> dict[str, Any]:
        self._arguments = arguments
        self.was_entered = True
        lines: list[str] = []
        if not self._announces_start():
            self._start()
        try:
            result = dict(await self._original(**arguments))
            self._end()
            self.phase = Phase.AFTER
            lines, document = await self._observer.after(self, result)
        finally:
            self._table.release(lines)
        return {**result, RESULT_KEY: document}

    def _announces_start(self) -> bool:
        """Whether this vLLM prints the line that we wait for; else warm-ups cannot be told from the run."""
        return RUN_STARTS in _constants(self._original.__code__)

    def _on_line(self, line: str) -> None:
        if line == RUN_STARTS:
            self._start()
        elif TABLE_TITLE in line:
            self._end()

    def _start(self) -> None:
        if not self._saw_start:
            self._saw_start = True
            self.phase = Phase.RUN
            self._observer.starts()

    def _end(self) -> None:
        if not self._saw_end:
            self._saw_end = True
            self._observer.ended(sum(bool(sent.output.success) for sent in self.sent) + self.answered_probes)

    def _watched(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a request function that salts, and keeps what was sent."""

        async def send(request_func_input: Any, session: Any, pbar: Any = None) -> Any:
            phase, request = self.phase, request_func_input
            if self._salts[phase] and self.can_salt:
                request = replace(request, extra_body={**(request.extra_body or {}), "cache_salt": self._salts[phase]})
            output = await function(request_func_input=request, session=session, pbar=pbar)
            if output.success and self.counts_tokens and not output.output_tokens:
                # vLLM's client looks past an error within a stream, and takes what came before for the answer.
                _fail(output, "the stream ended without usage")
            if phase is Phase.RUN and self._is_probe(request):
                self.answered_probes += bool(output.success)
            elif phase is Phase.RUN:
                self._keep(Sent(request, output))
            elif phase is Phase.WARM_UP and not output.success:
                self.failed_warm_ups += 1
            return output

        return send

    def _is_probe(self, request: Any) -> bool:
        """Whether vLLM sends this beside the data set, whose requests have ids, for figures of its own."""
        return bool(self._arguments.get("probe_request_rate")) and request.request_id is None

    def _keep(self, sent: Sent) -> None:
        if sent.output.success and sent.is_short:
            _fail(sent.output, f"short answer: {sent.output.output_tokens} of {sent.request.output_len} tokens")
        self.sent.append(sent)

    def _samples(self, args: Namespace, tokenizer: Any, **_: Any) -> list[Any]:
        """Return the prompts as vLLM's data sets would; raw text, without a chat template."""
        lengths = [len(tokenizer.encode(prompt)) if tokenizer is not None else 1 for prompt in self._prompts]
        return [
            self._serve.SampleRequest(
                prompt=self._prompts[index % len(self._prompts)],
                prompt_len=lengths[index % len(self._prompts)],
                expected_output_len=args.custom_output_len,
                request_id=f"{args.request_id_prefix}{index}",
            )
            for index in range(args.num_prompts)
        ]


class Table:
    """Stands in for `print` in vLLM's module: holds the table's closing rule back until `release`.

    Args:
        lines: takes the table; None prints it.
        on_line: is told of each line first.
    """

    def __init__(self, lines: list[str] | None, on_line: Callable[[str], None]) -> None:
        self._lines = lines
        self._on_line = on_line
        self._is_inside = False
        self._held: list[Callable[[], None]] | None = None

    def print(self, *values: Any, **options: Any) -> None:
        """Do what `print` does, now or after the release."""
        text = str(values[0]) if len(values) == 1 else ""
        self._on_line(text)
        self._is_inside |= TABLE_TITLE in text
        if self._held is None and self._is_inside and text == RULE:
            self._held = [lambda: self._put(RULE)]
            self._is_inside = False
        elif self._held is not None:
            self._held.append(lambda: builtins.print(*values, **options))
        elif self._is_inside and not options:
            self._put(text)
        else:
            builtins.print(*values, **options)

    def release(self, lines: Sequence[str]) -> None:
        """Put lines before the rule, then the rule and what came after it; without a rule, the lines alone."""
        for line in lines:
            self._put(line)
        for put in self._held or ():
            put()
        self._held = None

    def _put(self, line: str) -> None:
        if self._lines is None:
            builtins.print(line)
        else:
            self._lines.append(line)


@contextmanager
def engine_key() -> Iterator[None]:
    """Give vLLM the token for engines as its key for a while, unless it has a key."""
    token = os.environ.get(ENGINE_TOKEN_VARIABLE, "").strip()
    before = os.environ.get(KEY_VARIABLE)
    if before or not token:
        yield
        return
    os.environ[KEY_VARIABLE] = token
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(KEY_VARIABLE, None)
        else:
            os.environ[KEY_VARIABLE] = before


@contextmanager
def replaced(module: Any, values: Mapping[str, Any]) -> Iterator[None]:
    """Replace globals of a module for a while; one that it did not have shadows a builtin, and goes again."""
    before = {name: vars(module)[name] for name in values if name in vars(module)}
    vars(module).update(values)
    try:
        yield
    finally:
        for name in values:
            del vars(module)[name]
        vars(module).update(before)


def _fail(output: Any, error: str) -> None:
    """Count an answer as failed: what did not do its work shall not lower the percentiles."""
    output.success = False
    output.error = error


def last_line(text: str) -> str:
    """Return the last line: where vLLM gives a traceback, what was raised."""
    return text.strip().rpartition("\n")[2]


def _constants(code: Any) -> tuple[Any, ...]:
    """Return the constants of a function's code; none for what has no such code."""
    return tuple(getattr(code, "co_consts", ()))
