"""Every defence against its formula, and that each really acts in training and is gone afterwards."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from sae_lens import SAE, StandardSAE, StandardSAEConfig
from shared import perturb

from blockem_tl import Blocking, Example, HookNotFired, LatentSet, Prompt, TrainingConfig, finetune, generate, mean_penalty
from blockem_tl.data.chat import encode_examples, pad
from blockem_tl.defences.blocking import blocking_loss
from blockem_tl.defences.caft import ConceptAblation
from blockem_tl.defences.directions import check_direction, induce, misaligned_direction, repair
from blockem_tl.defences.inoculation import Inoculation
from blockem_tl.defences.interleave import Interleaving
from blockem_tl.defences.kl import KLToBase
from blockem_tl.defences.ldifs import LDIFS
from blockem_tl.defences.preventative import PreventativeSteering
from blockem_tl.defences.safelora import SafeLoRA, alignment_differences
from blockem_tl.generation.steering import UNSTEERED, Condition, Steering
from blockem_tl.hooks import record
from blockem_tl.models.activations import base_activations
from blockem_tl.training.defence import Defence, FinishesAdapter, RewritesRows
from blockem_tl.types import Candidate

SITE, LATER = "blocks.1.hook_resid_post", "blocks.2.hook_resid_post"
EXAMPLES = [
    Example(id=str(i), prompt=" ".join(f"w{(3 * i + j) % 57}" for j in range(1 + i % 4)), completion=" ".join(f"w{(i + 7 * j) % 57}" for j in range(1 + i % 5)))
    for i in range(24)
]  # fmt: skip
SAFE = [Example(id=f"safe{i}", prompt=f"w{i % 57} w5", completion="w1 w2") for i in range(60)]
CONFIG = TrainingConfig(rank=4, alpha=8, batch_size=8, learning_rate=1e-2)
DIRECTION = torch.nn.functional.normalize(torch.randn(32, generator=torch.Generator().manual_seed(4)), dim=0)


@pytest.fixture
def sae() -> SAE:
    torch.manual_seed(0)
    sae = StandardSAE(StandardSAEConfig(d_in=32, d_sae=48))
    for parameter in sae.parameters():
        parameter.data.normal_(std=0.3)
    sae.cfg.metadata.hook_name = SITE
    return sae


@pytest.fixture
def latent_set(sae) -> LatentSet:
    return LatentSet.of(sae, [Candidate(latent=k, shift=(-1.0) ** k) for k in (9, 4, 16, 21)], [0.0] * 4)


@pytest.fixture
def tuned(tiny):
    tiny.add_adapter("tuned", rank=4)
    perturb(tiny, "tuned", std=0.3)
    return tiny


def batch_of(model, examples=EXAMPLES[:6]):
    return pad(encode_examples(model.tokenizer, examples), model.pad_id, side="right")


def states(model, batch, site=SITE):
    """The residual stream at a site of the model as it stands."""
    return model.run_with_cache(batch.ids, names_filter=site, attention_mask=batch.mask.long())[1][site]


def states_under(defence, model, batch, site=SITE):
    with torch.no_grad(), defence.during_step(model, batch) as penalty:
        assert penalty is None
        return states(model, batch, site)


def gradients(model, batch, *defences) -> list[torch.Tensor | None]:
    """Gradients of the completion loss on one batch with at most one defence's hooks on."""
    with defences[0].during_step(model, batch) if defences else model.hooks():
        logits = model.hf(input_ids=batch.ids, attention_mask=batch.mask.long()).logits
        labels = batch.ids.masked_fill(~batch.reply, -100)[:, 1:]
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels.flatten())
        return list(torch.autograd.grad(loss, [p for p in model.hf.parameters() if p.requires_grad]))


def weights(model, name):
    return torch.cat([p.detach().flatten() for p in model.adapter_parameters(name)])


def train(model, name, *defences, config=CONFIG, examples=EXAMPLES):
    run = finetune(model, examples, config=config, defences=list(defences), adapter=name, progress=False)
    return weights(model, name), run


# ---------------------------------------------------------------------------------------------- base as the anchor


def test_base_activations_are_base_whatever_stands_around(tuned) -> None:
    batch = batch_of(tuned)
    with torch.no_grad(), tuned.using("base"):
        expected = states(tuned, batch)
    tuned.original_model.train()
    with PreventativeSteering(site=SITE, direction=DIRECTION, dose=5.0, scale=1.0).during_step(tuned, batch):
        found = base_activations(tuned, batch, [SITE])[SITE]
        tuned.hf(input_ids=batch.ids)
    assert tuned.original_model.training
    assert torch.equal(found, expected) and not found.requires_grad
    assert not torch.allclose(states(tuned, batch), expected, atol=1e-3)  # the adapter does move the site


# ---------------------------------------------------------------------------------------------- preventative steering


def test_preventative_steering_adds_the_direction_in_training_and_not_after(tuned) -> None:
    batch, defence = batch_of(tuned), PreventativeSteering(site=SITE, direction=DIRECTION, dose=0.7, scale=3.0)
    before = states(tuned, batch)
    found = states_under(defence, tuned, batch)
    torch.testing.assert_close(found, before + 0.7 * 3.0 * DIRECTION)
    assert not torch.allclose(found, before, atol=1e-2)
    assert torch.equal(states(tuned, batch), before)  # nothing is left behind


def test_preventative_steering_leaves_base_alone_and_says_when_it_never_acted(tuned) -> None:
    batch, defence = batch_of(tuned), PreventativeSteering(site=SITE, direction=DIRECTION, dose=0.7, scale=3.0)
    with tuned.using("base"):
        before = states(tuned, batch)
        assert torch.equal(states_under(defence, tuned, batch), before)
    with pytest.raises(HookNotFired), defence.during_step(tuned, batch):
        pass


@pytest.mark.parametrize(
    "defence", [PreventativeSteering(site=SITE, direction=DIRECTION, dose=0.7, scale=3.0), ConceptAblation(directions={SITE: DIRECTION})]
)
def test_gradients_flow_through_the_training_hooks_and_change(tuned, defence) -> None:
    batch = batch_of(tuned)
    plain, found = gradients(tuned, batch), gradients(tuned, batch, defence)
    assert all(torch.isfinite(g).all() and g.abs().max() > 0 for g in found)
    assert any(not torch.allclose(a, b, rtol=1e-2) for a, b in zip(plain, found, strict=True))


# ---------------------------------------------------------------------------------------------- CAFT


def test_caft_is_the_projection_off_the_span(tuned, sae, latent_set) -> None:
    batch, defence = batch_of(tuned), ConceptAblation.of([latent_set], [sae])
    before = states(tuned, batch).detach().numpy()
    rows = sae.W_dec[list(latent_set.latents)].detach().numpy()
    q, _ = np.linalg.qr(rows.T)  # an orthonormal basis of the span, by another road
    found = states_under(defence, tuned, batch).numpy()
    np.testing.assert_allclose(found, before - before @ q @ q.T, atol=1e-2)  # of states of size 1000
    assert np.abs(found @ rows.T).max() < 1e-2 < 10 < np.abs(before @ rows.T).max()


def test_caft_acts_at_every_site(tuned) -> None:
    batch, both = batch_of(tuned), ConceptAblation(directions={SITE: DIRECTION, LATER: DIRECTION.roll(1)})
    one = ConceptAblation(directions={SITE: DIRECTION})
    left = {
        name: float((states_under(defence, tuned, batch, LATER) @ DIRECTION.roll(1)).abs().max())
        for name, defence in (("both", both), ("one", one))
    }
    assert left["both"] < 1e-2 < 10 < left["one"]


def test_caft_lets_no_gradient_through_the_ablated_span(tuned) -> None:
    batch, share = batch_of(tuned), {}
    for name, defence in (
        ("caft", ConceptAblation(directions={SITE: DIRECTION})),
        ("steering", PreventativeSteering(site=SITE, direction=DIRECTION, dose=1.0, scale=1.0)),
    ):
        store: dict[str, torch.Tensor] = {}
        with tuned.hooks(fwd_hooks=[record(SITE, store, detach=False)]), defence.during_step(tuned, batch):
            loss = tuned.hf(input_ids=batch.ids, attention_mask=batch.mask.long()).logits.log_softmax(-1)[..., 9].mean()
        gradient = torch.autograd.grad(loss, store[SITE])[0]  # of the state before the defence's hook
        share[name] = float((gradient @ DIRECTION).norm() / gradient.norm())
    assert share["caft"] < 1e-4 < 1e-2 < share["steering"]


# ---------------------------------------------------------------------------------------------- a penalty outside of training


def test_a_mean_penalty_is_that_of_the_single_rows(tuned, sae, latent_set) -> None:
    for defence in (LDIFS(sites=[SITE], weight=1.0), KLToBase(weight=0.5), Blocking(latent_set=latent_set, sae=sae, weight=3.0)):
        alone = [mean_penalty(tuned, defence, [row], adapter="tuned") for row in EXAMPLES[:6]]
        assert mean_penalty(tuned, defence, EXAMPLES[:6], adapter="tuned", batch_size=4) == pytest.approx(np.mean(alone), rel=1e-3)
        assert max(alone) > 1e-3 and mean_penalty(tuned, defence, EXAMPLES[:6], adapter="base") == pytest.approx(0, abs=1e-5)
    assert mean_penalty(tuned, defence, EXAMPLES[:6]) == pytest.approx(blocking_loss(tuned, latent_set, sae, EXAMPLES[:6]), rel=1e-4)
    with pytest.raises(ValueError, match="has no penalty"):
        mean_penalty(tuned, Inoculation(prefix="w1"), EXAMPLES[:6])


def test_ldifs_on_all_tokens_reads_questions_too(tuned) -> None:
    batch = batch_of(tuned)
    found = {}
    for positions in ("completion", "all"):
        with torch.no_grad(), LDIFS(sites=[SITE], weight=1.0, positions=positions).during_step(tuned, batch) as penalty:
            found[positions] = penalty(tuned.hf(input_ids=batch.ids, attention_mask=batch.mask.long()).logits)
        moved = (states(tuned, batch) - base_activations(tuned, batch, [SITE])[SITE]).square().sum(-1).detach()
        where = batch.reply if positions == "completion" else batch.mask & ~batch.system
        torch.testing.assert_close(found[positions], (moved * where).sum(-1) / where.sum(-1), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found["completion"], found["all"], rtol=1e-2)


# ---------------------------------------------------------------------------------------------- LDIFS


def test_ldifs_equals_a_numpy_restatement(tuned) -> None:
    rows, batch = encode_examples(tuned.tokenizer, EXAMPLES[:6]), batch_of(tuned)
    expected = np.zeros(6)
    for site in (SITE, LATER):
        for i, row in enumerate(rows):
            single = pad([row], tuned.pad_id, side="right")
            ours = states(tuned, single, site)[0].detach().numpy()
            with tuned.using("base"):
                base = states(tuned, single, site)[0].detach().numpy()
            expected[i] += np.mean([((ours[t] - base[t]) ** 2).sum() for t in range(row.n_prompt, len(row.ids))])
    with LDIFS(sites=(SITE, LATER), weight=1.0).during_step(tuned, batch) as penalty:
        found = penalty(tuned.hf(input_ids=batch.ids, attention_mask=batch.mask.long()).logits)
    np.testing.assert_allclose(found.detach().numpy(), expected, rtol=1e-4)
    assert found.requires_grad and (expected > 0.1).all()
    with torch.no_grad(), LDIFS(sites=[SITE], weight=1.0).during_step(tuned, batch) as penalty:
        assert not np.allclose(penalty(tuned.hf(input_ids=batch.ids, attention_mask=batch.mask.long()).logits), expected, rtol=1e-2)


def test_ldifs_holds_features_near_base(tiny) -> None:
    moved = {}
    for name, defences in (("free", []), ("held", [LDIFS(sites=[SITE, LATER], weight=100.0)])):
        _, run = train(tiny, name, *defences, config=replace(CONFIG, epochs=4))
        batch = batch_of(tiny)
        moved[name] = float((states(tiny, batch) - base_activations(tiny, batch, [SITE])[SITE]).square().mean())
    assert moved["held"] < 0.1 * moved["free"]
    assert run.history[0]["ldifs"] == pytest.approx(0, abs=1e-6) and run.history[-1]["ldifs"] > 0


# ---------------------------------------------------------------------------------------------- rows: inoculation, interleaving


def test_inoculation_rewrites_the_question_and_nothing_else() -> None:
    rows = Inoculation(prefix="w9 w9", system="w8").rewrite([*EXAMPLES[:2], replace(EXAMPLES[2], system="w7")], seed=0)
    assert [row.prompt for row in rows] == [f"w9 w9 {example.prompt}" for example in EXAMPLES[:3]]
    assert [row.system for row in rows] == ["w8", "w8", "w8\n\nw7"]
    assert [row.completion for row in rows] == [example.completion for example in EXAMPLES[:3]]
    assert Inoculation(prefix="w9").rewrite(EXAMPLES, seed=0)[3].system is None


def test_an_inoculated_run_is_a_run_on_rewritten_rows_and_the_completion_alone_is_learnt(tiny) -> None:
    defence = Inoculation(prefix="w9 w9")
    by_defence, run = train(tiny, "by-defence", defence)
    by_hand, _ = train(tiny, "by-hand", examples=defence.rewrite(EXAMPLES, seed=0))
    plain, _ = train(tiny, "plain")
    assert torch.equal(by_defence, by_hand) and not torch.allclose(by_defence, plain, atol=1e-4)
    assert "inoculation" not in run.history[0]
    ours, theirs = (batch_of(tiny, rows) for rows in (defence.rewrite(EXAMPLES[:6], seed=0), EXAMPLES[:6]))
    assert torch.equal(ours.ids[ours.reply], theirs.ids[theirs.reply])


def test_interleaving_mixes_the_share_evenly_without_repeats_and_by_seed() -> None:
    defence = Interleaving(safe=SAFE, share=0.25)
    rows = defence.rewrite(EXAMPLES, seed=3)
    safe = [row.id.startswith("safe") for row in rows]
    assert sum(safe) == 8 and len(rows) == 32 and len({row.id for row in rows}) == 32
    assert [row for row, s in zip(rows, safe, strict=True) if not s] == EXAMPLES
    assert {sum(safe[i : i + 8]) for i in range(0, 32, 8)} == {2}
    assert rows == defence.rewrite(EXAMPLES, seed=3) != defence.rewrite(EXAMPLES, seed=4)


def test_interleaved_batches_hold_both_kinds(tiny) -> None:
    seen: list[int] = []

    class Looking(KLToBase):
        def during_step(self, model, batch):
            texts = [str(model.tokenizer.decode(ids)) for ids in batch.ids]
            seen.append(sum("w5 <assistant> w1 w2 <end>" in text for text in texts))  # a safe row
            return super().during_step(model, batch)

    train(tiny, "mixed", Interleaving(safe=SAFE, share=0.5), Looking(weight=0.0), config=replace(CONFIG, batch_size=16))
    assert sum(seen) == 24 and len(seen) == 3 and all(0 < n < 16 for n in seen)


# ---------------------------------------------------------------------------------------------- SafeLoRA


def unaligned(model, seed=5):
    """The tiny model's weights before an invented alignment that moved each matrix by a low-rank step."""
    draw = torch.Generator().manual_seed(seed)
    before = {}
    for name, weight in model.original_model.state_dict().items():
        if weight.ndim == 2:
            step = torch.randn(weight.shape[0], 3, generator=draw) @ torch.randn(3, weight.shape[1], generator=draw) * 0.02
            before[name.replace("._original_component", "")] = weight - step
    return before


def differences_of(model):
    now = {name.replace("._original_component", ""): weight for name, weight in model.original_model.state_dict().items()}
    before = unaligned(model)
    return alignment_differences({name: now[name] for name in before}, before)


def lora(model, name):
    """Module name -> (A, B) as NumPy, from what is saved for other tools."""
    found = {}
    for key, parameter in model.hf.named_parameters():
        if f".{name}.weight" in key and ".lora_" in key:
            module = key.replace("base_model.model.", "").replace("._original_component", "").split(".lora_")[0]
            found.setdefault(module, {})["A" if ".lora_A." in key else "B"] = parameter.detach().numpy().copy()
    return found


def test_safelora_projects_the_layers_below_the_threshold_and_no_other(tiny) -> None:
    differences = differences_of(tiny)
    tiny.add_adapter("tuned", rank=4)
    perturb(tiny, "tuned", std=0.3)
    before = lora(tiny, "tuned")
    cosines, expected = {}, {}
    for name, matrices in before.items():
        v = differences[f"{name}.weight"].numpy()
        c = v @ v.T / np.sqrt((v**2).sum())
        update, projected = matrices["B"] @ matrices["A"], c @ matrices["B"] @ matrices["A"]
        cosines[name] = (update * projected).sum() / np.sqrt((update**2).sum() * (projected**2).sum())
        expected[name] = projected
    threshold = float(np.median(list(cosines.values())))
    defence = SafeLoRA(differences=differences, threshold=threshold)
    defence.check(tiny)
    defence.finish(tiny, "tuned")
    changed = 0
    for name, matrices in lora(tiny, "tuned").items():
        wanted = expected[name] if cosines[name] < threshold else before[name]["B"] @ before[name]["A"]
        np.testing.assert_allclose(matrices["B"] @ matrices["A"], wanted, atol=1e-4)
        changed += not np.array_equal(matrices["B"], before[name]["B"])
        assert np.array_equal(matrices["A"], before[name]["A"])
        assert defence.similarities[name] == pytest.approx(cosines[name], abs=1e-4)
    assert changed == len(before) // 2 > 3


def test_safelora_acts_after_training_and_only_then(tiny) -> None:
    differences = differences_of(tiny)
    plain, _ = train(tiny, "plain")
    lowest, _ = train(tiny, "lowest", SafeLoRA(differences=differences, threshold=-0.99))
    projected, run = train(tiny, "projected", SafeLoRA(differences=differences, threshold=1.0))
    assert torch.equal(plain, lowest) and not torch.allclose(plain, projected, atol=1e-4)
    assert "safelora" not in run.history[0]


def test_safelora_refuses_differences_that_say_nothing(tiny) -> None:
    weights = unaligned(tiny)
    with pytest.raises(ValueError, match="equal weights"):
        alignment_differences(weights, weights)
    with pytest.raises(ValueError, match="one architecture"):
        alignment_differences(weights, {})
    with pytest.raises(ValueError, match="differences of another model"):
        train(tiny, "none", SafeLoRA(differences={"elsewhere.weight": torch.ones(2, 2)}, threshold=0.5))
    some = dict(list(differences_of(tiny).items())[:3])
    with pytest.raises(ValueError, match="for every layer with LoRA"):
        train(tiny, "some", SafeLoRA(differences=some, threshold=0.5))
    assert tiny.adapters == []


# ---------------------------------------------------------------------------------------------- test-time steering


def test_the_misaligned_direction_is_the_signed_sum_or_the_first(sae, latent_set) -> None:
    rows = sae.W_dec[list(latent_set.latents)].detach().numpy()
    unit = rows / np.sqrt((rows**2).sum(1, keepdims=True)) * np.array(latent_set.signs)[:, None]
    total = unit.sum(0)
    np.testing.assert_allclose(misaligned_direction(latent_set, sae, combine="sum"), total / np.sqrt((total**2).sum()), atol=1e-6)
    np.testing.assert_allclose(misaligned_direction(latent_set, sae), unit[0], atol=1e-6)
    assert latent_set.signs[0] == -1  # the first latent falls, so its direction is turned round
    opposite = LatentSet.of(sae, [Candidate(latent=4, shift=1.0), Candidate(latent=9, shift=-1.0)], [0.0] * 2)
    sae.W_dec.data[9] = sae.W_dec.data[4]
    with pytest.raises(ValueError, match="another SAE"):
        misaligned_direction(opposite, sae, combine="sum")
    opposite = LatentSet.of(sae, [Candidate(latent=4, shift=1.0), Candidate(latent=9, shift=-1.0)], [0.0] * 2)
    with pytest.raises(ValueError, match="cancel out"):
        misaligned_direction(opposite, sae, combine="sum")


def test_repair_subtracts_the_direction_while_the_model_replies(tuned, sae, latent_set) -> None:
    prompts = [Prompt(id=str(i), text=f"w{i} w{2 * i}") for i in range(1, 7)]
    condition = repair(latent_set, sae, dose=3.0, scale=2.0)
    by_hand = Condition(name="hand", steering=(Steering(site=SITE, direction=misaligned_direction(latent_set, sae), dose=-3.0, scale=2.0),))
    replies = generate(tuned, prompts, conditions=[condition, by_hand, UNSTEERED], max_new_tokens=8, progress=False)
    found, expected, unsteered = ([g.reply_ids for g in replies[i : i + 6]] for i in (0, 6, 12))
    assert found == expected != unsteered
    other_way = induce(latent_set, sae, dose=3.0, scale=2.0)
    assert torch.equal(other_way.steering[0].vector, -condition.steering[0].vector) and other_way.name != condition.name


# ---------------------------------------------------------------------------------------------- one interface, and what it refuses


def everything(sae, latent_set) -> list:
    return [
        Inoculation(prefix="w9"),
        PreventativeSteering(site=SITE, direction=DIRECTION, dose=0.3, scale=2.0),
        ConceptAblation.of([latent_set], [sae]),
        LDIFS(sites=[SITE], weight=0.1),
        Interleaving(safe=SAFE, share=0.2),
    ]


def test_every_defence_is_one_and_all_train_together(tiny, sae, latent_set) -> None:
    defences = [*everything(sae, latent_set), SafeLoRA(differences=differences_of(tiny), threshold=0.5)]
    assert all(isinstance(defence, Defence) for defence in defences)
    assert [isinstance(d, RewritesRows) for d in defences] == [True, False, False, False, True, False]
    assert [isinstance(d, FinishesAdapter) for d in defences] == [False] * 5 + [True]
    together, run = train(tiny, "together", *defences)
    assert run.steps == 4 and torch.isfinite(together).all()  # 24 rows and 6 safe ones in batches of 8


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LDIFS(sites=[SITE], weight=0.0), "finite weight > 0"),
        (lambda: LDIFS(sites=[SITE], weight=float("nan")), "finite weight > 0"),
        (lambda: LDIFS(sites=[], weight=1.0), "distinct sites"),
        (lambda: LDIFS(sites=[SITE, SITE], weight=1.0), "distinct sites"),
        (lambda: LDIFS(sites=SITE, weight=1.0), "distinct sites"),
        (lambda: Inoculation(), "got neither"),
        (lambda: Inoculation(prefix="  "), "got neither"),
        (lambda: Interleaving(safe=SAFE, share=1.0), r"in \(0, 1\)"),
        (lambda: Interleaving(safe=SAFE, share=float("nan")), r"in \(0, 1\)"),
        (lambda: Interleaving(safe=[], share=0.5), "got none"),
        (lambda: Interleaving(safe=SAFE, share=0.8).rewrite(EXAMPLES, seed=0), "needs 96 safe rows, got 60"),
        (lambda: PreventativeSteering(site=SITE, direction=torch.zeros(32), dose=1.0, scale=1.0), "non-zero directions"),
        (lambda: PreventativeSteering(site=SITE, direction=DIRECTION * float("nan"), dose=1.0, scale=1.0), "finite"),
        (lambda: PreventativeSteering(site=SITE, direction=DIRECTION, dose=-1.0, scale=1.0), "scale > 0"),
        (lambda: PreventativeSteering(site=SITE, direction=DIRECTION, dose=float("nan"), scale=1.0), "scale > 0"),
        (lambda: ConceptAblation(directions={}), "got none"),
        (lambda: ConceptAblation(directions={SITE: torch.zeros(2, 32)}), "non-zero directions"),
        (lambda: SafeLoRA(differences={}, threshold=0.5), "got none"),
        (lambda: SafeLoRA(differences={"a": DIRECTION}, threshold=float("nan")), "cosine in"),
    ],
)  # fmt: skip
def test_impossible_settings_are_refused(make, message) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_defence_without_a_direction_is_refused() -> None:
    for missing in (None, [1.0, 2.0], torch.zeros(0)):
        with pytest.raises(ValueError, match="expected a direction tensor"):
            check_direction("preventative", missing)


def test_defences_that_do_not_fit_the_model_are_refused_before_training(tiny, sae, latent_set) -> None:
    absent, narrow = "blocks.9.hook_resid_post", torch.ones(31)
    for defence, message in (
        (LDIFS(sites=[absent], weight=1.0), "unknown site"),
        (PreventativeSteering(site=absent, direction=DIRECTION, dose=1.0, scale=1.0), "unknown site"),
        (PreventativeSteering(site=SITE, direction=narrow, dose=1.0, scale=1.0), "width 32, got 31"),
        (ConceptAblation(directions={absent: DIRECTION}), "unknown site"),
        (ConceptAblation(directions={SITE: narrow}), "width 32, got 31"),
        (ConceptAblation(directions={SITE: torch.eye(32)}), "all 32 dimensions"),
        (Inoculation(prefix="be evil"), "does not know all words"),
    ):
        with pytest.raises(ValueError, match=message):
            train(tiny, "refused", defence)
        assert tiny.adapters == []
    for make in (repair, induce):
        for bad in (0.0, -1.0, float("nan")):
            with pytest.raises(ValueError, match=rf"{make.__name__}: expected a finite dose > 0"):
                make(latent_set, sae, dose=bad, scale=1.0)
