"""Full attention by its definition, differentiated by autograd: what every algorithm must equal."""

from typing import NamedTuple

import torch


class Problem(NamedTuple):
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    dout: torch.Tensor
    dlse: torch.Tensor


def problem(S, *, B=1, H=4, Hkv=2, D=16, dtype=torch.float64, seed=0) -> Problem:
    """Random q, k, v and gradients; dlse in the dtype that lse has."""
    g = torch.Generator().manual_seed(seed)
    q, k, v, dout = (
        torch.randn(B, S, h, D, generator=g, dtype=torch.float64).to(dtype)
        for h in (H, Hkv, Hkv, H)
    )
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return Problem(q, k, v, dout, torch.randn(B, H, S, generator=g, dtype=torch.float64).to(wide))


def full_attention(
    p: Problem, *, causal=False, scale=None, with_dlse=False
) -> dict[str, torch.Tensor]:
    """out, lse, dq, dk, dv in fp64; the loss is sum(out * dout), with_dlse + sum(lse * dlse)."""
    q, k, v = (x.double().detach().requires_grad_() for x in p[:3])
    h, hkv, d = q.shape[2], k.shape[2], q.shape[3]
    head = torch.arange(h) // (h // hkv)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k[:, :, head]) * (
        d**-0.5 if scale is None else scale
    )
    if causal:
        i = torch.arange(q.shape[1])
        scores = torch.where(i[None] <= i[:, None], scores, -torch.inf)
    out, lse = (
        torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v[:, :, head]),
        scores.logsumexp(-1),
    )
    loss = (out * p.dout.double()).sum() + ((lse * p.dlse.double()).sum() if with_dlse else 0)
    grads = torch.autograd.grad(loss, (q, k, v))
    return {
        "out": out.detach(),
        "lse": lse.detach(),
        **dict(zip(("dq", "dk", "dv"), grads, strict=True)),
    }


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    """Relative L2 error; nan if either holds one."""
    return ((got.double() - want.double()).norm() / want.double().norm()).item()
