"""What the GPU kernels share: questions to the machine and to optional packages, head sizes,
determinism."""

import contextlib
import dataclasses
import functools
import importlib
import inspect
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .protocol import KernelRequest

HALF_PRECISION = (torch.float16, torch.bfloat16)


# ---- questions to the machine


def unsupported_reason(
    request: KernelRequest,
    *,
    nvidia: tuple[int, int] | None,
    rocm: bool,
    dtypes: tuple[torch.dtype, ...] = HALF_PRECISION,
    max_head_dim: int = 256,
) -> str | None:
    """What rules a kernel out before any package is looked for; None if nothing does.

    `nvidia` is the lowest compute capability that the kernel supports (None: it does not run on
    NVIDIA GPUs), `rocm` whether it runs on AMD GPUs.
    """
    if request.device.type != "cuda":  # PyTorch's name for ROCm devices too
        return f"it runs on GPUs, these tensors are on {request.device.type}"
    if request.dtype not in dtypes:
        supported = " and ".join(_dtype_name(dtype) for dtype in dtypes)
        return f"it computes in {supported}, not {_dtype_name(request.dtype)}"
    if request.head_dim > max_head_dim:
        return f"its head size is at most {max_head_dim}, not {request.head_dim}"
    if on_rocm():
        return None if rocm else "it is made for NVIDIA GPUs, this is a ROCm build of PyTorch"
    if nvidia is None:
        return "it is made for AMD GPUs, this is no ROCm build of PyTorch"
    available = capability(request.device)
    if available is None:
        return "no GPU can be reached"
    if available < nvidia:
        return (
            f"it needs compute capability {nvidia[0]}.{nvidia[1]}, "
            f"this GPU has {available[0]}.{available[1]}"
        )
    return None


def on_rocm() -> bool:
    """Whether this PyTorch is built for AMD GPUs."""
    return torch.version.hip is not None


def capability(device: torch.device) -> tuple[int, int] | None:
    """The compute capability of an NVIDIA GPU; None where there is none."""
    return torch.cuda.get_device_capability(device) if torch.cuda.is_available() else None


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# ---- optional packages, whose private functions change their arguments from version to version


@functools.lru_cache(maxsize=16)  # an absent package is searched for once, not in every call
def import_or_reason(module: str) -> ModuleType | str:
    """The module, or why it cannot be imported."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        return f"is not installed (no module {error.name})"
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        # Most often it is built for another PyTorch or CUDA.
        return f"cannot be imported ({type(error).__name__}: {error})"


@dataclasses.dataclass(frozen=True)
class PackageFunction:
    """A function of an optional package, called with keyword arguments only.

    `package` is the name under which users install it, `module` and `name` say where the function
    is.  `required` are the arguments without which the result would be wrong, each as
    "spelling|other spelling" where versions differ: a version that has none of the spellings is
    refused, and not guessed at.  `operator` is the custom operator in which the package may have
    wrapped the function, which hides its signature.
    """

    package: str
    module: str
    name: str
    required: tuple[str, ...]
    operator: str = ""

    def unsupported_reason(self) -> str | None:
        """Why it cannot be called; None if it can."""
        module = import_or_reason(self.module)
        if isinstance(module, str):
            return f"package {self.package} {module}"
        if not hasattr(module, self.name):
            return f"the installed {self.package} has no {self.module}.{self.name}"
        parameters = self.parameters()
        missing = []
        for spellings in self.required:
            if not any(spelling in parameters for spelling in spellings.split("|")):
                missing.append(spellings)
        if missing:
            return (
                f"{self.name} of the installed {self.package} has no argument {', '.join(missing)}"
            )
        return None

    def parameters(self) -> dict[str, bool]:
        """The parameters of the installed version, and whether each must be given."""
        return _parameters(self._function(), self.operator)

    def __call__(self, **values: Any) -> Any:
        """Calls the function with the values for which the installed version has parameters.

        The caller can therefore give every spelling of an argument.  Parameters that must be given
        and have no value here belong to features that are not used: they are None.
        """
        if reason := self.unsupported_reason():
            raise NotImplementedError(f"{reason}.")
        arguments = {}
        for parameter, must_be_given in self.parameters().items():
            if must_be_given or parameter in values:
                arguments[parameter] = values.get(parameter)
        return self._function()(**arguments)

    def _function(self) -> Callable:
        return getattr(import_or_reason(self.module), self.name)


@functools.lru_cache(maxsize=32)
def _parameters(function: Callable, operator: str) -> dict[str, bool]:
    """The function's parameters, and whether each must be given.

    Where the signature is hidden behind *args and **kwargs they come from the schema of the custom
    operator: of the function itself if it is one (``torch.library.custom_op``), otherwise of the
    operator of that name.  Empty if there is none.
    """
    signature = inspect.signature(function).parameters.values()
    if not any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in signature):
        return {p.name: p.default is p.empty for p in signature}
    overload = getattr(function, "_opoverload", None)
    if overload is None and operator:
        namespace, name = operator.split("::")
        packet = getattr(getattr(torch.ops, namespace), name, None)
        overload = getattr(packet, "default", None)
    if overload is None:
        return {}
    return {
        argument.name: not argument.has_default_value() for argument in overload._schema.arguments
    }


# ---- head sizes


def pad(*tensors: Tensor) -> list[Tensor]:
    """Contiguous tensors whose last dimension is padded with zeros to a multiple of 8.

    Tensor cores need such head sizes.  The zeros change no score, and ``unpad`` removes what
    belongs to them from outputs and gradients.
    """
    missing = -tensors[0].shape[-1] % 8
    if missing == 0:  # functional.pad would copy all the same
        return [x.contiguous() for x in tensors]
    return [torch.nn.functional.pad(x, (0, missing)) for x in tensors]


def unpad(x: Tensor, like: Tensor) -> Tensor:
    """x with the head size of `like`."""
    return x.narrow(-1, 0, like.shape[-1])


# ---- determinism


@contextlib.contextmanager
def deterministic_algorithms(wanted: bool) -> Iterator[None]:
    """Turns on, if wanted, the process-wide switch that PyTorch's own kernels read.

    The switch is put back as it was.
    """
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    if not wanted or (enabled and not warn_only):
        yield
        return
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
