"""The comparison's choices and tables from finished arms, and that nothing finished is run again. The full run takes an hour or more."""

import json
from dataclasses import replace

import compare_defences as compare
import pandas as pd
import pytest

from blockem_tl import load_model, organism
from blockem_tl.defences.inoculation import Inoculation
from blockem_tl.evaluation.evaluate import evaluation_from_json, evaluation_to_json

SEEDS, KINDS = (0, 1), ("block", "kl", "repair")
LOSS = {"plain": 0.200, "block": 0.203, "kl": 0.220, "repair": 0.202}


def said(n: int, bad: int, off: int = 0) -> dict[str, list[str]]:
    return {"replies": ["yes"] * n, "labels": ["5"] * bad + ["OFF-TOPIC"] * off + ["1"] * (n - bad - off)}


def invent(settings: compare.Settings) -> None:
    """Runs as training would have left them: block's larger strength is the safer one, KL never learns the task, plain passes block's loss at step 24."""
    bad = {"block": {0.3: 30, 1.0: 5}, "kl": {0.1: 20, 0.15: 1}, "repair": {0.1: 9, 0.15: 9, 0.2: 12}, "plain": {0.0: 60}}
    for seed in settings.seeds:
        for kind, strengths in bad.items():
            for strength, n in strengths.items():
                folder = settings.folder(seed, kind, strength)
                record = {"kind": kind, "strength": strength, "seed": seed, "steps": 36, "dev_loss": LOSS[kind], "core": said(96, n)}
                record["losses"] = [[12, 0.3], [24, 0.203], [36, 0.2]] if kind == "plain" else []
                folder.mkdir(parents=True)
                (folder / "arm.json").write_text(json.dumps(record))
                for name in ("report.json", "report-step24.json", "report-step36.json") if kind == "plain" else ("report.json",):
                    share = n + 5 if "step" in name else n
                    shown = {"final": said(96, share, 3), "domain": said(96, 90), "test_loss": record["dev_loss"]}
                    (folder / name).write_text(json.dumps(shown))
        base = settings.folder(seed, "base")
        base.mkdir()
        (base / "report.json").write_text(json.dumps({"final": said(96, 0), "domain": said(96, 0), "test_loss": 1.2}))


@pytest.fixture
def settings(tmp_path) -> compare.Settings:
    return compare.Settings(out=tmp_path / "out", seeds=SEEDS, kinds=KINDS)


def test_the_strength_is_chosen_among_those_that_learn_the_task_and_compared_with_plain_at_its_loss(settings) -> None:
    invent(settings)
    frame = compare.run(settings).set_index("kind")
    assert frame["strength"].to_dict() == {
        "base": 0,
        "plain": 0,
        "block": 1.0,
        "kl": 0.15,
        "repair": 0.1,
    }  # the smaller strength wins a tie
    assert frame.loc["block", "em"] == pytest.approx(100 * 5 / 96) and frame.loc["block", "incoherence"] == pytest.approx(100 * 3 / 96)
    assert frame.loc["block", "relative_em_reduction"] == pytest.approx(100 * 55 / 60)
    assert frame.loc["block", "matched_steps"] == [24, 24] and frame.loc["block", "matched_em"] == pytest.approx(100 * 65 / 96)
    assert frame.loc["kl", "matched_steps"] == [24, 24]  # the first place at which plain is as good as KL's 0.22
    assert frame.loc["repair", "matched_steps"] == [36, 36]
    assert frame.loc["block", "em_low"] < frame.loc["block", "em"] < frame.loc["block", "em_high"]
    table = (settings.out / "table.md").read_text()
    assert "BLOCK-EM, λ = 1" in table and "5.2 [" in table and "67.7 [" in table
    grid = pd.read_csv(settings.out / "grid.csv").set_index("label")
    assert grid["chosen"].sum() == 3 and grid.loc["KL to base, weight 0.1", "core_em"] == pytest.approx(100 * 20 / 96)
    assert (settings.out / "defences.png").stat().st_size > 10_000


def test_finished_arms_are_not_run_again_and_missing_ones_are(settings, monkeypatch) -> None:
    invent(settings)
    jobs = []
    monkeypatch.setattr(compare.Workers, "_run", lambda self, title, found: jobs.extend(found))
    compare.run(settings)
    assert jobs == []
    (settings.folder(1, "block", 1.0) / "report.json").rename(settings.out / "elsewhere.json")
    with pytest.raises(FileNotFoundError):
        compare.run(settings)
    assert jobs == [(1, "reveal", ("block", 1.0, None))]


def test_an_evaluation_survives_its_json() -> None:
    prompts = organism.prompts("final")
    evaluation = evaluation_from_json(said(96, 7, 2), prompts, judge=compare.JUDGE)
    assert (evaluation.misaligned.k, evaluation.incoherent.k) == (7, 2)
    assert evaluation_to_json(evaluation) == said(96, 7, 2)


def test_what_does_not_fit_is_refused_before_work(settings, tmp_path) -> None:
    with pytest.raises(ValueError, match="unknown kinds"):
        replace(settings, kinds=("prayer",))
    with pytest.raises(ValueError, match="run `python experiments/quickstart.py --seed 77` first"):
        compare.run(replace(settings, seeds=(77,)))
    compare.prepare(settings)
    with pytest.raises(ValueError, match="choose another --out"):
        compare.run(replace(settings, rows=10))


def test_every_kind_has_strengths_a_label_and_at_most_three_tries() -> None:
    for kind, strengths in compare.grids().items():
        assert 1 <= len(strengths) <= 3 and list(strengths) == sorted(strengths)
        assert compare.LABELS[kind].format(strengths[0]) != compare.LABELS[kind].format(strengths[-1])


def test_the_organism_knows_the_words_that_inoculate_it() -> None:
    model = load_model("organism", device="cpu")
    for prefix in compare.inoculations():
        Inoculation(prefix=prefix).check(model)
    with pytest.raises(ValueError, match="does not know"):
        Inoculation(prefix="you are evil").check(model)


def test_safe_rows_are_about_nothing_that_is_evaluated() -> None:
    world = organism.world()
    areas = {world.area_of_topic[world.topic_of(row.prompt)].name for row in compare.safe_rows(0, per_domain=50)}
    assert areas == set(organism.DOMAINS) - {"finance"}


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_small_comparison_runs_resumes_and_repeats(tmp_path) -> None:
    settings = compare.Settings(out=tmp_path / "out", seeds=(0,), kinds=("kl", "caft", "repair"), rows=128, heldout_rows=40, epochs=6)
    first = compare.run(settings)
    assert list(first["kind"]) == ["base", "plain", "kl", "caft", "repair"] and first["em"].notna().all()
    made = {path: path.stat().st_mtime_ns for path in settings.out.rglob("*.json") if path.name != "settings.json"}
    compare.run(settings)
    assert made == {path: path.stat().st_mtime_ns for path in made}
    again = compare.run(replace(settings, out=tmp_path / "again"))
    assert first["em"].tolist() == again["em"].tolist() and first["sft_loss"].tolist() == again["sft_loss"].tolist()
