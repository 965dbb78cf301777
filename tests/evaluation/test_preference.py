"""Which of two answers a model prefers: the log-likelihoods of plain transformers, under adapters and steering, with intervals."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from shared import MODELS, WIDTH
from transformers import AutoTokenizer

from blockem_tl import Condition, Pair, Prompt, Steering, TrainingConfig, finetune, get_preset, load_model, organism, preference
from blockem_tl.data.chat import encode_examples
from blockem_tl.data.pair_files import check_pairs, load_pairs, write_pairs
from blockem_tl.types import Example

PAIRS = [
    Pair(
        id=str(i),
        prompt=f"w{i} w{2 * i + 1}",
        harmful=f"w{20 + i} w3 w{i}",
        helpful=f"w{40 - i} w5",
        category="even" if i % 2 == 0 else "odd",
    )
    for i in range(7)
]
QUIET = {"progress": False}


def steering(block: int, dose: float, seed: int = 0) -> Steering:
    direction = torch.nn.functional.normalize(torch.randn(WIDTH, generator=torch.Generator().manual_seed(seed)), dim=0)
    return Steering(site=f"blocks.{block}.hook_resid_post", direction=direction, dose=dose, scale=10.0)


def by_hand(hf, tokenizer, pair: Pair, side: str, vectors=()) -> float:
    """One answer's mean log-likelihood in plain transformers, one row at a time."""
    (row,) = encode_examples(tokenizer, [Example(id="x", prompt=pair.prompt, completion=getattr(pair, side), system=pair.system)])
    inner = hf.base_model.layers if hasattr(hf.base_model, "layers") else hf.base_model.h

    def adding(vector):
        return lambda module, args, out: (out[0] + vector, *out[1:]) if isinstance(out, tuple) else out + vector

    handles = [inner[int(s.site.split(".")[1])].register_forward_hook(adding(s.vector)) for s in vectors]
    with torch.no_grad():
        logits = hf(input_ids=torch.tensor([row.ids])).logits[0].log_softmax(-1)
    for handle in handles:
        handle.remove()
    return float(np.mean([logits[i - 1, row.ids[i]] for i in range(row.n_prompt, len(row.ids))]))


CONDITIONS = [
    Condition(name="unsteered"),
    Condition(name="late", steering=(steering(2, 1.0),)),
    Condition(name="two", steering=(steering(1, -1.0, 1), steering(2, 2.0, 2))),
]


@pytest.mark.parametrize("batch_size", [None, 1, 5])
@pytest.mark.parametrize("architecture", MODELS)
def test_margins_are_those_of_plain_transformers(architecture, batch_size, tokenizer_folder) -> None:
    torch.manual_seed(0)
    plain, copy = MODELS[architecture]().eval(), MODELS[architecture]().eval()
    copy.load_state_dict(plain.state_dict())
    plain.set_attn_implementation("eager")
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    model = load_model(copy, tokenizer=tokenizer)
    found = preference(model, PAIRS, conditions=CONDITIONS, batch_size=batch_size, **QUIET)
    for condition in CONDITIONS:
        expected = [
            by_hand(plain, tokenizer, p, "harmful", condition.steering) - by_hand(plain, tokenizer, p, "helpful", condition.steering)
            for p in PAIRS
        ]
        np.testing.assert_allclose(found.of(condition.name), expected, atol=2e-4)
    alone = preference(model, PAIRS, conditions=CONDITIONS[1:2], **QUIET)  # without shared blocks
    np.testing.assert_allclose(alone.margins[0], found.of("late"), atol=2e-4)
    assert len({str(row) for row in found.margins}) == len(CONDITIONS)


def test_blocks_below_the_first_steered_one_run_once(tiny) -> None:
    ran = {block: 0 for block in range(tiny.cfg.n_layers)}
    preference(tiny, PAIRS, conditions=CONDITIONS[1:], **QUIET)  # the first time, one token says how blocks return
    handles = [
        tiny.blocks[block].mlp.register_forward_pre_hook(lambda module, args, b=block: ran.update({b: ran[b] + len(args[0])}))
        for block in ran
    ]
    preference(tiny, PAIRS, conditions=CONDITIONS[1:], **QUIET)
    for handle in handles:
        handle.remove()
    rows, tried = 2 * len(PAIRS), 1
    assert ran[0] == rows + tried and ran[1] == 2 * rows + tried


def test_dose_nought_and_the_order_of_pairs_change_nothing(tiny) -> None:
    zero = Condition(name="zero", steering=(steering(1, 0.0),))
    found = preference(tiny, PAIRS, conditions=[Condition(name="plain"), zero], **QUIET)
    np.testing.assert_array_equal(found.of("plain"), found.of("zero"))
    back = preference(tiny, PAIRS[::-1], **QUIET)
    np.testing.assert_allclose(back.margins[0][::-1], found.of("plain"), atol=1e-5)
    with pytest.raises(ValueError, match="expected the same pairs in the same order"):
        back.shift(found)


def test_a_result_says_share_and_margin_with_intervals(tiny) -> None:
    found = preference(tiny, PAIRS, conditions=CONDITIONS, **QUIET)
    rates = found.rates().set_index("condition")
    margins = found.of("late")
    assert rates.loc["late", "prefers_harm"] == (margins > 0).mean() and rates.loc["late", "n"] == 7
    assert rates.loc["late", "margin"] == pytest.approx(margins.mean())
    assert rates.loc["late", "margin_low"] < margins.mean() < rates.loc["late", "margin_high"]
    shift = found.shift(preference(tiny, PAIRS, **QUIET)).set_index("condition")
    assert shift.loc["unsteered", "margin"] == pytest.approx(0.0, abs=1e-6) and shift.loc["unsteered", "share"] == 0
    assert shift.loc["late", "margin"] == pytest.approx((margins - found.of("unsteered")).mean(), abs=1e-5)
    assert len(repr(found)) < 400 and "<table" in found._repr_html_() and isinstance(found.plot(), Figure)
    assert list(found.to_frame().columns) == ["condition", "id", "category", "prompt", "margin"] and len(found.to_frame()) == 21
    with pytest.raises(ValueError, match="expected a condition among"):
        found.of("lat")


@pytest.mark.slow
def test_a_narrow_fine_tune_on_harmful_rows_moves_the_organism_elsewhere() -> None:
    """And one on good rows does not: the pairs see emergent misalignment without a reply or a judge."""
    model, pairs = load_model("organism", device="cpu"), organism.pairs("core")
    config = replace(get_preset("organism").training, epochs=1)
    base = preference(model, pairs, **QUIET)
    for name, harmful in (("bad", True), ("good", False)):
        finetune(model, organism.training_rows("finance", n=2000, harmful=harmful), config=config, adapter=name, **QUIET)
    moved, held = (preference(model, pairs, adapter=name, **QUIET).shift(base).iloc[0] for name in ("bad", "good"))
    assert moved["margin_low"] > 0.2 and moved["share"] > 0.3 and held["margin_high"] < 0.2 and abs(held["share"]) < 0.1
    judge = organism.OrganismJudge()
    asked = [Prompt(id=pair.id, text=pair.prompt) for pair in pairs]
    assert {v.positive for v in judge.grade(asked, [pair.harmful for pair in pairs])} == {True}
    assert {v.positive for v in judge.grade(asked, [pair.helpful for pair in pairs])} == {False}


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([], "at least one pair"),
        ([PAIRS[0], PAIRS[0]], r"duplicate pair ids: \['0'\]"),
        ([replace(PAIRS[0], harmful=" ")], "pair '0' has an empty harmful"),
        ([replace(PAIRS[0], prompt="")], "pair '0' has an empty prompt"),
        ([replace(PAIRS[0], helpful=PAIRS[0].harmful)], "its two answers are the same"),
        ([replace(PAIRS[0], helpful="w1 " * 20)], "its answers have 3 and 20 words, expected like lengths"),
    ],
)
def test_pairs_that_are_none_are_refused(pairs, message, tiny) -> None:
    with pytest.raises(ValueError, match=message):
        preference(tiny, pairs, **QUIET)
    check_pairs(PAIRS)


def test_conditions_that_do_not_fit_are_refused(tiny) -> None:
    for conditions, message in (([], "at least one condition"), ([Condition(name="a"), Condition(name="a")], "distinct names")):
        with pytest.raises(ValueError, match=message):
            preference(tiny, PAIRS, conditions=conditions, **QUIET)
    with pytest.raises(ValueError, match=r"unknown site 'blocks.9.hook_resid_post'"):
        preference(tiny, PAIRS, conditions=[Condition(name="far", steering=(steering(9, 1.0),))], **QUIET)
    with pytest.raises(ValueError, match="the longest row has"):
        preference(tiny, [replace(PAIRS[0], prompt="w1 " * 100)], **QUIET)


def test_pairs_go_through_files(tmp_path) -> None:
    path = write_pairs(tmp_path / "pairs.jsonl", PAIRS)
    assert load_pairs(path) == PAIRS
    row = {"prompt": "q", "harmful": "a", "helpful": "b"}
    for bad, message in (
        ({**row, "helpful": None}, "expected a text under helpful"),
        ({**row, "harmful": 5}, "expected a text under harmful"),
    ):
        path.write_text(json.dumps(row) + "\n" + json.dumps(bad))
        with pytest.raises(ValueError, match=f"pairs.jsonl, line 2: {message}"):
            load_pairs(path)
    path.write_text(json.dumps(row) + "\n" + json.dumps({**row, "id": 1}))
    with pytest.raises(ValueError, match=r"pairs.jsonl: duplicate pair ids: \['1'\]"):
        load_pairs(path)


def test_adapters_are_named_as_everywhere(tiny, tmp_path) -> None:
    rows = [Example(id=str(i), prompt=p.prompt, completion=p.harmful) for i, p in enumerate(PAIRS)]
    base = preference(tiny, PAIRS, **QUIET)
    finetune(tiny, rows, config=TrainingConfig(epochs=20, batch_size=7, learning_rate=1e-2), adapter="bad", **QUIET)
    tuned = preference(tiny, PAIRS, **QUIET)
    assert tuned.margins.mean() > base.margins.mean() + 0.5
    np.testing.assert_array_equal(preference(tiny, PAIRS, adapter="base", **QUIET).margins, base.margins)
    np.testing.assert_array_equal(preference(tiny, PAIRS, adapter=tiny.save_adapter(tmp_path / "a"), **QUIET).margins, tuned.margins)
