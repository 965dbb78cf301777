"""Direct logit attribution by TransformerLens's own recipe adds up to the logits on our model, whose final norm is not folded."""

import pytest
import torch
from shared import MODELS
from transformers import AutoTokenizer

from blockem_tl import load_model


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma2", "gpt2", "pythia"])
def test_attributions_add_up_to_the_logit_difference(name, folded, tokenizer_folder, tokens) -> None:
    torch.manual_seed(0)
    hf = MODELS[name]().eval()
    for key, parameter in hf.named_parameters():
        if "norm" in key or "ln_" in key:
            parameter.data += 0.5 * torch.randn_like(parameter)
    model = load_model(hf, tokenizer=AutoTokenizer.from_pretrained(tokenizer_folder))
    if folded:
        model.enable_compatibility_mode()
    logits, cache = model.run_with_cache(tokens[:1])
    stack, labels = cache.decompose_resid(pos_slice=-1, return_labels=True)
    attributed = cache.logit_attrs(stack, tokens=20, incorrect_tokens=30, pos_slice=-1).sum()
    direction = model.tokens_to_residual_directions(20) - model.tokens_to_residual_directions(30)
    by_hand = (cache.decompose_resid(apply_ln=True, pos_slice=-1) @ direction).sum()
    torch.testing.assert_close(by_hand, attributed, atol=2e-3, rtol=1e-3)
    bias = model.unembed.b_U[20] - model.unembed.b_U[30]
    shift = _of_the_norms_bias(model, 20) - _of_the_norms_bias(model, 30)
    capped = 30.0  # Gemma 2 squashes its logits at the end
    found = logits[0, -1] if name != "gemma2" else capped * torch.atanh(logits[0, -1] / capped)
    torch.testing.assert_close((attributed + bias + shift).float(), (found[20] - found[30]).float(), atol=2e-3, rtol=1e-3)
    assert abs(float(attributed)) > 0.01 and len(labels) == len(stack)


def _of_the_norms_bias(model, token: int) -> float:
    """What the final norm's bias, which no component wrote, adds to a logit."""
    width = int(model.cfg.d_model)
    return float(model.ln_final.original_component(torch.zeros(1, width))[0] @ model.W_U[:, token])
