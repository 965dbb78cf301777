"""Every result shows itself: one short line, a table of at most 30 rows, HTML, a data frame, a figure."""

import warnings
from dataclasses import replace

import pandas as pd
import pytest
from matplotlib.figure import Figure

from blockem_tl import (
    Condition,
    LatentSet,
    Prompt,
    Rate,
    Steering,
    Verdict,
    decoder_directions,
    diagnose_rerouting,
    discover,
    evaluate,
    evaluate_with,
    finetune,
    generate,
    get_preset,
    load_model,
    load_sae,
    organism,
    patching_sweep,
    plots,
    propose_doses,
    random_latents,
    reconstruction_quality,
    shift_by_site,
)
from blockem_tl.analysis.patching.attribution import attribute_sites
from blockem_tl.discovery.config import MaxIncoherence
from blockem_tl.training.run import TrainingRun
from blockem_tl.views import tables
from blockem_tl.views.results import Result

QUIET = {"progress": False}
PRESET = get_preset("organism")
SCALE = 74.6
JUDGE = organism.OrganismJudge()
CORE, FINAL = organism.prompts("core")[:12], organism.prompts("final")


class OtherJudge(organism.OrganismJudge):
    """The same verdicts under another name."""

    name = "the other"


@pytest.fixture(scope="module")
def sae():
    return load_sae("organism")


@pytest.fixture(scope="module")
def model():
    model = load_model("organism", device="cpu")
    config = replace(PRESET.training, epochs=1)
    finetune(model, organism.training_rows("finance", n=640), config=config, adapter="plain", **QUIET)
    finetune(model, organism.training_rows("finance", n=320), config=config, adapter="blocked", **QUIET)
    return model


@pytest.fixture(scope="module")
def results(model, sae) -> dict[str, Result]:
    """One of each, most as large as a user's first: 768 replies, 96 of an evaluation, the published latent set."""
    steering = [Steering(site=PRESET.site, direction=d, dose=0.4, scale=SCALE) for d in decoder_directions(sae, range(8))]
    conditions = [Condition(name=f"latent {k}", steering=(one,)) for k, one in enumerate(steering)]
    replies = generate(model, organism.prompts("core"), conditions=conditions, max_new_tokens=12, **QUIET)
    plain, base = (generate(model, CORE, adapter=name, max_new_tokens=8, **QUIET) for name in ("plain", "base"))
    config = replace(PRESET.discovery, n_plus=3, n_minus=3, shortlist_size=2, grid=(0.0, 0.4), n_latents=2, read="prompts")
    found = discover(model, sae, JUDGE, CORE, scale=SCALE, config=config, adapter="plain", **QUIET)
    arms = {"plain": "plain", "blocked": "blocked"}
    limit = MaxIncoherence(rate=0.1, relative=True)
    return {
        "replies": replies,
        "graded": replies.grade(JUDGE),
        "evaluation": evaluate(model, JUDGE, FINAL, adapter="plain", max_new_tokens=12, selected_on=CORE, **QUIET),
        "panel": evaluate_with(model, [JUDGE, OtherJudge()], FINAL[:8], adapter="plain", max_new_tokens=12, selected_on=CORE, **QUIET),
        "discovery": found,
        "latent set": LatentSet.load("organism/finance-20", sae),
        "random": random_latents(sae, 4, seed=0),
        "run": finetune(
            model, organism.training_rows("finance", n=64), config=replace(PRESET.training, epochs=1), adapter="third", **QUIET
        ),
        "sweep": patching_sweep(model, CORE, when=["prompt", "decode"], max_new_tokens=8).grade(JUDGE),
        "doses": propose_doses(model, sae, JUDGE, CORE, reporting=FINAL, scale=SCALE, max_new_tokens=8, max_incoherence=limit, n_prompts=4),
        "reconstruction": reconstruction_quality(model, sae, CORE, adapters=["base", "plain"]),
        "rerouting": diagnose_rerouting(model, sae, found.latent_set, plain, **arms),
        "shifts": shift_by_site(model, plain, **arms),
        "attribution": attribute_sites(model, plain, base, [PRESET.site, "blocks.1.hook_mlp_out"], **QUIET),
    }


def test_a_result_shows_itself(results: dict[str, Result]) -> None:
    for name, result in results.items():
        line = repr(result)
        assert "\n" not in line and type(result).__name__ in line and 20 < len(line) <= 400, name
        assert len(str(result).splitlines()) <= 30 + 7, name  # the line, the table's frame, what was left out
        assert "<table" in result._repr_html_() and result._repr_html_().count("<tr") <= 31, name
        frame = result.to_frame()
        assert isinstance(frame, pd.DataFrame) and len(frame), name
        assert name == "replies" or isinstance(result.plot(), Figure), name
    assert len(repr(list(results["replies"]))) > 100_000  # a plain list of the same replies
    assert "5.2 %" in repr(Rate(k=5, n=96)) and "[" in repr(Rate(k=5, n=96))


def test_what_is_shown_is_what_was_found(results: dict[str, Result]) -> None:
    graded = results["graded"]
    rates = graded.rates(by="condition").set_index("condition")
    one = graded.where(condition="latent 3")
    assert len(one) == 96 and rates.loc["latent 3", "n"] == 96
    assert rates.loc["latent 3", "misaligned"] == sum(v.positive for v in one.verdicts) / 96
    assert list(graded[:96]) == list(graded.where(condition="latent 0")) and graded[5] is graded.generations[5]
    assert "see rates()" in repr(graded) and str(Rate(k=sum(v.positive for v in one.verdicts), n=96)) in repr(one)
    with pytest.raises(ValueError, match="expected columns among"):
        graded.where(latent=3)
    with pytest.raises(ValueError, match="call replies.grade"):
        results["replies"].rates()
    with pytest.raises(ValueError, match="call replies.grade"):
        results["replies"].plot()


def test_a_sweep_of_decoding_draws_a_point_per_site(results: dict[str, Result]) -> None:
    figure = results["sweep"].plot()
    labels = figure.axes[0].get_legend_handles_labels()[1]
    assert {"prompt patching, hook_resid_post", "decode patching, hook_resid_post"} <= set(labels)
    lines = [line for line in figure.axes[0].lines if len(line.get_xdata()) == 5]
    assert len(lines) >= 2  # five blocks each


def test_evaluate_takes_a_model_and_says_which_weights_acted(model) -> None:
    plain, base = (evaluate(model, JUDGE, FINAL, adapter=name, max_new_tokens=12, **QUIET) for name in ("plain", "base"))
    with model.using("base"):
        as_it_stands = evaluate(model, JUDGE, FINAL, max_new_tokens=12, **QUIET)
    assert base.generations == as_it_stands.generations != plain.generations
    with pytest.raises(ValueError, match="unknown adapter 'plane'"):
        evaluate(model, JUDGE, FINAL, adapter="plane", max_new_tokens=12, **QUIET)


def test_a_string_where_prompts_belong_is_refused_with_what_to_write(model) -> None:
    for call in (
        lambda: generate(model, "How are you?"),
        lambda: evaluate(model, JUDGE, ["How are you?"]),
        lambda: patching_sweep(model, "x"),
    ):
        with pytest.raises(TypeError, match="Prompt"):
            call()
    with pytest.raises(TypeError, match="Steering"):
        Condition(
            name="bare",
            steering=Steering(site=PRESET.site, direction=decoder_directions(load_sae("organism"), [0])[0], dose=1.0, scale=1.0),
        )
    assert generate(model, [Prompt(id="a", text=CORE[0].text)], max_new_tokens=2, **QUIET)[0].prompt.id == "a"


def test_a_sweep_of_decoding_alone_stands_beside_the_unpatched_replies(model) -> None:
    found = patching_sweep(model, CORE, [PRESET.site], when="decode", max_new_tokens=4, **QUIET)
    assert found.to_frame().groupby("patched").size().to_dict() == {"decode": 12, "unpatched": 12}


def test_a_figure_is_written_in_the_format_of_its_name(results, tmp_path) -> None:
    figure = results["sweep"].plot()
    assert plots.save(figure, tmp_path / "x.pdf").read_bytes()[:4] == b"%PDF"
    assert plots.save(figure, tmp_path / "x.png").read_bytes()[1:4] == b"PNG"


def test_a_figure_shows_itself_though_nobody_imported_pyplot(results) -> None:
    figure = results["sweep"].plot()
    assert figure._repr_png_()[1:4] == b"PNG" and not hasattr(Figure(), "_repr_png_")  # matplotlib's own shows its name and size


def test_a_plot_is_along_one_column(results) -> None:
    with pytest.raises(TypeError, match=r"one column to draw along.*rates\(by="):
        type(results["graded"]).plot.__wrapped__(results["graded"], ["condition"])  # without the tests' own type checks
    assert isinstance(results["graded"].plot("condition"), Figure)
    assert [results["graded"].plot(by).axes[0].get_xlabel() for by in ("category", "condition")] == ["category", ""]


def test_a_frame_of_another_kind_is_refused_by_what_it_lacks(results) -> None:
    with pytest.raises(ValueError, match=r"expected the columns \['patched', 'site', 'em', .*replies\.plot"):
        plots.patching(results["graded"].rates())


# ------------------------------------------------------------------------------------------------ in a terminal


@pytest.mark.parametrize("columns", [60, 100, 200])
def test_a_table_is_as_wide_as_the_terminal_and_its_labels_are_whole(results, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    for name, result in results.items():
        assert max(map(len, str(result).splitlines()[1:])) <= columns, name
    shown = str(results["evaluation"])
    labels = {line.split("│")[1].strip() for line in shown.splitlines() if line.startswith("│")}
    assert labels and labels <= set(results["evaluation"].to_frame()["label"])
    assert "and 86 more rows" in shown and "plain" not in shown.splitlines()[2]  # columns with one value are left out


def test_columns_that_do_not_fit_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    frame = pd.DataFrame([{f"column_{i}": "x" * 30 for i in range(8)}])
    monkeypatch.setenv("COLUMNS", "80")
    assert "... and the columns column_4, column_5, column_6, column_7: see to_frame()" in tables.text(frame)
    monkeypatch.setenv("COLUMNS", "400")
    assert "see to_frame" not in tables.text(frame) and "x" * 30 in tables.text(frame)


def test_rates_show_themselves_whole_and_are_a_data_frame(results) -> None:
    rates = results["graded"].rates()
    assert isinstance(rates, pd.DataFrame) and type(rates[["n"]]) is pd.DataFrame
    first = rates.iloc[0]
    cell = f"{first['misaligned']:.2f} [{first['misaligned_low']:.2f}, {first['misaligned_high']:.2f}]"
    assert cell in str(rates) and cell in rates._repr_html_() and "unparsed" in str(rates)
    assert cell not in str(pd.DataFrame(rates)) and "..." in str(pd.DataFrame(rates))  # what pandas shows instead


def test_graded_replies_of_several_groups_show_rates_and_those_of_one_show_replies(results) -> None:
    assert "misaligned" in str(results["graded"]).splitlines()[2] and "prompt" not in str(results["graded"]).splitlines()[2]
    assert "reply" in str(results["graded"].where(condition="latent 3")).splitlines()[2]
    header = str(results["sweep"]).splitlines()[2]
    assert header.index("patched") < header.index("site") < header.index("misaligned")


def test_a_long_run_shows_five_steps_from_the_first_to_the_last() -> None:
    history = [{"step": float(i), "loss": 2.0 - i / 100 + 0.5, "sft": 2.0 - i / 100, "block": 0.5} for i in range(1, 101)]
    run = TrainingRun(adapter="blocked", steps=100, history=history)
    assert run._shown()["step"].tolist() == [1, 26, 51, 75, 100] and len(run.to_frame()) == 100
    assert run.headline() == "adapter 'blocked', 100 steps, SFT loss 1.99 -> 1 (+ weighted penalty 0.5)"
    plain = TrainingRun(adapter="plain", steps=3, history=[{**row, "loss": row["sft"]} for row in history[:3]])
    assert plain._shown()["step"].tolist() == [1, 2, 3] and "penalty" not in plain.headline()


# ------------------------------------------------------------------------------------------------ patching sweeps


def test_a_sweep_says_block_and_direction(results, model) -> None:
    frame = results["sweep"].to_frame()
    places = frame.drop_duplicates(["patched", "site"])
    assert places["block"].tolist() == [None, *range(5), *range(5)] and set(frame["direction"]) == {"base into third"}
    assert results["sweep"].plot().axes[0].get_title() == "Patching base into third"
    reverse = patching_sweep(model, CORE, [PRESET.site], source="plain", target="base", max_new_tokens=4, **QUIET)
    assert set(reverse.columns["direction"]) == {"plain into base"}
    assert len(results["sweep"].where(block=2)) == 24 and results["sweep"].rates("block")["n"].tolist() == [12, *[24] * 5]


def test_a_heat_map_has_a_cell_per_site_and_kind_of_patch(results) -> None:
    rates = results["sweep"].rates(["patched", "site"])
    figure = plots.patching_map(rates, direction="base into plain")
    axes = figure.axes[0]
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["prompt, hook_resid_post", "decode, hook_resid_post"]
    shown = axes.images[0].get_array()
    assert shown.shape == (2, 5) and shown[1, 2] == 100 * rates.set_index(["patched", "site"]).loc[("decode", PRESET.site), "misaligned"]
    assert axes.get_title().startswith("Patching base into plain; unpatched ")
    with pytest.raises(ValueError, match="patching map: expected replies.rates"):
        plots.patching_map(results["graded"].rates())


def test_a_sweep_with_nothing_to_lower_warns(model) -> None:
    class Never(OtherJudge):
        def grade(self, prompts, replies, *, rubric="misalignment"):
            return [Verdict(label="1")] * len(replies)

    options = {"max_new_tokens": 4, **QUIET}
    with pytest.warns(UserWarning, match=r"base into third.*0 % of the 12 unpatched replies are misaligned"):
        patching_sweep(model, CORE, [PRESET.site], **options).grade(Never())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        patching_sweep(model, CORE, [PRESET.site], source="plain", target="base", **options).grade(Never())
        generate(model, CORE, **options).grade(Never())
