"""Peak FLOP rates of GPUs by their names."""

import pytest
import torch

from apps.common.flops import peak_flops

pytestmark = pytest.mark.fast


@pytest.mark.parametrize(
    ("name", "flops"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("AMD Instinct MI250X", 191.5e12),
        ("AMD Instinct MI300X", 1307e12),
        ("Some GPU", None),
    ],
)
def test_peak_flops(monkeypatch, name, flops):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops("cuda:0") == flops
    assert peak_flops("cpu") is None
