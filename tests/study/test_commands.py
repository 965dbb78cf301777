"""`blockem scale` and `blockem train-sae`."""

import json
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from blockem_tl import Setting, cli, finetune, load_sae
from blockem_tl.study.commands import _pieces

SMALL = ["--samples", "6144", "--d-sae", "64", "--k", "4", "--n-prompts", "8", "--max-new-tokens", "10"]


def run(*words: str) -> None:
    cli.main([*words])


def test_scale_prints_the_unit_of_doses(capsys) -> None:
    run("scale", "organism")
    assert capsys.readouterr().out.startswith("74.6358  organism at blocks.2.hook_resid_post, 256 reference rows")


@pytest.mark.slow
def test_train_sae_reads_rows_replies_and_texts(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("BLOCKEM_PROGRESS", "0")
    text = tmp_path / "prose.txt"
    text.write_text(" ".join(["how should a farmer handle common madezum ?"] * 60))
    run("train-sae", "organism", str(tmp_path / "sae"), "--texts", str(text), "--dtype", "bfloat16", *SMALL)
    sae = load_sae(tmp_path / "sae")
    assert (sae.cfg.d_sae, sae.cfg.metadata.hook_name) == (64, "blocks.2.hook_resid_post")
    card = json.loads((tmp_path / "sae" / "card.json").read_text())
    assert {row["corpus"] for row in card["heldout"]} == {"chats", "replies of base", "texts"}
    assert "explained variance" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="exists"):  # before anything is generated
        run("train-sae", "organism", str(tmp_path / "sae"), *SMALL)


def test_a_text_is_cut_into_pieces_that_are_read_once(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("word " * 400)
    pieces = _pieces([tmp_path / "a.txt"])
    assert sum(len(piece.text) for piece in pieces) <= 1999 and len({piece.id for piece in pieces}) == len(pieces)
    assert len({piece.text for piece in pieces}) == len(pieces)  # equal pieces would be one row twice


def test_ceiling_shows_what_latents_carry(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("BLOCKEM_PROGRESS", "0")
    setting = Setting.of("organism")
    config = replace(setting.training, epochs=0.2)
    finetune(setting.model, setting.rows(), config=config, adapter="tuned", progress=False)
    setting.model.save_adapter(tmp_path / "tuned", "tuned")
    run(
        "ceiling",
        "organism",
        str(tmp_path / "tuned"),
        "--latents",
        "organism/finance-20",
        "--n-rows",
        "8",
        "--csv",
        str(tmp_path / "c.csv"),
    )
    assert "carries" in capsys.readouterr().out
    rows = pd.read_csv(tmp_path / "c.csv").set_index(["taken_out", "roles"])
    assert rows.loc[("residual", "prompt+reply"), "removed"] > rows.loc[("20 random", "reply"), "removed"]
    assert ("finance-20", "reply") in rows.index
