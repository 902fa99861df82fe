"""One call of attention: everything about it that does not depend on the values in q, k and v."""

import itertools
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch.profiler import record_function

from . import kernels
from .comm import Group
from .layout import Sharding, TokenRange, rows_upto
from .merge import OnlineSoftmax, acc_dtype
from .tiles import tiles


@dataclass(frozen=True)
class Plan:
    """Everything about one call that does not depend on the values in q, k and v."""

    algorithm: str
    group: Group
    sharding: Sharding
    causal: bool
    scale: float
    kernel: str
    overlap: bool
    deterministic: bool

    # ---- which rows

    def runs(self, rank: int) -> list[TokenRange]:
        return self.sharding.runs(rank)

    @cached_property
    def mine(self) -> list[TokenRange]:
        return self.runs(self.group.rank)

    def visible_keys(self, src: int, by: int) -> slice:
        """Local rows of src's keys that some query of rank `by` sees."""
        runs = self.runs(src)
        return slice(
            0, rows_upto(runs, self.runs(by)[-1].last) if self.causal else self.sharding.size(src)
        )

    def keys_to_send(self, src: int) -> slice:
        """Local rows of src's keys that some other rank sees: only these are worth sending."""
        if not self.causal:
            return slice(0, self.sharding.size(src) if self.group.world_size > 1 else 0)
        return slice(0, rows_upto(self.runs(src), _last_elsewhere(self.sharding, src)))

    def queries_to_send(self, dst: int) -> slice:
        """Local rows of dst's queries that see some other rank's keys."""
        size = self.sharding.size(dst)
        if not self.causal:
            return slice(0 if self.group.world_size > 1 else size, size)
        return slice(rows_upto(self.runs(dst), _first_elsewhere(self.sharding, dst) - 1), size)

    # ---- local attention of runs of queries against runs of keys

    def _pieces(self, q_runs, k_runs, by_keys):
        window = (None, 0 if self.causal else None)
        return [
            p
            for t in tiles(q_runs, k_runs, window=window, by_keys=by_keys)
            for p in kernels.cut(t, self._kernel.causal)
        ]

    @property
    def _kernel(self) -> kernels.Kernel:
        return kernels.load(self.kernel)

    def attend(
        self, acc: OnlineSoftmax, q, k, v, q_runs: list[TokenRange], k_runs: list[TokenRange]
    ) -> OnlineSoftmax:
        """Merge attention of q [B, Sq, H, D] over k and v [B, Sk, Hkv, D] into acc; the runs say which tokens the rows are."""
        for t in self._pieces(q_runs, k_runs, by_keys=False):
            with record_function(f"{self.algorithm} forward: attend"):
                out, lse = self._kernel.fwd(
                    q[:, t.q], k[:, t.k], v[:, t.k], band=(t.lo, t.hi), scale=self.scale
                )
                acc.add(out, lse, t.q)
        return acc

    def attend_backward(
        self, dq, dout, q, k, v, out, lse, q_runs: list[TokenRange], k_runs: list[TokenRange]
    ):
        """Adds to dq (accumulator dtype); returns dk, dv like k, v (in the accumulator dtype where several pieces add up)."""
        pieces = self._pieces(q_runs, k_runs, by_keys=True)
        once = all(
            a.k.stop <= b.k.start for a, b in itertools.pairwise(pieces)
        )  # no key's gradient is a sum of pieces
        dkv: list[torch.Tensor] = []
        for t in pieces:
            with record_function(f"{self.algorithm} backward: attend"):
                part_q, *part_kv = self._kernel.bwd(
                    dout[:, t.q], q[:, t.q], k[:, t.k], v[:, t.k], out[:, t.q], lse[:, :, t.q],
                    band=(t.lo, t.hi), scale=self.scale, deterministic=self.deterministic,
                )  # fmt: skip
            dq[:, t.q] += part_q
            if len(pieces) == 1 and part_kv[0].shape == k.shape:
                return part_kv
            dkv = dkv or [
                torch.zeros(k.shape, dtype=k.dtype if once else acc_dtype(k.dtype), device=k.device)
                for _ in range(2)
            ]
            for grad, part in zip(dkv, part_kv, strict=True):
                grad[:, t.k] += part
        return dkv or [torch.zeros(k.shape, dtype=k.dtype, device=k.device) for _ in range(2)]

    def attend_own_backward(self, part: int, dq, dkv, dout, q, k, v, out, lse) -> None:
        """The own block's share of dq and dkv [2, B, S, Hkv, D], for one half of the heads: part 0 is to hide the first block's
        arrival, part 1 the last gradients' way home (without overlap, or with one kv head, part 0 is all)."""
        heads, late = (
            k.shape[2],
            k.shape[2] // 2 if self.overlap and self.group.world_size > 1 else 0,
        )
        first, last = (0, heads - late) if part == 0 else (heads - late, heads)
        if first == last:
            return
        group = q.shape[2] // heads
        kh, qh = slice(first, last), slice(first * group, last * group)
        dq, dout, q, out = (x[:, :, qh] for x in (dq, dout, q, out))
        k, v, lse = k[:, :, kh], v[:, :, kh], lse[:, qh]
        dkv[0, :, :, kh], dkv[1, :, :, kh] = self.attend_backward(
            dq, dout, q, k, v, out, lse, self.mine, self.mine
        )


@lru_cache(maxsize=64)
def _edges(sharding: Sharding) -> tuple[list[int], list[int]]:
    runs = [sharding.runs(r) for r in range(sharding.world)]
    return sorted(r[0].start for r in runs)[:2], sorted(r[-1].last for r in runs)[-2:]


def _first_elsewhere(sharding: Sharding, rank: int) -> int:
    """The first position that a rank other than `rank` holds (seqlen if there is none)."""
    first = [*_edges(sharding)[0], sharding.seqlen]
    return first[1] if sharding.runs(rank)[0].start == first[0] else first[0]


def _last_elsewhere(sharding: Sharding, rank: int) -> int:
    """The last position that a rank other than `rank` holds (-1 if there is none)."""
    last = [-1, *_edges(sharding)[1]]
    return last[-2] if sharding.runs(rank)[-1].last == last[-1] else last[-1]
