"""What a training step costs beside a plain Llama, and what cutting the sequence saves.

    python script/gpt_cost.py cp1 --out results/gpt_cpu2_202611
    python script/gpt_cost.py cp2 --out results/gpt_cpu2_202611

cp1   a step at cp = 1 against that of a plain SDPA Llama without ringx
cp2   a step on two ranks of one thread against one on one process of one thread

Repetitions of both sides take turns.  Both commands write a JSON with every time measured; ratios
are of medians, and the spread is that of the middle half.  fp32, AdamW, causal.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import ringx
from apps.common.config import MeshConfig
from apps.gpt.config import Config, ModelConfig, TrainConfig
from apps.gpt.model import AttentionFunction
from apps.gpt.parallel import Attend, build
from ringx.launch import World
from ringx.launch.mesh import Mesh, Shape

Step = Callable[[], object]

SIZES = {  # name: (model, sequence length)
    "cp1": (ModelConfig(dim=512, layers=4, heads=8, kv_heads=4, ffn=1408, vocab=8192), 1024),
    # Two thirds of the FLOPs are attention.
    "cp2": (ModelConfig(dim=256, layers=2, heads=8, kv_heads=4, ffn=704, vocab=1024), 8192),
}


class PlainBlock(nn.Module):
    """A layer of PlainLlama.  Shapes: B sequences, S tokens, C = dim, H heads, D = head_dim."""

    def __init__(self, c: ModelConfig):
        super().__init__()
        self.head_dim = c.head_dim
        self.norm1 = nn.RMSNorm(c.dim, c.norm_eps)
        self.q = nn.Linear(c.dim, c.heads * c.head_dim, bias=False)
        self.k = nn.Linear(c.dim, c.kv_heads * c.head_dim, bias=False)
        self.v = nn.Linear(c.dim, c.kv_heads * c.head_dim, bias=False)
        self.o = nn.Linear(c.heads * c.head_dim, c.dim, bias=False)
        self.norm2 = nn.RMSNorm(c.dim, c.norm_eps)
        self.gate = nn.Linear(c.dim, c.ffn, bias=False)
        self.up = nn.Linear(c.dim, c.ffn, bias=False)
        self.down = nn.Linear(c.ffn, c.dim, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """[B, S, C] -> [B, S, C]."""
        h = self.norm1(x)
        q = self.q(h).unflatten(-1, (-1, self.head_dim))  # [B, S, H, D]
        k = self.k(h).unflatten(-1, (-1, self.head_dim))
        v = self.v(h).unflatten(-1, (-1, self.head_dim))
        out = F.scaled_dot_product_attention(
            rotate(q, cos, sin).transpose(1, 2),
            rotate(k, cos, sin).transpose(1, 2),
            v.transpose(1, 2),
            is_causal=True,
            enable_gqa=True,
        )
        x = x + self.o(out.transpose(1, 2).flatten(2))
        h = self.norm2(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class PlainLlama(nn.Module):
    """The same Llama as one would write it with torch alone."""

    def __init__(self, c: ModelConfig, seqlen: int):
        super().__init__()
        self.embed = nn.Embedding(c.vocab, c.dim)
        self.blocks = nn.ModuleList(PlainBlock(c) for _ in range(c.layers))
        self.norm = nn.RMSNorm(c.dim, c.norm_eps)
        frequencies = c.rope_base ** -(torch.arange(0, c.head_dim, 2) / c.head_dim)
        angle = torch.outer(torch.arange(seqlen), frequencies)
        self.register_buffer("cos", angle.cos()[:, None])
        self.register_buffer("sin", angle.sin()[:, None])

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """tokens and labels [B, S] -> the mean loss."""
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        logits = F.linear(self.norm(x), self.embed.weight)
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, S, heads, D] with each pair (x[i], x[i + D/2]) turned by its token's angle."""
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def make_config(command: str, mesh: MeshConfig) -> Config:
    model, seqlen = SIZES[command]
    train = TrainConfig(seqlen=seqlen, global_batch=1, dtype="float32")
    return Config(command, model, train, mesh)


def random_tokens(config: Config) -> Tensor:
    """[1, S + 1]: a sequence, and the last token's label."""
    generator = torch.Generator().manual_seed(0)
    shape = (1, config.train.seqlen + 1)
    return torch.randint(0, config.model.vocab, shape, generator=generator)


def ringx_step(config: Config, mesh: Mesh, attend: AttentionFunction, tokens: Tensor) -> Step:
    """A step of apps/gpt on this rank's part of the sequence."""
    engine = build(config, mesh, attend)
    seqlen = config.train.seqlen
    inputs, labels = tokens[:, :-1], tokens[:, 1:]
    positions = torch.arange(seqlen)
    if mesh.shape.cp > 1:
        layout = ringx.Sharding(seqlen, mesh.shape.cp, config.train.layout)
        inputs = ringx.shard(inputs, group=mesh.cp, layout=layout)
        labels = ringx.shard(labels, group=mesh.cp, layout=layout)
        positions = ringx.positions(seqlen, group=mesh.cp, layout=layout)

    def step() -> float:
        with engine.accumulate(last=True):
            loss = engine(inputs, positions, labels) / seqlen
            engine.backward(loss)
        float(engine.step(1e-3, 1.0))
        return float(engine.sum(loss.detach()))

    return step


def plain_step(config: Config, tokens: Tensor) -> Step:
    """A step of the plain Llama on the whole sequence."""
    model = PlainLlama(config.model, config.train.seqlen)
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


def alternate(steps: dict[str, Step], repetitions: int) -> dict[str, list[float]]:
    """Seconds of each, by turns, the order reversed every other time; the first turn warms up."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for repetition in range(repetitions + 1):
        names = list(steps)
        if repetition % 2 == 0:
            names.reverse()
        for name in names:
            began = time.perf_counter()
            steps[name]()
            seconds = time.perf_counter() - began
            if repetition > 0:
                times[name].append(seconds)
    return times


def quartiles(seconds: list[float]) -> list[float]:
    return [round(value, 4) for value in statistics.quantiles(seconds, n=4)]


def measure_cp1(world: World, repetitions: int) -> dict[str, Any]:
    """One process: apps/gpt against the plain Llama."""
    config = make_config("cp1", MeshConfig())
    tokens = random_tokens(config)
    mesh = Mesh.make(Shape())
    steps = {
        "plain": plain_step(config, tokens),
        "ringx": ringx_step(config, mesh, Attend(config, mesh), tokens),
    }
    times = alternate(steps, repetitions)
    ratio = statistics.median(times["ringx"]) / statistics.median(times["plain"])
    return {"seconds": times, "ringx_over_plain": ratio}


def measure_cp2(world: World, repetitions: int) -> dict[str, Any]:
    """Two ranks: both on half of the sequence, against rank 0 on all of it while rank 1 waits."""
    config = make_config("cp2", MeshConfig(cp=2))
    tokens = random_tokens(config)
    mesh = Mesh.make(Shape(2))
    step_of_two = ringx_step(config, mesh, Attend(config, mesh), tokens)
    only_rank_0 = dist.new_group([0])
    dist.barrier()
    step_of_one: Step | None = None
    if world.rank == 0:

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return ringx.attention(
                q, k, v, group=only_rank_0, algorithm="ringx3", causal=True, check=False
            )

        step_of_one = ringx_step(config, Mesh(Shape(), 0, 0, 0), attend, tokens)

    def by_one() -> None:
        if step_of_one is not None:
            step_of_one()
        dist.barrier()

    def by_two() -> None:
        step_of_two()
        dist.barrier()

    times = alternate({"one": by_one, "two": by_two}, repetitions)
    half_of_one = statistics.median(times["one"]) / 2
    return {
        "seconds": times,
        "two_over_half_of_one": statistics.median(times["two"]) / half_of_one,
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=sorted(SIZES))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--reps", type=int, default=15)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    measure, ranks = {"cp1": (measure_cp1, 1), "cp2": (measure_cp2, 2)}[args.what]
    result = ringx.launch.run(measure, ranks, args.reps, device="cpu")[0]
    result["quartiles"] = {name: quartiles(times) for name, times in result["seconds"].items()}
    result["seqlen"] = SIZES[args.what][1]
    result["torch"] = torch.__version__
    file = args.out / f"cost_{args.what}.json"
    file.write_text(json.dumps(result, indent=1) + "\n")
    print({key: value for key, value in result.items() if key != "seconds"})
    return 0


if __name__ == "__main__":
    sys.exit(main())
