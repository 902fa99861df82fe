"""Does longer context help?  Loss and perplexity by position, on any number of ranks.

    python -m apps.gpt.evaluate run --seqlen 8192 --contexts 1024,4096 --out eval               # on the run's own held-back text
    python -m apps.gpt.evaluate Llama-3.2-1B --data tokens --nproc 4 --seqlen 131072 --windows 4
    torchrun --nproc-per-node 8 apps/gpt/evaluate.py run --data tokens --seqlen 131072 --out eval

The text is cut into windows of --seqlen tokens, and for each of --contexts, the same tokens into shorter windows.  Every token is
predicted in each of them, from the tokens before it in its window alone.  A row of the table is the tokens at some positions of
the long windows, the same ones in every column: where the model makes use of what came long before, they cost less in longer
windows.  Positions are in buckets that double: 0, 1, 2-3, 4-7, and so on.

The ranks are one context-parallel group; each holds the whole model.  The result does not depend on their number.  Writes
OUT/evaluation.json, and OUT/perplexity as PNG, SVG and CSV.
"""

import argparse
import itertools
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

if __package__ in (None, ""):  # run as a file, not as a module
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import ringx
from apps.common.arguments import Parser
from apps.common.config import SHORT_DTYPES, TORCH_DTYPES
from apps.gpt.data.dataset import Tokens, expect_window, open_dataset, shard_rows
from apps.gpt.data.tokenizer import load_tokenizer
from apps.gpt.generate import replaced_attention
from apps.gpt.huggingface import open_model, open_tokenizer
from apps.gpt.loss import token_losses
from apps.gpt.model import Llama
from ringx.checks import require_name
from ringx.files import write_text
from ringx.kernels import KERNELS
from ringx.launch import World
from ringx.layout import LAYOUTS
from ringx.report import figures  # one look for all figures

PROG = "apps.gpt.evaluate"
SAMPLE = 1000  # tokens by which two tokenizers are compared


@dataclass(frozen=True)
class EvaluateOptions:
    """What the command line asks for."""

    model: str
    step: int | None
    data: str | None
    seqlen: int
    windows: int
    contexts: tuple[int, ...]
    out: str | None
    dtype: str | None
    algorithm: str
    layout: str
    kernel: str


# ---- the measurement


@torch.no_grad()
def evaluate(
    model: Llama,
    tokens: Tokens,
    *,
    seqlen: int,
    windows: int,
    contexts: tuple[int, ...] = (),
    group: "dist.ProcessGroup | None" = None,
    algorithm: str = "ringx3",
    layout: str = "zigzag",
    kernel: str = "auto",
) -> dict[int, Tensor]:
    """For each context, seqlen among them: the mean loss in nats of the tokens at each position of the long windows, [seqlen] fp64
    on the CPU.  Every rank of `group` calls it with the same arguments and model, and has the result.

    Args:
        model: whole on every rank; its attention is replaced meanwhile.
        windows: how many of `seqlen` tokens, from the start of `tokens`.
        contexts: lengths that divide seqlen: the same tokens in windows of these.

    Raises ValueError for lengths that make no sense, or are too short for the ranks."""
    device = model.norm.weight.device
    peers = ringx.comm.Group.of(group)
    expect_lengths(tokens, seqlen, windows, contexts, peers.world_size, layout)
    means = {}
    for context in sorted({*contexts, seqlen}):
        sharding, pieces = ringx.Sharding(context, peers.world_size, layout), seqlen // context
        checked = False

        def attend(q: Tensor, k: Tensor, v: Tensor, sharding: ringx.Sharding = sharding) -> Tensor:
            nonlocal checked
            check, checked = not checked, True  # wrong calls would be wrong in the first already
            out = ringx.attention(
                q,
                k,
                v,
                group=group,
                algorithm=algorithm,
                causal=True,
                layout=sharding,
                kernel=kernel,
                check=check,
            )
            assert isinstance(out, Tensor)
            return out

        sums = torch.zeros(pieces, context, dtype=torch.float64, device=device)
        with replaced_attention(model, lambda attend=attend: attend):  # type: ignore[misc]
            for i in range(windows):
                rows = tokens.take(
                    range(i * pieces, (i + 1) * pieces), context
                )  # the same tokens as one long window
                mine = shard_rows(rows, layout=sharding, group=group, device=device)
                x = model.hidden(mine.tokens, mine.positions)
                sums[:, mine.positions] += token_losses(
                    x, model.head, mine.labels, chunk=model.loss_chunk
                )
        if peers.world_size > 1:
            dist.all_reduce(sums, group=group)  # of each position, all but one are 0
        means[context] = sums.flatten().cpu() / windows
    return means


def expect_lengths(
    tokens: Tokens, seqlen: int, windows: int, contexts: tuple[int, ...], world: int, layout: str
) -> None:
    """ValueError naming the length that makes no sense."""
    if seqlen < 1 or windows < 1:
        raise ValueError(f"seqlen={seqlen} and windows={windows} must be at least 1.")
    for context in contexts:
        if context < 1 or seqlen % context:
            raise ValueError(
                f"contexts={context} must divide seqlen={seqlen}: the windows hold the same tokens."
            )
        ringx.Sharding(context, world, layout)
    ringx.Sharding(seqlen, world, layout)
    expect_window(tokens, seqlen)
    if windows > tokens.num_windows(seqlen):
        raise ValueError(
            f"windows={windows}: {tokens.folder} has {tokens.length} {tokens.split} tokens, which are {tokens.num_windows(seqlen)} "
            f"windows of seqlen={seqlen}."
        )


def buckets(seqlen: int) -> list[tuple[int, int]]:
    """[0, 1), [1, 2), [2, 4), [4, 8), ... up to seqlen."""
    edges = [0, *(2**i for i in range(seqlen.bit_length()) if 2**i < seqlen), seqlen]
    return list(itertools.pairwise(edges))


def summarize(means: dict[int, Tensor], windows: int) -> list[dict[str, Any]]:
    """A row for each context and bucket of positions, and one for each context over all: context, from, to (exclusive), tokens,
    loss, perplexity."""
    rows = []
    for context, mean in means.items():
        for start, end in [*buckets(len(mean)), (0, len(mean))]:
            loss = float(mean[start:end].mean())
            row = {
                "context": context,
                "from": start,
                "to": end,
                "tokens": (end - start) * windows,
                "loss": loss,
            }
            rows.append(row | {"perplexity": math.exp(min(loss, 700.0))})
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Losses: positions down, contexts across; at most 100 columns."""
    contexts = sorted({r["context"] for r in rows})
    shown = contexts if len(contexts) <= 6 else [*contexts[:2], *contexts[-4:]]
    loss = {(r["context"], r["from"], r["to"]): r for r in rows}
    seqlen = contexts[-1]
    lines = ["Loss (nats per token) of the same tokens, by position and length of the windows"]
    lines.append(f"{'positions':>17}  {'tokens':>12}" + "".join(f"{c:>11,}" for c in shown))
    for start, end in buckets(seqlen):
        name = f"{start:,}" if end == start + 1 else f"{start:,}-{end - 1:,}"
        line = f"{name:>17}  {loss[seqlen, start, end]['tokens']:>12,}"
        lines.append(line + "".join(f"{loss[c, start, end]['loss']:>11.4f}" for c in shown))
    whole = [loss[c, 0, seqlen] for c in shown]
    lines.append(
        f"{'all':>17}  {whole[-1]['tokens']:>12,}" + "".join(f"{r['loss']:>11.4f}" for r in whole)
    )
    lines.append(
        f"{'perplexity of all':>17}  {'':>12}" + "".join(f"{r['perplexity']:>11.3f}" for r in whole)
    )
    if len(shown) < len(contexts):
        lines.append(f"({len(contexts) - len(shown)} lengths in between: see evaluation.json)")
    return "\n".join(lines)


def _figure(plt, rows: list[dict[str, Any]]):
    """Perplexity against position, a line for each length of windows."""
    contexts = sorted({r["context"] for r in rows})
    seqlen = contexts[-1]
    fig, ax = plt.subplots(figsize=(figures.WIDTH, 4.4))
    shown = []
    for k, context in enumerate(contexts):
        mine = [
            r
            for r in rows
            if r["context"] == context and (r["from"], r["to"]) in set(buckets(seqlen))
        ]
        xs = [
            math.sqrt((r["from"] + 1) * r["to"]) for r in mine
        ]  # the middle of a bucket, counted from 1
        ax.plot(
            xs, [r["perplexity"] for r in mine], label=f"windows of {context:,}", lw=1.8, ms=5, zorder=3 + k / 100,
            color=figures.COLOURS[k % len(figures.COLOURS)], marker=figures.MARKERS[k % len(figures.MARKERS)],
            ls=figures.STYLES[k % len(figures.STYLES)],
        )  # fmt: skip
        shown += mine
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.yaxis.get_major_locator().set_params(subs=(1, 2, 5))
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_formatter("")
    ax.set(
        title="Perplexity by position",
        xlabel=f"position in windows of {seqlen:,} tokens",
        ylabel="perplexity",
    )
    fig.legend(loc="outside lower center", ncols=max(1, min(3, len(contexts))))
    return fig, shown


# ---- a rank


def work(world: World, options: EvaluateOptions) -> int:
    """One rank's part; returns the process's exit status.  Rank 0 alone writes and prints."""
    chief = world.rank == 0
    ringx.launch.announce(world)
    try:
        source = open_model(options.model, step=options.step, world=world)
        folder = options.data or source.data
        if folder is None:
            raise ValueError(
                f"--data is needed: {options.model} holds no prepared text; name a folder made by apps/gpt/prepare.py."
            )
        tokens = open_dataset(folder, "val")
        tokens.check_vocab(source.model.vocab)
        seqlen = options.seqlen or min(source.seqlen, tokens.length - 1)
        windows = options.windows or min(16, max(1, tokens.num_windows(seqlen)))
        expect_lengths(tokens, seqlen, windows, options.contexts, world.world_size, options.layout)
    except ValueError as e:  # of all ranks alike: what can only be known here
        if chief:
            print(f"{PROG}: error: {e}", file=sys.stderr, flush=True)
        return 2
    if chief and source.tokenizer and not same_tokenizer(tokens, source.tokenizer):
        print(
            f"{PROG}: warning: {folder} was not prepared with the tokenizer of {options.model}.",
            file=sys.stderr,
            flush=True,
        )
    dtype = TORCH_DTYPES[
        SHORT_DTYPES.get(
            options.dtype or "",
            options.dtype or ("bfloat16" if world.device.type == "cuda" else "float32"),
        )
    ]
    model = source.make(lambda q, k, v: q, dtype=dtype, device=world.device)
    means = evaluate(
        model, tokens, seqlen=seqlen, windows=windows, contexts=options.contexts,
        algorithm=options.algorithm, layout=options.layout, kernel=options.kernel,
    )  # fmt: skip
    if not chief:
        return 0
    rows = summarize(means, windows)
    print(
        f"{source.folder}: {windows} windows of {seqlen:,} tokens of {tokens.source} ({tokens.split}), {world.world_size} rank(s)"
    )
    print(table(rows))
    if options.out:
        for line in _write(Path(options.out), source.folder, tokens, dtype, world, windows, rows):
            print(line)
    return 0


def same_tokenizer(tokens: Tokens, tokenizer: Path) -> bool:
    """Does this tokenizer cut the first text as the one that made the tokens?  True, too, where that cannot be told."""
    try:
        made, asked = load_tokenizer(tokens.folder), open_tokenizer(tokenizer)
    except ValueError:
        return True
    text = made.decode(tokens.take([0], min(SAMPLE, tokens.length - 1)).tokens[0].tolist())
    return made.encode(text) == asked.encode(text)


def _write(
    out: Path,
    model: Path,
    tokens: Tokens,
    dtype: torch.dtype,
    world: World,
    windows: int,
    rows: list,
) -> list[str]:
    what = {
        "model": str(model),
        "data": {"source": tokens.source, "split": tokens.split, "sha256": tokens.sha256},
        "dtype": str(dtype).removeprefix("torch."),
        "world": world.world_size,
        "windows": windows,
        "loss_unit": "nats per token",
        "rows": rows,
    }
    file = out / "evaluation.json"
    write_text(file, json.dumps(what, indent=1) + "\n", replace=True)
    try:
        plt = figures.pyplot()
    except ImportError as e:
        return [str(file), f"skipped perplexity: {e}"]
    return [str(file), figures.draw_figure(plt, _figure, rows, out / "perplexity")]


# ---- the command line


def parser() -> Parser:
    p = Parser(PROG, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument(
        "model", metavar="MODEL", help="a run's folder, a checkpoint, or a Hugging Face folder"
    )
    p.add_argument(
        "--data",
        metavar="DIR",
        help="folder made by apps/gpt/prepare.py; its val split is read (default: the run's)",
    )
    p.add_argument(
        "--seqlen",
        type=int,
        default=0,
        metavar="N",
        help="tokens of a window (default: as the model was trained)",
    )
    p.add_argument(
        "--windows",
        type=int,
        default=0,
        metavar="N",
        help="how many, from the start of the text (default: 16 or all)",
    )
    p.add_argument(
        "--contexts",
        default="",
        metavar="N,N",
        help="shorter windows of the same tokens; each divides --seqlen",
    )
    p.add_argument(
        "--step",
        type=int,
        metavar="N",
        help="which checkpoint of a run (default: the newest without damage)",
    )
    p.add_argument(
        "--out", metavar="DIR", help="folder for evaluation.json and perplexity.png, .svg, .csv"
    )
    p.add_argument(
        "--nproc",
        type=int,
        help="ranks to start here (default: 1, or the ranks of torchrun, srun or mpirun)",
    )
    p.add_argument(
        "--device", default="auto", choices=("auto", "cpu", "cuda"), help="default: auto"
    )
    p.add_argument(
        "--timeout",
        type=float,
        default=600.0,
        help="seconds that ranks wait for each other (default: 600)",
    )
    p.add_argument(
        "--dtype",
        metavar="D",
        help=f"{', '.join(TORCH_DTYPES)} (default: bfloat16 on GPUs, else float32)",
    )
    p.add_argument(
        "--algorithm",
        default="ringx3",
        metavar="NAME",
        help=f"{', '.join(ringx.algorithms())} (default: ringx3)",
    )
    p.add_argument(
        "--layout", default="zigzag", metavar="NAME", help=f"{', '.join(LAYOUTS)} (default: zigzag)"
    )
    p.add_argument(
        "--kernel",
        default="auto",
        metavar="NAME",
        help="local attention kernel (default: auto; ringx info lists them)",
    )
    return p


def configure(args: argparse.Namespace) -> EvaluateOptions:
    """What can be known to be wrong before ranks start raises ValueError here."""
    try:
        contexts = tuple(int(c) for c in args.contexts.split(",") if c.strip())
    except ValueError:
        raise ValueError(f"--contexts {args.contexts}: give lengths, as 1024,4096.") from None
    for name in ("seqlen", "windows"):
        if getattr(args, name) < 0:
            raise ValueError(f"--{name} {getattr(args, name)} must be at least 1.")
    if args.dtype:
        require_name(args.dtype, [*TORCH_DTYPES, *SHORT_DTYPES], "dtype")
    require_name(args.algorithm, ringx.algorithms(), "algorithm")
    require_name(args.layout, LAYOUTS, "layout")
    require_name(args.kernel, [*KERNELS, "auto"], "kernel")
    ringx.launch.world_size(args.nproc)
    if not Path(args.model).is_dir():
        raise ValueError(
            f"{args.model} is no folder; name a run's, a checkpoint's, or a Hugging Face one."
        )
    if args.data and not Path(args.data).is_dir():
        raise ValueError(
            f"--data {args.data} is no folder; make one with python -m apps.gpt.prepare."
        )
    if args.out:
        try:
            Path(args.out).mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise ValueError(
                f"--out {args.out} is no folder and cannot be made: {e.strerror}."
            ) from None
    return EvaluateOptions(
        args.model, args.step, args.data, args.seqlen, args.windows, contexts, args.out, args.dtype,
        args.algorithm, args.layout, args.kernel,
    )  # fmt: skip


def main(argv: "list[str] | None" = None) -> int:
    p = parser()
    args = p.parse_args(argv)
    try:
        options = configure(args)
    except (ValueError, NotImplementedError) as e:
        p.error(str(e))
    return max(
        ringx.launch.run(work, args.nproc, options, device=args.device, timeout=args.timeout)
    )


if __name__ == "__main__":
    from apps.gpt.evaluate import main  # under its own name, so that started ranks find `work`

    sys.exit(main())
