"""The notebooks in results/notebooks run, on committed data alone, and ARTIFACT.md lists what there
is.

python -m pytest test/report/test_notebooks.py
"""

import re
import shutil
import subprocess

import pytest
from helpers.paths import RESULTS

nbformat = pytest.importorskip(
    "nbformat", reason="needs nbformat, nbclient and ipykernel: pip install -e '.[dev]'"
)
nbclient = pytest.importorskip(
    "nbclient", reason="needs nbformat, nbclient and ipykernel: pip install -e '.[dev]'"
)
NOTEBOOKS = sorted((RESULTS / "notebooks").glob("*.ipynb"))


@pytest.fixture(scope="module")
def committed(tmp_path_factory):
    """A copy of results/ with committed files only, outside the checkout."""
    to = tmp_path_factory.mktemp("results") / "results"
    listed = subprocess.run(
        ["git", "ls-files", "-z", "."], cwd=RESULTS, capture_output=True, text=True, check=False
    )
    if listed.returncode:
        pytest.skip("needs a git checkout, to know what is committed")
    for name in filter(None, listed.stdout.split("\0")):
        (to / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(RESULTS / name, to / name)
    return to


def test_the_four_notebooks():
    assert {n.stem for n in NOTEBOOKS} == {
        "attention_scaling",
        "bytes_and_time",
        "collectives",
        "time_by_algorithm",
    }


@pytest.mark.parametrize(
    "notebook",
    [NOTEBOOKS[0], *(pytest.param(n, marks=pytest.mark.slow) for n in NOTEBOOKS[1:])],
    ids=lambda n: n.stem,
)
def test_a_notebook_runs_on_committed_data(committed, notebook):
    made = nbformat.read(notebook, as_version=4)
    nbclient.NotebookClient(
        made, timeout=120, resources={"metadata": {"path": str(committed / "notebooks")}}
    ).execute()
    outputs = [o for cell in made.cells if cell.cell_type == "code" for o in cell.outputs]
    assert (
        sum("image/png" in o.get("data", {}) for o in outputs)
        + sum("text/html" in o.get("data", {}) for o in outputs)
        >= 3
    )
    assert not [o for o in outputs if o.output_type == "stream" and o.name == "stderr"]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda n: n.stem)
def test_committed_notebooks_hold_no_output(notebook):
    for cell in nbformat.read(notebook, as_version=4).cells:
        assert cell.cell_type == "markdown" or (not cell.outputs and cell.execution_count is None)


def test_every_result_is_in_the_artifact_description_and_has_a_readme():
    text = (RESULTS / "ARTIFACT.md").read_text()
    folders = [p for p in RESULTS.iterdir() if p.is_dir() and p.name != "notebooks"]
    assert folders
    for folder in folders:
        assert re.fullmatch(r"[a-z]+_[a-z0-9]+_20\d{4}", folder.name) and folder.name in text
        assert (folder / "README.md").exists()
        assert folder.name.startswith("house_") or list((folder / "plots").rglob("*.png"))
    for notebook in NOTEBOOKS:
        assert f"notebooks/{notebook.stem}" in text
