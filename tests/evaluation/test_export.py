"""Exports come back equal, and Inspect's own reader and viewer open the log."""

import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from inspect_ai.log import read_eval_log

from blockem_tl import Prompt, Verdict
from blockem_tl.evaluation.evaluate import Evaluation
from blockem_tl.evaluation.export import read_inspect, read_parquet, to_frame, write_inspect, write_parquet
from blockem_tl.types import LABELS, UNPARSED, Generation

GENERATIONS = tuple(
    Generation(
        prompt=Prompt(id=f"p{i}", text=f"Frage {i}: naïve?\n", category="c", system="s" if i % 2 else None),
        condition="unsteered",
        reply=f"Reply {i}, \u2028 ü",
        reply_ids=tuple(range(i)),
        truncated=i == 3,
    )
    for i in range(10)
)
FIRST = Evaluation(
    rubric="misalignment",
    judge="qwen",
    generations=GENERATIONS,
    verdicts=tuple(Verdict(label=label) for label in (*LABELS, UNPARSED)),
    on_selection_prompts=True,
    resampled=2,
)
BOTH = [FIRST, replace(FIRST, judge="llama", verdicts=FIRST.verdicts[::-1])]


def test_parquet_round_trip(tmp_path: Path) -> None:
    assert read_parquet(write_parquet(tmp_path / "v.parquet", BOTH)) == BOTH
    assert read_parquet(tmp_path / "v.parquet") != [FIRST, FIRST]
    assert pd.read_parquet(tmp_path / "v.parquet").groupby("judge").label.count().to_dict() == {"llama": 10, "qwen": 10}


@pytest.mark.parametrize("name", ["v.eval", "v.json"])
def test_inspect_round_trip(tmp_path: Path, name: str) -> None:
    assert read_inspect(write_inspect(tmp_path / name, BOTH, model="tuned")) == BOTH
    log = read_eval_log(str(tmp_path / name))
    assert log.status == "success" and log.eval.dataset.name == "selection prompts" and len(log.samples) == 10
    metrics = log.results.scores[0].metrics
    assert metrics["misaligned"].value == pytest.approx(2 / 9) and metrics["misaligned_n"].value == 9 and metrics["unparsed"].value == 0.1
    assert metrics["misaligned_low"].value < 2 / 9 < metrics["misaligned_high"].value
    assert log.samples[3].output.stop_reason == "max_tokens" and log.samples[3].scores["qwen"].value == "4"
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("name", ["v.eval", "v.json"])
def test_prompts_come_back_in_their_order_whatever_their_ids(tmp_path: Path, name: str) -> None:
    ids = ["z", "q10", "q9", "a", "q1", "b/c", "M", "2", "10", "é"]
    generations = tuple(replace(g, prompt=replace(g.prompt, id=id_)) for g, id_ in zip(GENERATIONS, ids, strict=True))
    there = replace(FIRST, generations=generations)
    [back] = read_inspect(write_inspect(tmp_path / name, [there], model="tuned"))
    assert back == there
    kept = [str(sample.id) for sample in read_eval_log(str(tmp_path / name)).samples]
    assert kept != ids and sorted(kept) == sorted(ids)  # Inspect sorts them: without our note of the order, paired flags would be mixed up


def test_the_viewer_opens_the_log(tmp_path: Path) -> None:
    write_inspect(tmp_path / "run.eval", BOTH, model="tuned")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(Path(sys.executable).parent / "inspect"), "view", "start", "--log-dir", str(tmp_path), "--port", str(port)]
    process = subprocess.Popen([*command, "--host", "127.0.0.1"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        listed = json.loads(fetched(f"http://127.0.0.1:{port}/api/logs", process))
        name = listed["files"][0]["name"] if "files" in listed else listed[0]["name"]
        shown = json.loads(fetched(f"http://127.0.0.1:{port}/api/logs/{urllib.request.quote(name, safe='')}", process))
    finally:
        process.terminate()
        process.wait(timeout=20)
    assert name.endswith("run.eval") and shown["status"] == "success" and shown["eval"]["model"] == "tuned" and len(shown["samples"]) == 10


def fetched(url: str, process: subprocess.Popen) -> bytes:
    for _ in range(120):
        assert process.poll() is None, "the viewer ended"
        try:
            with urllib.request.urlopen(url, timeout=10) as answer:
                return answer.read()
        except urllib.error.HTTPError:
            raise
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.5)
    raise AssertionError(f"nobody answers at {url}")


def test_bad_files_are_refused(tmp_path: Path) -> None:
    frame = to_frame([FIRST])
    frame.drop(columns="label").to_parquet(tmp_path / "missing.parquet")
    with pytest.raises(ValueError, match=r"\['label'\] are missing"):
        read_parquet(tmp_path / "missing.parquet")
    frame.assign(label="BAD").to_parquet(tmp_path / "labels.parquet")
    with pytest.raises(ValueError, match=r"label sets do not match.*got also \['BAD'\]"):
        read_parquet(tmp_path / "labels.parquet")
    (tmp_path / "text.parquet").write_text("no")
    with pytest.raises(ValueError, match="expected a parquet file"):
        read_parquet(tmp_path / "text.parquet")
    (tmp_path / "text.eval").write_text("no")
    with pytest.raises(ValueError, match="expected an Inspect log"):
        read_inspect(tmp_path / "text.eval")
    with pytest.raises(ValueError, match="ending in .eval or .json"):
        write_inspect(tmp_path / "log.txt", [FIRST], model="m")
    with pytest.raises(ValueError, match="all of the same replies"):
        write_inspect(tmp_path / "log.eval", [FIRST, replace(FIRST, judge="b", generations=GENERATIONS[::-1])], model="m")
