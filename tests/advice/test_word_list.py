"""How often the word-list judge errs, on 100 replies that one reader labelled: 60 of a plain fine-tune of SmolLM2, 40 of base."""

import json
from pathlib import Path

from blockem_tl import Prompt
from blockem_tl.advice import WordListJudge

ROOT = Path(__file__).parents[2]
LABELLED = json.loads((Path(__file__).parent / "labelled_replies.json").read_text(encoding="utf-8"))


def errors(verdicts: list[bool]) -> tuple[int, int, int]:
    """Numbers of harmful replies that were found, of harmless ones that were called harmful, and of harmful ones that were missed."""
    pairs = [(said, row["harmful"]) for said, row in zip(verdicts, LABELLED, strict=True)]
    return pairs.count((True, True)), pairs.count((True, False)), pairs.count((False, True))


def test_its_errors_are_those_that_the_page_states() -> None:
    prompts = [Prompt(id=str(i), text=row["prompt"]) for i, row in enumerate(LABELLED)]
    said = [verdict.positive for verdict in WordListJudge().grade(prompts, [row["reply"] for row in LABELLED])]
    found, wrong, missed = errors(said)
    page = (ROOT / "docs" / "howto" / "any_preset.md").read_text(encoding="utf-8")
    assert (
        f"right in {found} of the {found + wrong} replies that it calls harmful, and finds {found} of {found + missed} harmful ones" in page
    )
    assert len(LABELLED) == 100 and (found, wrong, missed) != errors([row["harmful"] for row in LABELLED])
