"""Latent sets and adapters go to the hub and come back: real huggingface_hub, in a process of its own, against a server on loopback."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import Hub, serving

from blockem_tl import LatentSet, organism

ROOT = Path(__file__).parents[2]
CARD = ROOT / "latents/organism/finance-20.json"

PUSH = """
import torch
from blockem_tl import Blocking, LatentSet, evaluate, generate, load_model, load_sae, organism, push_adapter, pull_adapter
sae = load_sae("organism")
latent_set = LatentSet.load(CARD, sae)
print(latent_set.push_to_hub("me/finance-20", token="hf_secret"))
back = LatentSet.from_hub("me/finance-20", sae)
assert back == latent_set and back.provenance == latent_set.provenance
model = load_model("organism")
model.add_adapter("mine", rank=4)
torch.manual_seed(0)
for parameter in model.adapter_parameters("mine"):
    parameter.data.normal_(std=0.2)
prompts = organism.prompts("final")[:8]
found = evaluate(model, organism.OrganismJudge(), prompts, adapter="mine", max_new_tokens=20, progress=False)
push_adapter(model, "mine", "me/adapter", base="organism-base/tiny", data="finance rows", latent_set=latent_set, evaluations={"final": found},
    defences=[Blocking(latent_set=latent_set, sae=sae, weight=2.0)], token="hf_secret")
folder = pull_adapter("me/adapter")
mine, theirs = (generate(model, prompts, adapter=a, max_new_tokens=20, progress=False) for a in ("mine", folder))
assert [r.reply for r in mine] == [r.reply for r in theirs]
base = generate(model, prompts, adapter="base", max_new_tokens=20, progress=False)
assert [r.reply for r in mine] != [r.reply for r in base]
"""


@pytest.fixture
def hub():
    with serving() as server:
        yield server


def run(hub: Hub, home: Path, code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run code in a process whose hub is this server."""
    here = {"HF_ENDPOINT": hub.address, "HF_HUB_OFFLINE": "0", "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": ""}
    code = f"CARD = {str(CARD)!r}\n{code}"
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **here, **environment}, capture_output=True, text=True, timeout=300, cwd=ROOT
    )


def test_a_latent_set_and_an_adapter_go_up_and_come_back(hub, tmp_path) -> None:
    done = run(hub, tmp_path, PUSH)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == f"{hub.address}/me/finance-20"
    assert set(hub.repositories) == {"me/finance-20", "me/adapter"}
    latents, adapter = hub.repositories["me/finance-20"], hub.repositories["me/adapter"]
    card = latents["README.md"].decode()
    assert card.startswith("---\nlibrary_name: blockem_tl\n") and "LatentSet.from_hub" in card
    assert LatentSet.load(CARD).sae_fingerprint in card and "| 284 | 1 |" in card
    card = adapter["README.md"].decode()
    for said in (
        "organism-base/tiny",
        "finance rows",
        "block (weight 2.0)",
        "20 latents",
        "| final (n = 8) | misalignment | organism-exact |",
    ):
        assert said in card
    assert json.loads(adapter["adapter_config.json"])["base_model_name_or_path"] == "organism-base/tiny"
    assert {"adapter_model.safetensors", "latent_set.json"} <= set(adapter)
    everything = b"".join(content for files in hub.repositories.values() for content in files.values())
    assert b"hf_secret" not in everything and str(organism.ARTEFACTS).encode() not in everything
    assert {"Bearer hf_secret"} == {token for verb, path, token in hub.seen if verb == "POST"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("code", "refuse", "environment", "said"),
    [
        ("LatentSet.from_hub('me/nothing')", False, {}, "ConnectionError: hub: cannot get me/nothing/latent_set.json: .*are you logged in"),
        ("LatentSet.load(CARD).push_to_hub('me/x')", True, {}, "ConnectionError: hub: cannot push to me/x: .*403"),
        ("LatentSet.load(CARD).push_to_hub('me/x')", False, {"HF_HUB_OFFLINE": "1"}, "hub: cannot push to me/x: .*HF_HUB_OFFLINE"),
        ("LatentSet.from_hub('not a name')", False, {}, "ValueError: hub: expected a repository as user/name, got 'not a name'"),
        ("pull_adapter('me/half')", False, {}, "ValueError: hub: me/half holds no adapter in peft's format: it lacks adapter_model"),
    ],
)
def test_what_cannot_be_had_says_so(hub, tmp_path, code, refuse, environment, said) -> None:
    hub.refuse = refuse
    hub.repositories["me/half"] = {"adapter_config.json": b"{}"}
    done = run(hub, tmp_path, f"from blockem_tl import LatentSet, pull_adapter\n{code}", **environment)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode != 0
    assert re.search(said, done.stderr[-1500:].replace("\n", " ")), last
    assert "me/x" not in hub.repositories


@pytest.mark.slow
def test_another_sae_is_refused(hub, tmp_path) -> None:
    made_with = LatentSet.load(CARD).sae_fingerprint
    hub.repositories["me/other"] = {"latent_set.json": CARD.read_bytes().replace(made_with.encode(), b"0" * len(made_with))}
    done = run(hub, tmp_path, "from blockem_tl import LatentSet, load_sae\nLatentSet.from_hub('me/other', load_sae('organism'))")
    assert done.returncode != 0 and "made with another SAE" in done.stderr
