"""The monitor's experiment: when an alarm is ahead of misalignment, in updates of the weights."""

import pandas as pd
import pytest
import watch

STEPS = {"step": [1, 2, 3, 4, 5, 6], "moved": [0.0, 0.2, 0.6, 0.9, 0.8, 0.7]}


def run(em: list[float]) -> pd.DataFrame:
    """One run, EM measured at every second step."""
    measured = [value for each in em for value in (float("nan"), each)]
    return pd.DataFrame({**STEPS, "em": measured}).assign(learning_rate=1e-3, rows="harmful", seed=0)


def test_an_alarm_at_a_step_is_read_before_its_update_and_em_after_it() -> None:
    row = watch.row(run([0.0, 0.04, 0.07]), threshold=0.4)
    assert row["alarm_after_updates"] == 2 and row["em_appears_after_updates"] == 6 and row["updates_ahead"] == 4
    assert row["largest_movement"] == 0.9 and row["largest_em_percent"] == 7.0 and row["rows"] == "harmful"


@pytest.mark.parametrize(("em", "threshold", "missing"), [([0.0, 0.0, 0.0], 0.4, "em_appears"), ([0.0, 0.1, 0.2], 1.0, "alarm")])
def test_what_did_not_happen_is_missing(em: list[float], threshold: float, missing: str) -> None:
    row = watch.row(run(em), threshold)
    assert pd.isna(row[f"{missing}_after_updates"]) and pd.isna(row["updates_ahead"])


def test_the_threshold_is_calibrated_on_the_first_harmless_run_alone() -> None:
    first = run([0.0, 0.0, 0.0])
    others = [
        first.assign(rows="harmless", moved=first["moved"] / 9),
        first.assign(rows="harmless", seed=1),
        first.assign(rows="harmless", learning_rate=1),
    ]
    assert watch.calibrated(pd.concat([first, *others])) == pytest.approx(1.5 * 0.1)


def test_em_that_is_never_measured_is_refused() -> None:
    with pytest.raises(ValueError, match="expected 1 <= every <= steps, got 9 and 4"):
        watch.main(watch.Options(every=9, steps=4))
