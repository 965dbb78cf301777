"""Files are whole or absent."""

import json
import os

import pandas as pd
import pytest

from blockem_tl import get_preset
from blockem_tl.storage import files
from blockem_tl.storage.embedded import folder_of, register
from blockem_tl.views import plots, studies, tables


def test_json_round_trip_leaves_no_scraps(tmp_path) -> None:
    value = {"λ": 1.5, "latents": [3, -1.5, 2e-7], "text": "[1,\n2]"}
    path = files.write_json(tmp_path / "deep" / "a.json", value)
    assert '"latents": [ 3, -1.5, 2e-07 ]' in path.read_text()
    assert files.read_json(path) == value and list(path.parent.iterdir()) == [path]


def test_a_failed_write_leaves_the_old_file(tmp_path) -> None:
    path = files.write_json(tmp_path / "a.json", {"old": True})
    for bad in (float("nan"), object()):
        with pytest.raises((ValueError, TypeError)):
            files.write_json(path, bad)
    assert json.loads(path.read_text()) == {"old": True} and list(tmp_path.iterdir()) == [path]


def test_folders_appear_only_when_finished(tmp_path) -> None:
    target = tmp_path / "result"
    with pytest.raises(KeyError), files.finished_folder(target) as folder:
        (folder / "half").touch()
        raise KeyError
    assert list(tmp_path.iterdir()) == []
    with files.finished_folder(target) as folder:
        (folder / "whole").touch()
        assert not target.exists()
    assert [p.name for p in target.iterdir()] == ["whole"]
    for replaces, message in ((None, "overwrite=True"), ("other", "something else")):
        with pytest.raises(FileExistsError, match=message), files.finished_folder(target, replaces=replaces):
            pass
    assert [p.name for p in target.iterdir()] == ["whole"]
    with files.finished_folder(target, replaces="whole"):
        pass
    assert list(target.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_refused_early(tmp_path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="cannot write to the output folder"):
        files.check_writable(tmp_path / "file" / "below")
    assert files.check_writable(tmp_path / "new").is_dir() and os.listdir(tmp_path / "new") == []


def test_embedded_names(tmp_path) -> None:
    register("model", "here-today", tmp_path / "gone")
    with pytest.raises(FileNotFoundError, match="reinstall"):
        folder_of("model", "here-today")
    assert folder_of("model", "meta-llama/Llama-3.1-8B-Instruct") is None


def test_presets() -> None:
    paper = get_preset("llama-3.1-8b")
    d, t = paper.discovery, paper.training
    assert (paper.site, d.n_plus, d.n_minus, d.shortlist_size, d.n_latents) == ("blocks.19.hook_resid_post", 250, 250, 40, 20)
    assert (d.induce_dose, d.repair_dose, d.max_incoherence.rate, d.extended_grid_min_shift) == (0.7, 0.4, 0.10, 0.042)
    assert (min(d.grid), max(d.grid), len(d.grid), max(d.extended_grid), len(d.extended_grid)) == (0.0, 0.75, 16, 1.5, 31)
    assert (t.rank, t.alpha, t.learning_rate, t.batch_size, t.epochs, t.schedule) == (16, 32, 7.5e-5, 64, 1.0, "linear")
    with pytest.raises(ValueError, match="unknown preset 'llama-3.1-8'.*did you mean 'llama-3.1-8b'"):
        get_preset("llama-3.1-8")


def test_markdown_tables_and_markers() -> None:
    table = tables.markdown([{"model": "base", "EM": "0 %"}, {"model": "sft", "EM": "40 %"}])
    assert table.splitlines() == ["| model | EM |", "|---|---:|", "| base | 0 % |", "| sft | 40 % |"]
    page = "a\n<!-- t:begin -->\nold\n<!-- t:end -->\nb"
    assert tables.between(page, "t", table) == f"a\n<!-- t:begin -->\n{table.rstrip()}\n<!-- t:end -->\nb"
    with pytest.raises(ValueError, match="expected the markers"):
        tables.between(page, "other", table)
    with pytest.raises(ValueError, match="at least one row"):
        tables.markdown([])


def test_tradeoff_figure_shows_every_run(tmp_path) -> None:
    arms = pd.DataFrame([{"run": name, "test_loss": loss, "misaligned": em, "misaligned_low": 0.0, "misaligned_high": 1.0}
                         for name, loss, em in (("plain", 0.3, 0.5), ("KL", 0.4, 0.05))])  # fmt: skip
    figure = studies.tradeoff(arms, "misaligned")
    assert [float(line.get_ydata()[0]) for line, *_ in figure.axes[0].containers] == [50.0, 5.0]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["plain", "KL"]
    assert plots.save(figure, tmp_path / "f.png").stat().st_size > 10_000 and len(list(tmp_path.iterdir())) == 1
