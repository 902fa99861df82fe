"""Exactness: out, lse, dq, dk, dv of every algorithm against full attention in fp64.  The whole
grid: ``make grid``."""

import itertools
from functools import partial

import pytest
import torch
from helpers.exact import LAYOUTS, LIMIT, NAMES, WORLDS, errors, outputs, under_pytest
from helpers.oracle import full_attention, problem, relative
from helpers.paths import TEST
from helpers.ranks import run

import ringx
from ringx.kernels import cpu

ALGORITHMS = tuple(ringx.algorithms())


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize(
    "algorithm", [a for a in ALGORITHMS if not (TEST / f"test_{a}.py").exists()]
)
def test_equals_full_attention(algorithm, world, poison):
    """Of the algorithms that have no test/test_NAME.py, which is a program too."""
    under_pytest(algorithm, world)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("world", "seqlen", "kv_heads", "head_dim"),
    [
        pytest.param(2, 251, 1, 64, marks=pytest.mark.fast),
        (3, 192, 4, 40),
        (4, 256, 2, 128),
        pytest.param(8, 257, 2, 64, marks=pytest.mark.slow),
    ],
)
def test_low_precision(world, seqlen, kv_heads, head_dim, dtype, causal, poison):
    """Within the dtype's limit, and at most twice the error of one kernel call on the whole
    sequence."""
    p = problem(seqlen, Hkv=kv_heads, D=head_dim, dtype=dtype)
    want = full_attention(p, causal=causal)
    band = (None, 0 if causal else None)
    out, lse = cpu.forward(*p[:3], band=band, scale=head_dim**-0.5)
    single = errors(
        dict(
            zip(
                NAMES,
                (
                    out,
                    lse,
                    *cpu.backward(p.dout, *p[:3], out, lse, band=band, scale=head_dim**-0.5),
                ),
                strict=True,
            )
        ),
        want,
    )

    def all_algorithms(rank):
        return {
            a: outputs(rank, p, algorithm=a, causal=causal, layout=ringx.Sharding(seqlen, world))
            for a in ALGORITHMS
        }

    for algorithm, got in run(world, all_algorithms)[0].items():
        for name, error in errors(got, want).items():
            assert error < LIMIT[dtype], (algorithm, name, error)
            assert error < max(2 * single[name], 16 * torch.finfo(torch.float32).eps), (
                algorithm,
                name,
                error,
                single[name],
            )


@pytest.mark.parametrize("seqlen", [15, pytest.param(8, marks=pytest.mark.slow)])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_eight_ranks_few_tokens(algorithm, seqlen, poison):
    """As many tokens as ranks, and a few more: chunks and tiles of no or one token."""
    cases = list(itertools.product((False, True), LAYOUTS))
    p = problem(seqlen, D=8)

    def on_rank(rank):
        return [
            outputs(
                rank,
                p,
                algorithm=algorithm,
                causal=causal,
                layout=ringx.Sharding(seqlen, 8, layout),
            )
            for causal, layout in cases
        ]

    for (causal, layout), got in zip(cases, run(8, on_rank)[0], strict=True):
        want = full_attention(p, causal=causal)
        assert max(errors(got, want).values()) < 1e-10, (causal, layout)


@pytest.mark.fast
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("causal", [False, True])
def test_lse_is_differentiable(algorithm, causal, poison):
    p = problem(37)
    want = full_attention(p, causal=causal, with_dlse=True)
    got = run(3, lambda rank: outputs(rank, p, with_dlse=True, algorithm=algorithm, causal=causal))[
        0
    ]
    assert max(errors(got, want).values()) < 1e-10


@pytest.mark.fast
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_lse_alone_is_differentiable(dtype):
    """dout is zero: the fused kernels' formula for delta would divide by it."""
    p = problem(40, dtype=dtype)
    p = p._replace(dout=torch.zeros_like(p.dout))
    want = full_attention(p, with_dlse=True, causal=True)

    def lse_only(rank):
        where = ringx.positions(40)
        q, k, v = (x[:, where].clone().requires_grad_() for x in p[:3])
        lse = ringx.attention(q, k, v, causal=True, return_lse=True)[1]
        (lse * p.dlse[:, :, where]).sum().backward()
        return where, q.grad, k.grad, v.grad

    for where, dq, dk, dv in run(2, lse_only):
        assert relative(dq, want["dq"][:, where]) < LIMIT[dtype]
        assert relative(dk, want["dk"][:, where]) < LIMIT[dtype]
        assert dv.abs().max() < 1e-9


@pytest.mark.fast
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_subgroup_whose_ranks_are_not_first(algorithm, poison):
    """Ranks 4, 1, 2 of 5 are a group of three; the others do not take part."""
    p, members = problem(24), [1, 2, 4]
    want = full_attention(p, causal=True)

    def on_rank(rank):
        group = torch.distributed.new_group(members)
        if rank not in members:
            with pytest.raises(ValueError, match="not a member"):
                ringx.attention(p.q, p.k, p.v, group=group)
            return None
        where = ringx.positions(24, group=group)
        q, k, v = (ringx.shard(x, group=group).clone().requires_grad_() for x in p[:3])
        out = ringx.attention(q, k, v, group=group, algorithm=algorithm, causal=True)
        out.backward(p.dout[:, where])
        return where, out, q.grad, k.grad, v.grad

    results = [r for r in run(5, on_rank) if r is not None]
    assert len(results) == 3
    for where, *got in results:
        for x, name in zip(got, ("out", "dq", "dk", "dv"), strict=True):
            assert relative(x, want[name][:, where]) < 1e-10


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_bitwise_the_same_again(algorithm):
    p = problem(64, dtype=torch.bfloat16)
    runs = [
        run(4, lambda rank: outputs(rank, p, algorithm=algorithm, causal=True)) for _ in range(2)
    ]
    for a, b in zip(*runs, strict=True):
        assert all(torch.equal(a[n], b[n]) for n in NAMES)


@pytest.mark.fast
def test_alone_without_a_process_group():
    p = problem(13)
    for algorithm in ALGORITHMS:
        got = outputs(0, p, algorithm=algorithm, causal=True)
        assert max(errors(got, full_attention(p, causal=True)).values()) < 1e-10


@pytest.mark.fast
def test_scale_batch_and_strides(poison):
    """A scale of one's own, two batches, and inputs that are views with odd strides."""
    p = problem(32, B=2, H=4, Hkv=2, D=8)
    want = full_attention(p, causal=True, scale=0.7)

    def on_rank(rank):
        where = ringx.positions(32)
        q, k, v = (
            x[:, where]
            .permute(0, 2, 3, 1)
            .contiguous()
            .permute(0, 3, 1, 2)
            .detach()
            .requires_grad_()
            for x in p[:3]
        )  # the last dimension is not the fastest
        out = ringx.attention(q, k, v, causal=True, scale=0.7, algorithm="ringx4")
        out.backward(p.dout[:, where].expand_as(out))
        return where, out, q.grad

    for where, out, dq in run(2, on_rank):
        assert relative(out, want["out"][:, where]) < 1e-10
        assert relative(dq, want["dq"][:, where]) < 1e-10


@pytest.mark.fast
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_nan_passes_through(algorithm):
    """One bad key makes NaN of every query that sees it, and of no other."""
    p = problem(16)
    p.k[0, 9, 0, 0] = torch.nan
    got = run(2, lambda rank: outputs(rank, p, algorithm=algorithm, causal=True))[0]
    bad = got["out"].isnan().any(-1).any(-1)[0]
    assert bad.tolist() == [i >= 9 for i in range(16)]


@pytest.mark.fast
def test_large_scores_do_not_overflow():
    p = problem(24)
    p = p._replace(q=p.q * 300)
    want = full_attention(p)
    for algorithm in ALGORITHMS:
        got = run(3, partial(outputs, p=p, algorithm=algorithm))[0]
        assert relative(got["out"], want["out"]) < 1e-10
        assert relative(got["lse"], want["lse"]) < 1e-10


@pytest.mark.fast
def test_shard_unshard_and_their_gradients():
    """unshard inverts shard; each is the adjoint of itself for the sum of all ranks' losses."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 23, 3, generator=g, dtype=torch.float64)
    weights = torch.randn(3, 2, 23, 3, generator=g, dtype=torch.float64)

    def on_rank(rank, layout):
        sharding = ringx.Sharding(23, 3, layout)
        local = ringx.shard(x, layout=sharding).requires_grad_()
        whole = ringx.unshard(local, layout=sharding)
        (whole * weights[rank]).sum().backward()
        full = x.clone().requires_grad_()
        (ringx.shard(full, layout=sharding) * 2).sum().backward()
        return ringx.positions(23, layout=sharding), whole.detach(), local.grad, full.grad

    for layout in LAYOUTS:
        for where, whole, dlocal, dfull in run(3, on_rank, layout):
            assert torch.equal(whole, x)
            torch.testing.assert_close(dlocal, weights.sum(0)[:, where])
            assert torch.equal(dfull, torch.zeros_like(x).index_fill_(1, where, 2.0))


@pytest.mark.fast
def test_shard_other_dims_and_dtypes():
    ids = torch.arange(48).view(2, 24)

    def on_rank(rank):
        mine = ringx.shard(ids, dim=-1)
        assert mine.dtype == torch.int64
        assert torch.equal(mine[0], ringx.positions(24))
        return torch.equal(ringx.unshard(mine, dim=-1), ids)

    assert all(run(4, on_rank))
