"""ringx3 equals full attention; by itself on any number of ranks, too:

torchrun --nproc_per_node 4 test/test_ringx3.py
srun -n4 python test/test_ringx3.py
"""

import pytest
from helpers import exact


@pytest.mark.parametrize("world", exact.WORLDS)
def test_equals_full_attention(world, poison):
    exact.under_pytest("ringx3", world)


if __name__ == "__main__":
    exact.main("ringx3")
