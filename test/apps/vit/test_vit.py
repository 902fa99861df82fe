"""apps/vit trains alike on any mesh, with every engine, algorithm and way to save memory.

One process trains as a plain ViT does that is written out here.

pytest test/apps/vit/test_vit.py
"""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.ranks import run

import ringx
from apps.common.config import MeshConfig
from apps.vit.config import PRESETS, Config, DataConfig, ModelConfig, TrainConfig
from apps.vit.model import ViT, initial_weight
from apps.vit.parallel import Attend, build
from apps.vit.patches import PatchGrid
from ringx.launch.mesh import ORDERS, Mesh, Shape

xr = pytest.importorskip("xarray")

from apps.vit.data.dataset import open_fields  # noqa: E402
from apps.vit.data.statistics import statistics  # noqa: E402
from apps.vit.open_data import make_samples, split_record, with_data_sizes  # noqa: E402
from apps.vit.train import main, train  # noqa: E402

MODEL = ModelConfig(dim=16, layers=2, heads=4, ffn=24, patch=4)
TRAIN = TrainConfig(global_batch=2, steps=20, lr=1e-2, warmup=3, dtype="float64")
MESHES = [
    (3, 1, 1),
    # with fewer tokens, CI has tp and dp in the tests below
    *(
        pytest.param(sizes, marks=pytest.mark.slow)
        for sizes in ((2, 1, 1), (4, 1, 1), (1, 2, 1), (2, 2, 1), (2, 1, 2))
    ),
]


def record(height, width, degrees=360.0, times=48):
    """Waves that travel to the east, one across the grid, a quarter of a wave apart in u and v.

    How they change follows from where they are."""
    lat, lon = np.linspace(70, -60, height), np.arange(width) * degrees / width
    time = np.datetime64("2001-01-01", "ns") + np.arange(times) * np.timedelta64(6, "h")
    angle = (
        2 * np.pi * (lon[None] / degrees - np.arange(times)[:, None] / 15)[:, None]
        + lat[:, None] / 30
    )
    noise = np.random.default_rng(0).standard_normal((2, times, height, width)) / 10
    grid = ("latitude", "longitude")
    fields = {
        n: (("time", *grid), (f(angle) + e).astype("f4"))
        for n, f, e in zip("uv", (np.sin, np.cos), noise, strict=True)
    }
    static = np.random.default_rng(1).random((height, width)).astype("f4")
    return xr.Dataset(
        {**fields, "lsm": (grid, static)}, {"time": time, "latitude": lat, "longitude": lon}
    )


class Opened:
    """A record on disk, and its samples."""

    def __init__(self, folder, data, **how):
        data.to_netcdf(folder / "a.nc")
        self.config, self.fields = DataConfig(**how), open_fields(folder / "a.nc")
        made = statistics(
            self.fields,
            split_record(self.fields, self.config)["train"],
            self.config.hours(),
            cache=None,
        )
        self.train, self.val = (
            make_samples(self.fields, self.config, made, part) for part in ("train", "val")
        )


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """16 x 32 points around the globe."""
    return Opened(tmp_path_factory.mktemp("small"), record(16, 32))


@pytest.fixture(scope="module")
def two_leads(tmp_path_factory):
    return Opened(
        tmp_path_factory.mktemp("leads"), record(16, 32), leads="12,6", history="6", base="damped"
    )


@pytest.fixture(scope="module")
def region(tmp_path_factory):
    """33 x 49 points, which neither 2 nor 4 divides, of a quarter of the globe."""
    return Opened(tmp_path_factory.mktemp("region"), record(33, 49, 90.0))


def config(data, model=None, mesh=None, **changes) -> Config:
    c = Config(
        "test",
        replace(MODEL, **(model or {})),
        data.config,
        replace(TRAIN, **changes),
        replace(MeshConfig(), **(mesh or {})),
    )
    return with_data_sizes(c, data.fields, data.train)


def trained(shape: Shape, c: Config, data, **how):
    """(records, whole parameters, this rank's parts of them, its place) of every rank."""

    def rank(_):
        mesh, records = Mesh.make(shape), []
        attend = Attend(c, mesh)
        engine = build(c, mesh, attend)
        train(c, data.train, mesh, engine, attend, on_step=records.append, **how)
        named = list(engine.module.named_parameters())
        # Cloned: the result of a collective that is never used is never waited for, and keeps its
        # process group (and threads) alive
        whole = {
            n: (p.full_tensor().clone() if hasattr(p, "full_tensor") else p).detach()
            for n, p in named
        }
        parts = {
            n: (p.to_local() if hasattr(p, "to_local") else p).detach().clone() for n, p in named
        }
        return records, whole, parts, (mesh.cp_rank, mesh.tp_rank, mesh.dp_rank)

    return run(shape.world_size, rank, timeout=120)


def alone(c: Config, data, **how):
    return trained(Shape(), c, data, **how)[0]


def expect_same(a, b, tolerance=1e-9):
    """Compares losses, gradient norms and every parameter.

    AdamW alone would not notice a gradient that is scaled by the number of ranks."""
    assert len(a[0]) == len(b[0]) > 0
    for x, y in zip(a[0], b[0], strict=True):
        for what in ("loss", "grad_norm"):
            assert math.isclose(x[what], y[what], rel_tol=tolerance), (x, y)
    assert a[1].keys() == b[1].keys()
    for name, p in a[1].items():
        worst = (p - b[1][name]).abs().max().item()
        assert worst <= tolerance, name


def falls(result, to: float) -> bool:
    return result[0][-1]["loss"] < to * result[0][0]["loss"]


# ---- a ViT with none of this repository's code


def plain_patches(x, patch, periodic):
    """[B, C, H, W] -> [B, S, C patch^2]

    Extended to the south by the last row, to the east by the first columns or the last."""
    below, right = -x.shape[-2] % patch, -x.shape[-1] % patch
    x = F.pad(x, (0, right, 0, 0), mode="circular" if periodic else "replicate")
    x = F.pad(x, (0, 0, 0, below), mode="replicate")
    return F.unfold(x, patch, stride=patch).transpose(1, 2)


def plain_vit(p, x, c: ModelConfig):
    """[B, C, H, W] -> [B, Cout, H, W] by the parameters p."""

    def linear(name, x):
        return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]

    def norm(name, x):
        x = x - x.mean(-1, keepdim=True)
        return (
            x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * p[f"{name}.weight"]
            + p[f"{name}.bias"]
        )

    def attention(name, x):
        B, S, _ = x.shape
        q, k, v = (
            linear(f"{name}.{n}_proj", x).view(B, S, c.heads, -1).transpose(1, 2) for n in "qkv"
        )
        seen = (q @ k.transpose(2, 3) / math.sqrt(c.dim // c.heads)).softmax(-1)
        return linear(f"{name}.o_proj", (seen @ v).transpose(1, 2).reshape(B, S, -1))

    rows, columns = -(-c.height // c.patch), -(-c.width // c.patch)
    if c.positions == "learned":
        places = p["places.table.weight"]
    else:
        places, n = torch.zeros(rows * columns, c.dim, dtype=torch.float64), c.dim // 4
        for token in range(rows * columns):
            for i in range(n):
                for half, number in enumerate(divmod(token, columns)):
                    angle = number / 10_000 ** (i / n)
                    places[token, 2 * half * n + i], places[token, (2 * half + 1) * n + i] = (
                        math.sin(angle),
                        math.cos(angle),
                    )
    x = linear("embed", plain_patches(x, c.patch, c.periodic)) + places
    for i in range(c.layers):
        x = x + attention(f"layers.{i}.attn", norm(f"layers.{i}.norm_attn", x))
        h = linear(f"layers.{i}.mlp.up_proj", norm(f"layers.{i}.norm_mlp", x))
        x = x + linear(f"layers.{i}.mlp.down_proj", h * 0.5 * (1 + torch.erf(h / math.sqrt(2))))
    x = linear("head", norm("norm", x)).transpose(1, 2)
    return F.fold(x, (rows * c.patch, columns * c.patch), c.patch, stride=c.patch)[
        ..., : c.height, : c.width
    ]


def plain_errors(p, samples, t0s, m):
    """[B, leads x channels, H, W]: squared errors of normalised changes, weighted by latitude."""
    inputs, target = (torch.from_numpy(x).double() for x in samples.get(t0s))
    cosine = np.cos(np.linspace(70, -60, m.height) * np.pi / 180)
    weights = torch.from_numpy(cosine / cosine.mean())[:, None]
    return (plain_vit(p, inputs, m) - target.flatten(1, 2)).square() * weights


def plain_learning_rate(step):
    """Three steps of warmup to 1e-2, then a cosine to a tenth of it over 17."""
    if step < 3:
        return 1e-2 * (step + 1) / 3
    return 1e-2 * (0.55 + 0.45 * math.cos(math.pi * (step - 2) / 17))


@pytest.mark.fast
@pytest.mark.parametrize(
    "data, patch, positions",
    [("two_leads", 3, "learned"), ("small", 4, "sinusoidal"), ("region", 8, "learned")],
)
def test_equals_a_plain_vit(data, patch, positions, request):
    """Patches, attention, loss, clipping and schedule are written out here, with torch's AdamW."""
    data = request.getfixturevalue(data)
    c = config(data, {"patch": patch, "positions": positions}, clip=0.2)
    m, t = c.model, c.train
    records, got, *_ = alone(c, data)
    p = {
        name: torch.nn.Parameter(initial_weight(name, x.shape, m, t.seed).double())
        for name, x in got.items()
    }
    matrices, others = (
        [x for x in p.values() if (x.dim() > 1) == wanted] for wanted in (True, False)
    )
    optimizer = torch.optim.AdamW(
        [{"params": matrices}, {"params": others, "weight_decay": 0.0}],
        betas=(0.9, 0.95),
        weight_decay=0.1,
    )
    for step, r in enumerate(records):
        loss = plain_errors(p, data.train, data.train.rows(step, 2, t.seed), m).mean()
        optimizer.zero_grad()
        loss.backward()
        norm = torch.cat([x.grad.flatten() for x in p.values()]).norm().item()
        for x in p.values():
            x.grad *= min(1.0, 0.2 / norm)
        lr = plain_learning_rate(step)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        assert math.isclose(r["lr"], lr, rel_tol=1e-12)
        assert math.isclose(r["loss"], loss.item(), rel_tol=1e-12), step
        assert math.isclose(r["grad_norm"], norm, rel_tol=1e-10), step
    for name, x in p.items():
        assert (x - got[name]).abs().max() <= 1e-10, name
    assert len(records) == 20 and falls((records,), 0.7)
    assert len({r["grad_norm"] > 0.2 for r in records}) == 2  # it did clip, and not always


def test_no_change_is_forecast_at_first(small):
    m = config(small).model
    model = ViT(m, lambda q, k, v: v)
    for name, p in model.named_parameters():
        p.data = initial_weight(name, p.shape, m, 0)
    x = torch.randn(1, 32, m.in_channels * 16, generator=torch.Generator().manual_seed(0))
    assert not model(x, torch.arange(32)).any()


# ---- the same training


@pytest.fixture(scope="module")
def region_alone(region):
    """By samples of a step, when first asked for."""
    made = {}

    def of(samples):
        if samples not in made:
            made[samples] = alone(on_region(region, samples), region)
        return made[samples]

    return of


def on_region(region, samples) -> Config:
    return config(region, {"patch": 1, "layers": 1, "heads": 2, "ffn": 16}, global_batch=samples)


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_twenty_steps_of_1617_tokens_equal_one_process(sizes, region, region_alone):
    shape = Shape(*sizes)
    one = region_alone(shape.dp)
    assert len(one[0]) == 20 and falls(one, 0.5) and one[0][0]["tokens"] == shape.dp * 1617
    for rank in trained(shape, on_region(region, shape.dp), region):
        expect_same(one, rank)


@pytest.fixture(scope="module")
def continued(small):
    """(configuration, one process's training): 66 tokens of an extended grid, sine positions."""
    c = config(small, {"patch": 3, "positions": "sinusoidal"})
    assert c.model.patch_grid().tokens == 66
    return c, alone(c, small)


@pytest.mark.parametrize(
    "sizes",
    [
        (3, 1, 1),
        pytest.param((2, 1, 1), marks=pytest.mark.slow),
        pytest.param((2, 1, 2), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_twenty_steps_of_a_continued_grid_equal_one_process(sizes, continued, small):
    c, one = continued
    assert len(one[0]) == 20 and falls(one, 0.5)
    for rank in trained(Shape(*sizes), c, small):
        expect_same(one, rank)


@pytest.fixture(scope="module")
def divided(small):
    """One process's training on 32 tokens, with a vector for each."""
    return alone(config(small), small)


@pytest.mark.parametrize(
    "shape, engine",
    [
        (Shape(2, 1, 2), "ddp"),
        (Shape(2, 1, 2, 2), "fsdp"),
        pytest.param(Shape(2), "ddp", marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_replicas_stay_bitwise_the_same_for_twenty_steps(shape, engine, small, divided):
    """With DDP all ranks hold everything; with replicas of shards, those of the same cp rank do."""
    ranks = trained(shape, config(small, mesh={"dp_engine": engine}), small)
    places = {}
    for rank in ranks:
        expect_same(divided, rank)
        first = places.setdefault(rank[3][0] if engine == "fsdp" else 0, rank)
        assert all(torch.equal(p, first[2][name]) for name, p in rank[2].items())
    assert len(places) < len(ranks)
    rows = next(iter(places.values()))[2]["layers.0.mlp.up_proj.weight"].shape[0]
    assert rows == (24 if engine == "ddp" else 12)


def test_any_order_of_the_axes(small):
    one = alone(config(small, steps=3), small)
    for rank in trained(Shape(2, 1, 2, order="dp-cp-tp"), config(small, steps=3), small):
        expect_same(one, rank)
    assert "dp-cp-tp" in ORDERS


@pytest.mark.parametrize(
    "shape, how",
    [
        (Shape(2), {"optimizer": "lamb", "checkpointing": "full", "mlp_tiles": 5}),
        (
            Shape(2, 2),
            {"checkpointing": "selective", "mlp_tiles": 3, "micro_batch": 1},
        ),  # 33 tokens, 17 between the matrices
        (Shape(1, 2), {"optimizer": "lamb", "micro_batch": 1}),
    ],
    ids=str,
)
def test_saving_memory_and_accumulating_change_nothing(shape, how, small):
    model, steps = {"patch": 3, "positions": "sinusoidal"}, 2
    one = alone(config(small, model, steps=steps, optimizer=how.get("optimizer", "adamw")), small)
    for rank in trained(shape, config(small, model, steps=steps, **how), small):
        expect_same(one, rank)


@pytest.fixture(scope="module")
def two_steps(small):
    return alone(config(small, {"patch": 3}, steps=2), small)


@pytest.mark.parametrize(
    "algorithm, layout",
    [
        ("ringx3", "zigzag"),
        ("ringx4", "striped"),
        # test_exact.py proves each of them exact; here it is seen to be handed on
        *(pytest.param(a, "contiguous", marks=pytest.mark.slow) for a in ringx.algorithms()),
    ],
)
def test_every_algorithm_and_layout(algorithm, layout, small, two_steps, monkeypatch):
    seen, attention = [], ringx.attention
    monkeypatch.setattr(
        ringx, "attention", lambda *qkv, **kw: (seen.append(kw), attention(*qkv, **kw))[1]
    )
    overlap = layout == "contiguous"
    c = config(small, {"patch": 3}, steps=2, algorithm=algorithm, layout=layout, overlap=overlap)
    for rank in trained(Shape(2), c, small):
        expect_same(two_steps, rank)
    want = {
        "algorithm": algorithm,
        "layout": ringx.Sharding(66, 2, layout),
        "overlap": overlap,
        "causal": False,
    }
    assert len(seen) == 2 * 2 * 2 and all(kw.items() >= want.items() for kw in seen)


def test_second_run_is_bitwise_the_same(small):
    a, b = (trained(Shape(2), config(small, steps=3), small)[0] for _ in range(2))
    assert [r["loss"] for r in a[0]] == [r["loss"] for r in b[0]]
    assert all(torch.equal(p, b[1][name]) for name, p in a[1].items())


@pytest.mark.fast
def test_seed_changes_weights_and_order(small):
    a, b = (alone(config(small, steps=1, seed=seed), small) for seed in (0, 1))
    assert a[0][0]["loss"] != b[0][0]["loss"]
    assert not torch.equal(a[1]["embed.weight"], b[1]["embed.weight"])


@pytest.mark.parametrize("engine", ["fsdp", pytest.param("ddp", marks=pytest.mark.slow)])
def test_fp32_and_bf16_keep_fp32_parameters(engine, small, monkeypatch):
    wide = alone(config(small, steps=6), small)
    seen, attention = [], ringx.attention
    monkeypatch.setattr(
        ringx,
        "attention",
        lambda q, k, v, **kw: (seen.append(q.dtype), attention(q, k, v, **kw))[1],
    )
    for dtype, tolerance in (("float32", 1e-4), ("bfloat16", 3e-2)):
        got = trained(
            Shape(2), config(small, steps=6, dtype=dtype, mesh={"dp_engine": engine}), small
        )[0]
        assert {p.dtype for p in got[1].values()} == {torch.float32}
        for x, y in zip(wide[0], got[0], strict=True):
            assert math.isclose(x["loss"], y["loss"], rel_tol=tolerance)
        assert set(seen) == {getattr(torch, dtype)}
        seen.clear()


def test_validation_equals_that_of_a_plain_vit_on_any_mesh(two_leads):
    """4 samples in passes of one, of which a dp rank takes 2; and 3, of which one takes only 1."""
    data, model = two_leads, {"patch": 3}
    c = config(data, model, steps=3, val_every=2, val_batches=4, micro_batch=1)
    one = alone(c, data, val=data.val)
    expect_same(alone(replace(c, train=replace(c.train, val_every=0)), data), one)
    starts, last = data.val.starts(6), one[0][-1]
    assert len(starts) == 4 and ["val_loss" in r for r in one[0]] == [False, True, True]
    errors = plain_errors(one[1], data.val, starts, c.model).mean((0, 2, 3))
    assert last["val_loss"] == pytest.approx(errors.mean().item(), rel=1e-10)

    inputs = torch.from_numpy(data.val.get(starts)[0]).double()
    forecast = data.val.to_fields(
        plain_vit(one[1], inputs, c.model).unflatten(1, (2, 2)).numpy(), starts
    )
    weights = (w := np.cos(np.deg2rad(np.linspace(70, -60, 16)))) / w.mean()
    for i, lead in enumerate((12, 6)):
        squares = (forecast[:, i] - data.fields.read(starts + lead // 6)).astype(
            float
        ) ** 2 * weights[:, None]
        for name, value in zip("uv", np.sqrt(squares.mean((0, 2, 3))), strict=True):
            assert last[f"val_rmse/{name}+{lead}h"] == pytest.approx(value, rel=1e-5)
    assert sum(key.startswith("val_rmse/") for key in last) == 4

    fewer = replace(data.config, val_times="33/39", train_times="0/33", test_times="39/48")
    odd = make_samples(data.fields, fewer, data.val.statistics, "val")
    assert len(odd) == 3
    for val, want in ((data.val, one), (odd, alone(c, data, val=odd))):
        for rank in trained(Shape(2, 1, 2), c, data, val=val):
            expect_same(want, rank)
            for r, s in zip(want[0], rank[0], strict=True):
                assert [s[k] for k in r if k.startswith("val_")] == pytest.approx(
                    [r[k] for k in r if k.startswith("val_")], rel=1e-9
                )


@pytest.mark.fast
def test_records_say_what_a_step_cost(small):
    records, *_ = trained(Shape(2), config(small, steps=2), small)[0]
    m = config(small).model
    for n, r in enumerate(records):
        assert r["step"] == n and r["tokens"] == (n + 1) * 2 * 32 and 0 <= r["data_wait_share"] <= 1
        matmul = 2 * (4 * 16 * 16 + 2 * 16 * 24) + 16 * 16 * (m.in_channels + m.out_channels)
        flops = 6 * matmul + 12 * 2 * 16 * 32
        assert r["tflops_per_rank_full"] == pytest.approx(flops * 64 / r["seconds"] / 2 / 1e12)
        assert r["epoch"] == (n + 1) / math.ceil(len(small.train) / 2)


# ---- tensor parallelism


def matrix_shapes_over_tp(points):
    """Of two layers of width 16 on four ranks of tp."""
    return {
        "embed.weight": (4, points),
        "places.table.weight": (66, 4),
        "head.weight": (9 * 2, 4),
        **{f"layers.{i}.attn.{n}_proj.weight": (4, 16) for i in range(2) for n in "qkv"},
        **{f"layers.{i}.attn.o_proj.weight": (16, 4) for i in range(2)},
        **{f"layers.{i}.mlp.up_proj.weight": (6, 16) for i in range(2)},
        **{f"layers.{i}.mlp.down_proj.weight": (16, 6) for i in range(2)},
    }


def test_matrices_are_cut_over_tp(small):
    c = config(small, {"patch": 3}, steps=2)
    one, ranks = alone(c, small), trained(Shape(1, 4), c, small)
    want = matrix_shapes_over_tp(points=9 * c.model.in_channels)
    whole, first_rank = one[1], ranks[0][2]
    cut = [name for name, p in first_rank.items() if p.shape != whole[name].shape]
    for rank in ranks:
        expect_same(one, rank)
        matrices = {name: tuple(p.shape) for name, p in rank[2].items() if p.dim() > 1}
        assert matrices == want
        for name in set(whole) - set(cut):
            assert torch.equal(rank[2][name], first_rank[name]), name
    assert len(cut) == len(want) + 1 + 2 * 4  # and the biases of what makes columns


def test_fewer_tokens_than_tp(tmp_path):
    """One token: the second rank has nothing but what fills up."""
    data = Opened(tmp_path, record(8, 8))
    c = config(data, {"patch": 8}, steps=2)
    assert c.model.patch_grid().tokens == 1
    one = alone(c, data)
    for rank in trained(Shape(1, 2), c, data):
        expect_same(one, rank)


# ---- patches


@pytest.mark.fast
@pytest.mark.parametrize("periodic", [True, False])
@pytest.mark.parametrize(
    "height, width, patch",
    [(16, 32, 4), (16, 32, 3), (33, 49, 1), (33, 49, 8), (5, 7, 5), (1, 9, 1)],
)
def test_join_is_the_inverse_of_cut(height, width, patch, periodic):
    p = PatchGrid(height, width, patch, periodic)
    x = torch.arange(2.0 * 3 * height * width).view(2, 3, height, width)
    tokens = p.patchify(x)
    assert tokens.shape == (2, p.tokens, 3 * patch**2) and torch.equal(p.unpatchify(tokens), x)
    assert torch.equal(tokens, plain_patches(x, patch, periodic))
    some = torch.tensor([p.tokens - 1, 0])
    assert torch.equal(p.patchify(x, some), tokens[:, some])


@pytest.mark.fast
def test_a_grid_goes_on_around_the_globe_or_as_it_ends():
    """5 x 7 points in patches of 4: one column and three rows are added."""
    x = torch.arange(35.0).view(1, 5, 7)
    first, second, third, last = (
        PatchGrid(5, 7, 4, periodic=True).patchify(x).view(4, 4, 4).tolist()
    )
    assert first == [[0, 1, 2, 3], [7, 8, 9, 10], [14, 15, 16, 17], [21, 22, 23, 24]]
    assert second == [[4, 5, 6, 0], [11, 12, 13, 7], [18, 19, 20, 14], [25, 26, 27, 21]]
    assert third == [[28, 29, 30, 31]] * 4  # there is nothing beyond the pole
    assert last == [[32, 33, 34, 28]] * 4
    _, second, _, last = PatchGrid(5, 7, 4, periodic=False).patchify(x).view(4, 4, 4).tolist()
    assert [row[-2:] for row in second] == [[6, 6], [13, 13], [20, 20], [27, 27]]
    assert last == [[32, 33, 34, 34]] * 4


@pytest.mark.fast
@pytest.mark.parametrize("height, width, patch", [(16, 32, 4), (16, 32, 3), (33, 49, 8), (5, 7, 4)])
def test_what_is_added_has_no_weight(height, width, patch):
    p = PatchGrid(height, width, patch, periodic=True)
    ones = p.patchify_weights(torch.ones(height))
    assert (
        ones.shape == (p.tokens, patch**2)
        and ones.sum() == height * width
        and set(ones.unique().tolist()) <= {0.0, 1.0}
    )
    cosine = np.cos(np.linspace(-1.5, 1.5, height))
    weights = p.patchify_weights(torch.from_numpy(cosine / cosine.mean()))
    assert weights.sum().item() == pytest.approx(height * width, rel=1e-14)
    assert torch.equal(weights != 0, ones != 0)
    below = p.patchify_weights(torch.arange(1.0, height + 1))
    assert torch.equal(
        p.unpatchify(below)[0], torch.arange(1.0, height + 1)[:, None].expand(height, width)
    )
    some = torch.tensor([p.tokens - 1, 0])
    assert torch.equal(p.patchify_weights(torch.ones(height), some), ones[some])


# ---- what cannot be


@pytest.mark.fast
@pytest.mark.parametrize(
    "sizes, model, changes, words",
    [
        ((1, 3, 1), {}, {}, "tp=3 does not divide heads=4 of the model; take a smaller --tp."),
        (
            (1, 4, 1),
            {"ffn": 18},
            {},
            "tp=4 does not divide ffn=18 of the model; take a smaller --tp.",
        ),
        (
            (33, 1, 1),
            {},
            {},
            "cp=33 is more than the 32 tokens of a field; take a smaller --cp or --patch.",
        ),
        (
            (1, 2, 1),
            {},
            {"mesh": {"dp_engine": "ddp"}},
            "dp_engine=ddp cannot be combined with tp=2; use --dp-engine fsdp.",
        ),
        ((2, 2, 1), {}, {"mlp_tiles": 9}, "mlp_tiles=9 is more than the tokens that a rank holds."),
        (
            (1, 1, 3),
            {},
            {},
            "global_batch=2 must be a multiple of dp=3: each group takes equally many samples.",
        ),
    ],
)
def test_meshes_that_do_not_fit(sizes, model, changes, words, small):
    with pytest.raises(ValueError) as caught:
        config(small, model, **changes).expect_fits(Shape(*sizes))
    assert str(caught.value) == words


@pytest.mark.fast
def test_the_mlp_follows_the_width():
    assert (
        replace(PRESETS["tiny"].model, dim=64).hidden == 256 and replace(MODEL, dim=64).hidden == 24
    )


@pytest.mark.fast
def test_the_most_that_fits(small):
    config(small).expect_fits(Shape(32))
    config(small, mlp_tiles=8).expect_fits(Shape(2, 2))
    for c in PRESETS.values():
        c.expect_fits(c.mesh.fit(c.mesh.cp or 1))


@pytest.mark.fast
@pytest.mark.parametrize(
    "flags, words",
    [
        ("--patch 9", "patch=9 must be at most 8."),
        ("--patch 0", "patch=0 must be at least 1."),
        ("--leads 0", "leads='0' must be different whole numbers of hours above 0, such as 6,24."),
        (
            "--leads 6,6",
            "leads='6,6' must be different whole numbers of hours above 0, such as 6,24.",
        ),
        (
            "--leads day",
            "leads='day' must be different whole numbers of hours above 0, such as 6,24.",
        ),
        ("--heads 5", "heads=5 must divide dim=96."),
        (
            "--dim 90 --heads 5 --positions sinusoidal",
            "dim=90 must be a multiple of 4 for sinusoidal positions.",
        ),
        ("--tp 3", "tp=3 does not divide heads=4 of the model; take a smaller --tp."),
        (
            "--tp 2 --dp-engine ddp",
            "dp_engine=ddp cannot be combined with tp=2; use --dp-engine fsdp.",
        ),
        (
            "--cp 513",
            "cp=513 is more than the 512 tokens of a field; take a smaller --cp or --patch.",
        ),
    ],
)
def test_the_command_refuses(flags, words, capsys):
    with pytest.raises(SystemExit) as caught:
        main([*flags.split(), "--global-batch", "48", "--dry-run"])
    assert caught.value.code == 2 and capsys.readouterr().err == f"apps.vit.train: error: {words}\n"


@pytest.mark.fast
def test_unknown_positions():
    with pytest.raises(ValueError) as caught:
        ModelConfig(positions="rotary")
    assert str(caught.value) == "positions='rotary' is unknown. Known: learned, sinusoidal."
    with pytest.raises(
        ValueError, match=r"positions='learnt' is unknown\. Did you mean 'learned'\?"
    ):
        ModelConfig(positions="learnt")
