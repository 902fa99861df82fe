"""Records as rows of flat tables, and tables read back.

Which columns there are, and what they mean, is in ``ringx.measure.records``; those that follow from
more than one record are made here.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..comm.collectives import COLLECTIVES
from ..measure import machine, records
from ..measure.records import Record, Row

# Every table of attention has a column of the bytes sent by each of these, 0 where a record sent
# none; other collectives have one where some record did.
ALWAYS_A_COLUMN = ("broadcast", "reduce", "all_reduce", "all_gather", "all_to_all")
Fit = Mapping[str, Any]  # of a machine file


def rows_of(
    record: Record,
    path: Path | None = None,
    fits: Sequence[Fit] = (),
    collectives: Sequence[str] | None = None,
) -> list[Row]:
    """The flat rows of a record: one of attention, one for each size of a collective.

    Args:
        record: a valid record.
        path: the file that it was read from, if it was.
        fits: of the collectives (``machine.of``), to say what they make of the record's bytes.
        collectives: those that have a column of bytes (default: ``collectives_sent`` of this
            record); rows of one table must agree on them."""
    given: dict[str, Row] = {"source": {"source": path.name if path else None}}
    if record["kind"] == "attention":
        if collectives is None:
            collectives = collectives_sent([record])
        given["sent"] = {f"{name}_bytes": _sent_by(record, name) for name in collectives}
        given["expected"] = expected(record, fits)
    else:
        fit = machine.fit_of(record)
        given["fit"] = {
            "fit_alpha_s": fit["alpha_s"],
            "fit_beta_s_per_byte": fit["beta_s_per_byte"],
        }
    return records.flat_rows(record, given)


def collectives_sent(of_attention: Iterable[Record]) -> list[str]:
    """The collectives that have a column in a table of these records: ALWAYS_A_COLUMN, and whatever
    else a record sent bytes by.  In the order of COLLECTIVES; unknown ones come last."""
    sent: set[str] = set()
    for record in of_attention:
        for direction in records.DIRECTIONS:
            sent.update(record["bytes"][direction]["collectives"])
    known = [name for name in COLLECTIVES if name in sent or name in ALWAYS_A_COLUMN]
    return known + sorted(sent - COLLECTIVES.keys())


def _sent_by(record: Record, collective: str) -> float:
    """Bytes that a rank sent by a collective, forward and backward."""
    both = (record["bytes"][direction]["collectives"] for direction in records.DIRECTIONS)
    return sum(sent.get(collective, 0) for sent in both)


def expected(record: Record, fits: Sequence[Fit]) -> Row:
    """What the collectives, measured on as many ranks under the same labels, make of the bytes
    sent: bytes on the wire, and seconds that they take if nothing is hidden.  None where they were
    not measured."""
    return {
        "wire_expected_bytes": _sum_over_collectives(record, fits, machine.wire_bytes),
        "unhidden_s": _sum_over_collectives(record, fits, machine.seconds_unhidden),
    }


def _sum_over_collectives(
    record: Record, fits: Sequence[Fit], cost: Callable[[Fit, float, float], float]
) -> float | None:
    """The sum of cost(fit, bytes, messages) over all that was sent; None if nothing was sent or a
    collective has no fit."""
    costs = []
    for sent in record["bytes"].values():
        for name, size in sent["collectives"].items():
            try:
                benchmark = COLLECTIVES[name].benchmark_name
                fit = machine.find(fits, benchmark, record["case"]["world"], record["labels"])
                costs.append(cost(fit, size, sent["messages"][name]))
            except LookupError:  # no such benchmark, no fit, or no number of messages
                return None
    return sum(costs) if costs else None


def read_table(path: Path) -> list[Row]:
    """The rows of a table that ``ringx collect`` wrote, what is missing as None.

    Raises:
        ValueError: it is no such table; names it."""
    pandas = require_pandas()
    readers = {".parquet": pandas.read_parquet, ".csv": pandas.read_csv}
    reader = readers.get(Path(path).suffix)
    if reader is None or not Path(path).exists():
        raise ValueError(
            f"{path} is no table; name a .parquet or .csv file that `ringx collect` wrote."
        )
    try:
        frame = reader(path)
    except (ValueError, OSError) as error:
        raise ValueError(f"{path}: {error}") from error
    frame = frame.astype(object).where(frame.notna(), None)
    if "labels" in frame:  # an empty text is written as nothing
        frame["labels"] = frame["labels"].where(frame["labels"].notna(), "")
    return frame.to_dict("records")


def require_pandas() -> Any:
    """The module pandas; an ImportError with the remedy where it or pyarrow is missing."""
    try:
        import pandas
        import pyarrow  # noqa: F401 - what pandas writes Parquet with
    except ImportError:
        raise ImportError("tables need pandas and pyarrow: pip install 'ringx[plot]'") from None
    return pandas
