"""What ``ringx bench`` and ``ringx bench-comm`` have in common."""

import re
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from . import records

RECORD_BYTES = 2**14  # of a record, at most: what an --out folder must have room for


def labelled(said: Sequence[str]) -> dict[str, str]:
    """["link_mbit=200"] -> {"link_mbit": "200"}.

    Raises:
        ValueError: a label is not NAME=TEXT, or is there twice."""
    labels: dict[str, str] = {}
    for one in said:
        name, equals, text = one.partition("=")
        if not re.fullmatch(r"[A-Za-z]\w*", name) or not equals or not text:
            raise ValueError(
                f"--label {one!r} must be NAME=TEXT, with a NAME of letters, digits and underscores"
            )
        if name in labels:
            raise ValueError(f"--label {name} is given twice")
        labels[name] = text
    return labels


def all_of(faults: Sequence[str]) -> str:
    return (
        faults[0]
        if len(faults) == 1
        else f"{len(faults)} faults:\n" + "\n".join(f"  - {f}" for f in faults)
    )


def remaining(out: Path, cases: Sequence[Any], resume: bool, labels: dict[str, str]) -> list[Any]:
    """The cases (dataclasses with an id) that `out` does not hold yet.  Without `resume` it may hold none of them."""
    records.expect_room(out, RECORD_BYTES * max(len(cases), 1))
    there = [c for c in cases if records.path_of(out, c.id).exists()]
    if there and not resume:
        raise ValueError(
            f"{out} already holds {len(there)} of these {len(cases)} cases ({there[0].id}, ...): "
            "pass --resume to measure only the others, or another --out."
        )
    done, faults = set(), []
    for case in there:
        path = records.path_of(out, case.id)
        try:
            found = records.read(path)
        except ValueError as e:
            aside = path.with_name(f"{path.name}.broken")
            path.replace(aside)
            print(f"measured again, for it is broken (now {aside.name}): {e}", file=sys.stderr)
            continue
        other = [
            f"{k}={found['case'].get(k)!r}, now {v!r}"
            for k, v in asdict(case).items()
            if found["case"].get(k) != v
        ]
        if found["labels"] != labels:
            other.append(f"labels {found['labels']}, now {labels}")
        if other:
            faults.append(
                f"{case.id} in {out} was measured with {', '.join(other)}: pass another --out"
            )
        done.add(case)
    if faults:
        raise ValueError(all_of(faults))
    return [c for c in cases if c not in done]
