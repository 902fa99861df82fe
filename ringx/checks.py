"""Argument types that the command lines share: comma-separated lists whose errors name the value and the remedy."""

import argparse
import contextlib
import difflib
from collections.abc import Callable, Iterable

import torch

DTYPES = {
    "fp64": torch.float64,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
MASKS = {"causal": "a token sees itself and those before", "full": "every token sees all"}


def require_name(value: object, known: Iterable[str], what: str) -> str:
    """`value` if it is one of the `known` names; otherwise a ValueError with the nearest of them."""
    known = list(known)
    if value in known:
        return str(value)
    near = difflib.get_close_matches(str(value).lower(), known, n=1, cutoff=0.4)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"{what}={value!r} is unknown.{hint} Known: {', '.join(known)}.")


def integers(text: str) -> list[int]:
    """ "1,2,4" -> [1, 2, 4], each at least 1, none twice."""
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
    """A type for comma-separated names out of `known`; "all" is all of them."""

    def parse(text: str) -> list[str]:
        if text == "all":
            return list(known)
        try:
            return list(
                dict.fromkeys(require_name(part.strip(), known, "name") for part in text.split(","))
            )
        except ValueError as e:
            raise argparse.ArgumentTypeError(str(e)) from None

    return parse


def sift(kind: Callable[[str], list], text: str) -> tuple[list, str | None]:
    """(the values of a comma-separated list that make sense, what is wrong with the others): to name all faults at once."""
    try:
        return kind(text), None
    except argparse.ArgumentTypeError as e:
        good: list = []
        for word in text.split(","):
            with contextlib.suppress(argparse.ArgumentTypeError):
                good += kind(word)
        return good, str(e)


def switches(text: str) -> list[bool]:
    """ "on,off" -> [True, False]."""
    return [name == "on" for name in choices(("on", "off"))(text)]
