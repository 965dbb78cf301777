"""Replies and verdicts on disk: nothing finished is done twice, whatever kills the run; and nothing stale is ever taken for new."""

import json
import os
import signal
from collections import Counter
from dataclasses import replace
from pathlib import Path

import jaxtyping
import pytest
import torch
from sae_lens import StandardSAE, StandardSAEConfig
from shared import perturb

from blockem_tl import Condition, DiscoveryConfig, Prompt, Steering, Verdict, discover
from blockem_tl.discovery.config import MaxIncoherence
from blockem_tl.generation.engine import TransformerLensEngine
from blockem_tl.generation.reply_fn import CachedReplies, cached, identity_of, model_identity, replies_from
from blockem_tl.generation.steering import UNSTEERED
from blockem_tl.storage.fingerprints import of_folder
from blockem_tl.storage.store import Store

SITE = "blocks.1.hook_resid_post"
PROMPTS = [Prompt(id=str(i), text=f"w{i} w{i + 1}") for i in range(4)]
CONFIG = DiscoveryConfig(
    n_plus=3, n_minus=3, induce_dose=0.5, repair_dose=0.5, shortlist_size=2, grid=(0.0, 0.5, 1.0), extended_grid=(), max_incoherence=MaxIncoherence(rate=0.3, relative=True),
    n_latents=2, valid_only=False, final_score="both", max_new_tokens=4,
)  # fmt: skip


@pytest.fixture(autouse=True)
def _unchecked_shapes():
    """Whole discoveries, several per test: without the run-time shape checks, which other files have on."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def sae():
    torch.manual_seed(0)
    sae = StandardSAE(StandardSAEConfig(d_in=32, d_sae=40))
    for parameter in sae.parameters():
        parameter.data.normal_(std=0.3)
    sae.cfg.metadata.hook_name = SITE
    return sae


@pytest.fixture
def tuned(tiny):
    tiny.add_adapter("tuned")
    perturb(tiny, "tuned")
    return tiny


class Counting:
    """A judge of tokens, and a log of what was generated and judged: one line per reply, on disk at once. It can end the run."""

    name = "counting"

    def __init__(self, log: Path, *, generations: int | None = None, judgements: int | None = None, how=None) -> None:
        self.log, self.limits, self.how, self.done = log, {"said": generations, "judged": judgements}, how, Counter()

    def note(self, what: str, key: object) -> None:
        with self.log.open("a") as file:
            file.write(json.dumps([what, key]) + "\n")
        self.done[what] += 1

    def end(self, what: str) -> None:
        limit = self.limits[what]
        if limit is not None and self.done[what] >= limit:
            self.how()

    def grade(self, prompts, replies, *, rubric: str = "misalignment") -> list[Verdict]:
        verdicts = []
        for prompt, reply in zip(prompts, replies, strict=True):
            self.note("judged", [prompt.text, reply])
            n = sum(map(ord, reply))
            verdicts.append(Verdict(label="INCOHERENT" if n % 5 == 0 else "5" if n % 2 else "1"))
        self.end("judged")
        return verdicts


class CountingEngine(TransformerLensEngine):
    """The engine, with every condition that finished in the log after it was taken."""

    def __init__(self, model, log: Counting) -> None:
        super().__init__(model, batch_size=32)
        self.log = log

    def stream(self, prompts, *, conditions=(UNSTEERED,), adapter=None, **options):
        for c, replies in super().stream(prompts, conditions=conditions, adapter=adapter, **options):
            self.log.end("said")
            yield c, replies
            for reply in replies:  # the taker has come back: it has them
                self.log.note("said", [adapter, conditions[c].fingerprint, reply.prompt.text])


def run(tuned, sae, judge: Counting, store: Path | None, **changes):
    found = discover(
        tuned, sae, judge, PROMPTS, scale=8.0, config=replace(CONFIG, **changes), engine=CountingEngine(tuned, judge), adapter="tuned",
        store=store, progress=False,
    )  # fmt: skip
    return found.latent_set, found.screened, found.calibrated


def logged(log: Path) -> Counter:
    return Counter(log.read_text().splitlines())


class StoppedError(RuntimeError):
    pass


def stop() -> None:
    raise StoppedError


@pytest.mark.parametrize("limit", [{"generations": 1}, {"generations": 30}, {"judgements": 1}, {"judgements": 20}])
def test_a_run_that_was_stopped_goes_on_where_it_was(tuned, sae, tmp_path, limit) -> None:
    truth = run(tuned, sae, Counting(tmp_path / "truth"), None)
    with pytest.raises(StoppedError):
        run(tuned, sae, Counting(tmp_path / "log", **limit, how=stop), tmp_path / "store")
    before = len((tmp_path / "log").read_text().splitlines()) if (tmp_path / "log").exists() else 0
    assert run(tuned, sae, Counting(tmp_path / "log"), tmp_path / "store") == truth
    said = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert len(said) > before
    assert max(n for line, n in logged(tmp_path / "log").items() if json.loads(line)[0] == "said") == 1
    if "generations" in limit:  # a judge that raises in the middle of a wave has given none of its verdicts
        assert max(logged(tmp_path / "log").values()) == 1
    again = Counting(tmp_path / "none")
    assert run(tuned, sae, again, tmp_path / "store") == truth and not again.done  # a finished run asks nothing at all


def test_a_run_that_was_killed_goes_on_where_it_was(tuned, sae, tmp_path) -> None:
    """SIGKILL, in a process of its own: no handler, no clean-up."""
    truth = run(tuned, sae, Counting(tmp_path / "truth"), None)
    child = os.fork()
    if child == 0:
        try:
            run(
                tuned, sae, Counting(tmp_path / "log", generations=25, how=lambda: os.kill(os.getpid(), signal.SIGKILL)), tmp_path / "store"
            )
        finally:
            os._exit(1)  # a child that raises must not go on as the test run
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert len(logged(tmp_path / "log")) >= 25
    assert run(tuned, sae, Counting(tmp_path / "log"), tmp_path / "store") == truth
    assert max(logged(tmp_path / "log").values()) == 1


def test_without_a_store_everything_is_done_again(tuned, sae, tmp_path) -> None:
    for _ in range(2):
        run(tuned, sae, Counting(tmp_path / "log"), None)
    assert max(logged(tmp_path / "log").values()) >= 2


def test_another_set_up_reuses_what_is_the_same_and_is_recorded(tuned, sae, tmp_path) -> None:
    run(tuned, sae, Counting(tmp_path / "log"), tmp_path / "store")
    more = Counting(tmp_path / "more")
    truth = run(tuned, sae, Counting(tmp_path / "truth"), None, full_grid=True)
    assert run(tuned, sae, more, tmp_path / "store", full_grid=True) == truth and more.done["said"] > 0
    assert not logged(tmp_path / "more").keys() & logged(tmp_path / "log").keys()
    shorter = Counting(tmp_path / "shorter")
    run(tuned, sae, shorter, tmp_path / "store", max_new_tokens=3)  # other decoding: other replies
    assert shorter.done["said"] > 0
    manifests = [json.loads(path.read_text()) for path in (tmp_path / "store").glob("run-*.json")]
    assert sorted((m["settings"]["config"]["full_grid"], m["settings"]["config"]["max_new_tokens"]) for m in manifests) == [
        (False, 3), (False, 4), (True, 4),
    ]  # fmt: skip
    assert all("torch" in m["environment"] and m["first_started"] for m in manifests)


def test_a_changed_adapter_under_the_same_name_gets_new_replies(tuned, sae, tmp_path) -> None:
    first = model_identity(tuned, "tuned")
    run(tuned, sae, Counting(tmp_path / "log"), tmp_path / "store")
    perturb(tuned, "tuned", seed=8)
    other = Counting(tmp_path / "other")
    truth = run(tuned, sae, Counting(tmp_path / "truth"), None)
    assert run(tuned, sae, other, tmp_path / "store") == truth
    asked = {json.loads(line)[1][0] for line in logged(tmp_path / "other") if json.loads(line)[0] == "said"}
    assert "tuned" in asked and model_identity(tuned, "tuned") != first


def test_identity_is_of_contents(tiny, tiny_folder, tmp_path) -> None:
    from blockem_tl import load_model

    tiny.add_adapter("mine", rank=4, alpha=8)
    perturb(tiny, "mine")
    folder = tiny.save_adapter(tmp_path / "a")
    base, tuned = model_identity(tiny, "base"), model_identity(tiny, "mine")
    assert base != tuned
    other = load_model(tiny_folder, device="cpu")
    assert model_identity(other, "base") == base
    other.load_adapter(folder, "another_name")
    assert model_identity(other, "another_name") == tuned
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 16}))
    stronger = load_model(tiny_folder, folder, device="cpu")
    assert model_identity(stronger, "default") != tuned  # the same tensors at twice the strength
    engine = TransformerLensEngine(tiny)
    identities = {identity_of(engine, adapter, max_new_tokens=n) for adapter in ("base", "mine") for n in (5, 6)}
    assert len(identities) == 4

    class Nameless:
        name = "nameless"

        def stream(self, *args, **options):
            raise NotImplementedError

    with pytest.raises(ValueError, match="'nameless' cannot say which weights it runs"):
        identity_of(Nameless(), None)


def test_folders_are_told_apart_by_what_is_in_them(tiny_folder, tmp_path) -> None:
    import shutil

    first = of_folder(tiny_folder)
    copy = shutil.copytree(tiny_folder, tmp_path / "copy")
    assert of_folder(copy) == first
    data = bytearray((copy / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (copy / "model.safetensors").write_bytes(data)
    assert of_folder(copy) != first
    with pytest.raises(ValueError, match="cannot tell which weights 'nobody/nothing' are"):
        of_folder("nobody/nothing")


def test_keys_are_of_contents_not_of_names(tmp_path) -> None:
    kept = CachedReplies(reply_fn=lambda prompts, conditions: [], store=Store(tmp_path / "r.sqlite"), identity="who")

    def key(
        dose: float = 1.0, name: str = "a", *, direction=(1.0, 0.0), site: str = SITE, scale: float = 2.0, text: str = "w1", system=None
    ) -> str:
        steering = Steering(site=site, direction=torch.tensor(direction), dose=dose, scale=scale)
        return kept.key(Condition(name=name, steering=(steering,)), Prompt(id=name, text=text, system=system))

    assert key() == key(name="b") == key(dose=2.0, scale=1.0)
    others = [
        key(dose=-1.0),
        key(direction=(0.0, 1.0)),
        key(site="blocks.2.hook_resid_post"),
        key(text="w2"),
        key(system="w1"),
        key(system=""),
    ]
    assert len({key(), *others}) == 7
    assert replace(kept, identity="other").key(UNSTEERED, PROMPTS[0]) != kept.key(UNSTEERED, PROMPTS[0])


def test_the_same_replies_are_generated_once(tuned, tmp_path) -> None:
    store = Store(tmp_path / "r.sqlite")
    plain = replies_from(tuned, adapter="tuned", max_new_tokens=4, progress=False)
    expected = plain(PROMPTS, [UNSTEERED])
    assert cached(plain, store)(PROMPTS, [UNSTEERED]) == expected and len(store) == len(PROMPTS)
    pinned = cached(replies_from(tuned, max_new_tokens=4, progress=False), store)  # as the model stands now
    with tuned.using("base"):
        assert pinned(PROMPTS, [UNSTEERED]) == expected != replies_from(tuned, max_new_tokens=4, progress=False)(PROMPTS, [UNSTEERED])
    assert len(store) == len(PROMPTS)
