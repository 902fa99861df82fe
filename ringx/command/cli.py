"""The command line: ringx verify | bench | bench-comm | submit | collect | plot | info | demo (also python -m ringx)."""

import argparse
import contextlib
import importlib
import sys
import time
from collections.abc import Sequence

COMMANDS = {  # name: help
    "verify": "compare every algorithm with full attention in fp64",
    "bench": "measure algorithms against each other and against one process",
    "bench-comm": "measure collectives by size: latency, bandwidth, bytes on the wire",
    "submit": "write, check and submit Slurm jobs that measure a matrix of cases at a site",
    "collect": "merge the records of many jobs into one table",
    "plot": "draw scaling, efficiency, bytes and collectives from records or a table",
    "info": "show what this environment can do, and why not the rest",
    "demo": "verify, measure, plot and train a small Llama, in minutes",
}

MODULES = {
    "verify": "measure.verify",
    "bench": "measure.bench_attention",
    "bench-comm": "measure.bench_collectives",
    "submit": "slurm.submit",
    "collect": "report.collect",
    "plot": "report.plot",
    "info": "command.info",
    "demo": "command.demo",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; user mistakes print one line and give exit status 2, interruptions 130."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="ringx", description="Exact attention over sequences too long for one GPU."
    )
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    wanted = next((a for a in argv if not a.startswith("-")), None)
    for name, text in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        if name == wanted:  # only the command that runs is imported
            module = importlib.import_module(f"ringx.{MODULES[name]}")
            command.formatter_class = argparse.RawDescriptionHelpFormatter
            command.description = module.__doc__
            module.add_arguments(command)
            command.set_defaults(main=module.main)
    args = parser.parse_args(argv)
    if args.version:
        print(importlib.import_module("ringx").__version__)
        return 0
    if args.command is None:
        parser.print_help()
        return 2
    try:
        return args.main(args)
    except (ValueError, TypeError, NotImplementedError, OSError, ImportError) as error:
        _let_rank_0_speak_first()
        print(f"ringx {args.command}: error: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:  # a rank failed: its own traceback is part of the message
        print(f"ringx {args.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"ringx {args.command}: interrupted", file=sys.stderr)
        return 130


def _let_rank_0_speak_first() -> None:
    """A mistake is most often every rank's, and launchers end all ranks when the first one fails: one message, not thousands."""
    from .. import launch

    with contextlib.suppress(
        ValueError
    ):  # launcher's variables that make no sense may be what the message is about
        if launch.detect(device="cpu").rank:
            time.sleep(2)


if __name__ == "__main__":
    sys.exit(main())
