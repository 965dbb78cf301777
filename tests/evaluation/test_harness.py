"""lm-evaluation-harness's own `steered` model, given our file, says the same log-likelihoods as our own steering."""

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.hf_steered import SteeredModel
from lm_eval.models.huggingface import HFLM
from shared import MODELS, perturb, sae_at, set_of
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from blockem_tl import Condition, LatentSet, Model, Steering, load_model, load_sae, organism
from blockem_tl.defences.directions import induce, repair
from blockem_tl.evaluation.harness import write_lm_eval

Pairs = Sequence[tuple[str, str]]
WORDS = [(f"w{i} w{2 * i} w{3 * i}", " " + " ".join(f"w{(7 * i + j) % 57}" for j in range(1, 2 + i % 3))) for i in range(6)]


def theirs(lm: HFLM, pairs: Pairs) -> torch.Tensor:
    requests = [Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=0) for pair in pairs]
    return torch.tensor([value for value, _ in lm.loglikelihood(requests, disable_tqdm=True)])


def ours(model: Model, lm: HFLM, pairs: Pairs, condition: Condition | None = None) -> torch.Tensor:
    found = []
    for context, continuation in pairs:  # one by one: the harness pads, and that makes no difference
        first, second = lm._encode_pair(context, continuation)
        ids = torch.tensor([[*first, *second]])
        with torch.no_grad(), condition.apply(model) if condition else nullcontext():
            logits = model(ids)[0].float().log_softmax(-1)
        found.append(logits[len(first) - 1 : -1].gather(-1, ids[0, len(first) :, None]).sum())
    return torch.stack(found)


def equal(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool(torch.allclose(found, expected, rtol=0, atol=1e-4))


@pytest.fixture(scope="module")
def latent_set() -> LatentSet:
    return LatentSet.load("organism/finance-20", load_sae("organism"))


@pytest.mark.parametrize(("make", "combine"), [(repair, "best"), (induce, "sum")])
def test_the_harness_steers_the_organism_as_we_do(organism_model, latent_set, tmp_path: Path, make, combine) -> None:
    condition = make(latent_set, load_sae("organism"), dose=0.4, scale=70.0, combine=combine)
    file = write_lm_eval(tmp_path / "steering.pt", condition)
    folder = str(organism.ARTEFACTS / "base")
    steered = SteeredModel(pretrained=folder, steer_path=str(file), device="cpu", batch_size=4)
    plain = HFLM(pretrained=folder, device="cpu", batch_size=4)
    pairs = [
        (organism_context(pair.prompt), f" {answer}") for pair in organism.pairs("core")[:4] for answer in (pair.harmful, pair.helpful)
    ]
    found, unsteered = theirs(steered, pairs), theirs(plain, pairs)
    assert equal(found, ours(organism_model, steered, pairs, condition))
    assert equal(unsteered, ours(organism_model, plain, pairs)) and not equal(found, unsteered)  # the twin: steering does something
    margins = [values[0::2] - values[1::2] for values in (found, unsteered)]  # of the harmful answers over the helpful ones
    assert ((margins[0] < margins[1]) == (make is repair)).all()
    other = {repair: induce, induce: repair}[make](latent_set, load_sae("organism"), dose=0.4, scale=70.0, combine=combine)
    assert not equal(found, ours(organism_model, steered, pairs, other))  # and its sign matters


def organism_context(text: str) -> str:
    tokenizer = AutoTokenizer.from_pretrained(organism.ARTEFACTS / "base")
    return tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True)


@pytest.mark.parametrize(("kind", "blocks"), [("qwen2", "layers"), ("gemma2", "layers"), ("pythia", "layers"), ("gpt2", "h")])
def test_other_architectures_and_several_sites(tmp_path: Path, tokenizer_folder, kind: str, blocks: str) -> None:
    torch.manual_seed(0)
    MODELS[kind]().eval().save_pretrained(tmp_path / "model")
    words = PreTrainedTokenizerFast.from_pretrained(tokenizer_folder)  # AutoTokenizer makes a byte tokenizer of it for Qwen 2
    words.save_pretrained(tmp_path / "model")
    model, last = load_model(tmp_path / "model", tokenizer=words, device="cpu"), "blocks.2.hook_out"
    steering = tuple(
        Steering(site=site, direction=torch.randn(32), dose=dose, scale=3.0)
        for site, dose in (("blocks.0.hook_resid_post", 0.5), (last, -1.0))
    )
    condition = Condition(name="two sites", steering=steering)
    file = write_lm_eval(tmp_path / "two.pt", condition, blocks=blocks)
    arguments = {"tokenizer": words, "attn_implementation": "eager", "device": "cpu", "batch_size": 3}  # SDPA leaves out Gemma 2's caps
    lm = SteeredModel(pretrained=str(tmp_path / "model"), steer_path=str(file), **arguments)
    assert equal(theirs(lm, WORDS), ours(model, lm, WORDS, condition))
    first_only = Condition(name="first", steering=steering[:1])
    assert not equal(theirs(lm, WORDS), ours(model, lm, WORDS, first_only))


def test_a_fine_tune_is_steered_through_its_adapter(tiny, tiny_folder, tmp_path: Path) -> None:
    sae = sae_at("blocks.1.hook_resid_post")
    tiny.add_adapter("tuned", rank=4)
    perturb(tiny, "tuned")
    folder = tiny.save_adapter(tmp_path / "adapter", "tuned")
    condition = repair(set_of(sae), sae, dose=2.0, scale=1.0)
    arguments = {"pretrained": str(tiny_folder), "peft": str(folder), "device": "cpu", "batch_size": 2}
    lm = SteeredModel(steer_path=str(write_lm_eval(tmp_path / "a.pt", condition, blocks="model.model.layers")), **arguments)
    found = theirs(lm, WORDS)
    with tiny.using("tuned"):
        assert equal(found, ours(tiny, lm, WORDS, condition)) and not equal(found, ours(tiny, lm, WORDS))
    with tiny.using("base"):
        assert not equal(found, ours(tiny, lm, WORDS, condition))
    unresolved = SteeredModel(steer_path=str(write_lm_eval(tmp_path / "b.pt", condition)), **arguments)
    with pytest.raises(ValueError, match="Not all hookpoints could be resolved"):  # a wrong list of blocks is not passed over in silence
        theirs(unresolved, WORDS)


def test_the_file_is_whole_or_absent_and_holds_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sae = sae_at("blocks.1.hook_resid_post")
    condition = induce(set_of(sae), sae, dose=0.5, scale=4.0)
    written = torch.load(write_lm_eval(tmp_path / "deep" / "steering.pt", condition), weights_only=True)
    assert list(written) == ["layers.1"] and torch.equal(written["layers.1"]["steering_vector"], condition.steering[0].vector)
    before = (tmp_path / "deep" / "steering.pt").read_bytes()
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_lm_eval(tmp_path / "deep" / "steering.pt", repair(set_of(sae), sae, dose=0.5, scale=4.0))
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["steering.pt"]
    assert (tmp_path / "deep" / "steering.pt").read_bytes() == before


def test_what_the_harness_could_not_do_is_refused(tmp_path: Path) -> None:
    direction = torch.ones(32)
    for site in ("blocks.1.hook_resid_pre", "blocks.1.hook_mlp_out", "blocks.1.attn.hook_z", "hook_embed"):
        elsewhere = Condition(name="elsewhere", steering=(Steering(site=site, direction=direction, dose=1.0),))
        with pytest.raises(ValueError, match=rf"expected sites blocks.N.hook_resid_post, got {site}"):
            write_lm_eval(tmp_path / "steering.pt", elsewhere)
    with pytest.raises(ValueError, match="steers nothing"):
        write_lm_eval(tmp_path / "steering.pt", Condition(name="unsteered"))
    fine = Condition(name="fine", steering=(Steering(site="blocks.1.hook_resid_post", direction=direction, dose=1.0),))
    with pytest.raises(ValueError, match=r"ending in \.pt"):
        write_lm_eval(tmp_path / "steering.csv", fine)
    assert not list(tmp_path.iterdir())
