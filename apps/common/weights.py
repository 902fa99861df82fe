"""Weights of a model, by name: first ones, the same on any device and mesh, and those in files."""

import functools
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

ReadWeight = Callable[[str, torch.Size], Tensor]  # (name, shape) -> the full tensor
NAMED = 3  # faults that an error names


def seeded_normal(name: str, shape: torch.Size, seed: int) -> Tensor:
    """N(0, 1), fp32 on the CPU; depends on seed, name and shape alone."""
    mixed = zlib.crc32(f"{seed} {name}".encode())  # the CPU's generator uses 32 bits of a seed
    return torch.randn(shape, generator=torch.Generator().manual_seed(mixed))


class StoredWeights:
    """Parameters in files, read when they are asked for.

    ``weights(name, shape)`` is the whole tensor on the CPU, as it is stored; ValueError if it is
    not there or of another shape."""

    def __init__(self, folder: Path, stored: dict[str, tuple[tuple[int, ...], torch.dtype]]):
        self.folder = folder
        self._stored = stored

    @property
    def dtype(self) -> torch.dtype:
        """The narrowest that holds all of them without loss."""
        dtypes = [dtype for _, dtype in self._stored.values()]
        return functools.reduce(torch.promote_types, dtypes)

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __call__(self, name: str, shape: torch.Size) -> Tensor:
        if name not in self._stored:
            raise ValueError(f"{self.folder}: {name} is missing.")
        stored_shape, _ = self._stored[name]
        if stored_shape != tuple(shape):
            raise ValueError(f"{self.folder}: {name} is {list(stored_shape)}, not {list(shape)}.")
        return self._read(name)

    def _read(self, name: str) -> Tensor:
        raise NotImplementedError

    def check(self, expected: Mapping[str, tuple[int, ...]]) -> None:
        """ValueError if these are not the parameters of such shapes.  Reads no tensor.

        Names the first that are missing, unexpected or of another shape."""
        faults = [f"{name} is missing" for name in expected if name not in self._stored]
        faults += [f"{name} is unexpected" for name in self._stored if name not in expected]
        for name, shape in expected.items():
            stored_shape, _ = self._stored.get(name, (shape, None))
            if stored_shape != shape:
                faults.append(f"{name} is {list(stored_shape)}, not {list(shape)}")
        if faults:
            more = f"; and {len(faults) - NAMED} more" if len(faults) > NAMED else ""
            raise ValueError(
                f"{self.folder} does not hold this model: {'; '.join(faults[:NAMED])}{more}. "
                "Take the configuration of its weights."
            )


class CheckpointWeights(StoredWeights):
    """The parameters in a checkpoint of a run on any mesh, without the optimizer's state.

    Raises ValueError if it holds none."""

    def __init__(self, folder: "str | Path"):
        self._reader = _Reader(folder)
        try:
            metadata = self._reader.read_metadata().state_dict_metadata
        except Exception as error:  # noqa: BLE001 - a pickle of anything
            raise ValueError(
                f"{folder} cannot be read as a checkpoint: {' '.join(str(error).split())}."
            ) from None
        stored = {
            name.removeprefix("model."): (tuple(saved.size), saved.properties.dtype)
            for name, saved in metadata.items()
            if name.startswith("model.") and isinstance(saved, TensorStorageMetadata)
        }
        if not stored:
            raise ValueError(f"{folder} holds no model.")
        super().__init__(Path(folder), stored)

    def _read(self, name: str) -> Tensor:
        shape, dtype = self._stored[name]
        tensor = torch.empty(shape, dtype=dtype)
        dcp.load({"model": {name: tensor}}, storage_reader=self._reader, no_dist=True)
        return tensor


class _Reader(dcp.FileSystemReader):
    """Reads the metadata once, not for each tensor."""

    _metadata: Any = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Any:
        if self._metadata is None:
            self._metadata = super().read_metadata(*args, **kwargs)
        return self._metadata
