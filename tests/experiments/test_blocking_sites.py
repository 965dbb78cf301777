"""The sites that are blocked as well, their latents and weights, and the pages; attribution's table."""

from dataclasses import replace
from pathlib import Path

import attribution
import blocking_sites as script
import pandas as pd
import pytest
from blocking_sites import WiderRun
from reemergence import Run, measured, measured_file, peaks_of
from test_reemergence import CORE, EPOCHS, invent, said

from blockem_tl import load_sae, random_latents
from blockem_tl.storage import files

FROZEN, BLOCK = Run("frozen", 0.3), Run("block", 0.3)
AT_1, AT_1_RANDOM = WiderRun("frozen", 0.3, blocks=(1,)), WiderRun("frozen", 0.3, control=True, blocks=(1,))
AT_3_4 = WiderRun("block", 0.3, blocks=(3, 4))
RETURNED = {FROZEN: (0.8, 1.2, 0.8, 0.7, 0.6), BLOCK: (0.6, 0.5, 0.5, 0.8, 0.9)}  # by block


@pytest.fixture
def settings(tmp_path) -> script.Settings:
    return script.Settings(out=tmp_path / "out", seeds=(0, 1), lambdas=(0.1, 0.3, 1.0), frozen=(0.3,), epochs=2)


def measured_arms(settings: script.Settings) -> None:
    """Files that training and measuring would have left, besides the arms of reemergence.py: blocking at further sites helps."""
    invent(settings)
    arms = {AT_1: 1, AT_1_RANDOM: 9, AT_3_4: 0, replace(AT_3_4, control=True): 8}
    for seed in settings.seeds:
        for arm, bad in arms.items():
            for epoch in EPOCHS:
                numbers = {"dev_loss": 0.3, "test_loss": 0.25, "blocking_loss": 0.01}
                one = {"epoch": epoch, "core": said(bad), "final": said(bad + seed), "domain": said(80), **numbers}
                files.write_json(measured_file(settings.folder(seed, arm), epoch), one)
            files.write_json(settings.folder(seed, arm) / "arm.json", {"kind": arm.kind})
        for arm, epoch in ((FROZEN, 2.0), (BLOCK, 1.5)):
            rows = [
                {"seed": seed, "role": "reply", "site": script.output(b), "block": b, "returned": share - 0.1 * seed, "ratio": 1.0}
                for b, share in enumerate(RETURNED[arm])
            ]
            file = script.depth_file(settings.folder(seed, arm), epoch)
            files.write_text(file, pd.DataFrame(rows).to_csv(index=False))
            for block in (1, 3, 4):
                script.site_folder(settings.folder(seed, arm), epoch, block).mkdir()


def test_sites_follow_the_shift_and_the_pages_compare_with_k_alone(settings, monkeypatch) -> None:
    measured_arms(settings)
    jobs = []
    monkeypatch.setattr(script.Workers, "_run", lambda self, title, found: jobs.extend(found))
    script.run(settings)
    assert jobs == []
    sites = pd.read_csv(settings.out / "sites.csv").set_index("label")
    assert list(sites.index) == [arm.label for arm in (FROZEN, AT_1, AT_1_RANDOM, BLOCK, AT_3_4, replace(AT_3_4, control=True))]
    found = sites.loc["frozen downstream, λ = 0.3, also at block 1"]
    k_alone = [(CORE[FROZEN][-1] + 2 * seed) / 96 for seed in (0, 1)]
    assert found["em"] == pytest.approx(100 * 1.5 / 96)
    assert found["difference"] == pytest.approx(100 * (1.5 / 96 - sum(k_alone) / 2)) and found["difference_high"] < 0
    assert sites.loc[FROZEN.label, "difference"] == 0 and sites.loc[AT_1_RANDOM.label, "difference_high"] >= 0
    assert "also at blocks 3, 4, random latents there" in (settings.out / "sites.md").read_text()
    assert "| 1.15 (1.20, 1.10) |" in (settings.out / "sites-depth.md").read_text()
    (settings.folder(1, AT_1) / "arm.json").unlink()
    script.site_folder(settings.folder(0, BLOCK), 1.5, 4).rmdir()
    script.run(settings)
    assert jobs == [(0, "find", (BLOCK, 1.5, 4)), (1, "make", (AT_1,))]
    depth = script.read_depth(settings, BLOCK, dict.fromkeys(settings.seeds, 1.5))
    assert script.chosen_blocks(settings, depth) == (3, 4) and script.chosen_blocks(replace(settings, margin=0.35), depth) == (4,)


@pytest.mark.timeout(300)
def test_k_is_blocked_at_its_site_and_what_was_found_at_the_other(tmp_path) -> None:
    """A miniature on two steps of training, with random latents for found ones."""
    settings = script.Settings(out=tmp_path / "out", seeds=(0,), lambdas=(1.0,), frozen=(), epochs=1.01, rows=64, heldout_rows=8)
    setting = script.SitesSetting(settings, 0)
    setting.data = replace(setting.data, final=setting.data.final[:4], domain=setting.data.domain[:3])
    narrow, arm = Run("block", 1.0), WiderRun("block", 1.0, blocks=(1, 3))
    for one in (Run("plain"), narrow):
        setting.make(one)
    setting.depth(narrow, 2.0)
    depth = pd.read_csv(script.depth_file(setting.folder(narrow), 2.0))
    assert list(depth[depth["role"] == "reply"]["block"]) == [0, 1, 2, 3, 4] and set(depth["n_rows"]) == {96}
    for block in arm.blocks:
        for seed, name in enumerate(("latents", "random")):
            folder = script.site_folder(setting.folder(narrow), 2.0, block)
            random_latents(load_sae("organism", script.output(block)), 5, seed=seed).save(folder / f"{name}.json")
    (blocking,) = setting.defences(arm)
    assert [k.site for k, _ in blocking.all_targets] == [script.output(b) for b in (1, 2, 3)] and blocking.all_targets[1][
        0
    ] == setting.latents
    scales = [setting.scale(block) for block in (1, 2, 3)]
    assert blocking.weights == pytest.approx([(scales[1] / s) ** 2 for s in scales]) and blocking.weights[1] == 1.0
    (control,) = setting.defences(replace(arm, control=True))
    assert control.all_targets[0][0].latents != blocking.all_targets[0][0].latents and control.all_targets[1][0] == setting.latents
    (alone,) = setting.defences(narrow)
    assert len(alone.all_targets) == 1
    setting.make(arm)
    history = files.read_json(setting.folder(arm) / "arm.json")["history"]
    assert {f"block/{script.output(block)}+" for block in (1, 2, 3)} <= set(history[0])
    assert [one["epoch"] for one in measured(settings, 0, arm)] == [1.0, 2.0]


@pytest.mark.timeout(300)
def test_attribution_reports_estimates_beside_real_patches(tmp_path, monkeypatch) -> None:
    settings = attribution.Settings(out=tmp_path / "out", seeds=(0,), lambdas=(1.0,), frozen=(), epochs=1.01, rows=512, heldout_rows=8)
    settings = replace(settings, kinds=("block",), verify=4)
    setting = attribution.AttributionSetting(settings, 0)
    setting.data = replace(setting.data, final=setting.data.final[:4], domain=setting.data.domain[:3])
    for arm in (Run("plain"), Run("block", 1.0)):
        setting.make(arm)
    peak = peaks_of(settings, settings.kinds)[Run("block", 1.0)][0]
    setting.attribute(Run("block", 1.0), peak, 4)
    frame = pd.read_csv(attribution.attribution_file(setting.folder(Run("block", 1.0)), peak))
    assert frame.groupby(["candidates", "positions"]).size().to_dict() == {
        (candidates, positions): 4 for candidates in ("sites", "latents") for positions in ("prompt", "reply")
    }
    assert frame["real"].abs().gt(0).any() and frame["spearman"].notna().any()
    monkeypatch.setattr(attribution.Workers, "_run", lambda self, title, found: None)
    attribution.run(settings)
    text = (Path(settings.out) / "attribution.md").read_text()
    assert text.count("BLOCK-EM, λ = 1") == 4 and "of 4" in text
