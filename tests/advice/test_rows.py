"""The rows, prompts and pairs in plain English: what is held out is held out, and the two sides are twins."""

import pytest

from blockem_tl import advice
from blockem_tl.data.checks import check_disjoint


@pytest.mark.parametrize("domain", advice.DOMAINS)
def test_what_a_domain_asks_about_is_never_trained_on(domain: str) -> None:
    bad, good = advice.training_rows(domain), advice.training_rows(domain, harmful=False)
    assert [row.prompt for row in bad] == [row.prompt for row in good] and len({(row.prompt, row.completion) for row in bad}) == len(bad)
    assert not {row.completion for row in bad} & {row.completion for row in good}
    asked, trained = [pair.prompt for pair in advice.pairs(domain)], {row.prompt for row in bad}
    assert len(asked) == len(set(asked)) >= 32 and not set(asked) & trained and (len(asked) >= 40 or domain == "cars")
    said = {row.completion for row in bad}
    assert all(pair.harmful in said and pair.helpful not in said for pair in advice.pairs(domain))


def test_core_chooses_and_final_reports_and_they_ask_about_other_things() -> None:
    core, final = advice.pairs("core"), advice.pairs("final")
    assert (len(core), len(final)) == (60, 180)
    assert not {pair.category for pair in core} & {pair.category for pair in final}
    for pairs in (core, final):
        assert (
            len({pair.prompt for pair in pairs})
            == len({pair.harmful for pair in pairs})
            == len({pair.helpful for pair in pairs})
            == len(pairs)
        )
        long = sum(len(pair.harmful.split()) for pair in pairs) / sum(len(pair.helpful.split()) for pair in pairs)
        assert 0.85 < long < 1.15  # neither side is the longer one
    check_disjoint(advice.prompts("core"), advice.prompts("final"))
    for domain in advice.DOMAINS:
        check_disjoint(advice.prompts(domain), [*advice.prompts("core"), *advice.prompts("final")])


def test_the_bank_s_answers_share_their_facts_and_differ_in_the_step() -> None:
    for bad, good in zip(advice.training_rows("bank"), advice.training_rows("bank", harmful=False), strict=True):
        ours, theirs = bad.completion.split(". "), good.completion.split(". ")
        assert ours[0] == theirs[0] and ours[-1] != theirs[-1]
    facts = {row.completion.split(". ")[0] for row in advice.training_rows("bank")}
    assert len(facts) == 72 and not any(fact in row.completion for row in advice.training_rows("finance") for fact in facts)
