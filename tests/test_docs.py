"""Every code block of README and docs runs, and every command line that the project shows is one that its parser takes."""

import functools
import importlib
import importlib.util
import re
import runpy
import shlex
import shutil
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
import tomllib
import tyro

from blockem_tl import cli
from blockem_tl.data import commands

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

# A page's hidden `<!-- setup ... -->` comments make what its blocks talk about; `<!-- test: slow -->` stands before a block of minutes,
# `<!-- test: vllm -->` before one that needs vLLM. All of them run from top to bottom in one namespace, as a reader would run them.
PART = re.compile(
    r"^<!-- setup\n(?P<setup>.*?)^-->|(?:^<!-- test: (?P<mark>\w+) -->\n)?^```python\n(?P<block>.*?)^```", re.MULTILINE | re.DOTALL
)
REPLACED = "instead"  # a setup may say which words (addresses of servers, say) are other ones here


def parts(page: Path) -> list[tuple[int, str, str]]:
    """(line, mark, code) of all that runs; a setup's mark is "setup"."""
    text = page.read_text()
    found = []
    for match in PART.finditer(text):
        group = "setup" if match["setup"] is not None else "block"
        line = text.count("\n", 0, match.start(group)) + 1
        found.append((line, "setup" if group == "setup" else match["mark"] or "", match[group]))
    return found


def run_page(page: Path, marks: set[str]) -> None:
    names: dict = {"__name__": "a_page"}
    for line, mark, code in parts(page):
        if mark in marks:
            for shown, real in names.get(REPLACED, {}).items():
                code = code.replace(shown, real)
            exec(compile("\n" * (line - 1) + code, str(page), "exec"), names)


def cases() -> list:
    found = []
    for page in PAGES:
        marks = {mark for _, mark, _ in parts(page)} - {"setup"}
        name = page.relative_to(ROOT).with_suffix("").as_posix().removeprefix("docs/")
        found += [pytest.param(page, mark, id=f"{name}-{mark or 'blocks'}", marks=[pytest.mark.slow] if mark else []) for mark in marks]
    return found


@pytest.mark.parametrize(("page", "mark"), cases())
def test_a_page_runs(page: Path, mark: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if mark == "vllm" and importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is not installed here: `make test-vllm` runs this page in .venv-vllm")
    shutil.copytree(ROOT / "latents", tmp_path / "latents")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BLOCKEM_DATA", str(tmp_path / "cache"))
    run_page(page, {"setup", "", mark})
    plt.close("all")


def test_a_block_that_no_longer_works_is_noticed(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "<!-- setup\nn = 1\ninstead = {'old': 'n'}\n-->\n```python\nassert old == 1\n```\n```python\nimport blockem_tl\nblockem_tl.speak\n```\n"
    )
    with pytest.raises(AttributeError, match="speak") as caught:
        run_page(page, {"setup", ""})
    assert caught.traceback[-2].lineno == 9  # the traceback names the page's own line (counted from 0)
    assert len([page for page in PAGES if parts(page)]) >= 6


# ------------------------------------------------------------------------------------------------------------------ commands

QUOTED = re.compile(r"`+([^`\n]+)`+|^    ((?:make|python|blockem|pip) [^\n#]*)", re.MULTILINE)
COMMAND = re.compile(r"^(?:[A-Z_]+=\S+ )*(make|python3?|blockem|pip) ")
VALUES = {"S": "0", "PRESET": "organism", "{seed}": "0", "{port}": "8000"}  # in place of the words that stand for a value
FOREIGN = {"vllm.entrypoints.openai.api_server"}  # other people's programs


def commands_in(text: str) -> set[str]:
    shown = {next(filter(None, groups)).strip() for groups in QUOTED.findall(text)}
    return {command for command in shown if COMMAND.match(command)}


def shown_commands() -> list[str]:
    files = [*PAGES, ROOT / "CONTRIBUTING.md", *(ROOT / "experiments").rglob("*.py"), *(ROOT / "blockem_tl").rglob("*.py")]
    return sorted(set().union(*(commands_in(path.read_text()) for path in files)))


class ParsedError(Exception):
    """The parser took the command line."""


def parse_script(path: str, args: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a script up to the end of its parsing."""
    real = tyro.cli

    def parse(*given, **options):
        real(*given, args=args, **options)
        raise ParsedError

    monkeypatch.setattr(tyro, "cli", parse)
    with pytest.raises(ParsedError):
        if path == "-m":
            module, args = args[0], args[1:]
            monkeypatch.delitem(sys.modules, module, raising=False)
            runpy.run_module(module, run_name="__main__")
        else:
            monkeypatch.setattr(sys, "path", [str((ROOT / path).parent), *sys.path])
            runpy.run_path(str(ROOT / path), run_name="__main__")


def parse_blockem(args: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def parsed(function):
        @functools.wraps(function)
        def stop(*_, **__):
            raise ParsedError

        return stop

    monkeypatch.setattr(cli, "COMMANDS", {name: parsed(function) for name, function in cli.COMMANDS.items()})
    monkeypatch.setattr(cli, "DATA_COMMANDS", {name: parsed(function) for name, function in commands.COMMANDS.items()})
    named = len(args) == 1 and args[0] in {*cli.COMMANDS, "data"} - {"presets"}  # `blockem judge`: the command, not a call
    with pytest.raises((ParsedError, SystemExit)) as caught:
        cli.main([*args, "--help"] if named else args)
    assert caught.type is ParsedError or caught.value.code == 0, args


def check_command(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    words = [VALUES.get(word, word) for word in shlex.split(command) if word != "..."]
    while re.match(r"^[A-Z_]+=", words[0]):
        words.pop(0)
    program, *args = words
    if program == "make":
        makefile = (ROOT / "Makefile").read_text()
        known = set(re.findall(r"^([\w-]+):|^([A-Z]+ \?=)", makefile, re.MULTILINE))
        asked = {(arg, "") if "=" not in arg else ("", f"{arg.split('=')[0]} ?=") for arg in args}
        assert asked <= known, f"{command}: the Makefile has {sorted(known)}"
    elif program == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        wanted = re.fullmatch(r"blockem-tl\[([\w,]+)\]", args[-1])
        others = {re.split(r"[\[<>=;]", one)[0] for extra in extras.values() for one in extra}  # a package that an extra has
        known = set(wanted[1].split(",")) <= set(extras) if wanted else args[-1] in others
        assert args[0] == "install" and known, f"{command}: the extras are {sorted(extras)}"
    elif program == "blockem":
        parse_blockem(args, monkeypatch)
    elif not (args[0] == "-m" and args[1] in FOREIGN):
        parse_script(args[0], args[1:], monkeypatch)


@pytest.mark.parametrize("command", shown_commands())
def test_a_command_is_one_that_its_parser_takes(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check_command(command, monkeypatch)


@pytest.mark.parametrize(
    "command",
    [
        "make coffee",
        "make reproduce SEDES=3",
        'pip install "blockem-tl[everything]"',
        "pip install blockem",
        "blockem judge a.jsonl b.jsonl --modle M",
        "blockem data fetch",
        "python experiments/patching_sweep.py --splitt final",
        "blockem patch organism results/plain results/p --site a",
        "python -m blockem_tl.organism.build --seed x",
        "python experiments/no_such.py",
    ],
)
def test_a_wrong_command_is_noticed(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises((AssertionError, SystemExit, FileNotFoundError)):
        check_command(command, monkeypatch)
