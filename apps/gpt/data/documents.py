"""Documents from files: a text file, a line of JSONL and a row of Parquet are one each."""

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

MAX_DEFAULT_BYTES = 4 * 2**20  # of the default text
SKIPPED_FOLDERS = {  # of the default text: tests, tables and what a distribution adds
    "test", "tests", "idlelib", "lib2to3", "turtledemo", "ensurepip", "encodings", "pydoc_data",
    "lib-dynload", "site-packages", "dist-packages", "__pycache__",
}  # fmt: skip
MAX_HASHED_BYTES = 256 * 2**20  # a larger file is identified by its size and time
# The characters that are encoded in one go by one core: a longer document is cut at line ends.
PIECE_CHARACTERS = 2**18

ReportPosition = Callable[[int], None]  # is called with the number of bytes read so far


class TextPiece(NamedTuple):
    """Some of a document's text."""

    text: str
    last: bool  # whether the document ends with it


@dataclass(frozen=True)
class InputFile:
    """A file of documents."""

    path: Path
    display_name: str  # in errors
    relative_name: str  # within the input that was given
    size: int  # bytes

    @property
    def kind(self) -> str:
        """ "text", "jsonl" or "parquet", as its name says."""
        name = self.relative_name.lower()
        if name.endswith((".jsonl", ".jsonl.gz")):
            return "jsonl"
        if name.endswith(".parquet"):
            return "parquet"
        return "text"

    def read(self, text_key: str, report_position: ReportPosition) -> Iterator[TextPiece]:
        """Its documents, in pieces.

        Args:
            text_key: the field of JSONL, or the column of Parquet, that holds the text.
            report_position: is called now and then.

        Raises:
            ValueError: it cannot be read, or has something else in the place of text."""
        readers = {"text": _read_text, "jsonl": _read_jsonl, "parquet": _read_parquet}
        read = readers[self.kind]
        with _reporting_read_errors(self.display_name):
            yield from read(self, text_key, report_position)


# ---- which files


def list_inputs(inputs: Sequence[str | Path], out: Path) -> tuple[list[InputFile], str]:
    """All files of `inputs`, and a name for them together.

    Args:
        inputs: files and folders; none of them: this Python's standard library.
        out: the folder that will be written, which must not be within an input.

    Raises:
        TypeError: `inputs` is a single path.
        ValueError: an input cannot be read, is empty, or was prepared already."""
    if isinstance(inputs, (str, Path)):
        raise TypeError(f"inputs={inputs!r} must be a sequence of files and folders.")
    if not inputs:
        python_version = sysconfig.get_python_version()
        return _default_inputs(), f"Python {python_version} standard library"
    files: list[InputFile] = []
    for given in inputs:
        if Path(given).is_dir():
            files += _inputs_in_folder(given, out)
        else:
            files.append(_single_input(given))
    names = [str(given) for given in inputs]
    description = ", ".join(names[:3])
    if len(names) > 3:
        description += f" and {len(names) - 3} more"
    return files, description


def _inputs_in_folder(given: str | Path, out: Path) -> list[InputFile]:
    folder = Path(given)
    if (folder / INDEX).exists():
        raise ValueError(f"{given} holds tokens that were prepared already; name text.")
    if Path(os.path.realpath(out)).is_relative_to(os.path.realpath(folder)):
        raise ValueError(
            f"{out} lies within the input {given} and would be read as text; name a folder outside."
        )
    files = [_input_below(folder, path) for path in _files_below(folder)]
    if not files:
        raise ValueError(f"{given}: the folder holds no files.")
    return files


def _single_input(given: str | Path) -> InputFile:
    path = Path(given)
    with _reporting_read_errors(str(given)), path.open("rb"):
        size = path.stat().st_size
    if not size:
        raise ValueError(f"{given}: the file is empty.")
    return InputFile(path, display_name=str(given), relative_name=path.name, size=size)


def _input_below(folder: Path, path: Path) -> InputFile:
    return InputFile(
        path,
        display_name=str(path),
        relative_name=str(path.relative_to(folder)),
        size=path.stat().st_size,
    )


def _files_below(folder: Path) -> Iterator[Path]:
    """All files below a folder, in the order of their names, without hidden ones."""
    with _reporting_read_errors(str(folder)):
        entries = [entry for entry in os.scandir(folder) if not entry.name.startswith(".")]
    for entry in sorted(entries, key=lambda entry: entry.name):
        if entry.is_dir(follow_symlinks=False):
            yield from _files_below(Path(entry.path))
        elif entry.is_file():
            yield Path(entry.path)


def _default_inputs() -> list[InputFile]:
    """The first files of the Python standard library, in the order of their names.

    They have at most MAX_DEFAULT_BYTES together."""
    root = Path(sysconfig.get_path("stdlib"))
    files: list[InputFile] = []
    total = 0
    for path in _python_files_below(root) if root.is_dir() else ():
        file = _input_below(root, path)
        total += file.size
        if total > MAX_DEFAULT_BYTES:
            break
        files.append(file)
    if not files:
        raise ValueError(
            f"the default text, the standard library's sources in {root}, is not installed; "
            "name a file of text."
        )
    return files


def _python_files_below(folder: Path) -> Iterator[Path]:
    """The sources of the standard library below a folder: its files, then its folders'."""
    entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    for entry in entries:
        # _sysconfigdata holds the paths of the machine that Python was built on
        is_source = entry.name.endswith(".py") and not entry.name.startswith("_sysconfigdata")
        if is_source and entry.is_file():
            yield Path(entry.path)
    for entry in entries:
        is_skipped = entry.name in SKIPPED_FOLDERS or entry.name.startswith("config-")
        if entry.is_dir(follow_symlinks=False) and not is_skipped:
            yield from _python_files_below(Path(entry.path))


def fingerprint(file: InputFile) -> list[str | int]:
    """What tells this input from another: name, size and the digest of its contents.

    The time of the last change stands for the contents of a file above MAX_HASHED_BYTES."""
    with _reporting_read_errors(file.display_name):
        if file.size <= MAX_HASHED_BYTES:
            return [file.relative_name, file.size, file_digest(file.path)]
        return [file.relative_name, file.size, file.path.stat().st_mtime_ns]


# ---- reading


@contextlib.contextmanager
def _reporting_read_errors(display_name: str) -> Iterator[None]:
    """Turns the errors of reading a file into a ValueError that names it."""
    try:
        yield
    except (OSError, EOFError, zlib.error) as e:  # the last two are raised by gzip
        reason = getattr(e, "strerror", None) or e
        raise ValueError(f"{display_name}: cannot be read: {reason}.") from None


def _read_text(
    file: InputFile, text_key: str, report_position: ReportPosition
) -> Iterator[TextPiece]:
    return _split_text(_decoded_blocks(file, report_position))


def _decoded_blocks(file: InputFile, report_position: ReportPosition) -> Iterator[str]:
    """A text file, one MiB at a time.  ValueError with the place of a byte that is not UTF-8."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    with file.path.open("rb") as f:
        while True:
            block = f.read(2**20)
            try:
                yield decoder.decode(block, final=not block)
            except UnicodeDecodeError as e:
                bad_byte = e.object[e.start]
                offset = f.tell() - len(e.object) + e.start
                raise ValueError(
                    f"{file.display_name}: is no UTF-8 text: byte 0x{bad_byte:02x} at {offset}; "
                    "convert it, or leave it out."
                ) from None
            report_position(f.tell())
            if not block:
                return


def _read_jsonl(
    file: InputFile, text_key: str, report_position: ReportPosition
) -> Iterator[TextPiece]:
    is_packed = file.relative_name.lower().endswith(".gz")
    with (
        file.path.open("rb") as raw,
        gzip.open(raw) if is_packed else contextlib.nullcontext(raw) as lines,
    ):
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            place = f"{file.display_name}, line {number}"
            yield from _split_text([_text_of_line(line, place, text_key)])
            if number % 256 == 0:  # asking for the position takes longer than a short line
                report_position(raw.tell())


def _text_of_line(line: bytes, place: str, text_key: str) -> str:
    """The text of a line of JSONL.  ValueError with its place if it has none."""
    try:
        document = json.loads(line)
    except (ValueError, RecursionError) as e:  # a ValueError of UTF-8, too
        raise ValueError(f"{place}: is no JSON: {e}.") from None
    if not isinstance(document, dict):
        raise ValueError(f"{place}: is no JSON object, but a {type(document).__name__}.")
    if text_key not in document:
        raise ValueError(
            f"{place}: has no {text_key!r}, only {', '.join(document) or 'nothing'}; "
            "name the text with --text-key."
        )
    return _expect_text(document[text_key], place, text_key)


def _read_parquet(
    file: InputFile, text_key: str, report_position: ReportPosition
) -> Iterator[TextPiece]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ValueError(
            f"{file.display_name}: Parquet needs the library pyarrow: pip install pyarrow."
        ) from None
    try:
        with pyarrow.parquet.ParquetFile(file.path) as table:
            columns = table.schema_arrow.names
            if text_key not in columns:
                raise ValueError(
                    f"{file.display_name}: has no column {text_key!r}, only {', '.join(columns)}; "
                    "name the text with --text-key."
                )
            row = 0
            # Batches of few rows: only one row group is in memory.
            for batch in table.iter_batches(batch_size=256, columns=[text_key]):
                for value in batch.column(0).to_pylist():
                    row += 1
                    place = f"{file.display_name}, row {row}"
                    yield from _split_text([_expect_text(value, place, text_key)])
                report_position(file.size * row // table.metadata.num_rows)
    except pyarrow.ArrowException as e:
        raise ValueError(
            f"{file.display_name}: is no Parquet file that can be read: {str(e).splitlines()[0]}"
        ) from None


def _expect_text(value: object, place: str, text_key: str) -> str:
    """The value, if it is text that UTF-8 can hold; else ValueError with its place."""
    if not isinstance(value, str):
        found = "null" if value is None else f"a {type(value).__name__}"
        raise ValueError(f"{place}: {text_key!r} is no text, but {found}.")
    try:
        value.encode()
    except UnicodeEncodeError as e:
        raise ValueError(
            f"{place}: {text_key!r} is no Unicode text: {e.reason} (character {e.start})."
        ) from None
    return value


def _split_text(blocks: Iterable[str]) -> Iterator[TextPiece]:
    """A document's text in pieces of at most PIECE_CHARACTERS that end with a line.

    They do not depend on the blocks in which the text comes."""
    text = ""
    for block in blocks:
        text += block
        while len(text) > PIECE_CHARACTERS:
            end = last_line_end(text, PIECE_CHARACTERS)
            yield TextPiece(text[:end], last=False)
            text = text[end:]
    if text:
        yield TextPiece(text, last=True)


def last_line_end(text: str, limit: int) -> int:
    """Where to cut a text at `limit` or before: after the last line that ends in the second half
    of text[:limit]; without one after the last word; without one at `limit`."""
    middle = limit // 2
    after_line = text.rfind("\n", middle, limit) + 1
    after_word = text.rfind(" ", middle, limit) + 1
    return after_line or after_word or limit
