"""The ViT's estimate equals what its real steps hold and send, and closed forms.

FLOPs and parameters equal torch's counts.

pytest test/apps/vit/test_vit_estimate.py
"""

import dataclasses
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from helpers.real_steps import expect_estimated, measured_steps
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode

import ringx
from apps.common.config import MeshConfig
from apps.vit import open_data, parallel, train
from apps.vit.config import PRESETS, Config, ModelConfig, TrainConfig, preset
from apps.vit.data import simulate
from apps.vit.estimate import estimate_step
from apps.vit.flops import flops_per_token, parameters
from apps.vit.model import ViT
from apps.vit.train import configure, main, parser
from ringx.launch.mesh import Shape

MODEL = ModelConfig(
    dim=128, layers=2, heads=4, ffn=384, height=32, width=64, in_channels=15, out_channels=4
)  # 512 tokens


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def config(model=MODEL, mesh=None, **changes) -> Config:
    how = dict(global_batch=2, dtype="float32") | changes
    return Config("test", model, train=TrainConfig(**how), mesh=MeshConfig(**(mesh or {})))


def make_batch(config: Config, samples: int, tokens: int) -> tuple[torch.Tensor, ...]:
    """Patches of the inputs, positions, patches of the targets, weights."""
    model = config.model
    points = model.patch**2
    return (
        torch.zeros(samples, tokens, model.in_channels * points),
        torch.zeros(tokens, dtype=torch.long),
        torch.zeros(samples, tokens, model.out_channels * points),
        torch.ones(tokens, points),
    )


@pytest.mark.parametrize(
    ("shape", "model", "changes"),
    [
        pytest.param(Shape(), {}, {}, marks=pytest.mark.slow),
        (
            Shape(),
            {"patch": 3, "positions": "sinusoidal"},
            {"checkpointing": "selective", "mlp_tiles": 4, "dtype": "bfloat16"},
        ),
        (Shape(2), {}, {"checkpointing": "full", "dtype": "bfloat16", "algorithm": "ringx4"}),
        pytest.param(
            Shape(1, 1, 2),
            {"patch": 4},
            {"checkpointing": "selective", "dp_engine": "ddp", "dtype": "bfloat16"},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            Shape(2, 2),
            {"patch": 3, "positions": "sinusoidal", "layers": 1},
            {"checkpointing": "selective", "mlp_tiles": 2, "dtype": "bfloat16"},
            marks=pytest.mark.slow,
        ),
    ],
    ids=str,
)
def test_peak_and_bytes_of_attention_are_those_of_a_real_run(shape, model, changes):
    c = config(replace(MODEL, **model)).changed(changes)
    estimate = estimate_step(c, shape)
    tokens = c.model.patch_grid().tokens
    expect_estimated(estimate, measured_steps(c, shape, parallel, make_batch, tokens)[0])
    assert (shape.cp > 1) == any(estimate.sent.get("attention forward", {}).values())


@pytest.mark.parametrize(
    "algorithm",
    [
        "ringx4",
        *(pytest.param(a, marks=pytest.mark.slow) for a in ringx.algorithms() if a != "ringx4"),
    ],
)
def test_bytes_equal_closed_forms(algorithm):
    model = replace(MODEL, layers=1)
    shape, c = (
        Shape(4, 1, 2),
        config(model, algorithm=algorithm, checkpointing="selective", global_batch=4),
    )
    plans = [estimate_step(c, shape, rank) for rank in range(4)]
    form = ringx.algorithms()[algorithm].bytes(2, 512, 4, 4, 32, 4, 4, False, "contiguous")
    for direction, want in zip(("forward", "backward"), form, strict=True):
        got = [sum(p.sent[f"attention {direction}"].values()) for p in plans]
        assert sum(got) / 4 == pytest.approx(want)

    # The block is gathered in the forward and again in the backward; the rest of the model stays
    # gathered in between
    total, n = parameters(model).total, shape.world_size
    block = 4 * (128**2 + 128) + 2 * 128 * 384 + 384 + 128 + 2 * 2 * 128
    for p in plans:
        assert p.sent["parameters"] == {"all_gather": (total + block) * 4 * (n - 1) / n}
        assert p.sent["gradients"] == {"reduce_scatter": total * 4 * (n - 1) / n}


@pytest.mark.fast
@pytest.mark.parametrize("dtype, size", [("float32", 4), ("bfloat16", 2)])
@pytest.mark.parametrize("engine", ["fsdp", "ddp"])
def test_what_is_kept_equals_closed_forms(engine, dtype, size):
    plan = estimate_step(config(mesh={"dp_engine": engine}, dtype=dtype), Shape(2, 1, 2))
    number = parameters(MODEL).total / (4 if engine == "fsdp" else 1)
    tensors = 2 + 1 + MODEL.layers * 16 + 2 + 2
    assert plan.memory.parameters == plan.memory.gradients == 4 * number
    assert plan.memory.optimizer == 2 * 4 * number + 4 * tensors  # and each one's count of steps
    assert plan.memory.remote_blocks == 2 * 512 * 128 * size  # all keys and values of a field
    if engine == "ddp":
        assert plan.sent["gradients"] == {"all_reduce": 2 * 4 * number * 3 / 4}


def test_passes_are_multiplied():
    once, many = (estimate_step(config(global_batch=n, micro_batch=2), Shape(2)) for n in (2, 10))
    assert (once.passes, many.passes) == (1, 5) and many.flops_full == pytest.approx(
        5 * once.flops_full
    )
    for purpose in ("attention forward", "attention backward"):
        assert sum(many.sent[purpose].values()) == 5 * sum(once.sent[purpose].values())
    assert many.sent["gradients"] == once.sent["gradients"]


@pytest.mark.fast
def test_refused():
    with pytest.raises(
        ValueError,
        match="dp_engine=zero2: memory and bytes of DeepSpeed's engines cannot be estimated",
    ):
        estimate_step(config(mesh={"dp_engine": "zero2"}), Shape(2))
    with pytest.raises(ValueError, match="tp=3 does not divide heads=4"):
        estimate_step(config(), Shape(1, 3))
    with pytest.raises(ValueError, match="cp=513 is more than the 512 tokens"):
        estimate_step(config(), Shape(513))
    assert not dist.is_initialized()


# ---- FLOPs and parameters


def planned(*flags) -> Config:
    """The configuration that the command would plan."""
    job, _ = configure(parser().parse_args([*flags, "--estimate"]))
    return job.config


@pytest.mark.fast
@pytest.mark.parametrize("positions", ["learned", "sinusoidal"])
@pytest.mark.parametrize("name", PRESETS)
def test_parameters_of_presets_are_those_of_their_models(name, positions):
    model = planned("--preset", name, "--positions", positions).model
    there = ViT.empty(model, lambda q, k, v: q)
    assert parameters(model).total == sum(p.numel() for p in there.parameters())
    assert all(p.is_meta for p in there.parameters())


@pytest.mark.fast
def test_known_sizes():
    """2.6 billion without embeddings, positions and head is 12 layers of 12 dim^2."""
    tokens = {1: 259_200, 2: 64_800, 4: 16_200, 8: 4_050}
    for patch, count in tokens.items():
        c = preset(f"2.6b-p{patch}")
        assert c.model.patch_grid().tokens == count
        assert (c.model.height, c.model.width) == (360, 720)
        blocks = 12 * (12 * 4096**2 + 13 * 4096)
        assert parameters(replace(c.model, positions="sinusoidal")).total - blocks < 0.02 * blocks
        assert c.mesh.cp == {1: 32, 2: 8}.get(patch, 0)
    rows, columns = simulate.Sphere(simulate.DEFAULT.truncation).shape
    for name in ("tiny", "5m", "90m", "300m"):
        m = planned("--preset", name).model
        assert (m.height, m.width, m.in_channels, m.out_channels) == (
            rows,
            columns,
            15,
            3,
        ) and m.periodic
    assert 4e6 < parameters(planned("--preset", "5m").model).total < 6e6
    assert 80e6 < parameters(planned("--preset", "90m").model).total < 100e6
    assert 270e6 < parameters(planned("--preset", "300m").model).total < 330e6


def plain(q, k, v):
    return scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


@pytest.mark.fast
@pytest.mark.parametrize(
    "changes", [{"patch": 2}, {"patch": 3, "positions": "sinusoidal"}], ids=str
)
def test_flops_are_those_that_torch_counts(changes):
    """6 for each number of a matrix, except 4 for the first: its inputs need no gradient."""
    model = replace(MODEL, **changes)
    vit, points, S = ViT(model, plain), model.patch**2, model.patch_grid().tokens
    per_token = flops_per_token(model)
    assert per_token.full == per_token.causal
    batch = (
        torch.zeros(2, S, 15 * points),
        torch.arange(S),
        torch.zeros(2, S, 4 * points),
        torch.ones(S, points),
    )
    first = 2 * model.dim * 15 * points
    for asked in (True, False):
        batch[0].requires_grad_(asked)
        # that of its kernel for CPUs torch does not count
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            vit(*batch).backward()
        assert counter.get_total_flops() == 2 * S * (per_token.full - (0 if asked else first))


@pytest.mark.fast
def test_flops_of_a_step_are_shared_by_the_ranks():
    plan = estimate_step(config(global_batch=4), Shape(2, 1, 2))
    assert (
        plan.tokens == 4 * 512
        and plan.flops_full == plan.flops_causal == flops_per_token(MODEL).full * 4 * 512 / 4
    )


# ---- the command


def refuse(*_, **__):
    raise AssertionError("not without being asked")


@pytest.mark.parametrize("flag", ["--estimate", "--dry-run"])
def test_the_command_makes_no_data(flag, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(simulate, "simulate", refuse)
    monkeypatch.setattr(train, "data_path", refuse)
    monkeypatch.setattr(train, "statistics", refuse)
    assert main(["--preset", "tiny", "--cp", "2", "--dp", "2", flag]) == 0
    output = capsys.readouterr().out
    assert (
        "tiny: 391,884 parameters on 4 ranks (fsdp); memory of rank 0:" in output
        and "peak, of which:" in output
    )
    assert ("attention forward" in output and "cp 2 x tp 1 x dp 2" in output) == (
        flag == "--dry-run"
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("times, year", [(300, 2), (40, 0)])
def test_a_file_gives_its_sizes_and_is_not_read(times, year, tmp_path, monkeypatch, capsys):
    """The sizes are a run's; the time of year is an input only of a record that is long enough."""
    xr = pytest.importorskip("xarray")
    time = np.datetime64("2001-01-01", "ns") + np.arange(times) * np.timedelta64(6, "h")
    grid, lat, lon = ("latitude", "longitude"), np.linspace(60, 40, 10), np.arange(14.0)
    rng = np.random.default_rng(0)
    fields = {
        name: (("time", *grid), rng.random((times, 10, 14)).astype("f4")) for name in ("u", "v")
    }
    record = xr.Dataset(
        fields | {"lsm": (grid, rng.random((10, 14)))},
        {"time": time, "latitude": lat, "longitude": lon},
    )
    record.to_netcdf(tmp_path / "a.nc")
    flags = ["--data", str(tmp_path / "a.nc"), "--leads", "6,12,18", "--patch", "4"]
    with monkeypatch.context() as patched:
        patched.setattr(open_data.Fields, "read", refuse)
        patched.setattr(train, "statistics", refuse)
        m = planned(*flags).model
        assert (m.height, m.width, m.periodic, m.patch_grid().tokens) == (10, 14, False, 12)
        assert (m.in_channels, m.out_channels) == (2 + 2 + year + 1 + 1 + 2 * 4, 2 * 3)
        assert main([*flags, "--cp", "3", "--dry-run"]) == 0
        output = capsys.readouterr().out
        assert (
            f"in_channels: {m.in_channels}\n" in output
            and "a step: 16 samples, 192 tokens, 1 passes" in output
        )
        few = planned(*flags, "--variables", "v", "--inputs", "latitude").model
        assert (few.in_channels, few.out_channels) == (2, 3)
        large = planned(
            "--preset", "2.6b-p4", *flags[:2]
        ).model  # the file's sizes, not the preset's
        assert (large.height, large.width, large.out_channels) == (10, 14, 2)
        with pytest.raises(SystemExit):
            main([*flags, "--cp", "13", "--estimate"])
        words = "cp=13 is more than the 12 tokens of a field; take a smaller --cp or --patch."
        assert capsys.readouterr().err == f"apps.vit.train: error: {words}\n"
    c = planned(*flags)
    opened = open_data.open_record(flags[1], c.data)
    made = train.statistics(
        opened, open_data.split_record(opened, c.data)["train"], c.data.hours(), cache=None
    )
    assert (
        open_data.with_data_sizes(
            c, opened, open_data.make_samples(opened, c.data, made, "train")
        ).model
        == c.model
    )


@pytest.mark.slow  # CI has thousands of ranks in test_gpt_estimate.py
def test_thousands_of_ranks(capsys):
    """259,200 tokens a field (half a degree, point by point) over 32 of 4,096 ranks.

    3 of the 12 layers, so that it takes less time."""
    assert main(["--preset", "2.6b-p1", "--layers", "3", "--dp", "128", "--dry-run"]) == 0
    output = capsys.readouterr().out
    assert max(map(len, output.splitlines())) <= 100
    assert "mesh: cp 32 x tp 1 x dp 128 (1 replicas), 4096 ranks, order cp-tp-dp" in output
    assert "a step: 128 samples, 33,177,600 tokens, 1 passes; of this rank:" in output
    total = parameters(replace(preset("2.6b-p1").model, layers=3)).total
    assert f"2.6b-p1: {total:,} parameters on 4096 ranks (fsdp); memory of rank 0:" in output
    assert (
        "    3.96 GiB  of other ranks' blocks in attention, at most at once" in output
    )  # 2 x 259,200 x 4,096 in bf16
    for words in (
        "peak, of which:",
        "attention forward (all_gather)",
        "attention backward",
        "sent, of which:",
        "FLOPs",
    ):
        assert words in output, words
    assert output.count("= ranks") == 16 and "... and 112 more groups" in output


def test_a_large_plan_in_numbers():
    """Two of its layers."""
    c = preset("2.6b-p2")
    c = replace(c, model=replace(c.model, layers=2))
    plan = estimate_step(c, c.mesh.fit(8))
    assert (
        plan.tokens == 64_800 and plan.layers == 2 and plan.parameters == parameters(c.model).total
    )
    assert plan.memory.parameters == pytest.approx(plan.parameters * 4 / 8, rel=0.01)
    assert plan.memory.remote_blocks == 2 * 64_800 * 4096 * 2  # keys and values of a field in bf16
    form = ringx.algorithms()["ringx3"].bytes(1, 64_800, 32, 32, 128, 8, 2, False)
    assert sum(plan.sent["attention forward"].values()) == 2 * form[0]
    assert json.loads(json.dumps(dataclasses.asdict(plan)))["memory"]["peak"] == plan.memory.peak
