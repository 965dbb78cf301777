"""The patching sweep's script: sites that are done are not patched again, and the figure shows what was patched."""

import sys
from pathlib import Path

import pandas as pd
import patching_sweep as script
import pytest
from shared import sae_at

from blockem_tl.presets import PRESETS
from blockem_tl.study import patching
from blockem_tl.study.inputs import INPUTS
from blockem_tl.study.patching import patched_rates
from blockem_tl.views import plots

sys.path.insert(0, str(Path(__file__).parents[1] / "study"))

import tiny_preset


@pytest.fixture
def preset(tiny_folder, tmp_path_factory, monkeypatch) -> str:
    folder = tmp_path_factory.mktemp("sae")
    sae_at(tiny_preset.SITE).save_model(folder)
    monkeypatch.setitem(INPUTS, tiny_preset.NAME, tiny_preset.TinyInputs())
    monkeypatch.setitem(PRESETS, tiny_preset.NAME, tiny_preset.preset(tiny_folder, folder))
    return tiny_preset.NAME


def options(preset: str, out: Path, **given) -> script.Options:
    return script.Options(preset=preset, out=out, progress=False, n_rows=16, **given)


def test_a_site_whose_replies_are_kept_is_not_patched_again(preset, tmp_path, monkeypatch) -> None:
    script.main(options(preset, tmp_path))
    first = (tmp_path / "patched-plain.csv").read_text()
    site = "blocks.1.hook_resid_post"
    (tmp_path / "study/patched/seed0/plain/final/prompt" / f"{site}.parquet").unlink()
    (tmp_path / "study/steps/patched-final-prompt/seed0/plain.parquet").unlink()
    asked, stream = [], patching.prompt_patching_stream
    monkeypatch.setattr(patching, "prompt_patching_stream", lambda m, p, groups, **o: asked.extend(groups) or stream(m, p, groups, **o))
    script.main(options(preset, tmp_path))
    assert asked == [[site]] and (tmp_path / "patched-plain.csv").read_text() == first
    with pytest.raises(ValueError, match="was done otherwise: components: false there, true here"):
        script.main(options(preset, tmp_path, components=True))


def test_a_preset_without_a_judge_is_refused_before_anything_is_loaded(tmp_path) -> None:
    with pytest.raises(ValueError, match="brings no judge: name one with --judge-models"):
        script.main(options("llama-3.1-8b", tmp_path / "out"))
    assert not (tmp_path / "out" / "study").exists()


def test_differences_are_paired_with_the_run_s_own_unpatched_replies() -> None:
    labels = {"unpatched": ["5", "5", "1", "1"], "blocks.0.hook_resid_post": ["1", "5", "1", "1"]}
    rows = [
        {"prompt_id": str(i), "label": label, "site": site, "patched": "unpatched" if site == "unpatched" else "prompt"}
        for site, found in labels.items()
        for i, label in enumerate(found)
    ]
    about = {"run": "plain", "seed": 0, "judge": "j", "rubric": "misalignment", "split": "final"}
    table = patched_rates(pd.DataFrame(rows).assign(**about))
    assert table["misaligned"].tolist() == [0.5, 0.25] and table["misaligned_difference"].iloc[1] == -0.25
    assert table["block"].isna().tolist() == [True, False]
    alone = patched_rates(pd.DataFrame(rows).assign(**about).query("patched == 'prompt'"))
    assert "misaligned_difference" not in alone


def test_the_figure_shows_each_kind_of_site_and_each_comparison() -> None:
    rates = {"em": 50.0, "em_low": 40.0, "em_high": 60.0}
    sites = [("unpatched", "unpatched"), ("decode", "blocks.1.hook_resid_post")]
    sites += [("prompt", f"blocks.{b}.{kind}") for kind in ("hook_resid_post", "hook_mlp_out") for b in range(3)]
    figure = plots.patching(pd.DataFrame([{"patched": patched, "site": site, **rates} for patched, site in sites]))
    labels = figure.axes[0].get_legend_handles_labels()[1]
    assert sorted(labels) == [
        "decode patching, blocks.1.hook_resid_post",
        "prompt patching, hook_mlp_out",
        "prompt patching, hook_resid_post",
        "unpatched",
    ]
