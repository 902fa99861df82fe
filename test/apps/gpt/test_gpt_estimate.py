"""The GPT's estimate equals closed forms; FLOPs and parameters equal torch's counts.

That it equals what real steps hold and send: test/apps/common/test_estimate.py.
"""

import dataclasses
import json
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import ringx
from apps.common.config import MeshConfig
from apps.gpt.config import Config, ModelConfig, TrainConfig, preset
from apps.gpt.estimate import estimate_step
from apps.gpt.flops import flops_per_token, parameters
from apps.gpt.model import Llama
from apps.gpt.train import main
from ringx.launch.mesh import Shape

MODEL = ModelConfig(dim=128, layers=2, heads=4, kv_heads=2, ffn=384, vocab=512, tied=False)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def config(model=MODEL, mesh=None, **train) -> Config:
    defaults = dict(seqlen=512, global_batch=2, dtype="float32", loss_chunk=128)
    return Config("test", model, TrainConfig(**(defaults | train)), MeshConfig(**(mesh or {})))


@pytest.mark.parametrize(
    "algorithm",
    [
        "ringx3",
        *(pytest.param(a, marks=pytest.mark.slow) for a in ringx.algorithms() if a != "ringx3"),
    ],
)
def test_bytes_equal_closed_forms(algorithm):
    shape, c = (
        Shape(4, 1, 2),
        config(algorithm=algorithm, checkpointing="selective", global_batch=4),
    )
    estimates = [estimate_step(c, shape, rank) for rank in range(4)]
    form = ringx.algorithms()[algorithm].bytes(
        2, 512, MODEL.heads, MODEL.kv_heads, MODEL.head_dim, 4, 4, True, "zigzag"
    )
    for direction, want in zip(("forward", "backward"), form, strict=True):
        got = [sum(e.sent[f"attention {direction}"].values()) for e in estimates]
        assert sum(got) / 4 == pytest.approx(MODEL.layers * want)

    # Each block is gathered in the forward and again in the backward; the rest of the model stays
    # gathered in between.
    total, n = parameters(MODEL).total, shape.world_size
    rest = 2 * MODEL.vocab * MODEL.dim + MODEL.dim
    for e in estimates:
        assert e.sent["parameters"] == {"all_gather": (2 * total - rest) * 4 * (n - 1) / n}
        assert e.sent["gradients"] == {"reduce_scatter": total * 4 * (n - 1) / n}


@pytest.mark.fast
@pytest.mark.parametrize("engine", ["fsdp", "ddp"])
def test_what_is_kept_equals_closed_forms(engine):
    estimate = estimate_step(config(mesh={"dp_engine": engine}), Shape(2, 1, 2))
    shards = 4 if engine == "fsdp" else 1
    number = parameters(MODEL).total / shards
    tensors = 2 + 9 * MODEL.layers + 1
    assert estimate.memory.parameters == estimate.memory.gradients == 4 * number
    assert (
        estimate.memory.optimizer == 2 * 4 * number + 4 * tensors
    )  # and each one's count of steps
    assert (
        estimate.memory.remote_blocks == 2 * 2 * 512 * MODEL.kv_heads * MODEL.head_dim * 4 // 2
    )  # all keys and values of a sequence
    if engine == "ddp":
        assert estimate.sent["gradients"] == {"all_reduce": 2 * 4 * number * 3 / 4}


def test_8b_at_a_million_tokens_on_4096_ranks():
    """With 4 of its 32 layers, which are all alike: the whole takes half a minute."""
    whole = preset("8b-1m")
    assert parameters(whole.model).total == 8_030_261_248
    estimate = estimate_step(
        replace(whole, model=replace(whole.model, layers=4)), Shape(cp=128, dp=32)
    )
    gib = 2**30
    assert estimate.tokens == 32 * 2**20
    # Shards are padded, and a dimension of 1,024 cannot be cut over 4,096 ranks: rank 0 has a row.
    assert 1 < estimate.memory.parameters / (estimate.parameters * 4 / 4096) < 1.5
    assert (
        estimate.memory.remote_blocks == 2 * 2**20 * 8 * 128 * 2
    )  # keys and values of the whole sequence in bf16
    assert 10 * gib < estimate.memory.peak < 64 * gib
    form = ringx.algorithms()["ringx3"].bytes(1, 2**20, 32, 8, 128, 128, 2, True)
    assert sum(estimate.sent["attention forward"].values()) == 4 * form[0]
    assert max(map(len, estimate.table().splitlines())) <= 100
    assert (
        json.loads(json.dumps(dataclasses.asdict(estimate)))["memory"]["peak"]
        == estimate.memory.peak
    )
    assert estimate.table(memory_only=True) == "\n".join(estimate.table().splitlines()[:9])


@pytest.mark.fast
@pytest.mark.parametrize("flag", ["--estimate", "--dry-run"])
def test_the_command(flag, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["--preset", "tiny", "--cp", "2", "--dp", "2", flag]) == 0
    said = capsys.readouterr().out
    assert "peak, of which" in said and not list(tmp_path.iterdir())
    assert ("attention forward" in said and "cp 2 x tp 1 x dp 2" in said) == (flag == "--dry-run")


@pytest.mark.fast
def test_refused():
    with pytest.raises(ValueError, match="dp_engine=zero2"):
        estimate_step(config(mesh={"dp_engine": "zero2"}), Shape(2))
    with pytest.raises(ValueError, match="tp=3 does not divide"):
        estimate_step(config(), Shape(1, 3))
    with pytest.raises(ValueError, match="rank=4"):
        estimate_step(config(), Shape(4), rank=4)
    assert not dist.is_initialized()


# ---- FLOPs and parameters


def plain(q, k, v):
    heads = (x.transpose(1, 2) for x in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(
        *heads, is_causal=True, enable_gqa=True
    ).transpose(1, 2)


@pytest.mark.fast
@pytest.mark.parametrize("tied", [True, False])
def test_flops_and_parameters_are_those_that_torch_counts(tied):
    model = replace(MODEL, tied=tied)
    llama = Llama.make(model, plain, seed=0, dtype=torch.float32)
    assert parameters(model).total == sum(p.numel() for p in llama.parameters())
    S = 256
    with (
        FlopCounterMode(display=False) as counter,
        sdpa_kernel(SDPBackend.MATH),
    ):  # those of its kernel for CPUs it does not know
        llama(torch.zeros(2, S, dtype=torch.long), torch.arange(S)).sum().backward()
    per_token = flops_per_token(model, S)
    assert counter.get_total_flops() == 2 * S * per_token.full
    assert per_token.full - per_token.causal == 6 * model.layers * model.heads * model.head_dim * S


@pytest.mark.fast
def test_parameters_of_known_models():
    assert parameters(preset("8b").model).total == 8_030_261_248
    assert parameters(preset("1b").model).total == 1_235_814_400
