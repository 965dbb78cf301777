"""Data parallel on real vLLM: two workers with an engine each give the replies of one TransformerLens model. See `make test-vllm`."""

import os

import pytest

pytest.importorskip("vllm", reason="vLLM lives in an environment of its own: make test-vllm")
os.environ |= {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}

import psutil

from blockem_tl import Condition, Setting, Steering, organism
from blockem_tl.generation.engine import TransformerLensEngine
from blockem_tl.generation.steering import UNSTEERED
from blockem_tl.study.executors import Processes
from blockem_tl.study.sharding import ShardedEngine, WorkerEngine

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

OPTIONS = {"enforce_eager": True, "kv_cache_gib": 0.05, "max_num_seqs": 16, "max_model_len": 256}


def test_two_workers_with_a_vllm_each_reply_as_one_model(tmp_path) -> None:
    setting = Setting.of("organism")
    setting.model.add_adapter("t", seed=1)
    for parameter in setting.model.adapter_parameters("t"):
        parameter.data += 0.02  # LoRA begins as nothing
    setting.model.save_adapter(tmp_path / "t", "t")
    direction = organism.persona_direction()
    steered = [
        Condition(name=f"at {d}", steering=(Steering(site=setting.site, direction=direction, dose=d, scale=74.6),)) for d in (0.4, -0.3)
    ]
    asked = {"conditions": [UNSTEERED, *steered], "max_new_tokens": 12, "progress": False}
    prompts, alone = organism.prompts("core")[:7], TransformerLensEngine(setting.model)
    workers = Processes(Setting.of("organism"), 2)
    engine = ShardedEngine(workers, WorkerEngine(name="vllm", adapters={"t": str(tmp_path / "t")}, options=OPTIONS))
    try:
        for adapter in ("base", "t"):
            found = dict(engine.stream(prompts, adapter=adapter, **asked))
            assert found == dict(alone.stream(prompts, adapter=adapter, **asked))
        assert found[0] != found[1] != found[2]
        assert engine.identity("t") != engine.identity("base")
        assert len(psutil.Process().children()) >= 2
    finally:
        workers.close()
