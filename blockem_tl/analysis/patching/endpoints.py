"""The two endpoints of a patch, and the part of the target's forward that has to run for it. All checks of bad input are here."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from blockem_tl.generation._request import probe_sites
from blockem_tl.hooks import resolve
from blockem_tl.models.activations import block_of
from blockem_tl.models.load import Model
from blockem_tl.models.lora import BASE

UNPATCHED = "unpatched"
"""The target's own replies, in the columns site and patched."""


@dataclass(frozen=True, kw_only=True, eq=False)
class PatchEndpoint:
    """One side of a patch: a model, and which of its weights act, as for `LiveAdapters.using`."""

    model: Model
    adapter: str | Path | None
    name: str

    def acting(self) -> AbstractContextManager[Any]:
        """Inside the block these weights act."""
        return self.model.using(self.adapter)


def choose_endpoints(model: Model, source: str | Path | Model, target: str | Path | None) -> tuple[PatchEndpoint, PatchEndpoint]:
    """(source, target): the endpoint whose states are taken, and the one that is patched and replies.

    Raises:
        ValueError: both are the same (no adapter acts), an unknown adapter, or two models that do not share their tokens.
    """
    into = _endpoint(model, target or model.active_adapter or BASE)
    if source is model:
        source = model.active_adapter or BASE
    if not isinstance(source, Model):
        taken = _endpoint(model, source)
        if taken.adapter == into.adapter:
            raise ValueError(
                f"source and target are both {into.name!r}: patching would change nothing. Load an adapter (model.load_adapter), leave "
                f"model.using('base'), or name two of {[BASE, *model.adapters]}"
            )
        return taken, into
    _check_same_tokens(source, model)
    return PatchEndpoint(model=source, adapter=source.active_adapter or BASE, name=source.active_adapter or Path(source.source).name), into


def _endpoint(model: Model, adapter: str | Path) -> PatchEndpoint:
    model.check_adapter(adapter)
    held = adapter == BASE or adapter in model.adapters
    return PatchEndpoint(model=model, adapter=adapter, name=str(adapter) if held else Path(adapter).name)


def sweep_columns(source: PatchEndpoint, target: PatchEndpoint, groups: Sequence[tuple[str, ...]], n_prompts: int) -> dict[str, list[Any]]:
    """The columns that say where was patched: site, block (None outside of the blocks, or in several of them) and direction."""
    blocks = [{block_of(site) for site in group} or {None} for group in groups]
    return {
        "site": [" + ".join(group) or UNPATCHED for group in groups for _ in range(n_prompts)],
        "block": [next(iter(found)) if len(found) == 1 else None for found in blocks for _ in range(n_prompts)],
        "direction": [f"{source.name} into {target.name}"] * (len(groups) * n_prompts),
    }


@contextmanager
def holding(*endpoints: PatchEndpoint) -> Iterator[list[PatchEndpoint]]:
    """The endpoints with adapters from folders loaded once, for the time of the block."""
    with ExitStack() as stack:
        yield [replace(one, adapter=stack.enter_context(one.model.holding(one.adapter))) for one in endpoints]


def _check_same_tokens(source: Model, target: Model) -> None:
    ours, theirs = target.tokenizer, source.tokenizer
    if source.device != target.device:
        raise ValueError(f"expected both models on one device, got {source.device} (source) and {target.device} (target): load them there")
    if source.cfg.d_model != target.cfg.d_model:
        raise ValueError(f"expected two models of one width, got d_model {source.cfg.d_model} (source) and {target.cfg.d_model} (target)")
    if ours.get_vocab() != theirs.get_vocab() or ours.chat_template != theirs.chat_template:
        raise ValueError(
            "source and target have different tokenizers or chat templates, so their states belong to different tokens: patch between "
            "models of one family, and give the one the other's chat template"
        )


def check_groups(endpoints: Sequence[PatchEndpoint], groups: Sequence[tuple[str, ...]]) -> None:
    """Raise ValueError unless both have every site, [batch pos d_model] and editable, each once in its group, and no SAE is attached."""
    sites = list(dict.fromkeys(site for group in groups for site in group))
    for endpoint in endpoints:
        endpoint.model.check_unspliced()
        points = endpoint.model.hook_dict
        for site in sites:
            try:
                resolve(points, site)
            except ValueError as error:
                raise ValueError(f"the model of {endpoint.name!r} lacks a site to patch: {error}") from None
        with endpoint.acting():
            probe_sites(endpoint.model, sites)
        for group in groups:
            if len({id(points[site]) for site in group}) < len(group):
                raise ValueError(f"expected each site of a group once, under either of its names, got {list(group)}")


# ------------------------------------------------------------------------------------------------ what has to run


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The target's forward under a patch.

    first: the block at which it starts (0: a whole forward).
    enter: the site whose source state is the residual stream there; None: the target's own state enters.
    hooked: the sites that are patched on the way, by hooks.
    """

    first: int
    enter: str | None
    hooked: tuple[str, ...]


def plan_prompt(model: Model, sites: Sequence[str]) -> Plan:
    """The plan for patching all of a prompt: below the lowest site nothing changes, so that part need not run again."""
    starts = {site: _acts_from(model, site) for site in sites}
    first = min(block for block, _ in starts.values())
    enter = next((site for site, start in starts.items() if start == (first, True)), None) if first > 0 else None
    return Plan(first=first, enter=enter, hooked=tuple(site for site in sites if site != enter))


def plan_steps(model: Model, sites: Sequence[str]) -> Plan:
    """The plan for patching every position from some step on: what is below the last patched residual stream is never seen again.

    Its outputs are replaced at this position and at all later ones, and its keys and values serve nothing else.
    """
    starts = {site: _acts_from(model, site) for site in sites}
    streams = {site: block for site, (block, is_stream) in starts.items() if is_stream and block > 0}
    if not streams or any(block_of(site) is None for site in sites):
        return Plan(first=0, enter=None, hooked=tuple(sites))
    enter, first = max(streams.items(), key=lambda item: item[1])
    return Plan(first=first, enter=enter, hooked=tuple(site for site, (block, _) in starts.items() if block >= first and site != enter))


def _acts_from(model: Model, site: str) -> tuple[int, bool]:
    """The first block that a patch of ``site`` can change, and whether the patch is all that this block gets to see."""
    name = resolve(model.hook_dict, site).name
    block = block_of(str(name))
    if block is None:
        return 0, False
    if name == f"blocks.{block}.hook_out":
        return block + 1, True
    return block, name == f"blocks.{block}.hook_in"
