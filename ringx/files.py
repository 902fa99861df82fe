"""Files that a reader never sees half of: written aside in the same folder, then put in place in one step."""

import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path


def write_text(path: Path, text: str, *, replace: bool) -> None:
    """Writes a text file in one step.

    Raises:
        FileExistsError: the file is there and `replace` is False; it is kept.
        OSError: it cannot be written."""

    def fill(aside: Path) -> None:
        aside.write_text(text, encoding="utf-8")

    write_file(path, fill, replace=replace)


def write_file(path: Path, fill: Callable[[Path], object], *, replace: bool) -> None:
    """Puts the file that `fill(aside)` writes in place of `path`; raises as ``write_text`` does.  What `fill` leaves behind
    when it raises is removed."""
    path = Path(path)
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex}")  # of no other process on any host
    try:
        fill(aside)
        _flush(aside)
        if replace:
            os.replace(aside, path)
        else:
            _link(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def write_folder(path: Path, fill: Callable[[Path], object]) -> None:
    """Has `fill(aside)` write into `path`.partial and renames that to `path`, which must not exist or be empty.  What a `fill`
    that raises has written is removed.

    Raises:
        FileExistsError: `path`.partial is there: another process is writing, or was killed.
        OSError: `path` holds files, or cannot be written."""
    path = Path(path)
    aside = path.with_name(f"{path.name}.partial")
    try:
        aside.mkdir(parents=True)
    except FileExistsError:
        raise FileExistsError(
            f"{aside} is there, of a process that is writing or was killed; delete it."
        ) from None
    try:
        fill(aside)
        aside.rename(path)  # over nothing or an empty folder, never over files
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def _flush(path: Path) -> None:
    with open(path, "rb") as f:
        os.fsync(f.fileno())


def _link(aside: Path, path: Path) -> None:
    """Puts a file in place where none is: link(2) is atomic and refuses to replace."""
    try:
        os.link(aside, path)
    except FileExistsError:
        raise FileExistsError(f"{path} is there already and was kept.") from None
    except OSError:  # a file system without hard links
        if path.exists():
            raise FileExistsError(f"{path} is there already and was kept.") from None
        os.replace(aside, path)
