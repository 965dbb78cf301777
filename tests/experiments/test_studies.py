"""Every script over a study runs end to end on a tiny random model, so none knows the organism; and none imports another."""

import ast
import importlib
import inspect
import re
import sys
from collections import Counter
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import claims
import pandas as pd
import pytest
import torch
import yaml
from shared import sae_at
from transformers import AutoModelForCausalLM

from blockem_tl import LatentSet
from blockem_tl.presets import PRESETS
from blockem_tl.study.inputs import INPUTS
from blockem_tl.study.options import StudyOptions

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests" / "study"))

import tiny_preset  # noqa: E402

pytestmark = pytest.mark.xdist_group("studies")  # one worker, and so one study

OPTIONS = {
    "quickstart": {"kl_weights": (0.1,)},
    "compare_defences": {
        "lambdas": (0.1,),
        "kl_weights": (0.1,),
        "ldifs": (0.5,),
        "inoculations": ("w1 w2",),
        "preventative": (0.1,),
        "repair": (0.1,),
        "caft": (1,),
        "safe_rows": (0.1,),
        "safelora": (0.5,),
        "unaligned": "before",
    },
    "lambda_sweep": {"freeze_downstream": True},
    "transfer": {"beside_kl": True},
    "real_search": {"size": 3, "fewer": (2,), "group": 1, "nats": 0.5, "others": (1.0,)},
    "set_size": {"sizes": (1, 3), "alone": (2, 3)},
    "real_sites": {"size": 3, "nats": 0.5, "saes": ("blocks.0.hook_resid_post", "blocks.3.hook_resid_post", "wider")},
    "signs": {},
    "latent_sets": {"reem_epochs": 1.0, "strengths": (0.1,)},
    "published_sets": {"reem_epochs": 1.0, "size": 3, "strength": 0.1, "unions": (3, 4), "to": Path("sets")},
    "selection_ablation": {"size": 3, "strengths": (0.1,)},
    "patching_sweep": {"strength": 1.0, "freeze_downstream": True},
    "last_layer": {"last_lambdas": (1.0,)},
    "capacity": {"epochs": 2.0, "freeze_downstream": True},
    "cross_source": {"strengths": (0.1,)},
    "watch": {"every": 1, "steps": 3},
    "attribution": {"epochs": 1.0, "strength": 1.0, "freeze_downstream": True, "verify": 3},
    "blocking_sites": {"epochs": 1.0, "margin": 0.0, "other_sae": "{site}", "other_sae_id": ""},
    "reemergence": {"epochs": 2.0, "every": 1.0, "strengths": (0.1,), "frozen": (0.1,)},
    "real": {"size": 3, "nats": (0.5,), "anchor_nats": (0.5,), "replies": 4},
    "narrow_tasks": {"size": 3},
    "ceiling": {"sizes": (2, 3), "random": (2,), "nats": 0.5},
    "real_reemergence": {"size": 3, "nats": 0.5, "epochs": 2.0, "more": 2, "swept": 6},
}
TABLES = {
    "quickstart": {"arms", "latents", "seeds", "table"},
    "compare_defences": {"arms", "matched", "table", "tried"},
    "lambda_sweep": {"arms", "core", "training"},
    "transfer": {"arms", "means", "table"},
    "set_size": {"arms", "sizes", "table"},
    "signs": {"arms", "table"},
    "latent_sets": {"arms", "sets", "table"},
    "published_sets": {"sets"},
    "selection_ablation": {"arms", "curves", "table"},
    "patching_sweep": {"arms", "patched-plain", "patched-blocked"},
    "last_layer": {"arms", "table"},
    "capacity": {"arms", "capacity", "mean"},
    "cross_source": {"arms", "curves", "overlap", "table"},
    "watch": {"runs"},
    "attribution": {"arms", "candidates", "agreement"},
    "blocking_sites": {"arms", "depth"},
    "reemergence": {"peaks", "curves", "ends", "extended", "shares", "depth", "reconstruction"},
    "real": {"tried", "ceiling", "arms", "lead", "replies", "in-domain", "taught"},
    "real_search": {"arms"},
    "real_sites": {"arms", "carried", "saes"},
    "narrow_tasks": {"shifts", "carriers"},
    "ceiling": {"combinations", "agreement"},
    "real_reemergence": {"epochs", "lead", "patched", "carriers", "shares", "depth"},
}
LAST = "blocks.3.hook_resid_post"
MORE_THAN_TINY = {10, 18}  # claims about domains and set sizes that a tiny preset does not have
NO_STUDIES = {"claims", "tutorials"}  # they measure nothing
UNTIMED = {*NO_STUDIES, "real", "real_reemergence", "real_search", "real_sites"}  # of another model


@pytest.fixture(scope="module")
def shared(tiny_folder, tmp_path_factory):
    """The folder of a study that all scripts share, as under `make reproduce`, so that what they have in common runs once."""
    folder = tmp_path_factory.mktemp("studies")
    saes = {f"blocks.{block}.hook_resid_post": folder / f"blocks.{block}.hook_resid_post" for block in range(4)}
    for site, place in saes.items():
        sae_at(site).save_model(place)
    sae_at(tiny_preset.SITE, seed=1).save_model(folder / "wider")  # another at the preset's own site
    before = AutoModelForCausalLM.from_pretrained(tiny_folder)  # the model before its alignment, for SafeLoRA
    with torch.no_grad():
        for weight in before.parameters():
            weight += 0.01 * torch.randn_like(weight)
    before.save_pretrained(folder / "before")
    found = tiny_preset.preset(tiny_folder, saes[tiny_preset.SITE], lambdas=(0.0, 0.1, 1.0))
    found = replace(found, discovery=replace(found.discovery, n_plus=4, n_minus=4, shortlist_size=2, grid=(0.0, 0.8)))
    last = replace(found, name=f"{tiny_preset.NAME}-last-layer", site=LAST, sae=(str(saes[LAST]), None))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(INPUTS, tiny_preset.NAME, tiny_preset.TinyInputs())
        for preset in (found, last):
            patch.setitem(PRESETS, preset.name, preset)
        patch.chdir(folder)
        yield folder / "study"


@pytest.mark.parametrize("name", list(OPTIONS))
def test_an_option_of_all_experiments_means_the_same_in_each(name: str) -> None:
    """Only the preset and the domain may be set anew: a script's own --sae-id once took the place of the common one."""
    made = importlib.import_module(name).Options.__mro__
    own = {field for kind in made[: made.index(StudyOptions)] for field in inspect.get_annotations(kind)}
    assert own & {field.name for field in fields(StudyOptions)} <= {"preset", "domain"}


@pytest.mark.parametrize("name", ["signs", *(pytest.param(name, marks=pytest.mark.slow) for name in OPTIONS if name != "signs")])
def test_a_script_runs_on_any_preset_and_again_at_once(name: str, shared: Path, tmp_path: Path) -> None:
    script = importlib.import_module(name)
    Path("docs").mkdir(exist_ok=True)
    common: dict[str, Any] = {"preset": tiny_preset.NAME, "seeds": (0, 1), "publish": True, "progress": False, "shared_study": shared}
    options = script.Options(out=tmp_path / "out", **common, **OPTIONS[name])
    script.main(options)
    made = {path: path.stat().st_mtime_ns for folder in (shared, tmp_path) for path in folder.rglob("*.safetensors")}
    first = {path.stem: pd.read_csv(path) for path in (tmp_path / "out").glob("*.csv")}
    assert set(first) == TABLES[name] and all(Path(f"docs/results/{name}-tiny/{one}.md").is_file() for one in first)
    if name == "watch":
        assert len(first["runs"]) == 8 and set(first["runs"]["rows"]) == {"harmful", "harmless"}
    elif name == "ceiling":
        assert first["combinations"].notna().all().all() and len(first["combinations"]) == first["agreement"]["combinations"][0] == 6
    elif name == "real_reemergence":
        assert set(first["epochs"]["run"]) == {"plain", "blocked", "blocked, K extended", "blocked, K extended at random"}
        assert first["patched"]["effect"].notna().all() and set(first["depth"]["run"]) == {"blocked"}
        assert [len(LatentSet.load(path)) for path in shared.glob("seed0/latents/attributed-extended*.json")] == [5, 5]
    elif name == "narrow_tasks":
        tasks = tiny_preset.TinyInputs.domains
        assert (
            set(first["shifts"]["run"]) == {"base", *tasks} == {"base", *first["carriers"]["run"]} and (first["shifts"]["seeds"] == 2).all()
        )
    elif name == "published_sets":
        check_published(first["sets"], Path("sets"))
    else:
        rate, beside = ("prefers_harm", "margin") if name.startswith("real") else ("misaligned", "adherent")
        arms = first[{"real_reemergence": "epochs", "reemergence": "curves"}.get(name, "arms")]
        assert {"run", rate, f"{rate}_low", beside, "test_loss"} <= set(arms)
        assert arms[rate].notna().all() and (arms["n"] == 8).all() and (arms["seeds"] == 2).all()
    if name == "real_sites":
        assert first["carried"]["sae"].str.contains(" + ", regex=False).any()
    check_claims(name, first)
    script.main(options)
    assert made == {path: path.stat().st_mtime_ns for path in made} and made
    for one, frame in first.items():
        pd.testing.assert_frame_equal(frame, pd.read_csv(tmp_path / "out" / f"{one}.csv"), check_exact=True)


def check_published(sets: pd.DataFrame, folder: Path) -> None:
    """Every set has a card that says what it is of and what blocking it did, as the table does; of the second seed by its name."""
    cards = {path.stem: LatentSet.load(path) for path in folder.glob("*.json")}
    assert "finance-validreduc-3" in cards and "finance+reem-4-seed1" in cards and len(cards) == 2 * (len(sets) // 2 - 1)
    for name, k in cards.items():
        run, _, seed = name.partition("-seed")
        row = sets[(sets["run"] == run) & (sets["seed"] == int(seed or 0))].iloc[0]
        about = k.provenance["validated"]
        assert about["blocked"]["misaligned"] == [row["misaligned"], row["misaligned_low"], row["misaligned_high"]]
        assert (about["n"], len(k), about["strength"]) == (row["n"], row["latents"], 0.1) and k.provenance["sae"]["architecture"]
        if "+" not in run and not run.startswith("all"):
            assert set(k.provenance["doses"]) == {str(latent) for latent in k.latents}


def check_claims(name: str, tables: dict[str, pd.DataFrame]) -> None:
    """The rows and columns that claims.yaml asks for are in the tables that the script makes."""
    for claim in yaml.safe_load(claims.CLAIMS.read_text(encoding="utf-8")):
        page, _, table = claim.get("from", "").partition("/")
        if page == f"{name}-{{preset}}" and claim["claim"] not in MORE_THAN_TINY:
            for check in claim["checks"]:
                text, reached = claims.checked(tables[table], check)
                assert check["name"] in text and (0 <= reached <= 1 or pd.isna(reached))


def faults(path: Path) -> list[str]:
    """What a script over a study may not do: be long, import another script, or name the organism but in its docstring's commands."""
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    scripts = {other.stem for other in (ROOT / "experiments").glob("*.py")}
    imported = {alias.name.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {(node.module or "").split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    doc = ast.get_docstring(tree, clean=False) or ""
    body = re.sub(r'preset: str = "organism"', "", text.replace(doc, ""))
    return [
        *(["longer than 100 lines"] if len(text.splitlines()) > 100 else []),
        *(f"imports {other}" for other in sorted(imported & scripts)),
        *(["names the organism"] if "organism" in body.lower() else []),
        *(["no question, command or figure in its docstring"] if not ("?" in doc and f"experiments/{path.name} --preset" in doc) else []),
        *(["no time on the organism in its docstring"] if path.stem not in UNTIMED and "Time on the organism" not in doc else []),
    ]


def test_no_script_imports_another_or_knows_the_organism(tmp_path: Path) -> None:
    found = {path.stem: faults(path) for path in (ROOT / "experiments").glob("*.py")}
    assert {name: wrong for name, wrong in found.items() if wrong} == {}
    assert set(OPTIONS) | NO_STUDIES == set(found)
    bad = tmp_path / "bad.py"
    bad.write_text('"""No question."""\nimport quickstart\nfrom blockem_tl import LatentSet, organism\n' + "\n" * 100)
    assert faults(bad) == [
        "longer than 100 lines",
        "imports quickstart",
        "names the organism",
        "no question, command or figure in its docstring",
        "no time on the organism in its docstring",
    ]


def steps(path: Path) -> list[str]:
    """The names that a script gives its steps, as they are written."""
    calls = (node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call))
    return [ast.unparse(call.args[0]) for call in calls if isinstance(call.func, ast.Attribute) and call.func.attr == "step"]


def twice(paths: list[Path]) -> set[str]:
    """Steps that two scripts name alike, and those whose name cannot be read because it is a variable."""
    found = Counter(name for path in paths for name in set(steps(path)))
    return {name for name, scripts in found.items() if scripts > 1 or not name.startswith(("'", "f'"))}


def test_no_two_scripts_name_a_step_alike(tmp_path: Path) -> None:
    """Scripts share a study, where a step of the same name and of other options is refused, hours after the first began."""
    scripts = sorted((ROOT / "experiments").glob("*.py"))
    assert twice(scripts) == set() and len([name for path in scripts for name in steps(path)]) > 10
    (tmp_path / "another.py").write_text('study.step("real-shares", f)\nstudy.step("mine", f)\nstudy.step(name, f)')
    assert twice([*scripts, tmp_path / "another.py"]) == {"'real-shares'", "name"}
