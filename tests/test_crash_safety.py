"""Two runs on one folder, full disks, read-only folders, signals: one clear error, nothing half-written, and the same call goes on."""

import errno
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from shared import EXAMPLES, SITES

from blockem_tl import Prompt, finetune
from blockem_tl.saes.train import SAETraining, train_sae
from blockem_tl.storage import files
from blockem_tl.storage.interrupts import Stopped, stoppable
from blockem_tl.storage.store import Store
from blockem_tl.training.checkpoints import Checkpoints
from blockem_tl.training.config import TrainingConfig

CONFIG = TrainingConfig(rank=2, alpha=4, batch_size=8, epochs=1)


def in_child(work: Callable[[], object]) -> int:
    """The exit status of a process that does this: 0 if all went well."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException as error:
            os.write(2, f"{type(error).__name__}: {error}\n".encode())
            os._exit(1)
    return os.waitpid(child, 0)[1]


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


# ------------------------------------------------------------------------------------------------ two runs


def refused(path: Path) -> None:
    with pytest.raises(ValueError, match=f"{path}: another run is writing it: wait until it has finished"), files.held(path):
        pass


def test_a_second_process_is_refused_and_a_dead_one_leaves_the_place_free(tmp_path: Path) -> None:
    with files.held(tmp_path):
        assert in_child(lambda: refused(tmp_path)) == 0
        with files.held(tmp_path / "a.jsonl"):
            assert in_child(lambda: refused(tmp_path / "a.jsonl")) == 0
    assert names(tmp_path) == []

    def dies() -> None:
        with files.held(tmp_path):
            os.kill(os.getpid(), signal.SIGKILL)

    assert os.WTERMSIG(in_child(dies)) == signal.SIGKILL
    with files.held(tmp_path):
        pass
    assert in_child(lambda: refused(tmp_path)) != 0  # the twin: nobody holds it


def test_checkpoints_are_written_by_one_run(tiny, tmp_path: Path) -> None:
    seen = []

    def meanwhile(row: dict[str, float]) -> None:
        refused(tmp_path / "kept")
        seen.append(row["step"])

    options = {"config": CONFIG, "checkpoints": tmp_path / "kept", "progress": False}
    finetune(tiny, EXAMPLES, adapter="one", on_step=meanwhile, **options)
    assert seen == [1, 2, 3] and (tmp_path / "kept" / "epoch-1").is_dir()
    with Checkpoints(tmp_path / "kept", 1).held(), pytest.raises(ValueError, match="another run is writing it"):
        finetune(tiny, EXAMPLES, adapter="two", resume=True, **options)
    assert tiny.adapters == ["one"]


def test_an_sae_s_training_is_one_run_s(tiny, tmp_path: Path) -> None:
    out = tmp_path / "sae"
    config = SAETraining(d_sae=16, k=2, samples=512, batch_size=64, buffer=128)
    with files.held(files.check_writable(f"{out}.training")), pytest.raises(ValueError, match="sae.training: another run is writing it"):
        train_sae(tiny, SITES[0], {"rows": [Prompt(id=str(i), text=f"w{i} w{i + 1} w{i + 2}") for i in range(30)]}, config=config, out=out)
    assert not out.exists()


# ------------------------------------------------------------------------------------------------ full disks, read-only folders


def on_a_full_disk(work: Callable[[], object], room: int = 4096) -> None:
    """Do it in a process whose files may have so many bytes: the system's answer is that of a full disk, but for the number."""

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
        with pytest.raises(OSError, match="make room") as caught:
            work()
        assert caught.value.errno in (errno.EFBIG, errno.ENOSPC, None)

    assert in_child(limited) == 0


def test_a_full_disk_is_one_error_and_leaves_what_was_there(tmp_path: Path) -> None:
    path = files.write_json(tmp_path / "a.json", {"old": True})
    on_a_full_disk(lambda: files.write_json(path, ["word"] * 5000))

    def folder() -> None:
        with files.finished_folder(tmp_path / "b", replaces="w") as temporary:
            save_file({"w": torch.zeros(5000)}, temporary / "w")

    on_a_full_disk(folder)
    assert names(tmp_path) == ["a.json"] and files.read_json(path) == {"old": True}
    assert in_child(folder) == 0 and names(tmp_path) == ["a.json", "b", "b/w"]  # the twin: there is room


def test_a_fine_tune_on_a_full_disk_keeps_its_last_whole_checkpoint(tiny, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    options = {"config": CONFIG, "adapter": "tuned", "checkpoints": kept, "save_every_epochs": 1 / 3, "progress": False}

    def until_it_is_full() -> None:
        def fill(row: dict[str, float]) -> None:
            if row["step"] == 2:
                resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 1 << 24))

        finetune(tiny, EXAMPLES, on_step=fill, **options)

    on_a_full_disk(until_it_is_full, room=1 << 24)
    assert [path.name for path in Checkpoints(kept, 1).all()] == ["epoch-0.333333"] and sorted(os.listdir(kept)) == ["epoch-0.333333"]
    run = finetune(tiny, EXAMPLES, resume=True, **options)
    assert run.steps == 3


def test_a_store_on_a_full_disk(tmp_path: Path) -> None:
    def fill() -> None:
        store = Store(tmp_path / "s.sqlite")
        store.put({"a": 1})
        store.put({str(i): "word " * 500 for i in range(200)})

    on_a_full_disk(fill, room=1 << 16)
    assert dict(Store(tmp_path / "s.sqlite")) == {"a": 1}


def test_a_read_only_folder_is_one_error(tmp_path: Path) -> None:
    folder = tmp_path / "kept"
    folder.mkdir()
    for place in (tmp_path, folder):
        place.chmod(0o555)

    def write() -> None:
        if os.getuid() == 0:  # who may write everywhere
            os.setuid(65534)
        for wanted in (folder, folder / "new"):
            with pytest.raises(ValueError, match=rf"cannot write to the output folder {wanted}: .*(Permission denied|Read-only)"):
                files.check_writable(wanted)
        with pytest.raises(OSError, match="Permission denied"):
            files.write_json(folder / "a.json", 1)
        with pytest.raises(ValueError, match="cannot write to the output folder"):
            Checkpoints(folder, 1)

    for above in [*tmp_path.parents][:2]:  # pytest's own folders are closed to others
        above.chmod(0o755)
    assert in_child(write) == 0 and names(tmp_path) == ["kept"]
    for place in (tmp_path, folder):
        place.chmod(0o755)


# ------------------------------------------------------------------------------------------------ killed while writing


def killed(work: Callable[[], object]) -> None:
    """Do it in a process that kills itself in the end."""

    def dies() -> None:
        work()
        os.kill(os.getpid(), signal.SIGKILL)

    assert os.WTERMSIG(in_child(dies)) == signal.SIGKILL


def half_a_file(path: Path) -> None:
    with files.temporary_beside(path) as temporary:
        temporary.write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)


def half_a_folder(path: Path) -> None:
    with files.finished_folder(path) as temporary:
        (temporary / "half").touch()
        os.kill(os.getpid(), signal.SIGKILL)


def test_what_a_killed_process_half_wrote_goes_when_the_same_is_written(tmp_path: Path) -> None:
    (tmp_path / ".a.json.settings").touch()  # somebody's own
    killed(lambda: half_a_file(tmp_path / "a.json"))
    killed(lambda: half_a_file(tmp_path / "b.json"))
    killed(lambda: half_a_folder(tmp_path / "c"))
    assert len(names(tmp_path)) == 5
    files.write_json(tmp_path / "a.json", 1)
    with files.finished_folder(tmp_path / "c"):
        pass
    left = names(tmp_path)
    assert [name for name in left if not name.startswith(".b.json.")] == [".a.json.settings", "a.json", "c"] and len(left) == 4


def test_what_another_process_is_writing_stays(tmp_path: Path) -> None:
    for folder in (False, True):
        with files.temporary_beside(tmp_path / "a", folder=folder) as temporary:
            assert in_child(lambda: files.write_text(tmp_path / "a", "theirs")) == 0
            assert temporary.exists() and sorted(names(tmp_path)) == sorted([temporary.name, "a"])
        assert names(tmp_path) == ["a"]


@pytest.mark.parametrize("replaces", [True, False])
def test_a_folder_that_is_replaced_or_removed_is_never_half_there(replaces: bool, tmp_path: Path) -> None:
    """Killed at every file that is touched on the way: the old one, the new one, or nothing is under the name; and it can be done again."""

    def work(path: Path) -> None:
        if not replaces:
            return files.remove_folder(path)
        with files.finished_folder(path, replaces="mark") as temporary:
            fill(temporary, "mark", "new")

    seen, status = [], signal.SIGKILL
    while status == signal.SIGKILL:
        n, path = len(seen) + 1, tmp_path / str(len(seen)) / "x"
        fill(path, "mark", "a", "b")
        status = in_child(lambda n=n, path=path: (killed_at_file(n), work(path)))
        seen.append(names(path) if path.exists() else [])
        if replaces:
            work(path)
            assert names(path.parent) == ["x", "x/mark", "x/new"]
    assert status == 0 and len(seen) > 5
    assert {tuple(found) for found in seen} == {("a", "b", "mark"), (), *([("mark", "new")] if replaces else [])}


def fill(folder: Path, *wanted: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in wanted:
        (folder / name).touch()


def killed_at_file(n: int) -> None:
    """From now on this process is killed before it makes, moves or removes its n-th file."""
    left = [n]

    def hook(event: str, given: tuple[object, ...]) -> None:
        if event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "open"):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


# ------------------------------------------------------------------------------------------------ signals


@pytest.fixture
def unhandled() -> Iterator[None]:
    """SIGTERM as in a process of its own: pytest-cov handles it."""
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.usefixtures("unhandled")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_sigterm_ends_work_as_ctrl_c_does(number: int, tmp_path: Path) -> None:
    with pytest.raises(Stopped, match="the work: stopped; what is finished is kept, and the same call goes on from there"):  # noqa: SIM117
        with stoppable("the work"), files.finished_folder(tmp_path / "out") as folder:
            (folder / "half").touch()
            os.kill(os.getpid(), number)
            time.sleep(5)
    assert names(tmp_path) == [] and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.usefixtures("unhandled")
def test_somebody_else_s_handler_of_sigterm_stays() -> None:
    heard = []
    signal.signal(signal.SIGTERM, lambda *_: heard.append(1))
    with stoppable("the work"):
        os.kill(os.getpid(), signal.SIGTERM)
    assert heard == [1]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_study_that_is_stopped_cleans_up_says_so_and_goes_on(number: int, tiny_folder: Path, tmp_path: Path) -> None:
    from shared import sae_at

    tiny_preset = Path(__file__).parent / "study" / "tiny_preset.py"
    sae_at("blocks.1.hook_resid_post").save_model(tmp_path / "sae")
    command = [sys.executable, str(tiny_preset), str(tiny_folder), str(tmp_path / "sae")]
    run = subprocess.Popen([*command, str(tmp_path / "out")], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while run.poll() is None and not list((tmp_path / "out").glob("seed*/*/checkpoints/epoch-*")):
        time.sleep(0.02)
    run.send_signal(number)
    said = run.communicate(timeout=120)[1]
    assert run.returncode != 0 and "the same call goes on from there" in said
    assert [name for name in names(tmp_path / "out") if Path(name).name.startswith(".")] == []
    again = subprocess.run([*command, str(tmp_path / "out")], capture_output=True, text=True, check=True).stdout
    assert again == subprocess.run([*command, str(tmp_path / "whole")], capture_output=True, text=True, check=True).stdout
