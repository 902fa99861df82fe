"""The command line: `ringx COMMAND` or `python -m ringx COMMAND`; COMMANDS lists what there is."""

import argparse
import contextlib
import importlib
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

from .. import __version__
from ..launch import detect


@dataclass(frozen=True)
class Command:
    """A command, implemented by add_arguments(parser) and main(args) of its module.

    The module is named rather than imported here: only that of the command that runs is needed."""

    module: str  # in the package ringx
    help: str


COMMANDS = {
    "verify": Command("measure.verify", "compare every algorithm with full attention in fp64"),
    "bench": Command(
        "measure.bench_attention", "measure algorithms against each other and against one process"
    ),
    "bench-comm": Command(
        "measure.bench_collectives",
        "measure collectives by size: latency, bandwidth, bytes on the wire",
    ),
    "submit": Command(
        "slurm.submit",
        "write, check and submit Slurm jobs that measure a matrix of cases at a site",
    ),
    "collect": Command("report.collect", "merge the records of many jobs into one table"),
    "plot": Command(
        "report.plot", "draw scaling, efficiency, bytes and collectives from records or a table"
    ),
    "info": Command("command.info", "show what this environment can do, and why not the rest"),
    "demo": Command("command.demo", "verify, measure, plot and train a small Llama, in minutes"),
}

# the errors by which commands refuse what a user asked for
USER_ERRORS = (ValueError, TypeError, NotImplementedError, OSError, ImportError)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: words after `ringx`; None takes those of this process.

    Returns:
        The exit status: the command's, 2 after a mistake of the user, which prints one line, 1
        where a rank failed, 130 after an interruption."""
    words = list(sys.argv[1:] if argv is None else argv)
    parser = _make_parser(words)
    args = parser.parse_args(words)
    if args.version:
        print(__version__)
        return 0
    if args.command is None:
        parser.print_help()
        return 2
    try:
        return args.main(args)
    except USER_ERRORS as error:
        _await_message_of_rank_0()
        print(f"ringx {args.command}: error: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:  # a rank failed: its own traceback is part of the message
        print(f"ringx {args.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"ringx {args.command}: interrupted", file=sys.stderr)
        return 130


def _make_parser(words: Sequence[str]) -> argparse.ArgumentParser:
    """A parser of all commands; the arguments only of the one that the words name."""
    parser = argparse.ArgumentParser(
        prog="ringx", description="Exact attention over sequences too long for one GPU."
    )
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND")
    requested = next((word for word in words if not word.startswith("-")), None)
    for name, command in COMMANDS.items():
        sentence = command.help[0].upper() + command.help[1:] + "."
        subparser = subparsers.add_parser(name, help=command.help, description=sentence)
        if name == requested:
            module = importlib.import_module(f"ringx.{command.module}")
            subparser.formatter_class = argparse.RawDescriptionHelpFormatter
            subparser.description = module.__doc__
            module.add_arguments(subparser)
            subparser.set_defaults(main=module.main)
    return parser


def _await_message_of_rank_0() -> None:
    """On ranks other than 0, waits until rank 0 has printed the same mistake.

    A mistake is most often every rank's, and launchers end all ranks when the first one fails: one
    message instead of thousands."""
    with contextlib.suppress(ValueError):  # the launcher's variables may be the very mistake
        if detect(device="cpu").rank:
            time.sleep(2)


if __name__ == "__main__":
    sys.exit(main())
