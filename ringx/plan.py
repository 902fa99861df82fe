"""One call of attention: everything about it that does not depend on the values in q, k and v.

A Plan is what a pattern may ask: which tokens this rank and others hold, which rows another rank
needs, and local attention of some queries against some keys, cut into what the mask leaves and
merged.
"""

import itertools
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch.profiler import record_function

from . import kernels
from .comm import Group, Transport
from .layout import Sharding, TokenRange, rows_upto
from .merge import OnlineSoftmax, acc_dtype
from .tiles import Tile, tiles


@dataclass(frozen=True)
class Plan:
    """One call, as one rank of its group sees it."""

    algorithm: str
    transport: Transport
    sharding: Sharding
    causal: bool
    scale: float
    kernel: str
    overlap: bool
    deterministic: bool

    @property
    def group(self) -> Group:
        return self.transport.group

    # ---- which rows

    def runs(self, rank: int) -> list[TokenRange]:
        """The ranges of global positions that `rank` holds."""
        return self.sharding.runs(rank)

    @cached_property
    def local_runs(self) -> list[TokenRange]:
        """The ranges of global positions that this rank holds."""
        return self.runs(self.group.rank)

    def visible_keys(self, src: int, by: int) -> slice:
        """Local rows of src's keys that some query of rank `by` sees."""
        if not self.causal:
            return slice(0, self.sharding.size(src))
        last_query = self.runs(by)[-1].last
        return slice(0, rows_upto(self.runs(src), last_query))

    def keys_to_send(self, src: int) -> slice:
        """Local rows of src's keys that some other rank sees: only these are worth sending."""
        if self.group.world_size == 1:
            return slice(0, 0)
        if not self.causal:
            return slice(0, self.sharding.size(src))
        last_query = _last_position_elsewhere(self.sharding, src)
        return slice(0, rows_upto(self.runs(src), last_query))

    def queries_to_send(self, dst: int) -> slice:
        """Local rows of dst's queries that see some other rank's keys."""
        size = self.sharding.size(dst)
        if self.group.world_size == 1:
            return slice(size, size)
        if not self.causal:
            return slice(0, size)
        first_key = _first_position_elsewhere(self.sharding, dst)
        return slice(rows_upto(self.runs(dst), first_key - 1), size)

    # ---- local attention of ranges of queries against ranges of keys

    @property
    def _kernel(self) -> kernels.Kernel:
        return kernels.load(self.kernel)

    def _subtiles(
        self, q_runs: list[TokenRange], k_runs: list[TokenRange], by_keys: bool
    ) -> list[Tile]:
        """What the mask leaves of these queries and keys, in tiles that the kernel can do."""
        window = (None, 0 if self.causal else None)
        whole_tiles = tiles(q_runs, k_runs, window=window, by_keys=by_keys)
        subtiles: list[Tile] = []
        for tile in whole_tiles:
            subtiles.extend(kernels.cut(tile, self._kernel.causal_alignment))
        return subtiles

    def attend(
        self,
        online: OnlineSoftmax,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        q_runs: list[TokenRange],
        k_runs: list[TokenRange],
    ) -> OnlineSoftmax:
        """Merges attention of q [B, Sq, H, D] over k and v [B, Sk, Hkv, D] into `online`, and
        returns it.

        The runs say which tokens the rows of q and of k and v are."""
        for tile in self._subtiles(q_runs, k_runs, by_keys=False):
            with record_function(f"{self.algorithm} forward: attend"):
                out, lse = self._kernel.forward(
                    q[:, tile.q],
                    k[:, tile.k],
                    v[:, tile.k],
                    band=(tile.lo, tile.hi),
                    scale=self.scale,
                )
                online.add(out, lse, tile.q)
        return online

    def attend_backward(
        self,
        dq: torch.Tensor,
        dout: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        q_runs: list[TokenRange],
        k_runs: list[TokenRange],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Adds to dq (in the accumulator's dtype); returns dk, dv like k, v (in the accumulator's
        dtype where several tiles add up).  `out` and `lse` are those of the whole rows of q, over
        the keys of all ranks."""
        subtiles = self._subtiles(q_runs, k_runs, by_keys=True)
        if len(subtiles) == 1 and subtiles[0].k == slice(0, k.shape[1]):
            return self._differentiate(subtiles[0], dq, dout, q, k, v, out, lse)
        written_once = all(a.k.stop <= b.k.start for a, b in itertools.pairwise(subtiles))
        dtype = k.dtype if written_once else acc_dtype(k.dtype)
        dk = torch.zeros(k.shape, dtype=dtype, device=k.device)
        dv = torch.zeros(v.shape, dtype=dtype, device=v.device)
        for tile in subtiles:
            tile_dk, tile_dv = self._differentiate(tile, dq, dout, q, k, v, out, lse)
            dk[:, tile.k] += tile_dk
            dv[:, tile.k] += tile_dv
        return dk, dv

    def _differentiate(
        self,
        tile: Tile,
        dq: torch.Tensor,
        dout: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Adds one tile's share to dq; returns dk, dv of the tile's keys."""
        with record_function(f"{self.algorithm} backward: attend"):
            tile_dq, tile_dk, tile_dv = self._kernel.backward(
                dout[:, tile.q],
                q[:, tile.q],
                k[:, tile.k],
                v[:, tile.k],
                out[:, tile.q],
                lse[:, :, tile.q],
                band=(tile.lo, tile.hi),
                scale=self.scale,
                deterministic=self.deterministic,
            )
        dq[:, tile.q] += tile_dq
        return tile_dk, tile_dv

    def attend_own_backward(
        self,
        half: int,
        dq: torch.Tensor,
        dkv: torch.Tensor,
        dout: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
    ) -> None:
        """The own block's share of dq and of dkv [2, B, S, Hkv, D], for one half of the heads: half
        0 hides the first block's arrival, half 1 the last gradients' way home.  Without overlap, or
        with one key/value head, half 0 is all."""
        kv_heads = k.shape[2]
        late_heads = kv_heads // 2 if self.overlap and self.group.world_size > 1 else 0
        early_heads = kv_heads - late_heads
        first, last = (0, early_heads) if half == 0 else (early_heads, kv_heads)
        if first == last:
            return
        queries_per_key = q.shape[2] // kv_heads
        k_heads = slice(first, last)
        q_heads = slice(first * queries_per_key, last * queries_per_key)
        dkv[0, :, :, k_heads], dkv[1, :, :, k_heads] = self.attend_backward(
            dq[:, :, q_heads],
            dout[:, :, q_heads],
            q[:, :, q_heads],
            k[:, :, k_heads],
            v[:, :, k_heads],
            out[:, :, q_heads],
            lse[:, q_heads],
            self.local_runs,
            self.local_runs,
        )


@lru_cache(maxsize=64)
def _extreme_positions(sharding: Sharding) -> tuple[list[int], list[int]]:
    """The two smallest first positions, and the two largest last positions, of all ranks."""
    runs = [sharding.runs(rank) for rank in range(sharding.world)]
    first = sorted(rank_runs[0].start for rank_runs in runs)
    last = sorted(rank_runs[-1].last for rank_runs in runs)
    return first[:2], last[-2:]


def _first_position_elsewhere(sharding: Sharding, rank: int) -> int:
    """The first position that a rank other than `rank` holds (seqlen if there is none)."""
    first = [*_extreme_positions(sharding)[0], sharding.seqlen]
    return first[1] if sharding.runs(rank)[0].start == first[0] else first[0]


def _last_position_elsewhere(sharding: Sharding, rank: int) -> int:
    """The last position that a rank other than `rank` holds (-1 if there is none)."""
    last = [-1, *_extreme_positions(sharding)[1]]
    return last[-2] if sharding.runs(rank)[-1].last == last[-1] else last[-1]
