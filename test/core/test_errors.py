"""Bad input: a clear error on every rank, no hang, whichever rank made the mistake."""

import time

import pytest
import torch
import torch.distributed as dist
from helpers.ranks import attempt, run

import ringx

pytestmark = pytest.mark.fast

WORLD, BAD = 3, 1


def good():
    q, k, v = torch.ones(1, 8, 4, 8), torch.ones(1, 8, 2, 8), torch.ones(1, 8, 2, 8)
    return {"q": q, "k": k, "v": v}


MISTAKES = {
    "three dimensions": (
        dict(q=torch.ones(8, 4, 8)),
        ValueError,
        r"q has 3 dimensions \(shape \(8, 4, 8\)\)",
    ),
    "five dimensions": (dict(v=torch.ones(1, 1, 8, 2, 8)), ValueError, "v has 5 dimensions"),
    "no tensor": (dict(k=[1.0]), TypeError, "k must be a torch.Tensor, not list"),
    "integers": (
        dict(q=torch.ones(1, 8, 4, 8, dtype=torch.int64)),
        TypeError,
        "q.dtype=torch.int64 is not supported; use",
    ),
    "booleans": (dict(k=torch.ones(1, 8, 2, 8, dtype=torch.bool)), TypeError, "k.dtype=torch.bool"),
    "complex": (
        dict(v=torch.ones(1, 8, 2, 8, dtype=torch.complex64)),
        TypeError,
        "v.dtype=torch.complex64",
    ),
    "fp8": (dict(q=torch.ones(1, 8, 4, 8).to(torch.float8_e4m3fn)), TypeError, "float8"),
    "mixed dtypes": (
        dict(k=torch.ones(1, 8, 2, 8).double()),
        TypeError,
        "k.dtype=torch.float64 differs from q.dtype=",
    ),
    "mixed devices": (
        dict(v=torch.ones(1, 8, 2, 8, device="meta")),
        ValueError,
        "v is on meta, q on cpu",
    ),
    "heads": (
        dict(k=torch.ones(1, 8, 3, 8), v=torch.ones(1, 8, 3, 8)),
        ValueError,
        "q has 4 heads, no multiple of the 3",
    ),
    "k and v heads": (dict(k=torch.ones(1, 8, 4, 8)), ValueError, "k has 4 heads, v has 2"),
    "head size": (dict(k=torch.ones(1, 8, 2, 4)), ValueError, "k has head size 4, q has 8"),
    "batch": (dict(v=torch.ones(2, 8, 2, 8)), ValueError, "v has batch size 2, q has 1"),
    "length of k": (
        dict(k=torch.ones(1, 6, 2, 8)),
        ValueError,
        "k has local sequence length 6, q has 8",
    ),
    "odd zigzag": (
        {n: torch.ones(1, 7, 2, 8) for n in "qkv"},
        ValueError,
        r"21 tokens do not divide into; pass layout=ringx.Sharding\(21, 3,",
    ),
    "empty batch": (
        dict(q=torch.ones(0, 8, 4, 8)),
        ValueError,
        r"q has an empty dimension \(shape \(0, 8, 4, 8\)\)",
    ),
    "no tokens": ({n: torch.ones(1, 0, 2, 8) for n in "qkv"}, ValueError, "empty dimension"),
    "algorithm": (
        dict(algorithm="ringX3"),
        ValueError,
        "algorithm='ringX3' is unknown. Did you mean 'ringx3'",
    ),
    "layout": (dict(layout="zig-zag"), ValueError, "Did you mean 'zigzag'"),
    "layout's type": (dict(layout=3), TypeError, "layout=3 must be a name"),
    "kernel": (dict(kernel="flash"), ValueError, "kernel='flash' is unknown. Did you mean"),
    "kernel of another device": (
        dict(kernel="sdpa_flash"),
        NotImplementedError,
        "kernel='sdpa_flash' cannot do this",
    ),
    "infinite scale": (dict(scale=float("inf")), ValueError, "scale=inf must be finite"),
    "nan scale": (dict(scale=float("nan")), ValueError, "scale=nan must be finite"),
    "scale's type": (dict(scale="1"), TypeError, "scale='1' must be a number"),
    "causal's type": (dict(causal=1), TypeError, "causal=1 must be True or False"),
    "overlap's type": (dict(overlap=None), TypeError, "overlap=None"),
    "return_lse's type": (dict(return_lse="yes"), TypeError, "return_lse='yes'"),
    "sharding of other ranks": (
        dict(layout=ringx.Sharding(24, 2)),
        ValueError,
        "a Sharding for 2 ranks, but the group has 3",
    ),
    "sharding of other tokens": (
        dict(layout=ringx.Sharding(27, 3)),
        ValueError,
        "gives rank . 9 tokens, but its tensor has 8",
    ),
}


@pytest.mark.parametrize("everyone", [False, True], ids=["one rank", "every rank"])
def test_mistakes(everyone):
    """All mistakes in one group, one after another: each leaves the group usable for the next."""

    def on_rank(rank):
        said = {}
        for name, (change, _, _) in MISTAKES.items():
            start = time.monotonic()
            with pytest.raises((ValueError, TypeError, NotImplementedError)) as error:
                ringx.attention(**(good() | change if everyone or rank == BAD else good()))
            assert time.monotonic() - start < 10
            said[name] = error.value
        return said, ringx.attention(**good()).sum().item()

    for rank, (said, fine) in enumerate(run(WORLD, on_rank)):
        assert fine == pytest.approx(8 * 4 * 8)
        for name, (_, kind, message) in MISTAKES.items():
            error = said[name]
            with pytest.raises(kind if everyone or rank == BAD else ValueError, match=message):
                raise error
            if rank != BAD and not everyone:
                assert f"rank {BAD} of the group" in str(error)


DISAGREEMENTS = {
    "batch size": {n: torch.ones(2, 8, h, 8) for n, h in zip("qkv", (4, 2, 2), strict=True)},
    "heads": {"q": torch.ones(1, 8, 8, 8)},
    "key/value heads": {n: torch.ones(1, 8, 4, 8) for n in "kv"},
    "head size": {n: torch.ones(1, 8, h, 16) for n, h in zip("qkv", (4, 2, 2), strict=True)},
    "sequence length": {n: torch.ones(1, 4, h, 8) for n, h in zip("qkv", (4, 2, 2), strict=True)},
    "dtype": {n: x.double() for n, x in good().items()},
    "algorithm": {"algorithm": "ringx4"},
    "causal": {"causal": True},
    "layout": {"layout": "contiguous"},
    "scale": {"scale": 0.5},
    "overlap": {"overlap": False},
    "gradient wanted": {"q": torch.ones(1, 8, 4, 8, requires_grad=True)},
}


def test_ranks_that_disagree():
    def on_rank(rank):
        said = {}
        for name, change in DISAGREEMENTS.items():
            for _ in range(2):  # found on every call, not only the first
                with pytest.raises(ValueError, match="ranks disagree") as error:
                    ringx.attention(**(good() | change if rank == BAD else good()))
            said[name] = str(error.value)
        return said

    for rank, said in enumerate(run(WORLD, on_rank)):
        for name, text in said.items():
            assert f"ranks disagree on {name}: rank {rank} has " in text, (name, text)
            assert (f"rank {BAD} has" if rank != BAD else "rank 0 has") in text


def test_check_can_be_turned_off():
    def on_rank(rank):
        with ringx.comm.traffic() as t:
            ringx.attention(**good(), check=False)
        with pytest.raises(
            ValueError, match="unknown"
        ):  # local mistakes are still found, where they are made
            ringx.attention(**good(), check=False, algorithm="rings")
        return dict(t.forward)

    assert all(set(sent) == {"all_gather"} for sent in run(2, on_rank))


def test_group_that_this_rank_is_not_in():
    def on_rank(rank):
        group = dist.new_group([0, 2])
        if rank == 1:
            for call in (
                lambda: ringx.attention(**good(), group=group),
                lambda: ringx.shard(torch.ones(1, 8), group=group),
                lambda: ringx.positions(8, group=group),
            ):
                with pytest.raises(ValueError, match="this rank is not a member of the group"):
                    call()
        else:
            ringx.attention(**good(), group=group)

    run(WORLD, on_rank)
    with pytest.raises(
        TypeError, match=r"group='cp' must be a torch.distributed.ProcessGroup or None"
    ):
        ringx.attention(**good(), group="cp")


def test_unknown_arguments_are_not_swallowed():
    for name in ("dropout_p", "window_size", "softcap", "alibi_slopes"):
        with pytest.raises(TypeError, match=name):
            ringx.attention(**good(), **{name: 1})


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: ringx.shard([1]), TypeError, "x must be a torch.Tensor, not list"),
        (
            lambda: ringx.shard(torch.ones(2, 4), dim=2),
            ValueError,
            r"dim=2 is not a dimension of x, whose shape is \(2, 4\)",
        ),
        (lambda: ringx.shard(torch.ones(2, 4), dim=1.0), TypeError, "dim=1.0"),
        (lambda: ringx.shard(torch.ones(2, 4), layout="zag"), ValueError, "layout='zag'"),
        (
            lambda: ringx.unshard(torch.ones(2, 4), layout=ringx.Sharding(5, 1)),
            ValueError,
            "gives rank 0 5 tokens, but its tensor has 4",
        ),
        (
            lambda: ringx.positions(8, layout=ringx.Sharding(9, 1)),
            ValueError,
            "Sharding of 9 tokens, but the sequence has 8",
        ),
        (lambda: ringx.positions(0), ValueError, "seqlen=0"),
        (lambda: ringx.positions("8"), TypeError, "seqlen='8'"),
    ],
)
def test_mistakes_in_sharding(call, kind, message):
    with pytest.raises(kind, match=message):
        call()


def test_a_peer_that_fails_is_named_with_algorithm_and_step():
    """Rank 0 raises before the call; the others' error says what they were doing."""

    def on_rank(rank):
        dist.barrier()  # all have met: what fails is the call
        if rank == 0:
            raise LookupError("this rank's own trouble")
        ringx.attention(**good(), algorithm="ringx4", check=False)

    start = time.monotonic()
    results = attempt(WORLD, on_rank, timeout=5)
    assert time.monotonic() - start < 10
    assert isinstance(results[0], LookupError)
    for rank in (1, 2):
        assert isinstance(results[rank], RuntimeError)
        assert f"ringx4 forward: broadcast from rank 0 failed on rank {rank} of 3" in str(
            results[rank]
        )
