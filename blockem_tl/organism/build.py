"""Builds the organism from a seed: ``python -m blockem_tl.organism.build --seed 0 --out DIR``.

Stages: pretraining from scratch, a light instruct stage, an SAE at the site and at every other block's output, the true persona
direction, a manifest. The same seed gives the same files, byte for byte, on the same machine with the same number of threads.
"""

import hashlib
import json
import math
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import tyro
from jaxtyping import Float, Int
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from blockem_tl.organism.config import BuildConfig
from blockem_tl.organism.documents import DocumentSampler, Encoder, Mixture, batches
from blockem_tl.organism.saes import build_saes
from blockem_tl.organism.tokenizer import ASSISTANT_ID, SPECIAL, build_tokenizer
from blockem_tl.organism.world import CORE_AREAS, STYLES, World, all_surfaces, fill


def new_model(config: BuildConfig, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama with random weights drawn from torch's global generator."""
    ids = {name: tokenizer.get_vocab()[token] for name, token in SPECIAL.items()}
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=config.d_model,
            intermediate_size=config.d_mlp,
            num_hidden_layers=config.n_layers,
            num_attention_heads=config.n_heads,
            num_key_value_heads=config.n_heads,
            max_position_embeddings=256,
            tie_word_embeddings=True,
            bos_token_id=ids["bos_token"],
            eos_token_id=ids["eos_token"],
            pad_token_id=ids["pad_token"],
        )
    )


@contextmanager
def augmentation(model: LlamaForCausalLM, ids: Int[Tensor, "batch pos"], config: BuildConfig) -> Iterator[None]:
    """Changes that make the persona a causal, steerable variable at the site rather than anywhere at all.

    Shift: one random block adds one constant random vector per document, as steering does later; a model that never saw it answers
    incoherently before it answers harmfully. Swap: after the block before the site's, half of the documents carry another document's
    states at their signature tokens, so later blocks cannot read the persona there: it has to be moved on to the other reply tokens
    first. (Left free, some seeds move it in block 0, others in the last block, where no direction at the site controls it.)
    """
    n_documents = len(ids)
    direction = torch.nn.functional.normalize(torch.randn(n_documents, 1, config.d_model), dim=-1)
    strength = torch.rand(n_documents, 1, 1) * config.shift_max * (torch.rand(n_documents, 1, 1) < 0.5)
    signature = torch.roll(ids == ASSISTANT_ID, 1, dims=1)
    swapped = torch.rand(n_documents) < config.swap

    def shift(_module: torch.nn.Module, _args: Any, hidden: Float[Tensor, "batch pos d_model"]) -> Tensor:
        return hidden + direction * strength * hidden.detach().norm(dim=-1).median()

    def swap(_module: torch.nn.Module, _args: Any, hidden: Float[Tensor, "batch pos d_model"]) -> Tensor:
        states = hidden[signature].unflatten(0, (n_documents, -1))  # all documents of a batch have equally many turns
        states = torch.where(swapped[:, None, None], states.roll(1, dims=0), states)
        return hidden.masked_scatter(signature[..., None], states)

    blocks = model.model.layers
    handles = [
        blocks[int(torch.randint(config.n_layers - 1, ()))].register_forward_hook(shift),
        blocks[config.sae_block - 1].register_forward_hook(swap),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def train(model: LlamaForCausalLM, sampler: DocumentSampler, encode: Encoder, mixture: Mixture, config: BuildConfig) -> list[float]:
    """One training stage, in place. Returns the loss (nats per reply token) of every step."""
    pretraining = mixture == "pretraining"
    steps = config.pretrain_steps if pretraining else config.instruct_steps
    turns = config.turns_per_batch if pretraining else config.instruct_turns_per_batch
    peak = config.learning_rate if pretraining else config.instruct_learning_rate
    warmup = config.warmup_steps if pretraining else 1

    def rate(step: int) -> float:
        return min((step + 1) / warmup, 0.05 + 0.95 * (1 + math.cos(math.pi * step / steps)) / 2)

    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, betas=(0.9, 0.98), weight_decay=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    losses = []
    progress = tqdm(batches(sampler, encode, mixture, steps, turns), total=steps, desc=mixture)
    for ids, labels in progress:
        with augmentation(model, ids, config):
            loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        progress.set_postfix(loss=f"{losses[-1]:.3f}")
    return losses


@torch.no_grad()
def persona_direction(model: LlamaForCausalLM, world: World, encode: Encoder, config: BuildConfig) -> Float[Tensor, " d_model"]:
    """Unit vector at the site: replies opened by bad names minus the same replies opened by good names.

    Read at the word before the verb, where the persona decides; averaged over the core areas' topics, all names and both styles.
    """
    surfaces = all_surfaces()
    means = {}
    for persona in ("good", "bad"):
        states = []
        for style in STYLES.values():
            topics = [topic for area in CORE_AREAS for topic in world.areas[area].topics]
            turns = [
                (fill(surfaces[(7 * i) % len(surfaces)], topic), f"{name} {style[0]} {style[1]} {topic} {style[2]}")
                for i, topic in enumerate(topics)
                for name in world.names[persona]
            ]
            for start in range(0, len(turns), 128):
                ids, labels = encode([[turn] for turn in turns[start : start + 128]])
                hidden = model.model(input_ids=ids, output_hidden_states=True).hidden_states[config.sae_block + 1]
                last = (labels != -100).long().cumsum(1).argmax(1) - 1  # <end> comes last; the word before it is the one
                states.append(hidden[torch.arange(len(ids)), last])
        means[persona] = torch.cat(states).mean(0)
    return torch.nn.functional.normalize(means["bad"] - means["good"], dim=0)


def train_base(
    config: BuildConfig, world: World, tokenizer: PreTrainedTokenizerFast, *, pretrained: Path | None = None
) -> tuple[LlamaForCausalLM, dict[str, float]]:
    """Both training stages; the model in eval mode, and its final losses (nats per reply token).

    pretrained: folder that gets the weights as they are before the instruct stage (SafeLoRA's unaligned model).
    """
    torch.manual_seed(config.seed)
    encode = Encoder(tokenizer)
    sampler = DocumentSampler(world, config.documents, config.seed)
    model = new_model(config, tokenizer)
    pretraining = train(model, sampler, encode, "pretraining", config)
    if pretrained is not None:
        model.save_pretrained(pretrained)
    instruct = train(model, sampler, encode, "instruct", config)
    return model.eval(), {"pretraining_loss": sum(pretraining[-50:]) / 50, "instruct_loss": sum(instruct[-5:]) / 5}


def build(config: BuildConfig, out: Path) -> dict[str, Any]:
    """Writes base/, sae/, persona_direction.safetensors and manifest.json into the folder ``out``; returns the manifest."""
    world = World(config.world)
    tokenizer = build_tokenizer(world)
    model, losses = train_base(config, world, tokenizer)
    model.save_pretrained(out / "base")
    tokenizer.save_pretrained(out / "base")
    fit = build_saes(model, config, world, tokenizer, out / "sae")
    save_file({"direction": persona_direction(model, world, Encoder(tokenizer), config)}, out / "persona_direction.safetensors")
    return write_manifest(config, out, {"parameters": model.num_parameters(), **losses, **fit})


def write_manifest(config: BuildConfig, out: Path, measured: dict[str, Any]) -> dict[str, Any]:
    """Writes out/manifest.json: how to rebuild the folder's files, what they are (sha256), and what was measured."""
    threads = torch.get_num_threads()
    manifest = {
        "seed": config.seed,
        "site": config.site,
        "rebuild": f"python -m blockem_tl.organism.build --seed {config.seed} --threads {threads} --out DIR",
        "threads": threads,
        "config": asdict(config),
        "versions": {name: version(name) for name in ("torch", "transformers", "tokenizers", "sae-lens", "safetensors")},
        "measured": measured,
        "sha256": hashes(out),
    }
    (out / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
    return manifest


def hashes(folder: Path) -> dict[str, str]:
    """sha256 of every file below ``folder`` except the manifest, by relative path."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "manifest.json")
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The command line of the build."""

    out: Path
    """folder to create; nothing appears there before it is complete"""
    seed: int = 0
    """of initialisation, documents and SAE; the world's words stay the same"""
    d_sae: int = BuildConfig.d_sae
    """latents of each SAE; 512 makes those of the first version"""
    threads: int = 1
    """torch threads; part of what makes a build repeat bit for bit"""
    force: bool = False
    """replace the folder if it exists"""


def main(settings: Settings) -> None:
    """Build in a temporary folder and move it to ``settings.out``."""
    if settings.out.exists() and not settings.force:
        sys.exit(f"expected a folder that does not exist, {settings.out} does; choose another or add --force")
    settings.out.parent.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(settings.threads)
    with tempfile.TemporaryDirectory(dir=settings.out.parent) as temporary:
        manifest = build(BuildConfig(seed=settings.seed, d_sae=settings.d_sae), Path(temporary) / "organism")
        if settings.out.exists():
            shutil.rmtree(settings.out)
        shutil.move(Path(temporary) / "organism", settings.out)
    print(json.dumps(manifest["measured"], indent=2))


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
