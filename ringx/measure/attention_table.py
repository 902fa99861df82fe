"""The table that ``ringx bench`` prints."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any


def table(rows: Sequence[dict[str, Any]]) -> str:
    """At most 100 columns; one block for each mask, dtype and size of heads."""
    lines = []
    for _, block in itertools.groupby(sorted(rows, key=_block), key=_block):
        lines += ["", *_block_lines(list(block))]
    lines += [
        "fwd, fwd+bwd: one-process flash / N over the measured time; 1 is ideal, x 100 is % of flash.",
        "ms, ratios: medians, the slowest rank counts.  MB sent: a rank's mean, forward/backward.",
        "TFLOP/s: a rank's, forward and backward, causal work counted as done.",
    ]
    if any(r["oversubscribed"] for r in rows):
        lines.append("*: more threads than cores, where 1 is out of reach.")
    return "\n".join(lines)


def _block(r: dict[str, Any]) -> tuple:
    c = r["case"]
    return c["mask"], c["dtype"], c["batch"], c["heads"], c["head_dim"], r["kernel"]


def _block_lines(rows: Sequence[dict[str, Any]]) -> list[str]:
    def ratio(r: dict, phase: str) -> str:
        star = "*" if r["oversubscribed"] else ""
        return (
            f"{r['efficiency_percent'][phase] / 100:.3f}{star}" if r["efficiency_percent"] else "-"
        )

    columns: dict[str, Callable[[dict], str]] = {
        "algorithm": lambda r: r["case"]["algorithm"],
        "layout": lambda r: r["case"]["layout"],
        "overlap": lambda r: "on" if r["case"]["overlap"] else "off",
        "Hkv": lambda r: str(r["case"]["kv_heads"]),
        "S": lambda r: str(r["case"]["seqlen"]),
        "N": lambda r: str(r["case"]["world"]),
        "fwd ms": lambda r: f"{1e3 * r['seconds']['forward']['median']:.4g}",
        "bwd ms": lambda r: f"{1e3 * r['seconds']['backward']['median']:.4g}",
        "fwd": lambda r: ratio(r, "forward"),
        "fwd+bwd": lambda r: ratio(r, "total"),
        "MB sent": lambda r: "/".join(
            f"{r['bytes'][d]['counted'] / 1e6:.3g}" for d in ("forward", "backward")
        ),
        "TFLOP/s": lambda r: f"{r['tflops_per_rank']['total']:.3g}",
    }
    same = {
        n: columns[n](rows[0])
        for n in ("layout", "overlap", "Hkv")
        if len({columns[n](r) for r in rows}) == 1
    }
    mask, dtype, batch, heads, dim, kernel = _block(rows[0])
    title = [
        mask,
        dtype,
        f"B {batch}",
        f"H {heads}",
        f"D {dim}",
        f"kernel {kernel}",
        *(f"{n} {v}" for n, v in same.items()),
    ]
    text = {n: [n, *(f(r) for r in rows)] for n, f in columns.items() if n not in same}
    width = {n: max(map(len, cells)) for n, cells in text.items()}
    left = ("algorithm", "layout")
    lines = [
        " ".join(
            c.ljust(width[n]) if n in left else c.rjust(width[n])
            for n, c in zip(text, line, strict=True)
        )
        for line in zip(*text.values(), strict=True)
    ]
    return [", ".join(title), *lines]
