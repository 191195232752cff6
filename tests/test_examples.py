"""Every example runs as a script, from anywhere, without a network, and prints what it promises."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "studies" / "examples"
SCRIPTS = sorted(path.name for path in EXAMPLES.glob("*.py") if path.name != "architectures.py")


def run(name: str, tmp_path: Path) -> list[str]:
    done = subprocess.run([sys.executable, "-W", "error", str(EXAMPLES / name)], capture_output=True, text=True,
                          cwd=tmp_path, env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.slow  # each loads torch, most transformers too
@pytest.mark.parametrize(("name", "n_lines", "last"), [
    ("ouro.py", 4, r"loop 3: 100% of tokens as in the last loop, exit gate 0\.\d\d"),
    ("huginn.py", 15, r"loop 15: relative step \d\.\d{4}, from the last state 0\.0000"),
    ("hrm_text.py", 7, r"h1:    H state to the cosine of -?\d\.\d{3} .*"),
    ("albert.py", 7, r"with the state zeroed after loop 3: +\d+%"),
    ("loopified_llama.py", 3, r"layers 2 to 3, 4 loops: KL from the original \d\.\d{4}, state moved by .*"),
])
def test_an_example_runs(name, n_lines, last, tmp_path):
    lines = run(name, tmp_path)
    assert len(lines) == n_lines
    assert re.fullmatch(last, lines[-1]), lines[-1]
    numbers = re.findall(r"\d+\.\d+", "\n".join(lines))
    assert all(float(number) < 1e3 for number in numbers)


def test_every_example_is_run():
    assert SCRIPTS == ["albert.py", "hrm_text.py", "huginn.py", "loopified_llama.py", "ouro.py"]
    for name in SCRIPTS:
        code = [line for line in (EXAMPLES / name).read_text().split('"""')[2].splitlines() if line.strip()]
        assert len(code) <= 36, f"{name} is an example, to be read at one glance"
