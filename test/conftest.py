"""One thread per rank, and installed code only."""

import gc
import os
import signal

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

torch.set_num_threads(1)
# a shell that starts the tests in the background has interrupts ignored, here and in every child: some tests send one
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish(session):
    """What was imported stays: the garbage collector does not look through it again, which takes it
    0.3 s each time (`helpers.ranks` asks for a collection after every group of ranks)."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def poison():
    """torch.empty and its like are filled with NaN: whatever reads memory that nobody wrote shows it."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
