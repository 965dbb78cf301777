"""A judging model that says what it is told to, and short ways to ask a judge and to look into a store."""

import math
from collections import Counter
from collections.abc import Iterable, Iterator

from blockem_tl.judging.backend import Completion, Request
from blockem_tl.storage.store import Store
from blockem_tl.types import Judge, Prompt


class Scripted:
    """A backend that answers with the next of its replies to a prompt, and remembers what it was asked."""

    name = "scripted"

    def __init__(self, *script: str | Completion) -> None:
        self.script, self.asked = list(script), []

    def check(self) -> None: ...

    def complete(self, requests: Iterable[Request]) -> Iterator[tuple[int, Completion]]:
        for index, request in enumerate(requests):
            self.asked.append(request)
            said = self.script.pop(0)
            yield index, said if isinstance(said, Completion) else Completion(text=said)


def ask(judge: Judge, n: int = 1, rubric: str = "misalignment") -> list[str]:
    prompts = [Prompt(id=str(i), text=f"q{i}") for i in range(n)]
    return [v.label for v in judge.grade(prompts, [f"r{i}" for i in range(n)], rubric=rubric)]


def scored(number: str, first: str | None = None, mass: float = 1.0) -> Completion:
    return Completion(text=number, first=first or number, alternatives=((first or number, math.log(mass)),))


def labels_in(store: Store) -> Counter[str]:
    return Counter(value["label"] for _, value in store)
