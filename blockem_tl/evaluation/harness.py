"""Steering for lm-evaluation-harness: a condition as the file that its model type ``steered`` reads."""

import io
import re
from pathlib import Path

import torch

from blockem_tl.generation.steering import Condition
from blockem_tl.storage import files

_BLOCK_OUTPUT = re.compile(r"blocks\.(\d+)\.(?:hook_resid_post|hook_out)")


def write_lm_eval(path: Path | str, condition: Condition, *, blocks: str = "layers") -> Path:
    """Write a condition as a steering file, for ``lm_eval --model steered --model_args pretrained=MODEL,steer_path=PATH``.

    There as here h <- h + dose * scale * direction at every position (eq. 6). `repair` and `induce` make the condition of a latent set;
    any other condition does too. The file is whole or absent, and holds tensors, numbers and texts only.

    Args:
        path: ends in .pt, by which the harness knows what it is.
        blocks: the list of blocks in transformers' model, without its head: "layers" for Llama, Qwen, Gemma, Mistral and NeoX, "h" for
            GPT-2. If the harness loads an adapter (``peft=``), "model.model.layers". The harness refuses a list that is not there.

    Raises:
        ValueError: another ending, a condition without steering, or a site that is not the output of a block.
    """
    path = Path(path)
    if path.suffix != ".pt":
        raise ValueError(f"{path}: expected a name ending in .pt, by which lm-evaluation-harness knows a steering file")
    if not condition.steering:
        raise ValueError(f"condition {condition.name!r} steers nothing: for the unsteered model run `--model hf`, without a file")
    entries = {
        _hookpoint(steering.site, blocks): {
            "steering_vector": steering.vector.detach().float().cpu().clone(),  # a view would be saved with all that it looks into
            "steering_coefficient": 1.0,  # the whole vector is rounded once to the model's dtype, as `hooks.steer` does
            "action": "add",
            "bias": None,
            "head_index": None,
        }
        for steering in condition.steering
    }
    buffer = io.BytesIO()
    torch.save(entries, buffer)
    return files.write_bytes(path, buffer.getvalue())


def _hookpoint(site: str, blocks: str) -> str:
    """The name that the harness knows a block by."""
    found = _BLOCK_OUTPUT.fullmatch(site)
    if found is None:
        raise ValueError(
            f"lm-evaluation-harness steers the outputs of modules: expected sites blocks.N.hook_resid_post, got {site}; "
            "what enters a block is the output of the block before it"
        )
    return f"{blocks}.{found[1]}"
