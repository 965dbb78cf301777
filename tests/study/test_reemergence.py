"""Which checkpoint is dissected is decided by the core prompts alone; the rise since epoch 1; sets that nothing is added to; other sites."""

from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from shared import sae_at

from blockem_tl import Point, Run, Setting, random_latents
from blockem_tl.study import controls, reemergence

EPOCHS = (0.5, 1.0, 1.5, 2.0)
PLAIN, LOW, MIDDLE, HIGH = Run(), *(Run(defence="block", strength=weight, latents="k") for weight in (0.1, 0.3, 1.0))
CORE = {  # misaligned replies of 96 at each epoch: λ = 0.1 never blocked, 0.3 comes back most, 1 hardly does
    PLAIN: (50, 60, 62, 60),
    LOW: (40, 45, 60, 90),
    MIDDLE: (2, 6, 30, 29),
    HIGH: (0, 1, 4, 7),
}


def replies(misaligned: dict[Run, tuple[int, ...]] = CORE) -> pd.DataFrame:
    rows = [
        {
            "run": run.label,
            "seed": seed,
            "epoch": epoch,
            "prompt_id": i,
            "label": "5" if i < n else "1",
            "judge": "j",
            "rubric": "misalignment",
        }
        for run, bad in misaligned.items()
        for seed in (0, 1)
        for epoch, n in zip(EPOCHS, bad, strict=True)
        for i in range(96)
    ]
    return pd.DataFrame(rows)


def test_the_run_that_comes_back_most_is_taken_among_those_that_blocked_at_first() -> None:
    found = reemergence.peaks(replies())
    row = found.set_index(["run", "seed"]).loc[(MIDDLE.label, 1)]
    assert (row["first"], row["epoch"], row["worst"]) == (6 / 96, 1.5, 30 / 96)
    assert reemergence.reemerged(found, [LOW, MIDDLE, HIGH], against=PLAIN) == MIDDLE
    assert reemergence.reemerged(found, [LOW], against=PLAIN) == LOW  # none blocked, so all count
    other = reemergence.peaks(replies(CORE | {HIGH: (0, 1, 4, 90)}))
    assert reemergence.reemerged(other, [LOW, MIDDLE, HIGH], against=PLAIN) == HIGH
    equal = reemergence.peaks(replies(CORE | {HIGH: CORE[MIDDLE]}))
    assert reemergence.reemerged(equal, [MIDDLE, HIGH], against=PLAIN) == MIDDLE  # the first of equals
    ends = [Point(run=MIDDLE, seed=seed) for seed in (0, 1)]
    assert [point.epoch for point in reemergence.worst(ends, found)] == [1.5, 1.5]


def test_without_a_checkpoint_at_epoch_1_and_a_later_one_nothing_can_come_back() -> None:
    core = replies()
    for epochs in ([0.5, 1.0], [0.5, 1.5, 2.0]):
        with pytest.raises(ValueError, match=r"expected checkpoints at epoch 1 and after it, got epochs \[0.5"):
            reemergence.peaks(core[core["epoch"].isin(epochs)])


def test_the_rise_is_the_change_since_epoch_1_with_its_interval() -> None:
    found = reemergence.rises(replies()).set_index(["run", "epoch"])
    row = found.loc[(MIDDLE.label, 2.0)]
    assert row["misaligned_rise"] == pytest.approx(23 / 96) and 0 < row["misaligned_rise_low"] < 23 / 96 < row["misaligned_rise_high"]
    assert found.loc[(PLAIN.label, 0.5), "misaligned_rise"] == pytest.approx(-10 / 96)
    assert pd.isna(found.loc[(PLAIN.label, 1.0), "misaligned_rise"])


def test_a_seed_in_which_nothing_came_back_keeps_k(tmp_path: Path) -> None:
    setting = Setting.of("organism")
    point = Point(run=MIDDLE, seed=0, out=tmp_path)
    k = random_latents(setting.sae, 3, seed=0)
    for name in ("k", "same"):
        k.save(point.latents_file(name))
    assert reemergence.extended(setting, point, k="k", epochs={1: 2.0}) == k
    assert reemergence.extended_at_random(setting, point, k="k", beside="same", epochs={0: 2.0}) == k


def test_a_control_of_latents_that_fire_has_no_dead_ones_and_none_of_k(tmp_path: Path) -> None:
    setting = Setting.of("organism")
    point = Point(run=Run(defence="base"), seed=0, out=tmp_path)
    alive = controls.alive(setting, point)
    assert 50 < len(alive) < setting.sae.cfg.d_sae
    k = random_latents(setting.sae, 20, seed=0, among=alive)
    k.save(point.latents_file("k"))
    drawn = controls.random_beside(setting, point, beside="k", firing=True)
    assert len(drawn) == 20 and set(drawn.latents) <= set(alive) - set(k.latents)
    anywhere = controls.random_beside(setting, point, beside="k")
    assert set(anywhere.latents) - set(alive) and not set(anywhere.latents) & set(k.latents)


def test_elsewhere_is_the_same_model_with_another_sae_at_its_site() -> None:
    setting = Setting.of("organism")
    other = setting.elsewhere("organism", "blocks.3.hook_resid_post")
    assert other.site == "blocks.3.hook_resid_post" and other.model is setting.model and other.scale() != setting.scale()
    assert setting.site == "blocks.2.hook_resid_post" and replace(other.preset, sae=setting.preset.sae, site=setting.site) == setting.preset


def test_an_sae_of_another_model_is_refused_elsewhere(tmp_path: Path) -> None:
    sae_at("blocks.1.hook_resid_post").save_model(tmp_path)
    with pytest.raises(ValueError, match="blocks.1.hook_resid_post"):
        Setting.of("organism").elsewhere(str(tmp_path))
