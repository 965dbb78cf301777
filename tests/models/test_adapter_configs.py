"""Adapters of other people: whatever peft writes acts as in peft, or is refused by name and leaves the model as it was."""

import dataclasses
import json
import shutil

import pytest
import torch
from peft import AdaLoraConfig, IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from blockem_tl import load_model
from blockem_tl.generation.reply_fn import model_identity
from blockem_tl.models._adapter_config import PLAIN_INITS, REFUSED, SUPPORTED, WITHOUT_EFFECT
from blockem_tl.storage import fingerprints

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture
def hf(tiny_folder):
    return AutoModelForCausalLM.from_pretrained(tiny_folder, attn_implementation="eager").eval()


def written(hf, folder, **options):
    """An adapter that plain peft wrote, with random weights in every tensor."""
    torch.manual_seed(1)
    peft = get_peft_model(hf, LoraConfig(**{"r": 4, "target_modules": ALL, "task_type": "CAUSAL_LM", **options}))
    for name, parameter in peft.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn_like(parameter) * 0.2 + (1.0 if "magnitude" in name else 0.0)
    peft.save_pretrained(folder)
    return folder


def plain_logits(folder, adapter, tokens):
    hf = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    return PeftModel.from_pretrained(hf, adapter).eval()(input_ids=tokens).logits


def changed(folder, **fields) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def state(model) -> tuple:
    """Everything that a refused load could have touched."""
    hf = model.original_model
    return (
        fingerprints.of_tensors({name.replace("base_layer.", ""): p for name, p in hf.named_parameters()}),
        [(name, type(module).__name__) for name, module in hf.named_modules()],
        [name for name, parameter in hf.named_parameters() if parameter.requires_grad],
        model.adapters,
        model.active_adapter,
    )


LOADED = {
    "all projections": {},
    "another rank and strength": {"r": 3, "lora_alpha": 7},
    "rank-stabilised": {"use_rslora": True},
    "a pattern as targets": {"target_modules": r".*\.(q_proj|up_proj)"},
    "all linear modules": {"target_modules": "all-linear"},
    "some layers": {"layers_to_transform": [0, 2]},
    "one layer": {"layers_to_transform": 1},
    "some layers by pattern": {"layers_to_transform": [1, 3], "layers_pattern": "layers"},
    "exclusions": {"exclude_modules": ["down_proj"]},
    "a pattern of exclusions": {"exclude_modules": r".*layers\.[01]\..*"},
    "ranks by name": {"rank_pattern": {"q_proj": 2, "down_proj": 6}},
    "ranks by path": {"rank_pattern": {r"model.layers.1.mlp.up_proj": 2}},
    "strengths by pattern": {"alpha_pattern": {r".*\.[kv]_proj": 32}},
    "ranks and strengths, rank-stabilised": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 3}, "use_rslora": True},
    "DoRA": {"use_dora": True},
    "LoRA with biases": {"lora_bias": True},
    "dropout": {"lora_dropout": 0.3},
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "random": {"init_lora_weights": False},
    "no task": {"task_type": None},
    "the output layer": {"target_modules": ["q_proj", "lm_head"]},
}


@pytest.mark.parametrize("name", LOADED)
def test_it_acts_as_in_plain_peft_and_goes_out_without_a_trace(name, hf, tiny, tiny_folder, tokens, tmp_path) -> None:
    folder, before, base = written(hf, tmp_path / "adapter", **LOADED[name]), state(tiny), tiny(tokens)
    expected = plain_logits(tiny_folder, folder, tokens)
    tiny.load_adapter(folder, "theirs")
    torch.testing.assert_close(tiny(tokens), expected, atol=1e-5, rtol=1e-4)
    assert (expected - base).abs().max() > 0.01
    with tiny.using("base"):
        assert torch.equal(tiny(tokens), base)
    assert not any(parameter.requires_grad for parameter in tiny.original_model.parameters())
    again = tiny.save_adapter(tmp_path / "again", "theirs")
    torch.testing.assert_close(plain_logits(tiny_folder, again, tokens), expected, atol=1e-5, rtol=1e-4)
    tiny.remove_adapter("theirs")
    assert state(tiny) == before and torch.equal(tiny(tokens), base)


REFUSALS = {
    "copies of modules": {"modules_to_save": ["embed_tokens"]},
    "a copy of the head": {"modules_to_save": ["lm_head"]},
    "all biases": {"bias": "all"},
    "LoRA's own biases of the base": {"bias": "lora_only"},
    "trained tokens": {"trainable_token_indices": [3, 5]},
    "trained tokens by module": {"trainable_token_indices": {"embed_tokens": [3]}},
    "PiSSA": {"init_lora_weights": "pissa"},
    "PiSSA, fast": {"init_lora_weights": "pissa_niter_4"},
    "OLoRA": {"init_lora_weights": "olora"},
    "CorDA": {"init_lora_weights": "corda"},
    "LoftQ": {"init_lora_weights": "loftq"},
    "LoRA-GA": {"init_lora_weights": "lora_ga"},
    "repeated layers": {"layer_replication": [[0, 2], [1, 3]]},
    "parameters as targets": {"target_parameters": ["mlp.experts.down"]},
    "activated LoRA": {"alora_invocation_tokens": [3, 4]},
    "QALoRA": {"use_qalora": True},
    "block-diagonal": {"use_bdlora": {"nblocks": 2}},
    "Arrow": {"arrow_config": {"top_k": 2}},
    "KaSA": {"kasa_config": {"beta": 0.1}},
    "Megatron": {"megatron_config": {"tensor_model_parallel_size": 2}},
    "another task": {"task_type": "SEQ_CLS"},
    "a field of tomorrow": {"use_tomorrow": True},
    "no LoRA": {"peft_type": "IA3"},
    "AdaLoRA": {"peft_type": "ADALORA"},
    "prompt tuning": {"peft_type": "PROMPT_TUNING"},
    "no kind": {"peft_type": None},
    "rank nought": {"r": 0},
    "a rank that is no number": {"r": "8"},
    "a rank of true": {"r": True},
    "half a rank": {"rank_pattern": {"q_proj": 2.5}},
    "a strength that is no number": {"lora_alpha": None},
    "targets that are no names": {"target_modules": [1, 2]},
    "no targets": {"target_modules": []},
    "targets that are nowhere": {"target_modules": ["c_attn"]},
    "fewer targets than tensors": {"target_modules": ["q_proj"]},
    "another rank than the tensors": {"r": 5},
    "other layers than the tensors": {"layers_to_transform": [0]},
}


@pytest.mark.parametrize("name", REFUSALS)
def test_a_refused_load_names_the_field_and_leaves_the_model_bit_for_bit(name, hf, tiny, tokens, tmp_path) -> None:
    folder, before, logits = written(hf, tmp_path / "adapter"), state(tiny), tiny(tokens)
    changed(folder, **REFUSALS[name])
    (field,) = REFUSALS[name]
    with pytest.raises(ValueError, match=f"{field}|does not fit|match no module|expected (whole ranks|finite numbers|a LoRA)"):
        tiny.load_adapter(folder, "theirs")
    assert state(tiny) == before and torch.equal(tiny(tokens), logits)
    tiny.add_adapter("mine")  # and good adapters are still taken
    before = state(tiny)
    with pytest.raises(ValueError, match=f"{field}|does not fit|match no module|expected"):
        tiny.load_adapter(folder, "theirs")
    assert state(tiny) == before


def test_every_field_that_peft_can_write_is_on_the_list() -> None:
    ours = {*SUPPORTED, *WITHOUT_EFFECT, *REFUSED, "peft_type", "task_type", "init_lora_weights"}
    assert ours == {field.name for field in dataclasses.fields(LoraConfig)}
    assert not {*SUPPORTED} & {*REFUSED} and "pissa" not in PLAIN_INITS


def broken(kind, tensors):
    """Tensors as other tools and bad disks leave them; raw bytes for a file that cannot be read."""
    first = next(iter(tensors))
    if kind == "truncated":
        return None
    if kind == "missing":
        return {name: tensor for name, tensor in tensors.items() if name != first}
    changes = {
        "NaN": lambda t: t.masked_fill(torch.eye(*t.shape, dtype=torch.bool), float("nan")),
        "infinite": lambda t: t / 0,
        "whole numbers": lambda t: (100 * t).to(torch.int8),
        "transposed": lambda t: t.T.contiguous(),
        "extra": lambda t: t,
    }
    extra = {"base_model.model.model.layers.9.mlp.up_proj.lora_A.weight": torch.zeros(4, 32)} if kind == "extra" else {}
    return {**tensors, first: changes[kind](tensors[first]), **extra}


@pytest.mark.parametrize("kind", ["NaN", "infinite", "whole numbers", "transposed", "extra", "missing", "truncated"])
def test_weights_that_are_not_what_the_file_says_are_refused(kind, hf, tiny, tokens, tmp_path) -> None:
    folder, before = written(hf, tmp_path / "adapter"), state(tiny)
    path = folder / "adapter_model.safetensors"
    tensors = broken(kind, load_file(path))
    if tensors is None:
        path.write_bytes(path.read_bytes()[:-100])
    else:
        save_file(tensors, path)
    with pytest.raises(ValueError, match="adapter_model.safetensors: expected|does not fit"):
        tiny.load_adapter(folder, "theirs")
    assert state(tiny) == before


def test_a_copy_of_the_base_weights_beside_the_adapter_must_be_the_base_weights(hf, tiny, tmp_path) -> None:
    """Peft saves the output layer's own weights where LoRA sits on it."""
    folder = written(hf, tmp_path / "adapter", target_modules=["lm_head"])
    path = folder / "adapter_model.safetensors"
    tensors, before = load_file(path), state(tiny)
    (copy,) = (name for name in tensors if "base_layer" in name)
    save_file({**tensors, copy: tensors[copy] + 0.01}, path)
    with pytest.raises(ValueError, match=f"{copy} holds other weights than the base model's"):
        tiny.load_adapter(folder, "theirs")
    assert state(tiny) == before


@pytest.mark.parametrize("content", ["", "{", "[]", '"text"', "[" * 100_000, '{"peft_type": "LORA", "r": {}}'])
def test_a_configuration_that_is_none_is_refused(content, hf, tiny, tmp_path) -> None:
    folder = written(hf, tmp_path / "adapter")
    (folder / "adapter_config.json").write_text(content)
    with pytest.raises(ValueError, match="adapter"):
        tiny.load_adapter(folder, "theirs")
    assert tiny.adapters == []


def test_a_failure_inside_peft_leaves_nothing(tiny, tokens, monkeypatch) -> None:
    """It has wrapped half of the modules by then."""
    from peft.tuners.lora import LoraModel

    original, calls = LoraModel._create_and_replace, []

    def fails(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 9:
            raise MemoryError("no room")
        return original(self, *args, **kwargs)

    monkeypatch.setattr(LoraModel, "_create_and_replace", fails)
    for held in ([], ["mine"]):
        before, logits = state(tiny), tiny(tokens)
        calls.clear()
        with pytest.raises(MemoryError):
            tiny.add_adapter("theirs")
        assert state(tiny) == before and torch.equal(tiny(tokens), logits) and tiny.adapters == held
        calls.extend([1] * 100)
        if not held:
            tiny.add_adapter("mine")


@pytest.mark.parametrize("options", [{"use_dora": True}, {"lora_bias": True}])
def test_every_tensor_that_acts_counts_in_the_identity(options, hf, tiny, tokens, tmp_path) -> None:
    """Two adapters with equal matrices, and other magnitudes or biases, must not be given each other's stored replies."""
    one = written(hf, tmp_path / "one", **options)
    two = shutil.copytree(one, tmp_path / "two")
    tensors = load_file(two / "adapter_model.safetensors")
    other = {n: t * 1.5 if "magnitude" in n or "bias" in n else t for n, t in tensors.items()}
    assert any(not torch.equal(other[n], tensors[n]) for n in tensors)
    save_file(other, two / "adapter_model.safetensors")
    found = {}
    for name, folder in (("one", one), ("two", two), ("again", one)):
        tiny.load_adapter(folder, name)
        found[name] = (tiny.fingerprint(name), model_identity(tiny, name), tiny(tokens))
    assert found["one"][:2] == found["again"][:2]
    assert found["one"][0] != found["two"][0] and found["one"][1] != found["two"][1]
    assert not torch.allclose(found["one"][2], found["two"][2])


# ---------------------------------------------------------------------------------------------- live PeftModels


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"modules_to_save": ["embed_tokens"]}, "modules_to_save"),
        ({"bias": "all"}, "bias"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa'.*path_initial_model_for_weight_conversion"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
    ],
)
def test_a_live_model_with_more_than_lora_is_refused_as_it_is(options, message, hf, tokens, tiny_folder) -> None:
    peft = get_peft_model(hf, LoraConfig(r=4, target_modules=ALL, task_type="CAUSAL_LM", **options))
    modules, logits = [type(m).__name__ for m in peft.modules()], peft(input_ids=tokens).logits
    with pytest.raises(ValueError, match=message):
        load_model(peft, tokenizer=AutoTokenizer.from_pretrained(tiny_folder))
    assert [type(m).__name__ for m in peft.modules()] == modules and torch.equal(peft(input_ids=tokens).logits, logits)


@pytest.mark.parametrize("config", [IA3Config, AdaLoraConfig])
def test_a_live_model_of_another_kind_is_refused(config, hf, tiny_folder) -> None:
    options = {"feedforward_modules": ["down_proj"]} if config is IA3Config else {"total_step": 10, "tinit": 1, "tfinal": 2}
    peft = get_peft_model(hf, config(target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", **options))
    with pytest.raises(ValueError, match=f"expected LoRA, got {config.__name__}"):
        load_model(peft, tokenizer=AutoTokenizer.from_pretrained(tiny_folder))


def test_a_live_model_that_is_merged_or_has_several_acting_is_refused(hf, tiny_folder, tokens) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    base = hf(input_ids=tokens).logits
    peft = get_peft_model(hf, LoraConfig(r=4, target_modules=ALL, task_type="CAUSAL_LM", init_lora_weights=False)).eval()
    peft.merge_adapter()
    with pytest.raises(ValueError, match=r"\['default'\] are merged.*unmerge_adapter"):
        load_model(peft, tokenizer=tokenizer)
    peft.unmerge_adapter()
    peft.add_adapter("other", LoraConfig(r=2, target_modules=ALL, task_type="CAUSAL_LM", init_lora_weights=False))
    peft.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match="expected one active adapter, got"):
        load_model(peft, tokenizer=tokenizer)
    peft.set_adapter("default")
    model = load_model(peft, tokenizer=tokenizer)
    with model.using("base"):
        torch.testing.assert_close(model(tokens), base, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(model(tokens), base)


@pytest.mark.parametrize("targets", [("q_proj", "embed_tokens"), ("q_proj", "qkv_proj"), ("q_proj", "q_porj")])
def test_a_target_that_matches_nothing_is_no_smaller_adapter(targets, tiny) -> None:
    with pytest.raises(ValueError, match=rf"LoRA targets \['{targets[1]}'\] match no module"):
        tiny.add_adapter("mine", target_modules=targets)
    assert tiny.adapters == []
