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
    print("Versions")
    _row("python", f"{platform.python_version()} on {platform.platform()}")
    _row("ringx", ringx_version)
    _row("torch", torch.__version__)
    for name in PACKAGES:
        _row(name, _version(name))
    _row("CUDA, ROCm", f"{torch.version.cuda or 'none'}, {torch.version.hip or 'none'}")
    print("\nDevices")
    _row("cpu", f"{os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for i in range(count):
        p = torch.cuda.get_device_properties(i)
        _row(f"cuda:{i}", f"{p.name}, {p.total_memory / 2**30:.0f} GiB")
    if not count:
        _row("cuda", "no GPU that this torch can use")
    print("\nCommunication")
    _row(
        "backends",
        ", ".join(b for b in ("gloo", "nccl", "mpi", "ucc") if _has_backend(b))
        or "none: torch.distributed is missing",
    )
    for key, value in vars(launch.detect()).items():
        _row(key, str(value))
    device = torch.device("cuda", 0) if count else torch.device("cpu")
    dtype = DTYPES[args.dtype or "bf16"]
    for d in args.head_dim:
        need = kernels.KernelRequest(device, dtype, d, grad=not args.forward_only)
        what = "forward" if args.forward_only else "forward and backward"
        print(
            f"\nKernels for {str(dtype).removeprefix('torch.')}, head size {d}, {what} on {device.type}"
        )
        auto = kernels.choose("auto", need)
        for name, entry in kernels.KERNELS.items():
            reason = kernels.unsupported_reason(name, need)
            _row(
                name,
                entry.description if reason is None else f"no: {reason}",
                mark="*" if name == auto else " ",
            )
        print(
            "  * what kernel='auto' takes; those above it cannot serve, those below it are slower or less preferred"
        )
    return 0


def _row(name: str, value: str, mark: str = " ") -> None:
    print(f"{mark} {name:16}{value}")


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _has_backend(name: str) -> bool:
    return dist.is_available() and dist.is_backend_available(name)
