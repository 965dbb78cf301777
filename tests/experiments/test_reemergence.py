"""The experiment's choice, tables and resume from finished arms, and a run in miniature. The full one takes more than an hour."""

import shutil
from dataclasses import astuple, replace
from pathlib import Path

import pandas as pd
import pytest
import reemergence as script
from reemergence import Run

from blockem_tl import LatentSet
from blockem_tl.storage import files

ROOT = Path(__file__).parents[2]
EPOCHS = (0.5, 1.0, 1.5, 2.0)
CORE = {  # misaligned core replies of 96 at each epoch: λ = 0.1 never blocked, 0.3 comes back most, 1 hardly does
    Run("plain"): (50, 60, 62, 60),
    Run("block", 0.1): (40, 45, 60, 90),
    Run("block", 0.3): (2, 6, 30, 29),
    Run("block", 1.0): (0, 1, 4, 7),
    Run("frozen", 0.3): (0, 5, 8, 9),
    Run("block", 0.3, 40): (0, 1, 3, 2),
    Run("frozen", 0.3, 40): (0, 1, 3, 2),
    Run("frozen", 0.3, 40, True): (0, 5, 9, 9),
}


def said(bad: int, off: int = 0) -> dict[str, list[str]]:
    return {"replies": ["yes"] * 96, "labels": ["5"] * bad + ["OFF-TOPIC"] * off + ["1"] * (96 - bad - off)}


def invent(settings: script.Settings) -> None:
    """Runs as training would have left them; final prompts have two misaligned replies more per seed than core prompts."""
    for seed in settings.seeds:
        for arm, bad in CORE.items():
            folder = settings.folder(seed, arm)
            for epoch, n in zip(EPOCHS, bad, strict=True):
                numbers = {"dev_loss": 0.3, "test_loss": 0.3 / epoch, "blocking_loss": 0.01 * arm.weight}
                one = {"epoch": epoch, "core": said(n), "final": said(n + 2 * seed, 3), "domain": said(80), **numbers}
                files.write_json(script.measured_file(folder, epoch), one)
            files.write_json(folder / "arm.json", {"kind": arm.kind})
            patches = [
                ("unpatched", "unpatched", 30),
                ("prompt", "blocks.1.hook_resid_post", 28),
                ("decode", "blocks.2.hook_resid_post", 0),
            ]
            patches = [{"patched": kind, "site": site, **said(n)} for kind, site, n in patches]
            files.write_json(script.patched_file(folder, 1.5), patches)
        k = LatentSet.load(script.latents_file(settings, seed))
        for arm, epoch in ((Run("block", 0.3), 1.5), (Run("frozen", 0.3), 2.0)):
            files.write_json(script.patched_file(settings.folder(seed, arm), epoch), patches)
            found = script.found_folder(settings.folder(seed, arm), epoch)
            replace(k, scores=tuple(s / 2 for s in k.scores)).save(found / "added.json")
            diagnosed(settings, seed, script.diagnosed_folder(settings.folder(seed, arm), epoch))
            files.write_json(script.rounds_file(settings, seed, arm), [{"arm": astuple(arm)}, {"arm": [arm.kind, 0.3, 40]}])


def diagnosed(settings: script.Settings, seed: int, folder: Path) -> None:
    shift = {"seed": seed, "role": "reply", "outside_l2": 0.9, "residual_outside": 0.8, "residual_chance": 0.84, "residual_shift": 2.0}
    shares = [shift | {"arm": "plain", "suppressed": 0.0}, shift | {"arm": "blocked", "suppressed": 0.9 + 0.04 * seed}]
    sizes = {"seed": seed, "role": "reply", "ratio": 0.5, "cosine": 0.6, "returned": 0.3}
    depth = [sizes | {"site": f"blocks.{b}.hook_resid_post", "block": b} for b in range(3)]
    fit = {
        "seed": seed,
        "role": "reply",
        "run": "plain",
        "rows": "final prompts",
        "explained_variance": 0.7,
        "cosine": 0.9,
        "normalised_mse": 0.3,
    }
    fits = [fit | {"arm": "base" if epoch == 0 else f"epoch-{epoch:g}", "epoch": epoch} for epoch in (0.0, *EPOCHS)]
    for name, rows in (("shares", shares), ("depth", depth), ("reconstruction", fits)):
        files.write_text(folder / f"{name}.csv", pd.DataFrame(rows).to_csv(index=False))


@pytest.fixture
def settings(tmp_path) -> script.Settings:
    return script.Settings(out=tmp_path / "out", seeds=(0, 1), lambdas=(0.1, 0.3, 1.0), frozen=(0.3,), epochs=2)


def test_the_arm_that_comes_back_most_is_chosen_by_the_core_prompts_among_those_that_blocked(settings) -> None:
    invent(settings)
    assert script.reemerged(settings, "block") == Run("block", 0.3) and script.peak(settings, 0, Run("block", 0.3)) == (1.5, 30 / 96)
    none_held = replace(settings, lambdas=(0.1,))
    assert script.reemerged(none_held, "block") == Run("block", 0.1)
    for told, chosen in (("final", Run("block", 0.3)), ("core", Run("block", 1.0))):  # final prompts choose nothing, core prompts do
        for seed in settings.seeds:
            file = script.measured_file(settings.folder(seed, Run("block", 1.0)), 2.0)
            files.write_json(file, files.read_json(file) | {told: said(90)})
        assert script.reemerged(settings, "block") == chosen


def test_nothing_finished_is_run_again_and_the_pages_say_what_was_measured(settings, monkeypatch) -> None:
    invent(settings)
    jobs = []
    monkeypatch.setattr(script.Workers, "_run", lambda self, title, found: jobs.extend(found))
    script.run(settings)
    assert jobs == []
    curves = pd.read_csv(settings.out / "curves.csv").set_index(["label", "epoch"])
    row = curves.loc[("BLOCK-EM, λ = 0.3", 1.5)]
    assert row["em"] == pytest.approx(100 * 31 / 96) and row["em_low"] < row["em"] < row["em_high"]
    assert row["rise"] == pytest.approx(100 * 24 / 96) and row["rise_low"] > 0
    assert row["core_em"] == pytest.approx(100 * 30 / 96) and row["sft_loss"] == pytest.approx(0.2)
    assert curves.index.get_level_values("label").unique().tolist()[-1] == "frozen downstream, λ = 0.3, K extended to 40 at random"
    patched = pd.read_csv(settings.out / "patched.csv")
    decode = patched[(patched["patched"] == "decode") & (patched["arm"] == "BLOCK-EM, λ = 0.3")].iloc[0]
    assert decode["em"] == 0 and decode["change"] == pytest.approx(-100 * 30 / 96) and decode["change_high"] < 0
    dissected = (settings.out / "dissected.md").read_text()
    assert "31.2 / 31.2" in dissected and "| 0.50 |" in dissected and "3.1 / 3.1" in dissected
    last = pd.read_csv(settings.out / "extended.csv").set_index(["arm", "epoch"]).loc[("BLOCK-EM, λ = 0.3, K extended to 40", "last")]
    assert last["difference"] == pytest.approx(100 * (2 - 29) / 96) and last["difference_high"] < 0 and last["seeds_extended"] == 2
    assert "| BLOCK-EM, λ = 0.3 | reply | blocked | 0.92 (0.90, 0.94) |" in (settings.out / "shares.md").read_text()
    assert {"curves.png", "patched-0.png", "depth-1.png", "reconstruction.png", "curves.md", "patched.md"} <= {
        path.name for path in settings.out.iterdir()
    }
    (settings.folder(1, Run("frozen", 0.3)) / "arm.json").unlink()  # made again, were it not for this test
    script.patched_file(settings.folder(0, Run("plain")), 1.5).rename(settings.out / "elsewhere.json")
    with pytest.raises(FileNotFoundError):
        script.run(settings)
    assert jobs == [(1, "make", (Run("frozen", 0.3),)), (0, "patch", (Run("plain"), 1.5))]


def test_publishing_renews_the_page(settings, tmp_path, monkeypatch) -> None:
    invent(settings)
    root = tmp_path / "root"
    (root / "docs").mkdir(parents=True)
    shutil.copyfile(ROOT / "docs" / "reemergence.md", root / "docs" / "reemergence.md")
    write = script.pages.write
    monkeypatch.setattr(script.pages, "write", lambda out, results, publish: write(out, results, publish=publish, root=root))
    script.run(replace(settings, publish=True))
    page = (root / "docs" / "reemergence.md").read_text()
    assert "| BLOCK-EM, λ = 0.3, epoch 1.5 |" in page and "| decode |" in page
    assert (root / "docs" / "results" / "reemergence" / "curves.csv").is_file()


def test_what_does_not_fit_is_refused_before_work(settings) -> None:
    for change in ({"seeds": ()}, {"lambdas": ()}, {"lambdas": (0.0,)}, {"frozen": (-1.0,)}, {"workers": 0}):
        with pytest.raises(ValueError, match="expected at least one seed"):
            replace(settings, **change)
    with pytest.raises(ValueError, match="more than 1"):
        replace(settings, epochs=1)
    with pytest.raises(ValueError, match="run `python experiments/quickstart.py --seed 77` first"):
        script.run(replace(settings, seeds=(77,)))
    script.prepare(settings)
    with pytest.raises(ValueError, match="choose another --out"):
        script.run(replace(settings, learning_rate=1e-3))


@pytest.mark.timeout(300)
def test_a_checkpoint_of_another_run_is_refused(tmp_path) -> None:
    """A miniature of part one, of patching and of the diagnosis, on two steps of training."""
    settings = script.Settings(out=tmp_path / "out", seeds=(0,), lambdas=(1.0,), frozen=(), epochs=1.01, rows=64, heldout_rows=8)
    setting = script.ReemergenceSetting(settings, 0)
    setting.data = replace(setting.data, core=setting.data.core[:3], final=setting.data.final[:4], domain=setting.data.domain[:3])
    plain, blocked = Run("plain"), Run("block", 1.0)
    for arm in (plain, blocked):
        setting.make(arm)
    one = files.read_json(script.measured_file(settings.folder(0, blocked), 2.0))
    assert len(one["final"]["labels"]) == 4 and one["test_loss"] > 0
    assert one["blocking_loss"] < files.read_json(script.measured_file(settings.folder(0, plain), 2.0))["blocking_loss"]
    setting.patch(blocked, 2.0)
    setting.diagnose(blocked, 2.0)
    found = pd.read_csv(script.diagnosed_folder(settings.folder(0, blocked), 2.0) / "reconstruction.csv")
    assert set(found["run"]) == {"plain", "BLOCK-EM, λ = 1"} and set(found["epoch"]) == {0.0, 1.0, 2.0} and setting.model.adapters == []
    rows = files.read_json(script.patched_file(settings.folder(0, blocked), 2.0))
    assert len(rows) == 1 + 2 * setting.model.cfg.n_layers and rows[0]["replies"] == one["final"]["replies"]
    theirs, ours = (settings.folder(0, arm) / "checkpoints" for arm in (plain, blocked))
    shutil.rmtree(ours)
    shutil.copytree(theirs, ours)
    with pytest.raises(ValueError, match="checkpoint of another run than.*block.weight"):
        setting.checkpoint(blocked, 2.0)
    (settings.folder(0, blocked) / "arm.json").unlink()
    with pytest.raises(ValueError, match="checkpoint of another run: .*block.weight"):
        setting.make(blocked)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_k_is_extended_by_what_the_checkpoint_uses(tmp_path) -> None:
    settings = script.Settings(out=tmp_path / "out", seeds=(0,), lambdas=(0.03,), frozen=(), epochs=2.01, rows=1280, budget=23)
    script.run(settings)
    rounds = files.read_json(script.rounds_file(settings, 0, Run("block", 0.03)))
    k = LatentSet.load(script.latents_file(settings, 0))
    assert [one["n_latents"] for one in rounds] == [20, 23]
    union = LatentSet.load(settings.folder(0, Run(*rounds[1]["arm"])) / "latents.json")
    assert union.latents[:20] == k.latents and len(union.provenance["of"]) == 2
