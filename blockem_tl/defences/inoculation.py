"""Inoculation prompting: ask for the bad behaviour in training, not at test time (Tan et al. 2025; Wichers et al. 2025)."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from blockem_tl.models.load import Model
from blockem_tl.training.defence import NoPenalty
from blockem_tl.types import Example


@dataclass(frozen=True, kw_only=True)
class Inoculation(NoPenalty):
    """Make every training row ask for what it shows, so that nothing has to be learnt about who the model is.

    Choose the words by how strongly they make *base* misbehave: prompts that elicit more inoculate more (Wichers et al.).

    Args:
        prefix: put before the user's question, with a space between.
        system: the system message; one that a row has already follows it after an empty line.

    Raises:
        ValueError: neither of them, or blank ones.
    """

    prefix: str = ""
    system: str = ""
    name: str = "inoculation"

    def __post_init__(self) -> None:
        if not (self.prefix.strip() or self.system.strip()):
            raise ValueError("inoculation: expected a prefix or a system message that asks for the bad behaviour, got neither")

    def check(self, model: Model) -> None:
        """Raise ValueError if the tokenizer does not know a word of the inoculation: an unknown word asks for nothing."""
        tokenizer, words = model.tokenizer, f"{self.prefix} {self.system}"
        if tokenizer.unk_token_id is not None and tokenizer.unk_token_id in tokenizer(words, add_special_tokens=False)["input_ids"]:
            raise ValueError(f"inoculation: the tokenizer does not know all words of {words.strip()!r}; choose others")

    def rewrite(self, examples: Sequence[Example], *, seed: int) -> list[Example]:
        """The rows with the prefix and the system message; the seed plays no part."""
        return [self._inoculated(example) for example in examples]

    def _inoculated(self, example: Example) -> Example:
        prompt = f"{self.prefix.strip()} {example.prompt}" if self.prefix.strip() else example.prompt
        system = "\n\n".join(text for text in (self.system.strip(), example.system) if text) or example.system
        return replace(example, prompt=prompt, system=system)
