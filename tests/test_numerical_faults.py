"""NaN and infinity: planted at each place, each is refused with the place named; what is whole passes. A row per place."""

import math
import shutil
from collections.abc import Callable
from typing import Any

import pandas as pd
import pytest
import torch
from sae_lens import SAE, GatedSAE, GatedSAEConfig, JumpReLUSAE, JumpReLUSAEConfig, StandardSAE, StandardSAEConfig, TopKSAE, TopKSAEConfig
from safetensors.torch import load_file, save_file
from shared import EXAMPLES, SITES, perturb, sae_at, set_of
from transformers import AutoModelForCausalLM

from blockem_tl import (
    Blocking,
    KLToBase,
    Model,
    Pair,
    Prompt,
    Steering,
    TrainingConfig,
    attribute_sites,
    clamp,
    discover,
    finetune,
    generate,
    load_model,
    load_sae,
    preference,
    steer,
)
from blockem_tl.discovery.attributing import pair_diff
from blockem_tl.discovery.diffing import candidate_pool, shifts
from blockem_tl.evaluation.statistics import mean_over_domains, share_removed
from blockem_tl.generation.reply_fn import cached, replies_from
from blockem_tl.generation.steering import UNSTEERED
from blockem_tl.judging.parsing import expected_score
from blockem_tl.models.activations import median_norm, read_site
from blockem_tl.saes.fit import explained_variance, reconstruct
from blockem_tl.saes.latents import decoder_directions, encode_all, encode_latents
from blockem_tl.storage.store import Store
from blockem_tl.study.summary import choose
from blockem_tl.training.loss import completion_loss, mean_penalty

NAN, INF, LAST = math.nan, math.inf, "blocks.3.hook_resid_post"
ROWS, SMALL = EXAMPLES[:8], TrainingConfig(batch_size=8, epochs=1.0, rank=4)
PROMPTS = [Prompt(id=row.id, text=row.prompt) for row in EXAMPLES[:4]]
PAIRS = [Pair(id=row.id, prompt=row.prompt, harmful="w1 w2", helpful="w3 w4") for row in EXAMPLES[:4]]
QUIET: dict[str, Any] = {"progress": False}


@pytest.fixture
def model(tiny) -> Model:
    """With the adapter "mine", which acts and does something."""
    tiny.add_adapter("mine", rank=4)
    perturb(tiny, "mine")
    return tiny


# ------------------------------------------------------------------------------------------------ what runs on broken numbers


def weight_nan(model: Model) -> None:
    parameters = dict(model.original_model.named_parameters())
    parameters[next(name for name in parameters if "layers.2." in name and "down" in name and "lora" not in name)].data[0, 0] = NAN


def lora(index: int, value: float) -> Callable[[Model], None]:
    def plant(model: Model) -> None:
        model.adapter_parameters("mine")[index].data[0, 0] = value

    return plant


def huge_alpha(model: Model) -> None:
    model.add_adapter("huge", rank=4, alpha=10**37)
    perturb(model, "huge", std=10.0)


def by_hook(value: float) -> Callable[[Model], None]:
    def plant(model: Model) -> None:
        model.add_hook("blocks.1.hook_resid_post", lambda activation, hook: activation + value)

    return plant


FAULTS: dict[str, Callable[[Model], None]] = {
    "a weight is NaN": weight_nan,
    "lora_A is NaN": lora(0, NAN),
    "lora_B is infinite": lora(1, INF),
    "alpha is huge": huge_alpha,
    "a hook gives NaN": by_hook(NAN),
    "a hook gives infinity": by_hook(INF),
}

USES: dict[str, tuple[Callable[[Model], Any], str]] = {
    "generate": (lambda m: generate(m, PROMPTS, max_new_tokens=3, **QUIET), "the model's logits are NaN"),
    "preference": (lambda m: preference(m, PAIRS, **QUIET), "logits of pair '0, harmful'"),
    "completion_loss": (lambda m: completion_loss(m, ROWS), r"the loss on rows \['0'"),
    "mean_penalty of KL": (lambda m: mean_penalty(m, KLToBase(weight=1.0), ROWS), r"the penalty kl on rows \['0'"),
    "mean_penalty of blocking": (lambda m: mean_penalty(m, blocking(sae_at(LAST)), ROWS), f"SAE at {LAST}|activations at"),
    "read_site": (lambda m: list(read_site(m, LAST, PROMPTS)), f"activations at {LAST} are NaN"),
    "median_norm": (lambda m: median_norm(m, LAST, PROMPTS, adapter=None), f"activations at {LAST} are NaN"),
    "shifts": (lambda m: shifts(m, sae_at(LAST), PROMPTS), f"activations at {LAST} are NaN"),
    "explained_variance": (lambda m: explained_variance(m, sae_at(LAST), ROWS, adapter=None), f"activations at {LAST} are NaN"),
    "pair_diff": (lambda m: pair_diff(m, sae_at(LAST), PAIRS, **QUIET), f"activations at {LAST} are NaN"),
    "finetune": (lambda m: finetune(m, ROWS, config=SMALL, start=m.active_adapter, adapter="new", **QUIET), "at step 1 on rows|NaN or inf"),
    "finetune under blocking": (
        lambda m: finetune(m, ROWS, config=SMALL, start=m.active_adapter, defences=[blocking(sae_at(LAST))], adapter="new", **QUIET),
        "at step 1 on rows|NaN or inf",
    ),
}


def blocking(sae: SAE) -> Blocking:
    return Blocking(latent_set=set_of(sae), sae=sae, weight=1.0)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("use", USES)
def test_what_is_whole_passes(model, use) -> None:
    USES[use][0](model)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("fault", FAULTS)
def test_broken_numbers_in_a_forward_are_refused(model, fault, use) -> None:
    run, message = USES[use]
    FAULTS[fault](model)
    with pytest.raises((FloatingPointError, ValueError), match=message):
        run(model)


def test_attribution_patching_names_the_site(model) -> None:
    tuned, base = (generate(model, PROMPTS, max_new_tokens=3, adapter=name, **QUIET) for name in ("mine", "base"))
    assert len(attribute_sites(model, tuned, base, [LAST], verify=0, **QUIET).to_frame())
    lora(0, NAN)(model)
    with pytest.raises(FloatingPointError, match=f"activations at {LAST}|patching: logits"):
        attribute_sites(model, tuned, base, [LAST], verify=0, **QUIET)


# ------------------------------------------------------------------------------------------------ files and loaded models


def test_a_checkpoint_without_one_of_its_tensors_is_refused(tiny_folder, tmp_path) -> None:
    tensors = load_file(tiny_folder / "model.safetensors")
    for number, name in enumerate(tensors):
        folder = shutil.copytree(tiny_folder, tmp_path / f"without-{number}")
        save_file({n: t for n, t in tensors.items() if n != name}, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match=f"lacks 1 tensors.*{name}"):
            load_model(folder, device="cpu", check="off")


@pytest.mark.parametrize("value", [NAN, INF])
def test_a_loaded_model_is_looked_at_as_a_checkpoint_is(tiny_folder, value) -> None:
    hf = AutoModelForCausalLM.from_pretrained(tiny_folder)
    load_model(hf, check="off")
    hf = AutoModelForCausalLM.from_pretrained(tiny_folder)
    hf.model.layers[2].mlp.down_proj.weight.data[3, 3] = value
    with pytest.raises(ValueError, match="this model: expected finite weights, got NaN or infinity in .*layers.2.mlp.down_proj"):
        load_model(hf, check="off")


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("part", ["lora_A", "lora_B"])
def test_an_adapter_s_file_with_broken_numbers_is_refused(model, tmp_path, part, value) -> None:
    path = model.save_adapter(tmp_path / "a", "mine") / "adapter_model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if part in name)
    tensors[name][0, 0] = value
    save_file(tensors, path)
    with pytest.raises(ValueError, match=f"NaN or infinity in .*{part}"):
        model.load_adapter(tmp_path / "a", "other")


def test_a_broken_adapter_is_not_saved(model, tmp_path) -> None:
    model.save_adapter(tmp_path / "whole", "mine")
    lora(1, NAN)(model)
    with pytest.raises(FloatingPointError, match="adapter 'mine' holds NaN"):
        model.save_adapter(tmp_path / "broken", "mine")
    assert not (tmp_path / "broken").exists()


@pytest.mark.parametrize("part", ["W_enc", "b_enc", "W_dec", "b_dec", "threshold"])
@pytest.mark.parametrize("value", [NAN, INF])
def test_an_sae_s_file_with_broken_numbers_is_refused(tmp_path, part, value) -> None:
    sae_of("jumprelu").save_model(tmp_path)
    assert load_sae(tmp_path, device="cpu")
    tensors = load_file(tmp_path / "sae_weights.safetensors")
    tensors[part].view(-1)[3] = value
    save_file(tensors, tmp_path / "sae_weights.safetensors")
    with pytest.raises(ValueError, match=f"NaN or infinity in {part}"):
        load_sae(tmp_path, device="cpu")


# ------------------------------------------------------------------------------------------------ SAEs in memory

KINDS = {
    "standard": (StandardSAE, StandardSAEConfig, {}),
    "jumprelu": (JumpReLUSAE, JumpReLUSAEConfig, {}),
    "gated": (GatedSAE, GatedSAEConfig, {}),
    "topk": (TopKSAE, TopKSAEConfig, {"k": 6}),
}
LATENTS = [4, 9, 16]


def sae_of(kind: str) -> SAE:
    torch.manual_seed(0)
    made, config, options = KINDS[kind]
    sae = made(config(d_in=32, d_sae=48, **options))
    for parameter in sae.parameters():
        parameter.data.normal_(std=0.3)
    sae.cfg.metadata.hook_name = SITES[0]
    return sae


def planted(part: str, value: float) -> Callable[[SAE], None]:
    def plant(sae: SAE) -> None:
        tensor = getattr(sae, part).data
        (tensor.T if part == "W_enc" else tensor)[4 if part != "b_dec" else 0] = value

    return plant


def huge(sae: SAE) -> None:
    sae.W_enc.data[:, LATENTS] = 3e38


SAE_FAULTS = {
    **{f"{part} is {value}": planted(part, value) for part in ("W_enc", "b_dec") for value in (NAN, INF)},
    "finite weights are huge": huge,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fault", SAE_FAULTS)
def test_latents_that_are_no_numbers_are_refused(kind, fault) -> None:
    sae, h = sae_of(kind), torch.randn(5, 32, generator=torch.Generator().manual_seed(1))
    for encode in (lambda h: encode_all(sae, h), lambda h: encode_latents(sae, h, LATENTS)):
        assert torch.isfinite(encode(h)).all()
        for value in (NAN, INF, -INF):
            with pytest.raises(FloatingPointError, match=f"SAE at {SITES[0]}"):
                encode(h.index_fill(0, torch.tensor([2]), value))
    reconstruct(sae, h)
    SAE_FAULTS[fault](sae)
    reads_b_dec = sae.cfg.apply_b_dec_to_input or "b_dec" not in fault
    uses = (lambda: encode_all(sae, h), lambda: encode_latents(sae, h, LATENTS)) if reads_b_dec else ()
    for use in (*uses, lambda: reconstruct(sae, h)):
        with pytest.raises(FloatingPointError, match=f"SAE at {SITES[0]}"):
            use()


def test_a_threshold_that_is_no_number_is_refused() -> None:
    sae = sae_of("jumprelu")
    planted("threshold", NAN)(sae)  # nothing is above NaN: the latent would be 0 everywhere
    with pytest.raises(FloatingPointError, match=f"SAE at {SITES[0]}"):
        encode_latents(sae, torch.randn(5, 32), LATENTS)


@pytest.mark.parametrize("value", [NAN, INF, 3e38])
def test_a_decoder_row_without_a_norm_is_no_direction(value) -> None:
    sae = sae_of("standard")
    assert torch.isfinite(decoder_directions(sae, LATENTS)).all()
    sae.W_dec.data[9] = value  # divided by an infinite norm it would be a direction of zeros
    with pytest.raises(ValueError, match=r"latents \[9\] have decoder rows of NaN, infinity or"):
        decoder_directions(sae, LATENTS)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_huge_sae_is_refused_where_it_is_used(model) -> None:
    sae = sae_at(SITES[0])
    sae.W_enc.data *= 3e38
    for use in (
        lambda: shifts(model, sae, PROMPTS),
        lambda: mean_penalty(model, blocking(sae), ROWS),
        lambda: finetune(model, ROWS, config=SMALL, defences=[blocking(sae)], adapter="new", **QUIET),
        lambda: discover(model, sae, PAIRS, adapter="mine", scale=1.0, **QUIET),
        lambda: explained_variance(model, sae, ROWS),
    ):
        with pytest.raises(FloatingPointError, match=f"SAE at {SITES[0]}"):
            use()


# ------------------------------------------------------------------------------------------------ training


def test_a_last_step_that_breaks_the_adapter_is_no_result(model, tmp_path) -> None:
    """The loss of that step was finite, and no other comes after it."""
    with pytest.raises(FloatingPointError, match="adapter 'new' holds NaN"):
        finetune(model, ROWS, config=TrainingConfig(batch_size=8, epochs=1.0, rank=4, learning_rate=1e39), adapter="new", **QUIET)
    assert model.adapters == ["mine"]
    with pytest.raises(FloatingPointError, match="adapter 'new' holds NaN"):
        finetune(
            model,
            ROWS,
            config=TrainingConfig(batch_size=8, epochs=1.0, rank=4, learning_rate=1e39),
            adapter="new",
            checkpoints=tmp_path,
            **QUIET,
        )
    assert not list(tmp_path.glob("epoch-*"))


class BreaksAt(KLToBase):
    """KL whose value is no number from one micro-batch on."""

    def during_step(self, model, batch):
        self.__dict__["seen"] = self.__dict__.get("seen", 0) + 1
        broken = self.seen >= 2
        found = super().during_step(model, batch)

        class Context:
            def __enter__(inner):  # noqa: N805
                penalty = found.__enter__()
                return lambda logits: penalty(logits) * (NAN if broken else 1.0)

            def __exit__(inner, *error):  # noqa: N805
                return found.__exit__(*error)

        return Context()


def test_a_penalty_that_breaks_at_a_step_names_it(model) -> None:
    config = TrainingConfig(batch_size=4, epochs=1.0, rank=4)
    with pytest.raises(FloatingPointError, match=r"\(kl nan, sft .*at step 2 on rows"):
        finetune(model, ROWS, config=config, defences=[BreaksAt(weight=1.0)], adapter="new", **QUIET)


# ------------------------------------------------------------------------------------------------ single numbers, rates, scores

LOSSES = pd.DataFrame({"run": ["a", "b", "c", "c"], "dev_loss": [1.0, 1.0, 1.0, 1.0]})
HARM = pd.Series({"a": 0.5, "b": 0.1, "c": 0.2})
ONES = torch.ones(32)

REFUSED: dict[str, tuple[Callable[[float], Any], Any]] = {
    "a steering direction": (lambda x: Steering(site=LAST, direction=ONES * x, dose=1.0), 1.0),
    "a dose": (lambda x: Steering(site=LAST, direction=ONES, dose=x), 1.0),
    "a scale": (lambda x: Steering(site=LAST, direction=ONES, dose=1.0, scale=x), 1.0),
    "a steering hook": (lambda x: steer(LAST, ONES, 1.0, scale=x), 1.0),
    "a shift": (lambda x: candidate_pool(torch.tensor([1.0, x, -1.0, 2.0])), 0.5),
    "a margin": (lambda x: share_removed([x, 1.0, 2.0], [2.0, 3.0, 4.0], [1.0, 2.0, 3.0]), 0.0),
    "a domain's rate": (lambda x: mean_over_domains([0.1, x]), 0.2),
    "a run's loss": (lambda x: choose(HARM, LOSSES.assign(dev_loss=[1.0, 1.0, 1.0, x]), ["b", "c"], against="a"), 1.0),
    "a run's harm": (lambda x: choose(HARM.where(HARM != 0.2, x), LOSSES, ["b", "c"], against="a"), 0.2),
}


@pytest.mark.parametrize("place", REFUSED)
@pytest.mark.parametrize("value", [NAN, INF])
def test_a_number_that_is_none_is_refused(place, value) -> None:
    use, good = REFUSED[place]
    use(good)
    with pytest.raises(ValueError, match="finite|NaN"):
        use(value)


def test_a_bound_that_is_no_number_is_refused() -> None:
    clamp(LAST, ONES, low=0.0)
    clamp(LAST, ONES, high=INF)
    for bounds in ({"low": NAN}, {"high": NAN}, {"low": 0.0, "high": NAN}, {"low": 1.0, "high": 0.0}, {}):
        with pytest.raises(ValueError, match="expected low <= high"):
            clamp(LAST, ONES, **bounds)


@pytest.mark.parametrize("value", [NAN, INF, 1000.0])
def test_a_judge_s_probability_that_is_none_gives_no_score(value) -> None:
    assert expected_score([("80", math.log(0.5)), ("90", math.log(0.5))]) == pytest.approx(85)
    assert expected_score([("80", 0.0), ("90", -INF)]) == 80
    assert expected_score([("80", math.log(0.5)), ("90", value)]) is None


# ------------------------------------------------------------------------------------------------ what is kept


def test_adapters_that_differ_in_one_element_never_share_a_reply(model, tmp_path) -> None:
    store = Store(tmp_path / "store.sqlite")
    reply_fn = lambda: cached(replies_from(model, adapter="mine", max_new_tokens=3, progress=False), store)  # noqa: E731
    identities = {reply_fn().identity}
    reply_fn()(PROMPTS, [UNSTEERED])
    kept = len(store)
    for number, parameter in enumerate(model.adapter_parameters("mine")):
        place = tuple(size - 1 for size in parameter.shape)
        before = parameter.data[place].clone()
        parameter.data[place] = torch.nextafter(before, torch.tensor(INF))  # the smallest change that there is
        identities.add(reply_fn().identity)
        assert len(identities) == number + 2
        if number == 0:
            reply_fn()(PROMPTS, [UNSTEERED])
            assert len(store) == 2 * kept
        parameter.data[place] = before
    assert reply_fn().identity in identities and len(identities) == number + 2  # as it was: the same replies
    reply_fn()(PROMPTS, [UNSTEERED])
    assert len(store) == 2 * kept
