"""Replies shared out over workers are those of one process, and so is everything that a discovery finds with them."""

import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import tiny_preset

from blockem_tl import Condition, Run, Setting, Steering, Study
from blockem_tl.generation.engine import Engine, TransformerLensEngine
from blockem_tl.generation.reply_fn import Identified, who_replies
from blockem_tl.generation.steering import UNSTEERED
from blockem_tl.saes.latents import decoder_directions
from blockem_tl.study import jobs, sharding
from blockem_tl.study import study as study_module
from blockem_tl.study.executors import InProcess
from blockem_tl.study.sharding import ShardedEngine, WorkerEngine
from blockem_tl.study.stage_commands import DiscoverOptions, discover
from blockem_tl.study.stages import discover_into, train_into, tuned_at


@pytest.fixture
def plain(setting, tmp_path) -> Path:
    train_into(tmp_path / "plain", setting, Run(), progress=False)
    return tmp_path / "plain"


class Three(InProcess):
    """One process that takes as many shares as three would, with a model of its own."""

    workers = 3

    def __init__(self, setting: Setting) -> None:
        super().__init__(replace(setting))


def steered(setting: Setting) -> list[Condition]:
    rows = decoder_directions(setting.sae, [1, 2, 3])
    made = [
        Condition(name=f"{i} at {dose}", steering=(Steering(site=setting.site, direction=row, dose=dose, scale=9.0),))
        for i, row in enumerate(rows)
        for dose in (0.7, -0.4)
    ]
    return [UNSTEERED, *made]


def said(engine: Engine, setting: Setting, **options) -> dict[int, list]:
    conditions = steered(setting)
    parts = [list(range(c, 8)) for c in range(len(conditions))]
    asked = {"conditions": conditions, "prompt_indices": parts, "max_new_tokens": 6, "progress": False, **options}
    found = dict(engine.stream(setting.prompts("core"), **asked))
    assert [len(found[c]) for c in sorted(found)] == [len(part) for part in parts]
    return found


# ------------------------------------------------------------------------------------------------ the engine


def test_the_replies_and_the_identity_are_those_of_one_process(setting, plain) -> None:
    folder = str(plain / "adapter")
    sharded, alone = ShardedEngine(Three(setting), WorkerEngine(adapters={"t": folder})), TransformerLensEngine(setting.model)
    assert isinstance(sharded, Engine) and isinstance(sharded, Identified) and sharded.name == alone.name
    for adapter, own in (("base", "base"), ("t", folder), (None, "base")):
        assert said(sharded, setting, adapter=adapter) == said(alone, setting, adapter=own)
        assert sharded.identity(adapter) == who_replies(alone, own)
    drawn = {"adapter": "base", "temperature": 1.0, "max_new_tokens": [1, 2, 3, 4, 5, 6, 7, 8]}
    assert said(sharded, setting, **drawn) == said(alone, setting, **drawn) != said(alone, setting, **drawn, seed=1)
    assert sharded.identity("t") != sharded.identity("base")


def test_shares_are_even_and_hold_every_reply_once(monkeypatch) -> None:
    asked = [list(range(44)), [3], [5, 1], list(range(20))]
    rows = [(c, p) for c, part in enumerate(asked) for p in part]
    for workers, most in ((1, 1024), (4, 1024), (7, 5), (100, 1024)):
        monkeypatch.setattr(sharding, "MOST_ROWS", most)
        shares = sharding._shares(asked, workers)
        assert [(c, p) for share in shares for c, part in share.items() for p in part] == rows
        sizes = [sum(map(len, share.values())) for share in shares]
        assert max(sizes) - min(sizes) <= 1 and max(sizes) <= most and len(shares) >= min(workers, len(rows))


def test_a_direction_travels_without_its_matrix(setting) -> None:

    condition = steered(setting)[1]
    whole, alone = len(pickle.dumps(condition)), len(pickle.dumps(sharding._portable(condition)))
    assert alone < whole and sharding._portable(condition).fingerprint == condition.fingerprint


def test_a_worker_that_fails_is_named_and_the_others_replies_come_first(setting, monkeypatch) -> None:
    reply = sharding._reply

    def fails(here, *, share, **options):
        if 6 in share:
            raise OSError("no such card")
        return reply(here, share=share, **options)

    monkeypatch.setattr(sharding, "_reply", fails)
    seen = []
    with pytest.raises(RuntimeError, match=r"(?s)1 of 3 shares .*run the same again.*OSError: no such card"):
        for c, _ in ShardedEngine(Three(setting), WorkerEngine()).stream(setting.prompts("core"), conditions=steered(setting)):
            seen.append(c)
    assert seen == [0, 1, 2, 3]


# ------------------------------------------------------------------------------------------------ discovery


def frames(found) -> list[str]:
    return [frame.to_csv() for frame in (found.to_frame(), found.screen_frame(), found.dose_frame())]


@pytest.mark.slow
def test_a_shared_discovery_is_that_of_one_process_row_for_row(setting, plain, tmp_path, monkeypatch) -> None:
    def found(out: str, **options):
        return jobs.discovery(setting, replace(tuned_at(plain), out=tmp_path / out), **options)

    alone, shared = found("alone"), found("shared", executor=Three(setting))
    assert frames(shared) == frames(alone) and shared.latent_set == alone.latent_set
    assert alone.screen_frame()["abandoned"].any()  # it did stop early
    monkeypatch.setattr(jobs, "ShardedEngine", lambda *_: pytest.fail("not asked"))
    first = (tmp_path / "shared" / "seed0" / "asked" / "store.sqlite").stat().st_size
    assert frames(found("shared")) == frames(alone)  # one process goes on with the workers' store, and asks nothing
    assert (tmp_path / "shared" / "seed0" / "asked" / "store.sqlite").stat().st_size == first
    monkeypatch.setattr(jobs, "ShardedEngine", ShardedEngine)
    monkeypatch.setattr(sharding, "_portable", lambda condition: replace(condition, steering=()))
    assert frames(found("deaf", executor=Three(setting))) != frames(alone)


@pytest.mark.slow
def test_a_study_with_more_workers_than_seeds_shares_each_discovery(setting, tmp_path, monkeypatch) -> None:
    def found(out: str) -> list[bytes]:
        with Study(tmp_path / out, setting, seeds=(0, 1), progress=False) as study:
            study.train([Run()])
            assert set(study.latents()) == {0, 1} and len(study.latents("pairs", by="pairs")) == 2
        return [path.read_bytes() for path in sorted((tmp_path / out).rglob("latents/*.json"))]

    asked: list[int] = []
    alone, stream = found("alone"), ShardedEngine.stream
    monkeypatch.setattr(study_module, "executor_of", lambda name, setting, workers: Three(setting))
    monkeypatch.setattr(ShardedEngine, "stream", lambda self, *given, **more: asked.append(1) or stream(self, *given, **more))
    assert found("shared") == alone and len(alone) == 4 and asked


def test_workers_for_pairs_are_refused(setting, plain, tmp_path) -> None:
    with pytest.raises(ValueError, match="by pairs asks for no replies that workers could share"):
        discover_into(tmp_path / "k", setting, plain, by="pairs", workers=2)
    with pytest.raises(ValueError, match="expected one of"):
        discover_into(tmp_path / "k", setting, plain, executor="slurm")
    with pytest.raises(ValueError, match="several cards for a worker are for --engine vllm"):
        discover(tiny_preset.NAME, plain, tmp_path / "k", options=DiscoverOptions(cards=2))
    assert not (tmp_path / "k").exists()


@pytest.mark.slow
def test_processes_and_ray_find_what_one_process_finds(setting, plain, tiny_folder, sae_folder, tmp_path) -> None:
    """The files are equal to the last byte, whoever made the replies."""
    discover_into(tmp_path / "alone", setting, plain, progress=False)
    for name, words in (("processes", ["--workers", "2"]), ("ray", ["--workers", "2", "--executor", "ray"])):
        if name == "ray":
            pytest.importorskip("ray")
        script = tmp_path / f"with_{name}.py"
        script.write_text(
            f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
            "import tiny_preset\n"
            f"tiny_preset.register({str(tiny_folder)!r}, {str(sae_folder)!r})\n"
            "if __name__ == '__main__':\n"
            "    from blockem_tl import cli\n"
            f"    cli.main(['discover', 'tiny', {str(plain)!r}, {str(tmp_path / name)!r}, *{words!r}])\n"
        )
        subprocess.run([sys.executable, str(script)], check=True, timeout=500)
        for file in ("latents.json", "calibrated.csv", "screened.csv", "doses.csv"):
            assert (tmp_path / name / file).read_bytes() == (tmp_path / "alone" / file).read_bytes(), (name, file)
    assert pd.read_csv(tmp_path / "alone" / "screened.csv")["abandoned"].any()
