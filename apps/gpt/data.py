"""Text as bytes, and the order in which it is read: a function of seed and step alone, whatever the number of ranks."""

import hashlib
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
import torch.distributed as dist

import ringx

from .config import IGNORE

DEFAULT_BYTES = 4 * 2**20  # of the embedded default text
SKIP = {  # tests, tables and what a distribution adds
    "test", "tests", "idlelib", "lib2to3", "turtledemo", "ensurepip", "encodings", "pydoc_data", "lib-dynload",
    "site-packages", "dist-packages", "__pycache__",
}  # fmt: skip


@dataclass(frozen=True)
class Text:
    tokens: torch.Tensor  # [n] uint8
    source: str
    sha256: str

    def windows(self, seqlen: int) -> int:
        """How many sequences it holds; the label of a window's last token is the first token of the next."""
        return (len(self.tokens) - 1) // seqlen

    def batch(self, step: int, *, batch: int, seqlen: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(tokens, labels) of a step, each [B, S] int64 and *global*: labels are shifted here, before anything is sharded."""
        rows = []
        for n in range(step * batch, (step + 1) * batch):
            epoch, i = divmod(n, self.windows(seqlen))
            at = int(_order(self.windows(seqlen), seed, epoch)[i]) * seqlen
            rows.append(self.tokens[at : at + seqlen + 1])
        x = torch.stack(rows).to(torch.int64)  # [B, S + 1]
        return x[:, :-1], x[:, 1:]


@dataclass(frozen=True)
class Batch:
    """One rank's part of a batch."""

    tokens: torch.Tensor  # [B, S_local] int64
    labels: torch.Tensor  # [B, S_local] int64: what follows each token in the global sequence, on whichever rank that is
    positions: torch.Tensor  # [S_local] int64, global
    count: int  # labels with a loss in the *whole* batch: the same divisor on all ranks


def cut(
    tokens: torch.Tensor,
    labels: torch.Tensor,
    *,
    layout: ringx.Sharding,
    group: "dist.ProcessGroup | None" = None,
    device: "torch.device | str" = "cpu",
) -> Batch:
    """This rank's part of global tokens and (already shifted) labels [B, S].  Local, no communication."""
    return Batch(
        ringx.shard(tokens, group=group, layout=layout).to(device),
        ringx.shard(labels, group=group, layout=layout).to(device),
        ringx.positions(tokens.shape[1], group=group, layout=layout).to(device),
        int((labels != IGNORE).sum()),
    )


@lru_cache(maxsize=2)
def _order(windows: int, seed: int, epoch: int) -> torch.Tensor:
    mixed = hashlib.sha256(f"{seed} {epoch}".encode()).digest()[:4]  # the CPU generator takes no more than 32 bits of a seed
    return torch.randperm(windows, generator=torch.Generator().manual_seed(int.from_bytes(mixed, "big")))


def read(path: str | None = None) -> Text:
    """The bytes of a file; None is the default text.  Raises ValueError with one line for the user."""
    if path is None:
        text, source = default_text(), f"Python {sysconfig.get_python_version()} standard library"
    else:
        source = str(path)
        try:
            text = Path(path).read_bytes()
        except OSError as e:
            raise ValueError(f"--data {path}: cannot be read: {e.strerror or e}.") from None
        if not text:
            raise ValueError(f"--data {path}: the file is empty.")
    return Text(torch.frombuffer(bytearray(text), dtype=torch.uint8), source, hashlib.sha256(text).hexdigest())


def expect_window(text: Text, seqlen: int) -> None:
    """ValueError if the text is shorter than one sequence."""
    if not text.windows(seqlen):
        raise ValueError(
            f"{text.source} has {len(text.tokens)} bytes, but one sequence of --seqlen {seqlen} and its last label take "
            f"{seqlen + 1}; take a shorter --seqlen or a longer --data."
        )


def default_text() -> bytes:
    """The first DEFAULT_BYTES of the Python standard library's sources on this machine, in the order of their names."""
    root = Path(sysconfig.get_path("stdlib"))
    text = bytearray()
    for file in _sources(root) if root.is_dir() else ():
        text += file.read_bytes()
        if len(text) >= DEFAULT_BYTES:
            break
    if not text:
        raise ValueError(f"the default text, the standard library's sources in {root}, is not installed; name a file with --data.")
    return bytes(text[:DEFAULT_BYTES])


def _sources(folder: Path) -> Iterator[Path]:
    entries = sorted(os.scandir(folder), key=lambda e: e.name)
    yield from (Path(e.path) for e in entries if e.name.endswith(".py") and e.is_file() and not e.name.startswith("_sysconfigdata"))
    for e in entries:
        if e.is_dir(follow_symlinks=False) and e.name not in SKIP and not e.name.startswith("config-"):
            yield from _sources(Path(e.path))
