"""The penalty is eq. 11, blocking leaves SFT's gradients alone, and a step does not depend on how it is cut into batches."""

import warnings
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from sae_lens import SAE, StandardSAE, StandardSAEConfig
from shared import Interrupted, assert_trained_alike, at_step, perturb
from torch import nn
from transformers import get_scheduler

from blockem_tl import Blocking, Example, KLToBase, LatentSet, Prompt, TrainingConfig, completion_loss, finetune, load_model
from blockem_tl.data.chat import encode_examples, pad
from blockem_tl.defences.blocking import one_sided_penalty
from blockem_tl.training.defence import Defence
from blockem_tl.types import Candidate

SITE = "blocks.1.hook_resid_post"
EXAMPLES = [
    Example(
        id=str(i),
        prompt=" ".join(f"w{(3 * i + j) % 57}" for j in range(1 + i % 4)),
        completion=" ".join(f"w{(i + 7 * j) % 57}" for j in range(1 + i % 5)),
    )
    for i in range(24)
]
CONFIG = TrainingConfig(rank=4, alpha=8, batch_size=8, learning_rate=1e-2)


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
    return LatentSet.of(sae, [Candidate(latent=k, shift=(-1.0) ** k) for k in (4, 9, 16, 21)], [0.0] * 4)


@pytest.fixture
def blocking(latent_set, sae) -> Blocking:
    return Blocking(latent_set=latent_set, sae=sae, weight=3.0)


@pytest.fixture
def tuned(tiny):
    tiny.add_adapter("tuned", rank=4)
    perturb(tiny, "tuned", std=0.3)
    return tiny


def batch_of(model, examples=EXAMPLES[:6]):
    return pad(encode_examples(model.tokenizer, examples), model.pad_id, side="right")


def loss_of(model, batch, *defences):
    """The trainer's loss on one batch, restated: summed completion cross-entropy per token + weights * mean penalties."""
    with model.hooks() if not defences else defences[0].during_step(model, batch) as penalty:
        logits = model.hf(input_ids=batch.ids, attention_mask=batch.mask.long()).logits
        labels = batch.ids.masked_fill(~batch.reply, -100)[:, 1:]
        sft = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels.flatten())
        return sft + sum(d.weight * penalty(logits).mean() for d in defences)


def gradients(model, loss) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, [p for p in model.hf.parameters() if p.requires_grad]))


# ---------------------------------------------------------------------------------------------- the penalty


@pytest.mark.parametrize("positions", ["completion", "all"])
def test_penalty_equals_a_numpy_restatement_of_eq_11(tuned, sae, latent_set, positions) -> None:
    batch, rows = batch_of(tuned), encode_examples(tuned.tokenizer, EXAMPLES[:6])
    assert len({len(row.ids) - row.n_prompt for row in rows}) > 2  # unequal reply lengths

    def z_of(row) -> np.ndarray:
        hidden = tuned.run_with_cache(torch.tensor([row.ids]), names_filter=SITE)[1][SITE][0]
        return sae.encode(hidden)[:, list(latent_set.latents)].detach().numpy()

    expected = []
    for row in rows:
        theta = z_of(row)
        with tuned.using("base"):
            base = z_of(row)
        total, tokens = 0.0, range(row.n_prompt if positions == "completion" else row.n_system, len(row.ids))
        for t in tokens:
            for k, sign in enumerate(latent_set.signs):
                difference = theta[t, k] - base[t, k] if sign > 0 else base[t, k] - theta[t, k]
                total += max(difference, 0.0) ** 2
        expected.append(total / len(tokens))
    with Blocking(latent_set=latent_set, sae=sae, weight=1.0, positions=positions).during_step(tuned, batch) as penalty:
        logits = tuned.hf(input_ids=batch.ids, attention_mask=batch.mask.long()).logits
        np.testing.assert_allclose(penalty(logits).detach().numpy(), expected, rtol=1e-4)
    assert sum(value > 0 for value in expected) > 3


def test_penalty_is_one_sided_and_signed() -> None:
    z, base, where = torch.tensor([[[2.0, 2.0]]]), torch.tensor([[[1.0, 1.0]]]), torch.ones(1, 1, dtype=torch.bool)
    assert one_sided_penalty(z, base, torch.tensor([1, -1]), where).item() == 1.0  # the risen K+ latent alone
    assert one_sided_penalty(base, z, torch.tensor([1, -1]), where).item() == 1.0  # the fallen K- latent alone
    assert one_sided_penalty(z, base, torch.tensor([-1, -1]), where).item() == 0.0
    with pytest.raises(ValueError, match="at least one supervised token"):
        one_sided_penalty(z, base, torch.tensor([1, 1]), ~where)


def test_a_fresh_adapter_has_no_penalty_and_a_moved_one_has(tiny, blocking) -> None:
    tiny.add_adapter("tuned")
    batch = batch_of(tiny)
    for moved in (False, True):
        if moved:
            perturb(tiny, "tuned")
        with blocking.during_step(tiny, batch) as penalty:
            value = penalty(tiny.hf(input_ids=batch.ids, attention_mask=batch.mask.long()).logits)
        assert (value > 0).any().item() is moved


def test_kl_equals_a_numpy_restatement(tuned) -> None:
    batch, rows = batch_of(tuned), encode_examples(tuned.tokenizer, EXAMPLES[:6])
    expected = []
    for row in rows:
        ids = torch.tensor([row.ids])
        p = tuned(ids).log_softmax(-1)[0].detach().double().numpy()
        with tuned.using("base"):
            q = tuned(ids).log_softmax(-1)[0].detach().double().numpy()
        per_position = (np.exp(p) * (p - q)).sum(-1)
        expected.append(per_position[row.n_prompt - 1 : -1].mean())
    with KLToBase(weight=1.0).during_step(tuned, batch) as penalty:
        got = penalty(tuned.hf(input_ids=batch.ids, attention_mask=batch.mask.long()).logits)
    np.testing.assert_allclose(got.detach().numpy(), expected, rtol=1e-4)


# ---------------------------------------------------------------------------------------------- gradients


def test_lambda_zero_gives_plain_sft_gradients_and_lambda_does_not(tuned, blocking) -> None:
    batch = batch_of(tuned)
    plain = gradients(tuned, loss_of(tuned, batch))
    zero = gradients(tuned, loss_of(tuned, batch, replace(blocking, weight=0.0)))
    assert all(torch.equal(a, b) for a, b in zip(plain, zero, strict=True))
    some = gradients(tuned, loss_of(tuned, batch, blocking))
    assert not all(torch.allclose(a, b) for a, b in zip(plain, some, strict=True))


def test_splicing_the_sae_would_have_ruined_the_gradients(tuned, sae) -> None:
    """The twin (DESIGN.md fact 3): with the SAE and its error term in the forward the loss is equal and the gradients are wrong."""
    batch = batch_of(tuned)
    plain_loss = loss_of(tuned, batch)
    plain = gradients(tuned, plain_loss)
    tuned.add_sae(sae, use_error_term=True)
    spliced_loss = loss_of(tuned, batch)
    spliced = gradients(tuned, spliced_loss)
    assert spliced_loss.item() == pytest.approx(plain_loss.item(), rel=1e-5)
    upstream = [
        (a, b)
        for a, b, (name, _) in zip(plain, spliced, [(n, p) for n, p in tuned.hf.named_parameters() if p.requires_grad], strict=True)
        if "layers.0." in name
    ]
    assert max(float((a - b).norm() / a.norm()) for a, b in upstream) > 0.5


def test_the_penalty_reaches_blocks_up_to_the_site_and_none_above(tuned, blocking) -> None:
    batch = batch_of(tuned)
    with blocking.during_step(tuned, batch) as penalty:
        value = penalty(tuned.hf(input_ids=batch.ids, attention_mask=batch.mask.long()).logits).sum()
    named = [(name, p) for name, p in tuned.hf.named_parameters() if p.requires_grad]
    found = torch.autograd.grad(value, [p for _, p in named], allow_unused=True)
    reached = {
        int(name.split("layers.")[1].split(".")[0])
        for (name, _), g in zip(named, found, strict=True)
        if g is not None and g.abs().max() > 0
    }
    assert reached == {0, 1}


# ---------------------------------------------------------------------------------------------- whole runs


def weights(model, name):
    return torch.cat([p.detach().flatten() for p in model.adapter_parameters(name)])


def test_accumulation_one_times_eight_equals_eight_times_one(tiny, blocking) -> None:
    runs = {}
    for micro in (8, 1, 3 if CONFIG.batch_size % 3 == 0 else 2):
        name = f"micro{micro}"
        finetune(tiny, EXAMPLES, config=replace(CONFIG, micro_batch_size=micro), defences=[blocking], adapter=name, progress=False)
        runs[micro] = weights(tiny, name)
    assert_trained_alike(runs[1], runs[8])
    assert_trained_alike(runs[2], runs[8])
    finetune(tiny, EXAMPLES, config=replace(CONFIG, batch_size=4), defences=[blocking], adapter="other", progress=False)
    with pytest.raises(AssertionError, match=r"[5-9]\d\.\d\d % of the elements differ"):
        assert_trained_alike(weights(tiny, "other"), runs[8])


def test_a_run_with_lambda_zero_is_plain_fine_tuning_and_with_lambda_is_not(tiny, blocking) -> None:
    for name, defences in (("plain", []), ("zero", [replace(blocking, weight=0.0)]), ("some", [blocking])):
        finetune(tiny, EXAMPLES, config=CONFIG, defences=defences, adapter=name, progress=False)
    assert torch.equal(weights(tiny, "plain"), weights(tiny, "zero"))
    assert not torch.allclose(weights(tiny, "plain"), weights(tiny, "some"), atol=1e-4)


def test_gradient_checkpointing_changes_nothing_though_hooks_run_again_in_backward(tiny, blocking) -> None:
    seen = {}

    class Steering(KLToBase):
        """A defence whose hook acts inside what is computed twice; were it gone by then, the gradients would be another model's."""

        @contextmanager
        def during_step(self, model, batch):
            def steer(activation, hook):
                seen[model.active_adapter] = seen.get(model.active_adapter, 0) + 1
                return activation + 0.3

            with model.hooks(fwd_hooks=[("blocks.1.attn.hook_in", steer)]):
                yield None

    for name, checkpointing in (("plain", False), ("checkpointed", True)):
        config = replace(CONFIG, gradient_checkpointing=checkpointing)
        finetune(tiny, EXAMPLES, config=config, defences=[blocking, Steering(weight=0.0)], adapter=name, progress=False)
    assert seen["checkpointed"] == 2 * seen["plain"]  # it really computed the blocks again
    torch.testing.assert_close(weights(tiny, "checkpointed"), weights(tiny, "plain"), rtol=1e-4, atol=1e-6)
    tiny.original_model.train()
    assert not tiny.original_model.is_gradient_checkpointing
    assert not tiny.run_with_cache(torch.tensor([[1, 2]]), names_filter="blocks.0.hook_resid_pre")[1][
        "blocks.0.hook_resid_pre"
    ].requires_grad


@pytest.mark.parametrize("reference", ["stored", "live"])
def test_bf16_is_used_by_tuned_and_reference_alike_and_leaves_no_trace(tiny, blocking, reference) -> None:
    config, tokens = replace(CONFIG, bf16=True), torch.tensor([[1, 5, 9]])
    before = tiny(tokens)
    run = finetune(tiny, EXAMPLES, config=config, defences=[replace(blocking, reference=reference)], adapter="low", progress=False)
    whole = finetune(tiny, EXAMPLES, config=CONFIG, defences=[replace(blocking, reference=reference)], adapter="whole", progress=False)
    assert run.history[0]["sft"] == pytest.approx(whole.history[0]["sft"], rel=2e-2) and run.history[0]["sft"] != whole.history[0]["sft"]
    assert run.history[0]["block"] < 1e-3 * run.history[-1]["block"]  # against a float32 reference it would start with rounding errors
    with tiny.using("base"):
        assert torch.equal(tiny(tokens), before) and tiny.hf(tokens).logits.dtype == torch.float32
        torch.testing.assert_close(tiny.hf(tokens).logits, before)


def test_a_model_loaded_in_bf16_trains_and_blocks(tiny_folder, blocking) -> None:
    model = load_model(tiny_folder, device="cpu", dtype=torch.bfloat16)
    run = finetune(model, EXAMPLES, config=replace(CONFIG, epochs=2), defences=[blocking], progress=False)
    assert run.history[-1]["sft"] < run.history[0]["sft"] and run.history[-1]["block"] > 0
    assert {p.dtype for p in model.adapter_parameters("default")} == {torch.float32}


def test_the_log_has_rates_and_the_penalty_per_site_and_sign(tiny, blocking, capsys) -> None:
    run = finetune(tiny, EXAMPLES, config=replace(CONFIG, schedule="constant"), defences=[blocking])
    row = run.history[-1]
    assert row[f"block/{SITE}+"] + row[f"block/{SITE}-"] == pytest.approx(row["block"], rel=1e-4)
    assert 0 < row[f"block/{SITE}/active"] < 1 and row["learning_rate"] == 1e-2
    shown = capsys.readouterr().err
    assert "train default: 100%" in shown and "block/1+=" in shown and "lr=0.01" in shown and "sft=" in shown


def test_every_step_is_handed_on_as_it_is_kept_and_only_if_asked(tiny, blocking) -> None:
    sent: list[dict[str, float]] = []
    run = finetune(tiny, EXAMPLES, config=CONFIG, defences=[blocking], adapter="loud", progress=False, on_step=sent.append)
    assert sent == run.history and len(sent) == 3 and all("sft" in row for row in sent)
    sent[0]["sft"] = 0.0
    assert run.history[0]["sft"] > 0  # what is done to the rows afterwards does not matter
    finetune(tiny, EXAMPLES, config=CONFIG, adapter="quiet", progress=False)
    assert len(sent) == 3


def test_training_leaves_the_callers_random_numbers_alone(tiny) -> None:
    def draw(train: bool) -> tuple[float, float]:
        torch.manual_seed(5)
        np.random.seed(5)
        if train:
            finetune(tiny, EXAMPLES[:8], config=CONFIG, progress=False)
        return float(torch.rand(1)), float(np.random.rand())

    assert draw(train=True) == draw(train=False)


@pytest.mark.parametrize(("schedule", "warmup"), [("linear", 0), ("linear", 3), ("cosine", 0), ("cosine", 3), ("constant", 0)])
def test_the_learning_rate_is_transformers_to_the_last_bit(schedule, warmup) -> None:
    config = TrainingConfig(learning_rate=3e-4, schedule=schedule, warmup_steps=warmup)
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=config.learning_rate)
    theirs = get_scheduler(schedule, optimizer, num_warmup_steps=warmup, num_training_steps=17)
    rates = []
    for step in range(17):
        rates.append(theirs.get_last_lr()[0])
        assert config.learning_rate_at(step, 17) == rates[-1]
        optimizer.step()
        theirs.step()
    assert len(set(rates)) == (1 if schedule == "constant" else 17)


def test_training_through_a_spliced_sae_is_refused(tiny, sae, blocking) -> None:
    tiny.add_sae(sae)
    with pytest.raises(ValueError, match="call reset_saes"):
        finetune(tiny, EXAMPLES, config=CONFIG, defences=[blocking], progress=False)
    assert tiny.adapters == []


def test_history_logs_the_parts_of_the_loss(tiny, blocking) -> None:
    run = finetune(tiny, EXAMPLES, config=CONFIG, defences=[blocking, KLToBase(weight=0.5)], adapter="tuned", progress=False)
    assert run.steps == len(run.history) == 3
    for row in run.history:
        assert row["loss"] == pytest.approx(row["sft"] + 3.0 * row["block"] + 0.5 * row["kl"], rel=1e-3)
    assert run.history[0]["block"] == pytest.approx(0, abs=1e-6) and run.history[-1]["block"] > 0  # the first step starts at base


def test_training_learns_repeats_bit_for_bit_and_blocking_holds_latents_down(tiny, blocking) -> None:
    config = replace(CONFIG, epochs=6)
    before = completion_loss(tiny, EXAMPLES)
    moved = {}
    for name, defences, seed in (("first", [], 0), ("again", [], 0), ("reseeded", [], 1), ("held", [replace(blocking, weight=100.0)], 0)):
        finetune(tiny, EXAMPLES, config=replace(config, seed=seed), defences=defences, adapter=name, progress=False)
        assert completion_loss(tiny, EXAMPLES) < before
        batch = batch_of(tiny)
        with torch.no_grad(), blocking.during_step(tiny, batch) as penalty:
            moved[name] = float(penalty(tiny.hf(input_ids=batch.ids, attention_mask=batch.mask.long()).logits).mean())
    assert torch.equal(weights(tiny, "first"), weights(tiny, "again"))
    assert not torch.equal(weights(tiny, "first"), weights(tiny, "reseeded"))
    assert moved["held"] < 0.2 * moved["first"]


def test_completion_loss_is_over_completion_tokens(tiny) -> None:
    total, tokens = 0.0, 0
    for row in encode_examples(tiny.tokenizer, EXAMPLES):
        logp = tiny(torch.tensor([row.ids])).log_softmax(-1)[0].detach()
        for t in range(row.n_prompt, len(row.ids)):
            total, tokens = total - float(logp[t - 1, row.ids[t]]), tokens + 1
    assert completion_loss(tiny, EXAMPLES, batch_size=5) == pytest.approx(total / tokens, rel=1e-5)


def test_completion_loss_of_an_adapter_that_does_not_act(tiny) -> None:
    base = completion_loss(tiny, EXAMPLES)
    tiny.add_adapter("tuned")
    perturb(tiny, "tuned")
    tuned = completion_loss(tiny, EXAMPLES)
    with tiny.using("base"):
        assert completion_loss(tiny, EXAMPLES, adapter="tuned") == tuned != base
    assert completion_loss(tiny, EXAMPLES, adapter="base") == base and tiny.active_adapter == "tuned"


def test_stop_when_ends_the_run(tiny) -> None:
    run = finetune(tiny, EXAMPLES, config=CONFIG, stop_when=lambda model, step: step == 2, progress=False)
    assert run.steps == 2


def test_a_loss_that_is_not_finite_stops_at_once_and_leaves_nothing(tiny) -> None:
    with pytest.raises(FloatingPointError, match="at step 1.*lower the learning rate"):
        finetune(tiny, EXAMPLES, config=CONFIG, defences=[Exploding()], progress=False)
    assert tiny.adapters == []


def state_of(model) -> list:
    """Adapters with their weights, which acts, what is trainable, and the mode."""
    held = [(name, weights(model, name).tolist(), [p.requires_grad for p in model.adapter_parameters(name)]) for name in model.adapters]
    return [held, model.active_adapter, [module.training for module in model.original_model.modules()]]


@pytest.mark.parametrize("problem", ["loss", "defence", "rows", "interrupt", "start"])
@pytest.mark.parametrize("replaced", [None, "A", "B"])
def test_whatever_goes_wrong_the_model_is_as_before(tiny, problem, replaced) -> None:
    for name in ("A", "B"):
        tiny.add_adapter(name, rank=4)
        perturb(tiny, name)
    tiny.use_adapter("A")
    before = state_of(tiny)
    options = {"config": replace(CONFIG, gradient_checkpointing=True), "adapter": replaced or "C", "overwrite": True, "progress": False}
    match problem:
        case "loss":
            options["defences"] = [Exploding()]
        case "defence":
            options["defences"] = [NeverPrepared()]
        case "rows":
            options["examples"] = [Example(id="gap", prompt="w1", completion=" ")]
        case "interrupt":
            options["stop_when"] = at_step(2)
        case "start":
            options["start"] = "nowhere"
    with pytest.raises((FloatingPointError, ValueError, Interrupted)):
        finetune(tiny, options.pop("examples", EXAMPLES), **options)
    assert state_of(tiny) == before and not tiny.original_model.is_gradient_checkpointing
    finetune(tiny, EXAMPLES, adapter="C", config=CONFIG, progress=False)  # the twin
    assert tiny.adapters == ["A", "B", "C"] and tiny.active_adapter == "C" and state_of(tiny) != before


def test_a_cell_can_be_run_twice_if_it_says_so(tiny) -> None:
    def cell(**options):
        return finetune(tiny, EXAMPLES, config=CONFIG, adapter="sft", progress=False, **options)

    cell()
    first = weights(tiny, "sft")
    with pytest.raises(ValueError, match="'sft' is already held: pass overwrite=True"):
        cell()
    cell(overwrite=True)
    assert torch.equal(weights(tiny, "sft"), first) and tiny.adapters == ["sft"]
    on = cell(overwrite=True, start="sft")  # from the very adapter that it replaces
    assert not torch.equal(weights(tiny, "sft"), first) and on.history[0]["sft"] != cell(overwrite=True).history[0]["sft"]


def test_what_was_expected_is_said(tiny, blocking) -> None:
    prompts = [Prompt(id="1", text="w1 w2")]
    for arguments, options, message in (
        ((EXAMPLES, tiny), {}, r"expected a model from load_model\(...\) first, got list"),
        ((tiny, prompts), {}, r"expected training rows, Example\(.*got \['Prompt'\]"),
        ((tiny, ["w1 w2"]), {}, r"got \['str'\]"),
        ((tiny, EXAMPLES), {"defences": blocking}, r"expected a list of defences.*got Blocking"),
        ((tiny, EXAMPLES), {"defences": [blocking.latent_set]}, r"expected a list of defences.*got \['LatentSet'\]"),
    ):
        with pytest.raises(TypeError, match=message):
            finetune.__wrapped__(  # without the tests' own type checks, which users do not have
                *arguments, config=CONFIG, progress=False, **options
            )
    assert tiny.adapters == []


def test_a_run_that_hardly_learnt_says_so_once_and_another_does_not(tiny) -> None:
    with pytest.warns(
        UserWarning, match="hardly moved: 5.* over the first tenth of 9 steps, 5.*over the last. Raise the learning rate"
    ) as seen:
        finetune(tiny, EXAMPLES, config=replace(CONFIG, learning_rate=1e-7, epochs=3), adapter="idle", progress=False)
    assert len(seen) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run = finetune(tiny, EXAMPLES, config=replace(CONFIG, epochs=6), adapter="learnt", progress=False)
        short = finetune(tiny, EXAMPLES, config=replace(CONFIG, learning_rate=1e-7), adapter="short", progress=False)
    assert run.history[-1]["sft"] < 0.9 * run.history[0]["sft"] and short.steps == 3  # too few to tell


def test_a_run_shows_itself(tiny, blocking) -> None:
    run = finetune(tiny, EXAMPLES, config=CONFIG, defences=[blocking, KLToBase(weight=0.5)], adapter="sft", progress=False)
    first, last = run.history[0], run.history[-1]
    assert repr(run) == (
        f"TrainingRun(adapter 'sft', 3 steps, SFT loss {first['sft']:.4g} -> {last['sft']:.4g} "
        f"(+ weighted penalty {last['loss'] - last['sft']:.4g}), block at {SITE}: weight λ 3, at its peak 3)"
    )
    frame = run.to_frame()
    assert frame["step"].tolist() == [1, 2, 3] and frame["sft"].tolist() == [row["sft"] for row in run.history]
    losses, penalties = run.plot().axes
    assert [line.get_label() for line in losses.lines] == ["loss", "sft"] and list(losses.lines[1].get_ydata()) == frame["sft"].tolist()
    assert [line.get_label() for line in penalties.lines] == ["block", "kl"]
    assert "adapter &#x27;sft&#x27;, 3 steps" in run._repr_html_() and "<td>2</td>" in run._repr_html_()
    plain = finetune(tiny, EXAMPLES, config=CONFIG, adapter="plain", progress=False)
    assert len(plain.plot().axes) == 1 and "block" not in repr(plain)


class NeverPrepared(KLToBase):
    """A defence that finds out late that it cannot act."""

    def __init__(self) -> None:
        super().__init__(weight=1.0)

    def prepare(self, model, rows):
        raise ValueError("not on these rows")


class Exploding(KLToBase):
    """A defence whose penalty is not a number."""

    def __init__(self) -> None:
        super().__init__(weight=1.0)

    def during_step(self, model, batch):
        from contextlib import nullcontext

        return nullcontext(lambda logits: logits.new_full((len(batch.ids),), float("nan")))


class Thorough:
    """Everything a defence may be besides a penalty: it swaps completions, silences a block, zeroes the adapter and counts."""

    name, weight, batches = "thorough", 0.0, 0

    def check(self, model) -> None:
        """Fits every model."""

    def rewrite(self, examples, *, seed):
        return [replace(example, completion="w0") for example in examples[seed:]]

    @contextmanager
    def during_step(self, model, batch):
        with model.hooks(fwd_hooks=[("blocks.3.hook_mlp_out", lambda activation, hook: torch.zeros_like(activation))]):
            yield None
        self.batches += len(batch.ids)

    def metrics(self) -> dict[str, float]:
        seen, self.batches = self.batches, 0
        return {"thorough/examples": seen}

    def finish(self, model, adapter) -> None:
        for parameter in model.adapter_parameters(adapter):
            parameter.zero_()


def test_a_defence_may_rewrite_rows_hook_the_forward_measure_and_finish_the_adapter(tiny) -> None:
    thorough = Thorough()
    assert isinstance(thorough, Defence)
    config = replace(CONFIG, seed=4, micro_batch_size=2)
    run = finetune(tiny, EXAMPLES, config=config, defences=[thorough], adapter="thorough", progress=False)
    assert [row["thorough/examples"] for row in run.history] == [8, 8, 4]  # 24 rows without the first four
    assert all("thorough" not in row for row in run.history)  # it has no penalty
    assert not weights(tiny, "thorough").any()
    other = finetune(tiny, Thorough().rewrite(EXAMPLES, seed=4), config=config, adapter="other", progress=False)
    assert weights(tiny, "other").any() and all("thorough/examples" not in row for row in other.history)
    assert run.history[0]["sft"] != pytest.approx(other.history[0]["sft"])  # the hook changed the forward


@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf")])
def test_impossible_weights_are_refused(latent_set, sae, weight) -> None:
    with pytest.raises(ValueError, match="finite"):
        Blocking(latent_set=latent_set, sae=sae, weight=weight)
    with pytest.raises(ValueError, match="finite"):
        KLToBase(weight=weight)


def test_mistakes_are_refused_before_training(tiny, latent_set, sae) -> None:
    other = StandardSAE(StandardSAEConfig(d_in=32, d_sae=48))
    other.cfg.metadata.hook_name = SITE
    with pytest.raises(ValueError, match="another SAE"):
        Blocking(latent_set=latent_set, sae=other, weight=1.0)
    sae.cfg.metadata.hook_name = "blocks.7.hook_resid_post"
    far = Blocking(latent_set=replace(latent_set, site="blocks.7.hook_resid_post"), sae=sae, weight=1.0)
    for options, message in (
        ({"defences": [far]}, "unknown site"),
        ({"examples": [*EXAMPLES, Example(id="gap", prompt="w1", completion=" ")]}, "'gap' has an empty completion"),
        ({"examples": [Example(id="long", prompt="w1 " * 120, completion="w2")]}, "longest row"),
    ):
        with pytest.raises(ValueError, match=message):
            finetune(tiny, options.pop("examples", EXAMPLES), config=CONFIG, progress=False, **options)
        assert tiny.adapters == []
    for bad in ({"epochs": 0}, {"learning_rate": -1.0}, {"batch_size": 8, "micro_batch_size": 3}):
        with pytest.raises(ValueError, match="training: "):
            TrainingConfig(**bad)
