"""Names, and the types of comma-separated lists that the command lines share.

Errors name the value and the remedy."""

import argparse
import contextlib
import difflib
from collections.abc import Callable, Iterable
from typing import Any

import torch

DTYPES = {
    "fp64": torch.float64,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
MASKS = {"causal": "a token sees itself and those before", "full": "every token sees all"}


def require_name(value: object, known: Iterable[str], what: str) -> str:
    """`value` if it is one of the known names.

    Args:
        what: the name of the argument, for the error message.

    Raises:
        ValueError: it is none of them; names the nearest one."""
    names = list(known)
    if value in names:
        return str(value)
    nearest = difflib.get_close_matches(str(value).lower(), names, n=1, cutoff=0.4)
    hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
    raise ValueError(f"{what}={value!r} is unknown.{hint} Known: {', '.join(names)}.")


def integers(text: str) -> list[int]:
    """ "1,2,4" -> [1, 2, 4], each at least 1, none twice.

    Raises:
        argparse.ArgumentTypeError: it is no such list."""
    try:
        values = [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no comma-separated list of integers, such as 1,2,4"
        ) from None
    if min(values) < 1:
        raise argparse.ArgumentTypeError(f"{min(values)} is less than 1")
    return list(dict.fromkeys(values))


def choices(known: Iterable[str]) -> Callable[[str], list[str]]:
    """A type for comma-separated names out of `known`, none twice; "all" is all of them.

    The type raises argparse.ArgumentTypeError for another name."""

    def parse(text: str) -> list[str]:
        if text == "all":
            return list(known)
        names: dict[str, None] = {}  # in the order given, none twice
        for part in text.split(","):
            try:
                names[require_name(part.strip(), known, "name")] = None
            except ValueError as error:
                raise argparse.ArgumentTypeError(str(error)) from None
        return list(names)

    return parse


def sift(kind: Callable[[str], list[Any]], text: str) -> tuple[list[Any], str | None]:
    """(the values of a comma-separated list that make sense, what is wrong with the others or
    None).

    To name all mistakes of a command line at once.

    Args:
        kind: the type of the list, such as ``integers``."""
    try:
        return kind(text), None
    except argparse.ArgumentTypeError as error:
        valid: list[Any] = []
        for word in text.split(","):
            with contextlib.suppress(argparse.ArgumentTypeError):
                valid += kind(word)
        return valid, str(error)


def switches(text: str) -> list[bool]:
    """ "on,off" -> [True, False].

    Raises:
        argparse.ArgumentTypeError: another word is in the list."""
    return [name == "on" for name in choices(("on", "off"))(text)]
