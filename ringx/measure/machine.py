"""The machine file: what each collective costs here, as time = alpha + beta bytes, and what its
backend puts on the wire.

``ringx bench-comm`` and ``ringx collect`` write machine.json from records; planners and plots read
it:

    fits = machine.load("results/here/machine.json")
    gather = machine.find(fits, "all_gather", world=8)
    seconds = gather["alpha_s"] + gather["beta_s_per_byte"] * size

The size is the one that nccl-tests defines (``ringx.measure.bench_collectives``).
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .. import files
from ..comm.collectives import BENCHMARKS
from . import records
from .records import Record

FILE = "machine.json"
MAX_ITERATIONS = 100
TOLERANCE = 1e-9  # of a step in log(alpha) and log(beta)
MAX_STEP = 2.0
LEAST_LOG = -80.0  # of alpha and beta: as good as zero


def fit(points: Sequence[tuple[int, float]]) -> dict[str, float] | None:
    """alpha and beta of time = alpha + beta bytes, with the least squares of log(fitted /
    measured): twice and half as long are equally far off.  Gauss-Newton in log(alpha) and
    log(beta), so that neither gets negative.

    points: (bytes, seconds).  None for fewer than two of them."""
    if len(points) < 2:
        return None
    size = np.array([size for size, _ in points], dtype=float)
    seconds = np.array([seconds for _, seconds in points], dtype=float)

    def residuals(parameters: np.ndarray) -> np.ndarray:
        alpha, beta = np.exp(parameters)
        return np.log(alpha + beta * size) - np.log(seconds)

    def loss(parameters: np.ndarray) -> float:
        return np.square(residuals(parameters)).sum()

    parameters = np.log([seconds.min(), seconds[-1] / size[-1]])
    for _ in range(MAX_ITERATIONS):
        alpha, beta = np.exp(parameters)
        derivatives = np.stack([np.full_like(size, alpha), beta * size], axis=1)
        jacobian = derivatives / (alpha + beta * size)[:, None]
        newton = np.linalg.lstsq(jacobian, -residuals(parameters), rcond=1e-12)[0]
        step = np.clip(newton, -MAX_STEP, MAX_STEP)
        while loss(parameters + step) > loss(parameters) and np.abs(step).max() > TOLERANCE:
            step /= 2
        parameters = np.maximum(parameters + step, LEAST_LOG)
        if np.abs(step).max() < TOLERANCE:
            break
    alpha, beta = np.exp(parameters)
    error = float(np.abs((alpha + beta * size) / seconds - 1).max())
    return {"alpha_s": float(alpha), "beta_s_per_byte": float(beta), "relative_error": error}


def fit_of(record: Record) -> dict[str, float | None]:
    """The fit to the medians of a record of kind "collective"; all None where it has one size."""
    fitted = fit([(size["bytes"], size["median"]) for size in record["sizes"]])
    if fitted is None:
        return {"alpha_s": None, "beta_s_per_byte": None, "relative_error": None}
    return {**fitted}


def of(of_collectives: Sequence[Record]) -> dict[str, Any]:
    """The content of the machine file, from records of kind "collective"."""
    fits = [_entry(record) for record in of_collectives]
    fits.sort(key=_order)
    return {
        "schema": records.SCHEMA,
        "kind": "machine",
        "model": "seconds = alpha_s + beta_s_per_byte * bytes",
        "fits": fits,
    }


def _entry(record: Record) -> dict[str, Any]:
    """What the machine file holds of one record."""
    case, sizes = record["case"], record["sizes"]
    collective = BENCHMARKS[case["collective"]]
    wire_factors = [
        [size["bytes"], size["wire_factor"]] for size in sizes if size["wire_factor"] is not None
    ]
    return {
        "collective": case["collective"],
        "world": case["world"],
        "hosts": case["hosts"],
        "ranks_per_host": record["launch"]["local_world"],
        "backend": record["launch"]["backend"],
        "device": record["machine"]["device"],
        "labels": record["labels"],
        **fit_of(record),
        "bytes": [sizes[0]["bytes"], sizes[-1]["bytes"]],
        "bus_factor": collective.bus(case["world"]),
        "sent_per_byte": collective.sent(case["world"]),
        "wire_factors": wire_factors or None,
        "date": record["date"],
    }


def _order(entry: Mapping[str, Any]) -> tuple:
    return (
        json.dumps(entry["labels"]),
        entry["device"],
        list(BENCHMARKS).index(entry["collective"]),
        entry["world"],
        entry["hosts"],
    )


def collected(directory: Path) -> list[Record]:
    """The valid records of collectives in a folder."""
    valid, _ = records.read_all(directory)
    return [record for record in valid if record["kind"] == "collective"]


def write(directory: Path, of_collectives: Sequence[Record]) -> Path:
    """Puts the machine file of these records into a folder."""
    path = Path(directory) / FILE
    files.write_text(path, json.dumps(of(of_collectives), indent=1) + "\n", replace=True)
    return path


def load(path: Path) -> list[dict[str, Any]]:
    """The fits of a machine file.

    Raises:
        ValueError: it is none; names it."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
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
    fits: Sequence[Mapping[str, Any]],
    collective: str,
    world: int,
    labels: Mapping[str, str] | None = None,
) -> Mapping[str, Any]:
    """The newest fit of a collective on so many ranks; of these labels, if they are given.

    Raises:
        LookupError: there is none; names what there is."""
    known = {(fit["collective"], fit["world"]) for fit in fits}
    fitting = [
        fit
        for fit in fits
        if (fit["collective"], fit["world"]) == (collective, world)
        and (labels is None or fit["labels"] == labels)
    ]
    if not fitting:
        raise LookupError(
            f"no fit of {collective} on {world} ranks with labels {labels};"
            f" there are {sorted(known)}."
        )
    return max(fitting, key=lambda fit: fit["date"])


def wire_bytes(fit: Mapping[str, Any], sent: float, messages: float) -> float:
    """Bytes that really leave a host of the `sent` ones that an optimal implementation of this
    collective would send in so many messages of equal size.  What leaves is taken to grow linearly
    between the sizes that were measured, and beyond them.

    Raises:
        LookupError: no interface was read when the collective was measured."""
    if not fit["wire_factors"]:
        raise LookupError(
            f"of {fit['collective']} on {fit['world']} ranks no bytes on the wire were counted."
        )
    sizes = np.array([size for size, _ in fit["wire_factors"]], dtype=float)
    factors = np.array([factor for _, factor in fit["wire_factors"]], dtype=float)
    measured = factors * sizes  # what left, up to the factor sent_per_byte
    size = sent / messages / fit["sent_per_byte"]
    if size > sizes[-1] and len(sizes) > 1:
        slope = (measured[-1] - measured[-2]) / (sizes[-1] - sizes[-2])
        message = measured[-1] + (size - sizes[-1]) * slope
    elif size > sizes[0]:
        message = np.interp(size, sizes, measured)
    else:
        message = size * factors[0]
    return float(message * fit["sent_per_byte"] * messages)


def seconds_unhidden(fit: Mapping[str, Any], sent: float, messages: float) -> float:
    """Seconds that so many messages of equal size take one after another, hidden behind nothing.

    Raises:
        LookupError: the collective was measured at one size only."""
    if fit["alpha_s"] is None:
        raise LookupError(
            f"{fit['collective']} on {fit['world']} ranks was measured at one size only."
        )
    return messages * fit["alpha_s"] + sent / fit["sent_per_byte"] * fit["beta_s_per_byte"]
