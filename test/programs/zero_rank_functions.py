"""What test_zero.py has ranks do: functions of (world, ...) for ringx.launch.run."""

from dataclasses import replace

import torch
from torch.distributed.tensor import DTensor

import ringx
from apps.common.checkpoint import Checkpoints
from apps.common.config import MeshConfig
from apps.gpt.config import Config, ModelConfig, TrainConfig
from apps.gpt.model import initial_weight
from apps.gpt.parallel import Attend, build
from ringx.launch.mesh import Mesh, Shape

# nothing that 2 or 3 ranks divide: partitions are padded, and cut through parameters
MODEL = ModelConfig(dim=36, head_dim=10, layers=2, heads=4, kv_heads=2, ffn=49, vocab=65, tied=True)
TRAIN = TrainConfig(seqlen=48, global_batch=4, steps=20, dtype="float32", lr=5e-3, loss_chunk=7)


def begin(shape: Shape, engine: str, model=None, **train):
    config = Config(
        "test",
        replace(MODEL, **(model or {})),
        replace(TRAIN, **train),
        MeshConfig(dp_engine=engine),
    )
    mesh = Mesh.make(shape)
    attend = Attend(config, mesh)
    return config, mesh, attend, build(config, mesh, attend)


def train(
    world, shape: Shape, engine: str, model=None, first=0, steps=20, load=None, save=None, **changed
):
    """[(loss, gradient norm, loss after the step) of each step], {name: value} of what a checkpoint
    would hold."""
    config, mesh, attend, e = begin(shape, engine, model, **changed)
    c, peers = config.train, world if world.world_size > 1 else None
    if load:
        with Checkpoints(load, peers) as checkpoints:
            state = e.state()
            checkpoints.load(checkpoints.newest()[0], state)
            e.load(state)
    total, micro, passes = config.plan_batch(shape)
    positions = ringx.positions(c.seqlen, group=mesh.cp, layout=attend.layout)
    rows = range(mesh.dp_rank * total // shape.dp, (mesh.dp_rank + 1) * total // shape.dp)
    records = []
    for step in range(first, steps):
        made = torch.randint(
            0, MODEL.vocab, (total, c.seqlen + 1), generator=torch.Generator().manual_seed(step % 2)
        )[rows]
        pieces = [
            [
                ringx.shard(x, group=mesh.cp, layout=attend.layout)
                for x in (part[:, :-1], part[:, 1:])
            ]
            for part in made.split(micro)
        ]
        loss, after = torch.zeros(2)
        for i, (tokens, labels) in enumerate(pieces):
            with e.accumulate(last=i == passes - 1):
                part = e(tokens, positions, labels) / (total * c.seqlen)
                e.backward(part)
            loss += part.detach()
        norm = e.step(c.lr * (1 - step / 40), clip=0.5 if step % 2 else 0.0)
        with torch.no_grad():
            for tokens, labels in pieces:
                after += e(tokens, positions, labels) / (total * c.seqlen)
        records.append((float(e.sum(loss)), float(norm), float(e.sum(after))))
    state = e.state()
    if save:
        with Checkpoints(save, peers) as checkpoints:
            checkpoints.save(steps, state, {})
    return records, checkpointed_values(state)


def checkpointed_values(state) -> dict[str, torch.Tensor]:
    values = dict(state["model"])
    for name, moments in state["optimizer"]["state"].items():
        values |= {f"{name} {key}": value for key, value in moments.items()}
    for i, group in enumerate(state["optimizer"]["param_groups"]):
        values |= {
            f"group {i} {key}": torch.tensor(group[key], dtype=torch.float64)
            for key in ("lr", "betas", "eps", "weight_decay")
        }
        values |= {f"group {i} of {name}": torch.tensor(0) for name in group["params"]}
    return {
        name: (v.full_tensor() if isinstance(v, DTensor) else v.detach()).cpu().clone()
        for name, v in values.items()
    }


def check_initial_state(world, engine: str, dtype: str):
    """Are the first masters those of the seed, to the bit?  What does a gradient of NaN do?"""
    config, mesh, _, e = begin(Shape(cp=world.world_size), engine, dtype=dtype)
    before = checkpointed_values(e.state())
    right = all(
        torch.equal(
            before[name], initial_weight(name, before[name].shape, config.model, config.train.seed)
        )
        and float(before[f"{name} step"]) == 0
        and not before[f"{name} exp_avg"].any()
        for name, _ in e.module.named_parameters()
    )
    tokens = torch.zeros(1, config.train.seqlen // world.world_size, dtype=torch.long)
    positions = ringx.positions(config.train.seqlen, group=mesh.cp)
    with e.accumulate(last=True):
        e.backward(e(tokens, positions, tokens) * float("nan"))
    norm = float(e.step(1.0, 1.0))
    after = checkpointed_values(e.state())
    kept = all(torch.equal(before[name], after[name]) for name, _ in e.module.named_parameters())
    return right, norm, kept, next(e.module.parameters()).dtype
