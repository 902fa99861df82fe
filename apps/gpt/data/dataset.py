"""Prepared tokens and the order in which they are read: a function of seed and step alone, whatever the number of ranks.

``apps.gpt.prepare`` writes a folder of tokens, with one index, dataset.json, that comes last:

    dataset.json              version, vocab, dtype, eos, tokenizer, source, settings, recipe, and for each split its files
    tokenizer.json            of the `tokenizers` library (absent where the tokens are bytes)
    train-00000.bin, ...      ids, little-endian, uint16 where vocab <= 65536, else uint32: documents one after another,
                              each followed by eos
    train-documents.bin       little-endian uint64: where each document starts in the stream
    val-00000.bin, ...        the same of what is held back for evaluation

Nothing here is read whole: shards are mapped, and windows copied out of them.
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

INDEX = "dataset.json"
VERSION = 1  # of the folder's format; another one is refused
DTYPES: dict[str, np.dtype[Any]] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
REPAIR = "delete the folder and prepare it again"

# ---- tokenizers


@dataclass(frozen=True)
class ByteTokenizer:
    """Token 0 ends a text, token b + 1 is byte b of its UTF-8."""

    eos: int = 0
    vocab: int = 257

    def encode(self, text: str) -> list[int]:
        return self.encode_many([text])[0].tolist()

    def encode_many(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode(), np.uint8).astype(np.uint16) + 1 for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """The text without its ends; bytes that are no UTF-8 become U+FFFD.  ValueError for an id that is no token."""
        return bytes(i - 1 for i in _expect_ids(ids, self.vocab) if i != self.eos).decode(
            errors="replace"
        )


class JsonTokenizer:
    """A tokenizer.json of the `tokenizers` library.  Text is text: no special token is found in it or added to it.

    Raises ValueError if the file cannot be read or does not say which token ends a text (`eos` then names it)."""

    ENDS = ("<|end_of_text|>", "<|endoftext|>", "</s>")

    def __init__(self, file: Path, eos: "str | None" = None):
        from tokenizers import Tokenizer  # here: those who read tokens do not need it

        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as e:
            raise ValueError(
                f"{file}: cannot be read: {getattr(e, 'strerror', None) or e}."
            ) from None
        try:
            self._tokenizer = Tokenizer.from_str(text)
        except Exception as e:  # noqa: BLE001 - the library raises nothing narrower
            raise ValueError(
                f"{file}: is no tokenizer.json of the tokenizers library: {e}."
            ) from None
        self._tokenizer.encode_special_tokens = True  # "</s>" within a document does not end it
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        special = {
            t.content: i for i, t in self._tokenizer.get_added_tokens_decoder().items() if t.special
        }
        if eos is None:
            ends = [special[name] for name in self.ENDS if name in special]
            if not ends:
                raise ValueError(
                    f"{file}: none of its special tokens ({', '.join(special) or 'it has none'}) is one of {', '.join(self.ENDS)}; "
                    f"name with --eos the token that ends a text."
                )
            self.eos: int = ends[0]
        else:
            found = self._tokenizer.token_to_id(eos)
            if found is None:
                raise ValueError(
                    f"eos={eos!r} is no token of {file}; its special tokens: {', '.join(special) or 'none'}."
                )
            self.eos = found
        self.vocab: int = 1 + max(self._tokenizer.get_vocab().values())  # some files leave ids out

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_many(self, texts: Sequence[str]) -> list[np.ndarray]:
        encoded = self._tokenizer.encode_batch_fast(
            list(texts), add_special_tokens=False
        )  # fast: without offsets
        return [np.array(e.ids, np.uint32) for e in encoded]

    def decode(self, ids: Sequence[int]) -> str:
        """The text, without special tokens.  ValueError for an id that is no token."""
        return self._tokenizer.decode(_expect_ids(ids, self.vocab), skip_special_tokens=True)


def _expect_ids(ids: Sequence[int], vocab: int) -> list[int]:
    ids = [int(i) for i in ids]
    if bad := [i for i in ids if not 0 <= i < vocab]:
        raise ValueError(f"token {bad[0]} is none of the tokenizer's {vocab} tokens.")
    return ids


def load_tokenizer(folder: "str | Path") -> "ByteTokenizer | JsonTokenizer":
    """The tokenizer of a prepared folder: encode(str) -> list[int], decode(list[int]) -> str, eos, vocab.

    Raises ValueError if the folder was not prepared, or its tokenizer is not the one that made the tokens."""
    folder = Path(folder)
    index = read_index(folder)
    if index["tokenizer"] == "bytes":
        return ByteTokenizer()
    file = folder / index["tokenizer"]
    if not file.is_file():
        raise ValueError(f"{file} is missing; {REPAIR}.")
    if digest(file) != index["tokenizer_sha256"]:
        raise ValueError(
            f"{file} is not the one that made these tokens (its sha256 differs from that in {INDEX}); {REPAIR}."
        )
    return JsonTokenizer(file, index["settings"]["eos"])


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

    def windows(self, seqlen: int) -> int:
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
        windows, chosen = self.windows(seqlen), []
        for row in rows:
            epoch, i = divmod(step * global_batch + row, windows)
            chosen.append(int(_order(windows, seed, epoch)[i]))
        return self.take(chosen, seqlen)

    def window(self, i: int, seqlen: int) -> Rows:
        """Window i in the order of the stream, as one row."""
        return self.take([i], seqlen)

    def take(self, windows: Sequence[int], seqlen: int) -> Rows:
        """The windows of these numbers, in the order of the stream.  Raises ValueError for one that is not there."""
        count = self.windows(seqlen)
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
                    f"the file is damaged; {REPAIR}."
                )


@lru_cache(maxsize=2)
def _order(windows: int, seed: int, epoch: int) -> torch.Tensor:
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
    about, dtype = index["splits"][split], DTYPES[index["dtype"]]
    shards = tuple(
        _map(folder, s["file"], s["tokens"], dtype, verify == "full" and s["sha256"])
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
        starts=_map(
            folder,
            starts["file"],
            about["documents"],
            np.dtype("<u8"),
            verify == "full" and starts["sha256"],
        ),
    )


def _map(folder: Path, name: str, count: int, dtype: np.dtype, sha256: "str | bool") -> np.ndarray:
    file = folder / name
    try:
        size = file.stat().st_size
    except OSError as e:
        raise ValueError(f"{file} of {INDEX} cannot be read: {e.strerror}; {REPAIR}.") from None
    if size != count * dtype.itemsize:
        raise ValueError(
            f"{file} has {size} bytes, but {INDEX} says {count * dtype.itemsize}: it is cut short or of another run; {REPAIR}."
        )
    if sha256 and digest(file) != sha256:
        raise ValueError(f"{file} is damaged: its sha256 differs from that in {INDEX}; {REPAIR}.")
    return np.memmap(file, dtype, "r", shape=(count,))


def expect_window(tokens: Tokens, seqlen: int) -> None:
    """ValueError if the tokens are fewer than one sequence."""
    if not tokens.windows(seqlen):
        raise ValueError(
            f"{tokens.source} has {tokens.length} {tokens.split} tokens, but one sequence of --seqlen {seqlen} and its last label "
            f"take {seqlen + 1}; take a shorter --seqlen or a longer --data."
        )


def read_index(folder: Path) -> dict[str, Any]:
    """The contents of dataset.json; ValueError if it is missing, of another version, or not as it was written."""
    file = folder / INDEX
    try:
        index = json.loads(file.read_text(encoding="utf-8"))
    except OSError as e:
        raise ValueError(
            f"{file} cannot be read: {e.strerror}; make the folder with python -m apps.gpt.prepare (it writes this file last)."
        ) from None
    except ValueError as e:
        raise ValueError(f"{file} is damaged: {e}; {REPAIR}.") from None
    version = index.get("version") if isinstance(index, dict) else None
    if version != VERSION:
        raise ValueError(
            f"{file} is of version {version!r}, but this program reads version {VERSION}; {REPAIR}."
        )
    if index.get("sha256") != index_digest(
        index
    ):  # nothing else needs to be checked: it is as it was written
        raise ValueError(f"{file} is damaged or was edited: its own sha256 does not fit; {REPAIR}.")
    return index


def index_digest(index: dict[str, Any]) -> str:
    """The sha256 of an index's contents, which it holds itself."""
    return hashlib.sha256(
        json.dumps({k: v for k, v in index.items() if k != "sha256"}, sort_keys=True).encode()
    ).hexdigest()


def digest(file: Path) -> str:
    """sha256 of a file's contents."""
    sha = hashlib.sha256()
    with file.open("rb") as f:
        while block := f.read(2**20):
            sha.update(block)
    return sha.hexdigest()


def dataset_for(data: "str | None", cache: Path, *, vocab: int) -> Path:
    """The prepared folder of what --data names; one process calls it, then all open the folder.

    A prepared folder is taken as it is (``Tokens.check_vocab`` says whether a model fits).  A file or folder of text, or the
    default text for None, is prepared into `cache`, with a tokenizer trained on it of up to `vocab` tokens; a cache that holds
    just that already is left as it is.  Raises ValueError with one line for the user."""
    from .prepare import prepare  # here: it imports this module

    if data is not None and (Path(data) / INDEX).exists():
        return Path(data)
    try:
        prepare([] if data is None else [data], cache, vocab=vocab)
    except ValueError as e:
        raise ValueError(f"--data: {e}") from None
    return cache


# ---- what a rank gets


@dataclass(frozen=True)
class Batch:
    """One rank's part of some windows."""

    tokens: torch.Tensor  # [B, S_local] int64
    labels: torch.Tensor  # [B, S_local] int64: what follows each token in the global sequence, on whichever rank that is
    positions: torch.Tensor  # [S_local] int64, global
    documents: torch.Tensor  # [B, S_local] int64


def cut(
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
