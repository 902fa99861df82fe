"""The machine file: what each collective costs here, as time = alpha + beta bytes, and what its backend puts on the wire.

``ringx bench-comm`` and ``ringx collect`` write machine.json from records; planners and plots read it:

    fits = machine.load("results/here/machine.json")
    one = machine.find(fits, "all_gather", world=8)
    seconds = one["alpha_s"] + one["beta_s_per_byte"] * size           # size as nccl-tests defines it (``ringx.measure.bench_collectives``)
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .. import files
from ..comm.collectives import BENCHMARKS
from . import records

FILE = "machine.json"


def fit(points: Sequence[tuple[int, float]]) -> dict[str, float] | None:
    """alpha and beta of time = alpha + beta bytes, with the least squares of log(fitted / measured): twice and half as long are
    equally far off.  Gauss-Newton in log(alpha) and log(beta), so that neither gets negative.  None for fewer than two sizes.

    points: (bytes, seconds)."""
    if len(points) < 2:
        return None
    size, seconds = (np.array(column, dtype=float) for column in zip(*points, strict=True))

    def off(parameters: np.ndarray) -> np.ndarray:
        alpha, beta = np.exp(parameters)
        return np.log(alpha + beta * size) - np.log(seconds)

    now = np.log([seconds.min(), seconds[-1] / size[-1]])
    for _ in range(100):
        alpha, beta = np.exp(now)
        slopes = (
            np.stack([np.full_like(size, alpha), beta * size], axis=1)
            / (alpha + beta * size)[:, None]
        )
        step = np.clip(np.linalg.lstsq(slopes, -off(now), rcond=1e-12)[0], -2, 2)
        while (
            np.square(off(now + step)).sum() > np.square(off(now)).sum()
            and np.abs(step).max() > 1e-9
        ):
            step /= 2
        now = np.maximum(now + step, -80)
        if np.abs(step).max() < 1e-9:
            break
    alpha, beta = np.exp(now)
    error = float(np.abs((alpha + beta * size) / seconds - 1).max())
    return {"alpha_s": float(alpha), "beta_s_per_byte": float(beta), "relative_error": error}


def fit_of(record: dict[str, Any]) -> dict[str, float | None]:
    """The fit to the medians of a record of kind "collective"; None in its place where there is one size only."""
    found = fit([(s["bytes"], s["median"]) for s in record["sizes"]])
    return {**found} if found else dict.fromkeys(("alpha_s", "beta_s_per_byte", "relative_error"))


def of(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The content of the machine file, from records of kind "collective"."""
    fits = []
    for r in found:
        what, world = BENCHMARKS[r["case"]["collective"]], r["case"]["world"]
        factors = [
            [s["bytes"], s["wire_factor"]] for s in r["sizes"] if s["wire_factor"] is not None
        ]
        fits.append(
            {
                **{k: r["case"][k] for k in ("collective", "world", "hosts")},
                "ranks_per_host": r["launch"]["local_world"],
                **{
                    "backend": r["launch"]["backend"],
                    "device": r["machine"]["device"],
                    "labels": r["labels"],
                },
                **fit_of(r),
                "bytes": [r["sizes"][0]["bytes"], r["sizes"][-1]["bytes"]],
                "bus_factor": what.bus(world),
                "sent_per_byte": what.sent(world),
                "wire_factors": factors or None,
                "date": r["date"],
            }
        )
    order = list(BENCHMARKS)
    fits.sort(
        key=lambda f: (
            json.dumps(f["labels"]),
            f["device"],
            order.index(f["collective"]),
            f["world"],
            f["hosts"],
        )
    )
    return {
        "schema": records.SCHEMA,
        "kind": "machine",
        "model": "seconds = alpha_s + beta_s_per_byte * bytes",
        "fits": fits,
    }


def collected(directory: Path) -> list[dict[str, Any]]:
    """The valid records of collectives in a folder."""
    return [r for r in records.read_all(directory)[0] if r["kind"] == "collective"]


def write(directory: Path, found: Sequence[dict[str, Any]]) -> Path:
    """Puts the machine file of these records into a folder."""
    path = Path(directory) / FILE
    files.write_text(path, json.dumps(of(found), indent=1) + "\n", replace=True)
    return path


def load(path: Path) -> list[dict[str, Any]]:
    """The fits of a machine file.

    Raises:
        ValueError: it is none; names it."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as e:
        raise ValueError(f"{path}: {e}") from e
    if (
        not isinstance(content, dict)
        or content.get("kind") != "machine"
        or content.get("schema") != records.SCHEMA
    ):
        raise ValueError(
            f"{path} is no machine file of schema {records.SCHEMA}; `ringx bench-comm` writes one."
        )
    return content["fits"]


def find(
    fits: Sequence[dict[str, Any]],
    collective: str,
    world: int,
    labels: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """The newest fit of a collective on so many ranks; of these labels, if they are given.

    Raises:
        LookupError: there is none; names what there is."""
    fitting = [
        f
        for f in fits
        if (f["collective"], f["world"]) == (collective, world) and labels in (None, f["labels"])
    ]
    if not fitting:
        there = sorted({(f["collective"], f["world"]) for f in fits})
        raise LookupError(
            f"no fit of {collective} on {world} ranks with labels {labels}; there are {there}."
        )
    return max(fitting, key=lambda f: f["date"])


def wire_bytes(fit: Mapping[str, Any], sent: float, messages: float) -> float:
    """Bytes that really leave a host of the `sent` ones that an optimal implementation of this collective would send in so many
    messages of equal size.  What leaves is taken to grow linearly between the sizes that were measured, and beyond them.

    Raises:
        LookupError: no interface was read when the collective was measured."""
    if not fit["wire_factors"]:
        raise LookupError(
            f"of {fit['collective']} on {fit['world']} ranks no bytes on the wire were counted."
        )
    sizes, factors = (
        np.array(column, dtype=float) for column in zip(*fit["wire_factors"], strict=True)
    )
    left, size = factors * sizes, sent / messages / fit["sent_per_byte"]
    if size > sizes[-1] and len(sizes) > 1:
        one = left[-1] + (size - sizes[-1]) * (left[-1] - left[-2]) / (sizes[-1] - sizes[-2])
    else:
        one = np.interp(size, sizes, left) if size > sizes[0] else size * factors[0]
    return float(one * fit["sent_per_byte"] * messages)


def seconds_unhidden(fit: Mapping[str, Any], sent: float, messages: float) -> float:
    """Seconds that so many messages of equal size take one after another, hidden behind nothing.

    Raises:
        LookupError: the collective was measured at one size only."""
    if fit["alpha_s"] is None:
        raise LookupError(
            f"{fit['collective']} on {fit['world']} ranks was measured at one size only."
        )
    return messages * fit["alpha_s"] + sent / fit["sent_per_byte"] * fit["beta_s_per_byte"]
