"""The layout of a prepared folder: names of files, their index, digests, the version.

``apps.gpt.prepare`` writes a folder of tokens with one index, dataset.json, which comes last:

    dataset.json         version, vocab, dtype, eos, tokenizer, source, settings, recipe,
                         and for each split its files
    tokenizer.json       of the `tokenizers` library (absent where the tokens are bytes)
    train-00000.bin, ... ids, little-endian, uint16 where vocab <= 65536, else uint32:
                         documents one after another, each followed by eos
    train-documents.bin  little-endian uint64: where each document starts in the stream
    val-00000.bin, ...   the same of what is held back for evaluation
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

INDEX = "dataset.json"
FORMAT_VERSION = 1  # a folder of another version is refused
TOKEN_DTYPES: dict[str, np.dtype[Any]] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
HOW_TO_REPAIR = "delete the folder and prepare it again"


def read_index(folder: Path) -> dict[str, Any]:
    """The contents of dataset.json.

    Raises:
        ValueError: it is missing, of another version, or not as it was written."""
    file = folder / INDEX
    try:
        index = json.loads(file.read_text(encoding="utf-8"))
    except OSError as e:
        raise ValueError(
            f"{file} cannot be read: {e.strerror}; make the folder with "
            "python -m apps.gpt.prepare (it writes this file last)."
        ) from None
    except ValueError as e:
        raise ValueError(f"{file} is damaged: {e}; {HOW_TO_REPAIR}.") from None
    version = index.get("version") if isinstance(index, dict) else None
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{file} is of version {version!r}, but this program reads version {FORMAT_VERSION}; "
            f"{HOW_TO_REPAIR}."
        )
    # With the right digest it is as it was written, and nothing else needs to be checked.
    if index.get("sha256") != index_digest(index):
        raise ValueError(
            f"{file} is damaged or was edited: its own sha256 does not fit; {HOW_TO_REPAIR}."
        )
    return index


def index_digest(index: dict[str, Any]) -> str:
    """The sha256 of an index's contents, which it holds itself as "sha256"."""
    contents = {key: value for key, value in index.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest()


def file_digest(file: Path) -> str:
    """The sha256 of a file's contents."""
    sha256 = hashlib.sha256()
    with file.open("rb") as f:
        while block := f.read(2**20):
            sha256.update(block)
    return sha256.hexdigest()
