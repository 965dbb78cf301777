"""The local Ray cluster that a study starts is reachable from this machine alone."""

import subprocess
import sys
from importlib.util import find_spec

import pytest

LISTENING = """
import psutil
from blockem_tl import Setting
from blockem_tl.study.executors import RayExecutor

def listening():
    found = set()
    for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:  # not the Ray of the test beside this one
        try:
            found |= {(c.laddr.ip, c.laddr.port) for c in process.net_connections("inet") if c.status == psutil.CONN_LISTEN}
        except (psutil.AccessDenied, psutil.NoSuchProcess):
            continue
    return found

executor = RayExecutor(Setting.of("organism"), 1)
executor._start()
print(*sorted(ip for ip, _ in listening()))
executor.close()
"""


@pytest.mark.slow
@pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed")
@pytest.mark.parametrize("first", ["", "import ray"])
def test_ray_listens_on_loopback(first: str) -> None:
    """In a process of its own: Ray reads once, when it is imported, where it may listen."""
    done = subprocess.run([sys.executable, "-c", first + LISTENING], capture_output=True, text=True, check=True, timeout=200)
    found = done.stdout.split()
    assert len(found) >= 2
    outside = set(found) - {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
    assert bool(outside) == bool(first), found  # the twin: a script that has imported Ray before is on its own
