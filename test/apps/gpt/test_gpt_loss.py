"""The chunked, vocabulary-parallel cross-entropy equals torch's, without whole logits.

pytest test/apps/gpt/test_gpt_loss.py
"""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from helpers.ranks import run
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from apps.gpt.loss import IGNORE, head_logits, head_loss, token_losses
from ringx.measure.peak import peak_bytes

pytestmark = pytest.mark.fast

B, S, C, V = 2, 11, 8, 24


@pytest.fixture
def problem():
    g = torch.Generator().manual_seed(0)
    x, head = (torch.randn(*n, generator=g, dtype=torch.float64) * 3 for n in ((B, S, C), (V, C)))
    labels = torch.randint(V, (B, S), generator=g)
    labels[0, 2:6] = IGNORE
    return x, head, labels


def whole(x, head, labels, reduction="sum"):
    return F.cross_entropy(
        F.linear(x, head).flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction=reduction
    )


def graded(loss, x, head, labels):
    x, head = (t.clone().requires_grad_() for t in (x, head))
    out = loss(x, head, labels)
    (2.5 * out).backward()
    return out.detach(), x.grad, head.grad


@pytest.mark.parametrize("chunk", [1, 5, 22, 100])
def test_equals_torch_on_whole_logits(chunk, problem):
    want = graded(whole, *problem)
    got = graded(lambda *a: head_loss(*a, chunk=chunk), *problem)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    each = token_losses(*problem, chunk=chunk)
    torch.testing.assert_close(
        each.flatten(), whole(*problem, reduction="none"), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("world", [2, 3])
def test_vocabulary_cut_over_ranks(world, problem):
    x, head, labels = problem
    want = graded(whole, *problem)

    def rank(r):
        mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("tp",))
        cut = lambda w: DTensor.from_local(w.chunk(world)[r].clone(), mesh, [Shard(0)])  # noqa: E731
        mine, weight = x.clone().requires_grad_(), cut(head).requires_grad_()
        out = head_loss(mine, weight, labels, chunk=4)
        (2.5 * out).backward()
        dist.all_reduce(mine.grad)  # each rank's is a part of the sum
        return (
            out.detach(),
            mine.grad,
            weight.grad.full_tensor(),
            head_logits(x, cut(head)),
            token_losses(x, cut(head), labels, chunk=3),
        )

    for out, dx, dw, logits, each in run(world, rank):
        for a, b in zip((out, dx, dw), want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(logits, F.linear(x, head), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(
            each.flatten(), whole(*problem, reduction="none"), rtol=1e-12, atol=1e-12
        )


def test_large_logits_neither_overflow_nor_lose_the_label(problem):
    x, head, labels = problem
    got = head_loss((x * 1e3).float(), head.float(), labels, chunk=4)
    want = whole(x * 1e3, head, labels)
    assert torch.isfinite(got) and got.item() == pytest.approx(want.item(), rel=1e-5)


def test_in_bfloat16_sums_are_of_fp32(problem):
    x, head, labels = problem
    out, dx, dw = graded(lambda *a: head_loss(*a, chunk=6), x.bfloat16(), head.bfloat16(), labels)
    want = graded(whole, x.bfloat16().double(), head.bfloat16().double(), labels)
    assert (out.dtype, dx.dtype, dw.dtype) == (torch.float32, torch.bfloat16, torch.bfloat16)
    assert out.item() == pytest.approx(want[0].item(), rel=1e-2)
    for a, b in ((dx, want[1]), (dw, want[2])):
        assert (a.double() - b).norm() <= 0.02 * b.norm()


def test_logits_never_exist_all_at_once():
    tokens, vocab, width, chunk = 512, 4096, 16, 32
    x, head = (
        torch.randn(1, tokens, width, requires_grad=True),
        torch.randn(vocab, width, requires_grad=True),
    )
    labels = torch.randint(vocab, (1, tokens))
    peak, _ = peak_bytes(
        lambda: head_loss(x, head, labels, chunk=chunk).backward(), torch.device("cpu")
    )
    kept = 4 * (2 * tokens * width + 4 * vocab * width)  # dx, dW and their copies on the way back
    assert peak <= kept + 3 * chunk * vocab * 4 < tokens * vocab * 4 / 2


@pytest.mark.parametrize("label", [V, -1])
def test_a_label_outside_of_the_vocabulary_is_not_a_number(label, problem):
    x, head, labels = problem
    labels[0, 0] = label
    assert head_loss(x, head, labels, chunk=4).isnan()
    assert token_losses(x, head, labels, chunk=4).isnan().sum() == 1
