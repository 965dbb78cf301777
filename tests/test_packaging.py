"""The package as people install it: sdist and wheel in an empty environment, outside of the checkout; uv.lock, version and citation agree."""

import re
import shutil
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import pytest
import tomllib
import yaml
from packaging.requirements import Requirement

import blockem_tl

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
TORCH = re.search(r"^TORCH := (\S+)", (ROOT / "Makefile").read_text(), re.MULTILINE)[1]
MOST_MB = 25
pytestmark = pytest.mark.xdist_group("packaging")  # built once
USE = """
import blockem_tl
from blockem_tl import LatentSet, Setting, generate, organism
assert "site-packages" in blockem_tl.__file__, blockem_tl.__file__
setting = Setting.of("organism")
replies = generate(setting.model, setting.prompts("core")[:2], max_new_tokens=20, progress=False)
assert all(reply.reply for reply in replies) and len(LatentSet.load("organism/finance-20", setting.sae)) == 20
assert len(Setting.of("smollm2-135m").rows()) > 400
from blockem_tl.judging.rubrics import load_rubrics
from blockem_tl.data.public import catalogue
assert load_rubrics() and catalogue()
print("works", blockem_tl.__version__)
"""


def test_the_version_is_the_same_everywhere() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == blockem_tl.__version__
    assert f"## [{blockem_tl.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


def unlocked(project: dict, lock: dict) -> list[str]:
    """Requirements of the project, its extras included, that no locked version satisfies."""
    locked: dict[str, list[str]] = {}
    for package in lock["package"]:
        locked.setdefault(package["name"], []).append(package.get("version", ""))
    wanted = [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
    found = [Requirement(line) for line in wanted if not line.startswith("blockem-tl")]
    names = {requirement: re.sub(r"[-_.]+", "-", requirement.name).lower() for requirement in found}
    return [str(r) for r in found if not any(r.specifier.contains(version) for version in locked.get(names[r], []))]


def test_the_lock_holds_what_the_project_asks_for() -> None:
    lock = tomllib.loads((ROOT / "uv.lock").read_text())
    assert unlocked(PROJECT["project"], lock) == []
    asked = {**PROJECT["project"], "dependencies": ["torch>=99", "no-such-package"]}
    assert unlocked(asked, lock) == ["torch>=99", "no-such-package"]


def test_workflows_and_templates_are_yaml_that_names_what_is_there() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    runs = [step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step]
    made = {target for run in runs if run.startswith("make ") for target in run.split()[1:]}
    assert made and made <= targets
    assert {word for run in runs for word in run.split() if word.startswith("tests/") and not (ROOT / word).exists()} == set()
    assert workflow["jobs"]["tests"]["strategy"]["matrix"]["python"] == ["3.10", "3.11", "3.12", "3.13"]
    for path in (ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml"):
        assert yaml.safe_load(path.read_text())


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> dict[str, Path]:
    """Of a copy, into which no test beside this one writes; from the setuptools of this environment, without the network."""
    out, source = tmp_path_factory.mktemp("dist"), tmp_path_factory.mktemp("source") / "blockem_tl"
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    for name in filter(None, listed):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, source / name, follow_symlinks=False)
    done = subprocess.run([sys.executable, "-m", "build", "--no-isolation", "--outdir", out, source], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return {path.suffix: path for path in out.iterdir()}


@pytest.mark.slow
def test_wheel_and_sdist_hold_the_data_and_nothing_else(built) -> None:
    names = zipfile.ZipFile(built[".whl"]).namelist()
    assert not [name for name in names if not name.startswith(("blockem_tl/", "blockem_tl-"))]
    for part in (
        "py.typed",
        "__init__.pyi",
        "data/catalogue.yaml",
        "advice/finance.yaml",
        "saes/published/organism/finance-20.json",
        "organism/artefacts/base/model.safetensors",
    ):
        assert f"blockem_tl/{part}" in names
    with tarfile.open(built[".gz"]) as sdist:
        assert any(name.endswith("/pyproject.toml") for name in sdist.getnames())
    size = built[".whl"].stat().st_size / 1e6
    print(f"wheel {size:.1f} MB")
    assert size <= MOST_MB


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_it_works_in_an_empty_environment_outside_of_the_checkout(built, tmp_path) -> None:
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    start = time.monotonic()
    for arguments in ([TORCH], [TORCH, str(built[".whl"])]):
        subprocess.run([python, "-m", "pip", "install", "--quiet", *arguments], check=True, cwd=tmp_path)
    print(f"installed in {time.monotonic() - start:.0f} s")
    for package in (None, built[".gz"]):  # the wheel, then the sdist in its place
        if package is not None:
            subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", "--force-reinstall", package], check=True, cwd=tmp_path)
        done = subprocess.run([python, "-c", USE], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0 and f"works {blockem_tl.__version__}" in done.stdout, done.stderr
        shown = subprocess.run([python.with_name("blockem"), "--version"], cwd=tmp_path, capture_output=True, text=True, check=True)
        assert shown.stdout.strip() == f"blockem_tl {blockem_tl.__version__}"
