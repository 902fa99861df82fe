"""Convert a model between a run of apps.gpt.train and a Hugging Face folder, without loss unless
--dtype is narrower.

    python -m apps.gpt.convert to-hf run hf --dtype bfloat16  # the newest checkpoint without damage
    python -m apps.gpt.convert to-hf run hf --step 1000
    python -m apps.gpt.convert from-hf Llama-3.2-1B run       # run/checkpoints/step-00000000

What to-hf writes, transformers.LlamaForCausalLM.from_pretrained loads, and all that read its
format.  What from-hf writes is a run's folder with the model alone: ``apps.gpt.train --init``
begins from it, as it does from the Hugging Face folder itself, and ``apps.gpt.generate`` and
``apps.gpt.evaluate`` take both.  It takes twice the model in memory; to-hf takes one file's part.
"""

import argparse
import sys
from dataclasses import asdict
from pathlib import Path

import torch

if __package__ in (None, ""):  # run as a file, not as a module
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from apps.common.arguments import CannotWrite, Parser, run_command
from apps.common.checkpoint import Checkpoints
from apps.common.config import SHORT_DTYPES, TORCH_DTYPES
from apps.gpt.config import Config, TrainConfig
from apps.gpt.huggingface import (
    TOKENIZER,
    StoredModel,
    copy_tokenizer,
    expect_new,
    open_model,
    parameter_shapes,
    save_hugging_face,
)


def to_hf(
    model: str | Path,
    out: str | Path,
    *,
    dtype: torch.dtype | None = None,
    step: int | None = None,
    max_shard_size: int | str = "5GB",
    tokenizer: str | Path | None = None,
) -> StoredModel:
    """Writes the Hugging Face folder `out` of a run or checkpoint; returns what was read.

    Args:
        model: a run's folder, or a checkpoint.
        out: a new or an empty folder.
        dtype: of the files; None: as in the checkpoint.
        step: of a run, the checkpoint; None: the newest without damage.
        max_shard_size: of a file, in bytes or as "5GB".
        tokenizer: a tokenizer.json or its folder; None: the one that was kept with the run.

    Raises:
        ValueError: there is no such checkpoint, or `out` holds something."""
    expect_new(Path(out))
    stored = open_model(model, step=step)
    if tokenizer is None:
        tokenizer = _tokenizer_json(stored.tokenizer)
    save_hugging_face(
        out,
        stored.model,
        stored.weights,
        dtype or stored.weights.dtype,
        max_shard_size,
        seqlen=stored.seqlen,
        bos=stored.bos,
        eos=stored.eos,
        tokenizer=tokenizer,
    )
    return stored


def from_hf(folder: str | Path, out: str | Path) -> StoredModel:
    """Writes a run's folder `out` with one checkpoint, step 0, of the model alone, in its dtypes.

    Returns what was read.

    Raises:
        ValueError: apps/gpt cannot be that model, or `out` holds something.
        RuntimeError: it cannot be written."""
    out = Path(out)
    expect_new(out)
    stored = open_model(folder)
    name = Path(folder).name or "converted"
    config = Config(name, stored.model, TrainConfig(seqlen=stored.seqlen))
    metadata = {
        "step": 0,
        "config": asdict(config),
        "bos": stored.bos,
        "eos": list(stored.eos),
    }
    parameters = {
        name: stored.weights(name, torch.Size(shape))
        for name, shape in parameter_shapes(stored.model).items()
    }
    out.mkdir(parents=True, exist_ok=True)
    if tokenizer := _tokenizer_json(stored.tokenizer):
        copy_tokenizer(tokenizer, out)
    with Checkpoints(out / "checkpoints") as checkpoints:
        checkpoints.save(0, {"model": parameters}, metadata)
    return stored


def _tokenizer_json(path: Path | None) -> Path | None:
    """The tokenizer.json of what ``open_tokenizer`` reads; byte tokens have none."""
    if path is None:
        return None
    file = path / TOKENIZER if path.is_dir() else path
    return file if file.exists() else None


# ---- the command line


def parser() -> Parser:
    p = Parser(
        "apps.gpt.convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = p.add_subparsers(dest="command", required=True, metavar="to-hf|from-hf")
    to_hf_flags = commands.add_parser(
        "to-hf", help="from a run or checkpoint to a Hugging Face folder"
    )
    to_hf_flags.add_argument("model", metavar="RUN", help="a run's folder, or a checkpoint in it")
    to_hf_flags.add_argument("out", metavar="OUT", help="folder to make")
    to_hf_flags.add_argument(
        "--dtype",
        choices=[*TORCH_DTYPES, *SHORT_DTYPES],
        metavar="D",
        help=f"{', '.join(TORCH_DTYPES)} (default: the checkpoint's)",
    )
    to_hf_flags.add_argument(
        "--step",
        type=int,
        metavar="N",
        help="which checkpoint (default: the newest without damage)",
    )
    to_hf_flags.add_argument(
        "--max-shard-size", default="5GB", metavar="SIZE", help="of a file (default: 5GB)"
    )
    to_hf_flags.add_argument(
        "--tokenizer",
        metavar="FILE",
        help="tokenizer.json to put beside it (default: the run's, if it has one)",
    )
    from_hf_flags = commands.add_parser(
        "from-hf", help="from a Hugging Face folder to a run's folder, with the model alone"
    )
    from_hf_flags.add_argument(
        "model", metavar="HF_DIR", help="folder with config.json and *.safetensors"
    )
    from_hf_flags.add_argument("out", metavar="OUT", help="folder to make")
    return p


def work(args: argparse.Namespace) -> int:
    """Converts what the command line names; prints what was made."""
    try:
        if args.command == "to-hf":
            dtype = None
            if args.dtype:
                dtype = TORCH_DTYPES[SHORT_DTYPES.get(args.dtype, args.dtype)]
            stored = to_hf(
                args.model,
                args.out,
                dtype=dtype,
                step=args.step,
                max_shard_size=args.max_shard_size,
                tokenizer=args.tokenizer,
            )
        else:
            stored = from_hf(args.model, args.out)
    except (OSError, RuntimeError) as e:
        raise CannotWrite(f"{args.out} cannot be written: {e}") from None
    shapes = parameter_shapes(stored.model).values()
    parameters = sum(torch.Size(shape).numel() for shape in shapes)
    print(f"{stored.folder} -> {args.out}: {parameters:,} parameters")
    return 0


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    return run_command(parser(), argv, work)


if __name__ == "__main__":
    from apps.gpt.convert import main  # under its own name: one module, not two

    sys.exit(main())
