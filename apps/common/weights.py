"""Weights of a model, by name: first ones that are the same on any device, rank and mesh, and those in a checkpoint."""

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
    mixed = zlib.crc32(
        f"{seed} {name}".encode()
    )  # 32 bits: no more of a seed is heeded by the CPU's generator
    return torch.randn(shape, generator=torch.Generator().manual_seed(mixed))


class StoredWeights:
    """Parameters in files, read when they are asked for.

    ``weights(name, shape)`` is the whole tensor on the CPU, as it is stored; ValueError if it is not there or of another shape."""

    def __init__(self, folder: Path, stored: dict[str, tuple[tuple[int, ...], torch.dtype]]):
        self.folder, self._stored = folder, stored

    @property
    def dtype(self) -> torch.dtype:
        """The narrowest that holds all of them without loss."""
        kinds = [dtype for _, dtype in self._stored.values()]
        dtype = kinds[0]
        for other in kinds[1:]:
            dtype = torch.promote_types(dtype, other)
        return dtype

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __call__(self, name: str, shape: torch.Size) -> Tensor:
        if name not in self._stored:
            raise ValueError(f"{self.folder}: {name} is missing.")
        if self._stored[name][0] != tuple(shape):
            raise ValueError(
                f"{self.folder}: {name} is {list(self._stored[name][0])}, not {list(shape)}."
            )
        return self._read(name)

    def _read(self, name: str) -> Tensor:
        raise NotImplementedError

    def check(self, want: Mapping[str, tuple[int, ...]]) -> None:
        """ValueError if these are not the parameters of such shapes: names the first that are missing, unexpected, misshapen.
        Reads no tensor."""
        faults = [f"{name} is missing" for name in want if name not in self._stored]
        faults += [f"{name} is unexpected" for name in self._stored if name not in want]
        faults += [
            f"{name} is {list(self._stored[name][0])}, not {list(shape)}"
            for name, shape in want.items()
            if name in self._stored and self._stored[name][0] != shape
        ]
        if faults:
            more = f"; and {len(faults) - NAMED} more" if len(faults) > NAMED else ""
            raise ValueError(
                f"{self.folder} does not hold this model: {'; '.join(faults[:NAMED])}{more}. Take the configuration of its weights."
            )


class CheckpointWeights(StoredWeights):
    """The parameters in a checkpoint of a run on any mesh, without the optimizer's state.

    Raises ValueError if it holds none."""

    def __init__(self, folder: "str | Path"):
        self._reader = _Reader(folder)
        try:
            saved = self._reader.read_metadata().state_dict_metadata
        except Exception as error:  # noqa: BLE001 - a pickle of anything
            raise ValueError(
                f"{folder} cannot be read as a checkpoint: {' '.join(str(error).split())}."
            ) from None
        stored = {
            name.removeprefix("model."): (tuple(about.size), about.properties.dtype)
            for name, about in saved.items()
            if name.startswith("model.") and isinstance(about, TensorStorageMetadata)
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
