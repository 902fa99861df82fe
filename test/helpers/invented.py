"""Valid records with invented numbers, for tests of what reads records."""

from dataclasses import replace
from typing import Any

import numpy as np

from ringx.comm.collectives import BENCHMARKS
from ringx.measure import bench_attention, cases, provenance, records
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
    algorithm="ringx3",
    world=2,
    seqlen=64,
    mask="causal",
    time=1.0,
    baseline=True,
    wire=None,
    labels=None,
    **changes,
) -> dict[str, Any]:
    """A record of attention that took `time` seconds; `wire`: bytes on the wire over the closed form."""
    layout = ALGORITHMS[algorithm].recommended_layout
    case = cases.Case(
        algorithm,
        layout,
        mask,
        "bf16",
        world,
        seqlen,
        1,
        8,
        2,
        16,
        "auto",
        True,
        1,
        None,
        baseline,
        1,
        3,
    )
    case = replace(case, **changes)
    seconds = bench_attention.slowest(
        [[(0.25 * time, time), (0.3 * time, 1.2 * time), (0.2 * time, 0.9 * time)]]
    )
    full = {
        "kernel": "cpu",
        "workers": 2,
        "seconds": bench_attention.slowest([[(0.25, 1.0)] * 3]),
        "missing": None,
    }
    closed = ALGORITHMS[algorithm].bytes(
        1, seqlen, 8, case.kv_heads, 16, world, 2, mask == "causal", case.layout
    )
    name = "all_gather" if algorithm == "ringx3" else "broadcast"
    sent = {
        d: {
            "counted": b,
            "closed_form": b,
            "collectives": {name: b} if b else {},
            "messages": {name: 2} if b else {},
        }
        for d, b in zip(("forward", "backward"), closed, strict=True)
    }
    left = (
        None
        if wire is None
        else {
            "median": wire * sum(closed),
            "raw": [wire * sum(closed)] * 3,
            "interface": "e",
            "hosts": world,
        }
    )
    record = {
        "schema": records.SCHEMA, "kind": "attention", "id": case.id, "date": provenance.now(), "case": vars(case), "kernel": "cpu",
        "workers": world, "oversubscribed": world > 2, "seconds": seconds,
        **bench_attention.derived(case, seconds, world, full if baseline else None), "labels": labels or {},
        "bytes": sent, "wire": left, "wire_missing": None if left else "invented", "memory": {"peak_bytes": 1, "how": "invented"},
        "launch": {"launcher": "l", "backend": "gloo", "local_world": world, "environment": {}, "job": None}, **ORIGIN,
    }  # fmt: skip
    return records.validate(record)


def collective(
    name="all_gather", world=2, alpha=1e-4, beta=1e-8, factor=1.5, labels=None
) -> dict[str, Any]:
    """A record of a collective that takes alpha + beta S seconds."""
    sizes = []
    for size in (2**k for k in range(10, 21, 2)):
        t, bus = alpha + beta * size, BENCHMARKS[name].bus(world)
        times = dict.fromkeys(("mean", "min", "median", "p99"), t)
        rates = {"algbw": size / t, "busbw": bus * size / t}
        sizes.append(
            {"bytes": size, "reps": 3, **times, **rates, "wrong": 0, "wire_factor": factor}
        )
    case = {
        "collective": name,
        "world": world,
        "hosts": world,
        "dtype": "fp32",
        "warmup": 1,
        "reps": 3,
    }
    record = {
        "schema": records.SCHEMA, "kind": "collective", "id": f"collective_{name}_fp32_n{world}_hosts{world}",
        "date": provenance.now(), "case": case, "sizes": sizes, "ended": None, "wire_missing": None, "labels": labels or {},
        "launch": {"launcher": "l", "backend": "gloo", "local_world": 1, "environment": {}, "job": None}, **ORIGIN,
    }  # fmt: skip
    return records.validate(record)


def weather(times=60, height=8, width=12):
    """An xarray dataset of two fields on a small globe, every 6 hours: a wave that wanders east, and noise."""
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
