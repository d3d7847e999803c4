"""Install what the tests of L2 start themselves and PyPI does not have: a Valkey or Redis server, from the distribution.

Where that is impossible, the tests that need it skip with this reason, and all others run.
"""

import os
import shutil
import subprocess
import sys

SERVERS = ("valkey-server", "redis-server")
# The tests start their own; the one that the package would start is not wanted.
ENVIRONMENT = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "RUNLEVEL": "1"}
DEADLINE_SECONDS = 600


def main() -> int:
    problem = None if is_done() else install()
    if problem:
        print(f"warning: no {' or '.join(SERVERS)}, so tests skip: {problem}", file=sys.stderr)
    return 0


def is_done() -> bool:
    """Whether one of the servers is there."""
    return any(shutil.which(server) for server in SERVERS)


def install() -> str | None:
    """Install the first that the distribution has; returns what went wrong, or None."""
    if shutil.which("apt-get") is None:
        return "only apt-get is known to this script; install one of them by hand"
    if os.geteuid() != 0:
        return "only root may install: sudo apt-get install redis-server"
    print(f"installing {' or '.join(SERVERS)} with apt-get", file=sys.stderr)
    if not apt_get("update"):
        print("apt-get update failed; going on with the lists that are there", file=sys.stderr)
    for server in SERVERS:
        if apt_get("install", "--yes", "--no-install-recommends", server) and is_done():
            return None
    return f"apt-get install has neither {' nor '.join(SERVERS)}"


def apt_get(*words: str) -> bool:
    """Whether apt-get did it."""
    command = ["apt-get", "--quiet", "--quiet", *words]
    try:
        done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, check=False, timeout=DEADLINE_SECONDS)
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0


if __name__ == "__main__":
    sys.exit(main())
