"""A run's log: one JSON record a line, each on disk before the next step begins."""

import json
import platform
import sys
from pathlib import Path
from typing import Any

import torch

import ringx


class JsonLog:
    """Appends records to a new file `path`, replacing an older one; with path=None it swallows them (ranks other than 0)."""

    def __init__(self, path: Path | None):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("w", encoding="utf-8") if path is not None else None

    def write(self, **record: Any) -> None:
        if self._file is not None:
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def __enter__(self) -> "JsonLog":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_log(path: "str | Path") -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(header, steps) of a log."""
    header, *steps = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
    return header, steps


def versions() -> dict[str, str]:
    """What a reader needs to know to repeat a run."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "ringx": ringx.__version__,
        "platform": platform.platform(),
        "command": " ".join(sys.argv),
    }
