"""`make install-test`: does what we publish install and work where nothing else is, on each Python that it is for?

    python scripts/check_install.py [PYTHON...]

Builds the wheel, which must be pure Python. Then, for each Python that is named, or each of VERSIONS that is found on the path
or in pyenv: installs it without extras into an environment of its own, where no package of UNWANTED may come along, starts
the server, and asks it with the installed command. Needs a package index; 10 to 15 seconds a Python. Exits with 0 only if all
is well on all of them.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from tests.server_process import LmcacheServer, clean_environment  # noqa: E402

VERSIONS = ("3.10", "3.11", "3.12", "3.13")
# By how their names begin. The server and the command need no GPU, and no tensor.
UNWANTED = ("torch", "triton", "nvidia", "cuda", "cupy", "numpy", "vllm", "transformers")
# Nothing of the surroundings may stand in for what was not installed.
ALONE = {"PYTHONPATH": "", "PYTHONNOUSERSITE": "1"}
PIP = ("-m", "pip", "--disable-pip-version-check")
LIMIT_SECONDS = 600
PROBE = "import ensurepip, sys, venv; print('%d.%d' % sys.version_info[:2])"


class InstallError(Exception):
    """What was installed is not as it should be, or could not be installed."""


def main() -> int:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # who ends this also ends its server
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("pythons", nargs="*", metavar="PYTHON", help="interpreters (default: all that are found)")
    pythons = parser.parse_args().pythons or list(find_pythons())
    with tempfile.TemporaryDirectory(prefix="lmcache-install-") as folder:
        try:
            wheel = build_wheel(Path(folder))
            check_wheel(wheel)
        except InstallError as exc:
            print(f"The wheel: {exc}")
            return 1
        print(f"{wheel.name}: {wheel.stat().st_size >> 10} KiB, pure Python")
        results = [report(python, wheel, Path(folder) / f"environment-{index}") for index, python in enumerate(pythons)]
    return 0 if results and all(results) else 1


def find_pythons() -> Iterator[str]:
    """Yield one interpreter that can make environments for each of VERSIONS; says which there are none of."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    for version in VERSIONS:
        found = [shutil.which(f"python{version}"), *map(str, sorted(pyenv.glob(f"versions/{version}.*/bin/python")))]
        python = next((path for path in found if path and _is_python(path, version)), None)
        if python:
            yield python
        else:
            print(f"Python {version}: not found")


def _is_python(path: str, version: str) -> bool:
    """Whether it starts: pyenv's own commands do so only for versions that were chosen."""
    done = subprocess.run([path, "-c", PROBE], capture_output=True, text=True, check=False)
    return done.stdout.strip() == version


def report(python: str, wheel: Path, folder: Path) -> bool:
    """Print what came of one Python; tell whether all is well."""
    started_at = time.monotonic()
    try:
        packages = install(python, wheel, folder)
        use(folder / "bin" / "lmcache", wheel.name.split("-")[1])
    except (InstallError, RuntimeError, AssertionError) as exc:  # the latter two: of the server
        print(f"{python}: {exc}", flush=True)
        return False
    print(f"{python}: ok, {len(packages)} packages, {time.monotonic() - started_at:.0f} s", flush=True)
    return True


# -- steps --------------------------------------------------------------------------------------------------------------


def build_wheel(folder: Path) -> Path:
    """Return the wheel of the working tree, built in an environment of its own."""
    _run([sys.executable, *PIP, "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(REPOSITORY)])
    (wheel,) = folder.glob("*.whl")
    return wheel


def check_wheel(wheel: Path) -> None:
    """Return if it is for every machine, and has nothing that a machine executes."""
    if not wheel.name.endswith("-py3-none-any.whl"):
        raise InstallError(f"{wheel.name} is not for every Python and machine")
    with zipfile.ZipFile(wheel) as archive:
        native = [name for name in archive.namelist() if Path(name).suffix in (".so", ".pyd", ".dylib", ".a", ".o")]
    if native:
        raise InstallError(f"{wheel.name} is not pure Python: {', '.join(native)}")


def install(python: str, wheel: Path, folder: Path) -> list[str]:
    """Return the names of the packages that an environment made in `folder` has, once the wheel is installed there."""
    _run([python, "-m", "venv", str(folder)])
    own = str(folder / "bin" / "python")
    _run([own, *PIP, "install", "--quiet", "--no-compile", str(wheel)])
    _run([own, *PIP, "check"])
    names = sorted(package["name"].lower() for package in json.loads(_run([own, *PIP, "list", "--format", "json"])))
    unwanted = [name for name in names if name.startswith(UNWANTED)]
    if unwanted:
        raise InstallError(f"without extras it installs {', '.join(unwanted)}")
    return names


def use(command: Path, version: str) -> None:
    """Return if the installed command and its server work together, over both protocols."""
    said = _run([str(command), "--version"]).strip()
    if said != f"lmcache {version}":
        raise InstallError(f"lmcache --version says {said!r}, the wheel is of {version}")
    with LmcacheServer(env=ALONE, command=[str(command)]) as server:
        for url in (server.zmq_url, server.http_url):
            _run([str(command), "ping", "kvcache", "--url", url])
        _run([str(command), "query", "kvcache", "--round-trip", "--url", server.zmq_url])
        _run([str(command), "bench", "kvcache", "--verify-only", "--working-set", "16MiB", "--url", server.zmq_url])


def _run(command: Sequence[str]) -> str:
    """Return what it printed.

    Raises: InstallError with all of that when it fails.
    """
    done = subprocess.run(
        command,
        env={**clean_environment(), **ALONE},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=LIMIT_SECONDS,
        check=False,
    )
    if done.returncode:
        raise InstallError(f"'{' '.join(command)}' ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout


if __name__ == "__main__":
    sys.exit(main())
