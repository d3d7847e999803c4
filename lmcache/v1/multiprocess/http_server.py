"""`python -m lmcache.v1.multiprocess.http_server FLAGS` is `lmcache server FLAGS`."""

import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the server in the foreground; return its exit code."""
    from lmcache.cli.main import main as run

    return run(["server", *(sys.argv[1:] if arguments is None else arguments)])


if __name__ == "__main__":
    sys.exit(main())
