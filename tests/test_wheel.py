"""The wheel holds what the packages need: every file of theirs, the theme, the icon, the types, the data."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("hooks", "probes", "studies", "app")
pytestmark = pytest.mark.slow


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder.parent)) for path in folder.rglob("*")
            if path.is_file() and path.suffix != ".pyc" and "__pycache__" not in path.parts}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that nothing is written to the sources; without a network."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for package in PACKAGES:
        shutil.copytree(ROOT / package, source / package, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    done = subprocess.run([sys.executable, "-m", "pip", "wheel", str(source), "--no-deps", "--no-build-isolation",
                           "--no-index", "--quiet", "--wheel-dir", str(target)], capture_output=True, text=True,
                          check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (made,) = target.glob("*.whl")
    return made


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("installed")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def test_the_wheel_holds_every_file_of_the_packages_and_nothing_else(installed: Path) -> None:
    expected = set().union(*(files(ROOT / package) for package in PACKAGES))
    there = {str(path.relative_to(installed)) for path in installed.rglob("*") if path.is_file()}
    metadata = {name for name in there if name.startswith("loopscope-")}
    assert there - metadata == expected
    for name in (*(f"{package}/py.typed" for package in PACKAGES), "app/icon.svg", "app/.streamlit/config.toml",
                 "studies/tasks/data/sudoku6.npz", "studies/tasks/data/sudoku9.npz", "studies/tasks/data/sotu.txt.xz",
                 "studies/tasks/data/bpe2048.json", "app/views/verdict.py", "studies/examples/ouro.py"):
        assert name in expected, f"{name} has moved"


def run(installed: Path, code: str, cwd: Path, **environment: str) -> str:
    """``code`` in a process that sees the installed packages only, from ``cwd``."""
    done = subprocess.run([sys.executable, "-c", f"import sys; sys.path[0] = {str(installed)!r}\n{code}"], text=True,
                          capture_output=True, cwd=cwd, check=False,
                          env={**os.environ, "PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1", **environment})
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_installed_tasks_find_their_data(installed: Path, tmp_path: Path) -> None:
    code = """
from pathlib import Path
import studies.tasks
from studies.tasks import Sudoku, Text
assert Path(studies.tasks.__file__).is_relative_to(sys.path[0])
for task in (Sudoku(size=6), Sudoku(size=9), Text(length=32)):
    print(task.name, tuple(task.sample(2, seed=0, split="test").tokens.shape))
"""
    assert run(installed, code, tmp_path).split("\n")[:3] == ["sudoku (2, 36)", "sudoku (2, 81)", "text (2, 32)"]


def test_the_installed_packages_look_for_models_and_results_in_the_current_folder(installed: Path,
                                                                                 tmp_path: Path) -> None:
    code = """
from pathlib import Path
from app.data import results_folder, runs_folder, zoo_folder
from studies.results import RESULTS
from studies.zoo import ZOO, names
print(ZOO, RESULTS, zoo_folder(), results_folder(), runs_folder(), *names())
"""
    (tmp_path / "zoo").symlink_to(ROOT / "zoo")
    said = run(installed, code, tmp_path).split()
    assert said[:5] == ["zoo", "results", "zoo", "results", "runs"]
    assert "automaton-loop" in said[5:]
    from studies.zoo import ZOO
    assert ZOO == ROOT / "zoo"   # a checkout's own, wherever it is called from


def test_the_installed_explorer_has_its_theme_and_draws(installed: Path, tmp_path: Path) -> None:
    code = """
from pathlib import Path
import app
from streamlit import config
from streamlit.testing.v1 import AppTest
main = Path(app.__file__).with_name("main.py")
assert main.is_relative_to(sys.path[0])
config._main_script_path = str(main)
config.get_config_options(force_reparse=True)
print(config.get_option("theme.primaryColor"), config.get_option("server.address"))
test = AppTest.from_file(str(main), default_timeout=600).run()
assert not test.exception, test.exception
test = test.switch_page("views/lens.py").run()
assert not test.exception, test.exception
print(len(test.get("plotly_chart")) > 0)
"""
    asked = tomllib.loads((ROOT / "app" / ".streamlit" / "config.toml").read_text())
    said = run(installed, code, tmp_path, LOOPSCOPE_ZOO=str(ROOT / "zoo"), LOOPSCOPE_RESULTS=str(ROOT / "results"))
    assert said.split() == [asked["theme"]["primaryColor"], asked["server"]["address"], "True"]


def test_the_metadata_caps_no_torch_that_is_served(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        metadata = Parser().parsestr(archive.read(name).decode())
    asked = {r.name: r.specifier for r in map(Requirement, metadata.get_all("Requires-Dist"))}
    for version in ("2.13.0", "2.14.1", "2.15.0", "3.0.0"):
        assert version in asked["torch"]
    assert "2.12.1" not in asked["torch"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert metadata["Version"] == project["version"]


def test_git_knows_what_a_build_leaves_behind(tmp_path: Path) -> None:
    """build/ and dist/ beside the packages are ignored, and the packages' own files are not."""
    if shutil.which("git") is None:
        pytest.skip("needs git")
    shutil.copy(ROOT / ".gitignore", tmp_path / ".gitignore")
    subprocess.run(["git", "init", "--quiet", str(tmp_path)], check=True)
    left = ["build/lib/hooks/__init__.py", "dist/loopscope-0.1.0-py3-none-any.whl", "loopscope.egg-info/PKG-INFO"]
    kept = sorted(set().union(*(files(ROOT / package) for package in PACKAGES)))
    done = subprocess.run(["git", "-C", str(tmp_path), "check-ignore", *left, *kept], capture_output=True, text=True,
                          check=False)
    assert done.stdout.split() == left
