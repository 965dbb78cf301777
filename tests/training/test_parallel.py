"""Two gloo processes give the losses of one process with twice the batch, and one set of weights."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from parallel_worker import CONFIG, read, train

from blockem_tl import TrainingConfig
from blockem_tl.training.config import trainer_arguments

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
    torch.testing.assert_close(weights, alone, rtol=1e-2, atol=1e-4)
    assert sorted(p.name for p in (two / "checkpoints").iterdir()) == sorted(p.name for p in (one / "checkpoints").iterdir())


def test_a_batch_that_cannot_be_shared_out_is_refused(tiny, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("blockem_tl.training.config._Arguments.world_size", 3)
    with pytest.raises(ValueError, match="8 on 3 processes is 2.66667 examples each"):
        trainer_arguments(TrainingConfig(batch_size=8), tiny, str(tmp_path), [], "t")
    assert CONFIG.batch_size % 2 == 0
