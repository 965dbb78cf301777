"""`import blockem_tl` and every `--help` answer at once, and all names are seen by completion and type checkers all the same."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import blockem_tl
from blockem_tl import cli
from blockem_tl.data import commands

HEAVY = {"torch", "transformers", "transformer_lens", "sae_lens", "peft", "pandas", "matplotlib", "openai", "accelerate"}
STUB = Path(blockem_tl.__file__).with_suffix(".pyi")
HELPS = [
    ["--help"],
    *([name, "--help"] for name in cli.COMMANDS),
    ["data", "--help"],
    *(["data", name, "--help"] for name in commands.COMMANDS),
]


def loaded_by(code: str) -> set[str]:
    """The heavy packages that a fresh Python has loaded after running ``code``."""
    after = f"\nimport sys; print(*({HEAVY!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code + after], capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split())


def test_importing_loads_nothing_heavy() -> None:
    assert loaded_by("import blockem_tl; dir(blockem_tl); blockem_tl.__version__") == set()
    assert {"torch", "transformer_lens"} <= loaded_by("import blockem_tl; blockem_tl.load_model")  # the first use does


@pytest.mark.parametrize("args", [HELPS[0], HELPS[-1]], ids=" ".join)
def test_a_help_loads_nothing_heavy(args: list[str]) -> None:
    assert loaded_by(f"from blockem_tl import cli\ntry: cli.main({args!r})\nexcept SystemExit as end: assert end.code == 0") == set()


def test_no_other_help_does_either() -> None:
    asked = "\n".join(f"try: cli.main({args!r})\nexcept SystemExit as end: assert end.code == 0" for args in HELPS)
    assert loaded_by(f"from blockem_tl import cli\n{asked}") == set()
    assert "torch" in loaded_by("from blockem_tl import cli\ncli.main(['presets'])\nimport blockem_tl.models.load")


def stub_names() -> set[str]:
    tree = ast.parse(STUB.read_text())
    return {alias.asname or alias.name for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names}


def test_every_name_of_the_stub_is_there_and_completes() -> None:
    names = stub_names()
    assert len(names) > 60 and names <= set(dir(blockem_tl)) and names == set(blockem_tl.__all__)
    for name in names:
        assert getattr(blockem_tl, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        blockem_tl.no_such_name  # noqa: B018
    assert STUB.with_name("py.typed").is_file()
