"""Records as rows of flat tables, and tables read back."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..comm.collectives import COLLECTIVES
from ..measure import machine, records

Row = dict[str, Any]


def rows_of(
    r: dict[str, Any],
    path: Path | None = None,
    fits: Sequence[dict[str, Any]] = (),
    collectives: Sequence[str] | None = None,
) -> list[Row]:
    """The rows of a record, flat, with where they come from, and what `fits` of the collectives make of its bytes.  `collectives`:
    those that have a column in the rows of attention (default: ``records.collectives_sent`` of this record)."""
    if r["kind"] == "attention":
        return [{**attention(r, collectives), **expected(r, fits), **origin(r, path)}]
    fit = machine.fit_of(r)
    head = {
        **r["case"],
        "fit_alpha_s": fit["alpha_s"],
        "fit_beta_s_per_byte": fit["beta_s_per_byte"],
    }
    head |= {
        "ranks_per_host": r["launch"]["local_world"],
        "device": r["machine"]["device"],
        "labels": _written(r["labels"]),
    }
    named = {"mean": "mean_s", "min": "min_s", "median": "median_s", "p99": "p99_s"}
    named |= {"algbw": "algbw_bytes_per_s", "busbw": "busbw_bytes_per_s"}
    return [
        {**head, **{named.get(k, k): v for k, v in size.items()}, **origin(r, path)}
        for size in r["sizes"]
    ]


def _written(labels: dict[str, str]) -> str:
    return " ".join(f"{k}={v}" for k, v in sorted(labels.items()))


def attention(r: dict[str, Any], collectives: Sequence[str] | None = None) -> Row:
    """What a record of attention says, in one flat row."""
    if collectives is None:
        collectives = records.collectives_sent([r])
    case, seconds, baseline = r["case"], r["seconds"], r["baseline"]
    row: Row = {k: case[k] for k in ("algorithm", "layout", "overlap", "mask", "world", "seqlen")}
    row |= {
        "seqlen_per_rank": case["seqlen"] // case["world"],
        "oversubscribed": r["oversubscribed"],
    }
    row |= {
        "machine": r["machine"]["cpu"],
        "device": r["machine"]["device"],
        "dtype": case["dtype"],
        "kernel": r["kernel"],
    }
    row |= {k: case[k] for k in ("batch", "heads", "kv_heads", "head_dim", "threads")}
    row |= {"hosts": len(r["machine"]["hosts"]), "reps": case["reps"]}
    row |= {"labels": _written(r["labels"])}
    for phase in records.PHASES:
        row |= {f"{phase}_s": seconds[phase]["median"]} | {
            f"{phase}_{q}_s": seconds[phase][q] for q in ("min", "q1", "q3")
        }
        flash = (
            baseline["seconds"][phase]["median"] * baseline["workers"] / r["workers"]
            if baseline
            else None
        )
        row |= {f"{phase}_ideal_s": flash}
        row |= {
            f"{phase}_efficiency_percent": r["efficiency_percent"][phase]
            if r["efficiency_percent"]
            else None
        }
        row |= {f"{phase}_tflops_per_rank": r["tflops_per_rank"][phase]}
    row |= {
        "total_raw_s": " ".join(f"{t:.6g}" for t in seconds["total"]["raw"]),
        "tokens_per_second": r["tokens_per_second"],
    }
    for direction in ("forward", "backward"):
        sent = r["bytes"][direction]
        row |= {
            f"{direction}_bytes": sent["counted"],
            f"{direction}_bytes_closed_form": sent["closed_form"],
        }
    for name in collectives:
        row |= {
            f"{name}_bytes": sum(
                r["bytes"][d]["collectives"].get(name, 0) for d in ("forward", "backward")
            )
        }
    return row | {
        "wire_bytes": r["wire"]["median"] if r["wire"] else None,
        "peak_bytes": r["memory"]["peak_bytes"],
    }


def expected(r: dict[str, Any], fits: Sequence[dict[str, Any]]) -> Row:
    """What the collectives, measured on as many ranks under the same labels, make of the bytes sent: bytes on the wire, and seconds
    that they take if nothing is hidden.  None where they were not measured."""
    row: Row = {}
    for name, of in (
        ("wire_expected_bytes", machine.wire_bytes),
        ("unhidden_s", machine.seconds_unhidden),
    ):
        try:
            parts = [
                of(
                    machine.find(
                        fits, COLLECTIVES[kind].benchmark_name, r["case"]["world"], r["labels"]
                    ),
                    n,
                    sent["messages"][kind],
                )
                for sent in r["bytes"].values()
                for kind, n in sent["collectives"].items()
            ]
            row[name] = sum(parts) if parts else None
        except LookupError:
            row[name] = None
    return row


def origin(r: dict[str, Any], path: Path | None) -> Row:
    """Where a record comes from."""
    job, git = r["launch"]["job"] or {}, r["git"] or {}
    return {
        **{"id": r["id"], "date": r["date"], "source": path.name if path else None},
        **{f"label_{k}": v for k, v in sorted(r["labels"].items())},
        **{k: r["versions"][k] for k in ("ringx", "torch")},
        **{"commit": git.get("commit"), "dirty": git.get("dirty")},
        **{
            "launcher": r["launch"]["launcher"],
            "backend": r["launch"]["backend"],
            "site": job.get("site"),
        },
        **{
            "job": job.get("id"),
            "array_task": job.get("array_task"),
            "restart": job.get("restart"),
        },
    }


def read_table(path: Path) -> list[Row]:
    """The rows of a table that ``main`` wrote, what is missing as None.

    Raises:
        ValueError: it is no such table; names it."""
    pandas = _pandas()
    read = {".parquet": pandas.read_parquet, ".csv": pandas.read_csv}.get(Path(path).suffix)
    if read is None or not Path(path).exists():
        raise ValueError(
            f"{path} is no table; name a .parquet or .csv file that `ringx collect` wrote."
        )
    try:
        frame = read(path)
    except (ValueError, OSError) as e:
        raise ValueError(f"{path}: {e}") from e
    if "labels" in frame:
        frame["labels"] = frame["labels"].fillna("")
    frame = frame.astype(object).where(frame.notna(), None)
    return frame.to_dict("records")


def _pandas():
    try:
        import pandas
        import pyarrow  # noqa: F401 - what pandas writes Parquet with
    except ImportError:
        raise ImportError("tables need pandas and pyarrow: pip install 'ringx[plot]'") from None
    return pandas
