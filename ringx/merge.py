"""Combine attention over disjoint sets of keys.

With s_ij = scale * q_i . k_j, attention over a key set A gives lse_A = log sum_{j in A} exp s_ij
and out_A = sum_{j in A} exp(s_ij - lse_A) v_j.  For disjoint A and B

    lse = log(exp lse_A + exp lse_B)
    out = exp(lse_A - lse) out_A + exp(lse_B - lse) out_B
        = out_A + w (out_B - out_A),   w = sigmoid(lse_B - lse_A)

and the empty set, (out, lse) = (0, -inf), is the identity.

The gradient needs, besides the probabilities p_ij = exp(s_ij - lse_i) of the *whole* row, one
number a row, delta_i = dout_i . out_i - dlse_i, where dlse is the gradient that reaches lse:

    ds_ij = p_ij (dout_i . v_j - delta_i)

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
    """Running (out, lse) of some queries over the keys seen so far; `out` [B, S, H, D] and `lse`
    [B, H, S] accumulate in fp32 (fp64 for fp64)."""

    def __init__(self, q: torch.Tensor):
        """Of these queries [B, S, H, D]; no key has been seen."""
        self._q = q
        self._out: torch.Tensor | None = None
        self._lse: torch.Tensor | None = None
        self._owned = False  # whether the tensors may be written to

    def add(self, out: torch.Tensor, lse: torch.Tensor, rows_of_q: slice) -> None:
        """Merges in attention of these rows over further keys."""
        covers_all = rows_of_q == slice(0, self._q.shape[1])
        if self._out is None and covers_all:  # the first result is kept as it came
            self._out = out
            self._lse = lse
            return
        total_out, total_lse = self._accumulators()
        old_lse = total_lse[:, :, rows_of_q]
        weight = torch.sigmoid(lse - old_lse)
        weight.masked_fill_(lse == -torch.inf, 0.0)  # where both are -inf, their difference is nan
        part = total_out[:, rows_of_q]
        torch.lerp(part, out.to(part.dtype), rows(weight), out=part)
        total_lse[:, :, rows_of_q] = torch.logaddexp(old_lse, lse)

    def _accumulators(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(out, lse) in the accumulator's dtype, to be written to."""
        batch, rows_of_q, heads, _ = self._q.shape
        dtype, device = acc_dtype(self._q.dtype), self._q.device
        lse_shape = (batch, heads, rows_of_q)
        if self._out is None or self._lse is None:
            self._out = torch.zeros(self._q.shape, dtype=dtype, device=device)
            self._lse = torch.full(lse_shape, -torch.inf, dtype=dtype, device=device)
        elif not self._owned:
            out, lse = self._out, self._lse
            self._out = torch.zeros(self._q.shape, dtype=dtype, device=device).copy_(out)
            self._lse = torch.empty(lse_shape, dtype=dtype, device=device).copy_(lse)
        self._owned = True
        return self._out, self._lse

    @property
    def out(self) -> torch.Tensor:
        """[B, S, H, D], zero where a row has seen no key; in the kernel's own dtype when there was
        one result only."""
        return self._accumulators()[0] if self._out is None else self._out

    @property
    def lse(self) -> torch.Tensor:
        """[B, H, S]; -inf where a row has seen no key."""
        return self._accumulators()[1] if self._lse is None else self._lse


def absorb_dlse(
    dout: torch.Tensor, out: torch.Tensor, dlse: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(dout', out') for kernels that form delta = rowsum(dout * out) themselves, so that it equals
    dout . out - dlse.

    out' = out - dlse * dout / |dout|^2.  A row whose dout is (nearly) zero cannot carry dlse this
    way: it is given a dout' of one component epsilon, far below what the dtype resolves, and an
    out' of -dlse / epsilon in that component.
    """
    dtype = acc_dtype(out.dtype)
    epsilon = {torch.float64: 1e-100, torch.float16: 2.0**-12}.get(out.dtype, 1e-15)
    wide_dout, dlse_rows = dout.to(dtype), rows(dlse.to(dtype))
    peak = wide_dout.abs().amax(-1, keepdim=True)
    tiny = peak < epsilon
    safe_peak = peak.masked_fill(tiny, 1.0)
    unit = wide_dout / safe_peak  # so that squares neither overflow nor vanish
    unit_square = unit.square().sum(-1, keepdim=True).masked_fill(tiny, 1.0)
    absorbed = out.to(dtype) - unit * (dlse_rows / (safe_peak * unit_square))
    first = torch.zeros_like(wide_dout[..., :1]).expand_as(wide_dout).clone()
    first[..., 0] = 1.0
    new_dout = torch.where(tiny, first * epsilon, wide_dout).to(dout.dtype)
    new_out = torch.where(tiny, first * (-dlse_rows / epsilon), absorbed).to(out.dtype)
    return new_dout, new_out
