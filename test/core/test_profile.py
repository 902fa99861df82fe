"""A profile reads as the algorithms' names: phases, collectives posted and waited for, local
attention."""

import pytest
import torch
from programs import rank_functions

import ringx
from ringx import launch
from ringx.comm import COLLECTIVES

ALGORITHMS = ringx.algorithms()


def profiled(world):
    """{algorithm: names of the ranges of one step}."""
    ranges = {}
    for algorithm in ALGORITHMS:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            rank_functions.attend(world, algorithm, backward=True)
        names = {event.key for event in profile.key_averages()}
        prefixes = tuple(f"{name} " for name in ALGORITHMS)
        ranges[algorithm] = {name for name in names if name.startswith(prefixes)}
    return ranges


@pytest.fixture(scope="module")
def ranges_of_ranks():
    return launch.run(profiled, 2)


def test_ranges_bear_the_names_of_algorithm_direction_and_message(ranges_of_ranks):
    for ranges in ranges_of_ranks:
        for algorithm, row in ALGORITHMS.items():
            directions = ("forward", "backward")
            messages = row.messages(1, 8, 2, 2, 8, 2, 4, False)
            expected = []
            for direction, counts in zip(directions, messages, strict=True):
                expected += [f"{algorithm} {direction}", f"{algorithm} {direction}: attend"]
                for name in counts:
                    title = COLLECTIVES[name].title
                    expected += [
                        f"{algorithm} {direction}: {action} {title}"
                        for action in ("post", "wait for")
                    ]
            for prefix in expected:
                assert any(name.startswith(prefix) for name in ranges[algorithm]), prefix
            others = [f"{other} " for other in ALGORITHMS if other != algorithm]
            assert not any(name.startswith(tuple(others)) for name in ranges[algorithm])


def test_the_agreement_has_a_range_too(ranges_of_ranks):
    for ranges in ranges_of_ranks:
        assert "ringx3 check" in ranges["ringx3"]
