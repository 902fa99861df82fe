"""Does longer context help?  Loss and perplexity by position, on any number of ranks.

    python -m apps.gpt.evaluate run --seqlen 8192 --contexts 1024,4096 --out eval  # the run's data
    python -m apps.gpt.evaluate Llama-3.2-1B --data tokens --nproc 4 --seqlen 131072 --windows 4
    torchrun --nproc-per-node 8 apps/gpt/evaluate.py run --data tokens --seqlen 131072 --out eval

The text is cut into windows of --seqlen tokens, and for each of --contexts, the same tokens into
shorter windows.  Every token is predicted in each of them, from the tokens before it in its window
alone.  A row of the table is the tokens at some positions of the long windows, the same ones in
every column: where the model makes use of what came long before, they cost less in longer windows.
Positions are in buckets that double: 0, 1, 2-3, 4-7, and so on.

The ranks are one context-parallel group; each holds the whole model.  The result does not depend
on their number.  Writes OUT/evaluation.json, and OUT/perplexity as PNG, SVG and CSV.
"""

import argparse
import itertools
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

if __package__ in (None, ""):  # run as a file, not as a module
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import ringx
from apps.common.arguments import Parser, add_rank_flags, run_on_ranks
from apps.common.config import SHORT_DTYPES, TORCH_DTYPES
from apps.gpt.data.dataset import Tokens, expect_window, open_dataset, shard_rows
from apps.gpt.data.tokenizer import load_tokenizer
from apps.gpt.generate import inference_dtype, replaced_attention
from apps.gpt.huggingface import StoredModel, open_model, open_tokenizer
from apps.gpt.loss import token_losses
from apps.gpt.model import AttentionFunction, Llama
from ringx.checks import require_name
from ringx.files import write_text
from ringx.kernels import KERNELS
from ringx.launch import World
from ringx.layout import LAYOUTS
from ringx.report import figures

PROG = "apps.gpt.evaluate"
SAMPLE_TOKENS = 1000  # by which two tokenizers are compared
Row = dict[str, Any]  # of ``summarize``


@dataclass(frozen=True)
class EvaluateOptions:
    """What the command line asks for."""

    model: str
    step: int | None
    data: str | None
    seqlen: int  # 0: as the model was trained
    windows: int  # 0: 16, or all there are
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
    """The mean loss of the tokens at each position of the long windows, for each context.

    Every rank of `group` calls it with the same arguments and model, and has the result.

    Args:
        model: whole on every rank; its attention is replaced meanwhile.
        tokens: the text.
        seqlen: tokens of a long window.
        windows: how many of them, from the start of `tokens`.
        contexts: lengths that divide seqlen: the same tokens in windows of these.
        group: the ranks that share each window.
        algorithm, layout, kernel: of ``ringx.attention``.

    Returns:
        {context: [seqlen] fp64 on the CPU, in nats}; seqlen is among the contexts.

    Raises:
        ValueError: for lengths that make no sense, or are too short for the ranks."""
    device = model.norm.weight.device
    world_size = ringx.comm.Group.of(group).world_size
    expect_lengths(
        tokens,
        seqlen=seqlen,
        windows=windows,
        contexts=contexts,
        world_size=world_size,
        layout=layout,
    )
    means = {}
    for context in sorted({*contexts, seqlen}):
        sharding = ringx.Sharding(context, world_size, layout)
        attend = _make_attend(group, algorithm=algorithm, sharding=sharding, kernel=kernel)
        # The tokens of a long window as `rows` short ones.
        rows = seqlen // context
        sums = torch.zeros(rows, context, dtype=torch.float64, device=device)
        with replaced_attention(model, lambda attend=attend: attend):  # type: ignore[misc]
            for i in range(windows):
                short_windows = tokens.take(range(i * rows, (i + 1) * rows), context)
                local = shard_rows(short_windows, layout=sharding, group=group, device=device)
                hidden = model.hidden(local.tokens, local.positions)
                losses = token_losses(hidden, model.head, local.labels, chunk=model.loss_chunk)
                sums[:, local.positions] += losses
        if world_size > 1:
            dist.all_reduce(sums, group=group)  # each position is 0 on all ranks but one
        means[context] = sums.flatten().cpu() / windows
    return means


def _make_attend(
    group: "dist.ProcessGroup | None", *, algorithm: str, sharding: ringx.Sharding, kernel: str
) -> AttentionFunction:
    """Causal attention over sequences that are cut over the group's ranks."""
    is_checked = False

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        nonlocal is_checked
        check = not is_checked  # wrong calls would be wrong in the first one already
        is_checked = True
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

    return attend


def expect_lengths(
    tokens: Tokens,
    *,
    seqlen: int,
    windows: int,
    contexts: tuple[int, ...],
    world_size: int,
    layout: str,
) -> None:
    """ValueError naming the length that makes no sense."""
    if seqlen < 1 or windows < 1:
        raise ValueError(f"seqlen={seqlen} and windows={windows} must be at least 1.")
    for context in contexts:
        if context < 1 or seqlen % context:
            raise ValueError(
                f"contexts={context} must divide seqlen={seqlen}: the windows hold the same tokens."
            )
        ringx.Sharding(context, world_size, layout)  # raises if it is too short for the ranks
    ringx.Sharding(seqlen, world_size, layout)
    expect_window(tokens, seqlen)
    available = tokens.num_windows(seqlen)
    if windows > available:
        raise ValueError(
            f"windows={windows}: {tokens.folder} has {tokens.length} {tokens.split} tokens, "
            f"which are {available} windows of seqlen={seqlen}."
        )


# ---- the result


def buckets(seqlen: int) -> list[tuple[int, int]]:
    """[0, 1), [1, 2), [2, 4), [4, 8), ... up to seqlen."""
    powers = [2**i for i in range(seqlen.bit_length()) if 2**i < seqlen]
    return list(itertools.pairwise([0, *powers, seqlen]))


def summarize(means: dict[int, Tensor], windows: int) -> list[Row]:
    """A row for each context and bucket of positions, and one for each context over all.

    Returns:
        rows of context, from, to (exclusive), tokens, loss, perplexity."""
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
                "perplexity": math.exp(min(loss, 700.0)),  # above, exp overflows
            }
            rows.append(row)
    return rows


def table(rows: list[Row]) -> str:
    """Losses: positions down, contexts across; at most 100 columns."""
    contexts = sorted({row["context"] for row in rows})
    shown = _shown_contexts(contexts)
    row_of = {(row["context"], row["from"], row["to"]): row for row in rows}
    seqlen = contexts[-1]
    lines = ["Loss (nats per token) of the same tokens, by position and length of the windows"]
    lines.append(_table_line("positions", "tokens", [f"{context:,}" for context in shown]))
    for start, end in buckets(seqlen):
        label = f"{start:,}" if end == start + 1 else f"{start:,}-{end - 1:,}"
        of_bucket = [row_of[context, start, end] for context in shown]
        lines.append(_loss_line(label, of_bucket))
    of_all = [row_of[context, 0, seqlen] for context in shown]
    lines.append(_loss_line("all", of_all))
    perplexities = [f"{row['perplexity']:.3f}" for row in of_all]
    lines.append(_table_line("perplexity of all", "", perplexities))
    if len(shown) < len(contexts):
        lines.append(f"({len(contexts) - len(shown)} lengths in between: see evaluation.json)")
    return "\n".join(lines)


def _shown_contexts(contexts: list[int]) -> list[int]:
    """At most 6, for which the table has room: the shortest 2 and the longest 4."""
    if len(contexts) <= 6:
        return contexts
    return [*contexts[:2], *contexts[-4:]]


def _loss_line(label: str, rows: list[Row]) -> str:
    """The line of the table for the same tokens in each context; the last row is of seqlen."""
    tokens = f"{rows[-1]['tokens']:,}"
    return _table_line(label, tokens, [f"{row['loss']:.4f}" for row in rows])


def _table_line(label: str, tokens: str, cells: list[str]) -> str:
    return f"{label:>17}  {tokens:>12}" + "".join(f"{cell:>11}" for cell in cells)


def _draw_perplexity(plt: Any, rows: Sequence[Row]) -> tuple[Any, list[Row]]:
    """Perplexity against position, a line for each length of windows: (figure, rows shown)."""
    contexts = sorted({row["context"] for row in rows})
    seqlen = contexts[-1]
    bucket_edges = set(buckets(seqlen))
    fig, ax = plt.subplots(figsize=(figures.WIDTH, 4.4))
    shown = []
    for index, context in enumerate(contexts):
        of_context = [row for row in rows if row["context"] == context]
        line = [row for row in of_context if (row["from"], row["to"]) in bucket_edges]
        ax.plot(
            [math.sqrt((row["from"] + 1) * row["to"]) for row in line],  # the middle, from 1 on
            [row["perplexity"] for row in line],
            label=f"windows of {context:,}",
            lw=1.8,
            ms=5,
            zorder=3 + index / 100,
            color=figures.COLOURS[index % len(figures.COLOURS)],
            marker=figures.MARKERS[index % len(figures.MARKERS)],
            ls=figures.STYLES[index % len(figures.STYLES)],
        )
        shown += line
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


class _Inputs(NamedTuple):
    """What is evaluated."""

    stored: StoredModel
    data: str | Path  # the folder of `tokens`, as it was named
    tokens: Tokens
    seqlen: int
    windows: int


def work(world: World, options: EvaluateOptions) -> int:
    """One rank's part; returns the process's exit status.  Rank 0 alone writes and prints."""
    is_main_rank = world.rank == 0
    ringx.launch.announce(world)
    try:
        inputs = _open_inputs(world, options)
    except ValueError as e:  # raised by all ranks alike: what can only be known here
        if is_main_rank:
            print(f"{PROG}: error: {e}", file=sys.stderr, flush=True)
        return 2
    stored, tokens = inputs.stored, inputs.tokens
    if is_main_rank and stored.tokenizer and not same_tokenizer(tokens, stored.tokenizer):
        print(
            f"{PROG}: warning: {inputs.data} was not prepared with the tokenizer of "
            f"{options.model}.",
            file=sys.stderr,
            flush=True,
        )
    dtype = inference_dtype(options.dtype, world.device)
    # This attention is never called: ``evaluate`` replaces it.
    model = stored.make(lambda q, k, v: q, dtype=dtype, device=world.device)
    means = evaluate(
        model,
        tokens,
        seqlen=inputs.seqlen,
        windows=inputs.windows,
        contexts=options.contexts,
        algorithm=options.algorithm,
        layout=options.layout,
        kernel=options.kernel,
    )
    if not is_main_rank:
        return 0
    rows = summarize(means, inputs.windows)
    print(
        f"{stored.folder}: {inputs.windows} windows of {inputs.seqlen:,} tokens of "
        f"{tokens.source} ({tokens.split}), {world.world_size} rank(s)"
    )
    print(table(rows))
    if options.out:
        report = {
            "model": str(stored.folder),
            "data": {"source": tokens.source, "split": tokens.split, "sha256": tokens.sha256},
            "dtype": str(dtype).removeprefix("torch."),
            "world": world.world_size,
            "windows": inputs.windows,
            "loss_unit": "nats per token",
            "rows": rows,
        }
        for line in _write_report(Path(options.out), report):
            print(line)
    return 0


def _open_inputs(world: World, options: EvaluateOptions) -> _Inputs:
    """Opens model and text, and chooses the lengths; ValueError on all ranks alike."""
    stored = open_model(options.model, step=options.step, world=world)
    data = options.data or stored.data
    if data is None:
        raise ValueError(
            f"--data is needed: {options.model} holds no prepared text; "
            "name a folder made by apps/gpt/prepare.py."
        )
    tokens = open_dataset(data, "val")
    tokens.check_vocab(stored.model.vocab)
    seqlen = options.seqlen or min(stored.seqlen, tokens.length - 1)
    windows = options.windows or min(16, max(1, tokens.num_windows(seqlen)))
    expect_lengths(
        tokens,
        seqlen=seqlen,
        windows=windows,
        contexts=options.contexts,
        world_size=world.world_size,
        layout=options.layout,
    )
    return _Inputs(stored, data, tokens, seqlen, windows)


def same_tokenizer(tokens: Tokens, tokenizer: Path) -> bool:
    """Whether this tokenizer cuts the first text as the one that made the tokens did.

    True, too, where that cannot be told."""
    try:
        original = load_tokenizer(tokens.folder)
        other = open_tokenizer(tokenizer)
    except ValueError:
        return True
    sample = tokens.take([0], min(SAMPLE_TOKENS, tokens.length - 1)).tokens[0].tolist()
    text = original.decode(sample)
    return original.encode(text) == other.encode(text)


def _write_report(out: Path, report: dict[str, Any]) -> list[str]:
    """Writes evaluation.json and the figure; returns a line for each."""
    file = out / "evaluation.json"
    write_text(file, json.dumps(report, indent=1) + "\n", replace=True)
    try:
        plt = figures.pyplot()
    except ImportError as e:
        return [str(file), f"skipped perplexity: {e}"]
    drawn = figures.draw_figure(plt, _draw_perplexity, report["rows"], out / "perplexity")
    return [str(file), drawn]


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
    add_rank_flags(p)
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
    """What each rank is given.

    Raises:
        ValueError: for what can be known to be wrong before ranks start."""
    try:
        contexts = tuple(int(word) for word in args.contexts.split(",") if word.strip())
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
    ringx.launch.world_size(args.nproc)  # raises if no such number of ranks can be started
    _expect_folders(args)
    return EvaluateOptions(
        model=args.model,
        step=args.step,
        data=args.data,
        seqlen=args.seqlen,
        windows=args.windows,
        contexts=contexts,
        out=args.out,
        dtype=args.dtype,
        algorithm=args.algorithm,
        layout=args.layout,
        kernel=args.kernel,
    )


def _expect_folders(args: argparse.Namespace) -> None:
    """Makes --out.  ValueError for folders that do not exist or cannot be made."""
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


def main(argv: list[str] | None = None) -> int:
    """The command; returns the greatest exit status of its ranks."""
    return run_on_ranks(parser(), argv, configure, work)


if __name__ == "__main__":
    from apps.gpt.evaluate import main  # under its own name, so that started ranks find `work`

    sys.exit(main())
