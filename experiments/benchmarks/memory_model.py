"""The memory that `blockem plan` foretells against the peak that a process really has: blocked fine-tuning of random Llamas.

    python experiments/benchmarks/memory_model.py --json memory.json

Each case is a process of its own: `finetune` with `Blocking` for two steps, since the optimizer's moments are there from the second on.
Foretold is such a step on tensors without data. Measured is the peak of resident memory above that of the process before there was a
model, on a GPU the peak of allocated bytes. The C library is told to give freed memory back at once: left alone it keeps up to 70 % more
than is in use.
"""

import json
import multiprocessing
import os
import resource
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import psutil
import torch
import tyro
from random_llama import SHAPES, random_weights, words
from transformers import LlamaConfig

from blockem_tl import Blocking, Example, TrainingConfig, finetune, load_model, random_latents
from blockem_tl.plan import skeleton, stages
from blockem_tl.plan.meter import Meter
from blockem_tl.storage import files

MB = 2**20
CHAT = "{% for m in messages %} <{{ m.role }}> {{ m.content }}{% endfor %}{% if add_generation_prompt %} <assistant>{% endif %}"


@dataclass(frozen=True)
class Case:
    """One shape, with ``rows`` of ``tokens``, half of them prompt."""

    shape: str
    rows: int
    tokens: int
    checkpointing: bool = False
    site: int = 4
    d_sae: int = 4096

    @property
    def place(self) -> str:
        return f"blocks.{self.site}.hook_resid_post"

    @property
    def config(self) -> TrainingConfig:
        """A step is one micro-batch."""
        return TrainingConfig(batch_size=self.rows, gradient_checkpointing=self.checkpointing)


CASES = (
    Case("small", 64, 256), Case("small-grouped", 64, 256), Case("small-grouped", 32, 512), Case("small-grouped", 64, 512, True),
    Case("smollm2-135m", 8, 128), Case("smollm2-135m", 4, 256), Case("smollm2-135m", 8, 128, True), Case("smollm2-135m", 16, 64),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Options:
    """cases: of the list, by number; all by default."""

    cases: tuple[int, ...] = tuple(range(len(CASES)))
    json: Annotated[Path | None, tyro.conf.arg(name="json")] = None


def foretold(case: Case) -> float:
    """MB, on tensors without data."""
    shape = SHAPES[case.shape]
    with Meter(masked=0.5) as meter:
        model = skeleton.skeleton(LlamaConfig(**shape), dtype=torch.float32, context=case.tokens)  # pyright: ignore[reportArgumentType]
        sae = stages.plain_sae(case.place, model.cfg.d_model, case.d_sae)
        with stages.trainable(model, case.config) as parameters:
            batch = stages.rows_of(case.rows, case.tokens, model.device)
            resident = meter.now + sum(2 * p.numel() * p.element_size() for p in parameters)
            work = stages.peak_of(meter, lambda: stages.training_step(model, batch, sae, list(range(20)), live=True))
            return (resident + work) / MB


def measured(case: Case) -> float:
    """MB, in this process: `finetune` with `Blocking` for two steps."""
    torch.set_num_threads(1)
    start = psutil.Process().memory_info().rss
    tokenizer = words(SHAPES[case.shape]["vocab_size"])
    tokenizer.chat_template = CHAT
    model = load_model(random_weights(case.shape, context=case.tokens), tokenizer=tokenizer, check="off")
    sae = stages.plain_sae(case.place, model.cfg.d_model, case.d_sae).to_empty(device=str(model.device))
    for parameter in sae.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    half = case.tokens // 2
    rows = [Example(id=str(i), prompt=" ".join(["w1"] * (half - 2)), completion=" ".join(["w2"] * half)) for i in range(2 * case.rows)]
    block = Blocking(latent_set=random_latents(sae, 20, seed=0), sae=sae, weight=1.0, reference="live")
    finetune(model, rows, config=case.config, defences=[block], progress=False)
    if model.device.type == "cuda":
        return torch.cuda.max_memory_allocated() / MB
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - start) / MB


def main(options: Options) -> dict[str, Any]:
    os.environ |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}  # read where the processes start
    rows = []
    for number in options.cases:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            found = {"foretold_mb": pool.apply(foretold, [CASES[number]]), "measured_mb": 0.0}
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            found["measured_mb"] = pool.apply(measured, [CASES[number]])
        rows.append({**asdict(CASES[number]), **found, "ratio": found["foretold_mb"] / found["measured_mb"]})
        print(json.dumps(rows[-1]), flush=True)
    result = {"cases": rows, "worst": max(abs(row["ratio"] - 1) for row in rows)}
    print(f"the worst is {100 * result['worst']:.0f} % off")
    if options.json is not None:
        files.write_json(options.json, result)
    return result


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
