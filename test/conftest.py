"""One thread per rank, and installed code only.

Each test says itself how much it costs, with a mark (listed in pyproject.toml):

fast    needs no other process and takes at most a second or two.  A file of such tests has
        ``pytestmark = pytest.mark.fast``; in other files they are marked one by one.
slow    a further case of something that another test, or the first case of the same test, proves
        in CI already: more ranks, another dtype, another mesh.  ``make test-slow`` runs them.
slurm   needs a Slurm cluster, and the machine for itself.
(none)  everything else: CI runs it.
"""

import gc
import os
import signal

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

torch.set_num_threads(1)
# A shell that starts the tests in the background has interrupts ignored, here and in every child;
# some tests send one.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items):
    """``pytest -m fast`` must not choose what is slow or needs a cluster."""
    for item in items:
        marks = {mark.name for mark in item.iter_markers()}
        if "fast" in marks and marks & {"slow", "slurm"}:
            raise pytest.UsageError(
                f"{item.nodeid} is marked fast, and {marks & {'slow', 'slurm'}}"
            )


def pytest_collection_finish(session):
    """What was imported stays: the garbage collector does not look through it again, which takes it
    0.3 s each time (`helpers.ranks` asks for a collection after every group of ranks)."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def poison():
    """torch.empty and its like give NaN: whatever reads memory that nobody wrote shows it."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
