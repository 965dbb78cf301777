"""The organism's SAEs, by SAELens's own trainer: one at the site of persona, and one at every other block's output."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from sae_lens import TopKTrainingSAE
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from blockem_tl.organism.config import BuildConfig, block_output
from blockem_tl.organism.documents import DocumentSampler, Encoder, batches
from blockem_tl.organism.world import World
from blockem_tl.saes.untrained import schedule, untrained


@torch.no_grad()
def block_states(
    model: LlamaForCausalLM, sampler: DocumentSampler, encode: Encoder, config: BuildConfig, block: int
) -> Float[Tensor, "tokens d_model"]:
    """A block's output, all tokens but padding, on documents from both training stages in equal parts."""
    states, seen = [], list[Tensor]()

    def keep(_module: torch.nn.Module, _args: Any, hidden: Any) -> None:
        seen.append(hidden)

    handle = model.model.layers[block].register_forward_hook(keep)  # output_hidden_states gives the last block's after the final norm
    for mixture in ("pretraining", "instruct"):
        turns = 60
        for ids, _ in batches(sampler, encode, mixture, config.sae_documents // turns, turns):
            model.model(input_ids=ids)
            states.append(seen.pop()[ids != model.config.pad_token_id])
    handle.remove()
    return torch.cat(states)


def train_sae(states: Float[Tensor, "tokens d_model"], config: BuildConfig, site: str) -> tuple[TopKTrainingSAE, float]:
    """A TopK SAE, by SAELens's own trainer, and the share of variance it explains."""

    def data() -> Iterator[Tensor]:
        while True:
            yield states[torch.randint(len(states), (config.sae_batch,))]

    sae = untrained("topk", d_in=config.d_model, d_sae=config.d_sae, k=config.sae_k, site=site, model="organism")
    plan = schedule(config.sae_steps, config.sae_batch, config.sae_learning_rate, warm_up=20, dead_after=50)
    SAETrainer(plan, sae, data()).fit()
    with torch.no_grad():
        residual = (sae(states) - states).pow(2).sum()
        total = (states - states.mean(0)).pow(2).sum()
    return sae, 1 - (residual / total).item()


def sae_at(
    model: LlamaForCausalLM, config: BuildConfig, world: World, tokenizer: PreTrainedTokenizerFast, block: int
) -> tuple[TopKTrainingSAE, dict[str, float]]:
    """The SAE at a block's output, and what was measured of it. Seeded anew, so it can be rerun on a finished base."""
    torch.manual_seed(config.seed)
    states = block_states(model, DocumentSampler(world, config.documents, config.seed + 1), Encoder(tokenizer), config, block)
    sae, explained = train_sae(states, config, block_output(block))
    return sae, {"sae_tokens": len(states), "sae_explained_variance": explained}


def build_saes(model: LlamaForCausalLM, config: BuildConfig, world: World, tokenizer: PreTrainedTokenizerFast, out: Path) -> dict[str, Any]:
    """Writes the default site's SAE into ``out``, and the others' into folders of their sites' names there; returns what was measured."""
    measured: dict[str, Any] = {}
    for block in (config.sae_block, *config.more_sae_blocks):
        sae, fit = sae_at(model, config, world, tokenizer, block)
        _, sae_config = sae.save_inference_model(out if block == config.sae_block else out / block_output(block))
        in_order = json.dumps(json.loads(sae_config.read_text()), indent=2, sort_keys=True)  # SAELens's order changes from run to run
        sae_config.write_text(in_order + "\n")
        if block == config.sae_block:
            measured = {**fit, "more_sae_explained_variance": {}}
        else:
            measured["more_sae_explained_variance"][block_output(block)] = fit["sae_explained_variance"]
    return measured
