"""The sweep script: what is finished is kept and not run again, and a folder holds one experiment."""

from pathlib import Path

import pandas as pd
import patching_sweep as script
import pytest
from conftest import perturb

from blockem_tl import load_model
from blockem_tl.views import plots


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = load_model("organism", device="cpu")
    model.add_adapter()
    perturb(model, "default", std=0.03)
    return model.save_adapter(tmp_path_factory.mktemp("adapter") / "tuned")


def test_a_sweep_is_written_judged_and_resumed(adapter, tmp_path, monkeypatch) -> None:
    settings = script.Settings(adapter=adapter, out=tmp_path, max_new_tokens=4)
    frame = script.run(settings)
    assert frame["patched"].tolist() == ["unpatched", *["prompt"] * (len(frame) - 2), "decode"] and (frame["n"] == 96).all()
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "sweep.csv"), frame, check_dtype=False)
    assert (tmp_path / "sweep.png").stat().st_size > 1000
    (tmp_path / "prompt" / "blocks.1.hook_resid_post.json").unlink()
    asked, sweep = [], script.prompt_patching_stream
    monkeypatch.setattr(
        script, "prompt_patching_stream", lambda model, prompts, sites, **o: asked.extend(sites) or sweep(model, prompts, sites, **o)
    )
    pd.testing.assert_frame_equal(script.run(settings), frame)
    assert asked == [("blocks.1.hook_resid_post",)]
    with pytest.raises(ValueError, match="begun with another seed"):
        script.run(script.Settings(adapter=adapter, out=tmp_path, max_new_tokens=4, seed=1))


def test_a_real_model_needs_a_judge_before_anything_is_loaded(tmp_path) -> None:
    with pytest.raises(ValueError, match="needs --judge-model"):
        script.run(script.Settings(adapter=tmp_path, out=tmp_path / "out", preset="llama-3.1-8b"))
    assert not (tmp_path / "out").exists()


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
