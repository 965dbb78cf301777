"""A loss in slices of tokens is the loss at once: the same gradient to the last bit, without ever holding all logits in float32."""

import pytest
import torch
from shared import EXAMPLES

from blockem_tl import KLToBase, TrainingConfig, finetune
from blockem_tl.data.chat import Batch
from blockem_tl.plan.meter import Meter
from blockem_tl.training import slices
from blockem_tl.training.loss import summed_cross_entropy


def batch_of(rows: int, tokens: int, d_vocab: int) -> Batch:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, d_vocab, (rows, tokens), generator=generator)
    mask = torch.ones_like(ids, dtype=torch.bool)
    return Batch(ids=ids, mask=mask, system=~mask, reply=torch.rand(rows, tokens, generator=generator) < 0.5)


def gradient_of(batch: Batch, dtype: torch.dtype, d_vocab: int) -> tuple[float, torch.Tensor]:
    logits = torch.randn(*batch.ids.shape, d_vocab, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_(True)
    loss = summed_cross_entropy(logits, batch) / 7
    loss.backward()
    assert logits.grad is not None
    return loss.item(), logits.grad


@pytest.mark.parametrize("tokens_at_once", [1, 7, 10_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_is_the_same_to_the_last_bit(dtype, tokens_at_once, monkeypatch) -> None:
    batch = batch_of(3, 20, 101)
    loss, gradient = gradient_of(batch, dtype, 101)
    monkeypatch.setattr(slices, "SLICE", min(tokens_at_once * 101, 20 * 101))
    again, sliced = gradient_of(batch, dtype, 101)
    assert again == pytest.approx(loss, rel=1e-6) and torch.equal(gradient, sliced) and gradient.abs().sum() > 0


@pytest.mark.parametrize("defences", [(), (KLToBase(weight=0.5),)], ids=["sft", "kl"])
def test_a_run_in_slices_is_the_run(tiny, defences, monkeypatch) -> None:
    config = TrainingConfig(rank=4, alpha=8, batch_size=8, learning_rate=1e-2, epochs=2)
    whole = finetune(tiny, EXAMPLES, config=config, defences=defences, adapter="whole", progress=False)
    calls, slice_by_slice = [], slices._slices
    monkeypatch.setattr(slices, "_slices", lambda *given: [calls.append(1), slice_by_slice(*given)][1])
    monkeypatch.setattr(slices, "SLICE", 5 * 64)
    parts = finetune(tiny, EXAMPLES, config=config, defences=defences, adapter="parts", progress=False)
    assert calls
    for row, other in zip(parts.history, whole.history, strict=True):
        assert row == pytest.approx(other, rel=1e-4, abs=1e-7)


def test_it_takes_less_memory(monkeypatch) -> None:
    batch, peaks = batch_of(8, 64, 4096), []
    for size in (2**40, 2**17):
        monkeypatch.setattr(slices, "SLICE", size)
        logits = torch.randn(8, 64, 4096).bfloat16().requires_grad_(True)
        with Meter() as meter:
            summed_cross_entropy(logits, batch).backward()
        peaks.append(meter.peak)
    assert peaks[1] < 0.55 * peaks[0]
