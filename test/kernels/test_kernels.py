"""Local kernels: what they compute, what they refuse, how they are chosen, and how packages that cannot run here are called."""

import contextlib
import itertools

import pytest
import torch
from helpers import ranks, standins
from helpers.oracle import full_attention, problem, relative

import ringx
from ringx import kernels
from ringx.kernels import KERNELS, KernelRequest, cut, flex, gpu, load, reference
from ringx.layout import Sharding
from ringx.merge import OnlineSoftmax, acc_dtype
from ringx.tiles import Tile, tiles

CPU, GPU = torch.device("cpu"), torch.device("cuda")


# ---- cut


def visible(m, n, lo, hi):
    """[m, n]: which pairs a band leaves."""
    ahead = torch.arange(n) - torch.arange(m)[:, None]
    return (ahead >= (-m if lo is None else lo)) & (ahead <= (n if hi is None else hi))


@pytest.mark.fast
@pytest.mark.parametrize("kind", ["top-left", "bottom-right", "square", "any"])
def test_cut_leaves_exactly_the_band_in_pieces_the_kernel_can_do(kind):
    q0, k0 = 3, 5
    for m, n in itertools.product((1, 2, 3, 5, 8), repeat=2):
        for hi in (None, *range(1 - m, n)):
            tile = Tile(slice(q0, q0 + m), slice(k0, k0 + n), None, hi)
            count = torch.zeros(q0 + m, k0 + n, dtype=torch.int)
            for piece in cut(tile, kind):
                pm, pn = piece.q.stop - piece.q.start, piece.k.stop - piece.k.start
                assert pm > 0 and pn > 0
                count[piece.q, piece.k] += visible(pm, pn, piece.lo, piece.hi).int()
                if kind != "any" and piece.hi is not None:
                    assert piece.lo is None
                    assert piece.hi == {"top-left": 0, "bottom-right": pn - pm, "square": 0}[kind]
                    assert {"top-left": pn <= pm, "bottom-right": pn >= pm, "square": pn == pm}[
                        kind
                    ]
            assert torch.equal(count[q0:, k0:], visible(m, n, None, hi).int()), (m, n, hi)
            assert count.sum() == tile.area


@pytest.mark.fast
def test_cut_refuses_a_lower_bound_for_kernels_without_windows():
    with pytest.raises(NotImplementedError, match="reference"):
        cut(Tile(slice(0, 4), slice(0, 4), -2, 0), "square")


# ---- kernels against attention by its definition


def flow(name, q, k, v, dout, tiles_, scale, deterministic=False):
    """out, lse, dq, dk, dv by way of ``cut``, ``OnlineSoftmax`` and the backward with the global out and lse, as algorithms do it."""
    kernel = load(name)
    pieces = [piece for tile in tiles_ for piece in cut(tile, kernel.causal_alignment)]
    acc = OnlineSoftmax(q)
    for t in pieces:
        out, lse = kernel.forward(q[:, t.q], k[:, t.k], v[:, t.k], band=(t.lo, t.hi), scale=scale)
        assert out.shape == q[:, t.q].shape and out.dtype == q.dtype
        assert lse.shape == (
            q.shape[0],
            q.shape[2],
            t.q.stop - t.q.start,
        ) and lse.dtype == acc_dtype(q.dtype)
        acc.add(out, lse, t.q)
    out, lse = acc.out.to(q.dtype), acc.lse
    grads = [torch.zeros(x.shape, dtype=acc_dtype(x.dtype)) for x in (q, k, v)]
    for t in pieces:
        parts = kernel.backward(
            dout[:, t.q], q[:, t.q], k[:, t.k], v[:, t.k], out[:, t.q], lse[:, :, t.q],
            band=(t.lo, t.hi), scale=scale, deterministic=deterministic,
        )  # fmt: skip
        for grad, part, rows, x in zip(grads, parts, (t.q, t.k, t.k), (q, k, v), strict=True):
            assert part.dtype == x.dtype and part.shape == x[:, rows].shape
            grad[:, rows] += part
    return dict(zip(("out", "lse", "dq", "dk", "dv"), (out, lse, *grads), strict=True))


def masked(q, k, v, dout, seen, scale):
    """The same in fp64 by autograd, of the pairs that `seen` [Sq, Sk] leaves; every row must see a key."""
    q, k, v = (x.detach().double().requires_grad_() for x in (q, k, v))
    head = torch.arange(q.shape[2]) // (q.shape[2] // k.shape[2])
    scores = (torch.einsum("bqhd,bkhd->bhqk", q, k[:, :, head]) * scale).masked_fill(
        ~seen, -torch.inf
    )
    out, lse = (
        torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v[:, :, head]),
        scores.logsumexp(-1),
    )
    grads = torch.autograd.grad(out, (q, k, v), dout.double())
    return dict(
        zip(("out", "lse", "dq", "dk", "dv"), (out.detach(), lse.detach(), *grads), strict=True)
    )


def one_rank(causal, S=53, world=3, rank=1, layout="zigzag"):
    """The tiles of one rank's queries against every rank's keys, those laid out rank after rank, and the mask that they make."""
    sharding = Sharding(S, world, layout)
    out, at = [], 0
    for src in range(world):
        k_runs = [run._replace(at=run.at + at) for run in sharding.runs(src)]
        out += tiles(sharding.runs(rank), k_runs, window=(None, 0 if causal else None))
        at += sharding.size(src)
    keys = torch.cat([sharding.positions(r) for r in range(world)])
    return out, (keys <= sharding.positions(rank)[:, None]) | (not causal)


def inputs(m, n, *, H=4, Hkv=2, D=16, dtype=torch.float64, B=2):
    g = torch.Generator().manual_seed(m + n)
    return [
        torch.randn(B, s, h, D, generator=g, dtype=torch.float64).to(dtype)
        for s, h in ((m, H), (n, Hkv), (n, Hkv), (m, H))
    ]


def assert_close(got, want, bound):
    for name in want:
        assert relative(got[name], want[name]) < bound, name


@pytest.mark.fast
@pytest.mark.parametrize("name", ["reference", "cpu"])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 5e-6), (torch.bfloat16, 1e-2)]
)
@pytest.mark.parametrize("D", [40, 64, 128])
def test_a_single_call_equals_the_definition(name, heads, dtype, bound, D):
    q, k, v, dout = inputs(37, 37, H=heads[0], Hkv=heads[1], D=D, dtype=dtype)
    for hi in (None, 0):
        got = flow(name, q, k, v, dout, [Tile(slice(0, 37), slice(0, 37), None, hi)], 0.2)
        assert_close(got, masked(q, k, v, dout, visible(37, 37, None, hi), 0.2), bound)


@pytest.mark.fast
@pytest.mark.parametrize("band", [(None, 3), (-4, None), (-4, 2), (0, 1), (None, -3), (2, 9)])
def test_reference_does_every_band_and_rows_without_keys(band):
    q, k, v, dout = inputs(12, 15)
    seen = visible(12, 15, *band)
    out, lse = reference.forward(q, k, v, band=band, scale=0.3)
    blind = ~seen.any(-1)
    assert bool((lse[:, :, blind] == -torch.inf).all()) and bool((out[:, blind] == 0).all())
    want = masked(q[:, ~blind], k, v, dout[:, ~blind], seen[~blind], 0.3)
    dq, dk, dv = reference.backward(dout, q, k, v, out, lse, band=band, scale=0.3)
    assert bool((dq[:, blind] == 0).all())
    got = {"out": out[:, ~blind], "lse": lse[:, :, ~blind], "dq": dq[:, ~blind], "dk": dk, "dv": dv}
    assert_close(got, want, 1e-12)


@pytest.mark.fast
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("layout", ["zigzag", "contiguous", "striped"])
def test_pieces_of_a_rank_add_up(causal, layout):
    pieces, seen = one_rank(causal, layout=layout)
    q, k, v, dout = inputs(*seen.shape)
    for name in ("reference", "cpu"):
        assert_close(
            flow(name, q, k, v, dout, pieces, 0.25), masked(q, k, v, dout, seen, 0.25), 1e-12
        )


@pytest.mark.fast
def test_reference_is_the_oracle_of_the_other_tests():
    p = problem(19)
    out, lse = reference.forward(*p[:3], band=(None, 0), scale=16**-0.5)
    want = full_attention(p, causal=True)
    assert relative(out, want["out"]) < 1e-14 and relative(lse, want["lse"]) < 1e-14


# ---- our calls of packages and operators that cannot run here, by stand-ins: of their numbers this says nothing


@contextlib.contextmanager
def stand_in(what):
    if what in standins.PACKAGES:
        with standins.installed(what):
            yield standins.PACKAGES[what][0]
    else:
        name, _, lse_dims = what.partition(":")
        with standins.aten_operators(int(lse_dims or 4)):
            yield name


OPERATORS = ["sdpa_flash", "sdpa_efficient", "sdpa_cudnn:3", "sdpa_cudnn:4"]


@pytest.mark.fast
@pytest.mark.parametrize("what", [*standins.PACKAGES, *OPERATORS])
@pytest.mark.parametrize("causal", [True, False])
def test_calls_of_a_stand_in(what, causal):
    pieces, seen = one_rank(causal)
    with stand_in(what) as name:
        for D, dtype, bound in (
            (16, torch.float64, 1e-12),
            (20, torch.float64, 1e-12),
            (16, torch.bfloat16, 2e-2),
        ):
            q, k, v, dout = inputs(*seen.shape, D=D, dtype=dtype)
            assert_close(
                flow(name, q, k, v, dout, pieces, 0.25), masked(q, k, v, dout, seen, 0.25), bound
            )


@pytest.mark.fast
@pytest.mark.parametrize("what", [*standins.PACKAGES, "sdpa_flash", "sdpa_efficient"])
def test_determinism_is_asked_for_and_the_switch_put_back(what):
    q, k, v, dout = inputs(8, 8)
    tile = [Tile(slice(0, 8), slice(0, 8))]
    with stand_in(what) as name:
        for wanted in (True, False):
            flow(name, q, k, v, dout, tile, 1.0, deterministic=wanted)
            assert standins.seen["deterministic"] is wanted
    assert not torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with gpu.deterministic_algorithms(True):
            assert not torch.is_deterministic_algorithms_warn_only_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.fast
def test_cudnn_does_a_single_key_by_the_definition():
    q, k, v, dout = inputs(5, 4)
    with standins.aten_operators():  # which refuses a single key
        got = flow(
            "sdpa_cudnn", q, k, v, dout, [Tile(slice(0, 5), slice(j, j + 1)) for j in range(4)], 1.0
        )
    assert_close(got, masked(q, k, v, dout, torch.ones(5, 4, dtype=torch.bool), 1.0), 1e-12)


@pytest.mark.fast
def test_an_algorithm_through_a_stand_in(monkeypatch):
    monkeypatch.setattr(load("flash2"), "unsupported_reason", lambda need: None)
    p = problem(24)
    want = full_attention(p, causal=True)

    def rank(r):
        q, k, v = (ringx.shard(x).requires_grad_() for x in p[:3])
        out = ringx.attention(q, k, v, algorithm="ringx3", causal=True, kernel="flash2")
        out.backward(ringx.shard(p.dout))
        return [ringx.unshard(x.detach()) for x in (out, q.grad, k.grad, v.grad)]

    with standins.installed("flash-attn 2.8"):
        results = ranks.run(2, rank)
    for result in results:
        got = dict(zip(("out", "dq", "dk", "dv"), result, strict=True))
        assert_close(got, {name: want[name] for name in got}, 1e-10)


@pytest.mark.fast
@pytest.mark.parametrize("name", ["sdpa_flash", "sdpa_efficient", "sdpa_cudnn"])
def test_shapes_that_pytorch_itself_expects_of_its_cuda_operators(name, monkeypatch):
    from torch._subclasses.fake_tensor import FakeTensorMode

    monkeypatch.setattr(
        torch.Tensor, "contiguous", lambda x: x
    )  # it asks for the device, which a CPU build does not know
    load("sdpa_cudnn")._lse_dimensions.cache_clear()
    with FakeTensorMode():
        q, k, dout = (
            torch.empty(2, s, h, 64, device="cuda", dtype=torch.bfloat16)
            for s, h in ((33, 4), (33, 2), (33, 4))
        )
        out, lse = load(name).forward(q, k, k, band=(None, 0), scale=0.1)
        assert out.shape == q.shape and lse.shape == (2, 4, 33) and lse.dtype == torch.float32
        grads = load(name).backward(
            dout, q, k, k, out, lse, band=(None, 0), scale=0.1, deterministic=False
        )
        assert [g.shape for g in grads] == [q.shape, k.shape, k.shape]
        assert all(g.device.type == "cuda" and g.dtype == torch.bfloat16 for g in grads)
    load("sdpa_cudnn")._lse_dimensions.cache_clear()


# ---- flex


@pytest.mark.fast
@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("band", [(None, None), (None, 0), (-140, 7), (None, -3)])
def test_flex_forward_on_cpu(band):
    for dtype, bound in ((torch.float64, 1e-12), (torch.bfloat16, 5e-3)):
        q, k, v, _ = inputs(150, 300, dtype=dtype, B=1)
        out, lse = flex.forward(q, k, v, band=band, scale=0.3)
        want, want_lse = reference.forward(q, k, v, band=band, scale=0.3)
        assert relative(out, want) < bound
        blind = want_lse == -torch.inf
        assert torch.equal(lse == -torch.inf, blind)
        assert relative(lse[~blind], want_lse[~blind]) < 1e-6 and lse.dtype == want_lse.dtype


@pytest.mark.fast
def test_flex_blocks_cover_the_band():
    for m, n, band in (
        (1, 1, (0, 0)),
        (300, 140, (-130, 5)),
        (129, 513, (None, 200)),
        (257, 129, (-3, None)),
    ):
        blocks = flex._block_mask(m, n, band, CPU).to_dense()[0, 0].bool()
        for i, j in itertools.product(range(blocks.shape[0]), range(blocks.shape[1])):
            there = visible(m, n, *band)[i * 128 : (i + 1) * 128, j * 128 : (j + 1) * 128]
            assert bool(blocks[i, j]) == bool(there.any())


@pytest.mark.fast
def test_flex_backward_algebra(monkeypatch):
    """With a differentiable stand-in, since flex has no backward on CPU."""

    def attend(q, k, v, block_mask, scale, enable_gqa, kernel_options):
        assert enable_gqa
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        i, j = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])
        seen = (
            block_mask.mask_mod(0, 0, i, j)
            if block_mask
            else torch.ones(q.shape[2], k.shape[2], dtype=torch.bool)
        )
        scores = (q @ k.mT * scale).masked_fill(~seen, -torch.inf)
        blind = ~seen.any(-1)
        return scores.softmax(-1).masked_fill(blind[:, None], 0.0) @ v, scores.logsumexp(
            -1
        ).masked_fill(blind, -torch.inf)

    monkeypatch.setattr(flex, "_flex_attention", lambda device: (attend, {}))
    for causal in (True, False):
        pieces, seen = one_rank(causal)
        q, k, v, dout = inputs(*seen.shape)
        assert_close(
            flow("flex", q, k, v, dout, pieces, 0.25), masked(q, k, v, dout, seen, 0.25), 1e-12
        )


@pytest.mark.fast
def test_flex_refuses_to_train_on_cpu():
    assert "inference" in flex.unsupported_reason(KernelRequest(CPU, torch.float32, 64))
    assert flex.unsupported_reason(KernelRequest(CPU, torch.float32, 64, grad=False)) is None
    q = torch.randn(1, 8, 2, 16, requires_grad=True)
    with pytest.raises(NotImplementedError, match=r"flex.*inference"):
        ringx.attention(q, q, q, kernel="flex")
    with torch.no_grad():
        assert (
            relative(
                ringx.attention(q, q, q, causal=True, kernel="flex"),
                ringx.attention(q, q, q, causal=True),
            )
            < 1e-5
        )


# ---- what is refused, and what is chosen


@pytest.fixture
def machine(monkeypatch):
    """Pretend to be a machine: machine(capability) or machine(hip="6.4")."""

    def be(found=None, hip=None):
        monkeypatch.setattr(gpu, "capability", lambda device: found)
        monkeypatch.setattr(torch.version, "hip", hip)
        monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
        monkeypatch.setattr(torch.backends.cudnn, "version", lambda: None if hip else 91000)

    return be


def need(**changes):
    return KernelRequest(GPU, torch.bfloat16, 64, 8, 2)._replace(**changes)


ABSENT = set(KERNELS) - {"cpu", "reference", "flex"}


@pytest.mark.fast
@pytest.mark.parametrize("name", sorted(ABSENT))
def test_gpu_kernels_say_that_these_tensors_are_on_the_cpu(name):
    assert "on GPUs" in kernels.unsupported_reason(name, need(device=CPU))


@pytest.mark.fast
@pytest.mark.parametrize(
    ("name", "found", "changes", "reason"),
    [
        ("flash2", (8, 0), {"dtype": torch.float32}, "float16 and bfloat16, not float32"),
        ("flash2", (7, 5), {}, "compute capability 8.0, this GPU has 7.5"),
        ("flash2", (8, 0), {"head_dim": 264}, "at most 256, not 264"),
        ("flash3", (8, 0), {}, "9.0"),
        ("flash3", (10, 0), {}, "Hopper"),
        ("flash4", (8, 9), {}, "9.0"),
        ("flash4", (10, 0), {"head_dim": 192}, "at most 128, or 256"),
        ("aiter", (9, 0), {}, "AMD"),
        ("sdpa_flash", None, {}, "no GPU"),
        ("sdpa_flash", (8, 9), {"head_dim": 200}, "no head size of 200"),
        ("sdpa_cudnn", (9, 0), {"head_dim": 192}, "at most 128"),
        ("sdpa_cudnn", (9, 0), {"deterministic": True}, "deterministic"),
        ("sdpa_efficient", (7, 0), {}, "8.0"),
        ("sdpa_efficient", (9, 0), {"dtype": torch.float64}, "float32, not float64"),
        ("flex", (9, 0), {"head_dim": 8}, "at least 16"),
        ("cpu", (9, 0), {}, "cpu tensors"),
    ],
)
def test_reasons_on_nvidia(machine, name, found, changes, reason):
    machine(found)
    assert reason in kernels.unsupported_reason(name, need(**changes))


@pytest.mark.fast
@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("flash3", {}, "NVIDIA"),
        ("flash4", {}, "NVIDIA"),
        ("sdpa_cudnn", {}, "NVIDIA"),
        ("sdpa_flash", {"deterministic": True}, "deterministic"),
        ("sdpa_efficient", {"deterministic": True}, "deterministic"),
    ],
)
def test_reasons_on_rocm(machine, name, changes, reason):
    machine(hip="6.4")
    assert reason in kernels.unsupported_reason(name, need(**changes))


@pytest.mark.fast
@pytest.mark.parametrize(
    ("name", "found"), [("flash2", (9, 0)), ("flash3", (9, 0)), ("flash4", (9, 0)), ("aiter", None)]
)
def test_a_package_that_is_not_installed(machine, monkeypatch, name, found):
    machine(found, hip=None if found else "6.4")
    monkeypatch.setattr(gpu, "import_or_reason", lambda module: "is not installed (no module x)")
    assert "not installed" in kernels.unsupported_reason(name, need())


@pytest.mark.fast
def test_a_package_version_that_we_do_not_know_is_refused(machine, monkeypatch):
    machine((9, 0))
    odd = standins._modules("flash_attn.flash_attn_interface")["flash_attn.flash_attn_interface"]
    monkeypatch.setattr(gpu, "import_or_reason", lambda module: odd)
    assert (
        "has no flash_attn.flash_attn_interface._flash_attn_forward"
        in kernels.unsupported_reason("flash2", need())
    )
    odd._flash_attn_forward = lambda q, k, v, softmax_scale, is_causal: None
    assert "no argument causal, window_size|window_size_left" in kernels.unsupported_reason(
        "flash2", need()
    )
    with pytest.raises(NotImplementedError, match="no argument causal"):
        x = torch.zeros(1, 8, 1, 8)
        load("flash2").forward(x, x, x, band=(None, None), scale=1.0)


@pytest.mark.fast
def test_auto_on_cpu_takes_the_cpu_kernel():
    for grad, dtype in itertools.product(
        (True, False), (torch.float64, torch.float32, torch.bfloat16)
    ):
        assert kernels.choose("auto", KernelRequest(CPU, dtype, 40, grad=grad)) == "cpu"


@pytest.mark.fast
def test_auto_takes_the_first_of_the_table_that_can(machine, monkeypatch):
    packages = ("flash-attn 4", "flash-attn 3", "flash-attn 2.8", "aiter")
    with standins.installed(*packages):
        machine((9, 0))
        assert kernels.choose("auto", need()) == "flash4"
        assert kernels.choose("auto", need(dtype=torch.float32)) == "sdpa_efficient"
        assert kernels.choose("auto", need(dtype=torch.float64)) == "reference"
        machine((8, 0))
        assert kernels.choose("auto", need()) == "flash2"
        machine(hip="6.4")
        assert kernels.choose("auto", need()) in ("flash2", "aiter")
    monkeypatch.setattr(gpu, "import_or_reason", lambda module: "is not installed (no module x)")
    machine((9, 0))
    assert kernels.choose("auto", need()) == "sdpa_flash"
    machine(hip="6.4")
    assert kernels.choose("auto", need(head_dim=300)) == "sdpa_efficient"


@pytest.mark.fast
def test_a_named_kernel_that_cannot_raises_with_its_reason():
    with pytest.raises(
        NotImplementedError, match=r"kernel='flash2' cannot do this: it runs on GPUs.*ringx info"
    ):
        kernels.choose("flash2", KernelRequest(CPU, torch.float32, 64))


@pytest.mark.fast
def test_an_unknown_kernel_raises_with_the_nearest_name():
    with pytest.raises(ValueError, match=r"'sdpa_flsh' is unknown\. Did you mean 'sdpa_flash'"):
        kernels.choose("sdpa_flsh", KernelRequest(CPU, torch.float32, 64))


@pytest.mark.fast
@pytest.mark.parametrize("name", ["reference", "cpu"])
def test_a_second_run_is_bitwise_the_same(name):
    pieces, seen = one_rank(True)
    x = inputs(*seen.shape, dtype=torch.bfloat16)
    first, second = (flow(name, *x, pieces, 0.25, deterministic=True) for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.fast
def test_every_kernel_of_the_table_keeps_the_protocol():
    for name in KERNELS:
        kernel = load(name)
        assert kernel.causal_alignment in ("any", "top-left", "bottom-right", "square")
        assert (
            callable(kernel.unsupported_reason)
            and callable(kernel.forward)
            and callable(kernel.backward)
        )
