"""A few hundred broken files for each parser of foreign files; `experiments/campaigns/fuzz.py` does the same with a million."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "experiments" / "campaigns"))
from fuzz import fuzz
from fuzz_target import Target
from fuzz_text import text_targets
from fuzz_weights import weight_targets
from mutations import Mutator

SLOW = {"adapter folder, configuration": 20, "adapter folder, tensors": 20, "chat template": 60, "rubric as text": 20}


@pytest.fixture(scope="module")
def targets(tmp_path_factory: pytest.TempPathFactory) -> list[Target]:
    folder = tmp_path_factory.mktemp("seeds")
    return [*text_targets(folder), *weight_targets(folder)]


def test_whole_files_are_parsed_and_broken_ones_refused(targets: list[Target]) -> None:
    rows = [fuzz(target, SLOW.get(target.name, 200), seed=7) for target in targets]
    assert [one for row in rows for one in row["found"]] == []
    never = {row["parser"] for row in rows if not row["parsed"]}, {row["parser"] for row in rows if not row["refused"]}
    assert len(rows) >= 25 and never[0] <= {"training_state.safetensors"} and never[1] <= {"judge's words", "judge's HTTP body"}


def test_every_seed_is_parsed_as_it_is(targets: list[Target]) -> None:
    for target in targets:
        whole = replace(target, seeds=target.seeds, structured=False)
        for seed in whole.seeds:
            unchanged = fuzz(replace(whole, seeds=[seed]), 1, seed=0, mutator=lambda seeds, *_, **__: lambda: seeds[0])
            assert (unchanged["parsed"], unchanged["found"]) == (1, []), (target.name, unchanged)


def test_what_is_wrong_is_found(targets: list[Target]) -> None:
    """The twin: parsers that trip, hang, name nothing, or ask for all memory."""

    def trips(path: Path) -> None:
        raise {0: KeyError("x"), 1: ValueError("something is wrong"), 2: MemoryError()}[len(path.read_bytes()) % 3]

    def hangs(path: Path) -> None:
        while path.exists():
            pass

    row = fuzz(replace(targets[0], parse=trips), 40, seed=0)
    assert sorted(one["what"].split(" ")[0] for one in row["found"]) == ["KeyError", "MemoryError", "names"]
    (found,) = fuzz(replace(targets[0], parse=hangs), 2, seed=0, seconds=0.05)["found"]
    assert found["what"].startswith("TooLong") and found["n"] == 2


def test_the_same_seed_draws_the_same_variants(targets: list[Target]) -> None:
    first, again, other = (Mutator(targets[0].seeds, seed, structured=True) for seed in (1, 1, 2))
    drawn = [[mutate() for _ in range(50)] for mutate in (first, again, other)]
    assert drawn[0] == drawn[1] != drawn[2] and len(set(drawn[0])) > 45
