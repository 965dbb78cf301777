"""`blockem verify`: a study that was not touched is confirmed, and what was altered in it is found and named."""

import json
import os
import re
import shutil
from pathlib import Path

import pandas as pd
import pytest
from safetensors.torch import load_file, save_file

from blockem_tl import Run, Study, cli
from blockem_tl.storage import files, machine
from blockem_tl.study.verify import Verification, verify

ALL = {"sample": 100, "progress": False}


@pytest.fixture(autouse=True)
def quiet(setting, monkeypatch) -> None:
    """The tiny preset is known, and no bars are drawn."""
    monkeypatch.setenv("BLOCKEM_PROGRESS", "0")


@pytest.fixture(scope="session")
def finished(tmp_path_factory) -> Path:
    """Where the study is kept for the tests to copy."""
    return tmp_path_factory.mktemp("finished")


@pytest.fixture
def out(setting, finished, tmp_path) -> Path:
    """A small finished study, with a run that is steered and a checkpoint."""
    if not (finished / "study").exists():
        runs = [Run(defence="base"), Run(), Run(defence="repair", strength=0.5, latents="k"), Run(matched=3.0)]
        with Study(finished / "study", setting, seeds=(0,), progress=False) as study:
            study.train(runs[:2], checkpoints_every=0.5)
            study.latents()
            study.train(runs[2:], checkpoints_every=0.5)
            study.replies("final")
            study.replies("in-domain", study.points([Run()], epochs=[0.5]))
            study.losses()
            study.preferences("core")
            study.step("own", own)
    shutil.copytree(finished / "study", tmp_path / "study")
    return tmp_path


def own(setting, point):
    return [{"x": 1}]


def differing(found: Verification) -> list[str]:
    return [row["what"] for row in found.rows if not row["same"]]


def alter(path: Path, column: str, value: object, row: int = 0) -> None:
    frame = pd.read_parquet(path)
    frame.loc[row, column] = value
    frame.to_parquet(path, index=False)


def test_an_untouched_study_is_confirmed_and_nothing_is_written(out, setting, capsys) -> None:
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    cli.main(["verify", str(out), "--sample", "3"])
    said = capsys.readouterr().out
    assert re.search(r"\d+ compared, 0 differ; same versions and hardware; not looked at: own", said)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()} == before
    found = verify(out, setting, sample=2, progress=False)
    kinds = {row["what"].split(" ")[0].rstrip(",") for row in found.rows}
    assert kinds == {"adapter", "reply", "label", "dev_loss", "test_loss", "train_loss", "steps", "margin", "shift"}
    assert sum(row["what"].startswith("reply") for row in found.rows) == 2 * 5 and found.passed
    other = verify(out, setting, sample=2, seed=1, progress=False)
    assert [row["what"] for row in other.rows] != [row["what"] for row in found.rows]  # another draw


ALTERED = [
    ("replies-final/seed0/plain", "reply", "w1 w2", "reply to final-0, replies-final/seed0/plain"),
    ("replies-final/seed0/base", "label", "3", "label of final-0 by hash, replies-final/seed0/base"),
    ("losses/seed0/*", "dev_loss", 1.0, "dev_loss, losses/seed0/"),
    ("pairs-core/seed0/*", "margin", 9.0, "margin of core-0, pairs-core/seed0/"),
]


def test_altered_values_are_found_and_nothing_else(out, setting, capsys) -> None:
    for place, column, value, _ in ALTERED:
        for path in (out / "study" / "steps").glob(f"{place}.parquet"):
            alter(path, column, value)
    found = differing(verify(out, setting, **ALL))
    for _, _, _, named in ALTERED:
        assert 1 <= sum(what.startswith(named) for what in found) <= 2
    assert all(any(what.startswith(named) for *_, named in ALTERED) or "label" in what for what in found)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["verify", str(out), "--sample", "100"])
    assert stopped.value.code == 1 and "differs" in capsys.readouterr().out


def test_an_altered_adapter_and_altered_shifts_are_found(out, setting) -> None:
    card = out / "study" / "seed0" / "latents" / "k.json"
    kept = json.loads(card.read_text())
    card.write_text(json.dumps({**kept, "shifts": [kept["shifts"][0] * 1.01, *kept["shifts"][1:]]}))
    assert [what.startswith(f"shift of latent {kept['latents'][0]}") for what in differing(verify(out, setting, **ALL))] == [True]
    weights = out / "study" / "seed0" / "plain" / "adapter" / "adapter_model.safetensors"
    tensors = load_file(weights)
    next(iter(tensors.values())).view(-1)[0] += 1e-6
    save_file(tensors, weights)
    assert "adapter of seed0/plain" in differing(verify(out, setting, **ALL))


def test_numbers_within_the_tolerance_are_the_same_and_said(out, setting) -> None:
    for path in (out / "study" / "steps" / "losses").rglob("*.parquet"):
        alter(path, "dev_loss", float(pd.read_parquet(path)["dev_loss"].iloc[0]) * (1 + 1e-6))
    (row,) = (row for row in verify(out, setting, **ALL).rows if row["what"].startswith("dev_loss"))
    assert row["same"] and re.fullmatch(r"differs by \S+ \(within tolerance\)", row["result"])
    assert not verify(out, setting, **ALL, tolerance=1e-8).passed


def test_another_machine_and_version_are_said(out, setting) -> None:
    path = out / "study" / "study.json"
    kept = json.loads(path.read_text())
    assert kept["preset"] == "tiny" and kept["made on"] == [machine.described()]
    kept["made on"][0] |= {"torch": "1.0", "processor": "abacus"}
    path.write_text(json.dumps(kept))
    found = verify(out, setting, sample=1, progress=False)
    assert found.passed and [text.split(" there")[0] for text in found.machine_changed] == ["torch: 1.0", "processor: abacus"]
    path.write_text(json.dumps({name: value for name, value in kept.items() if name != "made on"}))
    for place in (out / "study" / "seed0").glob("*/run.json"):  # as older studies are
        place.write_text(json.dumps({**json.loads(place.read_text()), "environment": files.environment()}))
    assert "same versions, on hardware that the study does not name" in verify(out, setting, sample=1, progress=False).headline()
    path.write_text(json.dumps(kept))
    Study(out / "study", setting, progress=False)  # work goes on here: both machines are named
    assert len(json.loads(path.read_text())["made on"]) == 2


def test_what_cannot_be_verified_is_said(out, setting, tmp_path) -> None:
    study, path = out / "study", out / "study" / "study.json"
    with pytest.raises(ValueError, match="expected the folder of a study"):
        verify(tmp_path / "nowhere", setting)
    kept = json.loads(path.read_text())
    for changes, message in (
        ({"format": "0"}, "another version of blockem_tl"),
        ({"max_new_tokens": "9"}, "max_new_tokens: 9 there, 6 here"),
        ({"made on": 3}, "the file is broken"),
    ):
        path.write_text(json.dumps({**kept, **changes}))
        with pytest.raises(ValueError, match=message):
            verify(out, setting)
    path.write_text(json.dumps({key: value for key, value in kept.items() if key != "preset"}))
    with pytest.raises(SystemExit, match="name it with --preset"):
        cli.main(["verify", str(out)])
    os.rename(study / "seed0" / "plain" / "run.json", study / "seed0" / "plain" / "run.bak")
    with pytest.raises(ValueError, match=r"not finished: seed0/plain\. Run the same study again"):
        verify(out, setting)
    bare = Study(tmp_path / "bare", setting, progress=False)
    with pytest.raises(ValueError, match="nothing was measured"):
        verify(bare.out, setting)


def test_manifests_name_no_place_and_no_user() -> None:
    found = machine.described()
    assert {"python", "torch", "transformers", "transformer-lens", "sae-lens", "peft", "blockem-tl", "processor", "cores", "GPUs"} < set(
        found
    )
    said = json.dumps(found)
    assert str(Path.home()) not in said and os.uname().nodename not in said and "/" not in found["processor"]
    assert machine.changed(found, found) == [] and machine.changed(found, {**found, "cores": "99"}) == [
        f"cores: {found['cores']} there, 99 here"
    ]
