"""Rules of the layout: imports point one way, heavy packages stay where they belong, one name is one thing."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterable, Iterator
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


def modules() -> dict[str, Path]:
    """Sources by the name under which they are imported."""
    return {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
            for path in sources()}


def at_import(nodes: Iterable[ast.AST]) -> Iterator[str]:
    """What a module imports when it is imported, or for its types alone; not what its functions import."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield from (node.module, *(f"{node.module}.{alias.name}" for alias in node.names))
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from at_import(ast.iter_child_nodes(node))


def test_no_imports_run_in_a_circle():
    """Not those under TYPE_CHECKING either: two files that cannot be told apart are one."""
    known = modules()
    asks = {name: {other for other in at_import(ast.parse(path.read_text()).body) if other in known and other != name}
            for name, path in known.items()}
    while free := {name for name, others in asks.items() if not others}:   # Kahn: what is left asks in a circle
        asks = {name: others - free for name, others in asks.items() if name not in free}
    assert not asks, f"these import each other: {asks}"


def test_a_circle_would_be_found():
    code = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from a.b import c\ndef f():\n    import late\n"
    assert set(at_import(ast.parse(code).body)) == {"typing", "typing.TYPE_CHECKING", "a.b", "a.b.c"}


def test_scripts_and_questions_are_where_they_are_looked_for():
    """Each question's folder has some of the same files, and a script in studies/ that asks it."""
    parts = {"__init__", "subjects", "others", "pretrained", "measure", "judge", "figures", "page"}
    studies = ROOT / "studies"
    for folder in sorted(path.parent for path in (studies / "questions").glob("*/page.py")):
        own = {path.stem for path in folder.glob("*.py")}
        assert own <= parts, f"{folder} has {own - parts}"
        assert (studies / f"{folder.name}.py").is_file()
    for script in studies.glob("*.py"):
        if "tyro.cli" in script.read_text():
            tree = ast.parse(script.read_text())
            assert any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in tree.body), script


def public_names(path: Path) -> list[str]:
    """Classes and functions that a module makes for others."""
    return [node.name for node in ast.parse(path.read_text()).body
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")]


def test_one_name_is_one_thing():
    """`main` starts a script, and what a file is called after (`judge.judge`) may be so in each question."""
    owners: dict[str, list[str]] = {}
    for module, path in modules().items():
        for name in public_names(path):
            if name not in ("main", path.stem):
                owners.setdefault(name, []).append(module)
    twice = {name: found for name, found in owners.items() if len(found) > 1}
    assert not twice, f"two things of one name: {twice}"


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
