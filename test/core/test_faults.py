"""Faults that such systems are known for, each with a test that shows it absent here.

Others have their tests elsewhere: half-written reduce buffers, fp32 aliases of a reused buffer, one
rank, and no group in test_exact.py and test_ringx*.py, which run in fp32 and fp64 with fresh memory
full of NaN; swallowed arguments in test_errors.py; a backend's lse in test_kernels.py; gradients,
labels and positions over cp in test_gpt.py.
"""

from functools import partial

import pytest
import torch
import torch.distributed as dist
from helpers.exact import errors, outputs
from helpers.oracle import full_attention, problem
from helpers.ranks import run

import ringx
from ringx.kernels import cpu

ALGORITHMS = tuple(ringx.algorithms())


@pytest.mark.fast
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_no_mask_is_taken_and_ignored(algorithm):
    """X1 took causal=True and returned wrong gradients, X2o took causal=False: both masks differ
    here, and both are right."""
    p = problem(24)
    for causal in (True, False):
        got = run(2, partial(outputs, p=p, algorithm=algorithm, causal=causal))[0]
        assert max(errors(got, full_attention(p, causal=causal)).values()) < 1e-10
        assert errors(got, full_attention(p, causal=not causal))["dk"] > 0.1


@pytest.mark.fast
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_kernels_that_read_a_bare_pointer_get_what_they_expect(algorithm, monkeypatch):
    """The CPU backward reads lse as if it were contiguous."""
    original = cpu._aten_backward

    def bare(dout, q, k, v, out, lse, *rest, **options):
        b, h, s = lse.shape
        return original(
            dout, q, k, v, out, lse.as_strided((b, h, s), (h * s, s, 1)), *rest, **options
        )

    monkeypatch.setattr(cpu, "_aten_backward", bare)
    p = problem(48)
    got = run(3, lambda rank: outputs(rank, p, algorithm=algorithm, causal=True))[0]
    assert max(errors(got, full_attention(p, causal=True)).values()) < 1e-10


@pytest.mark.fast
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_gradients_have_their_inputs_dtype(algorithm, dtype):
    p = problem(16, dtype=dtype)
    got = run(2, lambda rank: outputs(rank, p, algorithm=algorithm))[0]
    assert {n: x.dtype for n, x in got.items()} == {
        n: dtype if n != "lse" else (torch.float64 if dtype == torch.float64 else torch.float32)
        for n in got
    }


def test_errors_do_not_grow_with_ranks():
    """dkv rounded to bf16 at every hop of a ring grows with N; here 8 ranks err as one does."""
    p = problem(256, dtype=torch.bfloat16, D=32)
    want = full_attention(p)
    for algorithm in ALGORITHMS:
        attend = partial(outputs, p=p, algorithm=algorithm)
        one, eight = (errors(run(n, attend)[0], want) for n in (1, 8))
        for name in ("out", "dq", "dk", "dv"):
            assert eight[name] < 1.5 * one[name], (algorithm, name, eight, one)


@pytest.mark.fast
@pytest.mark.parametrize("algorithm", ringx.algorithms())
def test_what_a_reduce_leaves_elsewhere_is_not_used(algorithm, monkeypatch):
    """A backend may write anything to the buffers of ranks that are not the destination."""
    original = ringx.comm.Pending.wait
    poisoned = []

    def wait(self):
        was_flying, result = self._work is not None, original(self)
        if (
            was_flying
            and self._step.startswith("reduce to")
            and not self._step.endswith(f" {dist.get_rank()}")
        ):
            result.fill_(torch.nan)
            poisoned.append(self._step)
        return result

    monkeypatch.setattr(ringx.comm.Pending, "wait", wait)
    p = problem(33)
    for overlap in (True, False):
        attend = partial(outputs, p=p, algorithm=algorithm, causal=True, overlap=overlap)
        got = run(3, attend)[0]
        assert max(errors(got, full_attention(p, causal=True)).values()) < 1e-10
    messages = ringx.algorithms()[algorithm].messages(1, 33, 1, 1, 8, 3, 8, True, "contiguous")
    assert bool(poisoned) == ("reduce" in messages.backward)
