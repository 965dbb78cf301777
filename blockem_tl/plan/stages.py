"""What each stage of the method does to memory: the library's own forward, loss, penalty and backward, metered on a `skeleton`."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from sae_lens import StandardSAE, StandardSAEConfig
from sae_lens.saes.sae import SAEMetadata

from blockem_tl.data.chat import Batch
from blockem_tl.defences.blocking import one_sided_penalty
from blockem_tl.hooks import record
from blockem_tl.models.load import Model
from blockem_tl.plan.meter import Meter
from blockem_tl.saes.latents import encode_latents
from blockem_tl.training.config import TrainingConfig
from blockem_tl.training.loop import computing_as
from blockem_tl.training.loss import summed_cross_entropy

ADAPTER = "planned"


def plain_sae(site: str, d_model: int, d_sae: int) -> StandardSAE:
    """A ReLU SAE of this size without data."""
    with torch.device("meta"):
        return StandardSAE(StandardSAEConfig(d_in=d_model, d_sae=d_sae, device="meta", metadata=SAEMetadata(hook_name=site)))


def rows_of(n: int, tokens: int, device: torch.device) -> Batch:
    """``n`` rows of ``tokens`` each."""
    ids = torch.zeros(n, tokens, dtype=torch.long, device=device)
    everywhere = torch.ones(n, tokens, dtype=torch.bool, device=device)
    return Batch(ids=ids, mask=everywhere, system=~everywhere, reply=everywhere)


@contextmanager
def trainable(model: Model, config: TrainingConfig) -> Iterator[list[torch.nn.Parameter]]:
    """Inside the block the model trains an adapter of this configuration."""
    model.add_adapter(ADAPTER, rank=config.rank, alpha=config.alpha, target_modules=config.target_modules, up_to_block=config.up_to_block)
    parameters = model.adapter_parameters(ADAPTER)
    for parameter in parameters:
        parameter.requires_grad_(True)
    with computing_as(model, config):
        model.original_model.train()
        yield parameters
    model.remove_adapter(ADAPTER)


def training_step(model: Model, batch: Batch, sae: Any, latents: list[int], *, live: bool) -> None:
    """One micro-batch of blocked training, as `finetune` runs it: base's latents, forward, losses, backward. See `Loop`."""
    site, store, signs = sae.cfg.metadata.hook_name, dict[str, Any](), torch.ones(len(latents), dtype=torch.long, device=model.device)

    def forward() -> Any:
        with model.hooks(fwd_hooks=[record(site, store, detach=False)]):
            return cast(Any, model.hf)(input_ids=batch.ids, attention_mask=batch.mask.long(), use_cache=False).logits

    before = torch.zeros(*batch.ids.shape, len(latents), device=model.device)
    if live:
        with torch.no_grad(), model.using("base"):
            forward()
            before = encode_latents(sae, store.pop(site).float(), latents)
    logits = forward()
    loss = summed_cross_entropy(logits, batch)
    now = encode_latents(sae, store[site].float(), latents)
    (loss + one_sided_penalty(now, before, signs, batch.reply).sum()).backward()


@torch.no_grad()
def losses(model: Model, batch: Batch) -> None:
    """One batch of `completion_loss`."""
    logits = cast(Any, model.hf)(input_ids=batch.ids, attention_mask=batch.mask.long(), use_cache=False).logits
    summed_cross_entropy(logits, batch)


def peak_of(meter: Meter, work: Callable[[], None]) -> int:
    """Bytes that the work needs beyond what is there already, at most."""
    before = meter.now
    meter.restart()
    work()
    return meter.peak - before
