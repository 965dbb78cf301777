"""The report of a study: everything that is there, in one file that does nothing; read, filtered and clicked in a real Chromium."""

import html
import json
import os
import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pandas as pd
import pytest
import tiny_preset
from shared import sae_at

from blockem_tl import Run, Setting, Study, cli
from blockem_tl.presets import PRESETS
from blockem_tl.saes.latent_set import random_latents
from blockem_tl.study import patching
from blockem_tl.study.inputs import INPUTS
from blockem_tl.study.report import _plain, write_report
from blockem_tl.views import studies
from blockem_tl.views.report import Section
from blockem_tl.views.report import page as page_of

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


class Listener(BaseHTTPRequestHandler):
    """Notes what it is asked for."""

    asked: list[str] = []  # noqa: RUF012 - of all requests

    def do_GET(self) -> None:
        self.asked.append(self.path)
        self.send_error(404)

    def log_message(self, *args) -> None: ...


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Where a page that is not inert would be heard of."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Listener)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def attacks(address: str) -> list[str]:
    return [
        "</script><script>document.title='owned'</script>",
        f"<img src={address}/reply.png onerror=\"document.title='owned'\">",
        "<style>body{display:none}</style><!-- ' \" & $x^2$ \u2028 ]]>",
    ]


def some_latents(setting, point):
    return random_latents(setting.sae, 4, seed=point.seed)


@pytest.fixture(scope="module")
def preset(tiny_folder, tmp_path_factory) -> Iterator[None]:
    folder = tmp_path_factory.mktemp("sae")
    sae = sae_at(tiny_preset.SITE)
    sae.cfg.metadata.neuronpedia_id = "tiny/1-res"
    sae.save_model(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(INPUTS, tiny_preset.NAME, tiny_preset.TinyInputs())
        patch.setitem(PRESETS, tiny_preset.NAME, tiny_preset.preset(tiny_folder, folder))
        patch.setenv("BLOCKEM_PROGRESS", "0")
        yield


@pytest.fixture(scope="module")
def study(preset, tmp_path_factory, address) -> Path:
    """A whole small study: base, plain and two strengths, two seeds, latents, a patching sweep; three replies are an attack."""
    out = tmp_path_factory.mktemp("whole") / "study"
    with Study(out, Setting.of(tiny_preset.NAME), seeds=(0, 1), n_rows=16, progress=False) as made:
        made.train([Run(defence="base"), Run()])
        made.latents("k", some_latents)
        made.train([Run(defence="block", strength=weight, latents="k") for weight in (0.01, 1.0)])
        made.table()
        where = {"split": "final", "when": "prompt", "sites": [tiny_preset.SITE]}
        made.step("patched", patching.patched_replies, made.points([Run()]), **where)
    path = out / "steps" / "replies-final" / "seed0" / "plain.parquet"
    frame = pd.read_parquet(path).sort_values("prompt_id", ignore_index=True)
    frame.loc[range(3), "reply"] = attacks(address)
    frame.to_parquet(path)
    return out


@pytest.fixture(scope="module")
def report(study, tmp_path_factory) -> Path:
    path, missing = write_report(study, tmp_path_factory.mktemp("report") / "report.html")
    assert missing == []
    return path


def section(page: str, name: str) -> str:
    return page.split(f'<section id="{name}">')[1].split("</section>")[0]


# ------------------------------------------------------------------------------------------------ what is in it


def test_a_whole_study_is_shown_with_its_own_numbers(report, study) -> None:
    page = report.read_text()
    found = pd.concat(map(pd.read_parquet, (study / "steps" / "replies-final").rglob("*.parquet")))
    plain = found[(found["run"] == "plain") & (found["label"] != "UNPARSED")]
    rate = 100 * plain["label"].isin(["4", "5"]).mean()
    row = next(row for row in section(page, "summary").split("<tr>") if row.startswith("<td>plain</td>"))
    assert f">{rate:.1f} [" in row and "<td>blocked, λ = 0.01, k</td>" in section(page, "summary")
    assert section(page, "trade-off").count("<svg") >= 3 and "along the strength of block, k" in section(page, "trade-off")
    assert section(page, "latents").count('href="https://www.neuronpedia.org/tiny/1-res/') == 2 * 4
    assert "<svg" in section(page, "training") and "<svg" in section(page, "patching")
    assert section(page, "patching").count(f"<td>{tiny_preset.SITE}</td>") == 1
    assert 'style="' not in page and "http://" not in page.replace("http://www.w3.org/", "")


def test_stages_beside_each_other_are_one_report(study, tmp_path, monkeypatch, capsys) -> None:
    """The folders of `blockem finetune` and so on in one folder; a sweep that was broken off shows the sites that it has."""
    frame = pd.read_parquet(study / "steps" / "replies-final" / "seed0" / "plain.parquet")
    for kind in ("training", "evaluation", "patching"):
        (tmp_path / kind).mkdir()
        (tmp_path / kind / f"{kind}.json").write_text('{"preset": "tiny"}')
    shutil.copy(study / "seed0" / "plain" / "run.json", tmp_path / "training")
    (tmp_path / "evaluation" / "steps").mkdir()
    frame.to_parquet(tmp_path / "evaluation" / "steps" / "replies-final-1.parquet")
    rates = pd.DataFrame({"run": ["plain"], "misaligned": [0.5], "misaligned_low": [0.25], "misaligned_high": [0.75]})
    rates.to_csv(tmp_path / "evaluation" / "rates-final.csv")
    shutil.copytree(study / "patched", tmp_path / "patching" / "patched")
    shutil.copytree(tmp_path / "evaluation", tmp_path / "again")  # the same adapter: shown once
    shutil.copytree(tmp_path / "evaluation", tmp_path / "other")  # another one whose folder has the same name
    (tmp_path / "other" / "evaluation.json").write_text('{"preset": "tiny", "adapter": "1234"}')
    cli.main(["report", str(tmp_path)])
    said = capsys.readouterr().out
    assert re.findall("missing: .*", said) == [
        "missing: patching: patching is not finished (there is no patched.csv): run the same command again"
    ]
    page = (tmp_path / "report.html").read_text()
    assert re.findall("<tr><td>(.*?)</td>", section(page, "summary")) == ["plain", "other: plain"]
    assert "50.0 [25.0, 75.0]" in section(page, "tables-and-figures-of-the-run")
    assert section(page, "patching").count(f"<td>{tiny_preset.SITE}</td>") == 1 and "<svg" in section(page, "training")


@pytest.mark.slow
def test_what_the_commands_write_is_shown(preset, tmp_path, capsys) -> None:
    """The stages, one after the other, into folders of one folder; and the sweep, with the tables and figures of its page."""
    at, words = tmp_path / "stages", ["--split", "final", "in-domain", "--pairs"]
    for line in (
        ["finetune", "tiny", at / "plain"],
        ["discover", "tiny", at / "plain", at / "k"],
        ["evaluate", "tiny", at / "plain", at / "rates", *words],
        ["evaluate", "tiny", "base", at / "base", *words[:3]],
        ["patch", "tiny", at / "plain", at / "patched", "--when", "prompt"],
        ["patch", "tiny", at / "plain", at / "pairs", "--by", "pairs"],
        ["sweep", "tiny", tmp_path / "sweep", "--lambdas", 0.1, 1, "--n-rows", 16],
        ["report", at],
        ["report", tmp_path / "sweep"],
    ):
        cli.main([*map(str, line)])
    assert "missing:" not in capsys.readouterr().out
    page = (at / "report.html").read_text()
    assert "Replies, final prompts" in section(page, "summary") and "Pairs, in-domain prompts" in section(page, "summary")
    assert "k/latents.json" in section(page, "latents") and "<svg" in section(page, "training")
    assert section(page, "patching").count(".hook_resid_post</td>") == 4 + 8 and section(page, "patching").count("<svg") == 2
    assert "pairs/patched.csv" in section(page, "tables-and-figures-of-the-run")
    page = (tmp_path / "sweep" / "report.html").read_text()
    assert "along the strength of block, k" in section(page, "trade-off")
    own = section(page, "tables-and-figures-of-the-run")
    assert own.count("data:image/png;base64,") == 2 and "arms.csv" in own


def test_a_study_that_still_runs_is_shown(study, tmp_path, monkeypatch) -> None:
    """A folder that a run is filling may be gone when it is looked into."""
    out = tmp_path / "run"
    shutil.copytree(study, out)
    (out / "seed0" / "plain" / "checkpoints" / ".epoch-9.abcd.unfinished").mkdir(parents=True)
    scandir = os.scandir

    def gone(path="."):
        if str(path).endswith(".unfinished"):
            raise FileNotFoundError(path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", gone)
    with pytest.raises(FileNotFoundError):
        list(os.scandir(out / "seed0" / "plain" / "checkpoints" / ".epoch-9.abcd.unfinished"))  # the twin
    assert write_report(out)[1] == []


def test_what_is_missing_or_broken_is_named_and_the_rest_shown(study, tmp_path) -> None:
    shutil.copytree(study, tmp_path / "study")
    about = json.loads((tmp_path / "study" / "study.json").read_text())
    (tmp_path / "study" / "study.json").write_text(json.dumps({**about, "format": "0"}))
    (tmp_path / "study" / "seed1" / "plain" / "run.json").unlink()
    (tmp_path / "study" / "seed1" / "latents" / "k.json").write_text('{"format": 99}')
    steps = tmp_path / "study" / "steps"
    (steps / "replies-final" / "seed1" / "base.parquet").unlink()
    broken = steps / "losses" / "seed0" / "plain.parquet"
    broken.write_bytes(broken.read_bytes()[:200])
    path, missing = write_report(tmp_path)  # of the page above it, as `blockem sweep` writes it
    for line in (
        "study.json is of format '0', this version writes '1'",
        "seed1/plain: training is not finished",
        "trained runs: 1 of 3 are not there for seed1: plain",
        "steps/replies-final: 1 of 4 are not there for seed1: base",
        "study/steps/losses/seed0/plain.parquet cannot be shown",
        "study/seed1/latents/k.json cannot be shown",
    ):
        assert [line in one for one in missing].count(True) == 1, (line, missing)
        assert html.escape(line) in path.read_text()
    assert len(missing) == 6
    assert "<td>plain</td>" in section(path.read_text(), "summary") and "seed0/latents/k.json" in path.read_text()


def test_a_folder_that_is_no_study_is_refused_and_nothing_is_written(study, tmp_path) -> None:
    (tmp_path / "notes.txt").touch()
    for words in ([tmp_path], [tmp_path / "nowhere"], [study, "--out", tmp_path]):
        with pytest.raises(SystemExit, match="expected the folder of a study.* got|expected the name of a file to write"):
            cli.main(["report", *map(str, words)])
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"] and not (study / "report.html").exists()


class Tags(HTMLParser):
    """The names of all tags that begin."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        assert not [name for name, _ in attrs if name.startswith("on")], (tag, attrs)
        self.found.append(tag)


def test_no_text_of_others_is_markup() -> None:
    """Names of runs, judges and files, captions, cells, labels: all escaped."""
    attack = """"'></text></td></script><script>alert(1)</script><img src=x onerror=alert(1)> $x_$ ${title}"""
    bars = pd.DataFrame({"run": [attack], "misaligned": 0.5, "misaligned_low": 0.4, "misaligned_high": 0.6})
    figure = studies.side_by_side(_plain(bars), columns=["misaligned"])
    one = Section(title=attack, none=attack, tables={attack: [{attack: attack}]}, figures={attack: figure})
    replies = pd.DataFrame(
        [{"split": attack, "prompt_id": attack, "category": attack, "prompt": attack, "run": attack, "seed": 0, "reply": attack}]
    )
    replies = replies.assign(labels=[(attack,)])
    replies.attrs["judges"] = [attack]
    text, tags = page_of(attack, [one, Section(title="b", none=attack)], replies, missing=[attack]), Tags()
    tags.feed(text)
    assert tags.found.count("script") == 2 and "img" not in tags.found and "svg" in tags.found
    planted = Tags()
    planted.feed(f"<p>{attack}".replace(" onerror=alert(1)", ""))
    assert {"script", "img"} <= set(planted.found)


# ------------------------------------------------------------------------------------------------ in a browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed here")
    sync = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with sync.sync_playwright() as player:
        sandbox = [] if os.geteuid() else ["--no-sandbox"]  # Chromium has none for root
        found = player.chromium.launch(executable_path=CHROMIUM, args=sandbox)
        yield found
        found.close()


@pytest.fixture
def opened(browser) -> Iterator[Any]:
    """A function that opens a page; its other requests are in ``.requests``, its complaints in ``.said``."""
    pages = []

    def open_page(path: Path, **options: Any) -> Any:
        page = browser.new_page(**options)
        pages.append(page)
        page.requests, page.said = [], []
        page.on("request", lambda request: page.requests.append(request.url) if request.url != path.as_uri() else None)
        page.on("console", lambda message: page.said.append(message.text))
        page.goto(path.as_uri())
        return page

    yield open_page
    for page in pages:
        page.close()


def ready(page: Any) -> Any:
    page.wait_for_selector("html[data-ready]")
    return page


def count(page: Any) -> tuple[int, ...]:
    """Replies shown and of all, prompts shown and of all."""
    return tuple(map(int, re.findall(r"\d+", page.inner_text("#count"))))


def labels(page: Any) -> set[str]:
    return set(page.locator("#cards .chip").all_text_contents())


def test_replies_are_filtered_by_split_prompt_label_run_and_text(report, opened) -> None:
    page = ready(opened(report))
    shown, everything, prompts, _ = count(page)
    assert shown == everything == 2 * 2 * 8 * 4 + 2 * 2 * 8 and prompts == 16  # splits, seeds, prompts, runs; seeds, patches
    page.select_option("#label", "5")
    assert 0 < count(page)[0] < everything and labels(page) == {"5"}
    page.select_option("#label", "high")
    assert labels(page) == {"4", "5"}
    page.check("#beside")
    assert {"4", "5"} < labels(page) and page.locator(".beside").count() > 0
    page.click("#clear")
    page.select_option("#split", "in-domain")
    assert count(page) == (64, everything, 8, 16)
    page.select_option("#split", "final")
    page.select_option("#prompt", label=page.locator("#prompt option").nth(1).inner_text())
    assert count(page)[2] == 1
    page.click("#clear")
    page.click("#invert")
    page.get_by_label("blocked, λ = 0.01, k").check()
    assert count(page)[0] == 32 and set(page.locator("#cards h4").all_text_contents()) == {"blocked, λ = 0.01, k"}
    page.click("#clear")
    page.fill("#search", "OWNED")
    assert count(page)[0] == 2
    page.fill("#search", "no such words")
    assert count(page)[0] == 0 and page.inner_text("#place") == "no reply fits"


def test_everything_is_reached_by_keyboard(report, opened) -> None:
    page = ready(opened(report))

    def focused() -> str:
        return page.evaluate("document.activeElement.id || document.activeElement.querySelector('h3')?.textContent || ''")

    page.keyboard.press("/")
    assert focused() == "search"
    page.keyboard.type("jkn")  # letters that are keys elsewhere are letters here
    assert page.input_value("#search") == "jkn" and count(page)[0] == 0
    page.keyboard.press("Escape")
    assert page.input_value("#search") == "" and count(page)[0] == count(page)[1]
    page.keyboard.press("Tab")
    assert focused() == "beside"
    page.keyboard.press("j")
    first = focused()
    page.keyboard.press("j")
    second = focused()
    page.keyboard.press("k")
    assert first and second and first != second and focused() == first
    page.keyboard.press("n")
    assert page.inner_text("#place").startswith("prompts 11 to 16") and page.locator("#next").is_disabled()
    page.keyboard.press("p")
    assert page.inner_text("#place").startswith("prompts 1 to 10")
    page.focus("#runs input")
    page.keyboard.press("Space")
    assert count(page)[0] < count(page)[1]


def contrast(page: Any, selector: str) -> float:
    """Of the text's colour and the page's ground, as WCAG reckons it."""
    found = page.evaluate(
        "s => [getComputedStyle(document.querySelector(s)).color, getComputedStyle(document.body).backgroundColor]", selector
    )
    lights = []
    for colour in found:
        parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
        linear = [part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        lights.append(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2])
    return (max(lights) + 0.05) / (min(lights) + 0.05)


def test_light_and_dark_are_both_readable(report, opened) -> None:
    grounds = []
    for scheme in ("light", "dark"):
        page = ready(opened(report, color_scheme=scheme))
        grounds.append(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        for selector in ("h1", ".faint", "nav a", ".chip.high", ".chip.odd", "td", "#count"):
            assert contrast(page, selector) >= 4.5, (scheme, selector)
        ink = page.evaluate("getComputedStyle(document.querySelector('svg text')).fill")
        assert ink == page.evaluate("getComputedStyle(document.body).color")
    assert grounds[0] != grounds[1]


def test_replies_stay_text_and_nothing_leaves(report, opened, address) -> None:
    page = ready(opened(report))
    page.fill("#search", "owned")
    assert sorted(page.locator("#cards .reply").all_text_contents()) == sorted(attacks(address)[:2])
    page.fill("#search", "display:none")
    assert page.locator("#cards .reply").all_text_contents() == attacks(address)[2:]
    assert page.title() == "study: tiny" and page.locator("#cards :is(img, script, style)").count() == 0
    assert page.requests == [] and page.said == []
    for attempt in (f"fetch('{address}/fetch')", "document.body.innerHTML = '<b>'", f"new Image().src = '{address}/image'"):
        done = page.evaluate(f"(async () => {{ try {{ await ({attempt}); return 'done' }} catch (error) {{ return error.name }} }})()")
        assert done == ("done" if "Image" in attempt else "TypeError"), attempt
    page.wait_for_timeout(200)
    assert Listener.asked == [] and sum("Content Security Policy" in line for line in page.said) >= 2


def test_even_markup_that_got_through_would_not_run(report, opened, address, tmp_path) -> None:
    """The policy holds by itself; without it the same page is an attack that succeeds, so the test can see one."""
    script, image, _ = attacks(address)
    text = report.read_text().replace("<main>", f"<main>{script.removeprefix('</script>')}{image}", 1)
    (tmp_path / "held.html").write_text(text)
    (tmp_path / "open.html").write_text(re.sub('<meta http-equiv="Content-Security-Policy"[^>]*>', "", text))
    held = ready(opened(tmp_path / "held.html"))
    held.wait_for_timeout(200)
    assert held.title() == "study: tiny" and Listener.asked == []
    free = ready(opened(tmp_path / "open.html"))
    free.wait_for_timeout(200)
    assert free.title() == "owned" and Listener.asked == ["/reply.png"]
