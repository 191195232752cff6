"""The house's own rules: imports point one way, heavy packages stay where they belong."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ORDER = ("hooks", "probes", "studies", "app")
ONLY_IN = {"streamlit": ("app",), "plotly": ("studies", "app"), "ray": ("studies",)}


def sources() -> list[Path]:
    return [path for package in ORDER for path in sorted((ROOT / package).rglob("*.py"))]


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_one_way(path):
    package = path.relative_to(ROOT).parts[0]
    later = set(ORDER[ORDER.index(package) + 1:])
    assert not imported(path) & later
    for heavy, allowed in ONLY_IN.items():
        assert heavy not in imported(path) or package in allowed, f"{heavy} is imported in {package}"


@pytest.mark.parametrize("path", [*sources(), *sorted((ROOT / "tests").rglob("*.py"))],
                         ids=lambda p: str(p.relative_to(ROOT)))
def test_files_say_what_they_are(path):
    text = path.read_text()
    if text.strip():
        assert ast.get_docstring(ast.parse(text)), "a module starts with its docstring"
    assert path.stem not in {"util", "utils", "helper", "helpers", "misc", "common"}


def test_importing_hooks_stays_light():
    heavy = ("streamlit", "plotly", "ray", "transformer_lens", "transformers", "xarray", "pandas", "sklearn", "zarr")
    code = f"import sys, hooks; print([m for m in {heavy!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


def test_pins_satisfy_what_the_package_asks_for():
    import tomllib

    from packaging.requirements import Requirement

    pins = {}
    for line in (ROOT / "requirements.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            requirement = Requirement(line)
            pins[requirement.name.lower().replace("_", "-")] = next(iter(requirement.specifier)).version
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [*project["dependencies"], *(r for extra in project["optional-dependencies"].values() for r in extra)]
    for requirement in map(Requirement, asked):
        if requirement.name != "loopscope":
            name = requirement.name.lower().replace("_", "-")
            assert name in pins, f"{name} is not pinned"
            assert pins[name] in requirement.specifier
