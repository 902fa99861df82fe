"""The table that ``ringx bench`` prints."""

import itertools
from collections.abc import Callable, Sequence

from .records import DIRECTIONS, Record

LEGEND = (
    "fwd, fwd+bwd: one-process flash / N over the measured time; 1 is ideal, x 100 is % of flash.",
    "ms, ratios: medians, the slowest rank counts.  MB sent: a rank's mean, forward/backward.",
    "TFLOP/s: a rank's, forward and backward, causal work counted as done.",
)


def table(of_attention: Sequence[Record]) -> str:
    """Lines of at most 100 columns; one block for each mask, dtype and size of heads."""
    lines = []
    for _, block in itertools.groupby(sorted(of_attention, key=_block), key=_block):
        lines += ["", *_block_lines(list(block))]
    lines += LEGEND
    if any(record["oversubscribed"] for record in of_attention):
        lines.append("*: more threads than cores, where 1 is out of reach.")
    return "\n".join(lines)


def _block(record: Record) -> tuple:
    """What all lines of a block have in common."""
    case = record["case"]
    return (
        case["mask"],
        case["dtype"],
        case["batch"],
        case["heads"],
        case["head_dim"],
        record["kernel"],
    )


def _case(name: str) -> Callable[[Record], str]:
    def text(record: Record) -> str:
        return str(record["case"][name])

    return text


def _overlap(record: Record) -> str:
    return "on" if record["case"]["overlap"] else "off"


def _milliseconds(phase: str) -> Callable[[Record], str]:
    def text(record: Record) -> str:
        return f"{1e3 * record['seconds'][phase]['median']:.4g}"

    return text


def _ratio(phase: str) -> Callable[[Record], str]:
    def text(record: Record) -> str:
        efficiency = record["efficiency_percent"]
        if not efficiency:
            return "-"
        star = "*" if record["oversubscribed"] else ""
        return f"{efficiency[phase] / 100:.3f}{star}"

    return text


def _megabytes(record: Record) -> str:
    sent = (record["bytes"][direction]["counted"] for direction in DIRECTIONS)
    return "/".join(f"{size / 1e6:.3g}" for size in sent)


def _tflops(record: Record) -> str:
    return f"{record['tflops_per_rank']['total']:.3g}"


COLUMNS: dict[str, Callable[[Record], str]] = {
    "algorithm": _case("algorithm"),
    "layout": _case("layout"),
    "overlap": _overlap,
    "Hkv": _case("kv_heads"),
    "S": _case("seqlen"),
    "N": _case("world"),
    "fwd ms": _milliseconds("forward"),
    "bwd ms": _milliseconds("backward"),
    "fwd": _ratio("forward"),
    "fwd+bwd": _ratio("total"),
    "MB sent": _megabytes,
    "TFLOP/s": _tflops,
}
IN_TITLE_IF_EQUAL = ("layout", "overlap", "Hkv")
ALIGNED_LEFT = ("algorithm", "layout")


def _block_lines(block: Sequence[Record]) -> list[str]:
    cells = {name: [text(record) for record in block] for name, text in COLUMNS.items()}
    mask, dtype, batch, heads, head_dim, kernel = _block(block[0])
    title = [mask, dtype, f"B {batch}", f"H {heads}", f"D {head_dim}", f"kernel {kernel}"]
    for name in IN_TITLE_IF_EQUAL:
        if len(set(cells[name])) == 1:
            title.append(f"{name} {cells.pop(name)[0]}")
    columns = [_aligned(name, texts) for name, texts in cells.items()]
    lines = [" ".join(line) for line in zip(*columns, strict=True)]
    return [", ".join(title), *lines]


def _aligned(name: str, texts: Sequence[str]) -> list[str]:
    """The cells of a column, its name first, all of the same width."""
    cells = [name, *texts]
    width = max(len(cell) for cell in cells)
    if name in ALIGNED_LEFT:
        return [cell.ljust(width) for cell in cells]
    return [cell.rjust(width) for cell in cells]
