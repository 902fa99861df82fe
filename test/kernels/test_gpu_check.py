"""script/gpu_check.py, run on the CPU."""

import importlib.util
import json

import pytest
import torch
from helpers.paths import SCRIPT

import ringx
from ringx.kernels import KERNELS, load

CPU = torch.device("cpu")


@pytest.fixture
def check():
    path = SCRIPT / "gpu_check.py"
    spec = importlib.util.spec_from_file_location("gpu_check", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_gpu_check_runs_on_cpu(check, tmp_path, capsys):
    out = tmp_path / "check.json"
    assert check.main(["--device", "cpu", "--quick", "--worlds", "2", "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    assert {
        "schema",
        "device",
        "torch",
        "driver",
        "cuda",
        "hip",
        "commit",
        "kernels",
        "algorithms",
        "timings",
    } <= set(found)
    assert found["misses"] == [] and set(found["kernels"]) == set(KERNELS)
    assert {a["algorithm"] for a in found["algorithms"]["cases"]} == set(ringx.algorithms())
    ways = {"none", "selective", "full"}
    assert {(c["app"], c["checkpointing"]) for c in found["training"]["cases"]} == {
        (a, w) for a in ("gpt", "vit") for w in ways
    }
    assert max(len(line) for line in capsys.readouterr().out.splitlines()) <= 100


@pytest.mark.fast
def test_gpu_check_finds_a_wrong_gradient_and_a_kernel_that_fails(check, monkeypatch):
    report = {"kernels": {}, "misses": []}
    args = check.parse_arguments(["--device", "cpu", "--quick"])
    right, broken = load("cpu").backward, load("reference")
    monkeypatch.setattr(load("cpu"), "backward", lambda *a, **k: [1.05 * g for g in right(*a, **k)])
    monkeypatch.setattr(broken, "forward", lambda *a, **k: torch.zeros(2) + torch.zeros(3))
    check.check_kernels(report, CPU, args)
    assert any("cpu float32" in m and "dk" in m for m in report["misses"])
    assert any("reference bfloat16" in m and "RuntimeError" in m for m in report["misses"])
