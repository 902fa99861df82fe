"""Documents from files: a text file, a line of JSONL or a row of Parquet is one."""

import codecs
import contextlib
import gzip
import json
import os
import sysconfig
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from .format import INDEX, digest

DEFAULT_BYTES = 4 * 2**20  # of the default text, at most
SKIP = {  # tests, tables and what a distribution adds
    "test", "tests", "idlelib", "lib2to3", "turtledemo", "ensurepip", "encodings", "pydoc_data", "lib-dynload",
    "site-packages", "dist-packages", "__pycache__",
}  # fmt: skip
BIG = 256 * 2**20  # bytes: files above are known by size and time
PIECE = (
    2**18
)  # characters that are encoded in one go, by one core: a longer document is cut at line ends

At = Callable[[int], None]  # told how many bytes have been read


class Piece(NamedTuple):
    text: str
    last: bool  # of its document


@dataclass(frozen=True)
class Source:
    """An input file."""

    path: Path
    shown: str  # in errors
    name: str  # within the input that was given
    size: int  # bytes

    @property
    def read(self) -> "Callable[[Source, str, At], Iterator[Piece]]":
        name = self.name.lower()
        if name.endswith((".jsonl", ".jsonl.gz")):
            return _read_jsonl
        return _read_parquet if name.endswith(".parquet") else _read_text


def _sources(inputs: "Sequence[str | Path]", out: Path) -> tuple[list[Source], str]:
    """All files, and what to call them together."""
    if isinstance(inputs, (str, Path)):
        raise TypeError(f"inputs={inputs!r} must be a sequence of files and folders.")
    if not inputs:
        return _default_sources(), f"Python {sysconfig.get_python_version()} standard library"
    sources = []
    for given in inputs:
        path = Path(given)
        if path.is_dir():
            if (path / INDEX).exists():
                raise ValueError(f"{given} holds tokens that were prepared already; name text.")
            if Path(os.path.realpath(out)).is_relative_to(os.path.realpath(path)):
                raise ValueError(
                    f"{out} lies within the input {given} and would be read as text; name a folder outside."
                )
            found = [
                Source(file, str(file), str(file.relative_to(path)), file.stat().st_size)
                for file in _files(path)
            ]
            if not found:
                raise ValueError(f"{given}: the folder holds no files.")
            sources += found
        else:
            with _readable(str(given)), path.open("rb"):
                sources.append(Source(path, str(given), path.name, path.stat().st_size))
            if not sources[-1].size:
                raise ValueError(f"{given}: the file is empty.")
    names = [str(given) for given in inputs]
    return sources, ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _files(folder: Path) -> Iterator[Path]:
    """All files below, in the order of their names, without hidden ones."""
    with _readable(str(folder)):
        entries = sorted(
            (e for e in os.scandir(folder) if not e.name.startswith(".")), key=lambda e: e.name
        )
    for e in entries:
        if e.is_dir(follow_symlinks=False):
            yield from _files(Path(e.path))
        elif e.is_file():
            yield Path(e.path)


def _default_sources() -> list[Source]:
    """The first files of the Python standard library, in the order of their names, of up to DEFAULT_BYTES together."""
    root = Path(sysconfig.get_path("stdlib"))
    sources: list[Source] = []
    for path in _modules(root) if root.is_dir() else ():
        sources.append(Source(path, str(path), str(path.relative_to(root)), path.stat().st_size))
        if sum(s.size for s in sources) > DEFAULT_BYTES:
            sources.pop()
            break
    if not sources:
        raise ValueError(
            f"the default text, the standard library's sources in {root}, is not installed; name a file of text."
        )
    return sources


def _modules(folder: Path) -> Iterator[Path]:
    entries = sorted(os.scandir(folder), key=lambda e: e.name)
    yield from (
        Path(e.path)
        for e in entries
        if e.name.endswith(".py") and e.is_file() and not e.name.startswith("_sysconfigdata")
    )
    for e in entries:
        if (
            e.is_dir(follow_symlinks=False)
            and e.name not in SKIP
            and not e.name.startswith("config-")
        ):
            yield from _modules(Path(e.path))


def _fingerprint(source: Source) -> "list[str | int]":
    """What tells this input from another."""
    with _readable(source.shown):
        content = digest(source.path) if source.size <= BIG else source.path.stat().st_mtime_ns
    return [source.name, source.size, content]


@contextlib.contextmanager
def _readable(shown: str) -> Iterator[None]:
    try:
        yield
    except (OSError, EOFError, zlib.error) as e:  # the last two: of gzip
        raise ValueError(f"{shown}: cannot be read: {getattr(e, 'strerror', None) or e}.") from None


def _read_text(source: Source, key: str, at: At) -> Iterator[Piece]:
    def blocks() -> Iterator[str]:
        decoder = codecs.getincrementaldecoder("utf-8")()
        with source.path.open("rb") as file:
            while True:
                block = file.read(2**20)
                try:
                    yield decoder.decode(block, final=not block)
                except UnicodeDecodeError as e:
                    byte, offset = e.object[e.start], file.tell() - len(e.object) + e.start
                    raise ValueError(
                        f"{source.shown}: is no UTF-8 text: byte 0x{byte:02x} at {offset}; convert it, or leave it out."
                    ) from None
                at(file.tell())
                if not block:
                    return

    return _pieces(blocks())


def _read_jsonl(source: Source, key: str, at: At) -> Iterator[Piece]:
    with (
        source.path.open("rb") as raw,
        gzip.open(raw)
        if source.name.lower().endswith(".gz")
        else contextlib.nullcontext(raw) as file,
    ):
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            where = f"{source.shown}, line {number}"
            try:
                document = json.loads(line)
            except (ValueError, RecursionError) as e:  # of UTF-8, too
                raise ValueError(f"{where}: is no JSON: {e}.") from None
            if not isinstance(document, dict):
                raise ValueError(f"{where}: is no JSON object, but a {type(document).__name__}.")
            if key not in document:
                raise ValueError(
                    f"{where}: has no {key!r}, only {', '.join(document) or 'nothing'}; name the text with --text-key."
                )
            yield from _pieces([_expect_text(document[key], where, key)])
            if number % 256 == 0:  # it takes longer than to read a short line
                at(raw.tell())


def _read_parquet(source: Source, key: str, at: At) -> Iterator[Piece]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ValueError(
            f"{source.shown}: Parquet needs the library pyarrow: pip install pyarrow."
        ) from None
    try:
        with pyarrow.parquet.ParquetFile(source.path) as file:
            columns = file.schema_arrow.names
            if key not in columns:
                raise ValueError(
                    f"{source.shown}: has no column {key!r}, only {', '.join(columns)}; name the text with --text-key."
                )
            done = 0
            for batch in file.iter_batches(batch_size=256, columns=[key]):  # row group by row group
                for text in batch.column(0).to_pylist():
                    done += 1
                    yield from _pieces([_expect_text(text, f"{source.shown}, row {done}", key)])
                at(source.size * done // file.metadata.num_rows)
    except pyarrow.ArrowException as e:
        raise ValueError(
            f"{source.shown}: is no Parquet file that can be read: {str(e).splitlines()[0]}"
        ) from None


def _expect_text(value: object, where: str, key: str) -> str:
    if not isinstance(value, str):
        raise ValueError(
            f"{where}: {key!r} is no text, but {'null' if value is None else 'a ' + type(value).__name__}."
        )
    try:
        value.encode()
    except UnicodeEncodeError as e:
        raise ValueError(
            f"{where}: {key!r} is no Unicode text: {e.reason} (character {e.start})."
        ) from None
    return value


def _pieces(blocks: Iterable[str]) -> Iterator[Piece]:
    """A document's text in pieces of at most PIECE characters that end with a line, whatever the blocks it comes in."""
    text = ""
    for block in blocks:
        text += block
        while len(text) > PIECE:
            end = _line_end(text, PIECE)
            yield Piece(text[:end], False)
            text = text[end:]
    if text:
        yield Piece(text, True)


def _line_end(text: str, at: int) -> int:
    """Where the last line that ends in the second half of text[:at] ends; without one the last word; else `at`."""
    return text.rfind("\n", at // 2, at) + 1 or text.rfind(" ", at // 2, at) + 1 or at
