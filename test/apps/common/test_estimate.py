"""The estimate equals what a real step of the same configuration holds and sends.

The machinery is the same for all trainers; here it estimates the GPT.

python -m pytest test/apps/common/test_estimate.py
"""

from dataclasses import replace

import pytest
import torch
from helpers.real_steps import expect_estimated, measured_steps

from apps.common.config import MeshConfig
from apps.common.estimate import _alone
from apps.gpt import parallel
from apps.gpt.config import Config, ModelConfig, TrainConfig
from apps.gpt.estimate import estimate_step
from ringx.launch.mesh import Shape

MODEL = ModelConfig(dim=128, layers=2, heads=4, kv_heads=2, ffn=384, vocab=512, tied=False)


def config(model=MODEL, **train) -> Config:
    defaults = dict(seqlen=512, global_batch=2, dtype="float32", loss_chunk=128)
    return Config("test", model, TrainConfig(**(defaults | train)), MeshConfig())


def make_batch(config: Config, samples: int, tokens: int) -> tuple[torch.Tensor, ...]:
    """Tokens, positions, labels."""
    size = (samples, tokens)
    return tuple(torch.zeros(n, dtype=torch.long) for n in (size, size[1:], size))


def measured(c: Config, shape: Shape) -> list[tuple[int, float, float]]:
    return measured_steps(c, shape, parallel, make_batch, c.train.seqlen)


@pytest.mark.parametrize(
    ("shape", "changes"),
    [
        (Shape(), {}),
        (Shape(2, 2), {"checkpointing": "selective", "mlp_tiles": 2}),
        (Shape(2, 1, 2), {"checkpointing": "selective", "dp_engine": "ddp", "dtype": "bfloat16"}),
        *(
            pytest.param(shape, changes, marks=pytest.mark.slow)
            for shape, changes in (
                (Shape(), {"checkpointing": "selective", "mlp_tiles": 4, "dtype": "bfloat16"}),
                (Shape(4), {"checkpointing": "selective", "mlp_tiles": 4}),
                (Shape(4), {"checkpointing": "full", "dtype": "bfloat16", "algorithm": "ringx4"}),
                (Shape(2, 1, 2, 2), {"mlp_tiles": 2, "global_batch": 8, "micro_batch": 2}),
            )
        ),
    ],
    ids=str,
)
def test_peak_and_bytes_of_attention_are_those_of_a_real_run(shape, changes):
    c = config().changed(changes)
    expect_estimated(estimate_step(c, shape), measured(c, shape)[0])


def test_passes_are_multiplied():
    once = estimate_step(config(global_batch=2), Shape(2))
    many = estimate_step(config(global_batch=10, micro_batch=2), Shape(2))
    assert many.passes == 5 and many.flops_full == pytest.approx(5 * once.flops_full)
    for purpose in ("attention forward", "attention backward"):
        assert sum(many.sent[purpose].values()) == 5 * sum(once.sent[purpose].values())
    assert many.sent["gradients"] == once.sent["gradients"]


def test_a_rank_of_four_holds_little_more_than_one_process_with_its_tokens():
    """With four times the tokens on four ranks: memory per rank does not grow with the sequence."""
    model = replace(MODEL, kv_heads=1)
    alone, four = (
        config(model, seqlen=s, global_batch=1, checkpointing="selective", mlp_tiles=2)
        for s in (512, 2048)
    )
    assert max(r[0] for r in measured(four, Shape(4))) <= 1.15 * measured(alone, Shape())[0][0]
    alone, four = (
        config(model, seqlen=s, global_batch=1, checkpointing="selective", mlp_tiles=2)
        for s in (2048, 8192)
    )
    assert (
        estimate_step(four, Shape(4)).memory.peak
        <= 1.15 * estimate_step(alone, Shape()).memory.peak
    )


@pytest.mark.fast
def test_it_is_made_outside_of_process_groups():
    with _alone(2, 0), pytest.raises(RuntimeError, match="process of its own"):
        estimate_step(config(), Shape(2))
