"""Convert a model between a run of apps.gpt.train and a Hugging Face folder, without loss unless --dtype is narrower.

    python -m apps.gpt.convert to-hf run hf --dtype bfloat16       # the run's newest checkpoint without damage
    python -m apps.gpt.convert to-hf run hf --step 1000
    python -m apps.gpt.convert from-hf Llama-3.2-1B run            # run/checkpoints/step-00000000

What to-hf writes, transformers.LlamaForCausalLM.from_pretrained loads, and all that read its format.  What from-hf writes is a
run's folder with the model alone: ``apps.gpt.train --init`` begins from it, as it does from the Hugging Face folder itself, and
``apps.gpt.generate`` and ``apps.gpt.evaluate`` take both.  It takes twice the model in memory; to-hf takes one file's part.
"""

import argparse
import sys
from dataclasses import asdict, replace
from pathlib import Path

import torch

if __package__ in (None, ""):  # run as a file, not as a module
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from apps.common.arguments import Parser
from apps.common.checkpoint import Checkpoints
from apps.common.config import SHORT_DTYPES, TORCH_DTYPES
from apps.gpt.config import Config, TrainConfig
from apps.gpt.huggingface import (
    TOKENIZER_FILES,
    StoredModel,
    copy_tokenizer,
    expect_new,
    open_model,
    parameter_shapes,
    save_hugging_face,
)


def to_hf(
    model: "str | Path",
    out: "str | Path",
    *,
    dtype: "torch.dtype | None" = None,
    step: int | None = None,
    max_shard_size: "int | str" = "5GB",
    tokenizer: "str | Path | None" = None,
) -> StoredModel:
    """Writes the Hugging Face folder `out` of a run or checkpoint; returns what was read.

    Args:
        dtype: of the files; None: as in the checkpoint.
        step: of a run, the checkpoint; None: the newest without damage.
        max_shard_size: of a file, in bytes or as "5GB".
        tokenizer: a tokenizer.json or its folder; None: the one that was kept with the run, if it is one.

    Raises ValueError if there is no such checkpoint, or `out` holds something."""
    expect_new(Path(out))
    source = open_model(model, step=step)
    if tokenizer is None:
        tokenizer = _tokenizer_json(source.tokenizer)
    save_hugging_face(
        out,
        source.model,
        source.weights,
        dtype or source.weights.dtype,
        max_shard_size,
        seqlen=source.seqlen,
        bos=source.bos,
        eos=source.eos,
        tokenizer=tokenizer,
    )
    return source


def from_hf(folder: "str | Path", out: "str | Path") -> StoredModel:
    """Writes a run's folder `out` with one checkpoint, step 0, of the model alone, in its dtypes; returns what was read.

    Raises ValueError if apps/gpt cannot be that model, or `out` holds something; RuntimeError if it cannot be written."""
    out = Path(out)
    expect_new(out)
    source = open_model(folder)
    config = Config(
        Path(folder).name or "converted", source.model, replace(TrainConfig(), seqlen=source.seqlen)
    )
    about = {"step": 0, "config": asdict(config), "bos": source.bos, "eos": list(source.eos)}
    state = {
        "model": {
            name: source.weights(name, torch.Size(shape))
            for name, shape in parameter_shapes(source.model).items()
        }
    }
    out.mkdir(parents=True, exist_ok=True)
    if tokenizer := _tokenizer_json(source.tokenizer):
        copy_tokenizer(tokenizer, out)
    with Checkpoints(out / "checkpoints") as checkpoints:
        checkpoints.save(0, state, about)
    return source


def _tokenizer_json(path: "Path | None") -> "Path | None":
    """The tokenizer.json of what ``open_tokenizer`` reads; bytes have none."""
    file = path / TOKENIZER_FILES[0] if path is not None and path.is_dir() else path
    return file if file is not None and file.exists() else None


# ---- the command line


def parser() -> Parser:
    p = Parser(
        "apps.gpt.convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = p.add_subparsers(dest="command", required=True, metavar="to-hf|from-hf")
    to = commands.add_parser("to-hf", help="from a run or checkpoint to a Hugging Face folder")
    to.add_argument("model", metavar="RUN", help="a run's folder, or a checkpoint in it")
    to.add_argument("out", metavar="OUT", help="folder to make")
    to.add_argument(
        "--dtype",
        choices=[*TORCH_DTYPES, *SHORT_DTYPES],
        metavar="D",
        help=f"{', '.join(TORCH_DTYPES)} (default: the checkpoint's)",
    )
    to.add_argument(
        "--step",
        type=int,
        metavar="N",
        help="which checkpoint (default: the newest without damage)",
    )
    to.add_argument(
        "--max-shard-size", default="5GB", metavar="SIZE", help="of a file (default: 5GB)"
    )
    to.add_argument(
        "--tokenizer",
        metavar="FILE",
        help="tokenizer.json to put beside it (default: the run's, if it has one)",
    )
    of = commands.add_parser(
        "from-hf", help="from a Hugging Face folder to a run's folder, with the model alone"
    )
    of.add_argument("model", metavar="HF_DIR", help="folder with config.json and *.safetensors")
    of.add_argument("out", metavar="OUT", help="folder to make")
    return p


def main(argv: "list[str] | None" = None) -> int:
    p = parser()
    args = p.parse_args(argv)
    try:
        if args.command == "to-hf":
            dtype = TORCH_DTYPES[SHORT_DTYPES.get(args.dtype, args.dtype)] if args.dtype else None
            source = to_hf(
                args.model,
                args.out,
                dtype=dtype,
                step=args.step,
                max_shard_size=args.max_shard_size,
                tokenizer=args.tokenizer,
            )
        else:
            source = from_hf(args.model, args.out)
    except ValueError as e:
        p.error(str(e))
    except (OSError, RuntimeError) as e:
        p.exit(1, f"{p.prog}: error: {args.out} cannot be written: {e}\n")
    except KeyboardInterrupt:
        p.exit(130, f"{p.prog}: interrupted\n")
    print(
        f"{source.folder} -> {args.out}: {sum(torch.Size(s).numel() for s in parameter_shapes(source.model).values()):,} parameters"
    )
    return 0


if __name__ == "__main__":
    from apps.gpt.convert import main  # under its own name: one module, not two

    sys.exit(main())
