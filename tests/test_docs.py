"""The documentation agrees with the code: commands parse, references are up to date, ports, links and names exist."""

import json
import re
import shlex
from dataclasses import fields
from pathlib import Path

import httpx
import pytest

from lmcache import __version__
from lmcache.cli import base
from lmcache.cli.main import command_names, main, parse
from lmcache.integration.vllm.utils import ConnectorConfig
from lmcache.metrics import SPECS, Kind
from lmcache.protocol import DEFAULT_HTTP_PORT, DEFAULT_ZMQ_PORT
from lmcache.server.args import ServerConfig, config_from_args
from scripts import make_reference
from tests.server_process import LmcacheServer

REPOSITORY = Path(__file__).resolve().parents[1]
PAGES = sorted([*REPOSITORY.glob("*.md"), *(REPOSITORY / "docs").glob("*.md")])
ENGINE_PORT = 8000
PORTS = {DEFAULT_ZMQ_PORT, DEFAULT_HTTP_PORT, ENGINE_PORT}

FENCE = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"`(lmcache [^`\n]+)`")
JSON_LIST = re.compile(r'\["lmcache".*?\]')
LINK = re.compile(r"\]\(([^)\s]+)\)")
PORT = re.compile(
    r"(?:localhost|host|127\.0\.0\.1|0\.0\.0\.0|\[::1\]):(\d+)"
    r"|(?:--port|--http-port|--metrics-port|containerPort:|port:) (\d+)"
    r"|(?:ZMQ|HTTP) (?:port )?(?:on |\()(\d+)"
)
SHELL_OPERATORS = {"|", "||", "&", "&&", ";", ">", ">>", "<"}


def name_of(page):
    return str(page.relative_to(REPOSITORY))


def without_made_blocks(text):
    return make_reference.BLOCK.sub("", text)


def commands_in_line(line):
    """The `lmcache ...` commands of one shell line, wherever in it they stand."""
    words = shlex.split(line, comments=True)
    found = []
    for at, word in enumerate(words[:-1]):
        if word.rpartition("/")[2] == "lmcache" and words[at + 1] in [*command_names(), "--version", "--help"]:
            end = next((i for i, w in enumerate(words[at:], at) if w in SHELL_OPERATORS), len(words))
            found.append(words[at + 1 : end])
    return found


def documented_commands(text):
    for language, block in FENCE.findall(text):
        lines = block.splitlines()
        if language == "console":
            lines = [line[2:] for line in lines if line.startswith("$ ")]
        elif language == "ini":
            lines = [line.partition("=")[2] for line in lines]
        elif language == "yaml":
            for found in JSON_LIST.findall(block):
                yield json.loads(found)[1:]
            continue
        for line in lines if language in ("console", "ini", "sh", "bash") else []:
            yield from commands_in_line(line)
    for span in SPAN.findall(text):
        yield from commands_in_line(span.replace("http://...", "http://localhost:8080").replace("...", "x"))


COMMANDS = sorted({(name_of(page), *words) for page in PAGES for words in documented_commands(page.read_text())})


@pytest.mark.parametrize("words", [command[1:] for command in COMMANDS], ids=[" ".join(c) for c in COMMANDS])
def test_documented_command_parses(words, tmp_path):
    words = [str(tmp_path) if before == "--pool-dir" else word for before, word in zip(["", *words], words, strict=False)]
    if words[0] in ("--help", "--version"):
        assert main(words) == 0
        return
    args = parse(words)
    if words[0] == "server":
        config_from_args(args, {})


def test_the_documentation_has_commands_of_every_kind():
    assert len(COMMANDS) > 20
    assert {command[1] for command in COMMANDS} >= {"server", "ping", "describe", "query", "bench", "kvcache"}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_made_parts_of_a_page_are_up_to_date(page):
    text = page.read_text()
    assert make_reference.fill(text) == text, "run python scripts/make_reference.py"


def test_every_made_block_is_on_a_page_and_known():
    on_pages = [name for page in PAGES for _, name, _ in make_reference.BLOCK.findall(page.read_text())]
    assert sorted(on_pages) == sorted(make_reference.BLOCKS)


def test_check_tells_of_a_stale_page(tmp_path, monkeypatch, capsys):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- made: ports -->\nold\n<!-- end -->\nafter\n")
    monkeypatch.setattr(make_reference, "DOCS", tmp_path)
    assert make_reference.update(is_check=True) == 1
    assert "page.md is stale" in capsys.readouterr().err
    assert make_reference.update(is_check=False) == 0
    assert page.read_text().startswith("before\n<!-- made: ports -->\n| What")
    assert page.read_text().endswith("<!-- end -->\nafter\n")
    assert make_reference.update(is_check=True) == 0


def test_every_flag_of_the_server_is_in_the_reference():
    reference = (REPOSITORY / "docs" / "cli.md").read_text()
    config = ServerConfig()
    for name in config.describe():
        flag = "--" + name.replace("_", "-")
        assert re.search(rf"`{flag}[ `]", reference), f"{flag} is missing"


def test_every_variable_that_is_read_is_in_the_reference():
    assert set(make_reference.VARIABLES) == set(base.ENVIRONMENT_VARIABLES)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_ports_are_the_constants(page):
    found = {int(port) for match in PORT.findall(page.read_text()) for port in match if port}
    assert found <= PORTS


def test_ports_are_the_constants_elsewhere_too():
    assert base.DEFAULT_URL.endswith(f":{DEFAULT_ZMQ_PORT}")
    assert base.DEFAULT_ENGINE_URL.endswith(f":{ENGINE_PORT}")
    assert {item.name: item.default for item in fields(ServerConfig().server)}["port"] == DEFAULT_ZMQ_PORT
    assert {item.name: item.default for item in fields(ServerConfig().http)}["http_port"] == DEFAULT_HTTP_PORT


def slug(heading):
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def headings(page):
    text = FENCE.sub("", page.read_text())
    return {slug(heading) for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE)}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    for link in LINK.findall(page.read_text()):
        path, _, anchor = link.partition("#")
        if "://" in link:
            continue
        target = page.parent / path if path else page
        assert target.is_file(), f"{link} does not exist"
        assert not anchor or anchor in headings(target), f"{link} has no such heading"


def test_readme_leads_to_every_page_of_docs():
    readme = (REPOSITORY / "README.md").read_text()
    for page in (REPOSITORY / "docs").glob("*.md"):
        assert f"(docs/{page.name})" in readme, f"README.md has no link to {page.name}"


def test_readme_names_targets_that_the_makefile_has():
    readme = (REPOSITORY / "README.md").read_text()
    makefile = (REPOSITORY / "Makefile").read_text()
    for target in ("demo", "test"):
        assert f"$ make {target} " in readme
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)


def test_changelog_speaks_of_this_version():
    assert f"\n## {__version__}\n" in (REPOSITORY / "CHANGELOG.md").read_text()


def test_documented_keys_of_the_connector_are_read():
    quickstart = (REPOSITORY / "docs" / "quickstart.md").read_text()
    keys = dict(re.findall(r"^\| `(lmcache\.mp\.\w+)` \| `?([^`|]*)`? \|", quickstart, re.MULTILINE))
    assert ConnectorConfig.read({key: value for key, value in keys.items() if value.strip()}) == ConnectorConfig()
    ConnectorConfig.read({key: value.strip() or "tcp://localhost:5555" for key, value in keys.items()})
    for text in re.findall(r"--kv-transfer-config '(.*?)'", quickstart):
        assert json.loads(text)["kv_connector"] == "LMCacheMPConnector"


# -- metrics ---------------------------------------------------------------------------------------


def exported_kinds(metrics_text):
    """Kind by name, without the time stamps that Prometheus's client adds to each counter and histogram."""
    kinds = dict(re.findall(r"^# TYPE (\w+) (\w+)$", metrics_text, re.MULTILINE))
    return {name: kind for name, kind in kinds.items() if not name.endswith("_created")}


def test_reference_of_metrics_has_what_a_server_exports():
    with LmcacheServer() as server:
        exported = exported_kinds(httpx.get(f"{server.http_url}/metrics", timeout=10).text)
    text = (REPOSITORY / "docs" / "metrics.md").read_text()
    documented = dict(re.findall(r"^\| `(lmcache_\w+)` \| (\w+) \|", text, re.MULTILINE))
    assert documented == exported


def test_queries_name_metrics_that_exist():
    text = without_made_blocks((REPOSITORY / "docs" / "metrics.md").read_text())
    known = {spec.exported_name for spec in SPECS}
    known |= {spec.exported_name + "_bucket" for spec in SPECS if spec.kind is Kind.HISTOGRAM}
    used = set(re.findall(r"lmcache_\w+", text))
    assert used <= known
    assert len(used) > 8
