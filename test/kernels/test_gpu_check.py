"""script/gpu_check.py, run on the CPU."""

import importlib.util
import itertools
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
    report = json.loads(out.read_text())
    expected_keys = {
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
    }
    assert expected_keys <= set(report)
    assert report["misses"] == []
    assert set(report["kernels"]) == set(KERNELS)
    checked_algorithms = {case["algorithm"] for case in report["algorithms"]["cases"]}
    assert checked_algorithms == set(ringx.algorithms())
    checked_training = {(c["app"], c["checkpointing"]) for c in report["training"]["cases"]}
    assert checked_training == set(itertools.product(("gpt", "vit"), ("none", "selective", "full")))
    assert max(len(line) for line in capsys.readouterr().out.splitlines()) <= 100


@pytest.mark.fast
def test_gpu_check_finds_a_wrong_gradient_and_a_kernel_that_fails(check, monkeypatch):
    report = {"kernels": {}, "misses": []}
    args = check.parse_arguments(["--device", "cpu", "--quick"])
    correct_backward = load("cpu").backward

    def wrong_backward(*operands, **options):
        return [1.05 * gradient for gradient in correct_backward(*operands, **options)]

    def failing_forward(*operands, **options):
        return torch.zeros(2) + torch.zeros(3)

    monkeypatch.setattr(load("cpu"), "backward", wrong_backward)
    monkeypatch.setattr(load("reference"), "forward", failing_forward)
    check.check_kernels(report, CPU, args)
    misses = report["misses"]
    assert any("cpu float32" in miss and "dk" in miss for miss in misses)
    assert any("reference bfloat16" in miss and "RuntimeError" in miss for miss in misses)
