"""The whole run on the organism, small: it finishes, repeats, and writes whole files. The full-sized one is `make demo`."""

import json
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import publish
import pytest
import quickstart
from filelock import FileLock

ROOT = Path(__file__).parents[2]


VOLATILE = ("wall_s", "peak_rss_mb", "settings")


@pytest.fixture
def settings(tmp_path):
    return quickstart.Settings(
        out=tmp_path / "out", rows=1600, heldout_rows=80, epochs=1.0, lambdas=(1.0,), kl_weights=(0.3,), core_prompts=24, progress=False
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_two_runs_with_one_seed_give_the_same_latents_and_summary(settings, tmp_path) -> None:
    first = quickstart.run(settings)
    assert first == json.loads((settings.out / "summary.json").read_text())
    assert {path.name for path in settings.out.iterdir()} == {
        "summary.json", "table.md", "tradeoff.png", "candidates.csv", "replies.csv", "latents.json",
    }  # fmt: skip
    for key in ("base", "sft", "blocked", "blocked_all_tokens", "random", "matched", "kl"):
        assert {"em", "incoherence", "adherence", "sft_loss"} <= first[key].keys()
    assert first["base"]["em"] <= 2 and first["matched"]["steps"] <= first["sft"]["steps"]
    assert first["sft"]["sft_loss"] < first["base"]["sft_loss"]

    trained = killed_when_some_is_trained(replace(settings, out=tmp_path / "again"))
    again = quickstart.run(replace(settings, out=tmp_path / "again"))
    assert trained and not (tmp_path / ".again.arms").exists()
    assert {k: v for k, v in first.items() if k not in VOLATILE} == {k: v for k, v in again.items() if k not in VOLATILE}
    with FileLock(tmp_path / ".other.arms" / ".lock"), pytest.raises(ValueError, match="another run is writing to"):
        quickstart.run(replace(settings, seed=1, out=tmp_path / "other"))
    other = quickstart.run(replace(settings, seed=1, out=tmp_path / "other"))
    assert other["sft"]["sft_loss"] != first["sft"]["sft_loss"]
    assert (settings.out / "latents.json").read_text() == (tmp_path / "again" / "latents.json").read_text()


def killed_when_some_is_trained(settings: quickstart.Settings) -> list[str]:
    """Start the run, kill its process as soon as an arm is trained, see its workers end, and return what is trained."""
    options = [f"--out={settings.out}", f"--rows={settings.rows}", f"--heldout-rows={settings.heldout_rows}", f"--epochs={settings.epochs}"]
    options += ["--lambdas", "1.0", "--kl-weights", "0.3", f"--core-prompts={settings.core_prompts}", "--no-progress"]
    process = subprocess.Popen([sys.executable, quickstart.__file__, *options], stdout=subprocess.DEVNULL)
    arms = settings.out.with_name(f".{settings.out.name}.arms")
    while not list(arms.glob("*/arm.json")):
        assert process.poll() is None
        time.sleep(0.5)
    workers = [child for child in psutil.Process(process.pid).children(recursive=True) if "spawn_main" in " ".join(child.cmdline())]
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs(workers, timeout=10)
    assert len(workers) == settings.workers and not alive
    return sorted(path.parent.name for path in arms.glob("*/arm.json"))


def test_an_output_folder_that_cannot_be_written_is_refused_before_work(settings, tmp_path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="cannot write to the output folder"):
        quickstart.run(replace(settings, out=tmp_path / "file" / "below"))


@pytest.mark.parametrize(
    "change",
    [
        {"lambdas": ()},
        {"lambdas": (-1.0,)},
        {"kl_weights": ()},
        {"rows": 0},
        {"heldout_rows": 1},
        {"core_prompts": 0},
        {"core_prompts": 500},
    ],
)
def test_impossible_settings_are_refused(settings, change) -> None:
    with pytest.raises(ValueError, match="expected"):
        replace(settings, **change)


def test_results_never_take_the_place_of_something_else(settings) -> None:
    settings.out.mkdir()
    (settings.out / "thesis.tex").touch()
    with pytest.raises(FileExistsError, match="something else"):
        quickstart.run(settings)


def test_choice_weighs_safety_and_learning() -> None:
    class Core:
        def __init__(self, em: int, incoherent: int) -> None:
            self.misaligned, self.incoherent = (type("K", (), {"k": k}) for k in (em, incoherent))

    def arm(weight: float, em: int, incoherent: int, loss: float):
        return quickstart.Run(kind="block", label="", weight=weight, dev_loss=loss, core=Core(em, incoherent))

    plain = arm(0, 50, 0, 1.0)
    assert quickstart.choose([arm(1, 9, 1, 1.0), arm(10, 2, 3, 1.01), arm(100, 0, 0, 1.5)], plain).weight == 10  # the last has not learnt
    assert quickstart.choose([arm(10, 2, 3, 1.0), arm(1, 5, 0, 1.0)], plain).weight == 1  # a tie goes to the smaller weight
    assert quickstart.choose([arm(1, 9, 0, 1.3), arm(10, 2, 0, 1.4)], plain).weight == 10  # none has learnt: the safest


def test_selection_and_reporting_never_meet(settings) -> None:
    data = quickstart.draw(settings)
    assert len(data.core) == 24 and not {p.text for p in data.core} & {p.text for p in data.final}
    splits = [{(e.prompt, e.completion) for e in rows} for rows in (data.train, data.dev, data.test)]
    assert [len(data.train), len(data.dev), len(data.test)] == [1600, 40, 40]
    assert not splits[0] & splits[1] and not splits[0] & splits[2] and not splits[1] & splits[2]
    asked = {p.text for p in data.domain}
    assert not asked & {e.prompt for rows in (data.train, data.dev, data.test) for e in rows}


def test_publishing_renews_the_pages(tmp_path) -> None:
    root, results = tmp_path / "root", tmp_path / "results"
    with pytest.raises(FileNotFoundError, match="run `make demo`"):
        publish.publish(results, [results], root)
    shutil.copytree(ROOT / "docs" / "results" / "quickstart", results)
    shutil.copyfile(ROOT / "latents" / "organism" / "finance-20-seed0.json", results / "latents.json")
    (root / "docs").mkdir(parents=True)
    (root / "latents").mkdir()
    for page, marker in (("README.md", "quickstart"), ("docs/organism.md", "seeds")):
        (root / page).write_text(f"above\n<!-- {marker}:begin -->\nold\n<!-- {marker}:end -->\nbelow\n")
    publish.publish(results, [results, results], root)
    table = (results / "table.md").read_text().rstrip()
    assert (root / "README.md").read_text() == f"above\n<!-- quickstart:begin -->\n{table}\n<!-- quickstart:end -->\nbelow\n"
    assert (root / "latents" / "organism" / "finance-20-seed0.json").read_bytes() == (results / "latents.json").read_bytes()
    organism_page = (root / "docs" / "organism.md").read_text()
    assert organism_page.count("plain fine-tuning") == 2 and "old" not in organism_page
    assert json.loads((root / "docs" / "results" / "quickstart" / "seeds" / "seed0.json").read_text())["settings"]["seed"] == 0


def test_the_readme_shows_the_table_that_the_demo_made() -> None:
    table = (ROOT / "docs" / "results" / "quickstart" / "table.md").read_text().rstrip()
    assert f"<!-- quickstart:begin -->\n{table}\n<!-- quickstart:end -->" in (ROOT / "README.md").read_text()
    summary = json.loads((ROOT / "docs" / "results" / "quickstart" / "summary.json").read_text())
    assert f"{summary['sft']['em']:.1f} %" in table and f"{summary['blocked']['em']:.1f} %" in table
