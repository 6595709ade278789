"""Reports: made from a run's folder alone, one verdict in both, and a page that opens anywhere."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from support.browser import Browser
from support.cli import assert_refused, verify
from support.full_run import write_with_every_section
from support.tiny_model import write_text, write_tiny_model
from verify.ppl.record import PplRun
from verify.reports.record import load_run, ppl_command

PHONE, DESK = 400, 1200
# Pages are opened as they are, pictures and all.
pytestmark = pytest.mark.pictures


class Ids(HTMLParser):
    """Collects the ids of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [value for name, value in attrs if name == "id" and value]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with two candidates."""
    folder = tmp_path_factory.mktemp("reports")
    model, text = write_tiny_model(folder / "tiny.gguf"), write_text(folder / "text.txt")
    done = verify(
        *("ppl", "-m", str(model), "-f", str(text), "-c", "64", "--chunks", "6", "--device", "cpu"),
        *("--baseline", "eager:block=16", "--candidate", "eager:block=16,kv=2"),
        *("--candidate", "eager:block=16,acc=f16", "--out", str(folder / "run")),
    )
    assert done.returncode == 1, done.stderr
    return folder / "run"


@pytest.fixture(scope="module")
def whole(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of it in which every section has figures, with its reports."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    shutil.copytree(finished, folder)
    write_with_every_section(folder, json.loads((folder / "run.json").read_text()))
    assert verify("report", str(folder)).returncode == 0
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of that folder, to be changed."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


def change(run: Path, **values: Any) -> None:
    path = run / "run.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_reports_are_made_again_to_the_byte(run: Path) -> None:
    before = {name: (run / name).read_bytes() for name in ("report.md", "report.html")}
    for name in before:
        (run / name).unlink()
    done = verify("report", str(run))
    assert done.returncode == 0, done.stderr
    assert "verdict: degraded" in done.stdout
    assert {name: (run / name).read_bytes() for name in before} == before


def test_both_reports_say_the_verdict_first_and_why(run: Path) -> None:
    change(run, verdict="inconclusive", reasons=["a reason & its <cause>"], notes=["something did not run"])
    assert verify("report", str(run)).returncode == 0
    text, page = (run / "report.md").read_text(), (run / "report.html").read_text()
    assert text.splitlines()[0] == "## verify ppl: inconclusive"
    assert text.index("a reason & its <cause>") < text.index("| arm |")
    assert "something did not run" in text
    assert (
        page.index(">inconclusive<") < page.index("a reason &amp; its &lt;cause&gt;") < page.index("<table>")
    )
    assert "<cause>" not in page


def test_the_markdown_is_short_and_names_every_candidate(run: Path) -> None:
    text = (run / "report.md").read_text()
    assert len(text) < 5000
    for pair in json.loads((run / "run.json").read_text())["pairs"]:
        (line,) = [line for line in text.splitlines() if line.startswith(f"| {pair['candidate']} | `eager:")]
        assert line.endswith(f"| {pair['verdict']} |")
        assert f"{pair['distance_ratio']:.3g} (" in line


def test_sections_stand_only_where_the_run_measured_them(finished: Path, whole: Path) -> None:
    titles = ("Among random cuts", "Changed top tokens", "fault, planted")
    page = (finished / "report.html").read_text()
    measured = json.loads((finished / "run.json").read_text())
    for title, key in zip(titles, ("noise", "top1_changes", "power"), strict=True):
        assert (title in page) == bool(measured.get(key))
    page = (whole / "report.html").read_text()
    assert all(title in page for title in titles)
    assert "scale errors planted in the baseline were seen by gain from 1e-05" in page


def test_planted_faults_are_drawn_into_no_picture(run: Path) -> None:
    measured = json.loads((run / "run.json").read_text())
    arms = measured["drift"]["arms"]
    arms.append({**arms[-1], "arm": "power/scale 0.01"})
    change(run, **measured)
    assert verify("report", str(run)).returncode == 0
    assert "power/scale 0.01" not in (run / "report.html").read_text()


def test_numbers_that_are_not_known_are_written_so(run: Path) -> None:
    measured = json.loads((run / "run.json").read_text())
    for arm in measured["arms"]:
        arm |= {"ppl": None, "ppl_se": None, "kld_to_exact_mean": None, "failure": "died: of nothing"}
    for pair in measured["pairs"]:
        missing = ("distance_ratio", "distance_ratio_ci", "dlnppl", "dlnppl_se", "kld_mean", "kld_max")
        pair |= dict.fromkeys(missing)
    change(run, **measured)
    (run / "tokens.parquet").unlink()
    (run / "layers.parquet").unlink()
    assert verify("report", str(run)).returncode == 0
    page = (run / "report.html").read_text()
    assert "failed" in page
    assert "None" not in page
    assert "nan" not in re.sub(r"<[^>]*>", " ", page)


def test_ids_of_a_page_are_its_own(whole: Path, finished: Path, tmp_path: Path) -> None:
    verify("report", str(finished), str(whole), "--out", str(tmp_path / "both"))
    for page in (whole / "report.html", tmp_path / "both/report.html"):
        ids = Ids()
        ids.feed(page.read_text())
        assert len(ids.found) > 4
        assert len(ids.found) == len(set(ids.found))


@pytest.mark.parametrize("width", [PHONE, DESK])
def test_the_page_opens_in_a_browser(whole: Path, browser: Browser, width: int) -> None:
    opened = browser.open(whole / "report.html", width=width)
    assert opened.said == []
    assert opened.requests == []
    assert opened.width == width
    assert opened.scrolls <= width
    # Two of them are perplexity by window and by position.
    assert len(opened.pictures) == 9
    for wide, high, marks in opened.pictures:
        assert wide > 200
        assert high > 50
        assert marks > 10
    assert min(opened.letters) >= 8
    assert "degraded" in opened.text.splitlines()[0]


def test_a_browser_sees_what_is_wrong_with_a_page(browser: Browser, tmp_path: Path) -> None:
    page = tmp_path / "wrong.html"
    page.write_text(
        '<meta name="viewport" content="width=device-width">'
        "<img src='http://192.0.2.1/picture.png'><div style='width: 900px'>wide</div>"
        "<script>console.error('oh no'); undefined_name()</script>"
    )
    opened = browser.open(page, width=PHONE)
    assert len(opened.said) >= 2
    assert opened.requests == ["http://192.0.2.1/picture.png"]
    assert opened.scrolls > PHONE


def test_two_runs_side_by_side(run: Path, finished: Path, browser: Browser, tmp_path: Path) -> None:
    measured = json.loads((run / "run.json").read_text())
    measured["pairs"][0]["distance_ratio"] = 1.234
    measured["settings"]["seed"] = 7
    change(run, **measured)
    out = tmp_path / "both"
    done = verify("report", str(finished), str(run), "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert "| candidate-1: distance ratio |" in done.stdout
    assert "| 1.23 (" in done.stdout
    assert "| seed | 0 | 7 |" in done.stdout
    assert "baseline (eager:block=16): the same bits in A and B, 186 tokens" in done.stdout
    opened = browser.open(out / "report.html", width=PHONE)
    assert (opened.said, opened.requests) == ([], [])
    assert opened.scrolls <= PHONE
    assert len(opened.pictures) >= 8


def test_runs_that_cannot_be_compared_are_said_to_be(run: Path, finished: Path, tmp_path: Path) -> None:
    measured = json.loads((run / "run.json").read_text())
    measured["corpus"] |= {"sha256": "0" * 64, "windows": 3}
    change(run, **measured)
    done = verify("report", str(finished), str(run), "--out", str(tmp_path / "both"))
    assert "not the same text" in done.stdout
    assert "not the same windows" in done.stdout


def test_the_command_makes_the_run_again(finished: Path) -> None:
    run = load_run(finished).run
    assert isinstance(run, PplRun)
    command = ppl_command(run)
    assert command.startswith("verify ppl -m ")
    for words in ("-c 64", "--chunks 6", "--baseline eager:block=16 ", "--candidate eager:block=16,acc=f16"):
        assert words in f"{command} "
    for default in ("--path", "--seed", "--margin", "--memory", "--capture"):
        assert default not in command


def test_what_is_no_run_is_refused(run: Path, tmp_path: Path) -> None:
    assert_refused(verify("report", str(tmp_path / "nowhere")), "nowhere", "no run.json there")
    assert_refused(verify("report", str(run), "--out", str(tmp_path / "x")), "--out")
    (tmp_path / "settings.json").write_text("{}")
    assert_refused(verify("report", str(tmp_path)), "is not finished", "--resume")
    change(run, command="bench")
    assert_refused(verify("report", str(run)), "a run of verify bench")
    change(run, command="diff", pairs=3)
    assert_refused(verify("report", str(run)), "is not what a run leaves")
    change(run, command="ppl", pairs=[])
    (run / "tokens.parquet").write_text("no table")
    assert_refused(verify("report", str(run)), "tokens.parquet", "cannot be read")
    (run / "run.json").write_text("{}")
    assert_refused(verify("report", str(run)), "run.json", "expected an object with")


def test_a_run_json_with_a_key_missing_is_refused(run: Path) -> None:
    measured = json.loads((run / "run.json").read_text())
    del measured["corpus"]
    (run / "run.json").write_text(json.dumps(measured))
    assert_refused(verify("report", str(run)), "run.json", "corpus")
