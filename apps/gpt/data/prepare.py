"""Turn text into tokens that ``apps.gpt.train`` reads.

    python -m apps.gpt.prepare --out tokens                                    # this Python's standard library
    python -m apps.gpt.prepare book.txt notes/ --out tokens --vocab 32000
    python -m apps.gpt.prepare part-*.parquet more.jsonl.gz --out tokens --text-key content --tokenizer llama/tokenizer.json

A document is a text file (UTF-8), a line of JSONL, or a row of Parquet; folders are read with all below them, in the order of
their names, without what is hidden.  Documents without text are left out.  The last --val-fraction of the text is held back as a
split of its own, by whole documents; of a single document, from a line end on.  A tokenizer is trained on the rest alone.

What ``apps.gpt.data.format`` describes is written into OUT.partial, which becomes OUT when it is complete: interrupted, the same
command starts over.  Where OUT was made from the same inputs with the same settings, nothing is done; otherwise it is refused.
Inputs are the same if their names within what was given, their sizes, and their contents are; of a file above 256 MiB the time
of its last change stands for its contents.
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

from .dataset import open_dataset
from .documents import (
    PIECE_CHARACTERS,
    InputFile,
    ReportPosition,
    TextPiece,
    _read_text,
    _reporting_read_errors,
    fingerprint,
    last_line_end,
    list_inputs,
)
from .format import FORMAT_VERSION, INDEX, TOKEN_DTYPES, file_digest, index_digest, read_index
from .tokenizer import END_OF_TEXT, ByteTokenizer, JsonTokenizer, train_tokenizer

DEFAULT_VOCAB = 8192  # of a tokenizer that is trained, unless another is asked for
CHUNK_CHARACTERS = 16 * PIECE_CHARACTERS  # characters in flight: about 100 bytes of memory for each
PREPARED_NAME = re.compile(r"(train|val)-(\d{5,}|documents)\.bin|tokenizer\.json|dataset\.json")


def prepare(
    inputs: "Sequence[str | Path]",
    out: "str | Path",
    *,
    vocab: "int | None" = None,
    tokenizer: "str | Path" = "train",
    eos: "str | None" = None,
    text_key: "str | None" = None,
    val_fraction: float = 0.05,
    shard_tokens: int = 2**28,
) -> None:
    """Writes the tokens of `inputs` (files and folders; none: this Python's standard library) into the folder `out`.

    `tokenizer` is "train" (byte-level BPE of up to `vocab` tokens, 8192 unless given), "bytes", or a tokenizer.json or its
    folder, whose token `eos` ends a text.  `text_key` names the field of JSONL and the column of Parquet that holds the text
    ("text").  `val_fraction` of the text makes the split "val"; a file holds at most `shard_tokens` tokens.

    Call it on one process.  Raises ValueError, one line for the user, for arguments that make no sense, inputs that cannot be
    read or hold no text, and an `out` that holds something else; OSError where `out` cannot be written."""
    sources, source = list_inputs(inputs, Path(out))
    settings, bring = _settings(
        sources, vocab, tokenizer, eos, text_key, val_fraction, shard_tokens
    )
    target = Path(os.path.realpath(out))
    recipe = hashlib.sha256(
        json.dumps([FORMAT_VERSION, settings, [fingerprint(s) for s in sources]]).encode()
    ).hexdigest()
    if is_prepared(target, out, settings, recipe):
        return
    partial = target.with_name(target.name + ".partial")
    with locked_folder(partial):
        complete = False
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
            with _progress(sources) as watch:
                write_tokens(partial, sources, index, settings, bring, watch)
            os.rename(partial, target)  # over nothing or an empty folder, never over files
            complete = True  # a folder of the old name is another process's now
        finally:
            if not complete:  # what a kill leaves behind, the next run removes
                _remove_prepared_files(partial)
                partial.rmdir()


def dataset_for(data: "str | None", cache: Path, *, vocab: int) -> Path:
    """The prepared folder of what --data names; one process calls it, then all open the folder.

    A prepared folder is taken as it is (``Tokens.check_vocab`` says whether a model fits).  A file or folder of text, or the
    default text for None, is prepared into `cache`, with a tokenizer trained on it of up to `vocab` tokens; a cache that holds
    just that already is left as it is.  Raises ValueError with one line for the user."""
    if data is not None and (Path(data) / INDEX).exists():
        return Path(data)
    try:
        prepare([] if data is None else [data], cache, vocab=vocab)
    except ValueError as e:
        raise ValueError(f"--data: {e}") from None
    return cache


def _settings(
    sources: "list[InputFile]",
    vocab: "int | None",
    tokenizer: "str | Path",
    eos: "str | None",
    text_key: "str | None",
    val_fraction: float,
    shard_tokens: int,
) -> "tuple[dict[str, Any], Path | None]":
    """What decides the tokens besides the inputs, and the tokenizer.json that is brought along."""
    if not 0 <= val_fraction < 1:
        raise ValueError(f"val_fraction={val_fraction} must be at least 0 and below 1.")
    if shard_tokens < 1:
        raise ValueError(f"shard_tokens={shard_tokens} must be at least 1.")
    if text_key is not None and all(s.read is _read_text for s in sources):
        raise ValueError(
            f"text_key={text_key!r} is for JSONL and Parquet, and no input is either; leave it out."
        )
    if vocab is not None and tokenizer != "train":
        raise ValueError(
            f"vocab={vocab} is of a tokenizer that is trained, but tokenizer={str(tokenizer)!r} has its own; leave it out."
        )
    if eos is not None and tokenizer in ("train", "bytes"):
        raise ValueError(
            f"eos={eos!r} is for a tokenizer.json, but tokenizer={tokenizer!r} has its own; leave it out."
        )
    settings: dict[str, Any] = {
        "tokenizer": str(tokenizer),
        "eos": eos,
        "text_key": text_key or "text",
    }
    settings.update(val_fraction=float(val_fraction), shard_tokens=shard_tokens)
    if tokenizer == "bytes":
        return settings, None
    try:
        import tokenizers  # noqa: F401
    except ImportError:
        raise ValueError(
            f"tokenizer={str(tokenizer)!r} needs the library tokenizers: pip install tokenizers (or --tokenizer bytes)."
        ) from None
    if tokenizer == "train":
        settings["vocab"] = DEFAULT_VOCAB if vocab is None else vocab
        if settings["vocab"] < 257:
            raise ValueError(
                f"vocab={vocab} must be at least 257: each byte and {END_OF_TEXT}; or take --tokenizer bytes."
            )
        return settings, None
    file = Path(tokenizer)
    file = file / "tokenizer.json" if file.is_dir() else file
    JsonTokenizer(file, eos)  # it can be read, and knows how a text ends
    settings["tokenizer"] = file_digest(file)
    return settings, file


def is_prepared(target: Path, out: "str | Path", settings: dict[str, Any], recipe: str) -> bool:
    """Whether just this was prepared before; ValueError if `out` holds anything else."""
    if target.exists() and not target.is_dir():
        raise ValueError(f"{out} is a file; name a folder.")
    names = (
        os.listdir(target) if target.exists() else []
    )  # once: another process may put the folder here at any moment
    if not names:
        return False
    if INDEX not in names:
        raise ValueError(
            f"{out} is a folder of something else, without a {INDEX}; name a new or an empty one."
        )
    index = read_index(target)
    if index["recipe"] != recipe:
        old = index["settings"]
        changed = [
            f"{k}={old.get(k)!r}, not {settings.get(k)!r}"
            for k in {**old, **settings}
            if old.get(k) != settings.get(k)
        ]
        raise ValueError(
            f"{out} holds tokens that were prepared {'with ' + ', '.join(changed) if changed else 'from other inputs'}; "
            f"name another folder, or delete this one to prepare it again."
        )
    for split in index["splits"]:
        open_dataset(target, split)  # its files are there, too
    return True


def _remove_prepared_files(folder: Path) -> None:
    """Empties the folder that a killed run left; ValueError if it holds what no run has written."""
    files = list(folder.iterdir())
    if others := [f.name for f in files if not PREPARED_NAME.fullmatch(f.name)]:
        raise ValueError(
            f"{folder}, needed to write into, holds something else ({others[0]}); move it away."
        )
    for file in files:
        file.unlink()


@contextlib.contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Makes the folder and holds it: a second process waits, then finds the work done.  A killed one's lock goes with it."""
    handle = _lock(folder)
    while handle is None:
        handle = _lock(folder)
    try:
        yield
    finally:
        os.close(handle)


def _lock(folder: Path) -> "int | None":
    """The folder, open and locked; None if whoever had the lock has renamed or removed it meanwhile."""
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
    with contextlib.suppress(
        OSError
    ):  # some network filesystems have no locks: there it is for the user to start one
        fcntl.flock(handle, fcntl.LOCK_EX)
    with contextlib.suppress(FileNotFoundError):
        if os.path.samestat(os.fstat(handle), folder.stat()):
            return handle
    os.close(handle)
    return None


# ---- writing


class SplitWriter:
    """The files of one split."""

    def __init__(self, folder: Path, split: str, dtype: str, shard_tokens: int):
        self._folder, self._split, self._dtype, self._most = (
            folder,
            split,
            TOKEN_DTYPES[dtype],
            shard_tokens,
        )
        self._shards: list[dict[str, Any]] = []
        self._starts = HashedFile(folder / f"{split}-documents.bin")
        self._shard: HashedFile | None = None
        self._begin = True  # the next token is a document's first
        self.length = self.documents = 0

    def write(self, ids: np.ndarray) -> None:
        if self._begin:
            self._starts.write(np.array([self.length], "<u8").tobytes())
            self.documents += 1
            self._begin = False
        self.length += len(ids)
        ids = ids.astype(self._dtype)
        while len(ids):
            if self._shard is None:
                self._shard = HashedFile(
                    self._folder / f"{self._split}-{len(self._shards):05d}.bin"
                )
            room = self._most - self._shard.size // self._dtype.itemsize
            self._shard.write(ids[:room].tobytes())
            ids = ids[room:]
            if self._shard.size == self._most * self._dtype.itemsize:
                self._close_shard()

    def end_document(self) -> None:
        self._begin = True

    def _close_shard(self) -> None:
        if self._shard is not None:
            self._shards.append(
                {**self._shard.close(), "tokens": self._shard.size // self._dtype.itemsize}
            )
            self._shard = None

    def close(self) -> dict[str, Any]:
        """What the index says of it."""
        self._close_shard()
        return {
            "tokens": self.length,
            "documents": self.documents,
            "shards": self._shards,
            "starts": self._starts.close(),
        }


class HashedFile:
    def __init__(self, path: Path):
        self.size, self._path, self._sha = 0, path, hashlib.sha256()
        self._file = path.open("wb")

    def write(self, data: bytes) -> None:
        self._file.write(data)
        self._sha.update(data)
        self.size += len(data)

    def close(self) -> dict[str, Any]:
        """Puts it on the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return {"file": self._path.name, "sha256": self._sha.hexdigest()}


@dataclass(frozen=True)
class SplitBoundary:
    """Where "train" ends and "val" begins."""

    documents: int  # in all
    characters: int
    train: int  # documents
    cut: "int | None"  # where a single document is cut, in characters; None: between documents

    @classmethod
    def make(cls, lengths: "list[int]", val_fraction: float) -> "SplitBoundary":
        count, total = len(lengths), sum(lengths)
        held = val_fraction * total  # characters
        if not held or total == 1:
            return cls(count, total, count, None)
        if count == 1:
            return cls(count, total, count, max(1, int(total - held)))
        behind = np.cumsum(
            lengths[:0:-1]
        )  # characters of the last 1, 2, ... documents, but not of all
        return cls(count, total, count - 1 - int(np.argmin(abs(behind - held))), None)

    def split(self, pieces: Iterable[TextPiece]) -> "Iterator[tuple[str, TextPiece]]":
        documents = characters = 0
        split = "train"
        for piece in pieces:
            text = piece.text
            if self.cut is not None and split == "train" and characters + len(text) > self.cut:
                end = (
                    last_line_end(text, self.cut - characters) if self.cut > characters else 0
                )  # 0: a piece ends there, as it is
                yield split, TextPiece(text[:end], True)
                split, piece = "val", TextPiece(text[end:], piece.last)
            elif self.cut is None:
                split = "train" if documents < self.train else "val"
            yield split, piece
            characters += len(text)
            documents += piece.last
        if (documents, characters) != (self.documents, self.characters):
            raise ValueError(
                "the inputs have changed while they were read; start again when nothing writes them."
            )


def write_tokens(
    folder: Path,
    sources: list[InputFile],
    index: dict[str, Any],
    settings: dict[str, Any],
    bring: "Path | None",
    watch: "Callable[[str], ReportPosition]",
) -> None:
    """Everything into `folder`; the index last."""

    def read(what: str) -> Iterator[TextPiece]:
        seen, before = watch(what), 0

        def at(position: int) -> None:
            seen(before + position)

        for source in sources:
            with _reporting_read_errors(source.shown):
                yield from source.read(source, settings["text_key"], at)
            before += source.size
            at(0)

    lengths, length = [], 0
    for piece in read("reading"):  # every mistake in the inputs is found here
        length += len(piece.text)
        if piece.last:
            lengths.append(length)
            length = 0
    if not lengths:
        raise ValueError(f"{index['source']}: no text in {len(sources)} file(s).")
    plan = SplitBoundary.make(lengths, settings["val_fraction"])

    file = folder / "tokenizer.json"
    tokenizer: ByteTokenizer | JsonTokenizer
    if settings["tokenizer"] == "bytes":
        tokenizer = ByteTokenizer()
        index.update(tokenizer="bytes")
    else:
        if bring is None:
            train = (
                piece.text
                for split, piece in plan.split(read("training a tokenizer"))
                if split == "train"
            )
            train_tokenizer(train, settings["vocab"], file)
        else:
            shutil.copyfile(bring, file)
        tokenizer = JsonTokenizer(file, settings["eos"])
        index.update(tokenizer=file.name, tokenizer_sha256=file_digest(file))
    dtype = "uint16" if tokenizer.vocab <= 2**16 else "uint32"

    streams: dict[str, SplitWriter] = {}
    for split, ids, last in _encoded(plan.split(read("tokenizing")), tokenizer):
        if split not in streams:
            streams[split] = SplitWriter(folder, split, dtype, settings["shard_tokens"])
        streams[split].write(ids)
        if last:
            streams[split].write(np.array([tokenizer.eos]))
            streams[split].end_document()
    index.update(vocab=tokenizer.vocab, eos=tokenizer.eos, dtype=dtype)
    index.update(
        documents=plan.documents,
        splits={split: stream.close() for split, stream in streams.items()},
    )
    index["sha256"] = index_digest(index)
    (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    for path in (file, folder / INDEX, folder):  # on the disk before the folder gets its name
        if path.exists():
            handle = os.open(path, os.O_RDONLY)
            os.fsync(handle)
            os.close(handle)


def _encoded(
    pieces: "Iterable[tuple[str, TextPiece]]", tokenizer: "ByteTokenizer | JsonTokenizer"
) -> Iterator[tuple[str, np.ndarray, bool]]:
    """(split, ids, whether they end their document) of each piece; CHUNK_CHARACTERS characters are encoded at a time, by all cores."""

    def encode() -> Iterator[tuple[str, np.ndarray, bool]]:
        for (split, piece), ids in zip(
            chunk, tokenizer.encode_many([piece.text for _, piece in chunk]), strict=True
        ):
            yield split, ids, piece.last

    chunk: list[tuple[str, TextPiece]] = []
    size = 0
    for item in pieces:
        chunk.append(item)
        size += len(item[1].text)
        if size >= CHUNK_CHARACTERS:
            yield from encode()
            chunk, size = [], 0
    yield from encode()


# ---- progress


@contextlib.contextmanager
def _progress(sources: list[InputFile]) -> "Iterator[Callable[[str], ReportPosition]]":
    """A bar for each pass over the files, by bytes; none where no one looks."""
    from rich import progress
    from rich.console import Console

    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.DownloadColumn(binary_units=True),
        progress.TransferSpeedColumn(),
        progress.TimeRemainingColumn(),
    )
    seen_by_someone = sys.stdout.isatty() and sys.stderr.isatty()
    with progress.Progress(
        *columns, console=Console(stderr=True), disable=not seen_by_someone
    ) as bar:

        def watch(what: str) -> ReportPosition:
            task = bar.add_task(what, total=sum(s.size for s in sources))
            return lambda read: bar.update(task, completed=read)

        yield watch


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


def main(argv: "list[str] | None" = None) -> int:
    p = parser()
    args = vars(p.parse_args(argv))
    inputs, out = args.pop("inputs"), Path(args.pop("out"))
    try:
        prepare(inputs, out, **args)
    except ValueError as e:
        p.exit(2, f"{p.prog}: error: {e}\n")
    except OSError as e:
        p.exit(1, f"{p.prog}: error: {out} cannot be written: {e.strerror or e}\n")
    except KeyboardInterrupt:
        p.exit(130, f"{p.prog}: interrupted; the same command starts over\n")
    index = read_index(out)
    print(
        f"{out}: {index['source']}, {index['documents']:,} documents, vocabulary {index['vocab']:,}"
    )
    for split, about in index["splits"].items():
        print(f"  {split:5s} {about['tokens']:,} tokens in {len(about['shards'])} file(s)")
    return 0
