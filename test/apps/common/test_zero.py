"""apps/common/zero.py: with DeepSpeed's ZeRO 1 to 3 training is what one process does.

Checkpoints go from engine to engine.

pytest test/apps/common/test_zero.py      (needs deepspeed: pip install deepspeed)
"""

import importlib.util
import math
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers.paths import PROGRAMS

import ringx.launch
from apps.common import zero
from ringx.launch.mesh import Shape

sys.path.insert(0, str(PROGRAMS))
import zero_rank_functions

KINDS = ("zero1", "zero2", "zero3")
CP2, DP2 = Shape(cp=2), Shape(dp=2)
needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed"
)


@pytest.fixture(autouse=True)
def imports(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(zero_rank_functions.__file__).parent), prepend=":")


def on(shape, engine, *args, **changed):
    return ringx.launch.run(
        partial(zero_rank_functions.train, shape=shape, engine=engine, **changed),
        shape.world_size,
        *args,
    )


@pytest.fixture(scope="module")
def alone():
    return on(Shape(), "fsdp")[0]


def expect_same(results, expected, tolerance=1e-4):
    for records, state in results:
        assert len(records) == len(expected[0])
        for a, b in zip(records, expected[0], strict=True):
            assert all(math.isclose(x, y, rel_tol=tolerance) for x, y in zip(a, b, strict=True)), (
                a,
                b,
            )
        assert state.keys() == expected[1].keys()
        for name, value in expected[1].items():
            assert state[name].shape == value.shape and state[name].dtype == value.dtype, name
            assert (state[name] - value).abs().max().item() <= tolerance, name


# ---- the same training


@needs_deepspeed
@pytest.mark.parametrize("shape", [CP2, DP2], ids=["cp2", "dp2"])
@pytest.mark.parametrize("kind", KINDS)
def test_twenty_steps_equal_one_process(kind, shape, alone):
    expect_same(on(shape, kind), alone)
    assert alone[0][0][0] - alone[0][-1][2] > 0.3
    assert any(norm > 0.5 for _, norm, _ in alone[0][1::2]), "nothing was clipped"


@needs_deepspeed
@pytest.mark.parametrize("kind", KINDS)
def test_passes_and_partitions_that_nothing_divides(kind):
    """Three ranks, two passes a step.

    The model has an output projection of its own, which it uses without calling it."""
    expected = on(Shape(), "fsdp", model={"tied": False}, steps=3)[0]
    expect_same(on(Shape(cp=3), kind, model={"tied": False}, steps=3, micro_batch=2), expected)


@needs_deepspeed
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "how",
    [{"checkpointing": "selective", "mlp_tiles": 3}, {"checkpointing": "full"}],
    ids=["selective", "full"],
)
def test_activations_computed_again(kind, how):
    expect_same(on(CP2, kind, steps=3, **how), on(Shape(), "fsdp", steps=3)[0])


@needs_deepspeed
@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_is_what_fsdp_does(kind):
    """To the bit, until clipping.

    DeepSpeed adds 1e-6 to the norm, and what bfloat16 then rounds the other way grows."""
    expected = on(DP2, "fsdp", steps=2, dtype="bfloat16", micro_batch=1)[0]
    expect_same(on(DP2, kind, steps=2, dtype="bfloat16", micro_batch=1), expected)


@needs_deepspeed
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_first_weights_are_those_of_the_seed_and_nan_changes_nothing(kind, dtype):
    for right, norm, kept, kind_of in ringx.launch.run(
        partial(zero_rank_functions.check_initial_state, engine=kind, dtype=dtype), 3
    ):
        assert right and kept and not math.isfinite(norm) and kind_of is getattr(torch, dtype)


# ---- checkpoints


@needs_deepspeed
@pytest.mark.parametrize("to", ["fsdp", "alone", "zero"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_goes_on_with_another_engine(kind, to, alone, tmp_path):
    on(CP2, kind, steps=10, save=str(tmp_path))
    shape, engine = {
        "fsdp": (DP2, "fsdp"),
        "alone": (Shape(), "fsdp"),
        "zero": (Shape(cp=3), kind),
    }[to]
    expect_same(on(shape, engine, first=10, load=str(tmp_path)), (alone[0][10:], alone[1]))


@needs_deepspeed
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_of_fsdp_goes_on(kind, dtype, tmp_path):
    on(CP2, "fsdp", steps=5, save=str(tmp_path), dtype=dtype)
    expected = on(CP2, "fsdp", first=5, steps=6, load=str(tmp_path), dtype=dtype)[0]
    expect_same(on(CP2, kind, first=5, steps=6, load=str(tmp_path), dtype=dtype), expected)
    (_, state), *_ = on(DP2, kind, first=5, steps=5, load=str(tmp_path), dtype=dtype)
    _, there = on(Shape(), "fsdp", first=5, steps=5, load=str(tmp_path), dtype=dtype)[0]
    assert state.keys() == there.keys() and all(
        torch.equal(state[name], value) for name, value in there.items()
    )


# ---- refusals


def test_what_is_refused_is_named(monkeypatch):
    monkeypatch.setattr(zero.importlib.util, "find_spec", lambda name: object())
    can = partial(zero.expect_possible, optimizer="adamw", dtype=torch.bfloat16)
    for kind in ("fsdp", "ddp", *KINDS):
        can(kind)
    for optimizer in ("lamb", "lamb_apex", "lamb_deepspeed"):
        with pytest.raises(
            ValueError, match=rf"--dp-engine zero2 .*--optimizer {optimizer}:.*--optimizer adamw"
        ):
            can("zero2", optimizer=optimizer)
    with pytest.raises(ValueError, match=r"--dp-engine zero1: .*not float64"):
        can("zero1", dtype=torch.float64)
    with pytest.raises(ValueError, match=r"--dp-engine zero3: .*not float64"):
        can("zero3", reduce_dtype=torch.float64)
    can("fsdp", optimizer="lamb", dtype=torch.float64)


def test_without_deepspeed_the_remedy_is_named(monkeypatch):
    monkeypatch.setattr(zero.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match=r"--dp-engine zero3: DeepSpeed is not installed; pip install deepspeed"
    ):
        zero.expect_possible("zero3", optimizer="adamw", dtype=torch.float32)
    zero.expect_possible("ddp", optimizer="adamw", dtype=torch.float32)


def test_deepspeed_is_imported_only_when_asked_for():
    assert "deepspeed" not in sys.modules
