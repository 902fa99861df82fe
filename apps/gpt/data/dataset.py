"""Prepared tokens, and the order in which they are read.

The order is a function of seed and step alone, whatever the number of ranks.
``apps.gpt.data.format`` describes the folder.  No file is read whole: shards are mapped into
memory, and windows are copied out of them.

Shapes: R windows, B sequences of a rank, S tokens of a sequence, S_local of them on this rank.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist

import ringx

from .format import HOW_TO_REPAIR, INDEX, TOKEN_DTYPES, file_digest, read_index

# ---- tokens


class Rows(NamedTuple):
    """Some windows of the stream.  All [R, S] int64, on the CPU."""

    tokens: torch.Tensor
    # What follows each token in the stream: shifted here, before anything is sharded.
    labels: torch.Tensor
    # 0, 1, ... within a window: a document is its text and the eos behind it.
    documents: torch.Tensor


@dataclass(frozen=True, eq=False)
class Tokens:
    """One split of a prepared folder: a stream of tokens.  Made by ``open_dataset``."""

    folder: Path
    split: str
    vocab: int  # every id is below
    eos: int
    source: str  # of what was prepared, for people
    sha256: str  # of ids, document starts and vocabulary size
    files: tuple[str, ...]
    shards: tuple[np.ndarray, ...]  # each [n] uint16 or uint32, mapped
    starts: np.ndarray  # [documents] uint64, ascending

    @cached_property
    def _shard_ends(self) -> np.ndarray:
        """[shards] int64: where each shard ends in the stream."""
        return np.cumsum([len(shard) for shard in self.shards], dtype=np.int64)

    @property
    def length(self) -> int:
        """Number of tokens."""
        return int(self._shard_ends[-1])

    def num_windows(self, seqlen: int) -> int:
        """How many sequences it holds.

        The label of a window's last token is the first token of the next window."""
        return (self.length - 1) // seqlen

    def rows(self, step: int, *, global_batch: int, seqlen: int, seed: int, rows: range) -> Rows:
        """These `rows` of the global batch of a step.

        Row r of step s is sample s * global_batch + r, however the rows are split over ranks.
        Each epoch reads every window once, in an order of its own that follows from seed and
        epoch.

        Raises:
            ValueError: `rows` are not of the batch, or the split is shorter than one window."""
        expect_window(self, seqlen)
        if not rows or min(rows) < 0 or max(rows) >= global_batch:
            raise ValueError(
                f"rows={rows} must be one or more of the global batch's 0..{global_batch - 1}."
            )
        count = self.num_windows(seqlen)
        chosen = []
        for row in rows:
            epoch, index = divmod(step * global_batch + row, count)
            chosen.append(int(_epoch_order(count, seed, epoch)[index]))
        return self.take(chosen, seqlen)

    def window(self, i: int, seqlen: int) -> Rows:
        """Window i in the order of the stream, as one row."""
        return self.take([i], seqlen)

    def take(self, windows: Sequence[int], seqlen: int) -> Rows:
        """The windows with these numbers, counted in the order of the stream.

        Raises ValueError for a window that does not exist."""
        count = self.num_windows(seqlen)
        for window in windows:
            if not 0 <= window < count:
                raise ValueError(
                    f"window {window} is not one of {self.folder}'s {count} of {seqlen} tokens "
                    f"({self.split})."
                )
        starts = [window * seqlen for window in windows]
        ids = np.stack([self._read(start, seqlen + 1) for start in starts])
        documents = np.stack([self._documents(start, seqlen) for start in starts])
        tokens = torch.from_numpy(ids)
        return Rows(tokens[:, :-1], tokens[:, 1:], torch.from_numpy(documents))

    def _read(self, start: int, count: int) -> np.ndarray:
        """[count] int64: the stream from `start`."""
        out = np.empty(count, np.int64)
        done = 0
        shard_index = int(np.searchsorted(self._shard_ends, start, "right"))
        while done < count:
            shard = self.shards[shard_index]
            shard_start = int(self._shard_ends[shard_index]) - len(shard)
            offset = start + done - shard_start
            part = shard[offset : offset + count - done]
            out[done : done + len(part)] = part
            done += len(part)
            shard_index += 1
        return out

    def _documents(self, start: int, count: int) -> np.ndarray:
        """[count] int64: how many documents have started since `start`."""
        # Searched for in the dtype of `starts`: numpy would convert all of that mapped file.
        edges = np.array([start, start + count - 1], self.starts.dtype)
        first, last = np.searchsorted(self.starts, edges, "right")
        starts_in_window = self.starts[first:last].astype(np.int64) - start
        return np.searchsorted(starts_in_window, np.arange(count), "right").astype(np.int64)

    def check_vocab(self, model_vocab: int) -> None:
        """ValueError if the tokens are of a larger vocabulary than the model's."""
        if self.vocab > model_vocab:
            raise ValueError(
                f"{self.folder} has tokens of vocabulary {self.vocab}, but the model's "
                f"vocab={model_vocab} is smaller; take a model with vocab={self.vocab} or more, "
                f"or prepare the text again with --vocab {model_vocab}."
            )

    def check_range(self) -> None:
        """ValueError with the place of an id that is not below `vocab`.  Reads the whole split."""
        for file, shard in zip(self.files, self.shards, strict=True):
            if int(shard.max()) >= self.vocab:
                position = int(np.argmax(shard >= self.vocab))
                raise ValueError(
                    f"{self.folder / file}: token {position} is {int(shard[position])}, but the "
                    f"vocabulary has {self.vocab}: the file is damaged; {HOW_TO_REPAIR}."
                )


@lru_cache(maxsize=2)
def _epoch_order(count: int, seed: int, epoch: int) -> torch.Tensor:
    """[count] int64: the windows in the order in which an epoch reads them."""
    # A hash, since the CPU generator uses no more than 32 bits of a seed.
    digest = hashlib.sha256(f"{seed} {epoch}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))
    return torch.randperm(count, generator=generator)


def open_dataset(folder: str | Path, split: str = "train", *, verify: str = "sizes") -> Tokens:
    """Maps one split of a prepared folder.

    Args:
        folder: made by ``apps.gpt.prepare``.
        split: "train" or "val".
        verify: "sizes" compares the size of each file with the index; "full" its sha256, too,
            which reads everything.

    Raises:
        ValueError: the folder was not prepared (or not to the end), or files are missing, cut
            short or damaged."""
    if verify not in ("sizes", "full"):
        raise ValueError(f"verify={verify!r} is unknown; known: sizes, full.")
    folder = Path(folder)
    index = read_index(folder)
    if split not in index["splits"]:
        raise ValueError(
            f"{folder} has no {split!r} tokens, only {', '.join(index['splits'])}; "
            f"prepare more text, or with a larger --val-fraction, into another folder."
        )
    split_index = index["splits"][split]
    shard_entries = split_index["shards"]
    starts_entry = split_index["starts"]
    full = verify == "full"
    dtype = TOKEN_DTYPES[index["dtype"]]
    shards = tuple(
        _map_file(folder, entry, count=entry["tokens"], dtype=dtype, verify_digest=full)
        for entry in shard_entries
    )
    starts = _map_file(
        folder,
        starts_entry,
        count=split_index["documents"],
        dtype=np.dtype("<u8"),
        verify_digest=full,
    )
    shard_digests = [entry["sha256"] for entry in shard_entries]
    identity = [index["vocab"], index["eos"], *shard_digests, starts_entry["sha256"]]
    return Tokens(
        folder=folder,
        split=split,
        vocab=index["vocab"],
        eos=index["eos"],
        source=index["source"],
        sha256=hashlib.sha256(json.dumps(identity).encode()).hexdigest(),
        files=tuple(entry["file"] for entry in shard_entries),
        shards=shards,
        starts=starts,
    )


def _map_file(
    folder: Path, entry: dict[str, Any], *, count: int, dtype: np.dtype, verify_digest: bool
) -> np.ndarray:
    """[count] of a file, mapped.  ValueError if it is not as its entry in the index says."""
    file = folder / entry["file"]
    expected_size = count * dtype.itemsize
    try:
        size = file.stat().st_size
    except OSError as e:
        raise ValueError(
            f"{file} of {INDEX} cannot be read: {e.strerror}; {HOW_TO_REPAIR}."
        ) from None
    if size != expected_size:
        raise ValueError(
            f"{file} has {size} bytes, but {INDEX} says {expected_size}: "
            f"it is cut short or of another run; {HOW_TO_REPAIR}."
        )
    if verify_digest and file_digest(file) != entry["sha256"]:
        raise ValueError(
            f"{file} is damaged: its sha256 differs from that in {INDEX}; {HOW_TO_REPAIR}."
        )
    return np.memmap(file, dtype, "r", shape=(count,))


def expect_window(tokens: Tokens, seqlen: int) -> None:
    """ValueError if the tokens are fewer than one sequence."""
    if not tokens.num_windows(seqlen):
        raise ValueError(
            f"{tokens.source} has {tokens.length} {tokens.split} tokens, but one sequence of "
            f"--seqlen {seqlen} and its last label take {seqlen + 1}; "
            "take a shorter --seqlen or a longer --data."
        )


# ---- what a rank gets


@dataclass(frozen=True)
class Batch:
    """One rank's part of some windows."""

    tokens: torch.Tensor  # [B, S_local] int64
    # [B, S_local] int64: what follows each token in the global sequence, on whichever rank it is
    labels: torch.Tensor
    positions: torch.Tensor  # [S_local] int64, global
    documents: torch.Tensor  # [B, S_local] int64


def shard_rows(
    rows: Rows,
    *,
    layout: ringx.Sharding,
    group: "dist.ProcessGroup | None" = None,
    device: torch.device | str = "cpu",
) -> Batch:
    """This rank's part of global rows [B, S].  Local, no communication."""

    def shard(tensor: torch.Tensor) -> torch.Tensor:
        return ringx.shard(tensor, group=group, layout=layout).to(device)

    seqlen = rows.tokens.shape[1]
    positions = ringx.positions(seqlen, group=group, layout=layout).to(device)
    return Batch(
        tokens=shard(rows.tokens),
        labels=shard(rows.labels),
        positions=positions,
        documents=shard(rows.documents),
    )
