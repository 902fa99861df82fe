"""What a training step costs beside a plain Llama, and what cutting the sequence saves.  Repetitions of all take turns.

    python script/gpt_cost.py cp1 --out results/gpt_cpu2_202611      # a step at cp = 1 against a plain SDPA Llama without ringx
    python script/gpt_cost.py cp2 --out results/gpt_cpu2_202611      # two ranks of one thread against one process of one thread

Both write a JSON with every time measured; ratios are of medians, and the spread is that of the middle half.  fp32, AdamW, causal.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import ringx
from apps.common.config import MeshConfig
from apps.gpt.config import Config, ModelConfig, TrainConfig
from apps.gpt.parallel import Attend, build
from ringx.launch.mesh import Mesh, Shape

SIZES = {  # name: model, sequence length
    "cp1": (ModelConfig(dim=512, layers=4, heads=8, kv_heads=4, ffn=1408, vocab=8192), 1024),
    "cp2": (
        ModelConfig(dim=256, layers=2, heads=8, kv_heads=4, ffn=704, vocab=1024),
        8192,
    ),  # attention: two thirds of the FLOPs
}


class Plain(nn.Module):
    """The same Llama as one would write it with torch alone."""

    def __init__(self, c: ModelConfig, seqlen: int):
        super().__init__()
        self.c = c
        self.embed = nn.Embedding(c.vocab, c.dim)
        sizes = {
            "q": c.heads * c.head_dim,
            "k": c.kv_heads * c.head_dim,
            "v": c.kv_heads * c.head_dim,
        }
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {name: nn.Linear(c.dim, n, bias=False) for name, n in sizes.items()}
                | {
                    "o": nn.Linear(sizes["q"], c.dim, bias=False),
                    "down": nn.Linear(c.ffn, c.dim, bias=False),
                }
                | {name: nn.Linear(c.dim, c.ffn, bias=False) for name in ("gate", "up")}
                | {name: nn.RMSNorm(c.dim, c.norm_eps) for name in ("norm1", "norm2")}
            )
            for _ in range(c.layers)
        )
        self.norm = nn.RMSNorm(c.dim, c.norm_eps)
        angle = torch.outer(
            torch.arange(seqlen), c.rope_base ** -(torch.arange(0, c.head_dim, 2) / c.head_dim)
        )
        self.register_buffer("cos", angle.cos()[:, None])
        self.register_buffer("sin", angle.sin()[:, None])

    def turn(self, x):
        a, b = x.chunk(2, -1)
        return torch.cat((a * self.cos - b * self.sin, b * self.cos + a * self.sin), -1)

    def forward(self, tokens, labels):
        x = self.embed(tokens)
        for b in self.blocks:
            h = b["norm1"](x)
            q, k, v = (b[n](h).unflatten(-1, (-1, self.c.head_dim)) for n in "qkv")
            q, k, v = (y.transpose(1, 2) for y in (self.turn(q), self.turn(k), v))
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            x = x + b["o"](out.transpose(1, 2).flatten(2))
            h = b["norm2"](x)
            x = x + b["down"](F.silu(b["gate"](h)) * b["up"](h))
        return F.cross_entropy(
            F.linear(self.norm(x), self.embed.weight).flatten(0, 1), labels.flatten()
        )


def config_of(what: str, **mesh) -> Config:
    model, seqlen = SIZES[what]
    return Config(
        what, model, TrainConfig(seqlen=seqlen, global_batch=1, dtype="float32"), MeshConfig(**mesh)
    )


def ours(config: Config, mesh: Mesh, attend: Callable, tokens: torch.Tensor) -> Callable[[], float]:
    engine = build(config, mesh, attend)
    group, layout = mesh.cp, ringx.Sharding(config.train.seqlen, mesh.shape.cp, config.train.layout)
    if mesh.shape.cp == 1:
        x, y, where = tokens[:, :-1], tokens[:, 1:], torch.arange(config.train.seqlen)
    else:
        x, y = (ringx.shard(t, group=group, layout=layout) for t in (tokens[:, :-1], tokens[:, 1:]))
        where = ringx.positions(config.train.seqlen, group=group, layout=layout)

    def step() -> float:
        with engine.accumulate(last=True):
            loss = engine(x, where, y) / config.train.seqlen
            engine.backward(loss)
        float(engine.step(1e-3, 1.0))
        return float(engine.sum(loss.detach()))

    return step


def plain(config: Config, tokens: torch.Tensor) -> Callable[[], float]:
    model = Plain(config.model, config.train.seqlen)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )

    def step() -> float:
        loss = model(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def alternate(steps: dict[str, Callable[[], object]], reps: int) -> dict[str, list[float]]:
    """Seconds of each, by turns, the order reversed every other time; the first turn warms up."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for rep in range(reps + 1):
        for name in list(steps)[:: 1 if rep % 2 else -1]:
            began = time.perf_counter()
            steps[name]()
            if rep:
                times[name].append(time.perf_counter() - began)
    return times


def spread(x: list[float]) -> list[float]:
    low, middle, high = statistics.quantiles(x, n=4)
    return [round(v, 4) for v in (low, middle, high)]


def cp1(world, reps: int) -> dict:
    config = config_of("cp1")
    tokens = torch.randint(
        0,
        config.model.vocab,
        (1, config.train.seqlen + 1),
        generator=torch.Generator().manual_seed(0),
    )
    mesh = Mesh.make(Shape())
    times = alternate(
        {"plain": plain(config, tokens), "ringx": ours(config, mesh, Attend(config, mesh), tokens)},
        reps,
    )
    return {
        "seconds": times,
        "ringx_over_plain": statistics.median(times["ringx"]) / statistics.median(times["plain"]),
    }


def cp2(world, reps: int) -> dict:
    config = config_of("cp2", cp=2)
    tokens = torch.randint(
        0,
        config.model.vocab,
        (1, config.train.seqlen + 1),
        generator=torch.Generator().manual_seed(0),
    )
    mesh = Mesh.make(Shape(2))
    both, solo = ours(config, mesh, Attend(config, mesh), tokens), dist.new_group([0])
    dist.barrier()
    lone = None
    if world.rank == 0:  # the same code on the whole sequence, by one rank, while the other waits

        def attend(q, k, v):
            return ringx.attention(
                q, k, v, group=solo, algorithm="ringx3", causal=True, check=False
            )

        lone = ours(config, Mesh(Shape(), 0, 0, 0), attend, tokens)

    def by_one() -> None:
        if lone:
            lone()
        dist.barrier()

    def by_two() -> None:
        both()
        dist.barrier()

    times = alternate({"one": by_one, "two": by_two}, reps)
    return {
        "seconds": times,
        "two_over_half_of_one": statistics.median(times["two"])
        / (statistics.median(times["one"]) / 2),
    }


def main() -> int:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("what", choices=sorted(SIZES))
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--reps", type=int, default=15)
    args = p.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    found = ringx.launch.run(
        {"cp1": cp1, "cp2": cp2}[args.what], 1 if args.what == "cp1" else 2, args.reps, device="cpu"
    )[0]
    seqlen = SIZES[args.what][1]
    found |= {
        "quartiles": {k: spread(v) for k, v in found["seconds"].items()},
        "seqlen": seqlen,
        "torch": torch.__version__,
    }
    (args.out / f"cost_{args.what}.json").write_text(json.dumps(found, indent=1) + "\n")
    print({k: v for k, v in found.items() if k != "seconds"})
    return 0


if __name__ == "__main__":
    sys.exit(main())
