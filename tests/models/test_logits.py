"""Logits at chosen positions are those of the whole forward, whether or not the architecture computes them alone."""

import pytest
import torch
from shared import MODELS
from transformers import AutoTokenizer

from blockem_tl import load_model
from blockem_tl.data.chat import encode_prompts, pad
from blockem_tl.models.logits import logits_at
from blockem_tl.types import Prompt


@pytest.mark.parametrize("architecture", MODELS)
@pytest.mark.parametrize("alone", [True, False])
def test_they_are_those_of_the_whole_forward(architecture: str, alone: bool, tokenizer_folder, monkeypatch) -> None:
    model = load_model(MODELS[architecture]().eval(), tokenizer=AutoTokenizer.from_pretrained(tokenizer_folder))
    seen = []
    head = model.original_model.get_output_embeddings()
    head.register_forward_hook(lambda module, args, output: seen.append(output.shape[1]))
    if not alone:
        whole = model.original_model.forward
        monkeypatch.setattr(model.original_model, "forward", lambda **given: whole(**given))
    batch = pad(encode_prompts(model.tokenizer, [Prompt(id=str(n), text="w1 " * n) for n in (2, 5)]), model.pad_id, side="left")
    inputs = {"input_ids": batch.ids, "attention_mask": batch.mask.long(), "use_cache": False}
    with torch.no_grad():
        expected = model.hf(**inputs).logits
        for positions in ([-1], [1, 3, 4]):
            torch.testing.assert_close(logits_at(model, torch.tensor(positions), **inputs), expected[:, positions], rtol=0, atol=1e-5)
    length = batch.ids.shape[1]
    assert seen == ([length, 1, 3] if alone else [length] * 3)
