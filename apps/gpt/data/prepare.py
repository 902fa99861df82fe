"""Turn text into tokens that ``apps.gpt.train`` reads.

    python -m apps.gpt.prepare --out tokens                  # this Python's standard library
    python -m apps.gpt.prepare book.txt notes/ --out tokens --vocab 32000
    python -m apps.gpt.prepare part-*.parquet more.jsonl.gz --out tokens --text-key content
    python -m apps.gpt.prepare book.txt --out tokens --tokenizer llama/tokenizer.json

A document is a text file (UTF-8), a line of JSONL, or a row of Parquet; folders are read with all
below them, in the order of their names, without what is hidden.  Documents without text are left
out.  The last --val-fraction of the text is held back as a split of its own, by whole documents;
of a single document, from a line end on.  A tokenizer is trained on the rest alone.

What ``apps.gpt.data.format`` describes is written into OUT.partial, which becomes OUT when it is
complete: interrupted, the same command starts over.  Where OUT was made from the same inputs with
the same settings, nothing is done; otherwise it is refused.  Inputs are the same if their names
within what was given, their sizes, and their contents are; of a file above 256 MiB the time of its
last change stands for its contents.
"""

import argparse
import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from apps.common.arguments import CannotWrite, run_command

from .dataset import open_dataset
from .documents import (
    PIECE_CHARACTERS,
    InputFile,
    ReportPosition,
    TextPiece,
    fingerprint,
    last_line_end,
    list_inputs,
)
from .format import FORMAT_VERSION, INDEX, TOKEN_DTYPES, file_digest, index_digest, read_index
from .tokenizer import END_OF_TEXT, ByteTokenizer, JsonTokenizer, TextTokenizer, train_tokenizer

DEFAULT_VOCAB = 8192  # of a tokenizer that is trained
CHUNK_CHARACTERS = 16 * PIECE_CHARACTERS  # encoded at once: about 100 bytes of memory for each
PREPARED_NAME = re.compile(r"(train|val)-(\d{5,}|documents)\.bin|tokenizer\.json|dataset\.json")


def prepare(
    inputs: Sequence[str | Path],
    out: str | Path,
    *,
    vocab: int | None = None,
    tokenizer: str | Path = "train",
    eos: str | None = None,
    text_key: str | None = None,
    val_fraction: float = 0.05,
    shard_tokens: int = 2**28,
) -> None:
    """Writes the tokens of `inputs` into the folder `out`.  To be called by one process.

    Args:
        inputs: files and folders; none of them: this Python's standard library.
        out: a new or an empty folder, or one that was made by the same call.
        vocab: the most tokens of a tokenizer that is trained; None: 8192.
        tokenizer: "train" (byte-level BPE), "bytes", or a tokenizer.json or its folder.
        eos: the token of a tokenizer.json that ends a text; None: it is looked for.
        text_key: the field of JSONL, or the column of Parquet, with the text; None: "text".
        val_fraction: the part of the text that makes the split "val".
        shard_tokens: the most tokens of a file.

    Raises:
        ValueError: with one line for the user, for arguments that make no sense, inputs that
            cannot be read or hold no text, and an `out` that holds something else.
        OSError: `out` cannot be written."""
    files, source = list_inputs(inputs, Path(out))
    settings, tokenizer_file = _settings(
        files,
        vocab=vocab,
        tokenizer=tokenizer,
        eos=eos,
        text_key=text_key,
        val_fraction=val_fraction,
        shard_tokens=shard_tokens,
    )
    target = Path(os.path.realpath(out))
    fingerprints = [fingerprint(file) for file in files]
    recipe_text = json.dumps([FORMAT_VERSION, settings, fingerprints])
    recipe = hashlib.sha256(recipe_text.encode()).hexdigest()
    if is_prepared(target, out, settings, recipe):
        return
    # ``ringx.files.write_folder`` refuses where another process has left its folder or is still
    # writing.  Here a second process waits for the first one and finds the work done, and what a
    # killed process has left is removed: that needs a lock on the folder that is written into.
    partial = target.with_name(target.name + ".partial")
    with locked_folder(partial):
        is_complete = False
        try:
            _remove_prepared_files(partial)
            if is_prepared(target, out, settings, recipe):  # another process was faster
                return
            index = {
                "version": FORMAT_VERSION,
                "source": source,
                "settings": settings,
                "recipe": recipe,
            }
            with _progress(files) as start_pass:
                write_tokens(partial, files, index, tokenizer_file, start_pass)
            os.rename(partial, target)  # over nothing or an empty folder, never over files
            is_complete = True  # a folder of the old name is another process's now
        finally:
            if not is_complete:  # what a kill leaves behind, the next run removes
                _remove_prepared_files(partial)
                partial.rmdir()


def dataset_for(data: str | None, cache: Path, *, vocab: int) -> Path:
    """The prepared folder of what --data names; one process calls it, then all open the folder.

    Args:
        data: a prepared folder, which is taken as it is (``Tokens.check_vocab`` tells whether a
            model fits); a file or folder of text; or None for the default text.
        cache: the folder for prepared text.  Where it holds just this text, it is left as it is.
        vocab: the most tokens of the tokenizer that is trained on the text.

    Raises:
        ValueError: with one line for the user."""
    if data is not None and (Path(data) / INDEX).exists():
        return Path(data)
    try:
        prepare([] if data is None else [data], cache, vocab=vocab)
    except ValueError as e:
        raise ValueError(f"--data: {e}") from None
    return cache


def _settings(
    files: list[InputFile],
    *,
    vocab: int | None,
    tokenizer: str | Path,
    eos: str | None,
    text_key: str | None,
    val_fraction: float,
    shard_tokens: int,
) -> tuple[dict[str, Any], Path | None]:
    """What decides the tokens besides the inputs, and the tokenizer.json that the user gives."""
    _expect_text_options(files, text_key, val_fraction, shard_tokens)
    settings: dict[str, Any] = {
        "tokenizer": str(tokenizer),
        "eos": eos,
        "text_key": text_key or "text",
        "val_fraction": float(val_fraction),
        "shard_tokens": shard_tokens,
    }
    _expect_tokenizer_options(tokenizer, vocab, eos)
    if tokenizer == "bytes":
        return settings, None
    _expect_tokenizers_library(tokenizer)
    if tokenizer == "train":
        settings["vocab"] = _trained_vocab(vocab)
        return settings, None
    file = Path(tokenizer)
    if file.is_dir():
        file = file / "tokenizer.json"
    JsonTokenizer(file, eos)  # raises if it cannot be read, or does not say how a text ends
    settings["tokenizer"] = file_digest(file)
    return settings, file


def _expect_text_options(
    files: list[InputFile], text_key: str | None, val_fraction: float, shard_tokens: int
) -> None:
    """ValueError for options of reading and cutting the text that make no sense."""
    if not 0 <= val_fraction < 1:
        raise ValueError(f"val_fraction={val_fraction} must be at least 0 and below 1.")
    if shard_tokens < 1:
        raise ValueError(f"shard_tokens={shard_tokens} must be at least 1.")
    if text_key is not None and all(file.kind == "text" for file in files):
        raise ValueError(
            f"text_key={text_key!r} is for JSONL and Parquet, and no input is either; leave it out."
        )


def _trained_vocab(vocab: int | None) -> int:
    """The most tokens of a tokenizer that is trained; ValueError where bytes would not fit."""
    if vocab is None:
        return DEFAULT_VOCAB
    if vocab < 257:
        raise ValueError(
            f"vocab={vocab} must be at least 257: each byte and {END_OF_TEXT}; "
            "or take --tokenizer bytes."
        )
    return vocab


def _expect_tokenizer_options(tokenizer: str | Path, vocab: int | None, eos: str | None) -> None:
    """ValueError for options that this tokenizer does not have."""
    if vocab is not None and tokenizer != "train":
        raise ValueError(
            f"vocab={vocab} is of a tokenizer that is trained, but tokenizer={str(tokenizer)!r} "
            "has its own; leave it out."
        )
    if eos is not None and tokenizer in ("train", "bytes"):
        raise ValueError(
            f"eos={eos!r} is for a tokenizer.json, but tokenizer={tokenizer!r} has its own; "
            "leave it out."
        )


def _expect_tokenizers_library(tokenizer: str | Path) -> None:
    try:
        import tokenizers  # noqa: F401
    except ImportError:
        raise ValueError(
            f"tokenizer={str(tokenizer)!r} needs the library tokenizers: "
            "pip install tokenizers (or --tokenizer bytes)."
        ) from None


def is_prepared(target: Path, out: str | Path, settings: dict[str, Any], recipe: str) -> bool:
    """Whether `target` holds just these tokens; ValueError if it holds anything else.

    Args:
        target: the real path of `out`, which is named in errors.
        recipe: the digest of settings and inputs."""
    if target.exists() and not target.is_dir():
        raise ValueError(f"{out} is a file; name a folder.")
    # Listed once: another process may put the folder here at any moment.
    names = os.listdir(target) if target.exists() else []
    if not names:
        return False
    if INDEX not in names:
        raise ValueError(
            f"{out} is a folder of something else, without a {INDEX}; name a new or an empty one."
        )
    index = read_index(target)
    if index["recipe"] != recipe:
        difference = _describe_difference(index["settings"], settings)
        raise ValueError(
            f"{out} holds tokens that were prepared {difference}; "
            f"name another folder, or delete this one to prepare it again."
        )
    for split in index["splits"]:
        open_dataset(target, split)  # raises if the files of the split are not there
    return True


def _describe_difference(old: dict[str, Any], new: dict[str, Any]) -> str:
    """In what a prepared folder's settings differ from those of this call."""
    changed = []
    for key in {**old, **new}:
        if old.get(key) != new.get(key):
            changed.append(f"{key}={old.get(key)!r}, not {new.get(key)!r}")
    if not changed:
        return "from other inputs"
    return f"with {', '.join(changed)}"


def _remove_prepared_files(folder: Path) -> None:
    """Empties the folder that a killed run left; ValueError if it holds what no run has written."""
    files = list(folder.iterdir())
    for file in files:
        if not PREPARED_NAME.fullmatch(file.name):
            raise ValueError(
                f"{folder}, needed to write into, holds something else ({file.name}); move it away."
            )
    for file in files:
        file.unlink()


@contextlib.contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Makes the folder and locks it; a second process waits.  A killed process loses the lock."""
    handle = _lock(folder)
    while handle is None:
        handle = _lock(folder)
    try:
        yield
    finally:
        os.close(handle)


def _lock(folder: Path) -> int | None:
    """The folder, open and locked; None if whoever had the lock has renamed or removed it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        if isinstance(e, FileExistsError) and (folder.is_dir() or not os.path.lexists(folder)):
            return None
        raise ValueError(f"{folder} is no directory and cannot be made: {e.strerror}.") from None
    try:
        handle = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:
        return None
    # Some network file systems have no locks: there the user must start one process only.
    with contextlib.suppress(OSError):
        fcntl.flock(handle, fcntl.LOCK_EX)
    with contextlib.suppress(FileNotFoundError):
        if os.path.samestat(os.fstat(handle), folder.stat()):
            return handle
    os.close(handle)
    return None


# ---- where "train" ends and "val" begins


@dataclass(frozen=True)
class SplitBoundary:
    """Where "train" ends and "val" begins."""

    documents: int  # in all
    characters: int  # in all
    train_documents: int
    cut: int | None  # where a single document is cut, in characters; None: between documents

    @classmethod
    def make(cls, lengths: list[int], val_fraction: float) -> "SplitBoundary":
        """The boundary that holds back about `val_fraction` of documents of these lengths."""
        count = len(lengths)
        total = sum(lengths)
        val_characters = val_fraction * total
        if not val_characters or total == 1:
            return cls(count, total, train_documents=count, cut=None)
        if count == 1:
            cut = max(1, int(total - val_characters))
            return cls(count, total, train_documents=count, cut=cut)
        # Characters of the last 1, 2, ... documents; the first one is always in "train".
        characters_held_back = np.cumsum(lengths[:0:-1])
        nearest = int(np.argmin(abs(characters_held_back - val_characters)))
        return cls(count, total, train_documents=count - 1 - nearest, cut=None)

    def split(self, pieces: Iterable[TextPiece]) -> Iterator[tuple[str, TextPiece]]:
        """(split, piece) for each piece of all documents.

        Raises ValueError after the last one if the documents have changed since they were
        counted."""
        pieces = self._expect_unchanged(pieces)
        if self.cut is None:
            return self._split_between_documents(pieces)
        return self._split_single_document(pieces, self.cut)

    def _expect_unchanged(self, pieces: Iterable[TextPiece]) -> Iterator[TextPiece]:
        documents = characters = 0
        for piece in pieces:
            yield piece
            characters += len(piece.text)
            documents += piece.last
        if (documents, characters) != (self.documents, self.characters):
            raise ValueError(
                "the inputs have changed while they were read; "
                "start again when nothing writes them."
            )

    def _split_between_documents(
        self, pieces: Iterable[TextPiece]
    ) -> Iterator[tuple[str, TextPiece]]:
        documents = 0
        for piece in pieces:
            yield "train" if documents < self.train_documents else "val", piece
            documents += piece.last

    def _split_single_document(
        self, pieces: Iterable[TextPiece], cut: int
    ) -> Iterator[tuple[str, TextPiece]]:
        characters = 0
        split = "train"
        for piece in pieces:
            text = piece.text
            if split == "train" and characters + len(text) > cut:
                # At a piece's start there is a line end already: nothing of the piece is cut off.
                end = last_line_end(text, cut - characters) if cut > characters else 0
                yield "train", TextPiece(text[:end], last=True)
                yield "val", TextPiece(text[end:], piece.last)
                split = "val"
            else:
                yield split, piece
            characters += len(text)


# ---- writing


class SplitWriter:
    """Writes the files of one split: shards of tokens, and where each document starts.

    Args:
        folder: to write into.
        split: "train" or "val".
        dtype: of TOKEN_DTYPES.
        shard_tokens: the most tokens of a shard."""

    def __init__(self, folder: Path, split: str, dtype: str, shard_tokens: int):
        self._folder = folder
        self._split = split
        self._dtype = TOKEN_DTYPES[dtype]
        self._shard_bytes = shard_tokens * self._dtype.itemsize
        self._closed_shards: list[dict[str, Any]] = []
        self._shard: HashedFile | None = None
        self._starts = HashedFile(folder / f"{split}-documents.bin")
        self._at_document_start = True
        self.tokens = 0
        self.documents = 0

    def write(self, ids: np.ndarray) -> None:
        """Appends tokens [n]."""
        if self._at_document_start:
            self._starts.write(np.array([self.tokens], "<u8").tobytes())
            self.documents += 1
            self._at_document_start = False
        self.tokens += len(ids)
        ids = ids.astype(self._dtype)
        while len(ids):
            if self._shard is None:
                name = f"{self._split}-{len(self._closed_shards):05d}.bin"
                self._shard = HashedFile(self._folder / name)
            room = (self._shard_bytes - self._shard.size) // self._dtype.itemsize
            self._shard.write(ids[:room].tobytes())
            ids = ids[room:]
            if self._shard.size == self._shard_bytes:
                self._close_shard()

    def end_document(self) -> None:
        """The next token is the first one of another document."""
        self._at_document_start = True

    def _close_shard(self) -> None:
        if self._shard is not None:
            entry = self._shard.close()
            entry["tokens"] = self._shard.size // self._dtype.itemsize
            self._closed_shards.append(entry)
            self._shard = None

    def close(self) -> dict[str, Any]:
        """Puts all on the disk and returns the split's entry in the index."""
        self._close_shard()
        return {
            "tokens": self.tokens,
            "documents": self.documents,
            "shards": self._closed_shards,
            "starts": self._starts.close(),
        }


class HashedFile:
    """A new file that knows its size in bytes and the sha256 of what is written into it."""

    def __init__(self, path: Path):
        self.size = 0
        self._path = path
        self._sha256 = hashlib.sha256()
        self._file = path.open("wb")

    def write(self, data: bytes) -> None:
        self._file.write(data)
        self._sha256.update(data)
        self.size += len(data)

    def close(self) -> dict[str, Any]:
        """Puts it on the disk and returns its entry in the index."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return {"file": self._path.name, "sha256": self._sha256.hexdigest()}


def write_tokens(
    folder: Path,
    files: list[InputFile],
    index: dict[str, Any],
    tokenizer_file: Path | None,
    start_pass: Callable[[str], ReportPosition],
) -> None:
    """Writes tokenizer, shards and, last, the index into `folder`, and puts all on the disk.

    Args:
        index: its entries "version", "source", "settings" and "recipe"; the others are added.
        tokenizer_file: the tokenizer.json that the user gives.
        start_pass: is called with the name of each pass over the files; returns whom to tell
            how far it is."""
    settings = index["settings"]

    def read(pass_name: str) -> Iterator[TextPiece]:
        return _read_files(files, settings["text_key"], start_pass(pass_name))

    lengths = _document_lengths(read("reading"))  # finds every mistake in the inputs
    if not lengths:
        raise ValueError(f"{index['source']}: no text in {len(files)} file(s).")
    boundary = SplitBoundary.make(lengths, settings["val_fraction"])

    tokenizer: TextTokenizer
    if settings["tokenizer"] == "bytes":
        tokenizer = ByteTokenizer()
        index["tokenizer"] = "bytes"
    else:
        file = folder / "tokenizer.json"
        if tokenizer_file is None:
            split_pieces = boundary.split(read("training a tokenizer"))
            train_texts = (piece.text for split, piece in split_pieces if split == "train")
            train_tokenizer(train_texts, settings["vocab"], file)
        else:
            shutil.copyfile(tokenizer_file, file)
        tokenizer = JsonTokenizer(file, settings["eos"])
        index["tokenizer"] = file.name
        index["tokenizer_sha256"] = file_digest(file)

    dtype = "uint16" if tokenizer.vocab <= 2**16 else "uint32"
    index.update(vocab=tokenizer.vocab, eos=tokenizer.eos, dtype=dtype)
    index["documents"] = boundary.documents
    index["splits"] = _write_splits(
        folder,
        boundary.split(read("tokenizing")),
        tokenizer,
        dtype=dtype,
        shard_tokens=settings["shard_tokens"],
    )
    index["sha256"] = index_digest(index)
    (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    for path in (folder / "tokenizer.json", folder / INDEX, folder):
        if path.exists():
            _flush_to_disk(path)


def _read_files(
    files: list[InputFile], text_key: str, report_position: ReportPosition
) -> Iterator[TextPiece]:
    """The documents of all files; the position is that in all files one after another."""
    finished_bytes = 0
    for file in files:

        def report(position: int, before: int = finished_bytes) -> None:
            report_position(before + position)

        yield from file.read(text_key, report)
        finished_bytes += file.size
        report_position(finished_bytes)


def _document_lengths(pieces: Iterable[TextPiece]) -> list[int]:
    """The number of characters of each document."""
    lengths = []
    length = 0
    for piece in pieces:
        length += len(piece.text)
        if piece.last:
            lengths.append(length)
            length = 0
    return lengths


def _write_splits(
    folder: Path,
    split_pieces: Iterable[tuple[str, TextPiece]],
    tokenizer: TextTokenizer,
    *,
    dtype: str,
    shard_tokens: int,
) -> dict[str, Any]:
    """Writes the files of each split; returns the splits' entries in the index."""
    writers: dict[str, SplitWriter] = {}
    for split, ids, last in _encode(split_pieces, tokenizer):
        if split not in writers:
            writers[split] = SplitWriter(folder, split, dtype, shard_tokens)
        writer = writers[split]
        writer.write(ids)
        if last:
            writer.write(np.array([tokenizer.eos]))
            writer.end_document()
    return {split: writer.close() for split, writer in writers.items()}


def _encode(
    split_pieces: Iterable[tuple[str, TextPiece]], tokenizer: TextTokenizer
) -> Iterator[tuple[str, np.ndarray, bool]]:
    """(split, ids, whether they end their document) of each piece.

    CHUNK_CHARACTERS are encoded at a time, by all cores."""
    chunk: list[tuple[str, TextPiece]] = []
    size = 0
    for split, piece in split_pieces:
        chunk.append((split, piece))
        size += len(piece.text)
        if size >= CHUNK_CHARACTERS:
            yield from _encode_chunk(chunk, tokenizer)
            chunk = []
            size = 0
    yield from _encode_chunk(chunk, tokenizer)


def _encode_chunk(
    chunk: list[tuple[str, TextPiece]], tokenizer: TextTokenizer
) -> Iterator[tuple[str, np.ndarray, bool]]:
    ids_of_pieces = tokenizer.encode_many([piece.text for _, piece in chunk])
    for (split, piece), ids in zip(chunk, ids_of_pieces, strict=True):
        yield split, ids, piece.last


def _flush_to_disk(path: Path) -> None:
    """Waits until a file's contents, or a folder's entries, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


# ---- progress


@contextlib.contextmanager
def _progress(files: list[InputFile]) -> Iterator[Callable[[str], ReportPosition]]:
    """A bar for each pass over the files, by bytes; none where nobody looks at it."""
    from rich import progress
    from rich.console import Console

    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.DownloadColumn(binary_units=True),
        progress.TransferSpeedColumn(),
        progress.TimeRemainingColumn(),
    )
    is_watched = sys.stdout.isatty() and sys.stderr.isatty()
    total = sum(file.size for file in files)
    with progress.Progress(*columns, console=Console(stderr=True), disable=not is_watched) as bar:

        def start_pass(name: str) -> ReportPosition:
            task = bar.add_task(name, total=total)
            return lambda position: bar.update(task, completed=position)

        yield start_pass


# ---- the command line


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        "python -m apps.gpt.prepare", description="Turn text into tokens for apps.gpt.train."
    )
    p.add_argument(
        "inputs",
        nargs="*",
        metavar="FILE_OR_DIR",
        help="text, .jsonl, .jsonl.gz, .parquet (default: Python's standard library)",
    )
    p.add_argument("--out", required=True, metavar="DIR", help="folder to make")
    p.add_argument(
        "--tokenizer",
        default="train",
        metavar="train|bytes|FILE",
        help="train one, bytes, or a tokenizer.json (default: train)",
    )
    p.add_argument(
        "--vocab",
        type=int,
        help=f"tokens of a tokenizer that is trained, at most (default: {DEFAULT_VOCAB})",
    )
    p.add_argument(
        "--eos",
        metavar="TOKEN",
        help="the token of --tokenizer FILE that ends a text (default: looked for)",
    )
    p.add_argument(
        "--text-key",
        metavar="NAME",
        help="field of JSONL, column of Parquet with the text (default: text)",
    )
    p.add_argument(
        "--val-fraction",
        type=float,
        default=0.05,
        help="of the text, held back for evaluation (default: 0.05)",
    )
    p.add_argument(
        "--shard-tokens", type=int, default=2**28, help="tokens in a file, at most (default: 2**28)"
    )
    return p


def work(args: argparse.Namespace) -> int:
    """Prepares what the command line names; prints what was made."""
    out = Path(args.out)
    try:
        prepare(
            args.inputs,
            out,
            vocab=args.vocab,
            tokenizer=args.tokenizer,
            eos=args.eos,
            text_key=args.text_key,
            val_fraction=args.val_fraction,
            shard_tokens=args.shard_tokens,
        )
    except OSError as e:
        raise CannotWrite(f"{out} cannot be written: {e.strerror or e}") from None
    index = read_index(out)
    print(
        f"{out}: {index['source']}, {index['documents']:,} documents, vocabulary {index['vocab']:,}"
    )
    for split, entry in index["splits"].items():
        print(f"  {split:5s} {entry['tokens']:,} tokens in {len(entry['shards'])} file(s)")
    return 0


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    return run_command(
        parser(), argv, work, interrupted="interrupted; the same command starts over"
    )
