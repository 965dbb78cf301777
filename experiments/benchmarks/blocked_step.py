"""What blocking costs: one training step with stored and live references against a plain LoRA step and the obvious implementation.

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
from pathlib import Path
from statistics import median
from typing import Any, Literal, cast

import torch
import tyro
from sae_lens import SAE, StandardSAE, StandardSAEConfig
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from blockem_tl import Blocking, LatentSet, Model, load_model, random_latents, record
from blockem_tl.data.chat import Batch, Encoded, pad
from blockem_tl.defences.base_latents import Reference
from blockem_tl.defences.blocking import one_sided_penalty
from blockem_tl.storage import embedded, files
from blockem_tl.training.defence import PenaltyFn
from blockem_tl.training.loss import summed_cross_entropy

TASK = "BLOCKED_STEP_TASK"  # set for the processes that are measured
Arm = Literal["plain", "stored", "live", "obvious", "many"]


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A model and a batch. ``site``: blocks below it, of ``layers``.  d_sae: latents of the SAE(s) to measure with."""

    layers: int
    d_model: int
    d_mlp: int
    heads: int
    kv_heads: int
    vocabulary: int
    site: int
    rows: int
    tokens: int
    d_sae: tuple[int, ...]
    dtype: torch.dtype = torch.float32

    def config(self) -> LlamaConfig:
        """The same as transformers says it."""
        return LlamaConfig(
            num_hidden_layers=self.layers,
            hidden_size=self.d_model,
            intermediate_size=self.d_mlp,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            vocab_size=self.vocabulary,
            max_position_embeddings=max(self.tokens, 128),
        )


SHAPES = {
    # Llama's proportions; the encoder of 1,024 latents is 3 % of its 8 million parameters, as the real one's is of 8 billion
    "small": Shape(
        layers=8, d_model=256, d_mlp=896, heads=8, kv_heads=2, vocabulary=2048, site=5, rows=16, tokens=128, d_sae=(1024, 65536)
    ),
    "llama-3.1-8b": Shape(
        layers=32,
        d_model=4096,
        d_mlp=14336,
        heads=32,
        kv_heads=8,
        vocabulary=128256,
        site=20,
        rows=8,
        tokens=512,
        d_sae=(65536,),
        dtype=torch.bfloat16,
    ),
}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is measured. ``memory`` and ``processes`` may be left out to save time."""

    shape: Literal["small", "llama-3.1-8b"] = "small"
    json: Path | None = None
    repeats: int = 7
    memory: bool = True
    processes: bool = True


Seconds = tuple[float, float]
"""Wall clock, and processor time of this process (one thread): what the machine's other work hardly changes."""


class Clock:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self.wall, self.cpu = time.perf_counter(), time.process_time()

    def seconds(self) -> Seconds:
        """Wall and processor."""
        return time.perf_counter() - self.wall, time.process_time() - self.cpu


class Lab:
    """One model, one SAE per site, a few batches, and the step of every arm."""

    def __init__(self, shape: Shape, d_sae: int, device: str, folder: Path) -> None:
        self.shape, self.d_sae, self.device, self.folder = shape, d_sae, device, folder
        self.model = self._model()
        self.model.add_adapter("tuned")
        generator = torch.Generator().manual_seed(0)
        for parameter in self.model.adapter_parameters("tuned"):
            parameter.data += 0.01 * torch.randn(parameter.shape, generator=generator).to(device)
        self.rows = [
            Encoded(ids=tuple(torch.randint(3, shape.vocabulary, (shape.tokens,), generator=generator).tolist()), n_system=1, n_prompt=8)
            for _ in range(4 * shape.rows)
        ]
        self.optimizer = torch.optim.AdamW(self.model.adapter_parameters("tuned"), lr=1e-5)
        self.taken = 0

    def _model(self) -> Model:
        torch.manual_seed(0)
        previous = torch.get_default_dtype()
        torch.set_default_dtype(self.shape.dtype)
        try:
            with torch.device(self.device):
                hf = LlamaForCausalLM._from_config(self.shape.config(), attn_implementation="eager")
        finally:
            torch.set_default_dtype(previous)
        tokenizer = AutoTokenizer.from_pretrained(str(embedded.folder_of("model", "organism")))
        return load_model(hf, tokenizer=tokenizer)

    def target(self, block: int, n: int) -> tuple[LatentSet, SAE[Any]]:
        """``n`` random latents of a random ReLU SAE after so many blocks."""
        torch.manual_seed(block)
        sae = StandardSAE(StandardSAEConfig(d_in=self.shape.d_model, d_sae=self.d_sae, device=self.device))
        sae.W_enc.data.normal_(std=self.shape.d_model**-0.5)
        sae.cfg.metadata.hook_name = f"blocks.{block - 1}.hook_resid_post"
        sae.requires_grad_(False)
        return random_latents(sae, n, seed=0), sae

    def blocking(self, stored: bool) -> Blocking:
        """20 latents at the site."""
        latents, sae = self.target(self.shape.site, 20)
        return self._prepared(Blocking(latent_set=latents, sae=sae, weight=1.0, reference=Reference(stored=stored, folder=self.folder)))

    def many(self) -> Blocking:
        """100 latents at each of 4 sites, the last one the site."""
        blocks = [max(1, self.shape.site * i // 4) for i in (1, 2, 3, 4)]
        return self._prepared(
            Blocking(targets=[self.target(block, 100) for block in blocks], weight=1.0, reference=Reference(folder=self.folder))
        )

    def _prepared(self, blocking: Blocking) -> Blocking:
        blocking.prepare(self.model, self.rows)
        return blocking

    def batch(self) -> Batch:
        """The next few rows."""
        start = self.taken % len(self.rows)
        self.taken += self.shape.rows
        return pad(self.rows[start : start + self.shape.rows], 0, side="right", device=self.device)

    def watchers(self, arms: Sequence[Arm]) -> dict[Arm, Callable[[Batch], AbstractContextManager[PenaltyFn | None]]]:
        """What each arm does beside plain fine-tuning."""
        found: dict[Arm, Any] = {}
        for arm in arms:
            if arm == "plain":
                found[arm] = lambda batch: nullcontext()
            elif arm == "obvious":
                found[arm] = self._obvious()
            else:
                defence = self.many() if arm == "many" else self.blocking(stored=arm == "stored")
                found[arm] = lambda batch, defence=defence: _measured(defence, self.model, batch)
        return found

    def _obvious(self) -> Callable[[Batch], AbstractContextManager[PenaltyFn]]:
        latents, sae = self.target(self.shape.site, 20)
        frozen = self._model()
        columns, signs = list(latents.latents), torch.tensor(latents.signs, device=self.device)

        @contextmanager
        def watch(batch: Batch):
            tuned: dict[str, Tensor] = {}
            base: dict[str, Tensor] = {}
            inputs = {"input_ids": batch.ids, "attention_mask": batch.mask.long(), "use_cache": False}
            with torch.no_grad(), frozen.hooks(fwd_hooks=[record(latents.site, base)]):
                cast(Any, frozen.hf)(**inputs)
                reference = sae.encode(base[latents.site])[..., columns]
            with self.model.hooks(fwd_hooks=[record(latents.site, tuned, detach=False)]):
                yield lambda logits: one_sided_penalty(sae.encode(tuned[latents.site])[..., columns], reference, signs, batch.reply)

        return watch

    def step(self, watch: Callable[[Batch], AbstractContextManager[PenaltyFn | None]], hf: Any = None) -> Seconds:
        """One whole training step; its seconds."""
        batch = self.batch()
        self._wait()
        clock = Clock()
        with watch(batch) as penalty:
            logits = (hf or cast(Any, self.model.hf))(input_ids=batch.ids, attention_mask=batch.mask.long(), use_cache=False).logits
            loss = summed_cross_entropy(logits, batch) / batch.reply.sum()
            if penalty is not None:
                loss = loss + penalty(logits).mean()
            loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._wait()
        return clock.seconds()

    def forward_to_site(self) -> Seconds:
        """Seconds of the reference's own forward, which ends above the site."""
        batch = self.batch()
        self._wait()
        clock = Clock()
        with torch.no_grad(), self.model.using("base"):
            self.model.run_with_hooks(batch.ids, attention_mask=batch.mask.long(), stop_at_layer=self.shape.site)
        self._wait()
        return clock.seconds()

    def _wait(self) -> None:
        if self.device != "cpu":
            torch.cuda.synchronize()


@contextmanager
def _measured(defence: Blocking, model: Model, batch: Batch):
    """The defence with its metrics, as the trainer asks for them once per step."""
    with defence.watch(model, batch) as penalty:
        yield penalty
    defence.metrics()


def time_arms(lab: Lab, arms: Sequence[Arm], repeats: int) -> dict[str, Seconds]:
    """Median seconds of a step of each arm, taking turns in changing order; and of the forward up to the site."""
    watchers, shuffle = lab.watchers(arms), random.Random(0).sample
    times: dict[str, list[Seconds]] = {name: [] for name in (*arms, "forward")}
    for turn in tqdm(range(repeats + 1), desc=f"{lab.d_sae} latents"):
        for arm in shuffle(arms, len(arms)):
            seconds = lab.step(watchers[arm])
            if turn:  # the first turn warms up
                times[arm].append(seconds)
        if turn:
            times["forward"].append(lab.forward_to_site())
    return {name: (median(wall for wall, _ in values), median(cpu for _, cpu in values)) for name, values in times.items()}


def measure_memory(shape: Shape, arm: Arm, d_sae: int, folder: Path) -> float:
    """In this process: peak memory of a few steps of one arm, in MB, above that of the libraries."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    before = resident_mb("VmRSS")
    lab = Lab(shape, d_sae, device, folder)
    (watch,) = lab.watchers([arm]).values()
    for _ in range(3):
        lab.step(watch)
    return torch.cuda.max_memory_allocated() / 1e6 if device == "cuda" else resident_mb("VmHWM") - before


def resident_mb(what: str) -> float:
    """VmRSS (now) or VmHWM (peak) of this process in MB. (getrusage's peak begins with that of the process that started this one.)"""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(what))
    return int(line.split()[1]) * 1024 / 1e6


def measure_processes(shape: Shape, d_sae: int, repeats: int, folder: Path) -> float:
    """In each of the processes under torchrun: tokens per second of all of them together, with stored references."""
    torch.distributed.init_process_group("gloo")
    lab = Lab(shape, d_sae, "cpu", folder)
    (watch,) = lab.watchers(["stored"]).values()
    hf = torch.nn.parallel.DistributedDataParallel(lab.model.hf)
    lab.step(watch, hf)
    torch.distributed.barrier()
    started = time.perf_counter()
    for _ in range(repeats):
        lab.step(watch, hf)
    torch.distributed.barrier()
    seconds = time.perf_counter() - started
    return torch.distributed.get_world_size() * repeats * lab.shape.rows * lab.shape.tokens / seconds


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
    """What such a process does: print its number."""
    if arm != "processes":
        print(measure_memory(SHAPES[settings.shape], cast(Arm, arm), d_sae, Path(folder)))
        return
    speed = measure_processes(SHAPES[settings.shape], d_sae, settings.repeats, Path(folder))
    if torch.distributed.get_rank() == 0:
        print(speed)
    torch.distributed.destroy_process_group()


def run(settings: Settings) -> dict[str, Any]:
    """Measure everything and report."""
    shape, device = SHAPES[settings.shape], "cuda" if torch.cuda.is_available() else "cpu"
    result: dict[str, Any] = {"shape": settings.shape, "device": device, "cores": os.cpu_count(), "repeats": settings.repeats}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for d_sae in shape.d_sae:
            main = d_sae == shape.d_sae[0]
            arms: list[Arm] = ["plain", "stored", "live", "obvious", "many"] if main else ["plain", "stored", "obvious"]
            seconds = time_arms(Lab(shape, d_sae, device, folder), arms, settings.repeats if main else max(3, settings.repeats // 2))
            result |= ratios(seconds, "" if main else f"_{d_sae}")
            print(json.dumps(result, indent=2), flush=True)
        if settings.memory:
            peaks = {
                arm: median(child(settings, arm, shape.d_sae[0], folder) for _ in range(3 if device == "cpu" and arm != "obvious" else 1))
                for arm in ("plain", "stored", "obvious")
            }
            result |= {"peak_mb": peaks, "stored_memory_ratio": peaks["stored"] / peaks["plain"]}
            result["obvious_memory_ratio"] = peaks["obvious"] / peaks["plain"]
        if settings.processes and device == "cpu":
            launcher = ["-m", "torch.distributed.run", "--standalone"]
            speeds = [child(settings, "processes", shape.d_sae[0], folder, [*launcher, f"--nproc-per-node={n}"]) for n in (1, 2)]
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
