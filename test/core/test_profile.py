"""A profile reads as the algorithms' names: phases, collectives posted and waited for, local attention."""

import torch
from programs import ranks_do

from ringx import launch

EXPECTED = {
    "ringx1": ("broadcast from rank 1", "reduce to rank 0"),
    "ringx2": ("broadcast from rank 1", "reduce to rank 0"),
    "ringx3": ("all-gather", "all-to-all"),
    "ringx4": ("broadcast from rank 1", "reduce to rank 0"),
}


def profiled(world):
    """{algorithm: names of the ranges of one step}."""
    found = {}
    for algorithm in EXPECTED:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            ranks_do.attend(world, algorithm, backward=True)
        found[algorithm] = {e.key for e in profile.key_averages() if e.key.startswith("ringx")}
    return found


def test_ranges():
    for found in launch.run(profiled, 2):
        for algorithm, (forward, backward) in EXPECTED.items():
            want = {
                f"{algorithm} {d}{what}"
                for d in ("forward", "backward")
                for what in ("", ": attend")
            }
            want |= {f"{algorithm} forward: {do} {forward}" for do in ("post", "wait for")}
            want |= {f"{algorithm} backward: {do} {backward}" for do in ("post", "wait for")}
            assert want <= found[algorithm], sorted(want - found[algorithm])
            assert not any(
                name.startswith(other)
                for name in found[algorithm]
                for other in EXPECTED
                if other != algorithm
            )


def test_the_agreement_has_a_range_too():
    for found in launch.run(profiled, 2):
        assert "ringx3 check" in found["ringx3"]
