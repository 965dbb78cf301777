"""A study trains and measures each point once, goes on where it was broken off, and says what is wrong before anything runs."""

import os
import pickle
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tiny_preset

import blockem_tl.study.executors as executors
from blockem_tl import LatentSet, Page, Point, Run, Setting, Study, StudyFailed, over_domains, random_latents, rates
from blockem_tl.evaluation.statistics import clustered_rate, paired_difference, paired_reduction, share_removed
from blockem_tl.storage import files
from blockem_tl.study import preferences
from blockem_tl.study.defences import made
from blockem_tl.study.inputs import INPUTS
from blockem_tl.study.jobs import Matched
from blockem_tl.study.page import cells
from blockem_tl.study.summary import choose, unsafe
from blockem_tl.training.loss import mean_penalty

asked: list[str] = []


def count_weights(setting: Setting, point: Point, scale: float = 1.0) -> list[dict[str, float]]:
    """A step that remembers at which points it was."""
    asked.append(point.key)
    with setting.model.using(point.adapter):
        return [{"moved": scale * len(setting.rows())}]


def count_prompts(setting: Setting, point: Point, split: str = "core") -> list[dict[str, int]]:
    return [{"n": len(setting.prompts(split))}]


def fails_on_seed_1(setting: Setting, point: Point) -> list[dict[str, int]]:
    asked.append(point.key)
    if point.seed == 1 and not (point.out / "mended").exists():
        raise RuntimeError("no luck")
    return [{"x": point.seed}]


# ------------------------------------------------------------------------------------------------ runs and points


def test_a_run_is_hashable_and_names_its_folder_and_label() -> None:
    run = Run(defence="block", strength=1, latents="k", overrides={"up_to_block": 2, "positions": "all"})
    assert run == Run(defence="block", strength=1.0, latents="k", overrides=(("positions", "all"), ("up_to_block", 2)))
    assert len({run, pickle.loads(pickle.dumps(run)), Run()}) == 2
    assert run.label == "blocked, λ = 1, k, positions = all, up_to_block = 2"
    assert run.folder == "block-1-k-positions=all-up_to_block=2" and Run().folder == "plain"
    assert run.training == {"up_to_block": 2} and run.arguments == {"positions": "all"}
    assert replace(run, name="mine").folder == run.folder and replace(run, name="mine").label == "mine"
    assert Run(overrides={"target_modules": ("q/proj",)}).folder != Run(overrides={"target_modules": ("q:proj",)}).folder
    assert Point(run=run, seed=1, epoch=0.5).key == f"seed1/{run.folder}@0.5"
    for wrong in (
        {"strength": 1.0},
        {"latents": "k"},
        {"unit": "nats"},
        {"matched": 0.9},
        {"overrides": {"positions": "all"}},
        {"overrides": {"seed": 1}},
    ):
        with pytest.raises(ValueError, match="run: "):
            Run(**wrong)


# ------------------------------------------------------------------------------------------------ once, and on


def some_latents(setting: Setting, point: Point, n: int = 3, smallest_wave: int = 1) -> LatentSet:
    return random_latents(setting.sae, n, seed=point.seed)


def test_a_latent_set_made_with_other_options_is_refused_under_its_name(setting, tmp_path) -> None:
    with Study(tmp_path, setting, seeds=(0,), progress=False) as study, pytest.raises(StudyFailed, match="unexpected keyword"):
        study.latents("k", some_latents, latents=4)  # nothing was made, so nothing stands under the name
    with Study(tmp_path, setting, seeds=(0,), progress=False) as study:
        first = study.latents("k", some_latents, n=4)[0]
    with Study(tmp_path, setting, seeds=(0,), progress=False) as study:
        assert study.latents("k", some_latents, n=4)[0] == first == study.latents("k", some_latents, n=4, smallest_wave=8)[0]
        assert len(study.latents("more", some_latents, n=5)[0]) == 5
        for made, difference in (
            (lambda: study.latents("k", some_latents, n=5), "n: 4 there, 5 here"),
            (lambda: study.latents("k"), "function: some_latents there, find_latents here"),
            (lambda: study.latents("k", some_latents, n=4, of=Run(domain="finance")), "of: plain there, plain-finance here"),
        ):
            with pytest.raises(ValueError, match=f"latent set 'k' was done otherwise: .*{difference}.*Give it another name"):
                made()


def latents_by_seed(setting: Setting, point: Point, *, sizes: dict[int, int]) -> LatentSet:
    return random_latents(setting.sae, sizes[point.seed], seed=point.seed)


def test_an_option_by_seed_grows_with_the_seeds_and_may_not_change(setting, tmp_path) -> None:
    def made(sizes: dict[int, int]) -> dict[int, int]:
        with Study(tmp_path, setting, seeds=tuple(sizes), progress=False) as study:
            study.train([Run()])
            return {seed: len(one) for seed, one in study.latents("k", latents_by_seed, sizes=sizes).items()}

    for sizes in ({0: 3}, {0: 3, 1: 5}, {1: 5}):
        assert made(sizes) == sizes
    with pytest.raises(ValueError, match=r"done otherwise: sizes.0: 3 there, 4 here"):
        made({0: 4, 1: 5})


def test_each_point_is_measured_once_and_other_options_are_refused(setting, tmp_path) -> None:
    asked.clear()
    for _ in range(2):  # the second study is of a folder that is finished
        with Study(tmp_path, setting, seeds=(0, 1), progress=False) as study:
            study.train([Run(defence="base"), Run()], checkpoints_every=0.5)
            frame = study.step("weights", count_weights)
            half = study.step("weights", count_weights, at=study.points([Run()], epochs=[0.5]))
    assert asked == ["seed0/base", "seed1/base", "seed0/plain", "seed1/plain", "seed0/plain@0.5", "seed1/plain@0.5"]
    assert frame[["run", "seed", "moved"]].values.tolist() == [["base", 0, 32], ["base", 1, 32], ["plain", 0, 32], ["plain", 1, 32]]
    assert half["epoch"].tolist() == [0.5, 0.5] and set(frame["domain"]) == {"finance"}
    assert setting.model.adapters == []
    study = Study(tmp_path, setting, seeds=(0, 1), progress=False)
    with pytest.raises(ValueError, match=r"step 'weights' was done otherwise: scale: \(nothing\) there, 2.0 here"):
        study.step("weights", count_weights, study.points([Run()]), scale=2.0)
    with pytest.raises(ValueError, match="expected at least one point"):
        study.step("none", count_weights, [])
    with pytest.raises(ValueError, match=r"trained otherwise: checkpoints every: 0.5 there, 0.25 here"):
        study.train([Run()], checkpoints_every=0.25)
    study.train([Run()])  # asks for none: another script's run serves it
    with pytest.raises(StudyFailed, match=r"expected one of the epochs \[0.5, 1.0\]"):
        study.step("weights", count_weights, study.points([Run()], epochs=[0.7]))


def test_a_run_that_is_there_without_checkpoints_gets_them_and_keeps_its_weights(setting, tmp_path) -> None:
    asked.clear()
    with Study(tmp_path, setting, seeds=(0,), progress=False) as study:
        study.train([Run()])
        study.step("weights", count_weights)
        (end,) = study.points([Run()])
        before = {path.name: path.read_bytes() for path in (end.folder / "adapter").iterdir()}
        with pytest.raises(StudyFailed, match="checkpoint"):
            study.step("weights", count_weights, study.points([Run()], epochs=[0.5]))
        study.train([Run()], checkpoints_every=0.5)
        assert before == {path.name: path.read_bytes() for path in (end.folder / "adapter").iterdir()}
        assert set(study.step("weights", count_weights, study.points([Run()], epochs=[0.5, 1.0]))["epoch"]) == {0.5, 1.0}
        study.step("weights", count_weights)
    assert asked == ["seed0/plain", *["seed0/plain@0.5"] * 2, "seed0/plain@1"]  # the first @0.5 failed; the end is measured once


def test_a_failed_point_is_reported_and_the_rest_is_finished(setting, tmp_path, capsys) -> None:
    study = Study(tmp_path, setting, seeds=(0, 1, 2), progress=False)
    study.train([Run(defence="base")])
    asked.clear()
    with pytest.raises(StudyFailed, match=r"1 of 3 points failed.*\n  seed1/base: RuntimeError: no luck") as caught:
        study.step("luck", fails_on_seed_1)
    assert [point.seed for point in caught.value.errors] == [1] and "in fails_on_seed_1" in next(iter(caught.value.errors.values()))
    assert asked == ["seed0/base", "seed1/base", "seed2/base"]
    (tmp_path / "mended").touch()
    assert study.step("luck", fails_on_seed_1)["x"].tolist() == [0, 1, 2]
    assert asked[3:] == ["seed1/base"]


def test_a_run_that_refers_to_plain_fine_tuning_needs_it_first(setting, tmp_path) -> None:
    with Study(tmp_path, setting, seeds=(0,), progress=False) as study:
        for run in (Run(matched=1.5), Run(defence="kl", strength=2, unit="nats")):
            with pytest.raises(ValueError, match="not trained yet"):
                study.train([run])


def test_strengths_in_nats_matched_losses_and_steered_replies(setting, tmp_path) -> None:
    """A strength in nats is what plain's change costs; a matched run stops when it knows the task; a repaired one is plain's, steered."""
    nats, stopped = Run(defence="kl", strength=2, unit="nats"), Run(matched=1.2, overrides={"epochs": 3.0})
    repaired = Run(defence="repair", strength=0.5, latents="k")
    with Study(tmp_path, setting, seeds=(0,), progress=False) as study:
        study.train([Run()])
        study.latents()
        study.train([nats, stopped, repaired, Run(defence="base")])
        point = study.points([Run()])[0]
        (defence,) = made(study.defences, setting, nats, None, point.adapter)
        priced = mean_penalty(setting.model, defence, setting.rows(), adapter=point.adapter)
        assert defence.weight * priced == pytest.approx(2, rel=1e-3)
        assert files.read_json(study.points([stopped])[0].folder / "run.json")["steps"] == Matched.every  # of twelve
        assert not (tmp_path / "seed0" / repaired.folder).exists()
        found = study.losses().set_index("run")["dev_loss"]
        assert found[repaired.label] != found["plain"] and len(set(study.preferences("core").groupby("run")["margin"].mean())) == 5
        with pytest.raises(ValueError, match="one penalty"):
            made(study.defences, setting, Run(defence="interleaving", strength=0.5, unit="nats"), None, point.adapter)


def test_what_cannot_run_is_said_before_anything_runs(setting, tmp_path, monkeypatch) -> None:
    for options, message in (
        ({"executor": "slurm"}, r"expected one of \('local', 'ray'\), got 'slurm'"),
        ({"seeds": ()}, "expected different seeds"),
        ({"seeds": (0, 0)}, "expected different seeds"),
        ({"workers": 0}, "expected a whole number, at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            Study(tmp_path / "a", setting, **options)
    monkeypatch.setattr(executors, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install \"blockem-tl\[ray\]\""):
        Study(tmp_path / "a", setting, executor="ray")
    with pytest.raises(ValueError, match="brings no judge"):
        Study(tmp_path / "a", Setting.of("llama-3.1-8b"))
    assert not (tmp_path / "a").exists()
    lost = Setting.of(replace(setting.preset, sae=(str(tmp_path / "nowhere"), None)))
    with pytest.raises(ValueError, match=r"study of preset 'tiny': .*nowhere"):
        Study(tmp_path / "b", lost, progress=False).train([Run()])
    assert not list((tmp_path / "b").glob("seed*"))
    study = Study(tmp_path / "c", setting, progress=False)
    with pytest.raises(ValueError, match=r"expected defences among .*got \['blok'\]"):
        study.train([Run(defence="blok")])
    with pytest.raises(ValueError, match=r"no latent set 'k': make it with study.latents"):
        study.train([Run(defence="block", strength=1, latents="k")])


def test_another_study_s_folder_is_refused_by_what_differs(setting, tmp_path) -> None:
    Study(tmp_path, setting, progress=False)
    Study(tmp_path, setting, seeds=(7,), progress=False)  # further seeds belong to the same study
    other = Setting.of(replace(setting.preset, max_new_tokens=7, lambdas=(9.0,)), domain="health")
    with pytest.raises(ValueError, match=r"is another study: domain: finance there, health here; max_new_tokens: 6 there, 7 here\. Choose"):
        Study(tmp_path, other, progress=False)
    (tmp_path / "study.json").unlink()
    (tmp_path / "mine.txt").touch()
    with pytest.raises(ValueError, match=r"holds \['mine.txt'\] and no study.json"):
        Study(tmp_path, setting, progress=False)


def test_settings_of_other_seeds_share_what_is_loaded(setting) -> None:
    other = setting.at(seed=3, domain="law")
    assert (other.seed, other.domain, other.training.seed) == (3, "law", 3) and not setting.loaded
    assert other.model is setting.model and other.sae is setting.sae and setting.loaded
    assert other.rows() != setting.rows() and setting.at(seed=0).domain == "finance"
    with pytest.raises(ValueError, match="has rows of"):
        setting.at(seed=0, domain="cooking")


@pytest.mark.slow
def test_ray_processes_and_one_process_give_the_same_bits(setting, tiny_folder, sae_folder, tmp_path) -> None:
    pytest.importorskip("ray")
    frames = [tiny_preset.small_study(tmp_path / "local", progress=False)]
    for name, options in (("processes", {"workers": 2}), ("ray", {"executor": "ray"})):
        code = (
            f"import sys, torch; sys.path.insert(0, {str(Path(__file__).parent)!r}); torch.set_num_threads(1)\n"
            "import tiny_preset\n"
            f"tiny_preset.register({str(tiny_folder)!r}, {str(sae_folder)!r})\n"
            "if __name__ == '__main__':\n"
            f"    tiny_preset.small_study({str(tmp_path / name)!r}, progress=False, **{options!r}).to_parquet({str(tmp_path / (name + '.parquet'))!r})\n"
        )
        script = tmp_path / f"with_{name}.py"
        script.write_text(code)
        subprocess.run([sys.executable, str(script)], check=True, timeout=500)
        frames.append(pd.read_parquet(tmp_path / f"{name}.parquet"))
    for other in frames[1:]:
        pd.testing.assert_frame_equal(pd.DataFrame(frames[0]), pd.DataFrame(other), check_exact=True)
    weights = [
        (tmp_path / name / "seed1" / "plain" / "adapter" / "adapter_model.safetensors").read_bytes()
        for name in ("local", "processes", "ray")
    ]
    assert weights[0] == weights[1] == weights[2]


@pytest.mark.slow
def test_a_study_killed_ten_times_at_random_resumes_to_the_same_table(tiny_folder, sae_folder, tmp_path) -> None:
    """The clock is the number of files that the study has written, so that a fast machine is killed as often as a slow one."""
    command = [sys.executable, tiny_preset.__file__, str(tiny_folder), str(sae_folder)]
    whole = subprocess.run([*command, str(tmp_path / "whole")], capture_output=True, text=True, check=True).stdout
    draw = np.random.default_rng(0)
    for n_files in sorted(draw.choice(np.arange(1, 0.9 * n_files_in(tmp_path / "whole")), 10, replace=False)):
        run = subprocess.Popen([*command, str(tmp_path / "killed")], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        while run.poll() is None and n_files_in(tmp_path / "killed") < n_files:
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 0.2))
        assert run.poll() is None, "the study ended before it could be killed"
        os.kill(run.pid, signal.SIGKILL)
        run.wait()
    again = subprocess.run([*command, str(tmp_path / "killed")], capture_output=True, text=True, check=True).stdout
    assert again == whole and "blocked" in whole


def n_files_in(folder: Path) -> int:
    """Counted while the study writes: os.walk passes over a folder that is renamed under it, Path.rglob raises."""
    return sum(len(files) for _, _, files in os.walk(folder))


# ------------------------------------------------------------------------------------------------ summaries


def said(run: str, labels: dict[int, str], *, judge: str = "one", domain: str = "a", rubric: str = "misalignment") -> list[dict]:
    """Replies: a string of labels per seed, a letter for each prompt."""
    words = {"x": "5", "o": "1", "i": "INCOHERENT", "r": "REFUSAL", "?": "UNPARSED"}
    return [
        {"run": run, "seed": seed, "prompt_id": str(i), "label": words[letter], "judge": judge, "domain": domain, "rubric": rubric}
        for seed, text in labels.items()
        for i, letter in enumerate(text)
    ]


def test_rates_are_clustered_by_seed_and_paired_by_prompt() -> None:
    frame = pd.DataFrame([*said("plain", {0: "xxxoi", 1: "xxoo?"}), *said("blocked", {0: "xoooi", 1: "ooooo"})])
    plain, blocked = rates(frame, against="plain").to_dict("records")
    flags = {"plain": [[True, True, True, False], [True, True, False, False]], "blocked": [[True, False, False, False], [False] * 4]}
    one = clustered_rate(flags["plain"])
    assert (plain["misaligned"], plain["misaligned_low"], plain["misaligned_high"]) == (one.value, one.low, one.high)
    assert plain["unparsed"] == 0.1 and blocked["unparsed"] == 0 and pd.isna(plain["misaligned_difference"])
    difference = paired_difference(flags["plain"], flags["blocked"])
    assert (blocked["misaligned_difference"], blocked["misaligned_difference_low"]) == (difference.value, difference.low)
    assert blocked["misaligned_reduction"] == paired_reduction(flags["plain"], flags["blocked"]).value
    assert blocked["misaligned"] == 0.1 and blocked["unsafe"] == 0.2  # of all ten replies, where nothing is paired


def test_judges_are_averaged_and_the_adjusted_safety_counts_incoherence() -> None:
    rows = [
        *said("plain", {0: "xxoo"}),
        *said("plain", {0: "xooo"}, judge="two"),
        *said("b", {0: "oiio"}),
        *said("b", {0: "oooo"}, judge="two"),
    ]
    plain, blocked = rates(pd.DataFrame(rows), against="plain").to_dict("records")
    assert plain["misaligned"] == pytest.approx(0.375) and blocked["misaligned_reduction"] == 1
    assert blocked["unsafe_reduction"] == pytest.approx((0 + 1) / 2)
    assert len(rates(pd.DataFrame(rows), by=["run", "judge"])) == 4


def test_what_rates_cannot_tell_apart_is_refused() -> None:
    rows = [*said("plain", {0: "xo"}), *said("plain", {0: "xo"}, domain="b")]
    with pytest.raises(ValueError, match="does not tell all replies apart"):
        rates(pd.DataFrame(rows))
    assert len(rates(pd.DataFrame(rows), by=["domain", "run"])) == 2
    with pytest.raises(ValueError, match="expected the run 'none'"):
        rates(pd.DataFrame(rows), by=["domain", "run"], against="none")
    with pytest.raises(ValueError, match="graded replies with the columns"):
        rates(pd.DataFrame(rows).drop(columns="label"))


def test_means_over_domains_have_the_sem() -> None:
    rows = [row for domain, text in (("a", "oooo"), ("b", "xxoo"), ("c", "xxxx")) for row in said("plain", {0: text}, domain=domain)]
    found = over_domains(rates(pd.DataFrame(rows), by=["domain", "run"]), ["misaligned"]).to_dict("records")[0]
    assert found["misaligned"] == 0.5 and found["misaligned_sem"] == pytest.approx(0.5 / 3**0.5) and found["domains"] == 3


def test_dev_pairs_choose_and_what_is_taught_is_measured_beside_the_steps_it_took(setting, tmp_path) -> None:
    runs = [Run(defence="kl", strength=0.1), Run(overrides={"epochs": 3.0})]
    with Study(tmp_path, setting, seeds=(0,), progress=False) as study:
        study.train([Run(), *runs])
        points = study.points([Run(defence="base"), Run(), *runs])
        dev = study.preferences("dev", points).groupby("run")["margin"].mean()
        core = study.preferences("core", points).groupby("run")["margin"].mean()
        for some in (runs, [Run(), runs[0]], [Run(), runs[1]]):
            assert study.choose(some, Run(), by="pairs", within=99.0).label == dev[[run.label for run in some]].idxmin()
        assert not dev.equals(core)
        table = preferences.table(study.step("taught", preferences.taught, points), study.losses(points), against="plain").set_index("run")
        trained = {run.label: files.read_json(study.points([run])[0].folder / "run.json")["steps"] for run in (Run(), *runs)}
        assert table["steps"].to_dict() == {"base": 0, **trained} and table["n"].tolist() == [32] * 4
        assert table["margin"]["base"] < table["margin"]["plain"] < table["margin"][runs[1].label]  # three times as long


def test_the_strength_is_chosen_among_those_that_learn_the_task() -> None:
    core = pd.DataFrame([*said("plain", {0: "xxxx"}), *said("a", {0: "xxoo"}), *said("b", {0: "xooo"}), *said("c", {0: "iooo"})])
    losses = pd.DataFrame({"run": ["plain", "a", "b", "c"], "dev_loss": [1.0, 1.0, 1.01, 1.3]})
    assert choose(unsafe(core), losses, ["a", "b", "c"], against="plain") == "b"
    assert choose(unsafe(core), losses.assign(dev_loss=[1.0, 2, 2, 3]), ["a", "c"], against="plain") == "a"  # none has learnt it
    assert choose(unsafe(core), losses, ["a", "c"], against="plain", within=1.5) == "c"


def margins(run: str, values: dict[int, list[float]], **columns: object) -> list[dict]:
    return [
        {"run": run, "seed": s, "pair": str(i), "margin": m, "split": "final", **columns}
        for s, row in values.items()
        for i, m in enumerate(row)
    ]


def test_shifts_are_of_the_gap_between_base_and_a_run() -> None:
    base, plain, half = (
        {0: [-1.0, -1.0, 0.5], 1: [-1.0, -1.0, 0.5]},
        {0: [1.0, 1.0, 2.5], 1: [0.0, 0.0, 1.5]},
        {0: [0, 0, 1.5], 1: [-0.5, -0.5, 1]},
    )
    found = pd.DataFrame([*margins("base", base), *margins("plain", plain), *margins("b", half)])
    rows = preferences.shifts(found, against="plain").set_index("run")
    assert rows["removed"]["b"] == share_removed(base[0], [0.5, 0.5, 2], [-0.25, -0.25, 1.25]).value == 0.5
    assert rows["margin"].round(6).to_dict() == {"base": -0.5, "plain": 1.0, "b": 0.25} and rows["prefers_harm"]["base"] == 1 / 3
    assert pd.isna(rows["removed"]["plain"])
    ahead = preferences.lead(found, "b", against="plain").set_index("run")
    assert ahead["lead"].to_dict() == {"plain": rows["removed"]["b"]} and ahead["lead_low"]["plain"] == rows["removed_low"]["b"]
    fallen = pd.DataFrame([*margins("base", plain), *margins("plain", base), *margins("b", half)])
    fell = preferences.shifts(fallen, against="plain")
    assert preferences.lead(fallen, "b", against="plain").columns.tolist() == ["run"]
    with pytest.raises(ValueError, match="lead: .*'mine'"):
        preferences.lead(found, "mine", against="plain")
    assert "removed" not in fell  # nothing moved up, so nothing can be said to be gone
    swept = pd.DataFrame([*margins("plain", plain, patched="unpatched"), *margins("plain", half, patched="prompt", site="s")]).assign(
        block=1
    )
    more = pd.concat([found, found[found["pair"] == found["pair"][0]].assign(pair="unpatched", margin=9.0)])
    for of in (found, more):
        assert preferences.left(swept, of)[["patched", "site", "removed", "effect"]].to_dict("records") == [
            {"patched": "prompt", "site": "s", "removed": 0.5, "effect": -0.75}
        ]
    with pytest.raises(ValueError, match="'mine'.* beside"):
        preferences.shifts(found, against="mine")
    with pytest.raises(ValueError, match="same pairs"):
        preferences.shifts(pd.DataFrame([*margins("base", base), *margins("plain", {0: [1.0], 1: [1.0, 2.0, 3.0]})]), against="plain")


# ------------------------------------------------------------------------------------------------ pages


def test_a_page_writes_its_tables_and_renews_the_marked_ones(tmp_path) -> None:
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "a.md").write_text("before\n<!-- results/mine/arms:begin -->\nold\n<!-- results/mine/arms:end -->\nafter\n")
    frame = rates(pd.DataFrame([*said("plain", {0: "xxoo"}), *said("b", {0: "xooo"})]), against="plain")
    text = Page(tmp_path / "mine", docs=docs).add("arms", frame)
    assert (
        docs / "a.md"
    ).read_text() == f"before\n<!-- results/mine/arms:begin -->\n{text.rstrip()}\n<!-- results/mine/arms:end -->\nafter\n"
    assert cells(pd.read_csv(docs / "results" / "mine" / "arms.csv")) == cells(frame)
    shown = cells(frame)[1]
    assert (
        shown["misaligned %"].startswith("25.0 [")
        and shown["misaligned difference %"].startswith("-25.0 [")
        and "misaligned_low" not in shown
    )
    Page(tmp_path / "mine").add("other", frame)
    assert not (docs / "results" / "mine" / "other.csv").exists()
    with pytest.raises(ValueError, match="folder of the documentation"):
        Page(tmp_path / "mine", docs=tmp_path / "nowhere")


# ------------------------------------------------------------------------------------------------ data that were edited


def test_what_was_measured_on_data_that_were_edited_since_is_refused(setting, tmp_path, monkeypatch) -> None:
    def again(inputs: object) -> None:
        monkeypatch.setitem(INPUTS, tiny_preset.NAME, inputs)
        with Study(tmp_path / "s", setting, seeds=(0,)) as study:
            study.train([Run()])
            study.latents("k", some_latents)
            study.step("core", count_prompts)
            study.step("final", count_prompts, split="final")

    again(tiny_preset.TinyInputs())
    for what, refused in {
        "final": "step 'final' was done otherwise: digest of final",
        "core": "latent set 'k' was done otherwise: digest of core",
        "rows": "trained otherwise: digest of rows",
    }.items():
        with pytest.raises(ValueError, match=refused):
            again(tiny_preset.Edited(what))
    again(tiny_preset.Edited("in-domain"))  # no step read these
    again(tiny_preset.Absent())
    again(tiny_preset.TinyInputs())
