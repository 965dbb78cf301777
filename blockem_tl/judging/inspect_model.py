"""A model of Inspect's as the judging model, so that rubrics, parsing and retries are those of every other judge."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from blockem_tl.judging.backend import Completion, Request, completion_of, label_schema

if TYPE_CHECKING:
    from inspect_ai.model import Model


@dataclass(frozen=True, kw_only=True, eq=False)
class InspectModel:
    """A judging model that Inspect asks; implements `Backend`. It must be used in a worker thread of the event loop of an evaluation.

    Requests follow one another; Inspect's own samples run side by side. Temperature (0) and token limit are the model's own if it has any.
    """

    model: "Model"

    @property
    def name(self) -> str:
        """Provider and model, as Inspect writes them."""
        return str(self.model)

    def check(self) -> None:
        """Nothing to check: Inspect made the model."""

    def complete(self, requests: Iterable[Request]) -> Iterator[tuple[int, Completion]]:
        """Ask them in order. Raises what Inspect's provider raises, its retries included."""
        from anyio import from_thread

        for index, request in enumerate(requests):
            yield index, from_thread.run(self._ask, request)

    async def _ask(self, request: Request) -> Completion:
        from inspect_ai.model import ChatMessageAssistant, ChatMessageUser

        roles = {"user": ChatMessageUser, "assistant": ChatMessageAssistant}
        output = await self.model.generate([roles[role](content=text) for role, text in request.turns], config=self._config(request))
        if output.stop_reason == "content_filter":
            return Completion(text="", refused=f"content_filter: {output.completion or 'no words'}")
        found = output.choices[0].logprobs if output.choices else None
        return completion_of(
            output.completion,
            request,
            cut=output.stop_reason in ("max_tokens", "model_length"),
            tokens=None if found is None else [token.model_dump() for token in found.content],
        )

    def _config(self, request: Request) -> Any:
        from inspect_ai.model import GenerateConfig, ResponseSchema
        from inspect_ai.util import JSONSchema

        own = self.model.config
        config = GenerateConfig(
            temperature=0.0 if own.temperature is None else own.temperature, max_tokens=own.max_tokens or request.max_tokens
        )
        if request.alternatives:
            config.logprobs, config.top_logprobs = True, request.alternatives
        if request.choices:
            schema = JSONSchema(**label_schema(request.choices))
            config.response_schema = ResponseSchema(name="verdict", json_schema=schema, strict=True)
        return config
