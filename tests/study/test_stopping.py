"""Work that is stopped is stopped in its workers too: none of them goes on in a folder that is somebody else's by then."""

import time
from functools import partial
from pathlib import Path

import pytest

from blockem_tl import Setting
from blockem_tl.study.executors import Job, executor_of


def goes_on(setting: Setting, path: Path, seconds: float) -> str:
    """Write for so long, and clean up."""
    try:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            with path.open("a") as file:
                file.write(".")
            time.sleep(0.01)
    finally:
        path.with_suffix(".cleaned").touch()
    return path.name


@pytest.mark.parametrize("how", ["closed", pytest.param("interrupted", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["local", pytest.param("ray", marks=pytest.mark.slow)])
def test_no_job_goes_on_when_a_run_is_stopped_and_the_next_run_works(name: str, how: str, tmp_path: Path) -> None:
    executor = executor_of(name, Setting.of("organism"), 2)
    try:
        running = executor.run([Job(do=partial(goes_on, path=tmp_path / str(i), seconds=0.2 if i == 0 else 60), seed=0) for i in range(6)])
        assert next(running).value == "0"
        at_work = {"local": {"1", "2"}, "ray": {"1"}}[name]  # Ray gets another job when the first one's result was taken
        while not all((tmp_path / one).exists() for one in at_work):
            time.sleep(0.01)
        if how == "closed":
            running.close()
        else:
            with pytest.raises(KeyboardInterrupt):
                running.throw(KeyboardInterrupt)
        written = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
        time.sleep(0.5)
        assert written == {path.name: path.stat().st_size for path in tmp_path.iterdir()} and set(written) >= {"0"} | at_work
        assert {"3", "4", "5"}.isdisjoint(written)
        if name == "local":
            assert {"1.cleaned", "2.cleaned"} <= set(written)
        (ended,) = executor.run([Job(do=partial(goes_on, path=tmp_path / "again", seconds=0.1), seed=0)])
        assert ended.value == "again" and not ended.error
    finally:
        executor.close()
