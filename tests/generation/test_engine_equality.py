"""A full, refilled batch of mixed conditions equals plain transformers with a forward hook, token for token, on five architectures."""

import pytest
import torch
from shared import MODELS, WIDTH
from transformers import (
    AutoTokenizer,
)

from blockem_tl import Condition, Prompt, Steering, TransformerLensEngine, load_model
from blockem_tl.data.chat import encode_prompts

PROMPTS = [Prompt(id=str(n), text=" ".join(f"w{(7 * n + i) % 57}" for i in range(n))) for n in (1, 14, 4, 2, 9, 5)]
LIMITS = [20, 3, 12, 1, 16, 9]


def blocks(model):
    inner = model.base_model
    return inner.layers if hasattr(inner, "layers") else inner.h


def steering(block: int, dose: float, seed: int) -> Steering:
    direction = torch.nn.functional.normalize(torch.randn(WIDTH, generator=torch.Generator().manual_seed(seed)), dim=0)
    return Steering(site=f"blocks.{block}.hook_resid_post", direction=direction, dose=dose, scale=10.0)


CONDITIONS = [
    Condition(name="early", steering=(steering(0, 1.5, 1),)),
    Condition(name="unsteered"),
    Condition(name="two sites", steering=(steering(0, -1.0, 2), steering(2, 2.0, 3))),
    Condition(name="late", steering=(steering(2, -3.0, 4),)),
    Condition(name="same, weaker", steering=(steering(0, 0.5, 1),)),
]


def expected_reply(plain, ids, condition, limit) -> list[int]:
    """Greedy decoding without padding, batch or cache of ours."""

    def add(vector):
        return lambda module, args, out: (out[0] + vector, *out[1:]) if isinstance(out, tuple) else out + vector

    handles = [blocks(plain)[int(s.site.split(".")[1])].register_forward_hook(add(s.vector)) for s in condition.steering]
    out = plain.generate(torch.tensor([ids]), max_new_tokens=limit, do_sample=False, pad_token_id=0)[0, len(ids) :].tolist()
    for handle in handles:
        handle.remove()
    return out[: out.index(2)] if 2 in out else out


LATE = [  # nothing acts on block 0, so each prompt runs through it once for all conditions
    Condition(name="middle", steering=(steering(1, 1.5, 1),)),
    Condition(name="unsteered"),
    Condition(name="two sites", steering=(steering(1, -1.0, 2), steering(2, 2.0, 3))),
    Condition(name="late", steering=(steering(2, -3.0, 4),)),
]


@pytest.mark.parametrize("conditions", [CONDITIONS, LATE], ids=["from the first block", "shared prefill"])
@pytest.mark.parametrize("architecture", MODELS)
def test_equals_transformers_with_a_forward_hook(architecture, conditions, tokenizer_folder) -> None:
    torch.manual_seed(0)
    plain = MODELS[architecture]().eval()
    plain.set_attn_implementation("eager")
    copy = MODELS[architecture]().eval()
    copy.load_state_dict(plain.state_dict())
    copy.set_attn_implementation("eager")
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    engine = TransformerLensEngine(load_model(copy, tokenizer=tokenizer), batch_size=6)
    encoded = encode_prompts(tokenizer, PROMPTS)
    expected = [[expected_reply(plain, e.ids, c, limit) for e, limit in zip(encoded, LIMITS, strict=True)] for c in conditions]
    found = dict(engine.stream(PROMPTS, conditions=conditions, max_new_tokens=LIMITS, progress=False))
    for c, condition in enumerate(conditions):
        assert [g.prompt for g in found[c]] == PROMPTS and {g.condition for g in found[c]} == {condition.name}
        assert [list(g.reply_ids) for g in found[c]] == expected[c], condition.name
        assert [g.truncated for g in found[c]] == [len(ids) == limit for ids, limit in zip(expected[c], LIMITS, strict=True)]
    assert len({str(replies) for replies in expected}) == len(conditions)  # every condition changes something
