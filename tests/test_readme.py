"""The README does what it says: its examples run as printed, its layout names what exists, tables are current."""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text()


def test_the_examples_run_as_printed():
    ours, others = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
    done = subprocess.run([sys.executable, "-W", "error", "-c", ours], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "relative step of each loop: tensor([" in done.stdout
    assert re.search(r"silencing layer 2's attention in loop 3: tensor\(0\.\d+\)", done.stdout)

    done = subprocess.run([sys.executable, "-c", f"import torch\n{others}"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "loops: [(0, None), (1, 0), (2, 0), (1, 1), (2, 1), (1, 2), (2, 2), (3, None)]" in done.stdout
    assert re.search(r"NLL of the next token at each depth: \[[\d. \n]+\]", done.stdout), done.stdout


def test_the_measurements_are_there_by_name():
    import probes

    section = TEXT.split("## Measurements")[1].split("## Results")[0]
    listed = set(re.findall(r"`(\w+)`", section)) - {"probes", "adopt"}
    assert len(listed) > 20
    assert [name for name in sorted(listed) if not hasattr(probes, name)] == []


def programs(page: Path) -> list[str]:
    """The indented blocks of a page that are Python."""
    blocks = [textwrap.dedent(block) for block in re.findall(r"(?:^(?: {4}.*)?\n)+", page.read_text(), re.MULTILINE)]
    return [block for block in blocks if re.match(r"\s*(from|import) ", block)]


DOCUMENTED = [page for page in sorted(ROOT.glob("docs/*.md")) if programs(page) and page.name != "tutorial.md"]
"""Pages whose programs are run; the tutorial's is, in a test of its own."""


@pytest.mark.slow
@pytest.mark.parametrize("page", DOCUMENTED, ids=lambda page: page.name)
def test_the_examples_of_the_docs_run(page):
    for program in programs(page):
        done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        if "stage_test(" in program:
            assert re.search(r"Sequence: [A-Z?·]{4}\.", done.stdout), done.stdout


@pytest.mark.slow
def test_the_tutorial_has_40_lines_and_prints_what_it_says(tmp_path):
    page = ROOT / "docs" / "tutorial.md"
    [program] = programs(page)
    assert len([line for line in program.splitlines() if line.strip()]) <= 40
    (tmp_path / "zoo").symlink_to(ROOT / "zoo")
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said, printed = re.search(r"```text\n(.*?)```", page.read_text(), re.DOTALL)[1], done.stdout
    number = r"-?\d+\.?\d*"
    assert re.sub(number, "", said).split() == re.sub(number, "", printed).split()
    for one, other in zip(re.findall(number, said), re.findall(number, printed), strict=True):
        assert abs(float(one) - float(other)) <= (0.02 if "." in one else 1)
    assert (tmp_path / "tutorial.html").stat().st_size > 1000


def test_the_docs_have_examples():
    assert {"stage_test.md", "controls.md"} <= {page.name for page in DOCUMENTED}


def test_the_layout_names_files_that_exist():
    for folder, names in re.findall(r"\| `(hooks|probes|studies)/` \| (.*?) \|\n", TEXT):
        for name in re.findall(r"`([a-z_]+/?)`", names):
            path = ROOT / folder / name
            assert path.is_dir() or path.with_suffix(".py").exists(), f"README names {folder}/{name}"


PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("results/*.md")])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        assert target.startswith("http") or (page.parent / target).exists(), f"{page.name} links to {target}"


def test_links_within_the_readme_lead_to_a_heading():
    headings = {line.lstrip("# ").lower().replace(" ", "-") for line in TEXT.splitlines() if line.startswith("#")}
    assert set(re.findall(r"\]\(#([^)]+)\)", TEXT)) <= headings


def test_every_make_target_in_the_readme_exists():
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"`?make ([a-z]+)", TEXT)):
        if target != "a":
            assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), f"make {target}"


def test_the_generated_tables_are_up_to_date():
    from studies.readme import current

    for path, text in current().items():
        assert path.read_text() == text, f"{path.name}: run `python studies/readme.py`"


def test_the_parts_between_markers_are_replaced():
    from studies.readme import between

    once = between("before\n<!-- x: begin -->\nold\n<!-- x: end -->\nafter", "x", "new")
    assert once == "before\n<!-- x: begin -->\nnew\n<!-- x: end -->\nafter"
    assert between(once, "x", "new") == once
    with pytest.raises(ValueError, match="lacks the markers <!-- y: begin -->"):
        between(once, "y", "new")
