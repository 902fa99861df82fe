"""The counter of tensors that are alive at once."""

import pytest
import torch

from ringx.measure import peak
from ringx.measure.peak import Lifetimes

pytestmark = pytest.mark.fast


def test_lifetimes_heed_resized_storages():
    with Lifetimes() as seen:
        x = torch.empty(100, dtype=torch.uint8)
        x.untyped_storage().resize_(0)
        y = torch.empty(50, dtype=torch.uint8)
        assert (seen.now, seen.peak) == (50, 100)
        x.untyped_storage().resize_(100)
        assert (seen.now, seen.peak) == (150, 150)
        assert sorted(seen.at_peak.values()) == [50, 100] and len(seen.resized) == 1
        del x, y
        assert seen.now == 0
    assert torch.UntypedStorage.resize_ is peak._resize  # torch's own again
