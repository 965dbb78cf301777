"""The house of DESIGN.md: a module imports only from floors below its own, and stages never import each other."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "blockem_tl"

# Floors, lowest first; a toolkit, composed or command module may import those before it in its own list, a stage only lower floors.
TOOLKIT = [
    "embedded",
    "records",
    "databases",
    "statistics",
    "hooks",
    "lora",
    "models",
    "saes",
    "prompts",
    "sources",
    "latents",
    "reading",
    "scale",
    "conditions",
    "kv_slots",
    "batch_size",
    "decoding",
    "spans",
    "prefill",
    "generation",
    "certainty",
    "outcomes",
    "replies",
    "references",
    "defence",
]
STAGES = ["diffing", "screening", "calibration", "training", "evaluation", "defences", "monitor", "judging", "patching", "rerouting"]
COMPOSED = ["reconstruction", "discovery", "doses", "panel", "export", "capacity", "extension"]
VIEWS = ["plots", "report"]
ENDS = ["presets", "organism", "engines"]
COMMANDS = ["doctor", "cli"]


def rank(module: str) -> int:
    if module == "types":
        return 0
    if module in TOOLKIT:
        return 1 + TOOLKIT.index(module)
    for floor, members in ((200, COMPOSED), (400, COMMANDS)):
        if module in members:
            return floor + members.index(module)
    for floor, members in ((100, STAGES), (100, VIEWS), (300, ENDS)):
        if module in members:
            return floor
    raise AssertionError(f"blockem_tl/{module} is on no floor: add it to tests/test_layers.py and docs/architecture.md")


def imports_of(path: Path) -> set[str]:
    """Top-level names inside blockem_tl that a file imports; '' stands for the package root itself."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "blockem_tl":
            parts = node.module.split(".")[1:]
            for name in [parts[0]] if parts else [alias.name for alias in node.names]:
                found.add(name if (PACKAGE / name).exists() or (PACKAGE / f"{name}.py").exists() else "")
        elif isinstance(node, ast.Import):
            found |= {(alias.name.split(".") + [""])[1] for alias in node.names if alias.name.split(".")[0] == "blockem_tl"}
    return found


def violations(module: str, imported: set[str]) -> list[str]:
    return [name or "the package root" for name in imported if name != module and (not name or rank(name) >= rank(module))]


FILES = [path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_downwards(path: Path) -> None:
    module = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    assert violations(module, imports_of(path)) == []


def test_the_check_can_fail() -> None:
    assert violations("hooks", {"discovery"}) == ["discovery"]
    assert violations("screening", {"calibration"}) == ["calibration"]  # stages never import each other
    assert violations("hooks", {""}) == ["the package root"]
    with pytest.raises(AssertionError, match="on no floor"):
        rank("attic")


@pytest.mark.parametrize("module", VIEWS)
def test_views_need_no_torch(module: str) -> None:
    names = {
        (alias.name if isinstance(node, ast.Import) else node.module or "").split(".")[0]
        for node in ast.walk(ast.parse((PACKAGE / f"{module}.py").read_text()))
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for alias in node.names
    }
    assert "torch" not in names and "transformer_lens" not in names
