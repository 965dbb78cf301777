"""The table of the paper's claims: verdicts by intervals, nothing invented where there is no data, and the published one is up to date."""

from pathlib import Path

import claims
import pandas as pd
import pytest
import yaml

ROOT = Path(__file__).parents[2]
CHECK = {"name": "reduction", "rows": "run == 'blocked'", "value": "reduction", "above": 0.5, "scale": 100, "unit": " %"}


def table(**numbers: float) -> pd.DataFrame:
    """Two arms."""
    rows = [{"run": "blocked", **numbers}, {"run": "random", "reduction": 0.1, "reduction_low": 0.0, "reduction_high": 0.2}]
    return pd.DataFrame(rows)


@pytest.mark.parametrize(("low", "value", "high", "reached"), [(0.6, 0.7, 0.8, 1.0), (0.4, 0.7, 0.8, 0.5), (0.3, 0.45, 0.8, 0.0)])
def test_a_number_is_beyond_its_bound_with_its_interval_with_its_estimate_or_not(low, value, high, reached) -> None:
    frame = table(reduction=value, reduction_low=low, reduction_high=high).assign(n=96, seeds=3)
    text, found = claims.checked(frame, CHECK)
    assert found == reached and text == f"reduction {100 * value:.1f} [{100 * low:.1f}, {100 * high:.1f}] % (above 50.0, n = 96, seeds = 3)"
    opposite = {key: value for key, value in CHECK.items() if key != "above"} | {"below": 0.5}
    assert claims.checked(frame, opposite)[1] == {1.0: 0.0, 0.5: 0.0, 0.0: 0.5}[reached]


def test_a_bound_that_is_another_number_counts_with_its_interval() -> None:
    other = {**CHECK, "above": {"rows": "run == 'random'", "times": 2.0, "plus": 0.1}}
    assert claims.checked(table(reduction=0.7, reduction_low=0.55, reduction_high=0.8), other)[1] == 1.0
    assert claims.checked(table(reduction=0.7, reduction_low=0.45, reduction_high=0.8), other)[1] == 0.5
    assert claims.checked(table(reduction=0.25, reduction_low=0.1, reduction_high=0.8), other)[1] == 0.0


def test_several_rows_are_averaged_or_picked() -> None:
    frame = pd.DataFrame({"site": ["a", "b", "b"], "em": [0.1, 0.2, 0.4], "em_low": [0.0, 0.1, 0.3], "em_high": [0.2, 0.3, 0.5]})
    mean, low, high = claims.number(frame[frame["site"] == "b"], "em", "mean")
    assert mean == pytest.approx(0.3) and low < 0.2 < 0.4 < high
    assert claims.number(frame, "em", "max") == (0.4, 0.3, 0.5) and claims.number(frame, "em", "min") == (0.1, 0.0, 0.2)
    alone = frame[frame["site"] == "a"]  # one seed: an estimate, and no certainty
    assert claims.number(alone, "em", "mean") == (0.1, -float("inf"), float("inf"))
    check = {"name": "EM", "rows": "site == 'a'", "value": "em", "pick": "mean", "above": 0.01}
    assert claims.checked(alone, check) == ("EM 0.100 (above 0.010)", 0.5)
    with pytest.raises(ValueError, match="expected one row, or a pick, got 3 rows of 'em'"):
        claims.number(frame, "em")
    with pytest.raises(ValueError, match="no row fits"):
        claims.part(frame, "site == 'c'")


def claim_rows(tmp_path: Path, preset: str, checks: list[dict], frame: pd.DataFrame, **more: str) -> dict:
    folder = tmp_path / f"sweep-{preset}"
    folder.mkdir(parents=True, exist_ok=True)
    frame.to_csv(folder / "arms.csv", index=False)
    claim = {"claim": 2, "says": "s", "from": "sweep-{preset}/arms", "by": "sweep.py", "checks": checks, **more}
    return claims.row(claim, claims.Options(preset=preset, results=tmp_path))


def test_a_claim_holds_by_all_of_its_numbers(tmp_path: Path) -> None:
    frame = table(reduction=0.7, reduction_low=0.6, reduction_high=0.8, cost=0.3)
    cheap = {"name": "cost", "rows": "run == 'blocked'", "value": "cost", "below": 0.1}
    assert claim_rows(tmp_path, "tiny", [CHECK], frame)["verdict"] == "holds"
    both = claim_rows(tmp_path, "tiny", [CHECK, cheap], frame)
    assert both["verdict"] == "in part" and both["here"].endswith("% (above 50.0); cost 0.300 (below 0.100)")
    assert claim_rows(tmp_path, "tiny", [cheap], frame)["verdict"] == "does not hold"


def test_where_there_is_nothing_to_compare_nothing_is_said(tmp_path: Path) -> None:
    found = claim_rows(tmp_path, "tiny", [CHECK], table(reduction=float("nan"), reduction_low=float("nan"), reduction_high=float("nan")))
    assert found["verdict"] == "cannot be tested here" and found["here"] == "reduction nan % (above 50.0)"


def test_what_was_not_run_here_is_not_taken_from_elsewhere(tmp_path: Path) -> None:
    frame = table(reduction=0.7, reduction_low=0.6, reduction_high=0.8)
    assert claim_rows(tmp_path, "organism", [CHECK], frame)["verdict"] == "holds"
    claim = {"claim": 2, "says": "s", "from": "sweep-{preset}/arms", "by": "sweep.py", "checks": [CHECK]}
    other = claims.row(claim, claims.Options(preset="tiny", results=tmp_path))
    assert other["verdict"] == "not run yet" and other["here"] == "sweep.py"
    cannot = {"claim": 6, "says": "s", "by": "x.py", "cannot": {"organism": "it has no words"}}
    on = {preset: claims.row(cannot, claims.Options(preset=preset, results=tmp_path)) for preset in ("organism", "tiny")}
    assert [one["verdict"] for one in on.values()] == ["cannot be tested here", "not run yet"] and on["tiny"]["here"] == "x.py"
    missing = claims.row({"claim": 3, "says": "s", "from": "nothing/arms", "by": "x.py"}, claims.Options(results=tmp_path))
    assert missing["verdict"] == "not run yet"


def test_all_36_are_there_each_with_its_script() -> None:
    listed = yaml.safe_load(claims.CLAIMS.read_text(encoding="utf-8"))
    assert [one["claim"] for one in listed] == list(range(1, 37))
    scripts = {path.name for path in (ROOT / "experiments").glob("*.py")}
    assert all(one["by"].split()[0] in scripts for one in listed if "from" in one)


def test_the_published_table_is_what_the_published_results_say(tmp_path: Path) -> None:
    published = ROOT / "docs" / "results"
    for folder in published.glob("claims-*"):
        claims.main(claims.Options(preset=folder.name.removeprefix("claims-"), results=published, out=tmp_path))
        assert (tmp_path / "claims.csv").read_text() == (folder / "claims.csv").read_text()
    assert list(published.glob("claims-*"))
