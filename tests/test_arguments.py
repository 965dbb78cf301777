"""Arguments that are no numbers, names or presets: a clear error, before anything is generated, trained or judged."""

import inspect
import math
import resource
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from shared import EXAMPLES, SITES, WIDTH, perturbed, sae_at, set_of

from blockem_tl import (
    Blocking,
    Condition,
    Prompt,
    Steering,
    TrainingConfig,
    finetune,
    generate,
    get_preset,
    hooks,
    load_engine,
    read_sites,
    reconstruction_quality,
    shift_by_site,
    train_sae,
)
from blockem_tl.data.checks import check_prompts
from blockem_tl.defences.base_latents import BaseLatents
from blockem_tl.evaluation.statistics import agreement
from blockem_tl.generation import _scheduler
from blockem_tl.judging.backend import Completion
from blockem_tl.judging.judge import LLMJudge
from blockem_tl.models import load
from blockem_tl.models.activations import read_site
from blockem_tl.saes.card import measure
from blockem_tl.storage import files
from blockem_tl.storage.store import Store
from blockem_tl.types import EXAMPLE_SITE, check_hooks, check_names, check_site

NAN, INF = float("nan"), float("inf")
PROMPTS = [Prompt(id="1", text="w1 w2"), Prompt(id="2", text="w3")]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 2.5}, "max_new_tokens: expected a whole number"),
        ({"max_new_tokens": None}, "max_new_tokens: expected a whole number"),
        ({"max_new_tokens": True}, "max_new_tokens: expected a whole number"),
        ({"max_new_tokens": 0}, "max_new_tokens: expected a whole number"),
        ({"max_new_tokens": "12"}, "max_new_tokens: expected a whole number"),
        ({"max_new_tokens": [3, 2.5]}, "max_new_tokens: expected a whole number"),
        ({"max_new_tokens": [3]}, "max_new_tokens: expected a whole number"),
        ({"temperature": NAN}, "expected a finite temperature >= 0"),
        ({"temperature": INF}, "expected a finite temperature >= 0"),
        ({"temperature": -0.1}, "expected a finite temperature >= 0"),
        ({"seed": "0"}, "a whole number >= 0 as seed"),
        ({"seed": 1.0}, "a whole number >= 0 as seed"),
        ({"seed": -1}, "a whole number >= 0 as seed"),
        ({"seed": True}, "a whole number >= 0 as seed"),
        ({"batch_size": 0}, "expected a whole number as batch_size"),
        ({"batch_size": True}, "expected a whole number as batch_size"),
        ({"batch_size": 2.0}, "expected a whole number as batch_size"),
    ],
)
def test_numbers_that_are_none_generate_nothing(options, message, tiny) -> None:
    from blockem_tl.generation import _request, _scheduler

    with pytest.raises(ValueError, match=message):  # without the tests' own type checks, which users do not have
        if "batch_size" in options:
            _scheduler.run_job.__wrapped__(None, options["batch_size"])
        arguments = {"max_new_tokens": 3, "temperature": 0.0, "seed": 0, **options}
        _request.check_request.__wrapped__(tiny.tokenizer, 96, PROMPTS, [Condition(name="plain")], **arguments)
    assert len(generate(tiny, PROMPTS, max_new_tokens=[3, 2], temperature=0.5, seed=1, batch_size=1, progress=False)) == 2


@pytest.mark.parametrize(
    "changes",
    [
        {"max_grad_norm": NAN},
        {"max_grad_norm": -1.0},
        {"max_grad_norm": INF},
        {"epochs": NAN},
        {"epochs": INF},
        {"learning_rate": NAN},
        {"learning_rate": 0.0},
        {"dropout": 1.0},
        {"dropout": -0.1},
        {"dropout": NAN},
        {"rank": 0},
        {"alpha": 0},
        {"warmup_steps": -1},
        {"batch_size": 0},
        {"micro_batch_size": -2},
        {"schedule": "sawtooth"},
    ],
)
def test_hyperparameters_out_of_range_are_refused(changes) -> None:
    with pytest.raises((ValueError, TypeError), match="training: expected|TrainingConfig"):
        TrainingConfig(**changes)
    assert TrainingConfig(max_grad_norm=0.0, dropout=0.5).rank == 16


def test_names_and_directions_that_are_none_are_refused() -> None:
    init = Condition.__post_init__.__wrapped__ if hasattr(Condition.__post_init__, "__wrapped__") else Condition.__post_init__
    for name in ("", None, 5):
        condition = object.__new__(Condition)
        object.__setattr__(condition, "name", name)
        object.__setattr__(condition, "steering", ())
        with pytest.raises(TypeError, match="expected a text as name"):
            init(condition)
    with pytest.raises(ValueError, match="the direction is zero, so nothing would happen"):
        Steering(site=SITES[0], direction=torch.zeros(WIDTH), dose=1.0)
    assert Steering(site=SITES[0], direction=torch.zeros(WIDTH), dose=0.0).dose == 0


@pytest.mark.parametrize("name", [None, 5, "", "organsm", ["organism"]])
def test_presets_that_are_none_are_refused_with_those_that_there_are(name) -> None:
    with pytest.raises(ValueError, match="expected one of organism, smollm2-135m, llama-3.1-8b"):
        get_preset.__wrapped__(name)


@pytest.mark.parametrize("field", ["id", "text", "system"])
def test_prompts_of_other_things_than_text_are_refused(field) -> None:
    prompt = Prompt(id="1", text="w1")
    object.__setattr__(prompt, field, 5)
    with pytest.raises(TypeError, match="expected texts as a prompt's id, text and system message"):
        check_prompts([prompt])


# ---------------------------------------------------------------------------------------------- judges


class Careless:
    """A backend that drops, doubles or invents completions."""

    name = "careless"

    def __init__(self, *indices: int) -> None:
        self.indices = indices

    def check(self) -> None: ...

    def complete(self, requests) -> Iterator[tuple[int, Completion]]:
        list(requests)
        return ((index, Completion(text="ANSWER: 2")) for index in self.indices)


@pytest.mark.parametrize(
    ("indices", "message"),
    [((0,), "1 of 2 requests were never answered"), ((), "2 of 2"), ((0, 1, 1), "got another 1"), ((0, 1, 7), "got another 7")],
)
def test_a_backend_that_drops_or_adds_completions_is_refused(indices, message) -> None:
    judge = LLMJudge(backend=Careless(*indices))
    with pytest.raises(ValueError, match=f"backend 'careless': .*{message}"):
        judge.grade(PROMPTS, ["a", "b"])
    assert [v.label for v in LLMJudge(backend=Careless(1, 0)).grade(PROMPTS, ["a", "b"])] == ["2", "2"]


@pytest.mark.parametrize(
    ("first", "second"), [(["1"] * 4, ["1", "5", "1", "5"]), (["1", "5", "1", "5"], ["5"] * 4), (["1"] * 4, ["5"] * 4)]
)
def test_a_rater_that_always_says_the_same_agrees_by_chance_alone(first, second) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = agreement(first, second)
    assert found.value == 0 and math.isnan(found.low) and math.isnan(found.high)
    assert agreement(["1", "5", "1", "5"], ["1", "5", "1", "1"]).value > 0


# ---------------------------------------------------------------------------------------------- full disks, other systems


@contextmanager
def full_disk(room: int) -> Iterator[None]:
    """No file may grow beyond ``room`` bytes meanwhile: what a write meets on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_stored_references_on_a_full_disk_are_a_clear_error_and_leave_nothing(tiny, tmp_path) -> None:
    """Through a memory map the process would be killed without a word."""
    sae = sae_at(SITES[0])
    blocking = Blocking(latent_set=set_of(sae), sae=sae, weight=1.0, reference=BaseLatents(folder=tmp_path / "references"))
    config = TrainingConfig(epochs=1, batch_size=8, learning_rate=1e-3)
    with full_disk(200), pytest.raises(OSError, match="cannot write .* MB of stored references to .*Make room"):
        finetune(tiny, EXAMPLES, config=config, defences=[blocking], progress=False)
    assert tiny.adapters == [] and not [path for path in (tmp_path / "references").iterdir() if not path.name.endswith(".lock")]
    assert finetune(tiny, EXAMPLES, config=config, defences=[blocking], progress=False).steps == 3


def test_checkpoints_on_a_full_disk_are_a_clear_error(tiny, tmp_path) -> None:
    config = TrainingConfig(epochs=1, batch_size=8, learning_rate=1e-3)
    with full_disk(2000), pytest.raises(OSError, match=r"cannot write the adapter to .*Is the disk full\?|File too large"):
        finetune(tiny, EXAMPLES, config=config, checkpoints=tmp_path / "run", progress=False)
    assert tiny.adapters == [] and not list((tmp_path / "run").glob("epoch-*"))


def test_a_store_on_a_full_disk_is_a_clear_error_and_keeps_what_it_has(tmp_path) -> None:
    store = Store(tmp_path / "s.sqlite")
    store.put({"a": 1})
    with full_disk(20_000), pytest.raises(OSError, match="the disk is full at .*what was kept is still there"):
        for i in range(2000):
            store.put({f"{i}": "x" * 500})
    assert Store(tmp_path / "s.sqlite").get(["a"]) == {"a": 1}


def test_the_library_imports_where_there_is_no_resource_module() -> None:
    """Windows has none. (On Linux transformers takes it for granted, so only what does not need transformers can be tried here.)"""
    code = "import sys; sys.modules['resource'] = None; import blockem_tl; from blockem_tl import cli; from blockem_tl.storage import files"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    assert files.peak_rss_mb() > 10


# ---------------------------------------------------------------------------------------------- other kinds than expected


def plainly(function, *arguments, **options):
    """The call without the tests' own type checks, which users do not have: iterated, since some calls give an iterator."""
    found = inspect.unwrap(function)(*arguments, **options)
    return list(found) if isinstance(found, Iterator) else found


SITE_ALONE = rf"expected a list such as \['blocks.2.hook_resid_post'\], got '{SITES[0]}' alone: write \['{SITES[0]}'\]"
PAIRS = r"hooks: expected a list of pairs \(site, function\)"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: plainly(train_sae, m, 3, {}), r"train_sae: expected the name of a site.* got 3 \(int\); .* 'blocks.3.hook_resid_post'"),
        (lambda m: plainly(train_sae, m, SITES[0], [EXAMPLES]), "train_sae: expected corpora as a dict of rows by name"),
        (lambda m: plainly(train_sae, m, SITES[0], {"a": EXAMPLES}, adapters="plain"), r"got 'plain' alone: write \['plain'\]"),
        (lambda m: plainly(reconstruction_quality, m, sae_at(SITES[0]), EXAMPLES, adapters="plain"), "got 'plain' alone"),
        (lambda m: plainly(measure, m, sae_at(SITES[0]), {"a": EXAMPLES}, adapters=3), r"list of names such as \['plain'\], got 3 \(int\)"),
        (
            lambda m: plainly(load_engine, "transformer_lens", model=m, adapters="plain"),
            r"adapters as a dict \{name: folder\}, got 'plain'",
        ),
        (lambda m: plainly(read_sites, m, SITES[0], EXAMPLES), SITE_ALONE),
        (lambda m: plainly(read_sites, m, [3], EXAMPLES), r"read_sites: expected a list of names .* got \[3\] \(list\)"),
        (lambda m: plainly(read_site, m, 2, EXAMPLES), r"read_site: expected the name of a site.* got 2 \(int\)"),
        (lambda m: plainly(shift_by_site, m, EXAMPLES, plain="base", blocked="base", sites=SITES[0]), SITE_ALONE),
        (lambda m: check_names("recording", SITES[0], such_as=EXAMPLE_SITE), SITE_ALONE),
        (lambda m: check_hooks([(1, print)]), PAIRS + r".*got \(1, .* among them"),
        (lambda m: check_hooks([(SITES[0], 1)]), PAIRS),
        (lambda m: check_hooks((SITES[0], print)), PAIRS + ".*put the pair into a list"),
        (lambda m: check_hooks(3), PAIRS + r".*got 3 \(int\)"),
    ],
)
def test_arguments_of_another_kind_are_one_readable_line(call, message: str, tiny) -> None:
    with pytest.raises(TypeError, match=message) as caught:
        call(tiny)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_what_takes_hooks_checks_them(tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    for module in (_scheduler, hooks, load):
        monkeypatch.setattr(module, "check_hooks", lambda given: seen.append(1) or check_hooks(given))
    generate(tiny, PROMPTS, hooks=[(SITES[0], lambda h, hook: h)], max_new_tokens=2, progress=False)
    assert seen
    before = len(seen)
    with tiny.hooks([(SITES[0], lambda h, hook: h)]):
        tiny(tiny.to_tokens("w1"))
    assert len(seen) > before


def test_lists_of_names_and_pairs_are_taken(tiny) -> None:
    assert check_names("x", (SITES[0],), such_as="a") == [SITES[0]] and check_site("x", SITES[0]) == SITES[0]
    pairs = [(SITES[0], print), (lambda name: True, print)]
    assert check_hooks(iter(pairs)) == pairs and check_hooks(()) == []
    with tiny.recording([SITES[0]]) as seen:
        tiny(tiny.to_tokens("w1"))
    assert list(seen) == [SITES[0]]


def test_folder_and_name_of_an_adapter_in_the_wrong_order_are_named(tiny, tmp_path) -> None:
    tiny.add_adapter("plain")
    folder = str(tmp_path / "runs" / "plain")
    with pytest.raises(ValueError, match=rf"the folder comes first, then the name: save_adapter\('{folder}', 'plain'\)"):
        tiny.save_adapter("plain", folder)
    tiny.save_adapter(folder, "plain")
    with pytest.raises(ValueError, match=rf"the folder comes first, then the name: load_adapter\('{folder}', 'again'\)"):
        tiny.load_adapter("again", folder)
    tiny.load_adapter(folder, "again")
    assert tiny.adapters == ["plain", "again"]
    with pytest.raises(ValueError, match="no adapter 'other'"):  # another mistake is not taken for this one
        tiny.save_adapter(folder, "other")


def test_reading_takes_an_adapter_as_everywhere(tiny, tmp_path) -> None:
    site = SITES[0]
    tiny.add_adapter("tuned")
    perturbed(tiny, "tuned")
    folder = tiny.save_adapter(tmp_path / "saved", "tuned")

    def read(adapter):
        return torch.cat([h[batch.mask] for h, batch in read_site(tiny, site, EXAMPLES, adapter=adapter, batch_size=5)])

    with tiny.using("base"):
        as_it_stands = read(None)
        assert torch.equal(read("tuned"), read(folder)) and not torch.equal(read("tuned"), as_it_stands)
    assert torch.equal(read("base"), as_it_stands) and tiny.adapters == ["tuned"] and tiny.active_adapter == "tuned"
    found = read_sites(tiny, [site], EXAMPLES, adapter="base", batch_size=5)
    next(found)
    assert tiny.active_adapter == "tuned"  # between batches the model is the caller's
    for wrong in ({"adapter": "tunde"}, {}):
        with pytest.raises(ValueError, match="unknown adapter 'tunde'|unknown site"):
            read_sites(tiny, [site if wrong else "blocks.9.hook_resid_post"], EXAMPLES, **wrong)  # before the first batch is asked for
