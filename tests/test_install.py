"""What the wheel brings along, and whether it works alone; `make install-test` asks the same of every Python."""

import subprocess
import sys
import zipfile

import pytest

from scripts import check_install


@pytest.mark.parametrize(
    ("name", "member", "told"),
    [
        ("lmcache-1-py3-none-any.whl", "lmcache/pool.py", ""),
        ("lmcache-1-py3-none-any.whl", "lmcache/copy.abi3.so", "not pure Python: lmcache/copy.abi3.so"),
        ("lmcache-1-cp311-cp311-linux_x86_64.whl", "lmcache/pool.py", "not for every Python and machine"),
    ],
)
def test_only_a_wheel_of_pure_python_is_accepted(tmp_path, name, member, told):
    """INS-1."""
    wheel = tmp_path / name
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(member, "")
    if told:
        with pytest.raises(check_install.InstallError, match=told):
            check_install.check_wheel(wheel)
    else:
        check_install.check_wheel(wheel)


@pytest.mark.slow
@pytest.mark.network
def test_the_wheel_installs_and_works_where_nothing_else_is(tmp_path):
    """INS-1. On this Python; 15 seconds."""
    ask_index = [sys.executable, *check_install.PIP, "download", "--quiet", "--no-deps", "--dest", str(tmp_path), "xxhash"]
    if subprocess.run(ask_index, capture_output=True, check=False).returncode:
        pytest.skip("no package index can be reached")
    done = subprocess.run(
        [sys.executable, check_install.__file__, sys.executable], capture_output=True, text=True, timeout=500, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert ": ok, " in done.stdout
