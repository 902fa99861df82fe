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

from .format import INDEX, file_digest

MAX_DEFAULT_BYTES = 4 * 2**20  # of the default text, at most
SKIPPED_FOLDERS = {  # tests, tables and what a distribution adds
    "test", "tests", "idlelib", "lib2to3", "turtledemo", "ensurepip", "encodings", "pydoc_data", "lib-dynload",
    "site-packages", "dist-packages", "__pycache__",
}  # fmt: skip
MAX_HASHED_BYTES = 256 * 2**20  # bytes: files above are known by size and time
PIECE_CHARACTERS = (
    2**18
)  # characters that are encoded in one go, by one core: a longer document is cut at line ends

ReportPosition = Callable[[int], None]  # told how many bytes have been read


class TextPiece(NamedTuple):
    text: str
    last: bool  # of its document


@dataclass(frozen=True)
class InputFile:
    """An input file."""

    path: Path
    shown: str  # in errors
    name: str  # within the input that was given
    size: int  # bytes

    @property
    def read(self) -> "Callable[[InputFile, str, ReportPosition], Iterator[TextPiece]]":
        name = self.name.lower()
        if name.endswith((".jsonl", ".jsonl.gz")):
            return _read_jsonl
        return _read_parquet if name.endswith(".parquet") else _read_text


def list_inputs(inputs: "Sequence[str | Path]", out: Path) -> tuple[list[InputFile], str]:
    """All files, and what to call them together."""
    if isinstance(inputs, (str, Path)):
        raise TypeError(f"inputs={inputs!r} must be a sequence of files and folders.")
    if not inputs:
        return _default_inputs(), f"Python {sysconfig.get_python_version()} standard library"
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
                InputFile(file, str(file), str(file.relative_to(path)), file.stat().st_size)
                for file in _files_below(path)
            ]
            if not found:
                raise ValueError(f"{given}: the folder holds no files.")
            sources += found
        else:
            with _reporting_read_errors(str(given)), path.open("rb"):
                sources.append(InputFile(path, str(given), path.name, path.stat().st_size))
            if not sources[-1].size:
                raise ValueError(f"{given}: the file is empty.")
    names = [str(given) for given in inputs]
    return sources, ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _files_below(folder: Path) -> Iterator[Path]:
    """All files below, in the order of their names, without hidden ones."""
    with _reporting_read_errors(str(folder)):
        entries = sorted(
            (e for e in os.scandir(folder) if not e.name.startswith(".")), key=lambda e: e.name
        )
    for e in entries:
        if e.is_dir(follow_symlinks=False):
            yield from _files_below(Path(e.path))
        elif e.is_file():
            yield Path(e.path)


def _default_inputs() -> list[InputFile]:
    """The first files of the Python standard library, in the order of their names, of up to MAX_DEFAULT_BYTES together."""
    root = Path(sysconfig.get_path("stdlib"))
    sources: list[InputFile] = []
    for path in _python_files_below(root) if root.is_dir() else ():
        sources.append(InputFile(path, str(path), str(path.relative_to(root)), path.stat().st_size))
        if sum(s.size for s in sources) > MAX_DEFAULT_BYTES:
            sources.pop()
            break
    if not sources:
        raise ValueError(
            f"the default text, the standard library's sources in {root}, is not installed; name a file of text."
        )
    return sources


def _python_files_below(folder: Path) -> Iterator[Path]:
    entries = sorted(os.scandir(folder), key=lambda e: e.name)
    yield from (
        Path(e.path)
        for e in entries
        if e.name.endswith(".py") and e.is_file() and not e.name.startswith("_sysconfigdata")
    )
    for e in entries:
        if (
            e.is_dir(follow_symlinks=False)
            and e.name not in SKIPPED_FOLDERS
            and not e.name.startswith("config-")
        ):
            yield from _python_files_below(Path(e.path))


def fingerprint(source: InputFile) -> "list[str | int]":
    """What tells this input from another."""
    with _reporting_read_errors(source.shown):
        content = (
            file_digest(source.path)
            if source.size <= MAX_HASHED_BYTES
            else source.path.stat().st_mtime_ns
        )
    return [source.name, source.size, content]


@contextlib.contextmanager
def _reporting_read_errors(shown: str) -> Iterator[None]:
    try:
        yield
    except (OSError, EOFError, zlib.error) as e:  # the last two: of gzip
        raise ValueError(f"{shown}: cannot be read: {getattr(e, 'strerror', None) or e}.") from None


def _read_text(source: InputFile, key: str, at: ReportPosition) -> Iterator[TextPiece]:
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

    return _split_text(blocks())


def _read_jsonl(source: InputFile, key: str, at: ReportPosition) -> Iterator[TextPiece]:
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
            yield from _split_text([_expect_text(document[key], where, key)])
            if number % 256 == 0:  # it takes longer than to read a short line
                at(raw.tell())


def _read_parquet(source: InputFile, key: str, at: ReportPosition) -> Iterator[TextPiece]:
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
                    yield from _split_text([_expect_text(text, f"{source.shown}, row {done}", key)])
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


def _split_text(blocks: Iterable[str]) -> Iterator[TextPiece]:
    """A document's text in pieces of at most PIECE_CHARACTERS characters that end with a line, whatever the blocks it comes in."""
    text = ""
    for block in blocks:
        text += block
        while len(text) > PIECE_CHARACTERS:
            end = last_line_end(text, PIECE_CHARACTERS)
            yield TextPiece(text[:end], False)
            text = text[end:]
    if text:
        yield TextPiece(text, True)


def last_line_end(text: str, at: int) -> int:
    """Where the last line that ends in the second half of text[:at] ends; without one the last word; else `at`."""
    return text.rfind("\n", at // 2, at) + 1 or text.rfind(" ", at // 2, at) + 1 or at
