"""The package's own code, read: nothing that unpickles, runs foreign code, unpacks archives or listens to the network."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CODE = [*sorted((ROOT / "blockem_tl").rglob("*.py")), *sorted((ROOT / "experiments").rglob("*.py"))]
TESTS = sorted((ROOT / "tests").rglob("*.py"))

UNPICKLES = re.compile(r"(^|\.)(pickle|cPickle|cloudpickle|dill|joblib|shelve|marshal|jsonpickle)(\.|$)")
CALLS = ("read_pickle", "eval", "exec", "system", "popen", "extractall", "unpack_archive", "unsafe_load", "full_load")
ALLOWED = {"blockem_tl/study/executors.py": ["ray.cloudpickle"]}
"""Ray's workers get functions of a script from the process that started them: a running process, never a file."""


def faults(tree: ast.AST) -> Iterator[str]:
    """What must not be there, as it is written."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            yield from (name for name in names if UNPICKLES.search(name))
        elif isinstance(node, ast.Call):
            yield from _of_call(node)


def _of_call(node: ast.Call) -> Iterator[str]:
    called, given = ast.unparse(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords if word.arg}
    name = called.rpartition(".")[2]
    texts = [part.value for part in node.args if isinstance(part, ast.Constant) and isinstance(part.value, str)]
    if name in ("import_module", "__import__"):
        yield from (text for text in texts if UNPICKLES.search(text))
    if called == "torch.load" and given.get("weights_only") != "True":
        yield f"{called} without weights_only=True"
    if called in ("yaml.load", "yaml.load_all") and "Safe" not in given.get("Loader", ""):
        yield called
    if name in CALLS and not (name == "eval" and "." in called):  # model.eval() sets a mode
        yield called
    yield from (f"{called}({word}={value})" for word, value in given.items() if (word, value) in FORBIDDEN)
    if "from_pretrained" in name and given.get("trust_remote_code", "False") != "False":
        yield f"{called}(trust_remote_code={given['trust_remote_code']})"


FORBIDDEN = [("allow_pickle", "True"), ("weights_only", "False"), ("trust_remote_code", "True"), ("shell", "True"), ("verify", "False")]


@pytest.mark.parametrize("path", CODE, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_code_unpickles_or_runs_what_a_file_says(path: Path) -> None:
    found = list(faults(ast.parse(path.read_text())))
    assert found == ALLOWED.get(path.relative_to(ROOT).as_posix(), [])


@pytest.mark.parametrize(
    "planted",
    [
        "import pickle",
        "from joblib import load",
        "from dill.source import getsource",
        "import_module('cloudpickle')",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path, allow_pickle=True)",
        "pd.read_pickle(path)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "AutoModel.from_pretrained(name, trust_remote_code=given)",
        "yaml.load(text, Loader=yaml.Loader)",
        "yaml.unsafe_load(text)",
        "eval(text)",
        "exec(text)",
        "os.system(text)",
        "subprocess.run(text, shell=True)",
        "archive.extractall(folder)",
        "shutil.unpack_archive(path)",
        "requests.get(url, verify=False)",
    ],
)
def test_what_is_planted_is_found(planted: str) -> None:
    assert len(list(faults(ast.parse(planted)))) >= 1


def test_what_is_harmless_is_left_alone() -> None:
    text = (
        "model.eval(); torch.load(p, weights_only=True); np.load(p, mmap_mode='r'); yaml.safe_load(t); yaml.load(t, Loader=yaml.SafeLoader)"
    )
    assert list(faults(ast.parse(text))) == []


# ------------------------------------------------------------------------------------------------ servers

LOOPBACK = ("'127.0.0.1'", "'localhost'", "'::1'")
STARTS = ("HTTPServer", "ThreadingHTTPServer", "TCPServer", "start_server", "create_server", "bind")


def hosts(tree: ast.AST) -> Iterator[str]:
    """The addresses at which servers are started."""
    for node in ast.walk(tree):
        if (isinstance(node, ast.Call) and (name := ast.unparse(node.func)).rpartition(".")[2] in STARTS) or (
            isinstance(node, ast.Call) and name.endswith("super().__init__") and node.args and isinstance(node.args[0], ast.Tuple)
        ):
            yield ast.unparse(node)


def test_every_server_listens_on_loopback() -> None:
    found = [(path.name, text) for path in [*CODE, *TESTS] for text in hosts(ast.parse(path.read_text()))]
    assert len(found) >= 5
    assert [one for one in found if not any(host in one[1] for host in LOOPBACK)] == []
    planted = list(hosts(ast.parse("ThreadingHTTPServer(('0.0.0.0', 0), Handler); asyncio.start_server(f, '', 80)")))
    assert len(planted) == 2 and not any(host in text for text in planted for host in LOOPBACK)


# ------------------------------------------------------------------------------------------------ what SECURITY.md says

NAMED = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")


def without_test(page: str) -> list[str]:
    """Rows of the page's table of promises that name no test, or one that is not there."""
    rows = [line for line in page.splitlines() if line.startswith("| ") and not line.startswith("| promise")]
    there = {
        row: [f"def {name}(" in (ROOT / file).read_text() for file, name in NAMED.findall(row) if (ROOT / file).is_file()] for row in rows
    }
    return [row for row in rows if not there[row] or not all(there[row])]


def test_every_promise_names_a_test_that_is_there() -> None:
    page = (ROOT / "SECURITY.md").read_text()
    assert len(set(NAMED.findall(page))) >= 8
    assert without_test(page) == []
    assert len(without_test("| promise | test |\n| one | |\n| two | `tests/security/test_code_scan.py::test_gone` |\n")) == 2
