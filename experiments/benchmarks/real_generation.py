"""Replies of a real model against transformers' own generation: equal token for token in float32? And the speeds.

    python experiments/benchmarks/real_generation.py --json generation.json

The same prompts at once: ours in its batches with refill, transformers' `generate` in left-padded batches of the same size. Speeds are
tokens per processor second, in turns.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, cast

import torch
import tyro
from turns import medians, take_turns

from blockem_tl import Setting, generate, load_model
from blockem_tl.data.chat import encode_prompts, pad
from blockem_tl.generation._decoder import end_tokens_of
from blockem_tl.storage import files


@dataclass(frozen=True, kw_only=True)
class Options:
    """prompts: of core and final together.  tokens: per reply at most.  batch_size: rows at once, of both."""

    preset: str = "smollm2-135m"
    prompts: int = 100
    tokens: int = 40
    batch_size: int = 20
    repetitions: int = 1
    json: Annotated[Path | None, tyro.conf.arg(name="json")] = None


def main(options: Options) -> dict[str, Any]:
    setting = Setting.of(options.preset)
    model = load_model(setting.preset.model, dtype="float32")
    prompts = [*setting.prompts("core"), *setting.prompts("final")][: options.prompts]
    rows, ends = encode_prompts(model.tokenizer, prompts), end_tokens_of(model)

    def ours() -> list[tuple[int, ...]]:
        found = generate(model, prompts, adapter="base", max_new_tokens=options.tokens, batch_size=options.batch_size, progress=False)
        return [tuple(reply.reply_ids) for reply in found]

    def theirs() -> list[tuple[int, ...]]:
        found: list[tuple[int, ...]] = []
        for start in range(0, len(rows), options.batch_size):
            batch = pad(rows[start : start + options.batch_size], model.pad_id, side="left", device=model.device)
            made = cast(Any, model.original_model).generate(
                input_ids=batch.ids,
                attention_mask=batch.mask.long(),
                max_new_tokens=options.tokens,
                do_sample=False,
                pad_token_id=model.pad_id,
                eos_token_id=ends,
            )
            found += [until_end(row, ends) for row in made[:, batch.ids.shape[1] :].tolist()]
        return found

    mine, other = ours(), theirs()
    seconds = take_turns({"ours": ours, "transformers": theirs}, options.repetitions, torch.device(model.device))
    cpu = {name: medians(taken).cpu for name, taken in seconds.items()}
    tokens = sum(map(len, mine))
    result = {
        "prompts": len(prompts),
        "equal": sum(a == b for a, b in zip(mine, other, strict=True)),
        "tokens": tokens,
        "tokens_per_second": tokens / cpu["ours"],
        "ours_vs_transformers": cpu["transformers"] / cpu["ours"],
    }
    print(json.dumps(result, indent=2))
    if options.json is not None:
        files.write_json(options.json, result)
    return result


def until_end(ids: list[int], ends: list[int]) -> tuple[int, ...]:
    """The reply without the token that ends it and what comes after."""
    return tuple(ids[: next((i for i, token in enumerate(ids) if token in ends), len(ids))])


if __name__ == "__main__":
    with torch.no_grad():
        main(tyro.cli(Options, description=__doc__))
