"""What a transformer's block keeps for the backward, and what it computes again."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from .config import Training


@dataclass(frozen=True)
class ActivationMemory:
    """``Training`` documents the fields."""

    checkpointing: str = "none"
    mlp_tiles: int = 1
    offload: bool = False

    @classmethod
    def from_config(cls, c: Training) -> "ActivationMemory":
        return cls(c.checkpointing, c.mlp_tiles, c.offload)

    def block(self, layers: Callable[..., Tensor], x: Tensor, *args: Any) -> Tensor:
        """layers(x, *args), checkpointed.  To be called inside the block and not around it, so that what wraps the block (FSDP's
        gathering) happens once a pass."""
        if self.checkpointing == "none" or not torch.is_grad_enabled():
            return layers(x, *args)
        again = partial(checkpoint, layers, x, *args, use_reentrant=False, preserve_rng_state=False)
        if self.checkpointing == "selective":
            again = partial(
                again, context_fn=partial(create_selective_checkpoint_contexts, _keep_attention)
            )
        if self.offload:
            with torch.autograd.graph.save_on_cpu(pin_memory=x.device.type != "cpu"):
                return again()
        return again()

    def add_mlp(self, x: Tensor, mlp: Callable[[Tensor], Tensor], h: Tensor) -> Tensor:
        """x + mlp(h), both [B, S, C], a tile of the tokens at a time: their inner activations never exist together, in backward
        either."""
        if self.mlp_tiles == 1:
            return x + mlp(h)
        # Each is added on its own: that waits for its collective under tp, also where a checkpoint around all this stops after the
        # last tile
        tiles = zip(
            x.tensor_split(self.mlp_tiles, 1), h.tensor_split(self.mlp_tiles, 1), strict=True
        )
        return torch.cat(
            [
                a + checkpoint(mlp, b, use_reentrant=False, preserve_rng_state=False)
                for a, b in tiles
            ],
            dim=1,
        )


def _keep_attention(context, op, *args, **kwargs) -> CheckpointPolicy:
    """Selective checkpointing: attention's result is kept (its remote blocks are not fetched again); the rest is cheap to redo."""
    return (
        CheckpointPolicy.MUST_SAVE
        if op is torch.ops.ringx.attention.default
        else CheckpointPolicy.PREFER_RECOMPUTE
    )
