"""Writing files of which a reader never sees a part: under another name in the same folder, then
renamed in one step."""

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

    def fill(temporary: Path) -> None:
        temporary.write_text(text, encoding="utf-8")

    write_file(path, fill, replace=replace)


def write_file(path: Path, fill: Callable[[Path], object], *, replace: bool) -> None:
    """Writes a file in one step.

    Args:
        fill: is called with the path of a temporary file, which it must write.  What it has written
            when it raises is removed.

    Raises:
        FileExistsError: the file is there and `replace` is False; it is kept.
        OSError: it cannot be written."""
    path = Path(path)
    # a name that no other process on any host uses
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        fill(temporary)
        _flush(temporary)
        if replace:
            os.replace(temporary, path)
        else:
            _link(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_folder(path: Path, fill: Callable[[Path], object]) -> None:
    """Writes a folder in one step: into `path`.partial, which is then renamed to `path`.

    Args:
        path: must not exist or be empty.
        fill: is called with the path of the partial folder.  What it has written when it raises is
            removed.

    Raises:
        FileExistsError: `path`.partial is there: another process is writing, or was killed.
        OSError: `path` holds files, or cannot be written."""
    path = Path(path)
    partial = path.with_name(f"{path.name}.partial")
    try:
        partial.mkdir(parents=True)
    except FileExistsError:
        raise FileExistsError(
            f"{partial} is there, of a process that is writing or was killed; delete it."
        ) from None
    try:
        fill(partial)
        partial.rename(path)  # over nothing or an empty folder, never over files
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _flush(path: Path) -> None:
    """Returns when the file is on the disk."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _link(temporary: Path, path: Path) -> None:
    """Renames a file unless one of that name exists: link(2) is atomic and refuses to replace."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise FileExistsError(f"{path} is there already and was kept.") from None
    except OSError:  # a file system without hard links
        if path.exists():
            raise FileExistsError(f"{path} is there already and was kept.") from None
        os.replace(temporary, path)
