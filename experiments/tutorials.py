"""Do the tutorial notebooks still run? Where they lie, and their outputs are kept: for whoever changed one, or what it uses.

python experiments/tutorials.py --preset organism --names 2_new_analysis 3_patching_sweep
python experiments/tutorials.py --preset smollm2-135m --names 7_eight_billion
"""

import os
import re
import sys
import time
from pathlib import Path
from typing import Any

import nbformat
import tyro
from nbclient import NotebookClient

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "tutorials"
LARGEST = 150_000
"""Bytes of a notebook with its outputs."""
_MACHINE = re.compile(r"/(?:root|home|tmp|work|Users|mnt|var|opt)/\w")


def tutorials() -> list[Path]:
    """All tutorials in their order."""
    return sorted(FOLDER.glob("*.ipynb"))


def run(path: Path, *, preset: str, timeout: int = 1200) -> tuple[Any, float]:
    """The notebook with new outputs, without progress bars, and the seconds that it took.

    Raises:
        CellExecutionError: nbclient's, for a cell that fails.
    """
    notebook = nbformat.read(path, as_version=4)
    started = time.perf_counter()
    environment = {**os.environ, "BLOCKEM_PRESET": preset, "BLOCKEM_PROGRESS": "0", "TQDM_DISABLE": "1"}
    NotebookClient(notebook, timeout=timeout, resources={"metadata": {"path": str(path.parent)}}).execute(env=environment)
    return tidy(notebook), time.perf_counter() - started


def tidy(notebook: Any) -> Any:
    """The notebook without what changes from run to run besides results: times, widget states, random ids in tables."""
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for cell in code_cells(notebook):
        cell.metadata.pop("execution", None)
        for output in cell.outputs:
            if "text/html" in output.get("data", {}):
                output["data"]["text/html"] = re.sub(r"\bT_[0-9a-f]{5}", "T_table", output["data"]["text/html"])
    return notebook


def code_cells(notebook: Any) -> list[Any]:
    """The cells with code."""
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def problems(notebook: Any) -> list[str]:
    """What must not be in a notebook that is published: errors, warnings, paths of a machine, cells that never ran, too large outputs."""
    found, size = [], len(nbformat.writes(notebook).encode())
    if size > LARGEST:
        found.append(f"{size} bytes, expected at most {LARGEST}")
    for number, cell in enumerate(code_cells(notebook), start=1):
        if cell.execution_count != number:
            found.append(f"code cell {number} was run as number {cell.execution_count}")
        for output in cell.outputs:
            if output.output_type == "error" or output.get("name") == "stderr":
                found.append(f"code cell {number}: {output.get('ename', 'stderr')}: {str(output.get('evalue', output.get('text')))[:200]}")
            if match := _MACHINE.search(nbformat.writes(nbformat.v4.new_notebook(cells=[cell]))):
                found.append(f"code cell {number}: a path of a machine, {match.group()!r}")
    return found


def main(names: tuple[str, ...] = (), preset: str = "organism") -> None:
    """Run tutorials and keep their outputs.

    Args:
        names: without .ipynb; all of them by default.
        preset: the setting that they run on.
    """
    for path in tutorials():
        if names and path.stem not in names:
            continue
        before = os.times()
        notebook, seconds = run(path, preset=preset)
        after = os.times()
        busy = after.children_user + after.children_system - before.children_user - before.children_system
        nbformat.write(notebook, path)
        size = f"{path.stat().st_size / 1000:.0f} kB"
        print(f"{path.stem} on {preset}: {seconds / 60:.1f} minutes, {busy / 60:.1f} of a processor, {size}", flush=True)
        for problem in problems(notebook):
            print(f"  {problem}", file=sys.stderr)


if __name__ == "__main__":
    tyro.cli(main)
