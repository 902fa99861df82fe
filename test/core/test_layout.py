"""Layouts and tiles: positions partition the sequence, tiles are the mask, balanced layouts are
balanced."""

import itertools
import random

import pytest
import torch

from ringx.layout import LAYOUTS, Sharding, TokenRange, clip, pack, rows_upto
from ringx.tiles import Tile, tiles

pytestmark = pytest.mark.fast

CASES = [
    (name, s, n)
    for name, s, n in itertools.product(LAYOUTS, (1, 2, 7, 16, 23, 48), (1, 2, 3, 4, 6, 8))
    if s >= n
]


@pytest.mark.parametrize(("name", "seqlen", "world"), CASES)
def test_positions_partition_the_sequence(name, seqlen, world):
    sharding = Sharding(seqlen, world, name)
    held = [sharding.positions(r) for r in range(world)]
    assert torch.equal(torch.cat(held).sort().values, torch.arange(seqlen))
    assert all(torch.equal(p, p.sort().values) for p in held), "local rows ascend"
    sizes = [len(p) for p in held]
    assert sizes == [sharding.size(r) for r in range(world)]
    assert max(sizes) - min(sizes) <= 1
    assert min(sizes) >= 1


def test_zigzag_chunks_differ_by_at_most_one_token():
    for seqlen, world in itertools.product(range(8, 60), (2, 3, 4)):
        chunks = [Sharding(seqlen, world)._chunk(i, 2 * world) for i in range(2 * world)]
        sizes = [chunk.length for chunk in chunks]
        assert max(sizes) - min(sizes) <= 1


def test_layouts_are_what_their_names_say():
    assert Sharding(8, 2, "contiguous").positions(1).tolist() == [4, 5, 6, 7]
    assert Sharding(8, 2, "zigzag").positions(0).tolist() == [0, 1, 6, 7]
    assert Sharding(8, 2, "striped").positions(1).tolist() == [1, 3, 5, 7]
    assert Sharding(7, 3, "contiguous").positions(0).tolist() == [0, 1, 2]


def dense(tile_list: list[Tile], m: int, n: int) -> torch.Tensor:
    """How often each (query, key) pair is computed."""
    count = torch.zeros(m, n, dtype=torch.int)
    for t in tile_list:
        h, w = t.q.stop - t.q.start, t.k.stop - t.k.start
        ahead = torch.arange(w)[None] - torch.arange(h)[:, None]
        seen = torch.ones(h, w, dtype=torch.bool)
        if t.lo is not None:
            seen &= ahead >= t.lo
        if t.hi is not None:
            seen &= ahead <= t.hi
        assert int(seen.sum()) == t.area
        assert t.area > 0
        count[t.q, t.k] += seen.int()
    return count


def mask_by_definition(seqlen, window, cu_seqlens):
    """[S, S] bool: which queries (rows) see which keys."""
    position = torch.arange(seqlen)
    ahead = position[None] - position[:, None]
    mask = torch.ones(seqlen, seqlen, dtype=torch.bool)
    left, right = window
    if left is not None:
        mask &= ahead >= -left
    if right is not None:
        mask &= ahead <= right
    if cu_seqlens:
        document = torch.bucketize(position, torch.tensor(cu_seqlens[1:]), right=True)
        mask &= document[None] == document[:, None]
    return mask


@pytest.mark.parametrize("by_keys", [False, True])
@pytest.mark.parametrize("name", LAYOUTS)
def test_tiles_are_the_mask(name, by_keys):
    """For single ranks and sets of ranks, windows, documents, odd lengths: every visible pair once,
    nothing else."""
    rng = random.Random(0)
    checked = 0
    for seqlen, world in itertools.product((7, 16, 23, 48), (1, 2, 3, 4, 6)):
        sharding = Sharding(seqlen, world, name)
        for window in ((None, None), (None, 0), (5, 0), (3, 2), (0, None)):
            for cu in (None, sorted({0, seqlen, *rng.sample(range(1, seqlen), 3)})):
                want = mask_by_definition(seqlen, window, cu)
                single_ranks = [[rank] for rank in range(world)]
                sets = [*single_ranks, list(range(world)), list(range(0, world, 2))]
                for some_q, some_k in itertools.product(sets, sets):
                    q_runs, k_runs = (sorted_runs(sharding, some) for some in (some_q, some_k))
                    q_pos, k_pos = (positions(runs) for runs in (q_runs, k_runs))
                    got = dense(
                        tiles(q_runs, k_runs, window=window, cu_seqlens=cu, by_keys=by_keys),
                        len(q_pos),
                        len(k_pos),
                    )
                    assert torch.equal(got, want[q_pos][:, k_pos].int()), (
                        seqlen,
                        world,
                        window,
                        cu,
                        some_q,
                        some_k,
                    )
                    checked += 1
    assert checked > 3000


def sorted_runs(sharding: Sharding, some: list[int]) -> list[TokenRange]:
    runs = sorted((run for r in some for run in sharding.runs(r)), key=lambda r: r.start)
    return pack(runs)


def positions(runs: list[TokenRange]) -> list[int]:
    return [run.start + i * run.step for run in runs for i in range(run.length)]


@pytest.mark.parametrize("seqlen", [48, 47])
def test_causal_work_is_few_kernel_calls(seqlen):
    """A rank's own block is one call, all other ranks' keys at most one per run of queries."""
    window = (None, 0)
    for name, rank in itertools.product(("contiguous", "zigzag"), range(4)):
        sharding = Sharding(seqlen, 4, name)
        mine = sharding.runs(rank)
        assert len(tiles(mine, mine, window=window)) == 1
        others = pack(
            sorted(
                (r for o in range(4) if o != rank for r in sharding.runs(o)), key=lambda r: r.start
            )
        )
        for by_keys in (False, True):
            assert len(tiles(mine, others, window=window, by_keys=by_keys)) <= len(mine)


def test_balanced_layouts_give_equal_work():
    for seqlen, world in ((64, 4), (96, 6), (64, 8)):
        everything = {}
        for name in LAYOUTS:
            sharding = Sharding(seqlen, world, name)
            everything[name] = [
                sum(
                    t.area
                    for o in range(world)
                    for t in tiles(sharding.runs(r), sharding.runs(o), window=(None, 0))
                )
                for r in range(world)
            ]
        total = seqlen * (seqlen + 1) // 2
        assert all(sum(work) == total for work in everything.values())
        assert set(everything["zigzag"]) == {total // world}
        assert (
            max(everything["striped"]) - min(everything["striped"]) == (world - 1) * seqlen // world
        )
        assert max(everything["contiguous"]) > 1.7 * total / world


def test_clip_and_rows_upto():
    runs = Sharding(16, 2).runs(0)  # positions 0-3 and 12-15
    assert positions(clip(runs, slice(2, 6))) == [2, 3, 12, 13]
    assert [r.at for r in clip(runs, slice(2, 6))] == [0, 2]
    assert [rows_upto(runs, p) for p in (-1, 0, 3, 11, 12, 99)] == [0, 1, 4, 4, 5, 8]
    assert rows_upto(Sharding(9, 2, "striped").runs(1), 5) == 3


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((3, 4), ValueError, "seqlen=3 is shorter than world=4"),
        ((8.0, 2), TypeError, "seqlen=8.0 must be an integer"),
        ((True, 1), TypeError, "seqlen=True"),
        ((8, 0), ValueError, "world=0"),
        ((8, 2, "zigzig"), ValueError, "Did you mean 'zigzag'"),
    ],
)
def test_impossible_shardings_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        Sharding(*arguments)


def test_runs_of_different_steps_are_refused():
    with pytest.raises(ValueError, match="steps 1 and 2"):
        tiles([TokenRange(0, 4, 0)], [TokenRange(0, 4, 0, 2)])
