"""The self-test passes what is right, names what is wrong, and is run once per architecture."""

import json
from contextlib import nullcontext

import pytest
import torch
from architectures import SHAPES, tiny_of
from transformers import AutoTokenizer, LlamaForCausalLM

from blockem_tl import load_model
from blockem_tl.generation import _checks, selftest
from blockem_tl.generation._kv_cache import SlotCache
from blockem_tl.generation.selftest import SelfTestFailed, checks, run_check
from blockem_tl.models._sources import probe_logits
from blockem_tl.models.load import Model

REFUSED = {
    "cohere": "CohereForCausalLM: the self-test 'same logits' failed",  # the bridge leaves out the scale of the logits
    "gpt_neo": "GPTNeoForCausalLM: the self-test 'replies' failed",  # its local attention counts columns, padding included
    "mpt": "MptForCausalLM: the self-test 'replies' failed",
    "mamba": "MambaForCausalLM: the self-test 'replies' failed",  # it has no keys and values
    "biogpt": "Unsupported architecture: BioGptForCausalLM",
}


@pytest.fixture
def tokenizer(tokenizer_folder):
    return AutoTokenizer.from_pretrained(tokenizer_folder)


def loads(name, tokenizer, level) -> None:
    refused = pytest.raises(ValueError, match=REFUSED[name]) if name in REFUSED else nullcontext()
    with refused:
        load_model(tiny_of(name), tokenizer=tokenizer, check=level)


@pytest.mark.parametrize("name", SHAPES)
def test_an_architecture_is_right_or_refused_by_name(name, tokenizer) -> None:
    loads(name, tokenizer, "fast")


@pytest.mark.slow
@pytest.mark.parametrize("name", SHAPES)
def test_the_full_self_test_says_the_same(name, tokenizer) -> None:
    loads(name, tokenizer, "full")


def test_a_refused_architecture_can_be_had_all_the_same(tokenizer, tokens) -> None:
    model = load_model(tiny_of("gpt_neo"), tokenizer=tokenizer, check="off")
    torch.testing.assert_close(model(tokens), tiny_of("gpt_neo")(input_ids=tokens).logits)
    with pytest.raises(ValueError, match='expected check="fast", "full" or "off"'):
        load_model.__wrapped__(tiny_of("llama"), tokenizer=tokenizer, check="slow")  # without the tests' own type checks


# ---------------------------------------------------------------------------------------------- every check can fail


def no_edit(site, *args, **kwargs):
    return site, lambda activation, hook: None


FAULTS = {
    "steering": lambda patch, model: patch.setattr(_checks, "steer", no_edit),
    "edits": lambda patch, model: patch.setattr(_checks, "steer", no_edit),
    "replies": lambda patch, model: patch.setattr(SlotCache, "stepped", lambda self: None),
    "end of turn": lambda patch, model: patch.setattr(_checks, "end_tokens_of", lambda model: [5]),
    "rendering": lambda patch, model: patch.setattr(_checks, "template_head", lambda tokenizer: str(torch.rand(1))),
    "adapters": lambda patch, model: patch.setattr(Model, "using", lambda self, name: nullcontext()),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found_by_its_check(name, tiny, monkeypatch) -> None:
    check = checks("full")[name]
    assert run_check(tiny, name, check)
    FAULTS[name](monkeypatch, tiny)
    with pytest.raises(SelfTestFailed, match=f"LlamaForCausalLM: the self-test '{name}' failed.*check=\"off\""):
        run_check(tiny, name, check)


def test_other_logits_than_the_plain_models_are_found(tiny, plain) -> None:
    logits = probe_logits(plain, torch.device("cpu"))
    assert run_check(tiny, "same logits", checks("fast", logits)["same logits"])
    for wrong in (logits * 1.01, logits.nan_to_num() + float("nan")):
        with pytest.raises(SelfTestFailed, match="same logits"):
            run_check(tiny, "same logits", checks("fast", wrong)["same logits"])


@pytest.mark.parametrize("fault", ["scaled logits", "numbers that are none"])
def test_a_model_that_the_bridge_changes_is_refused_at_loading(fault, tiny_folder, monkeypatch) -> None:
    """As an architecture would be whose forward does more than the bridge knows."""
    original = LlamaForCausalLM.forward

    def forward(self, *args, **kwargs):
        output = original(self, *args, **kwargs)
        changed = not any("Bridge" in type(module).__name__ for module in self.modules())
        output.logits = output.logits * (1.5 if fault == "scaled logits" else float("nan")) if changed else output.logits
        return output

    monkeypatch.setattr(LlamaForCausalLM, "forward", forward)
    monkeypatch.setenv("BLOCKEM_DATA", str(tiny_folder / f"cache {fault}"))
    with pytest.raises(SelfTestFailed, match="same logits"):
        load_model(tiny_folder, device="cpu")


# ---------------------------------------------------------------------------------------------- once per architecture


def test_it_is_run_once_per_architecture_shape_and_template(tiny_folder, tmp_path, monkeypatch, tokenizer) -> None:
    monkeypatch.setenv("BLOCKEM_DATA", str(tmp_path))
    ran = []
    original = selftest.run_check
    monkeypatch.setattr(selftest, "run_check", lambda model, name, check: ran.append(name) or original(model, name, check))
    load_model(tiny_folder, device="cpu", check="off")
    assert not ran
    load_model(tiny_folder, device="cpu")
    first = list(ran)
    assert first == ["same logits", "steering", "edits", "replies", "end of turn", "rendering"]
    load_model(tiny_folder, device="cpu")
    assert ran == first
    (kept,) = (tmp_path / "self-tests").iterdir()
    assert json.loads(kept.read_text())["architecture"] == "LlamaForCausalLM"
    tokenizer.chat_template += " "
    load_model(tiny_folder, tokenizer=tokenizer, device="cpu")
    load_model(tiny_of("llama"), tokenizer=tokenizer)
    assert ran == 3 * first


def test_a_cache_that_cannot_be_written_costs_no_more_than_time(tiny_folder, tmp_path, monkeypatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("BLOCKEM_DATA", str(tmp_path / "file"))
    assert load_model(tiny_folder, device="cpu").adapters == []
