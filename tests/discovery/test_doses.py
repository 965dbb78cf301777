"""Dose calibration help: the table against a restatement, the proposal against a made-up model that breaks at known doses."""

import warnings

import pytest
import torch
from sae_lens import SAE, StandardSAE, StandardSAEConfig

from blockem_tl import Prompt, Verdict, cli
from blockem_tl.discovery.config import MaxIncoherence
from blockem_tl.discovery.doses import doses_from
from blockem_tl.evaluation.statistics import Rate
from blockem_tl.types import Generation
from blockem_tl.views import plots

CORE = [Prompt(id=f"c{i}", text=f"w{i} w1") for i in range(30)]
FINAL = [Prompt(id=f"f{i}", text=f"w{i} w2") for i in range(5)]
DOSES = (0.2, 0.5, 0.4, 0.3)


@pytest.fixture
def sae() -> SAE:
    torch.manual_seed(0)
    sae = StandardSAE(StandardSAEConfig(d_in=8, d_sae=20))
    sae.W_dec.data.normal_()
    sae.cfg.metadata.hook_name = "blocks.1.hook_resid_post"
    return sae


class World:
    """Speakers whose reply is incoherent where |dose| is above what its latent bears (0.1 per latent index), and on a share of prompts."""

    name = "world"

    def __init__(self, unsteered: int = 0, tuned_less: float = 0.0) -> None:
        self.unsteered, self.tuned_less, self.prompts = unsteered, tuned_less, set()

    def reply_fn(self, less: float):
        def reply(prompts, conditions):
            self.prompts |= {p.id for p in prompts}
            replies = []
            for c in conditions:
                for i, p in enumerate(prompts):
                    broken = i < self.unsteered
                    if c.steering:
                        broken |= abs(c.steering[0].dose) > 0.1 * int(c.name.split()[1]) - less + 1e-9
                    replies.append(Generation(prompt=p, condition=c.name, reply="x" if broken else "w", reply_ids=(), truncated=False))
            return replies

        return reply

    def grade(self, prompts, replies, *, rubric: str = "misalignment") -> list[Verdict]:
        return [Verdict(label="INCOHERENT" if reply == "x" else "1") for reply in replies]

    def propose(self, sae, **options):
        return doses_from(
            self.reply_fn(0.0), self.reply_fn(self.tuned_less), sae, self, options.pop("prompts", CORE),
            scale=1.0, reporting=FINAL, **{"latents": [2, 3, 4, 5], "doses": DOSES, **options},
        )  # fmt: skip


def test_the_proposal_is_the_largest_dose_that_most_directions_bear(sae) -> None:
    found = World(tuned_less=0.1).propose(sae)
    assert (found.induce_dose, found.repair_dose) == (0.4, 0.3)  # half of the latents bear 0.4, of tuned 0.3
    assert World().propose(sae, min_share=1.0).induce_dose == 0.2
    assert World().propose(sae, min_share=0.25).induce_dose == 0.5
    row = found.frame[(found.frame["arm"] == "base") & (found.frame["dose"] == 0.3)].iloc[0]
    rate = Rate(k=2 * 20, n=4 * 2 * 20)  # one latent of four, both signs, 20 prompts
    assert (row["incoherent"], row["n"], row["within"], row["of"]) == (rate.k, rate.n, 6, 8)
    assert (row["rate"], row["low"], row["high"]) == (rate.value, *rate.interval)
    assert found.frame.groupby("arm")["dose"].apply(list).to_dict() == {arm: [0.0, 0.2, 0.3, 0.4, 0.5] for arm in ("base", "tuned")}


def test_the_relative_budget_counts_from_the_unsteered_rate(sae) -> None:
    world = World(unsteered=5)
    with pytest.raises(
        ValueError, match=r"base is incoherent at the smallest dose already: at 0.2 only 0 of 8.*MaxIncoherence\(relative=True\)"
    ):
        world.propose(sae)
    assert world.propose(sae, max_incoherence=MaxIncoherence(relative=True)).induce_dose == 0.4


def test_a_dose_above_one_that_breaks_is_not_proposed(sae) -> None:
    """Coherence need not be monotone: what lies above a dose that breaks the model is not to be relied on."""

    class Odd(World):
        def grade(self, prompts, replies, *, rubric: str = "misalignment"):
            verdicts = super().grade(prompts, replies)
            n = len(verdicts) // (1 + 8 * len(DOSES))
            for i in range((1 + 8) * n, (1 + 16) * n):  # all of the second-smallest dose
                verdicts[i] = Verdict(label="INCOHERENT")
            return verdicts

    assert World().propose(sae).induce_dose == 0.4 and Odd().propose(sae).induce_dose == 0.2


def test_it_asks_twenty_of_the_core_prompts_and_no_other(sae) -> None:
    world, other = World(), World()
    world.propose(sae)
    other.propose(sae, seed=1)
    assert len(world.prompts) == 20 and world.prompts <= {p.id for p in CORE} and world.prompts != other.prompts
    with pytest.raises(ValueError, match="would leak"):
        World().propose(sae, prompts=[*CORE, FINAL[0]])
    with pytest.raises(ValueError, match="expected at least n_prompts=20 prompts, got 19"):
        World().propose(sae, prompts=CORE[:19])
    assert len(World().propose(sae, prompts=CORE[:19], n_prompts=10).frame) == 10
    with pytest.raises(ValueError, match="distinct positive doses"):
        World().propose(sae, doses=(0.0, 0.1))


def test_without_latents_some_are_drawn(sae) -> None:
    class Robust(World):
        def grade(self, prompts, replies, *, rubric: str = "misalignment"):
            return [Verdict(label="1")] * len(replies)

    found = Robust().propose(sae, latents=None, n_latents=3)
    assert set(found.frame["of"]) == {1, 6} and found.induce_dose == max(DOSES)


def test_given_latents_that_induce_nothing_warn_and_random_ones_do_not(sae) -> None:
    class Harmful(World):
        def grade(self, prompts, replies, *, rubric: str = "misalignment"):
            return [Verdict(label="5" if i >= len(replies) - len(prompts) // 2 else "1") for i in range(len(replies))]

    with pytest.warns(UserWarning, match="propose_doses: none of the 4 given latents made base misaligned at any dose"):
        assert World().propose(sae).frame["misaligned"].sum() == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        World().propose(sae, latents=None, n_latents=3)
        assert Harmful().propose(sae).frame["misaligned"].sum() > 0


def test_figure_shows_both_arms_and_the_proposals(sae, tmp_path) -> None:
    found = World(tuned_less=0.1).propose(sae)
    figure = plots.doses(found.frame, induce_dose=found.induce_dose, repair_dose=found.repair_dose)
    labels = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert sorted(labels) == ["base", "induce at 0.4", "repair at 0.3", "tuned"]
    assert plots.save(figure, tmp_path / "doses.png").stat().st_size > 1000


def test_command_on_the_organism(organism_model, tmp_path, capsys) -> None:
    from shared import perturb

    organism_model.add_adapter("slight", rank=2)
    try:
        perturb(organism_model, "slight", std=0.01)
        folder = organism_model.save_adapter(tmp_path / "slight", "slight")
    finally:
        organism_model.remove_adapter("slight")
    options = ["--latents", "1", "2", "--n-prompts", "4", "--relative", "--max-incoherence", "1", "--figure"]
    cli.main(["doses", "organism", str(folder), *options, str(tmp_path / "d.png")])
    out = " ".join(capsys.readouterr().out.split())
    assert "induce_dose=1.5, repair_dose=1.5" in out and (tmp_path / "d.png").is_file()
    with pytest.raises(SystemExit, match="core-misalignment|brings no judge"):
        cli.main(["doses", "llama-3.1-8b", str(folder)])
