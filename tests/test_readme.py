"""The README does what it says: its example runs as printed, its map names what exists."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text()


def test_the_ten_lines_run_as_printed():
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "relative step of each loop: tensor([" in done.stdout
    assert re.search(r"silencing layer 2's attention in loop 3: tensor\(0\.\d+\)", done.stdout)


def test_the_map_names_files_that_exist():
    for folder, names in re.findall(r"\| `(hooks|probes|studies)/` \| (.*?) \|\n", TEXT):
        for name in re.findall(r"`([a-z_]+/?)`", names):
            path = ROOT / folder / name
            assert path.is_dir() or path.with_suffix(".py").exists(), f"README names {folder}/{name}"


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", TEXT):
        assert target.startswith("http") or (ROOT / target).exists(), f"README links to {target}"


def test_every_make_target_in_the_readme_exists():
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"`?make ([a-z]+)", TEXT)):
        if target != "a":
            assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), f"make {target}"


def test_the_generated_tables_are_up_to_date():
    from studies.readme import current

    assert current() == TEXT, "run `python studies/readme.py`"
