"""What the GPU kernels share: questions to the machine and to optional packages, head sizes, determinism."""

import contextlib
import functools
import importlib
import inspect
from collections.abc import Callable, Iterator
from types import ModuleType

import torch

from .protocol import KernelRequest

HALF = (torch.float16, torch.bfloat16)


# ---- questions to the machine


def unsupported_reason(
    need: KernelRequest,
    *,
    nvidia: tuple[int, int] | None,
    rocm: bool,
    dtypes: tuple[torch.dtype, ...] = HALF,
    head_dim: int = 256,
) -> str | None:
    """What rules a kernel out before any package is looked for.  `nvidia` is the least compute capability (None: not for
    NVIDIA), `head_dim` the largest head size."""
    if need.device.type != "cuda":  # torch's name for ROCm devices too
        return f"it runs on GPUs, these tensors are on {need.device.type}"
    if need.dtype not in dtypes:
        return f"it computes in {' and '.join(_short(d) for d in dtypes)}, not {_short(need.dtype)}"
    if need.head_dim > head_dim:
        return f"its head size is at most {head_dim}, not {need.head_dim}"
    if on_rocm():
        return None if rocm else "it is made for NVIDIA GPUs, this is a ROCm build of PyTorch"
    if nvidia is None:
        return "it is made for AMD GPUs, this is no ROCm build of PyTorch"
    found = capability(need.device)
    if found is None:
        return "no GPU can be reached"
    if found < nvidia:
        return f"it needs compute capability {nvidia[0]}.{nvidia[1]}, this GPU has {found[0]}.{found[1]}"
    return None


def on_rocm() -> bool:
    return torch.version.hip is not None


def capability(device: torch.device) -> tuple[int, int] | None:
    """The compute capability of an NVIDIA GPU; None where there is none."""
    return torch.cuda.get_device_capability(device) if torch.cuda.is_available() else None


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# ---- optional packages, whose private functions change their arguments from version to version


@functools.lru_cache(
    maxsize=16
)  # a package that is not there is searched for once, not in every call
def _import(module: str) -> "ModuleType | str":
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        return f"is not installed (no module {error.name})"
    except (
        ImportError,
        OSError,
        RuntimeError,
        AttributeError,
    ) as error:  # built for another torch or CUDA, mostly
        return f"cannot be imported ({type(error).__name__}: {error})"


class Function:
    """A function of an optional package, called by the names of what it is given.

    `must` names the arguments without which the result would be wrong, each as "one|or|another" where versions differ; a
    version that has none of the spellings is refused rather than guessed at.  `op` is the operator that the package may
    have wrapped the function in, which hides its signature.
    """

    def __init__(self, package: str, module: str, name: str, must: tuple[str, ...], op: str = ""):
        self.package, self.module, self.name, self.must, self.op = package, module, name, must, op

    def missing(self) -> str | None:
        """Why it cannot be called; None if it can."""
        module = _import(self.module)
        if isinstance(module, str):
            return f"package {self.package} {module}"
        if not hasattr(module, self.name):
            return f"the installed {self.package} has no {self.module}.{self.name}"
        lacks = [
            m
            for m in self.must
            if not any(spelling in self.parameters() for spelling in m.split("|"))
        ]
        return (
            f"{self.name} of the installed {self.package} has no argument {', '.join(lacks)}"
            if lacks
            else None
        )

    def parameters(self) -> dict[str, bool]:
        """{name: whether it must be given}."""
        return _parameters(getattr(_import(self.module), self.name), self.op)

    def __call__(self, **values):
        """Arguments that this version does not have are left out, so that all spellings of one can be given; those that it
        insists on and that are not given are features not used here, switched off with None."""
        if reason := self.missing():
            raise NotImplementedError(f"{reason}.")
        given = {
            name: values.get(name)
            for name, needed in self.parameters().items()
            if needed or name in values
        }
        return getattr(_import(self.module), self.name)(**given)


@functools.lru_cache(maxsize=32)
def _parameters(function: Callable, op: str) -> dict[str, bool]:
    named = inspect.signature(function).parameters.values()
    if not any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in named):
        return {p.name: p.default is p.empty for p in named}
    overload = getattr(
        function, "_opoverload", None
    )  # a torch.library.custom_op; otherwise the operator is looked up by name
    if overload is None and op:
        namespace, name = op.split("::")
        overload = getattr(getattr(getattr(torch.ops, namespace), name, None), "default", None)
    if overload is None:
        return {}
    return {a.name: not a.has_default_value() for a in overload._schema.arguments}


# ---- shapes


def pad(*xs: torch.Tensor) -> list[torch.Tensor]:
    """Contiguous, with zeros behind the head dimension up to a multiple of 8, as the tensor cores want it: they change no
    score, and the outputs and gradients that belong to them are cut off again by ``unpad``."""
    missing = -xs[0].shape[-1] % 8
    return [
        torch.nn.functional.pad(x, (0, missing)) if missing else x.contiguous() for x in xs
    ]  # pad copies even by nothing


def unpad(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return x.narrow(-1, 0, like.shape[-1])


# ---- determinism


@contextlib.contextmanager
def deterministic_algorithms(wanted: bool) -> Iterator[None]:
    """PyTorch's own kernels read this process-wide switch; it is put back as it was."""
    enabled, warn_only = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    if not wanted or (enabled and not warn_only):
        yield
        return
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
