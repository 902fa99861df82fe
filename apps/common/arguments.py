"""Runs the commands of the apps: parses arguments, reports errors in one line and a status.

Statuses: 0 (done), 1 (output cannot be written, or the work failed), 2 (a mistake of the user),
130 (interrupted).
"""

import argparse
import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NoReturn, TypeVar

import ringx

# What a command raises when the user has made a mistake or lacks a package.
MISTAKES: tuple[type[Exception], ...] = (ValueError, NotImplementedError, ImportError)

J = TypeVar("J")  # what each rank of a command is given


class CannotWrite(Exception):
    """A command's output cannot be written: ``run_command`` prints the text, with exit status 1."""


class Parser(argparse.ArgumentParser):
    """For commands that a launcher starts many times: one rank reports a mistake, in one line."""

    def error(self, message: str) -> NoReturn:
        # The message may be about launcher variables that make no sense: those must not hide it.
        with contextlib.suppress(ValueError):
            if ringx.launch.detect(device="cpu").rank:
                time.sleep(2)  # launchers end all ranks when the first one fails: let rank 0 print
                self.exit(2)
        self.exit(2, f"{self.prog}: error: {message}\n")


def add_rank_flags(parser: argparse.ArgumentParser) -> None:
    """How many ranks are started, on which devices, and how long they wait for each other."""
    parser.add_argument(
        "--nproc",
        type=int,
        help="ranks to start here (default: 1, or the ranks of torchrun, srun or mpirun)",
    )
    parser.add_argument(
        "--device", default="auto", choices=("auto", "cpu", "cuda"), help="default: auto"
    )
    parser.add_argument(
        "--timeout",
        type=float,
        default=600.0,
        help="seconds that ranks wait for each other (default: 600)",
    )


def run_command(
    parser: argparse.ArgumentParser,
    argv: Sequence[str] | None,
    work: Callable[[argparse.Namespace], int],
    *,
    mistakes: tuple[type[Exception], ...] = MISTAKES,
    interrupted: str = "interrupted",
) -> int:
    """The `main` of a command that is one process: parses `argv` and returns ``work(args)``.

    Args:
        parser: of the command line; its `prog` begins each message.
        argv: the arguments without the program's name; None takes those of the process.
        work: does what the command is for and returns its exit status.  It raises CannotWrite,
            with a text for the user, where its output cannot be written.
        mistakes: the errors that are reported as the user's.  A command whose OSErrors mean that
            an input cannot be read adds OSError.
        interrupted: the message after Ctrl-C; "" only ends the line that is being printed.

    Raises:
        SystemExit: with one line on stderr and status 2 for a mistake, 1 for CannotWrite, 130 for
            an interruption."""
    args = parser.parse_args(argv)
    with _errors_in_one_line(parser, mistakes, interrupted):
        return work(args)


def run_on_ranks(
    parser: argparse.ArgumentParser,
    argv: Sequence[str] | None,
    configure: Callable[[argparse.Namespace], J | None],
    work: Callable[[ringx.launch.World, J], int],
) -> int:
    """The `main` of a command on many ranks: returns the greatest of their exit statuses.

    Args:
        parser: of the command line, which has --nproc, --device and --timeout.
        argv: the arguments without the program's name; None takes those of the process.
        configure: checks the arguments before ranks start and returns what each rank is given;
            None: there is nothing to run.
        work: one rank's part: ``work(world, configured)`` returns its exit status.

    Raises:
        SystemExit: with one line on stderr and status 2 where `configure` raises one of MISTAKES,
            130 for an interruption.  An error of `work` is a fault and keeps its traceback."""
    args = parser.parse_args(argv)
    with _errors_in_one_line(parser, MISTAKES, "interrupted"):
        configured = configure(args)
    if configured is None:
        return 0
    with _errors_in_one_line(parser, (), "interrupted"):
        statuses = ringx.launch.run(
            work, args.nproc, configured, device=args.device, timeout=args.timeout
        )
    return max(statuses)


@contextlib.contextmanager
def _errors_in_one_line(
    parser: argparse.ArgumentParser, mistakes: tuple[type[Exception], ...], interrupted: str
) -> Iterator[None]:
    """Ends the process with one line on stderr for each kind of error that a user can cause."""
    try:
        yield
    except CannotWrite as error:
        parser.exit(1, f"{parser.prog}: error: {error}\n")
    except mistakes as error:
        if isinstance(parser, Parser):
            parser.error(str(error))
        parser.exit(2, f"{parser.prog}: error: {error}\n")  # other parsers print their usage, too
    except KeyboardInterrupt:
        parser.exit(130, f"{parser.prog}: {interrupted}\n" if interrupted else "\n")
