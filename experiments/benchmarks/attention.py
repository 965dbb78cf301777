"""Fused against eager attention and bfloat16 against float32: speed of a training step, a forward and replies, memory of a training step.

    python experiments/benchmarks/attention.py --json attention.json
    python experiments/benchmarks/attention.py --shape llama-3.1-8b --rows 8 --json attention.json     # on a GPU

Random weights; the models are the same and take turns in one process. Ratios are to eager attention in float32 (on a GPU in bfloat16,
where nobody trains otherwise): 2 is twice as fast, or half of the memory, which is the most tensors alive at once in a training step,
counted one by one.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, cast

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
from blockem_tl.views.tables import show


class Kind(NamedTuple):
    """What differs between the models."""

    attention: Literal["eager", "sdpa"]
    dtype: Literal["float32", "bfloat16"]


KINDS = tuple(Kind(attention, dtype) for dtype in ("float32", "bfloat16") for attention in ("eager", "sdpa"))


@dataclass(frozen=True, kw_only=True)
class Options:
    """tokens: lengths of the rows.  rows: at once.  new_tokens: of a reply.  repetitions: of each measurement, in turns.  dtypes: both by
    default, on a GPU bfloat16."""

    shape: str = "smollm2-135m"
    tokens: tuple[int, ...] = (64, 256, 512)
    rows: int = 4
    new_tokens: int = 32
    repetitions: int = 5
    dtypes: tuple[Literal["float32", "bfloat16"], ...] = ("bfloat16",) if torch.cuda.is_available() else ("float32", "bfloat16")
    json: Annotated[Path | None, tyro.conf.arg(name="json")] = None


def model_of(options: Options, kind: Kind) -> Model:
    """The same random weights every time."""
    weights = random_weights(options.shape, context=max(options.tokens) + options.new_tokens).to(getattr(torch, kind.dtype))
    return load_model(weights, tokenizer=words(SHAPES[options.shape]["vocab_size"]), attention=kind.attention, check="off")


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


def measured(options: Options, models: dict[Kind, Model], tokens: int) -> list[dict[str, Any]]:
    """A row of ratios per kind, all to the first."""
    works: dict[str, Callable[[Model], None]] = {
        "training_step": lambda model: training_step(model, options.rows, tokens),
        "forward": lambda model: forward(model, options.rows, tokens),
        "replies": lambda model: replies(model, options.rows, tokens, options.new_tokens),
    }
    first, device = next(iter(models)), next(iter(models.values())).device
    rows: dict[Kind, dict[str, Any]] = {kind: {"tokens": tokens, **kind._asdict()} for kind in models}
    for name, work in works.items():
        turns = take_turns({str(kind): partial(work, model) for kind, model in models.items()}, options.repetitions, device)
        taken = {kind: medians(turns[str(kind)]) for kind in models}
        seconds = {kind: one.wall if device.type == "cuda" else one.cpu for kind, one in taken.items()}
        for kind in models:
            rows[kind][name] = seconds[first] / seconds[kind]
    peaks = {kind: peak_mb(model, options.rows, tokens) for kind, model in models.items()}
    return [{**rows[kind], "memory": peaks[first] / peaks[kind], "mb": peaks[kind]} for kind in models]


def main(options: Options) -> dict[str, Any]:
    torch.set_num_threads(1)
    models = {kind: model_of(options, kind) for kind in KINDS if kind.dtype in options.dtypes}
    rows = []
    for tokens in options.tokens:
        rows += (found := measured(options, models, tokens))
        cells = [{key: f"{value:.3g}" if isinstance(value, float) else str(value) for key, value in row.items()} for row in found]
        show(cells, f"{options.rows} rows of {tokens} tokens, ratios to the first")
    result = {"shape": options.shape, "rows": options.rows, "lengths": rows, "machine": machine.described()}
    if options.json is not None:
        files.write_json(options.json, result)
    return result


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
