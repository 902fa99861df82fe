"""Local kernels: what they compute and refuse, how they are chosen, and how packages are called.

Packages and operators that cannot run here are replaced by ``helpers.standins``.
"""

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

pytestmark = pytest.mark.fast
CPU = torch.device("cpu")
GPU = torch.device("cuda")
RESULTS = ("out", "lse", "dq", "dk", "dv")
DENSE = (None, None)
CAUSAL = (None, 0)


# ---- cut


def visible(row_count, key_count, band):
    """[row_count, key_count]: which pairs a band leaves."""
    lo, hi = band
    offset = torch.arange(key_count) - torch.arange(row_count)[:, None]
    pairs = torch.ones(row_count, key_count, dtype=torch.bool)
    if lo is not None:
        pairs &= offset >= lo
    if hi is not None:
        pairs &= offset <= hi
    return pairs


def assert_kernel_can_do(piece, alignment):
    row_count = piece.q.stop - piece.q.start
    key_count = piece.k.stop - piece.k.start
    assert row_count > 0 and key_count > 0
    if alignment == "any" or piece.hi is None:
        return
    assert piece.lo is None
    if alignment == "top-left":
        assert piece.hi == 0 and key_count <= row_count
    elif alignment == "bottom-right":
        assert piece.hi == key_count - row_count and key_count >= row_count
    else:
        assert piece.hi == 0 and key_count == row_count


@pytest.mark.parametrize("alignment", ["top-left", "bottom-right", "square", "any"])
def test_cut_leaves_exactly_the_band_in_pieces_the_kernel_can_do(alignment):
    q_start = 3
    k_start = 5
    for row_count, key_count in itertools.product((1, 2, 3, 5, 8), repeat=2):
        rows = slice(q_start, q_start + row_count)
        keys = slice(k_start, k_start + key_count)
        for hi in (None, *range(1 - row_count, key_count)):
            tile = Tile(rows, keys, None, hi)
            count = torch.zeros(rows.stop, keys.stop, dtype=torch.int)
            for piece in cut(tile, alignment):
                assert_kernel_can_do(piece, alignment)
                block = count[piece.q, piece.k]
                block += visible(*block.shape, (piece.lo, piece.hi)).int()
            expected = visible(row_count, key_count, (None, hi)).int()
            assert torch.equal(count[rows, keys], expected), (row_count, key_count, hi)
            assert count.sum() == tile.area


def test_cut_refuses_a_lower_bound_for_kernels_without_windows():
    with pytest.raises(NotImplementedError, match="reference"):
        cut(Tile(slice(0, 4), slice(0, 4), -2, 0), "square")


# ---- kernels against attention by its definition


def compute(name, q, k, v, dout, tiles_, *, scale, deterministic=False):
    """RESULTS by way of ``cut``, ``OnlineSoftmax`` and the backward, as algorithms do it."""
    kernel = load(name)
    pieces = [piece for tile in tiles_ for piece in cut(tile, kernel.causal_alignment)]
    out, lse = compute_forward(kernel, q, k, v, pieces, scale)
    gradients = [torch.zeros(x.shape, dtype=acc_dtype(x.dtype)) for x in (q, k, v)]
    for t in pieces:
        parts = kernel.backward(
            dout[:, t.q],
            q[:, t.q],
            k[:, t.k],
            v[:, t.k],
            out[:, t.q],
            lse[:, :, t.q],
            band=(t.lo, t.hi),
            scale=scale,
            deterministic=deterministic,
        )
        for gradient, part, rows, x in zip(
            gradients, parts, (t.q, t.k, t.k), (q, k, v), strict=True
        ):
            assert part.dtype == x.dtype and part.shape == x[:, rows].shape
            gradient[:, rows] += part
    return dict(zip(RESULTS, (out, lse, *gradients), strict=True))


def compute_forward(kernel, q, k, v, pieces, scale):
    merged = OnlineSoftmax(q)
    batch, _, heads, _ = q.shape
    for t in pieces:
        out, lse = kernel.forward(q[:, t.q], k[:, t.k], v[:, t.k], band=(t.lo, t.hi), scale=scale)
        assert out.shape == q[:, t.q].shape and out.dtype == q.dtype
        assert lse.shape == (batch, heads, t.q.stop - t.q.start)
        assert lse.dtype == acc_dtype(q.dtype)
        merged.add(out, lse, t.q)
    return merged.out.to(q.dtype), merged.lse


def definition(q, k, v, dout, seen, scale):
    """RESULTS in fp64 by autograd, of the pairs `seen` [Sq, Sk]; every row must see a key."""
    q, k, v = (x.detach().double().requires_grad_() for x in (q, k, v))
    kv_head = torch.arange(q.shape[2]) // (q.shape[2] // k.shape[2])
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k[:, :, kv_head]) * scale
    scores = scores.masked_fill(~seen, -torch.inf)
    out = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v[:, :, kv_head])
    lse = scores.logsumexp(-1)
    gradients = torch.autograd.grad(out, (q, k, v), dout.double())
    return dict(zip(RESULTS, (out.detach(), lse.detach(), *gradients), strict=True))


def tiles_of_rank(causal, *, seqlen=53, world=3, rank=1, layout="zigzag"):
    """The tiles of one rank's queries against the keys of rank after rank, and their mask."""
    sharding = Sharding(seqlen, world, layout)
    window = CAUSAL if causal else DENSE
    result = []
    first_row = 0
    for src in range(world):
        k_runs = [run._replace(at=run.at + first_row) for run in sharding.runs(src)]
        result += tiles(sharding.runs(rank), k_runs, window=window)
        first_row += sharding.size(src)
    keys = torch.cat([sharding.positions(r) for r in range(world)])
    seen = (keys <= sharding.positions(rank)[:, None]) | (not causal)
    return result, seen


def inputs(query_count, key_count, *, H=4, Hkv=2, D=16, dtype=torch.float64, B=2):
    """q, k, v, dout."""
    generator = torch.Generator().manual_seed(query_count + key_count)
    q_shape = (B, query_count, H, D)
    k_shape = (B, key_count, Hkv, D)
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        for shape in (q_shape, k_shape, k_shape, q_shape)
    ]


def assert_close(results, expected, bound):
    for name in expected:
        assert relative(results[name], expected[name]) < bound, name


def assert_tiles_exact(name, tiles_, seen, bound, **options):
    """The kernel computes these tiles as the definition does with the mask `seen`."""
    q, k, v, dout = inputs(*seen.shape, **options)
    results = compute(name, q, k, v, dout, tiles_, scale=0.25)
    assert_close(results, definition(q, k, v, dout, seen, 0.25), bound)


@pytest.mark.parametrize("name", ["reference", "cpu"])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 5e-6), (torch.bfloat16, 1e-2)]
)
@pytest.mark.parametrize("D", [40, 64, 128])
def test_a_single_call_equals_the_definition(name, heads, dtype, bound, D):
    q, k, v, dout = inputs(37, 37, H=heads[0], Hkv=heads[1], D=D, dtype=dtype)
    for band in (DENSE, CAUSAL):
        whole = Tile(slice(0, 37), slice(0, 37), *band)
        results = compute(name, q, k, v, dout, [whole], scale=0.2)
        assert_close(results, definition(q, k, v, dout, visible(37, 37, band), 0.2), bound)


@pytest.mark.parametrize("band", [(None, 3), (-4, None), (-4, 2), (0, 1), (None, -3), (2, 9)])
def test_reference_does_every_band_and_rows_without_keys(band):
    q, k, v, dout = inputs(12, 15)
    seen = visible(12, 15, band)
    out, lse = reference.forward(q, k, v, band=band, scale=0.3)
    blind = ~seen.any(-1)
    assert bool((lse[:, :, blind] == -torch.inf).all())
    assert bool((out[:, blind] == 0).all())
    expected = definition(q[:, ~blind], k, v, dout[:, ~blind], seen[~blind], 0.3)
    dq, dk, dv = reference.backward(dout, q, k, v, out, lse, band=band, scale=0.3)
    assert bool((dq[:, blind] == 0).all())
    results = {
        "out": out[:, ~blind],
        "lse": lse[:, :, ~blind],
        "dq": dq[:, ~blind],
        "dk": dk,
        "dv": dv,
    }
    assert_close(results, expected, 1e-12)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("layout", ["zigzag", "contiguous", "striped"])
def test_pieces_of_a_rank_add_up(causal, layout):
    rank_tiles, seen = tiles_of_rank(causal, layout=layout)
    for name in ("reference", "cpu"):
        assert_tiles_exact(name, rank_tiles, seen, 1e-12)


def test_reference_is_the_oracle_of_the_other_tests():
    p = problem(19)
    out, lse = reference.forward(*p[:3], band=CAUSAL, scale=16**-0.5)
    expected = full_attention(p, causal=True)
    assert relative(out, expected["out"]) < 1e-14
    assert relative(lse, expected["lse"]) < 1e-14


# ---- ringx's calls of packages and operators that cannot run here (not the numbers of these)


@contextlib.contextmanager
def stand_in(name):
    """Yields the kernel that calls the package or operator of that name."""
    if name in standins.PACKAGES:
        kernel, _ = standins.PACKAGES[name]
        with standins.installed(name):
            yield kernel
    else:
        kernel, _, lse_dims = name.partition(":")
        with standins.aten_operators(int(lse_dims or 4)):
            yield kernel


OPERATORS = ["sdpa_flash", "sdpa_efficient", "sdpa_cudnn:3", "sdpa_cudnn:4"]


@pytest.mark.parametrize("what", [*standins.PACKAGES, *OPERATORS])
@pytest.mark.parametrize("causal", [True, False])
def test_calls_of_a_stand_in(what, causal):
    rank_tiles, seen = tiles_of_rank(causal)
    with stand_in(what) as name:
        assert_tiles_exact(name, rank_tiles, seen, 1e-12, D=16)
        assert_tiles_exact(name, rank_tiles, seen, 1e-12, D=20)
        assert_tiles_exact(name, rank_tiles, seen, 2e-2, D=16, dtype=torch.bfloat16)


@pytest.mark.parametrize("what", [*standins.PACKAGES, "sdpa_flash", "sdpa_efficient"])
def test_determinism_is_requested_and_the_switch_put_back(what):
    q, k, v, dout = inputs(8, 8)
    whole = [Tile(slice(0, 8), slice(0, 8))]
    with stand_in(what) as name:
        for wanted in (True, False):
            compute(name, q, k, v, dout, whole, scale=1.0, deterministic=wanted)
            assert standins.seen["deterministic"] is wanted
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_switch_that_only_warns_is_put_back():
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with gpu.deterministic_algorithms(True):
            assert not torch.is_deterministic_algorithms_warn_only_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


def test_cudnn_does_a_single_key_by_the_definition():
    q, k, v, dout = inputs(5, 4)
    columns = [Tile(slice(0, 5), slice(key, key + 1)) for key in range(4)]
    with standins.aten_operators():  # which refuses a single key
        results = compute("sdpa_cudnn", q, k, v, dout, columns, scale=1.0)
    everything = torch.ones(5, 4, dtype=torch.bool)
    assert_close(results, definition(q, k, v, dout, everything, 1.0), 1e-12)


def test_an_algorithm_through_a_stand_in(monkeypatch):
    monkeypatch.setattr(load("flash2"), "unsupported_reason", lambda request: None)
    p = problem(24)
    expected = full_attention(p, causal=True)

    def rank(r):
        q, k, v = (ringx.shard(x).requires_grad_() for x in p[:3])
        out = ringx.attention(q, k, v, algorithm="ringx3", causal=True, kernel="flash2")
        out.backward(ringx.shard(p.dout))
        return [ringx.unshard(x.detach()) for x in (out, q.grad, k.grad, v.grad)]

    with standins.installed("flash-attn 2.8"):
        results_of_ranks = ranks.run(2, rank)
    for tensors in results_of_ranks:
        results = dict(zip(("out", "dq", "dk", "dv"), tensors, strict=True))
        assert_close(results, {name: expected[name] for name in results}, 1e-10)


@pytest.mark.parametrize("name", ["sdpa_flash", "sdpa_efficient", "sdpa_cudnn"])
def test_shapes_that_pytorch_itself_expects_of_its_cuda_operators(name, monkeypatch):
    from torch._subclasses.fake_tensor import FakeTensorMode

    # contiguous() asks for the device, which a CPU build does not know.
    monkeypatch.setattr(torch.Tensor, "contiguous", lambda x: x)
    load("sdpa_cudnn")._lse_dimensions.cache_clear()
    with FakeTensorMode():
        q = torch.empty(2, 33, 4, 64, device="cuda", dtype=torch.bfloat16)
        k = torch.empty(2, 33, 2, 64, device="cuda", dtype=torch.bfloat16)
        out, lse = load(name).forward(q, k, k, band=CAUSAL, scale=0.1)
        assert out.shape == q.shape
        assert lse.shape == (2, 4, 33) and lse.dtype == torch.float32
        gradients = load(name).backward(
            torch.empty_like(q), q, k, k, out, lse, band=CAUSAL, scale=0.1, deterministic=False
        )
        assert [x.shape for x in gradients] == [q.shape, k.shape, k.shape]
        assert all(x.device.type == "cuda" and x.dtype == torch.bfloat16 for x in gradients)
    load("sdpa_cudnn")._lse_dimensions.cache_clear()


# ---- flex


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("band", [DENSE, CAUSAL, (-140, 7), (None, -3)])
def test_flex_forward_on_cpu(band):
    for dtype, bound in ((torch.float64, 1e-12), (torch.bfloat16, 5e-3)):
        q, k, v, _ = inputs(150, 300, dtype=dtype, B=1)
        out, lse = flex.forward(q, k, v, band=band, scale=0.3)
        expected_out, expected_lse = reference.forward(q, k, v, band=band, scale=0.3)
        assert relative(out, expected_out) < bound
        blind = expected_lse == -torch.inf
        assert torch.equal(lse == -torch.inf, blind)
        assert relative(lse[~blind], expected_lse[~blind]) < 1e-6
        assert lse.dtype == expected_lse.dtype


@pytest.mark.parametrize(
    ("row_count", "key_count", "band"),
    [
        (1, 1, (0, 0)),
        (300, 140, (-130, 5)),
        (129, 513, (None, 200)),
        (257, 129, (-3, None)),
    ],
)
def test_flex_blocks_cover_the_band(row_count, key_count, band):
    blocks = flex._block_mask(row_count, key_count, band, CPU).to_dense()[0, 0].bool()
    pairs = visible(row_count, key_count, band)
    for i, j in itertools.product(range(blocks.shape[0]), range(blocks.shape[1])):
        pairs_of_block = pairs[i * 128 : (i + 1) * 128, j * 128 : (j + 1) * 128]
        assert bool(blocks[i, j]) == bool(pairs_of_block.any())


def test_flex_backward_algebra(monkeypatch):
    """With a differentiable stand-in, since flex has no backward on CPU."""

    def attend(q, k, v, block_mask, scale, enable_gqa, kernel_options):
        assert enable_gqa
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        row = torch.arange(q.shape[2])[:, None]
        key = torch.arange(k.shape[2])
        seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool)
        if block_mask:
            seen = block_mask.mask_mod(0, 0, row, key)
        scores = (q @ k.mT * scale).masked_fill(~seen, -torch.inf)
        blind = ~seen.any(-1)
        probabilities = scores.softmax(-1).masked_fill(blind[:, None], 0.0)
        lse = scores.logsumexp(-1).masked_fill(blind, -torch.inf)
        return probabilities @ v, lse

    monkeypatch.setattr(flex, "_flex_attention", lambda device_type: (attend, {}))
    for causal in (True, False):
        rank_tiles, seen = tiles_of_rank(causal)
        assert_tiles_exact("flex", rank_tiles, seen, 1e-12)


def test_flex_refuses_to_train_on_cpu():
    request = KernelRequest(CPU, torch.float32, 64)
    assert "inference" in flex.unsupported_reason(request)
    assert flex.unsupported_reason(request._replace(grad=False)) is None
    q = torch.randn(1, 8, 2, 16, requires_grad=True)
    with pytest.raises(NotImplementedError, match=r"flex.*inference"):
        ringx.attention(q, q, q, kernel="flex")
    with torch.no_grad():
        out = ringx.attention(q, q, q, causal=True, kernel="flex")
        expected = ringx.attention(q, q, q, causal=True)
    assert relative(out, expected) < 1e-5


# ---- what is refused, and what is chosen


@pytest.fixture
def machine(monkeypatch):
    """machine(capability) or machine(hip="6.4"): what the kernels believe this machine to be."""

    def pretend(capability=None, hip=None):
        monkeypatch.setattr(gpu, "capability", lambda device: capability)
        monkeypatch.setattr(torch.version, "hip", hip)
        monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
        monkeypatch.setattr(torch.backends.cudnn, "version", lambda: None if hip else 91000)

    return pretend


def gpu_request(**changes):
    """Of bf16 attention on a GPU."""
    return KernelRequest(GPU, torch.bfloat16, 64, 8, 2)._replace(**changes)


GPU_KERNELS = set(KERNELS) - {"cpu", "reference", "flex"}


@pytest.mark.parametrize("name", sorted(GPU_KERNELS))
def test_gpu_kernels_say_that_these_tensors_are_on_the_cpu(name):
    assert "on GPUs" in kernels.unsupported_reason(name, gpu_request(device=CPU))


@pytest.mark.parametrize(
    ("name", "capability", "changes", "reason"),
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
def test_reasons_on_nvidia(machine, name, capability, changes, reason):
    machine(capability)
    assert reason in kernels.unsupported_reason(name, gpu_request(**changes))


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
    assert reason in kernels.unsupported_reason(name, gpu_request(**changes))


def no_package(module):
    return "is not installed (no module x)"


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("flash2", {"capability": (9, 0)}),
        ("flash3", {"capability": (9, 0)}),
        ("flash4", {"capability": (9, 0)}),
        ("aiter", {"hip": "6.4"}),
    ],
)
def test_a_package_that_is_not_installed(machine, monkeypatch, name, options):
    machine(**options)
    monkeypatch.setattr(gpu, "import_or_reason", no_package)
    assert "not installed" in kernels.unsupported_reason(name, gpu_request())


def test_an_unknown_version_of_a_package_is_refused(machine, monkeypatch):
    machine((9, 0))
    path = "flash_attn.flash_attn_interface"
    module = standins._modules(path)[path]
    monkeypatch.setattr(gpu, "import_or_reason", lambda module_name: module)
    reason = kernels.unsupported_reason("flash2", gpu_request())
    assert f"has no {path}._flash_attn_forward" in reason
    module._flash_attn_forward = lambda q, k, v, softmax_scale, is_causal: None
    reason = kernels.unsupported_reason("flash2", gpu_request())
    assert "no argument causal, window_size|window_size_left" in reason
    x = torch.zeros(1, 8, 1, 8)
    with pytest.raises(NotImplementedError, match="no argument causal"):
        load("flash2").forward(x, x, x, band=DENSE, scale=1.0)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_auto_on_cpu_takes_the_cpu_kernel(grad, dtype):
    assert kernels.choose("auto", KernelRequest(CPU, dtype, 40, grad=grad)) == "cpu"


def test_auto_takes_the_first_of_the_table_that_can(machine, monkeypatch):
    packages = ("flash-attn 4", "flash-attn 3", "flash-attn 2.8", "aiter")
    with standins.installed(*packages):
        machine((9, 0))
        assert kernels.choose("auto", gpu_request()) == "flash4"
        assert kernels.choose("auto", gpu_request(dtype=torch.float32)) == "sdpa_efficient"
        assert kernels.choose("auto", gpu_request(dtype=torch.float64)) == "reference"
        machine((8, 0))
        assert kernels.choose("auto", gpu_request()) == "flash2"
        machine(hip="6.4")
        assert kernels.choose("auto", gpu_request()) in ("flash2", "aiter")
    monkeypatch.setattr(gpu, "import_or_reason", no_package)
    machine((9, 0))
    assert kernels.choose("auto", gpu_request()) == "sdpa_flash"
    machine(hip="6.4")
    assert kernels.choose("auto", gpu_request(head_dim=300)) == "sdpa_efficient"


def test_a_named_kernel_that_cannot_raises_with_its_reason():
    with pytest.raises(
        NotImplementedError, match=r"kernel='flash2' cannot do this: it runs on GPUs.*ringx info"
    ):
        kernels.choose("flash2", KernelRequest(CPU, torch.float32, 64))


def test_an_unknown_kernel_raises_with_the_nearest_name():
    with pytest.raises(ValueError, match=r"'sdpa_flsh' is unknown\. Did you mean 'sdpa_flash'"):
        kernels.choose("sdpa_flsh", KernelRequest(CPU, torch.float32, 64))


@pytest.mark.parametrize("name", ["reference", "cpu"])
def test_a_second_run_is_bitwise_the_same(name):
    rank_tiles, seen = tiles_of_rank(True)
    x = inputs(*seen.shape, dtype=torch.bfloat16)
    first = compute(name, *x, rank_tiles, scale=0.25, deterministic=True)
    second = compute(name, *x, rank_tiles, scale=0.25, deterministic=True)
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("name", KERNELS)
def test_every_kernel_of_the_table_keeps_the_protocol(name):
    kernel = load(name)
    assert kernel.causal_alignment in ("any", "top-left", "bottom-right", "square")
    assert callable(kernel.unsupported_reason)
    assert callable(kernel.forward)
    assert callable(kernel.backward)
