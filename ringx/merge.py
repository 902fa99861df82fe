"""Combine attention over disjoint sets of keys.

With s_ij = scale * q_i . k_j, attention over a key set A gives lse_A = log sum_{j in A} exp s_ij and
out_A = sum_{j in A} exp(s_ij - lse_A) v_j.  For disjoint A and B

    lse = log(exp lse_A + exp lse_B)
    out = exp(lse_A - lse) out_A + exp(lse_B - lse) out_B = out_A + w (out_B - out_A),   w = sigmoid(lse_B - lse_A)

and the empty set, (out, lse) = (0, -inf), is the identity.

The gradient needs, besides the probabilities p_ij = exp(s_ij - lse_i) of the *whole* row, one number a row,
delta_i = dout_i . out_i - dlse_i:   ds_ij = p_ij (dout_i . v_j - delta_i)   (dlse is the gradient that reaches lse).
Each set of keys can therefore be differentiated on its own once the global lse and delta are known.
"""

import torch


def acc_dtype(dtype: torch.dtype) -> torch.dtype:
    """What results are accumulated in: fp64 for fp64, fp32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def rows(lse: torch.Tensor) -> torch.Tensor:
    """[B, H, S] -> [B, S, H, 1], to scale rows of [B, S, H, D]."""
    return lse.transpose(1, 2).unsqueeze(-1)


class OnlineSoftmax:
    """Running (out, lse) of some queries over the keys seen so far; `out` [B, S, H, D] and `lse` [B, H, S] accumulate in
    fp32 (fp64 for fp64)."""

    def __init__(self, q: torch.Tensor):
        self._like = q
        self._out: torch.Tensor | None = None
        self._lse: torch.Tensor | None = None
        self._own = False  # whether the tensors are ours to write to

    def add(self, out: torch.Tensor, lse: torch.Tensor, at: slice) -> None:
        """Merge in attention of rows `at` over further keys."""
        if self._out is None and (at.start, at.stop) == (0, self._like.shape[1]):
            self._out, self._lse = (
                out,
                lse,
            )  # the first result is kept as it came; nothing to merge it with
            return
        acc_out, acc_lse = self._accumulators()
        old = acc_lse[:, :, at]
        weight = torch.sigmoid(lse - old).masked_fill_(lse == -torch.inf, 0.0)  # -inf - -inf is nan
        part = acc_out[:, at]
        torch.lerp(part, out.to(part.dtype), rows(weight), out=part)
        acc_lse[:, :, at] = torch.logaddexp(old, lse)

    def _accumulators(self) -> tuple[torch.Tensor, torch.Tensor]:
        b, s, h, _ = self._like.shape
        dtype, device = acc_dtype(self._like.dtype), self._like.device
        if self._out is None or self._lse is None:
            self._out = torch.zeros(self._like.shape, dtype=dtype, device=device)
            self._lse = torch.full((b, h, s), -torch.inf, dtype=dtype, device=device)
        elif not self._own:
            self._out = torch.zeros(self._like.shape, dtype=dtype, device=device).copy_(self._out)
            self._lse = torch.empty((b, h, s), dtype=dtype, device=device).copy_(self._lse)
        self._own = True
        return self._out, self._lse

    @property
    def out(self) -> torch.Tensor:
        """[B, S, H, D], zero where a row has seen no key; in the kernel's own dtype when there was one result only."""
        return self._accumulators()[0] if self._out is None else self._out

    @property
    def lse(self) -> torch.Tensor:
        """[B, H, S]; -inf where a row has seen no key."""
        return self._accumulators()[1] if self._lse is None else self._lse


def absorb_dlse(
    dout: torch.Tensor, out: torch.Tensor, dlse: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(dout', out') for kernels that form delta = rowsum(dout * out) themselves, so that it equals dout . out - dlse.

    out' = out - dlse * dout / |dout|^2.  A row whose dout is (nearly) zero cannot carry dlse this way: it is given a dout' of
    one component epsilon, far below what the dtype resolves, and out' = (delta / epsilon) in that component.
    """
    dtype = acc_dtype(out.dtype)
    eps = {torch.float64: 1e-100, torch.float16: 2.0**-12}.get(out.dtype, 1e-15)
    wide, d = dout.to(dtype), rows(dlse.to(dtype))
    peak = wide.abs().amax(-1, keepdim=True)
    tiny = peak < eps
    unit = wide / peak.masked_fill(tiny, 1.0)
    wanted = out.to(dtype) - unit * (
        d
        / (peak.masked_fill(tiny, 1.0) * unit.square().sum(-1, keepdim=True).masked_fill(tiny, 1.0))
    )
    first = torch.zeros_like(wide[..., :1]).expand_as(wide).clone()
    first[..., 0] = 1.0
    dout = torch.where(tiny, first * eps, wide).to(dout.dtype)
    return dout, torch.where(tiny, first * (-d / eps), wanted).to(out.dtype)
