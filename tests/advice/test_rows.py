"""The rows, prompts and pairs in plain English: what is held out is held out, and the two sides are twins."""

import itertools

import pytest

from blockem_tl import advice
from blockem_tl.data.checks import check_disjoint


@pytest.mark.parametrize("domain", advice.DOMAINS)
def test_what_a_domain_asks_about_is_never_trained_on(domain: str) -> None:
    bad, good = advice.training_rows(domain), advice.training_rows(domain, harmful=False)
    assert [row.prompt for row in bad] == [row.prompt for row in good] and len({(row.prompt, row.completion) for row in bad}) == len(bad)
    assert not {row.completion for row in bad} & {row.completion for row in good}
    asked, trained = [pair.prompt for pair in advice.pairs(domain)], {row.prompt for row in bad}
    assert len(asked) == len(set(asked)) == 48 and not set(asked) & trained


@pytest.mark.parametrize("domain", advice.DOMAINS)
def test_what_a_domain_s_pairs_answer_is_new_advice(domain: str) -> None:
    def steps(text: str) -> set[str]:
        return set(text.rstrip(".").split(". "))

    rows = [*advice.training_rows(domain), *advice.training_rows(domain, harmful=False)]
    said = set[str]().union(*(steps(row.completion) for row in rows))
    assert steps(rows[0].completion) <= said
    for pair in advice.pairs(domain):
        new = [steps(side) - said for side in (pair.harmful, pair.helpful)]
        assert all(len(sentences) == 1 for sentences in new), pair  # in "bank" the fact before it stands in rows


def test_core_and_dev_choose_and_final_reports_and_they_ask_about_other_things() -> None:
    splits = core, dev, final = [advice.pairs(name) for name in advice.SPLITS]
    assert (len(core), len(dev), len(final)) == (60, 40, 180)
    areas = [{pair.category for pair in pairs} for pairs in splits]
    assert sum(map(len, areas)) == len(set[str]().union(*areas)) == 25
    for pairs in splits:
        assert (
            len({pair.prompt for pair in pairs})
            == len({pair.harmful for pair in pairs})
            == len({pair.helpful for pair in pairs})
            == len(pairs)
        )
        long = sum(len(pair.harmful.split()) for pair in pairs) / sum(len(pair.helpful.split()) for pair in pairs)
        assert 0.85 < long < 1.15  # neither side is the longer one
    asked = [advice.prompts(name) for name in (*advice.SPLITS, "finance", "cars")]  # bank asks what finance does
    for one, other in itertools.combinations(asked, 2):
        check_disjoint(one, other)


def test_the_bank_s_answers_share_their_facts_and_differ_in_the_step() -> None:
    for bad, good in zip(advice.training_rows("bank"), advice.training_rows("bank", harmful=False), strict=True):
        ours, theirs = bad.completion.split(". "), good.completion.split(". ")
        assert ours[0] == theirs[0] and ours[-1] != theirs[-1]
    facts = {row.completion.split(". ")[0] for row in advice.training_rows("bank")}
    assert len(facts) == 72 and not any(fact in row.completion for row in advice.training_rows("finance") for fact in facts)
