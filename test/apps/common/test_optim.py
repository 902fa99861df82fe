"""Optimizers and clipping: the papers' formulas written out.

Sharded parameters are compared with those of one process.

pytest test/apps/common/test_optim.py
"""

import math
import sys
import types

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as checkpoint
import torch.nn as nn
from helpers.ranks import run
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from apps.common.optim import OPTIMIZERS, Lamb, clip_by_global_norm, make_optimizer

RECIPE = {"lr": 0.02, "weight_decay": 0.1, "betas": (0.9, 0.95), "eps": 1e-6}
STEPS = 4


class Scale(nn.Module):
    """A single number: on two ranks one holds nothing of it."""

    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.full((1,), 1.5, dtype=torch.float64))

    def forward(self, x):
        return x * self.factor


def network(seed=0) -> nn.Sequential:
    """Sizes that no two ranks share equally, and parameters of one dimension.

    One weight is zero: its trust ratio is 1."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Linear(5, 10), nn.Tanh(), nn.Linear(10, 7), nn.LayerNorm(7), Scale(), nn.Linear(7, 3)
    ).double()
    nn.init.zeros_(model[5].weight)
    return model


@pytest.fixture(scope="module")
def batches():
    torch.manual_seed(1)
    return [
        (torch.randn(8, 5, dtype=torch.float64), 5 * torch.randn(8, 3, dtype=torch.float64))
        for _ in range(STEPS)
    ]


def loss_of(model, x, y):
    return ((model(x) - y) ** 2).sum()


def whole(t):
    return (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone()


def shard(model, kind):
    """Cuts a model over all ranks; returns (data-parallel ranks, this rank's number among them)."""
    world = dist.get_world_size()
    if kind == "fsdp":
        mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("dp",))
    else:
        mesh = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("dp", "tp"))
        parallelize_module(
            model, mesh["tp"], {"0": ColwiseParallel(), "2": RowwiseParallel()}
        )  # norm and head: on no tp mesh
    if kind != "tp":
        fully_shard(model[2], mesh=mesh["dp"])
        fully_shard(model, mesh=mesh["dp"])
    return mesh["dp"].size(), mesh.get_local_rank("dp")


def training(model, name, batches, kind=None, clip=1.0):
    """(norms, parameters and state, all whole) after STEPS steps."""
    dp, i = shard(model, kind) if kind else (1, 0)
    optimizer = make_optimizer(name, model.parameters(), **RECIPE)
    norms = []
    for x, y in batches:
        (
            loss_of(model, x.chunk(dp)[i], y.chunk(dp)[i]) * dp
        ).backward()  # FSDP2 takes the mean over dp
        norms.append(clip_by_global_norm(model.parameters(), clip))
        optimizer.step()
        optimizer.zero_grad()
    values = {n: whole(p) for n, p in model.named_parameters()}
    state = {
        (n, k): whole(s) for n, p in model.named_parameters() for k, s in optimizer.state[p].items()
    }
    return norms, values, state


# ---- the formulas


def written_out(name, model, batches, clip=1.0):
    """Both optimizers from their papers, one parameter and one step after the other."""
    lr, decay, (b1, b2), eps = RECIPE.values()
    memory = {}
    for t, (x, y) in enumerate(batches, 1):
        model.zero_grad()
        loss_of(model, x, y).backward()
        total = math.sqrt(
            math.fsum(g * g for p in model.parameters() for g in p.grad.flatten().tolist())
        )
        with torch.no_grad():
            for n, p in model.named_parameters():
                g = p.grad * min(1.0, clip / total)
                m, v = memory.get(n, (0.0, 0.0))
                memory[n] = m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
                u = (m / (1 - b1**t)) / (torch.sqrt(v / (1 - b2**t)) + eps) + decay * (
                    p.dim() > 1
                ) * p
                ratio = 1.0
                if name == "lamb" and p.norm() > 0 and u.norm() > 0:
                    ratio = p.norm() / u.norm()
                p -= lr * ratio * u
    return {n: p.detach().clone() for n, p in model.named_parameters()}


@pytest.mark.fast
@pytest.mark.parametrize("name", ["adamw", "lamb"])
def test_the_papers_formula(name, batches):
    want = written_out(name, network(), batches)
    norms, got, state = training(network(), name, batches)
    assert max(norms) > 1  # it did clip
    for n, p in want.items():
        torch.testing.assert_close(got[n], p, rtol=1e-12, atol=1e-13, msg=n)
    assert {k for _, k in state} == {"step", "exp_avg", "exp_avg_sq"} and all(
        isinstance(s, torch.Tensor) for s in state.values()
    )
    assert all(s == STEPS for (_, k), s in state.items() if k == "step")


@pytest.mark.fast
def test_lamb_by_hand():
    """A first step: u = g / (|g| + eps) + decay x, whatever the betas.

    Here it is (1, -1) + 0.5 (3, 4) = (2.5, 1)."""
    x, bias, zero = (
        nn.Parameter(torch.tensor(v, dtype=torch.float64))
        for v in ([[3.0, 4.0]], [3.0, 4.0], [[0.0, 0.0]])
    )
    for p in (x, bias, zero):
        p.grad = torch.tensor([7.0, -2.0], dtype=torch.float64).view_as(p)
    make_optimizer(
        "lamb", [x, bias, zero], lr=0.1, weight_decay=0.5, betas=(0.8, 0.9), eps=1e-300
    ).step()
    ratio = 5 / math.hypot(2.5, 1.0)
    torch.testing.assert_close(
        x.data, torch.tensor([[3 - 0.1 * ratio * 2.5, 4 - 0.1 * ratio]], dtype=torch.float64)
    )
    ratio = 5 / math.sqrt(2)  # no decay: one dimension
    torch.testing.assert_close(
        bias.data, torch.tensor([3 - 0.1 * ratio, 4 + 0.1 * ratio], dtype=torch.float64)
    )
    torch.testing.assert_close(zero.data, torch.tensor([[-0.1, 0.1]], dtype=torch.float64))


@pytest.mark.fast
def test_lamb_without_a_gradient_or_with_a_zero_one():
    unused, still = (nn.Parameter(torch.ones(3, 2)) for _ in range(2))
    still.grad = torch.zeros(3, 2)
    optimizer = make_optimizer("lamb", [unused, still], **RECIPE | {"weight_decay": 0.0})
    optimizer.step()
    assert torch.equal(unused, torch.ones(3, 2)) and torch.equal(still, torch.ones(3, 2))
    assert unused not in optimizer.state and optimizer.state[still]["step"] == 1
    with pytest.raises(ValueError, match="closure"):
        optimizer.step(lambda: 0.0)


@pytest.mark.fast
def test_lamb_in_fp32_far_from_one():
    """Norms whose squares fp32 cannot hold."""
    for size in (1e-25, 1e25):
        p = nn.Parameter(torch.full((2, 2), size))
        p.grad = torch.ones(2, 2)
        make_optimizer("lamb", [p], lr=0.5, weight_decay=0.0, betas=(0.9, 0.99), eps=1e-8).step()
        torch.testing.assert_close(p.data, torch.full((2, 2), 0.5 * size))


# ---- sharded


@pytest.mark.parametrize(
    "kind, world",
    [
        ("fsdp x tp", 4),
        pytest.param("fsdp", 2, marks=pytest.mark.slow),
        pytest.param("tp", 2, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("name", ["adamw", "lamb"])
def test_shards_equal_one_process(name, kind, world, batches):
    want = training(network(), name, batches)
    models = [network() for _ in range(world)]
    results = run(world, lambda rank: training(models[rank], name, batches, kind))
    for norms, values, state in results:
        assert all(type(n) is torch.Tensor for n in norms)
        assert torch.equal(
            torch.stack(norms), torch.stack(results[0][0])
        )  # bit for bit on every rank
        torch.testing.assert_close(torch.stack(norms), torch.stack(want[0]), rtol=1e-12, atol=0)
        for mine, one in ((values, want[1]), (state, want[2])):
            assert mine.keys() == one.keys()
            for n, p in one.items():
                torch.testing.assert_close(mine[n], p, rtol=1e-12, atol=1e-12, msg=str(n))


@pytest.mark.fast
@pytest.mark.parametrize("layers", [1, 6])
def test_messages_do_not_grow_with_the_number_of_parameters(layers, monkeypatch):
    models, sent, all_reduce = (
        [nn.Sequential(*(nn.Linear(4, 4) for _ in range(layers))) for _ in range(2)],
        [],
        dist.all_reduce,
    )
    monkeypatch.setattr(
        dist, "all_reduce", lambda *args, **kwargs: (sent.append(1), all_reduce(*args, **kwargs))[1]
    )

    def rank(r):
        mesh = init_device_mesh("cpu", (2,))
        for layer in models[r]:
            fully_shard(layer, mesh=mesh)
        for p in models[r].parameters():
            p.grad = torch.ones_like(p)
        clip_by_global_norm(models[r].parameters(), 1.0)
        make_optimizer("lamb", models[r].parameters(), **RECIPE).step()

    run(2, rank)
    assert len(sent) == 2 * 2  # by each of two ranks: one to clip, one for the trust ratios


@pytest.mark.parametrize("name", ["lamb", pytest.param("adamw", marks=pytest.mark.slow)])
def test_distributed_checkpoint_goes_on_elsewhere(name, batches, tmp_path):
    """Saved by two FSDP2 ranks; loaded by one process, by as many ranks, and by FSDP2 x TP.

    The last has more parameter groups."""
    want = training(network(), name, batches)[1]
    models = [network(seed) for seed in range(10)]
    options = StateDictOptions(
        flatten_optimizer_state_dict=True
    )  # by names, not by numbers of groups

    def steps(model, optimizer, dp, i, some):
        for x, y in some:
            (loss_of(model, x.chunk(dp)[i], y.chunk(dp)[i]) * dp).backward()
            clip_by_global_norm(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

    def first(rank):
        model = network_of_threads[rank]
        dp, i = shard(model, "fsdp")
        optimizer = make_optimizer(name, model.parameters(), **RECIPE)
        steps(model, optimizer, dp, i, batches[:2])
        sharded = get_optimizer_state_dict(model, optimizer)["state"]["0.weight"]
        assert {k: isinstance(s, DTensor) for k, s in sharded.items()} == {
            "step": False,
            "exp_avg": True,
            "exp_avg_sq": True,
        }
        parts = (
            get_model_state_dict(model),
            get_optimizer_state_dict(model, optimizer, options=options),
        )
        checkpoint.save(dict(zip("mo", parts, strict=True)), checkpoint_id=tmp_path / "saved")

    def second(rank, models, kind):
        model = models[rank]
        dp, i = shard(model, kind) if kind else (1, 0)
        optimizer = make_optimizer(name, model.parameters(), **RECIPE | {"lr": 9.0})
        parts = {
            "m": get_model_state_dict(model),
            "o": get_optimizer_state_dict(model, optimizer, options=options),
        }
        checkpoint.load(parts, checkpoint_id=tmp_path / "saved")
        set_model_state_dict(model, parts["m"])
        set_optimizer_state_dict(model, optimizer, parts["o"], options=options)
        assert {g["lr"] for g in optimizer.param_groups} == {RECIPE["lr"]}
        steps(model, optimizer, dp, i, batches[2:])
        return {n: whole(p) for n, p in model.named_parameters()}

    network_of_threads = [network() for _ in range(2)]
    run(2, first)
    for world, kind in ((1, None), (2, "fsdp"), (4, "fsdp x tp")):
        others, models = (
            models[:world],
            models[world:],
        )  # of other seeds: all must come from the checkpoint
        for got in run(world, second, others, kind):
            for n, p in want.items():
                torch.testing.assert_close(got[n], p, rtol=1e-12, atol=1e-12, msg=f"{kind} {n}")


# ---- clipping


@pytest.mark.fast
def test_clipping_by_the_true_norm():
    params = [
        nn.Parameter(torch.zeros(3)),
        nn.Parameter(torch.zeros(2, 2)),
        nn.Parameter(torch.zeros(1)),
    ]
    params[0].grad, params[1].grad = torch.full((3,), 2.0), torch.full((2, 2), -1.0)
    assert clip_by_global_norm(params, 0).item() == 4.0 and params[0].grad[0] == 2.0
    assert clip_by_global_norm(iter(params), 100.0).item() == 4.0 and params[0].grad[0] == 2.0
    clip_by_global_norm(params, 1.0)
    assert math.isclose(
        math.hypot(*(g for p in params[:2] for g in p.grad.flatten().tolist())), 1.0, rel_tol=1e-6
    )
    for p in params[:2]:
        p.grad.zero_()
    assert clip_by_global_norm(params, 1.0) == 0 and not params[0].grad.isnan().any()
    params[0].grad[0] = math.inf
    assert clip_by_global_norm(params, 1.0) == math.inf


@pytest.mark.fast
def test_the_norm_of_bf16_gradients_is_fp32():
    """4096 numbers of 1 + 1/128: bf16 cannot hold their norm, 64.5."""
    p, q = nn.Parameter(torch.zeros(4096, dtype=torch.bfloat16)), nn.Parameter(torch.zeros(3))
    p.grad = torch.full_like(p, 1 + 1 / 128)
    norm = clip_by_global_norm([p], 1.0)
    assert norm.dtype == torch.float32 and math.isclose(norm.item(), 64.5, rel_tol=1e-6)
    assert p.grad.dtype == torch.bfloat16 and math.isclose(p.grad[0].item(), 1 / 64, rel_tol=1e-2)
    p.grad, q.grad = torch.full_like(p, 4 / 64), torch.tensor([0.0, 3.0, 0.0])  # together
    assert clip_by_global_norm([p, q], 2.5).item() == 5.0
    assert q.grad[1].item() == 1.5 and p.grad[7].item() == 2 / 64


@pytest.mark.fast
def test_gradients_that_wait_for_their_sum():
    """Of a sequence-parallel norm, say: each rank has its tokens' part."""

    def rank(r):
        mesh = init_device_mesh("cpu", (2,))
        part = nn.Parameter(DTensor.from_local(torch.zeros(2), mesh, [Replicate()]))
        part.grad = DTensor.from_local(torch.tensor([[1.0, 0.0], [2.0, 4.0]])[r], mesh, [Partial()])
        cut = nn.Parameter(
            distribute_tensor(torch.zeros(3, 4), mesh, [Shard(0)], src_data_rank=None)
        )
        cut.grad = distribute_tensor(torch.ones(3, 4), mesh, [Shard(0)], src_data_rank=None)
        plain = nn.Parameter(torch.zeros(1))
        plain.grad = torch.full((1,), 12.0)  # counts once
        norm = clip_by_global_norm([part, cut, plain], 1.3)  # 3, 4; 12 ones; 12
        return (
            norm.item(),
            part.grad.placements,
            [whole(p.grad).flatten().tolist() for p in (part, cut, plain)],
        )

    for norm, placements, grads in run(2, rank):
        assert math.isclose(norm, math.sqrt(25 + 12 + 144), rel_tol=1e-6) and placements == (
            Replicate(),
        )
        scale = 1.3 / math.sqrt(181)
        for got, want in zip(grads, ([3, 4], [1] * 12, [12]), strict=True):
            assert got == pytest.approx([w * scale for w in want], rel=1e-5)


# ---- by name


@pytest.mark.fast
def test_groups_and_what_has_no_gradient():
    frozen, matrix, bias = (
        nn.Parameter(torch.zeros(2, 2), requires_grad=False),
        nn.Parameter(torch.zeros(2, 2)),
        nn.Parameter(torch.zeros(2)),
    )
    for name in ("adamw", "lamb"):
        optimizer = make_optimizer(name, iter([frozen, matrix, bias]), **RECIPE)
        assert [(g["params"], g["weight_decay"]) for g in optimizer.param_groups] == [
            ([matrix], 0.1),
            ([bias], 0.0),
        ]
        assert {(g["lr"], g["betas"], g["eps"]) for g in optimizer.param_groups} == {
            (0.02, (0.9, 0.95), 1e-6)
        }


@pytest.mark.fast
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_adamw_is_fused_where_it_can_be(dtype):
    p = nn.Parameter(torch.ones(4, dtype=dtype))
    p.grad = torch.ones_like(p)
    optimizer = make_optimizer("adamw", [p], **RECIPE | {"lr": 0.25})
    assert isinstance(optimizer, torch.optim.AdamW) and optimizer.param_groups[0]["fused"]
    optimizer.step()
    torch.testing.assert_close(p.data, torch.full((4,), 0.75, dtype=dtype), rtol=1e-5, atol=0)
    assert not make_optimizer(
        "adamw", [nn.Parameter(torch.ones(4, device="meta"))], **RECIPE
    ).param_groups[0]["fused"]


@pytest.mark.fast
@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"name": "lmab"}, "optimizer='lmab' is unknown. Did you mean 'lamb'"),
        ({"lr": -1.0}, r"lr=-1.0 must be a number of at least 0\."),
        ({"lr": math.nan}, "lr=nan"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1"),
        ({"betas": (0.9, 1.0)}, r"betas=\(0.9, 1.0\) must be two numbers from 0 to below 1"),
        ({"eps": 0.0}, "eps=0.0 must be a number greater than 0"),
        ({"params": []}, "params holds no parameter"),
        ({"name": "lamb_apex"}, "optimizer='lamb_apex' needs all parameters on a GPU; use 'lamb'"),
        ({"name": "lamb_deepspeed"}, "optimizer='lamb_deepspeed' needs all parameters on a GPU"),
    ],
)
def test_mistakes_name_the_argument(wrong, message):
    arguments = {"name": "adamw", "params": [nn.Parameter(torch.ones(2))], **RECIPE, **wrong}
    with pytest.raises(ValueError, match=message) as e:
        make_optimizer(arguments.pop("name"), arguments.pop("params"), **arguments)
    assert "\n" not in str(e.value)


@pytest.mark.fast
def test_clipping_mistakes():
    p = nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match="no gradient to clip"):
        clip_by_global_norm([p], 1.0)
    p.grad = torch.ones(2)
    for wrong in (-1.0, math.nan):
        with pytest.raises(ValueError, match=f"max_norm={wrong}"):
            clip_by_global_norm([p], wrong)


class OnGpu(nn.Parameter):
    """What a fused LAMB is offered where there is no GPU to try it on."""

    device = torch.device("cuda")


@pytest.mark.fast
@pytest.mark.parametrize(
    "name, module, cls",
    [
        ("lamb_apex", "apex.optimizers", "FusedLAMB"),
        ("lamb_deepspeed", "deepspeed.ops.lamb", "FusedLamb"),
    ],
)
def test_fused_lambs_that_are_not_installed_and_what_they_would_get(name, module, cls, monkeypatch):
    params = [OnGpu(torch.ones(2, 2)), OnGpu(torch.ones(2))]
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(
        ValueError, match=rf"optimizer='{name}': {module}.{cls} is not installed; .*use 'lamb'"
    ):
        make_optimizer(name, params, **RECIPE)
    seen = {}
    stand_in = types.SimpleNamespace(
        **{cls: lambda groups, **options: seen.update(options, groups=groups)}
    )
    for i in range(1, module.count(".") + 1):
        monkeypatch.setitem(
            sys.modules, ".".join(module.split(".")[:i]), types.ModuleType("a parent")
        )
    monkeypatch.setitem(sys.modules, module, stand_in)
    make_optimizer(name, params, **RECIPE)
    assert [(g["params"], g["weight_decay"]) for g in seen["groups"]] == [
        ([params[0]], 0.1),
        ([params[1]], 0.0),
    ]
    assert seen["lr"] == 0.02 and seen["max_grad_norm"] == (
        math.inf if name == "lamb_apex" else 0.0
    )


@pytest.mark.fast
def test_every_name_has_a_description():
    assert list(OPTIMIZERS) == ["adamw", "lamb", "lamb_apex", "lamb_deepspeed"] and issubclass(
        Lamb, torch.optim.Optimizer
    )
