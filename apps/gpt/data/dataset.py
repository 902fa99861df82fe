"""Prepared tokens and the order in which they are read: a function of seed and step alone, whatever the number of ranks.

``apps.gpt.data.format`` is the layout of the folder.  Nothing here is read whole: shards are mapped, and windows copied out of
them.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist

import ringx

from .format import HOW_TO_REPAIR, INDEX, TOKEN_DTYPES, file_digest, read_index

# ---- tokens


class Rows(NamedTuple):
    """Some windows of the stream.  All [R, S] int64, on the CPU."""

    tokens: torch.Tensor
    labels: (
        torch.Tensor
    )  # what follows each token in the stream: shifted here, before anything is sharded
    documents: (
        torch.Tensor
    )  # 0, 1, ... within a window: a document is its text and the eos behind it


@dataclass(frozen=True, eq=False)
class Tokens:
    """One split of a prepared folder: a stream of `length` tokens, in mapped shards.  Made by ``open_dataset``."""

    folder: Path
    split: str
    vocab: int  # every id is below
    eos: int
    source: str  # of what was prepared, for people
    sha256: str  # of ids, document starts and vocabulary size
    files: tuple[str, ...]
    shards: tuple[np.ndarray, ...]  # each [n] uint16 or uint32
    starts: np.ndarray  # [documents] uint64, ascending

    @cached_property
    def _ends(self) -> np.ndarray:  # of each shard in the stream
        return np.cumsum([len(shard) for shard in self.shards], dtype=np.int64)

    @property
    def length(self) -> int:
        """Number of tokens."""
        return int(self._ends[-1])

    def num_windows(self, seqlen: int) -> int:
        """How many sequences it holds; the label of a window's last token is the first token of the next."""
        return (self.length - 1) // seqlen

    def rows(self, step: int, *, global_batch: int, seqlen: int, seed: int, rows: range) -> Rows:
        """Those `rows` of the global batch of a step: any split of range(global_batch) reads the same samples.

        Row r of step s is sample s * global_batch + r.  Each epoch reads every window once, in an order of its own that
        follows from seed and epoch.  Raises ValueError for rows outside the batch and a split shorter than one window."""
        expect_window(self, seqlen)
        if not rows or min(rows) < 0 or max(rows) >= global_batch:
            raise ValueError(
                f"rows={rows} must be one or more of the global batch's 0..{global_batch - 1}."
            )
        windows, chosen = self.num_windows(seqlen), []
        for row in rows:
            epoch, i = divmod(step * global_batch + row, windows)
            chosen.append(int(_epoch_order(windows, seed, epoch)[i]))
        return self.take(chosen, seqlen)

    def window(self, i: int, seqlen: int) -> Rows:
        """Window i in the order of the stream, as one row."""
        return self.take([i], seqlen)

    def take(self, windows: Sequence[int], seqlen: int) -> Rows:
        """The windows of these numbers, in the order of the stream.  Raises ValueError for one that is not there."""
        count = self.num_windows(seqlen)
        if bad := [i for i in windows if not 0 <= i < count]:
            raise ValueError(
                f"window {bad[0]} is not one of {self.folder}'s {count} of {seqlen} tokens ({self.split})."
            )
        tokens = torch.from_numpy(np.stack([self._read(i * seqlen, seqlen + 1) for i in windows]))
        documents = torch.from_numpy(
            np.stack([self._documents(i * seqlen, seqlen) for i in windows])
        )
        return Rows(tokens[:, :-1], tokens[:, 1:], documents)

    def _read(self, at: int, count: int) -> np.ndarray:
        """[count] int64: the stream from `at`."""
        out = np.empty(count, np.int64)
        done, shard = 0, int(np.searchsorted(self._ends, at, "right"))
        while done < count:
            first = at + done - (int(self._ends[shard]) - len(self.shards[shard]))
            part = self.shards[shard][first : first + count - done]
            out[done : done + len(part)] = part
            done, shard = done + len(part), shard + 1
        return out

    def _documents(self, at: int, count: int) -> np.ndarray:
        """[count] int64: how many documents have started since `at`."""
        # the needle in the haystack's dtype: numpy would otherwise convert the haystack, a mapped file
        first, last = np.searchsorted(
            self.starts, np.array([at, at + count - 1], self.starts.dtype), "right"
        )
        return np.searchsorted(
            self.starts[first:last].astype(np.int64) - at, np.arange(count), "right"
        ).astype(np.int64)

    def check_vocab(self, model_vocab: int) -> None:
        """ValueError if the tokens are of a larger vocabulary than the model's."""
        if self.vocab > model_vocab:
            raise ValueError(
                f"{self.folder} has tokens of vocabulary {self.vocab}, but the model's vocab={model_vocab} is smaller; "
                f"take a model with vocab={self.vocab} or more, or prepare the text again with --vocab {model_vocab}."
            )

    def check_range(self) -> None:
        """ValueError if an id is not below `vocab`, with its place.  Reads the whole split once."""
        for file, shard in zip(self.files, self.shards, strict=True):
            if int(shard.max()) >= self.vocab:
                at = int(np.argmax(shard >= self.vocab))
                raise ValueError(
                    f"{self.folder / file}: token {at} is {int(shard[at])}, but the vocabulary has {self.vocab}: "
                    f"the file is damaged; {HOW_TO_REPAIR}."
                )


@lru_cache(maxsize=2)
def _epoch_order(windows: int, seed: int, epoch: int) -> torch.Tensor:
    mixed = hashlib.sha256(f"{seed} {epoch}".encode()).digest()[
        :4
    ]  # the CPU generator takes no more than 32 bits of a seed
    return torch.randperm(
        windows, generator=torch.Generator().manual_seed(int.from_bytes(mixed, "big"))
    )


def open_dataset(folder: "str | Path", split: str = "train", *, verify: str = "sizes") -> Tokens:
    """Maps one split of a prepared folder.

    verify="sizes" compares the size of each file with the index, "full" its sha256 too (reads everything).  Raises ValueError
    for a folder that was not (or not to its end) prepared, and for files that are missing, cut short or damaged."""
    if verify not in ("sizes", "full"):
        raise ValueError(f"verify={verify!r} is unknown; known: sizes, full.")
    folder = Path(folder)
    index = read_index(folder)
    if split not in index["splits"]:
        raise ValueError(
            f"{folder} has no {split!r} tokens, only {', '.join(index['splits'])}; "
            f"prepare more text, or with a larger --val-fraction, into another folder."
        )
    about, dtype = index["splits"][split], TOKEN_DTYPES[index["dtype"]]
    shards = tuple(
        _map_file(folder, s["file"], s["tokens"], dtype, verify == "full" and s["sha256"])
        for s in about["shards"]
    )
    starts = about["starts"]
    identity = [
        index["vocab"],
        index["eos"],
        *(s["sha256"] for s in about["shards"]),
        starts["sha256"],
    ]
    return Tokens(
        folder=folder,
        split=split,
        vocab=index["vocab"],
        eos=index["eos"],
        source=index["source"],
        sha256=hashlib.sha256(json.dumps(identity).encode()).hexdigest(),
        files=tuple(s["file"] for s in about["shards"]),
        shards=shards,
        starts=_map_file(
            folder,
            starts["file"],
            about["documents"],
            np.dtype("<u8"),
            verify == "full" and starts["sha256"],
        ),
    )


def _map_file(
    folder: Path, name: str, count: int, dtype: np.dtype, sha256: "str | bool"
) -> np.ndarray:
    file = folder / name
    try:
        size = file.stat().st_size
    except OSError as e:
        raise ValueError(
            f"{file} of {INDEX} cannot be read: {e.strerror}; {HOW_TO_REPAIR}."
        ) from None
    if size != count * dtype.itemsize:
        raise ValueError(
            f"{file} has {size} bytes, but {INDEX} says {count * dtype.itemsize}: it is cut short or of another run; {HOW_TO_REPAIR}."
        )
    if sha256 and file_digest(file) != sha256:
        raise ValueError(
            f"{file} is damaged: its sha256 differs from that in {INDEX}; {HOW_TO_REPAIR}."
        )
    return np.memmap(file, dtype, "r", shape=(count,))


def expect_window(tokens: Tokens, seqlen: int) -> None:
    """ValueError if the tokens are fewer than one sequence."""
    if not tokens.num_windows(seqlen):
        raise ValueError(
            f"{tokens.source} has {tokens.length} {tokens.split} tokens, but one sequence of --seqlen {seqlen} and its last label "
            f"take {seqlen + 1}; take a shorter --seqlen or a longer --data."
        )


# ---- what a rank gets


@dataclass(frozen=True)
class Batch:
    """One rank's part of some windows."""

    tokens: torch.Tensor  # [B, S_local] int64
    labels: torch.Tensor  # [B, S_local] int64: what follows each token in the global sequence, on whichever rank that is
    positions: torch.Tensor  # [S_local] int64, global
    documents: torch.Tensor  # [B, S_local] int64


def shard_rows(
    rows: Rows,
    *,
    layout: ringx.Sharding,
    group: "dist.ProcessGroup | None" = None,
    device: "torch.device | str" = "cpu",
) -> Batch:
    """This rank's part of global rows [B, S].  Local, no communication."""
    tokens, labels, documents = (
        ringx.shard(x, group=group, layout=layout).to(device) for x in rows
    )
    return Batch(
        tokens,
        labels,
        ringx.positions(rows.tokens.shape[1], group=group, layout=layout).to(device),
        documents,
    )
