"""Pages that are made from `run.json` alone: one design, in a browser, without a person's folders."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.blank_pictures import BlankPictures
from support.browser import Browser
from support.cli import assert_refused, verify
from verify.commands import COMMANDS
from verify.judge.words import words_of
from verify.reports import writing
from verify.reports.glossary import GLOSSARY, glossary_table, with_words
from verify.reports.page import Page, Section, page_html, page_markdown
from verify.reports.pages import PAGES
from verify.reports.record import OF_JSON
from verify.reports.templating import without_home

KERNELS = Path(__file__).parents[2] / "support/user_kernels.py"
LOG = """
| PP | TG | N_KV | T_PP s | S_PP t/s | T_TG s | S_TG t/s |
|----|----|------|--------|----------|--------|----------|
"""
WIDTHS = 400, 1280


def sweep_log(path: Path, factor: float) -> Path:
    rows = [
        f"| 512 | 128 | {n} | {1 + n / 5e4:.3f} | 512 | {factor * (8 + n / 1e4):.3f} | 16 |"
        for n in range(0, 4096, 512)
    ]
    path.write_text(LOG + "\n".join(rows) + "\n")
    return path


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, blank_pictures: BlankPictures) -> dict[str, Path]:
    """A run of each command that is quick, its pictures drawn."""
    base = tmp_path_factory.mktemp("pages")
    a, b = sweep_log(base / "a.md", 1), sweep_log(base / "b.md", 1.1)
    asked = {
        "sweep": ("sweep", str(a), str(b)),
        "identify": ("identify", "eager:block=32", "--n-kv", "64", "--n-q", "1", "--device", "cpu"),
        "props": (
            *("props", f"py:{KERNELS}::last_key_dropped", "--law", "within-budget", "--law", "two-runs"),
            *("--law", "sinks", "--examples", "2", "--device", "cpu"),
        ),
        "diff": (
            *("diff", "--shape", "6/2x16", "--n-kv", "33,70", "--inputs", "gaussian,peaked"),
            *("--device", "cpu", "--rows", "8", "--baseline", "eager", "--candidate", "eager:kv=2"),
        ),
    }  # fmt: skip
    for name, words in asked.items():
        with blank_pictures.drawing():
            done = verify(*words, "--out", str(base / name))
        assert done.returncode in (0, 1, 3) and f"report: {base / name}" in done.stdout, done.stderr
    return {name: base / name for name in asked}


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


def test_a_page_a_command_whose_folder_can_be_read() -> None:
    assert tuple(PAGES) == OF_JSON and set(PAGES) <= {*COMMANDS, "ppl-only"}


@pytest.mark.parametrize("name", ["sweep", "identify", "props", "diff"])
def test_reports_say_the_verdict_what_it_means_and_the_command(name: str, folders: dict[str, Path]) -> None:
    folder = folders[name]
    page, text = ((folder / file).read_text() for file in ("report.html", "report.md"))
    run = json.loads((folder / "run.json").read_text())
    expected = {
        "sweep": "slower", "identify": "identified", "props": "broken", "diff": run.get("verdict")
    }[name]  # fmt: skip
    told = words_of(name)[expected]
    assert text.startswith(f"## verify {name}: {expected}\n")
    assert f">{expected.replace(' ', '-')}" in page or f">{expected}<" in page
    for words in (told.means, told.not_said, told.next_step):
        assert words in text
    assert f"    {run['again']}\n" in text and run["again"].startswith(f"verify {name} ")
    assert "--out" not in run["again"]
    done = verify("report", str(folder))
    assert done.returncode == 0 and f"verdict: {expected}" in done.stdout
    assert (folder / "report.md").read_text() == text


def test_a_broken_law_has_its_command(folders: dict[str, Path]) -> None:
    run = json.loads((folders["props"] / "run.json").read_text())
    (law,) = (law for law in run["laws"] if law["name"] == "within-budget")
    text = (folders["props"] / "report.md").read_text()
    assert law["state"] == "broken" and law["again"] in text and law["statement"] in text


def test_words_lead_to_their_meanings_in_the_same_file(folders: dict[str, Path]) -> None:
    for name, folder in folders.items():
        page = (folder / "report.html").read_text()
        leads, told = re.findall(r'href="#(word-[^"]+)"', page), re.findall(r'<dt id="([^"]+)"', page)
        assert leads and sorted(leads) == sorted(told) and len(set(told)) == len(told), name
        assert "<details><summary>Words</summary>" in page


def test_words_in_code_and_pictures_are_left_alone() -> None:
    page = "<h1>a gain</h1><pre>a <b>row</b></pre><svg><text>KLD</text></svg><p>R = 3, kv parts, r = 3</p>"
    assert re.sub(r" title=\"[^\"]*\"", "", with_words(page).partition("\n<details")[0]) == page.replace(
        "r = 3", '<a class="word" href="#word-r">r</a> = 3'
    )
    assert with_words("<p>nothing</p>") == "<p>nothing</p>"


def test_the_glossary_of_the_pages_is_that_of_the_reports() -> None:
    page = (Path(__file__).parents[3] / "docs/glossary.md").read_text(encoding="utf-8")
    assert page.endswith("\n\n" + glossary_table())
    shown = verify("help", "words").stdout
    assert all(word.name in shown for word in GLOSSARY) and max(map(len, shown.splitlines())) < 80


def test_an_interrupt_at_report_time_keeps_what_was_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a command that cannot be gone on with: its record is there, and what makes the reports is said."""
    a, b = sweep_log(tmp_path / "a.md", 1), sweep_log(tmp_path / "b.md", 1.1)
    out = tmp_path / "run"

    def interrupted(*_: Any, **__: Any) -> str:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(writing, "page_html", interrupted)
        done = verify("sweep", str(a), str(b), "--out", str(out))
    said = f"verify: what was found is kept, its reports are made by: verify report {out}\n"
    assert (done.returncode, done.stderr.count("\n")) == (130, 2) and said in done.stderr
    assert not (out / "report.html").exists()
    again = verify("report", str(out))
    assert again.returncode == 0 and "verdict: slower" in again.stdout and (out / "report.html").is_file()


@pytest.mark.pictures
@pytest.mark.parametrize("width", WIDTHS)
def test_pages_fit_a_phone_and_a_desk(width: int, folders: dict[str, Path], browser: Browser) -> None:
    for name, folder in folders.items():
        verify("report", str(folder))
        opened = browser.open(folder / "report.html", width=width)
        assert (opened.said, opened.requests) == ([], []), name
        assert opened.scrolls <= width, name
        assert len(opened.pictures) >= {"diff": 5, "sweep": 2, "props": 0, "identify": 0}[name]
        assert opened.text.splitlines()[0].startswith(f"verify {name}: "), name


def test_runs_of_a_diff_side_by_side(folders: dict[str, Path], tmp_path: Path) -> None:
    here = str(folders["diff"])
    done = verify("report", here, here, here, "--out", str(tmp_path / "three"))
    assert "## verify report: 3 runs of verify diff" in done.stdout
    assert "| eager:kv=2: 6/2x16 at 70 keys: err/budget | " in done.stdout
    refused = verify("report", here, str(folders["sweep"]), "--out", str(tmp_path / "other"))
    assert_refused(refused, "diff and sweep", "expected runs of one command")


def test_a_folder_that_holds_something_is_refused_before_anything_is_measured(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    for command in (("identify", "eager"), ("props", "eager"), ("judge", str(KERNELS))):
        assert_refused(verify(*command, "--out", str(tmp_path)), "expected a new or an empty folder")


def test_no_home_folder_and_no_user_name_stand_in_a_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/srv/people/alice")
    monkeypatch.setenv("USER", "alice")
    said = [
        "/srv/people/alice/models/a.gguf", "/home/bob/text", "/Users/carol/x.py::attend",
        "/data/alice/b.gguf", "C:\\Users\\dave\\c.gguf",
        "/root/kernel.py", "/srv/people/alice2/d", "/chroot/e", "malice",
    ]  # fmt: skip
    assert [without_home(text) for text in said] == [
        "~/models/a.gguf", "~/text", "~/x.py::attend", "/data/$USER/b.gguf",
        "~\\c.gguf", "~/kernel.py", "/srv/people/alice2/d", "/chroot/e", "malice",
    ]  # fmt: skip
    section = Section(heading=said[0], said=[said[1]], code=[said[3]])
    page = Page(
        command="diff", verdict="broken", reasons=said, sections=[section], facts=[("model", said[0])]
    )
    for text in (page_html(page), page_markdown(page)):
        assert "alice/" not in text and "/home/" not in text and "~/models/a.gguf" in text


def test_markup_in_a_run_stays_text(folders: dict[str, Path], tmp_path: Path) -> None:
    run: dict[str, Any] = json.loads((folders["identify"] / "run.json").read_text())
    (tmp_path / "run.json").write_text(
        json.dumps({**run, "spec": "<b>x</b>", "contradictions": ["<i>y</i>"]})
    )
    assert verify("report", str(tmp_path)).returncode == 0
    page = (tmp_path / "report.html").read_text()
    assert "<b>x" not in page and "&lt;i&gt;y" in page and "contradicts itself" in page
