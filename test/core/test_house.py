"""The floors of the house hold: who may import whom, and no circles.

Launch: python -m pytest test/core/test_house.py
"""

import importlib.util
import subprocess
import sys

import pytest
from helpers.paths import ROOT, SCRIPT

pytestmark = pytest.mark.fast


@pytest.fixture(scope="module")
def house():
    spec = importlib.util.spec_from_file_location("house", SCRIPT / "house.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_no_import_runs_up_and_modules_import_each_other_in_no_circle(house):
    imports = house.imports_of(ROOT)
    assert imports == {"upwards": [], "circles": []}


def test_every_room_is_on_a_floor(house):
    """A room that no contract names would be free to import anything."""
    ringx_floors, apps_floors = house.floors_of(ROOT)
    rooms = {path.stem for path in (ROOT / "ringx").iterdir() if not path.name.startswith("_")}
    assert {f"ringx.{room}" for room in rooms} == set(ringx_floors)
    apps = {path.parent.name for path in (ROOT / "apps").glob("*/__init__.py")}
    assert {f"apps.{app}" for app in apps} | {"ringx"} == set(apps_floors)


def test_no_function_is_complex(house):
    files = house.python_files(ROOT)
    assert house.complex_functions(ROOT, files) == []


def test_the_measure_sees_what_it_is_made_for(house, tmp_path):
    """An import upwards, a circle, a long line and a complex function are found."""
    package = tmp_path / "ringx"
    (tmp_path / "apps").mkdir()
    (package / "low").mkdir(parents=True)
    for file in ("apps/__init__.py", "ringx/__init__.py", "ringx/low/__init__.py"):
        (tmp_path / file).write_text("")
    (package / "high.py").write_text("from .low import deep\n")
    (package / "low" / "deep.py").write_text("def f():\n    from .. import high\n")
    (tmp_path / "pyproject.toml").write_text(
        "[[tool.importlinter.contracts]]\n"
        'type = "layers"\ncontainers = ["ringx"]\nlayers = ["high", "low"]\n'
    )
    branches = "".join(f"    if x == {i}:\n        return {i}\n" for i in range(11))
    (package / "low" / "knot.py").write_text(f"def knot(x):\n{branches}    return {'1' * 100}\n")
    knot = package / "low" / "knot.py"
    assert house.imports_of(tmp_path) == {
        "upwards": ["ringx.low.deep -> ringx.high"],
        "circles": [["ringx.high", "ringx.low.deep"]],
    }
    assert house.complex_functions(tmp_path, [knot]) == ["ringx/low/knot.py:1 knot (12)"]
    assert house.count(knot)["long lines"] == 1


def test_no_submodule_bears_the_name_of_a_public_function():
    """``ringx.attention`` is a function, whatever has been imported."""
    script = (
        "import pkgutil, ringx\n"
        "names = {m.name for m in pkgutil.iter_modules(ringx.__path__)}\n"
        "functions = {n for n in ringx.__all__ if callable(getattr(ringx, n))}\n"
        "assert not names & functions, names & functions"
    )
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)
