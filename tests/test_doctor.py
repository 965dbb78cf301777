"""The doctor finds what is wrong before a long run, and the command line says it in one line."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from sae_lens import StandardSAE, StandardSAEConfig

from blockem_tl import cli, doctor, get_preset, organism
from blockem_tl.presets import PRESETS, Needs, Preset
from blockem_tl.types import Prompt, Verdict

ORGANISM = get_preset("organism")


SELF_TESTS = tuple(f"self-test: {name}" for name in ("steering", "edits", "replies", "end of turn", "rendering", "adapters"))


def findings(preset: Preset, **options) -> dict[str, doctor.Finding]:
    rows = organism.reference_texts(4)
    prompts, replies = [Prompt(id=row.id, text=row.prompt) for row in rows], [row.completion for row in rows]
    return {f.check: f for f in doctor.examine(preset, prompts=prompts, replies=replies, device="cpu", **options)}


def test_a_sound_preset_passes_every_check() -> None:
    found = findings(ORGANISM, judge=organism.OrganismJudge())
    assert {name: f.passed for name, f in found.items()} == dict.fromkeys(
        ("versions", "disk", "memory", "judge", "model", "sae", "chat template", "hooks", *SELF_TESTS, "reconstruction"), True
    )
    assert "torch" in found["versions"].seen and "completion tokens" in found["chat template"].seen and "fires" in found["hooks"].seen


def test_too_small_a_machine_is_found() -> None:
    found = findings(replace(ORGANISM, requires=Needs(disk_gb=1e6, memory_gb=1e5)))
    assert found["disk"].passed is False and "expected 1e+06 GB free" in found["disk"].seen
    assert found["memory"].passed is False and "of free memory" in found["memory"].seen and found["judge"].passed is None
    if not torch.cuda.is_available():
        assert "got none that torch can see" in findings(replace(ORGANISM, requires=Needs(gpu_gb=1.0)))["memory"].seen


def test_a_missing_model_stops_only_what_depends_on_it(tmp_path: Path) -> None:
    found = findings(replace(ORGANISM, model=str(tmp_path / "absent")))
    assert found["model"].passed is False and "cannot load a model" in found["model"].seen
    assert found["sae"].passed and all(found[name].passed is None for name in ("chat template", "hooks", "reconstruction"))


def test_a_wrong_sae_is_found(tmp_path: Path) -> None:
    width = doctor.load_model("organism", device="cpu").cfg.d_model
    torch.manual_seed(0)
    sae = StandardSAE(StandardSAEConfig(d_in=width, d_sae=2 * width))
    sae.cfg.metadata.hook_name = ORGANISM.site
    sae.save_model(str(tmp_path / "sae"))
    found = findings(replace(ORGANISM, sae=(str(tmp_path / "sae"), None)))["reconstruction"]
    assert found.passed is False and "% of the variance" in found.seen and "is it this model's SAE" in found.seen
    elsewhere = findings(replace(ORGANISM, site="blocks.0.hook_resid_post"))["reconstruction"]
    assert elsewhere.passed is False and "expected an SAE of blocks.0.hook_resid_post" in elsewhere.seen


def test_a_judge_without_labels_is_found() -> None:
    class Mute:
        name = "mute"

        def grade(self, prompts, replies, *, rubric: str = "misalignment") -> list[Verdict]:
            return [Verdict(label="UNPARSED")] * len(prompts)

    found = findings(replace(ORGANISM, model="nowhere"), judge=Mute())["judge"]
    assert found.passed is False and "named no label" in found.seen


# ------------------------------------------------------------------------------------------------ presets and the command line


def test_the_presets_of_the_paper_and_its_ports() -> None:
    assert set(PRESETS) == {
        "organism",
        "organism-v1",
        "organism-last-layer",
        "smollm2-135m",
        "llama-3.1-8b",
        "llama-3.1-8b-last-layer",
        "llama-3.2-1b",
        "qwen2.5-7b",
    }
    main = get_preset("llama-3.1-8b")
    assert (main.sae, main.site) == (("goodfire-llama-3.1-8b-instruct", "layer_19"), "blocks.19.hook_resid_post")
    assert get_preset("qwen2.5-7b").discovery.induce_dose == 0.3 and main.discovery.induce_dose == 0.7


def test_public_saes_are_in_saelens_own_list() -> None:
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    listed = get_pretrained_saes_directory()
    for preset in PRESETS.values():
        release, sae_id = preset.sae
        assert sae_id is None or preset.data == "organism" or sae_id in listed[release].saes_map  # the organism's are shipped


def test_presets_are_listed_with_what_they_need(capsys: pytest.CaptureFixture) -> None:
    cli.main(["presets"])
    shown = capsys.readouterr().out
    card = f"GPU with {PRESETS['llama-3.1-8b'].requires.gpu_gb:g} GB"
    assert all(name in shown for name in PRESETS) and card in shown and "reckoned, not measured" in shown


def test_the_doctors_command(capsys: pytest.CaptureFixture) -> None:
    cli.main(["doctor", "organism"])
    assert capsys.readouterr().out.count("ok ") >= 9
    with pytest.raises(SystemExit, match="unknown preset 'nope'"):
        cli.main(["doctor", "nope"])


def test_data_commands(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    cli.main(["data", "list"])
    assert "core-misalignment" in capsys.readouterr().out
    for name, start in (("core", 0), ("plot", 6)):
        (tmp_path / f"{name}.csv").write_text("id,question\n" + "\n".join(f"{name}{i},Question {i}?" for i in range(start, start + 8)))
    cli.main(["data", "overlap", str(tmp_path / "core.csv"), str(tmp_path / "plot.csv")])
    assert "core6, core7" in capsys.readouterr().out
    for bad, message in (
        (["data", "fetch", "nope"], "unknown data 'nope'"),
        (["data", "overlap", str(tmp_path / "core.csv")], "at least two"),
    ):
        with pytest.raises(SystemExit, match=message):
            cli.main(bad)


def test_rows_are_split_into_a_new_folder(tmp_path: Path) -> None:
    rows = [{"prompt": f"q{i}", "completion": "c", "canary": "keep me"} for i in range(12)]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    command = ["data", "split", str(tmp_path / "rows.jsonl"), str(tmp_path / "split"), "--train", "9", "--heldout", "3"]
    cli.main(command)
    report = json.loads((tmp_path / "split" / "report.json").read_text())
    assert report == {"train": 9, "heldout": 3, "repeated_rows_dropped": 0, "shared": 0, "seed": 0}
    assert (tmp_path / "split" / "train.jsonl").read_text().count("keep me") == 9
    with pytest.raises(SystemExit, match="exists"):
        cli.main(command)


def test_the_judge_command_explains_a_dead_endpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in.jsonl").write_text(json.dumps({"prompt": "q", "reply": "r"}))
    with pytest.raises(SystemExit, match="no judge answers at http://127.0.0.1:9/v1"):
        cli.main(["judge", "in.jsonl", "out.jsonl", "--model", "m", "--url", "http://127.0.0.1:9/v1"])
    assert not (tmp_path / "out.jsonl").exists()


def test_the_plan_command(capsys: pytest.CaptureFixture) -> None:
    cli.main(["power", "--rate", "0.4", "--prompts", "29"])
    assert "30.3 points" in capsys.readouterr().out
