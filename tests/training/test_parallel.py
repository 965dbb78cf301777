"""Two gloo processes give the losses of one process with twice the batch, and one set of weights."""

import os
import subprocess
import sys
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from parallel_worker import read, train
from shared import EXAMPLES, SITES, assert_trained_alike, sae_at, set_of

from blockem_tl import Blocking, TrainingConfig
from blockem_tl.data.chat import encode_examples
from blockem_tl.models import sharding
from blockem_tl.models.sharding import shard
from blockem_tl.storage import files
from blockem_tl.training.active import ActiveDefences
from blockem_tl.training.loop import Loop

HERE = Path(__file__).parents[1]


def torchrun(processes: int, *arguments: str) -> None:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={processes}",
        str(HERE / "parallel_worker.py"),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{HERE.parent}:{HERE}"}
    done = subprocess.run([*command, *arguments], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_two_processes_equal_one_with_twice_the_batch(tiny_folder, tmp_path) -> None:
    """8 examples per step: 8 at once, or 2 at once in each of two processes."""
    two, one = tmp_path / "two", tmp_path / "one"
    two.mkdir(), one.mkdir()
    torchrun(2, str(tiny_folder), str(two), "2")
    train(Path(tiny_folder), one, 8)
    (history, weights), (_, others), (expected, alone) = read(two, 0), read(two, 1), read(one)
    assert torch.equal(weights, others)
    assert len(history) == len(expected) == 6
    for key in ("loss", "sft", "block", "kl", "grad_norm"):
        np.testing.assert_allclose([row[key] for row in history], [row[key] for row in expected], rtol=2e-3, atol=1e-5, err_msg=key)
    assert expected[-1]["block"] > 0.01
    assert_trained_alike(weights, alone)
    assert sorted(p.name for p in (two / "checkpoints").iterdir()) == sorted(p.name for p in (one / "checkpoints").iterdir())


@pytest.mark.slow
def test_two_processes_with_half_of_the_weights_each_equal_one(tiny_folder, tmp_path) -> None:
    """FSDP with gradient checkpointing: base is in halves, the adapter whole; the checkpoint is the one of a run in one process."""
    two, one = tmp_path / "two", tmp_path / "one"
    two.mkdir(), one.mkdir()
    torchrun(2, str(tiny_folder), str(two), "2", "live", "sharded")
    train(Path(tiny_folder), one, 8, "live")
    (history, weights), (_, others), (expected, alone) = read(two, 0), read(two, 1), read(one)
    assert torch.equal(weights, others)
    for key in ("loss", "sft", "block", "kl", "grad_norm"):
        np.testing.assert_allclose([row[key] for row in history], [row[key] for row in expected], rtol=2e-3, atol=1e-5, err_msg=key)
    assert_trained_alike(weights, alone)
    held = [files.read_json(out / name) for out, name in ((two, "held0.json"), (two, "held1.json"), (one, "held0.json"))]
    lora = weights.numel()
    assert held[0] - lora < 0.6 * (held[2] - lora) and held[0] + held[1] - lora >= held[2]
    saved = [files.read_json(out / "checkpoints" / "epoch-2" / "run.json")["identity"] for out in (two, one)]
    assert saved[0] == saved[1]


def test_what_cannot_be_sharded_is_refused(tiny, monkeypatch) -> None:
    with pytest.raises(ValueError, match="expected several processes, got one: start the script with torchrun"):
        shard(tiny)
    monkeypatch.setattr(sharding, "is_sharded", lambda model: True)
    tiny.add_adapter("t")
    sae = sae_at(SITES[0])
    with pytest.raises(ValueError, match='this one is sharded: pass reference="live"'):
        Blocking(latent_set=set_of(sae), sae=sae, weight=1.0).prepare(tiny, encode_examples(tiny.tokenizer, EXAMPLES))


def test_a_batch_that_cannot_be_shared_out_is_refused() -> None:
    with pytest.raises(ValueError, match="8 on 3 processes is 2.66667 examples each"):
        TrainingConfig(batch_size=8).micro_batch(3)
    with pytest.raises(ValueError, match="4 examples each, which must be a whole multiple of micro_batch_size 3"):
        TrainingConfig(batch_size=12, micro_batch_size=3).micro_batch(3)
    assert [TrainingConfig(batch_size=8, micro_batch_size=micro).micro_batch(2) for micro in (None, 2, 8)] == [4, 2, 4]


def test_every_process_has_a_share_of_every_step_and_uneven_ones_are_filled_up(tiny) -> None:
    tiny.add_adapter("t")
    rows = encode_examples(tiny.tokenizer, EXAMPLES[:21])
    loop = Loop(tiny, "t", EXAMPLES[:21], rows, TrainingConfig(batch_size=8), ActiveDefences(tiny, []), None)
    alone = [loop._rows() for loop.history in ([{}] * n for n in range(6))]
    assert [len(step) for step in alone] == [8, 8, 5, 8, 8, 5]
    assert sorted(chain(*alone[:3])) == sorted(chain(*alone[3:])) == list(range(21))
    assert alone[0] != alone[3]  # every epoch in an order of its own
    loop.processes = SimpleNamespace(num_processes=4)
    shared = [loop._rows() for loop.history in ([{}] * n for n in range(6))]
    assert [len(step) for step in shared] == [8, 8, 8, 8, 8, 8] and shared[2] == alone[2] + alone[0][:3]
