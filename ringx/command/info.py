"""ringx info: what this environment can do, and why not what it cannot."""

import argparse
import importlib.metadata
import os
import platform

import torch
import torch.distributed as dist

from .. import __version__ as ringx_version
from .. import kernels, launch
from ..checks import DTYPES, integers

PACKAGES = (
    "numpy",
    "flash-attn",
    "flash-attn-4",
    "amd-aiter",
    "mpi4py",
    "matplotlib",
    "safetensors",
)
BACKENDS = ("gloo", "nccl", "mpi", "ucc")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dtype", choices=DTYPES, default=None, help="ask about this dtype (default: bf16)"
    )
    parser.add_argument(
        "--head-dim",
        type=integers,
        default=[64],
        metavar="D,...",
        help="ask about these head sizes",
    )
    parser.add_argument(
        "--forward-only", action="store_true", help="ask for inference, without gradients"
    )


def main(args: argparse.Namespace) -> int:
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    _print_versions()
    _print_devices(gpus)
    _print_communication()
    device = torch.device("cuda", 0) if gpus else torch.device("cpu")
    dtype = DTYPES[args.dtype or "bf16"]
    for head_dim in args.head_dim:
        request = kernels.KernelRequest(device, dtype, head_dim, grad=not args.forward_only)
        _print_kernels(request)
    return 0


def _print_versions() -> None:
    print("Versions")
    _print_row("python", f"{platform.python_version()} on {platform.platform()}")
    _print_row("ringx", ringx_version)
    _print_row("torch", torch.__version__)
    for name in PACKAGES:
        _print_row(name, _version_of(name))
    _print_row("CUDA, ROCm", f"{torch.version.cuda or 'none'}, {torch.version.hip or 'none'}")


def _version_of(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _print_devices(gpus: int) -> None:
    print("\nDevices")
    _print_row("cpu", f"{os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads")
    for index in range(gpus):
        properties = torch.cuda.get_device_properties(index)
        memory = properties.total_memory / 2**30
        _print_row(f"cuda:{index}", f"{properties.name}, {memory:.0f} GiB")
    if gpus == 0:
        _print_row("cuda", "no GPU that this torch can use")


def _print_communication() -> None:
    print("\nCommunication")
    available: list[str] = []
    if dist.is_available():
        available = [name for name in BACKENDS if dist.is_backend_available(name)]
    _print_row("backends", ", ".join(available) or "none: torch.distributed is missing")
    for name, value in vars(launch.detect()).items():
        _print_row(name, str(value))


def _print_kernels(request: kernels.KernelRequest) -> None:
    dtype = str(request.dtype).removeprefix("torch.")
    direction = "forward and backward" if request.grad else "forward"
    print(
        f"\nKernels for {dtype}, head size {request.head_dim}, {direction} on {request.device.type}"
    )
    preferred = kernels.choose("auto", request)
    for name, entry in kernels.KERNELS.items():
        reason = kernels.unsupported_reason(name, request)
        description = entry.description if reason is None else f"no: {reason}"
        _print_row(name, description, mark="*" if name == preferred else " ")
    print(
        "  * what kernel='auto' takes; those above it cannot serve, "
        "those below it are slower or less preferred"
    )


def _print_row(name: str, value: str, mark: str = " ") -> None:
    print(f"{mark} {name:16}{value}")
