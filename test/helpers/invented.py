"""Valid records with invented numbers, for tests of what reads records."""

from dataclasses import replace
from typing import Any

import numpy as np

from ringx.comm.collectives import BENCHMARKS
from ringx.measure import bench_attention, provenance, records
from ringx.measure.bench_collectives import CollectiveCase
from ringx.measure.cases import AttentionCase
from ringx.patterns.registry import ALGORITHMS

ORIGIN: dict[str, Any] = {
    "command": {"argv": ["ringx", "bench", "--out", "/a/b/runs"], "options": {}},
    "versions": provenance.versions(),
    "git": None,
    "machine": {
        "hosts": ["a"],
        "platform": "p",
        "cpu": "A CPU",
        "cores": 2,
        "device": "cpu",
        "load_average": None,
    },
}


def attention(
    algorithm: str = "ringx3",
    world: int = 2,
    seqlen: int = 64,
    mask: str = "causal",
    time: float = 1.0,
    baseline: bool = True,
    wire: float | None = None,
    labels: dict[str, str] | None = None,
    **changes: Any,
) -> dict[str, Any]:
    """A record of attention that took `time` seconds.

    wire: bytes on the wire over the closed form; changes: of the case."""
    case = AttentionCase(
        algorithm=algorithm,
        layout=ALGORITHMS[algorithm].recommended_layout,
        mask=mask,
        dtype="bf16",
        world=world,
        seqlen=seqlen,
        batch=1,
        heads=8,
        kv_heads=2,
        head_dim=16,
        kernel="auto",
        overlap=True,
        threads=1,
        baseline_threads=None,
        baseline=baseline,
        warmup=1,
        reps=3,
    )
    case = replace(case, **changes)
    seconds = bench_attention.slowest(
        [[(0.25 * time, time), (0.3 * time, 1.2 * time), (0.2 * time, 0.9 * time)]]
    )
    of_baseline = {
        "kernel": "cpu",
        "workers": 2,
        "seconds": bench_attention.slowest([[(0.25, 1.0)] * 3]),
        "missing": None,
    }
    sizes = dict(
        B=1,
        S=seqlen,
        H=8,
        Hkv=case.kv_heads,
        D=16,
        N=world,
        itemsize=2,
        causal=mask == "causal",
        layout=case.layout,
    )
    sent = ALGORITHMS[algorithm].bytes(**sizes)
    name = next(iter(ALGORITHMS[algorithm].messages(**sizes).forward))
    on_wire = None
    if wire is not None:
        on_wire = {
            "median": wire * sum(sent),
            "raw": [wire * sum(sent)] * 3,
            "interface": "e",
            "hosts": world,
        }
    measured = {
        "kernel": "cpu",
        "workers": world,
        "oversubscribed": world > 2,
        "seconds": seconds,
        **bench_attention.derived(case, seconds, world, of_baseline if baseline else None),
        "bytes": {
            direction: {
                "counted": size,
                "closed_form": size,
                "collectives": {name: size} if size else {},
                "messages": {name: 2} if size else {},
            }
            for direction, size in zip(records.DIRECTIONS, sent, strict=True)
        },
        "wire": on_wire,
        "wire_missing": None if on_wire else "invented",
        "memory": {"peak_bytes": 1, "how": "invented"},
    }
    run = _run(labels, ranks_per_host=world)
    return records.validate(records.new_record("attention", case, measured, run))


def collective(
    name: str = "all_gather",
    world: int = 2,
    alpha: float = 1e-4,
    beta: float = 1e-8,
    factor: float | None = 1.5,
    labels: dict[str, str] | None = None,
) -> dict[str, Any]:
    """A record of a collective that takes alpha + beta S seconds.

    factor: bytes on the wire over what an optimal implementation would send."""
    case = CollectiveCase(collective=name, world=world, hosts=world, dtype="fp32", warmup=1, reps=3)
    sizes = []
    for size in (2**k for k in range(10, 21, 2)):
        seconds = alpha + beta * size
        sizes.append(
            {
                "bytes": size,
                "reps": 3,
                "mean": seconds,
                "min": seconds,
                "median": seconds,
                "p99": seconds,
                "algbw": size / seconds,
                "busbw": BENCHMARKS[name].bus(world) * size / seconds,
                "wrong": 0,
                "wire_factor": factor,
            }
        )
    measured = {"sizes": sizes, "ended": None, "wire_missing": None}
    run = _run(labels, ranks_per_host=1)
    return records.validate(records.new_record("collective", case, measured, run))


def _run(labels: dict[str, str] | None, ranks_per_host: int) -> dict[str, Any]:
    """What all records of a run have in common."""
    launch = {
        "launcher": "l",
        "backend": "gloo",
        "local_world": ranks_per_host,
        "environment": {},
        "job": None,
    }
    return {"labels": labels or {}, "launch": launch, **ORIGIN}


def weather(times=60, height=8, width=12):
    """An xarray dataset of two fields on a small globe, every 6 hours: a wave that moves east, and
    noise."""
    import xarray as xr

    lat, lon = np.linspace(70, -70, height), np.arange(width) * 360 / width
    time = np.datetime64("2001-01-30", "ns") + np.arange(times) * np.timedelta64(6, "h")
    wave = np.cos(np.deg2rad(lat))[:, None] * np.sin(
        np.deg2rad(lon) - 0.3 * np.arange(times)[:, None, None]
    )
    noise = np.random.default_rng(0).standard_normal((2, *wave.shape))
    names = ("time", "latitude", "longitude")
    fields = {
        "t2m": (names, (280 + 9 * wave + noise[0]).astype("f4"), {"units": "K"}),
        "u10": (names, (5 * np.roll(wave, 2, 2) + noise[1]).astype("f4"), {"units": "m s-1"}),
    }
    return xr.Dataset(fields, {"time": time, "latitude": lat, "longitude": lon})
