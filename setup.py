"""ringx: attention over sequences too long for one GPU."""

from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
version = next(
    line.split('"')[1]
    for line in (here / "ringx/__init__.py").read_text().splitlines()
    if line.startswith("__version__")
)

extras = {
    "plot": ["matplotlib>=3.7", "pandas>=2", "pyarrow>=14"],
    # what the trainers need; Weights & Biases and DeepSpeed only where they are asked for by name
    "apps": [
        *(
            "pyyaml>=6",
            "tokenizers>=0.20",
            "safetensors>=0.4",
            "huggingface_hub>=0.24",
            "pyarrow>=14",
            "tensorboard>=2.15",
        ),
        *(
            "xarray>=2024.10",
            "netCDF4>=1.6",
            "scipy>=1.11",
            "h5py>=3.10",
            "zarr>=2.17",
        ),  # gridded fields
    ],
    "zero": [
        "deepspeed==0.19.*"
    ],  # --dp-engine zero1..3; parts of it that it does not document are used
    # NVIDIA/ROCm apex is built from source and found at run time: PyPI's apex is another project
    "hpc": ["mpi4py>=4"],
    # import-linter, radon, tomli: the floors of the house and its measures (script/house.py)
    # transformers: an independent Llama to compare with; mpich: a real mpiexec for the launch tests
    # nbclient, nbformat, ipykernel: the notebooks in results/ are executed
    "dev": [
        *("pytest>=8", "pytest-xdist>=3.5", "ruff>=0.17", "mypy>=1.11", "pre-commit>=3"),
        *("import-linter>=2.1", "radon>=6", 'tomli>=2; python_version < "3.11"'),
        *("transformers>=5", "mpi4py>=4", "mpich", "nbclient>=0.10", "nbformat>=5", "ipykernel>=6"),
    ],
}

setup(
    name="ringx",
    version=version,
    description="Exact attention over sequences too long for one GPU: "
    "algorithms, measurement, training",
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["ringx", "ringx.*"]),
    python_requires=">=3.10",
    install_requires=["torch>=2.8", "numpy", "rich>=13"],
    extras_require=extras,
    entry_points={"console_scripts": ["ringx=ringx.command.cli:main"]},
    classifiers=["Programming Language :: Python :: 3", "Topic :: Scientific/Engineering"],
)
