"""Fused against eager attention: speed of a training step, a forward and replies, and the memory of a training step.

    python experiments/benchmarks/attention.py --json attention.json
    python experiments/benchmarks/attention.py --shape llama-3.1-8b --rows 8 --json attention.json     # on a GPU

Random weights; both models are the same and take turns in one process. Ratios are eager / fused: 2 is twice as fast. Memory is the most
tensors alive at once in a training step, counted one by one.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import torch
import tyro
from random_llama import SHAPES, random_weights, words
from turns import medians, take_turns

from blockem_tl import Model, Prompt, generate, load_model
from blockem_tl.plan import stages
from blockem_tl.plan.meter import Meter
from blockem_tl.storage import files, machine
from blockem_tl.training.config import TrainingConfig
from blockem_tl.training.loss import summed_cross_entropy

KINDS: tuple[Literal["eager", "sdpa"], ...] = ("eager", "sdpa")


@dataclass(frozen=True, kw_only=True)
class Options:
    """tokens: lengths of the rows.  rows: at once.  new_tokens: of a reply.  repetitions: of each measurement, in turns."""

    shape: str = "smollm2-135m"
    tokens: tuple[int, ...] = (64, 256, 512)
    rows: int = 4
    new_tokens: int = 32
    repetitions: int = 5
    json: Annotated[Path | None, tyro.conf.arg(name="json")] = None


def model_of(options: Options, attention: Literal["eager", "sdpa"]) -> Model:
    """The same random weights every time."""
    weights = random_weights(options.shape, context=max(options.tokens) + options.new_tokens)
    return load_model(weights, tokenizer=words(SHAPES[options.shape]["vocab_size"]), attention=attention, check="off")


def training_step(model: Model, rows: int, tokens: int) -> None:
    """Forward and backward of LoRA in every block."""
    batch = stages.rows_of(rows, tokens, model.device)
    with stages.trainable(model, TrainingConfig(gradient_checkpointing=False)):
        logits = cast(Any, model.hf)(input_ids=batch.ids, attention_mask=batch.mask.long(), use_cache=False).logits
        summed_cross_entropy(logits, batch).backward()


@torch.no_grad()
def forward(model: Model, rows: int, tokens: int) -> None:
    batch = stages.rows_of(rows, tokens, model.device)
    cast(Any, model.hf)(input_ids=batch.ids, attention_mask=batch.mask.long(), use_cache=False)


def replies(model: Model, rows: int, tokens: int, new_tokens: int) -> None:
    prompts = [Prompt(id=str(i), text=" ".join([f"w{i}"] * (tokens - 3))) for i in range(rows)]
    generate(model, prompts, max_new_tokens=new_tokens, progress=False)


def peak_mb(model: Model, rows: int, tokens: int) -> float:
    """Of one training step: the most tensors that were alive at once, beyond the model."""
    with Meter() as meter:
        return stages.peak_of(meter, lambda: training_step(model, rows, tokens)) / 2**20


def measured(options: Options, models: dict[str, Model], tokens: int) -> dict[str, Any]:
    """A row of ratios, eager / sdpa."""
    works: dict[str, Callable[[Model], None]] = {
        "training_step": lambda model: training_step(model, options.rows, tokens),
        "forward": lambda model: forward(model, options.rows, tokens),
        "replies": lambda model: replies(model, options.rows, tokens, options.new_tokens),
    }
    row: dict[str, Any] = {"tokens": tokens}
    device = models["eager"].device
    for name, work in works.items():
        seconds = take_turns({kind: partial(work, models[kind]) for kind in KINDS}, options.repetitions, device)
        eager, fused = (medians(seconds[kind]) for kind in KINDS)
        row[name] = eager.wall / fused.wall if device.type == "cuda" else eager.cpu / fused.cpu
    peaks = [peak_mb(models[kind], options.rows, tokens) for kind in KINDS]
    return {**row, "memory": peaks[0] / peaks[1], "eager_mb": peaks[0], "sdpa_mb": peaks[1]}


def main(options: Options) -> dict[str, Any]:
    torch.set_num_threads(1)
    models = {kind: model_of(options, kind) for kind in KINDS}
    rows = []
    for tokens in options.tokens:
        rows.append(measured(options, models, tokens))
        print(json.dumps(rows[-1]), flush=True)
    result = {"shape": options.shape, "rows": options.rows, "lengths": rows, "machine": machine.described()}
    if options.json is not None:
        files.write_json(options.json, result)
    return result


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
