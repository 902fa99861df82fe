"""Where things are in this repository, and beside it."""

from pathlib import Path

TEST = Path(__file__).resolve().parents[1]
ROOT = TEST.parent
RESULTS = ROOT / "results"
SCRIPT = ROOT / "script"
PROGRAMS = (
    TEST / "programs"
)  # what tests start as ranks, and modules whose functions other processes import
SHARED = ROOT.parent / "shared"  # real data; tests that need it skip where it is absent
