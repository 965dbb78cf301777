"""The cost of blocking: one training step with stored and live references against a plain LoRA step and the obvious implementation.

    python experiments/benchmarks/blocked_step.py --json results/blocked_step.json
    python experiments/benchmarks/blocked_step.py --shape llama-3.1-8b --json results/blocked_step-8b.json   # on a GPU

Every arm is a whole step (forward, loss, backward, AdamW) through one bridged model with live LoRA. Arms take turns in changing order,
one step each, and ratios are of medians. The obvious implementation runs a second frozen model to its end and encodes both with the whole
SAE. Memory is that of a process of its own per arm: peak resident memory above the libraries' on a CPU, allocated bytes on a GPU.
"""

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Literal, cast

import torch
import tyro
from random_llama import random_llama
from sae_lens import SAE, StandardSAE, StandardSAEConfig
from torch import Tensor
from tqdm.auto import tqdm
from turns import Seconds, medians, timed

from blockem_tl import Blocking, LatentSet, Model, random_latents, record
from blockem_tl.data.chat import Batch, Encoded, pad
from blockem_tl.defences.base_latents import BaseLatents
from blockem_tl.defences.blocking import one_sided_penalty
from blockem_tl.storage import files
from blockem_tl.training.defence import PenaltyFn
from blockem_tl.training.loss import summed_cross_entropy

TASK = "BLOCKED_STEP_TASK"  # set for the processes that are measured
Arm = Literal["plain", "stored", "live", "obvious", "many"]
DuringStep = Callable[[Batch], AbstractContextManager[PenaltyFn | None]]


@dataclass(frozen=True, kw_only=True)
class Batches:
    """A batch of ``rows`` x ``tokens``, the site after so many blocks, and the latents of the SAEs to measure with."""

    site: int
    rows: int
    tokens: int
    d_sae: tuple[int, ...]


SHAPES = {
    # the encoder of 1,024 latents is 3 % of the model's parameters, as the real one's is of 8 billion
    "small-grouped": Batches(site=5, rows=16, tokens=128, d_sae=(1024, 65536)),
    "llama-3.1-8b": Batches(site=20, rows=8, tokens=512, d_sae=(65536,)),
}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of a measurement. ``memory`` and ``processes`` may be left out to save time."""

    shape: Literal["small-grouped", "llama-3.1-8b"] = "small-grouped"
    json: Path | None = None
    repeats: int = 7
    memory: bool = True
    processes: bool = True


class Steps:
    """One model, one SAE per site, a few batches, and the step of every arm."""

    def __init__(self, shape: str, d_sae: int, folder: Path) -> None:
        self.shape, self.batches, self.d_sae, self.folder = shape, SHAPES[shape], d_sae, folder
        self.model = random_llama(shape, adapter="tuned")
        self.parameters = self.model.adapter_parameters("tuned")
        for parameter in self.parameters:
            parameter.requires_grad_(True)
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-5)
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(3, self.model.cfg.d_vocab, (4 * self.batches.rows, self.batches.tokens), generator=generator)
        self.rows = [Encoded(ids=tuple(row), n_system=1, n_prompt=8) for row in ids.tolist()]
        self.taken = 0

    def target(self, block: int, n: int) -> tuple[LatentSet, SAE[Any]]:
        """``n`` random latents of a random ReLU SAE after so many blocks."""
        torch.manual_seed(block)
        width = self.model.cfg.d_model
        sae = StandardSAE(StandardSAEConfig(d_in=width, d_sae=self.d_sae, device=str(self.model.device)))
        sae.W_enc.data.normal_(std=width**-0.5)
        sae.cfg.metadata.hook_name = f"blocks.{block - 1}.hook_resid_post"
        sae.requires_grad_(False)
        return random_latents(sae, n, seed=0), sae

    def during_step(self, arm: Arm) -> DuringStep:
        """The context that an arm puts around a step of plain fine-tuning."""
        if arm == "plain":
            return lambda batch: nullcontext()
        if arm == "obvious":
            return self._obvious()
        blocks = [max(1, self.batches.site * i // 4) for i in ((1, 2, 3, 4) if arm == "many" else (4,))]  # the last one the site
        n = 100 if arm == "many" else 20
        reference = BaseLatents(stored=arm != "live", folder=self.folder)
        blocking = Blocking(targets=[self.target(block, n) for block in blocks], weight=1.0, reference=reference)
        blocking.prepare(self.model, self.rows)
        return partial(_measured, blocking, self.model)

    def _obvious(self) -> DuringStep:
        latent_set, sae = self.target(self.batches.site, 20)
        frozen = random_llama(self.shape, adapter="tuned")
        columns, signs = list(latent_set.latents), torch.tensor(latent_set.signs, device=frozen.device)

        @contextmanager
        def during_step(batch: Batch):
            tuned: dict[str, Tensor] = {}
            base: dict[str, Tensor] = {}
            with torch.no_grad(), frozen.using("base"), frozen.hooks(fwd_hooks=[record(latent_set.site, base)]):
                cast(Any, frozen.hf)(input_ids=batch.ids, attention_mask=batch.mask.long(), use_cache=False)
                reference = sae.encode(base[latent_set.site])[..., columns]
            with self.model.hooks(fwd_hooks=[record(latent_set.site, tuned, detach=False)]):
                yield lambda logits: one_sided_penalty(sae.encode(tuned[latent_set.site])[..., columns], reference, signs, batch.reply)

        return during_step

    def step(self, during_step: DuringStep, hf: Any = None) -> Seconds:
        """Seconds of one whole training step."""
        batch = self._batch()
        with timed(self.model.device) as seconds:
            with during_step(batch) as penalty:
                logits = (hf or cast(Any, self.model.hf))(input_ids=batch.ids, attention_mask=batch.mask.long(), use_cache=False).logits
                loss = summed_cross_entropy(logits, batch) / batch.reply.sum()
                if penalty is not None:
                    loss = loss + penalty(logits).mean()
                loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
        return seconds[0]

    def forward_to_site(self) -> Seconds:
        """Seconds of the reference's own forward, which ends above the site."""
        batch = self._batch()
        with torch.no_grad(), self.model.using("base"), timed(self.model.device) as seconds:
            self.model.run_with_hooks(batch.ids, attention_mask=batch.mask.long(), stop_at_layer=self.batches.site)
        return seconds[0]

    def _batch(self) -> Batch:
        start = self.taken % len(self.rows)
        self.taken += self.batches.rows
        return pad(self.rows[start : start + self.batches.rows], 0, side="right", device=self.model.device)


@contextmanager
def _measured(defence: Blocking, model: Model, batch: Batch):
    """The defence with its metrics, as the trainer asks for them once per step."""
    with defence.during_step(model, batch) as penalty:
        yield penalty
    defence.metrics()


def time_arms(steps: Steps, arms: Sequence[Arm], repeats: int) -> dict[str, Seconds]:
    """Median seconds of a step of each arm, taking turns in changing order; and of the forward up to the site."""
    during, shuffle = {arm: steps.during_step(arm) for arm in arms}, random.Random(0).sample
    times: dict[str, list[Seconds]] = {name: [] for name in (*arms, "forward")}
    for turn in tqdm(range(repeats + 1), desc=f"{steps.d_sae} latents"):
        for arm in shuffle(arms, len(arms)):
            seconds = steps.step(during[arm])
            if turn:  # the first turn warms up
                times[arm].append(seconds)
        if turn:
            times["forward"].append(steps.forward_to_site())
    return {name: medians(values) for name, values in times.items()}


def measure_memory(shape: str, arm: Arm, d_sae: int, folder: Path) -> float:
    """In this process: peak memory of a few steps of one arm, in MB, above that of the libraries."""
    before = resident_mb("VmRSS")
    steps = Steps(shape, d_sae, folder)
    during_step = steps.during_step(arm)
    for _ in range(3):
        steps.step(during_step)
    return torch.cuda.max_memory_allocated() / 1e6 if torch.cuda.is_available() else resident_mb("VmHWM") - before


def resident_mb(what: str) -> float:
    """VmRSS (now) or VmHWM (peak) of this process in MB. (getrusage's peak begins with that of the process that started this one.)"""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(what))
    return int(line.split()[1]) * 1024 / 1e6


def measure_processes(shape: str, d_sae: int, repeats: int, folder: Path) -> float:
    """In each of the processes under torchrun: tokens per second of all of them together, with stored references."""
    torch.distributed.init_process_group("gloo")
    steps = Steps(shape, d_sae, folder)
    during_step = steps.during_step("stored")
    hf = torch.nn.parallel.DistributedDataParallel(steps.model.hf)
    steps.step(during_step, hf)
    torch.distributed.barrier()
    started = time.perf_counter()
    for _ in range(repeats):
        steps.step(during_step, hf)
    torch.distributed.barrier()
    seconds = time.perf_counter() - started
    return torch.distributed.get_world_size() * repeats * steps.batches.rows * steps.batches.tokens / seconds


def child(settings: Settings, arm: str, d_sae: int, folder: Path, launcher: Sequence[str] = ()) -> float:
    """Run one measurement in a process (or two) of its own; its number."""
    task = json.dumps({"arm": arm, "d_sae": d_sae, "folder": str(folder)})
    command = [sys.executable, *launcher, str(Path(__file__)), "--shape", settings.shape, "--repeats", str(settings.repeats)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", TASK: task}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=600)
    if done.returncode:
        raise RuntimeError(f"measuring {arm}: {done.stderr[-2000:]}")
    return float(done.stdout.strip().splitlines()[-1])


def be_child(settings: Settings, arm: str, d_sae: int, folder: str) -> None:
    """The measured process: print its number."""
    if arm != "processes":
        print(measure_memory(settings.shape, cast(Arm, arm), d_sae, Path(folder)))
        return
    speed = measure_processes(settings.shape, d_sae, settings.repeats, Path(folder))
    if torch.distributed.get_rank() == 0:
        print(speed)
    torch.distributed.destroy_process_group()


def run(settings: Settings) -> dict[str, Any]:
    """Measure everything and report."""
    sizes, device = SHAPES[settings.shape].d_sae, "cuda" if torch.cuda.is_available() else "cpu"
    result: dict[str, Any] = {"shape": settings.shape, "device": device, "cores": os.cpu_count(), "repeats": settings.repeats}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for d_sae in sizes:
            main = d_sae == sizes[0]
            arms: list[Arm] = ["plain", "stored", "live", "obvious", "many"] if main else ["plain", "stored", "obvious"]
            repeats = settings.repeats if main else max(3, settings.repeats // 2)
            result |= ratios(time_arms(Steps(settings.shape, d_sae, folder), arms, repeats), "" if main else f"_{d_sae}")
            print(json.dumps(result, indent=2), flush=True)
        if settings.memory:
            turns = {"plain": 3, "stored": 3, "obvious": 1}
            peaks = {arm: median(child(settings, arm, sizes[0], folder) for _ in range(n)) for arm, n in turns.items()}
            result |= {"peak_mb": peaks, "stored_memory_ratio": peaks["stored"] / peaks["plain"]}
            result["obvious_memory_ratio"] = peaks["obvious"] / peaks["plain"]
        if settings.processes and device == "cpu":
            launcher = ["-m", "torch.distributed.run", "--standalone"]
            speeds = [child(settings, "processes", sizes[0], folder, [*launcher, f"--nproc-per-node={n}"]) for n in (1, 2)]
            result |= {"tokens_per_s": speeds, "two_process_ratio": speeds[1] / speeds[0]}
    return result


def ratios(both: dict[str, Seconds], suffix: str) -> dict[str, Any]:
    """The numbers of one table, from the wall clock; and the same from processor time under cpu_."""
    wall, cpu = ({name: pair[i] for name, pair in both.items()} for i in (0, 1))
    return {**_ratios(wall, suffix), **{f"cpu_{name}": value for name, value in _ratios(cpu, suffix).items()}}


def _ratios(seconds: dict[str, float], suffix: str) -> dict[str, Any]:
    found: dict[str, Any] = {f"seconds{suffix}": seconds, f"stored_time_ratio{suffix}": seconds["stored"] / seconds["plain"]}
    found[f"obvious_time_ratio{suffix}"] = seconds["obvious"] / seconds["stored"]
    if "live" in seconds:
        found[f"live_time_ratio{suffix}"] = seconds["live"] / seconds["plain"]
        found[f"live_time_bound{suffix}"] = 1 + 1.1 * seconds["forward"] / seconds["plain"]
        found[f"many_latents_time_ratio{suffix}"] = seconds["many"] / seconds["plain"]
    return found


def main() -> None:
    """Measure, or be one of the processes that are measured."""
    torch.set_num_threads(1)
    settings = tyro.cli(Settings, description=__doc__)
    if TASK in os.environ:
        be_child(settings, **json.loads(os.environ[TASK]))
        return
    result = run(settings)
    print(json.dumps(result, indent=2))
    if settings.json is not None:
        files.write_json(settings.json, {**result, "environment": files.environment()})


if __name__ == "__main__":
    main()
