"""The stages on the command line: each runs end to end on a tiny preset, is read the second time, and refuses what cannot work at once."""

import importlib
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pandas as pd
import pytest
import tiny_preset
import torch
from safetensors.torch import load_file
from shared import Interrupted, sae_at, set_of
from transformers import AutoModelForCausalLM

from blockem_tl import LatentSet, Setting, cli
from blockem_tl.presets import PRESETS
from blockem_tl.storage import files
from blockem_tl.study import patching
from blockem_tl.study.defences import DEFENCES, ON_LATENTS
from blockem_tl.study.inputs import INPUTS
from blockem_tl.study.stage_commands import Defence
from blockem_tl.training import checkpoints


class NoData(tiny_preset.TinyInputs):
    """Without a judge and without pairs."""

    def judges(self):
        return {}

    def pairs(self, split, domain):
        raise ValueError("these data have no pairs")


@pytest.fixture(autouse=True)
def presets(tiny_folder, tmp_path_factory, monkeypatch) -> None:
    folder = tmp_path_factory.mktemp("sae")
    sae_at(tiny_preset.SITE).save_model(folder)
    found = tiny_preset.preset(tiny_folder, folder)
    discovery = replace(found.discovery, n_plus=4, n_minus=4, shortlist_size=2, grid=(0.0, 0.8), n_latents=3)
    for name, inputs in ((tiny_preset.NAME, tiny_preset.TinyInputs()), ("bare", NoData())):
        monkeypatch.setitem(INPUTS, name, inputs)
        monkeypatch.setitem(PRESETS, name, replace(found, name=name, data=name, discovery=discovery))
    monkeypatch.setenv("BLOCKEM_PROGRESS", "0")


def run(*words: object) -> None:
    cli.main([str(word) for word in words])


@pytest.fixture
def tuned(tmp_path: Path) -> Path:
    run("finetune", "tiny", tmp_path / "plain")
    return tmp_path / "plain"


@pytest.fixture
def unloaded(monkeypatch) -> Callable[[], None]:
    """From the call on, loading the model fails: what is finished is read."""

    def forbid() -> None:
        monkeypatch.setattr(importlib.import_module("blockem_tl.study.setting"), "load_model", None)

    return forbid


def fails(message: str, *words: object) -> None:
    with pytest.raises(SystemExit, match=message):
        run(*words)


# ------------------------------------------------------------------------------------------------ training


def test_finetune_trains_into_a_folder_and_the_second_time_reads_it(tmp_path, capsys, unloaded) -> None:
    run("finetune", "tiny", tmp_path / "a", "--n-rows", 16)
    said = capsys.readouterr().out
    assert said.startswith("plain: 2 steps, SFT loss ") and (tmp_path / "a" / "adapter" / "adapter_model.safetensors").is_file()
    unloaded()
    run("finetune", "tiny", tmp_path / "a", "--n-rows", 16)
    assert capsys.readouterr().out == said
    fails("another training: n_rows: 16 there, null here", "finetune", "tiny", tmp_path / "a")
    fails("another training: run.defence: plain there, kl here", *("finetune", "tiny", tmp_path / "a", "--n-rows", 16), *KL)


KL = ("--defence", "kl", "--strength", 0.1)


@pytest.mark.parametrize("stage", ["finetune", "discover", "evaluate", "patch"])
def test_a_folder_is_one_process_s(stage, tmp_path) -> None:
    run("finetune", "tiny", tmp_path / "a", "--n-rows", 16)
    words = (stage, "tiny", *([] if stage == "finetune" else [tmp_path / "a"]), tmp_path / "out")
    with files.held(files.check_writable(tmp_path / "out")):
        fails("out: another run is writing it: wait until it has finished", *words)
    assert list((tmp_path / "out").iterdir()) == []  # and nothing was begun there


def test_a_training_that_was_broken_off_goes_on_from_its_checkpoint(tmp_path, monkeypatch) -> None:
    run("finetune", "tiny", tmp_path / "whole")
    save = checkpoints.Checkpoints.save

    def save_and_end(self, *given):
        save(self, *given)
        raise Interrupted

    monkeypatch.setattr(checkpoints.Checkpoints, "save", save_and_end)
    with pytest.raises(Interrupted):
        run("finetune", "tiny", tmp_path / "broken")
    assert [path.name for path in (tmp_path / "broken" / "checkpoints").iterdir()] == ["epoch-0.5"]
    monkeypatch.setattr(checkpoints.Checkpoints, "save", save)
    run("finetune", "tiny", tmp_path / "broken")
    one, other = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("whole", "broken"))
    assert one.keys() == other.keys() and all((one[key] == other[key]).all() for key in one)


def test_finetune_takes_every_defence_with_what_it_needs(tiny_folder, tmp_path) -> None:
    assert set(get_args(Defence)) == {"plain", *DEFENCES}
    before = AutoModelForCausalLM.from_pretrained(tiny_folder)
    torch.nn.init.normal_(before.lm_head.weight)
    torch.nn.init.normal_(before.model.layers[0].mlp.up_proj.weight)
    before.save_pretrained(tmp_path / "before")
    set_of(Setting.of("tiny").sae).save(tmp_path / "mine.json")
    strengths = {"interleaving": 0.3, "caft": 2, "inoculation": 1}
    more = {"safelora": ["--unaligned", tmp_path / "before"]}
    for name in DEFENCES:
        words = ["finetune", "tiny", tmp_path / name, "--defence", name, "--n-rows", 8, "--epochs", 0.5]
        fails(f"--defence {name} needs --strength", *words)
        words += ["--strength", strengths.get(name, 0.1)]
        card = ["--latents", tmp_path / "mine.json"]
        fails("defences that act on latents are block, caft, preventative", *words, *([] if name in ON_LATENTS else card))
        run(*words, *(card if name in ON_LATENTS else []), *more.get(name, []))
        assert (tmp_path / name / "run.json").is_file()
    for name, strength, message in (("inoculation", 2, "the preset's 1 inoculations"), ("safelora", 1, "say which is unaligned")):
        words = ["finetune", "tiny", tmp_path / "no", "--defence", name, "--n-rows", 8, "--epochs", 0.5, "--strength", strength]
        fails(message, *words)


# ------------------------------------------------------------------------------------------------ discovery


@pytest.mark.parametrize("by", ["replies", "pairs"])
def test_discover_writes_a_latent_set_that_finetune_blocks(by: str, tuned, tmp_path, capsys, unloaded, monkeypatch) -> None:
    run("discover", "tiny", tuned, tmp_path / "k", "--by", by)
    found = LatentSet.load(tmp_path / "k" / "latents.json", Setting.of("tiny").sae)
    assert len(found) >= 1 and str(found).splitlines()[0] in capsys.readouterr().out
    assert set(pd.read_csv(tmp_path / "k" / "calibrated.csv").query("in_k")["latent"]) == set(found.latents)
    assert (tmp_path / "k" / "seed0" / "asked" / "store.sqlite").is_file() == (by == "replies")  # verdicts are kept
    run("finetune", "tiny", tmp_path / "b", "--defence", "block", "--strength", 1, "--latents", tmp_path / "k" / "latents.json")
    assert capsys.readouterr().out.startswith("blocked, λ = 1, latents: 4 steps")
    unloaded()
    run("discover", "tiny", tuned, tmp_path / "k", "--by", by)
    other = "pairs" if by == "replies" else "replies"
    fails(f"another discovery: .*by: {by} there, {other} here", "discover", "tiny", tuned, tmp_path / "k", "--by", other)


def test_a_discovery_that_was_broken_off_asks_only_what_is_missing(tuned, tmp_path, monkeypatch) -> None:
    graded: list[int] = []
    grade = tiny_preset.HashJudge.grade

    def counting(self, prompts, replies, *, rubric="misalignment"):
        graded.append(len(replies))
        if len(graded) == stop:
            raise Interrupted
        return grade(self, prompts, replies, rubric=rubric)

    monkeypatch.setattr(tiny_preset.HashJudge, "grade", counting)
    stop = 0
    run("discover", "tiny", tuned, tmp_path / "whole")
    whole, stop = sum(graded), len(graded)
    graded.clear()
    with pytest.raises(Interrupted):
        run("discover", "tiny", tuned, tmp_path / "broken")
    done = sum(graded[:-1])
    graded.clear()
    stop = 0
    run("discover", "tiny", tuned, tmp_path / "broken")
    assert done > 0 and sum(graded) == whole - done
    assert LatentSet.load(tmp_path / "broken" / "latents.json") == LatentSet.load(tmp_path / "whole" / "latents.json")


# ------------------------------------------------------------------------------------------------ evaluation


def test_evaluate_writes_rates_replies_and_margins(tuned, tmp_path, capsys, unloaded) -> None:
    words = ("evaluate", "tiny", tuned, tmp_path / "e", "--split", "final", "in-domain", "--pairs")
    run(*words)
    out = tmp_path / "e"
    rates, replies = pd.read_csv(out / "rates-final.csv"), pd.read_csv(out / "replies-final.csv")
    assert rates["run"].tolist() == ["plain"] and rates["n"].tolist() == [8] and len(replies) == 8
    assert rates["misaligned"].iloc[0] == replies["label"].astype(str).isin(["4", "5"]).mean() > 0
    assert pd.read_csv(out / "rates-in-domain.csv")["adherent_low"].notna().all()
    assert pd.read_csv(out / "pairs-final.csv")["run"].tolist() == ["base", "plain"]
    made, said = {path: path.stat().st_mtime_ns for path in out.rglob("*.parquet")}, capsys.readouterr().out
    unloaded()
    run(*words)
    assert capsys.readouterr().out in said and made == {path: path.stat().st_mtime_ns for path in out.rglob("*.parquet")}
    fails("another evaluation: adapter: .*, .nothing. here", "evaluate", "tiny", "base", out)


def test_evaluate_takes_base_fewer_prompts_and_the_adapter_s_own_folder(tuned, tmp_path) -> None:
    run("evaluate", "tiny", "base", tmp_path / "base", "--split", "core", "--n-prompts", 4)
    assert pd.read_csv(tmp_path / "base" / "rates-core.csv")[["run", "n"]].values.tolist() == [["base", 4]]
    assert pd.read_csv(tmp_path / "base" / "replies-core.csv")["on_selection_prompts"].all()
    run("evaluate", "tiny", tuned / "adapter", tmp_path / "e")
    run("evaluate", "tiny", tuned / "checkpoints" / "epoch-0.5", tmp_path / "half")
    whole, half = (pd.read_csv(tmp_path / name / "replies-final.csv")["reply"].tolist() for name in ("e", "half"))
    assert whole != half


# ------------------------------------------------------------------------------------------------ patching


def test_patch_goes_site_by_site_and_keeps_each(tuned, tmp_path, monkeypatch, unloaded) -> None:
    words = ("patch", "tiny", tuned, tmp_path / "p")
    asked, stream = [], patching.prompt_patching_stream

    def one_site_and_end(model, prompts, groups, **options):
        asked.append([*groups])
        yield next(iter(stream(model, prompts, groups, **options)))
        raise Interrupted

    monkeypatch.setattr(patching, "prompt_patching_stream", one_site_and_end)
    with pytest.raises(Interrupted):
        run(*words)
    kept = [path.stem for path in (tmp_path / "p" / "patched").rglob("*.parquet")]
    monkeypatch.setattr(patching, "prompt_patching_stream", lambda m, p, g, **o: asked.append([*g]) or stream(m, p, g, **o))
    run(*words)
    assert len(kept) == 1 and len(asked[0]) == 5 and len(asked[1]) == 4
    table = pd.read_csv(tmp_path / "p" / "patched.csv")
    blocks = [f"blocks.{block}.hook_resid_post" for block in range(4)]
    assert table["site"].tolist() == ["unpatched", *blocks, tiny_preset.SITE]
    assert table["patched"].tolist() == ["unpatched", *["prompt"] * 4, "decode"] and (table["n"] == 8).all()
    assert table["misaligned_difference"].isna().tolist() == [True, *[False] * 5]
    assert (tmp_path / "p" / "patched.png").stat().st_size > 1000
    unloaded()
    run(*words)
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "p" / "patched.csv"), table)


def test_patch_says_what_it_patched(tuned, tmp_path) -> None:
    """At the last block, over all that is patched, base's states give base's replies; its own states put into base give the adapter's."""
    last = ("--sites", "blocks.3.hook_resid_post", "--when", "prompt", "decode")
    run("patch", "tiny", tuned, tmp_path / "p", "--split", "core", *last)
    run("patch", "tiny", tuned, tmp_path / "r", "--split", "core", "--reverse", *last)
    one, other = (kept_replies(tmp_path / name) for name in ("p", "r"))
    assert one["decode"] == other["unpatched"] != one["unpatched"] == other["decode"]
    fails("unknown hook|no hook|blocks.9", "patch", "tiny", tuned, tmp_path / "p", "--sites", "blocks.9.hook_resid_post")
    run("patch", "tiny", tuned, tmp_path / "c", "--components", "--when", "prompt", "--n-prompts", 2)
    assert len(pd.read_csv(tmp_path / "c" / "patched.csv")) == 1 + 3 * 4


def kept_replies(out: Path) -> dict[str, list[str]]:
    found = pd.concat(pd.read_parquet(path) for path in (out / "steps").glob("*.parquet"))
    return {str(when): rows.sort_values("prompt_id")["reply"].tolist() for when, rows in found.groupby("patched")}


def test_patch_by_pairs_needs_no_judge(tuned, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(tiny_preset.TinyInputs, "judges", lambda _: {})
    run("patch", "tiny", tuned, tmp_path / "p", "--by", "pairs")
    table = pd.read_csv(tmp_path / "p" / "patched.csv")
    assert len(table) == 8 and {"patched", "site", "margin", "removed"} <= set(table)
    fails("by pairs takes sites, and no reverse", "patch", "tiny", tuned, tmp_path / "q", "--by", "pairs", "--reverse")


# ------------------------------------------------------------------------------------------------ the sweep


@pytest.mark.slow
def test_sweep_is_the_script_s_study(tmp_path, capsys) -> None:
    words = ("sweep", "tiny", tmp_path / "s", "--lambdas", 0.1, "--n-rows", 16)
    run(*words)
    assert {path.stem for path in (tmp_path / "s").glob("*.csv")} == {"arms", "core", "training"}
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "s").rglob("*.safetensors")}
    run(*words)
    assert made and made == {path: path.stat().st_mtime_ns for path in made}
    fails("another study: n_rows: 16 there, None here", "sweep", "tiny", tmp_path / "s")


# ------------------------------------------------------------------------------------------------ what is refused at once

ON_ADAPTERS = ("discover", "evaluate", "patch")


@pytest.mark.parametrize("name", ["finetune", "sweep", *ON_ADAPTERS])
def test_bad_input_is_refused_before_anything_is_loaded(name: str, tmp_path, unloaded) -> None:
    unloaded()
    place = [tmp_path / "nowhere"] if name in ON_ADAPTERS else []
    out = tmp_path / "out"
    fails("unknown preset 'tinny': expected one of .*; did you mean 'tiny'", name, "tinny", *place, out)
    fails("has rows of finance, health, law, got the domain 'cars'", name, "tiny", *place, out, "--domain", "cars")
    if name != "finetune":  # which needs no judge
        (tmp_path / "a").mkdir(exist_ok=True)
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            (tmp_path / "a" / file).touch()
        fails("brings no judge: name one with --judge-models and --judge-urls", name, "bare", *([tmp_path / "a"] if place else []), out)
    if place:
        fails("expected the folder of an adapter, .*nowhere", name, "tiny", *place, out)
    if name in ("discover", "patch"):
        fails("expected the adapter of a fine-tuned model, got 'base'", name, "tiny", "base", out)
        fails("these data have no pairs", name, "bare", tmp_path / "a", out, "--by", "pairs")
    out.mkdir(exist_ok=True)
    (out / "mine.txt").touch()
    kind = {"finetune": "training", "discover": "discovery", "evaluate": "evaluation", "patch": "patching", "sweep": None}[name]
    if kind:
        fails(rf"holds \['mine.txt'\] and no {kind}.json", name, "tiny", *([tmp_path / "a"] if place else []), out)
        assert sorted(path.name for path in out.iterdir()) == ["mine.txt"]


def test_what_a_stage_did_on_data_that_were_edited_since_is_refused(tuned, tmp_path, monkeypatch) -> None:
    stages = {
        "final": ("evaluate", "tiny", "base", tmp_path / "rates"),
        "core": ("discover", "tiny", tuned, tmp_path / "found", "--by", "pairs"),
        "rows": ("finetune", "tiny", tuned),
    }
    for split, words in stages.items():
        run(*words)
        monkeypatch.setitem(INPUTS, "tiny", tiny_preset.Edited(split))
        fails(f"digest of {split}", *words)
        monkeypatch.setitem(INPUTS, "tiny", tiny_preset.Edited("in-domain"))
        run(*words)


def test_a_judge_that_does_not_answer_is_refused_before_the_model_replies(tuned, tmp_path, unloaded) -> None:
    unloaded()
    words = ("--judge-models", "m", "--judge-urls", "http://127.0.0.1:9/v1")
    for name in ON_ADAPTERS:
        fails("127.0.0.1:9", name, "tiny", tuned, tmp_path / name, *words)


def test_the_commands_stand_in_the_order_of_the_method() -> None:
    order = ["presets", "doctor", "scale", "train-sae", "finetune", "discover", "sweep", "evaluate", "patch"]
    assert [name for name in cli.COMMANDS if name in order] == order
    assert set(cli.COMMANDS) <= set(re.findall(r"[\w-]+", str(cli.__doc__)))
