"""Pages: links lead somewhere, files that are named exist, and the README stays short."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md")), ROOT / "benchmarks/README.md"]
LINK = re.compile(r"\]\((?!https?://|#)([^)#\s]+)")
NAMED = re.compile(r"`((?:docs|benchmarks|tests|verify|kernels|model|data)/[\w/.-]+\.\w+)`")


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_link_is_dead_and_no_file_is_named_that_is_not_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    dead = [link for link in LINK.findall(text) if not (page.parent / link).exists()]
    # What was is named in the changelog by its old place.
    if page.name != "CHANGELOG.md":
        dead += [name for name in NAMED.findall(text) if not (ROOT / name).exists()]
    assert not dead


def test_every_page_is_reached_from_the_readme() -> None:
    reached, todo = set(), [ROOT / "README.md"]
    while todo:
        page = todo.pop()
        if page in reached:
            continue
        reached.add(page)
        text = page.read_text(encoding="utf-8")
        names = [page.parent / link for link in LINK.findall(text)] + [ROOT / n for n in NAMED.findall(text)]
        todo += [name.resolve() for name in names if name.suffix == ".md" and name.exists()]
    assert {p.resolve() for p in (ROOT / "docs").glob("*.md")} <= {p.resolve() for p in reached}


def test_the_readme_is_a_screen_and_a_half() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 110


def test_the_site_shows_every_page() -> None:
    """The nav of mkdocs.yml, and what its hook adds from outside docs/."""
    nav = set(re.findall(r"([\w-]+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE))
    hook = (ROOT / "docs/site/pages_outside.py").read_text(encoding="utf-8")
    outside = set(re.findall(r'": "([\w-]+\.md)"', hook))
    assert nav == {p.name for p in (ROOT / "docs").glob("*.md")} | outside


def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    """`strict` makes a dead link or a missing anchor an error."""
    pytest.importorskip("material", reason="mkdocs-material is not installed: make docs installs it")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert (built.returncode, built.stderr) == (0, "")
    start = (tmp_path / "site/index.html").read_text(encoding="utf-8")
    assert 'href="verdicts.html"' in start and "docs/verdicts.md" not in start
    assert not re.search(r'<(?:script|link)[^>]+(?:src|href)="https?://', start)
