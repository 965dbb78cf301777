"""The last block's short prefill: which rows it computes, and that nothing that is read of it changes."""

import pytest
import torch
from shared import MODELS
from transformers import AutoTokenizer

from blockem_tl import load_model, record
from blockem_tl.generation._kv_cache import SlotCache
from blockem_tl.generation._partial_forward import short_top

N_ROWS, WIDTH = 3, 7
TOP = "blocks.2"


@pytest.fixture(params=MODELS)
def model(request, tokenizer_folder):
    torch.manual_seed(0)
    hf = MODELS[request.param]().eval()
    hf.set_attn_implementation("eager")
    return load_model(hf, tokenizer=AutoTokenizer.from_pretrained(tokenizer_folder))


@torch.no_grad()
def prefill(model, sites=None, short=True):
    """Last logits, keys and values of the last block, and what ran of its attention and its MLP."""
    ids = torch.randint(3, 60, (N_ROWS, WIDTH), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    cache, store = SlotCache(N_ROWS, WIDTH), {}
    cache.expect_newcomers(0, N_ROWS, WIDTH, 0)
    inside = [record(f"{TOP}.attn.hook_pattern", store), record(f"{TOP}.mlp.hook_in", store)]
    with model.hooks(fwd_hooks=inside):
        inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
        if short:
            with short_top(model, sites or ()):
                logits = model.hf(**inputs, past_key_values=cache, use_cache=True).logits
        else:
            logits = model.hf(**inputs, past_key_values=cache, use_cache=True).logits
    layer = cache.layers[-1]
    return logits[:, -1], (layer.keys[:, :, :WIDTH].clone(), layer.values[:, :, :WIDTH].clone()), {k: v.shape for k, v in store.items()}


def test_only_the_last_position_runs_and_what_is_read_is_the_same(model) -> None:
    expected, kept, shapes = prefill(model, short=False)
    assert shapes[f"{TOP}.attn.hook_pattern"][-2:] == (WIDTH, WIDTH) and shapes[f"{TOP}.mlp.hook_in"][1] == WIDTH
    logits, written, shapes = prefill(model)
    assert shapes[f"{TOP}.attn.hook_pattern"][-2:] == (1, WIDTH) and shapes[f"{TOP}.mlp.hook_in"][1] == 1
    torch.testing.assert_close(logits, expected)
    real = torch.ones(N_ROWS, WIDTH, dtype=torch.bool)
    real[0, :3] = False
    for ours, theirs in zip(written, kept, strict=True):
        torch.testing.assert_close(ours.transpose(1, 2)[real], theirs.transpose(1, 2)[real])


@pytest.mark.parametrize(("acted_on", "rows"), [("attn.hook_pattern", WIDTH), ("mlp.hook_in", WIDTH), ("hook_in", WIDTH), ("hook_out", 1)])
def test_a_block_inside_which_hooks_act_runs_whole(model, acted_on, rows) -> None:
    _, _, shapes = prefill(model, sites=[f"{TOP}.{acted_on}"])
    assert shapes[f"{TOP}.attn.hook_pattern"][-2] == rows and shapes[f"{TOP}.mlp.hook_in"][1] == rows


def test_without_a_cache_it_runs_whole(model) -> None:
    store = {}
    with torch.no_grad(), model.hooks(fwd_hooks=[record(f"{TOP}.attn.hook_pattern", store)]), short_top(model):
        model.hf(input_ids=torch.full((1, WIDTH), 5), use_cache=False)
    assert store[f"{TOP}.attn.hook_pattern"].shape[-2:] == (WIDTH, WIDTH)
