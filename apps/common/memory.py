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
    """What a block keeps for the backward; ``Training`` documents the fields."""

    checkpointing: str = "none"
    mlp_tiles: int = 1
    offload: bool = False

    @classmethod
    def from_config(cls, train: Training) -> "ActivationMemory":
        return cls(train.checkpointing, train.mlp_tiles, train.offload)

    def block(self, layers: Callable[..., Tensor], x: Tensor, *args: Any) -> Tensor:
        """layers(x, *args), checkpointed.

        To be called inside the block and not around it, so that what wraps the block (FSDP's
        gathering) happens once a pass."""
        if self.checkpointing == "none" or not torch.is_grad_enabled():
            return layers(x, *args)
        checkpointed = partial(
            checkpoint, layers, x, *args, use_reentrant=False, preserve_rng_state=False
        )
        if self.checkpointing == "selective":
            contexts = partial(create_selective_checkpoint_contexts, _keep_attention)
            checkpointed = partial(checkpointed, context_fn=contexts)
        if self.offload:
            with torch.autograd.graph.save_on_cpu(pin_memory=x.device.type != "cpu"):
                return checkpointed()
        return checkpointed()

    def add_mlp(self, x: Tensor, mlp: Callable[[Tensor], Tensor], mlp_input: Tensor) -> Tensor:
        """x + mlp(mlp_input), both [B, S, C], a tile of the tokens at a time.

        The inner activations of two tiles never exist together, in backward either."""
        if self.mlp_tiles == 1:
            return x + mlp(mlp_input)
        x_tiles = x.tensor_split(self.mlp_tiles, dim=1)
        input_tiles = mlp_input.tensor_split(self.mlp_tiles, dim=1)
        # Each tile is added on its own: that waits for its collective under tp, also where a
        # checkpoint around all this stops after the last tile.
        sums = []
        for x_tile, input_tile in zip(x_tiles, input_tiles, strict=True):
            result = checkpoint(mlp, input_tile, use_reentrant=False, preserve_rng_state=False)
            sums.append(x_tile + result)
        return torch.cat(sums, dim=1)


def _keep_attention(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Selective checkpointing: attention's result is kept, the rest is cheap to compute again.

    So attention's remote blocks are not fetched again."""
    if op is torch.ops.ringx.attention.default:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE
