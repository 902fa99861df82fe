"""apps/gpt: the same training on any mesh, with every engine, algorithm and way to save memory.

pytest test/apps/gpt/test_gpt.py
"""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from helpers.ranks import attempt, run

import ringx
from apps.common.config import MeshConfig
from apps.gpt.config import Config, ModelConfig, TrainConfig
from apps.gpt.data.dataset import open_dataset
from apps.gpt.data.prepare import prepare
from apps.gpt.model import Llama
from apps.gpt.parallel import Attend, build
from apps.gpt.train import train
from ringx.launch.mesh import ORDERS, Mesh, Shape

MODEL = ModelConfig(dim=32, layers=2, heads=4, kv_heads=2, ffn=48, vocab=264)
TRAIN = TrainConfig(
    seqlen=64, global_batch=4, steps=20, lr=1e-2, warmup=3, dtype="float64", loss_chunk=24
)


def config(model=None, mesh=None, **changes) -> Config:
    return Config(
        "test",
        replace(MODEL, **(model or {})),
        replace(TRAIN, **changes),
        replace(MeshConfig(), **(mesh or {})),
    )


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    """Bytes of this repository's own text."""
    folder = tmp_path_factory.mktemp("data")
    prepare([ringx.__path__[0]], folder, tokenizer="bytes")
    return open_dataset(folder)


def trained(shape: Shape, c: Config, tokens, **how):
    """(records, whole parameters) of every rank."""

    def rank(_):
        mesh, records = Mesh.make(shape), []
        attend = Attend(c, mesh)
        engine = build(c, mesh, attend)
        train(c, tokens, mesh, engine, attend, on_step=records.append, **how)
        return records, {n: p.detach() for n, p in whole(engine.module)}

    return run(shape.world_size, rank, timeout=60)


def whole(model):
    # Cloned, because a result that nobody uses is never waited for, and keeps its process group
    # (and threads) alive.
    return [
        (n, p.full_tensor().clone() if hasattr(p, "full_tensor") else p)
        for n, p in model.named_parameters()
    ]


def expect_same(a, b, tolerance=1e-9):
    """Losses, gradient norms and every parameter.

    AdamW itself would not notice a gradient scaled by the number of ranks."""
    assert len(a[0]) == len(b[0])
    for x, y in zip(a[0], b[0], strict=True):
        for what in ("loss", "grad_norm"):
            assert math.isclose(x[what], y[what], rel_tol=tolerance), (x, y)
    assert a[1].keys() == b[1].keys()
    for name, p in a[1].items():
        worst = (p - b[1][name]).abs().max().item()
        assert worst <= tolerance * max(1.0, p.abs().max().item()), name


@pytest.fixture(scope="module")
def alone(tokens):
    return trained(Shape(), config(), tokens)[0]


# ---- the same training


@pytest.mark.parametrize(
    "sizes",
    [
        (3, 1, 1),
        (1, 2, 1),
        (2, 1, 2),
        pytest.param((2, 1, 1), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_twenty_steps_equal_one_process(sizes, tokens, alone):
    for rank in trained(Shape(*sizes), config(), tokens):
        expect_same(alone, rank)
    assert alone[0][0]["loss"] - alone[0][-1]["loss"] >= 0.3


@pytest.mark.parametrize(  # test_mesh.py has them all
    "order", [ORDERS[3], pytest.param(ORDERS[5], marks=pytest.mark.slow)]
)
def test_any_order_of_the_axes(order, tokens):
    one = trained(Shape(), config(steps=2), tokens)[0]
    expect_same(one, trained(Shape(2, 1, 2, order=order), config(steps=2), tokens)[3])


def test_replicas_of_shards_with_untied_head_and_odd_length(tokens):
    c = config({"tied": False}, seqlen=61, steps=4)
    one = trained(Shape(), c, tokens)[0]
    assert "lm_head.weight" in one[1]
    for rank in trained(Shape(2, 1, 2, replicate=2), c, tokens):
        expect_same(one, rank)


@pytest.mark.parametrize(
    "sizes",
    [
        (2, 1, 2),
        pytest.param((2, 1, 1), marks=pytest.mark.slow),
        pytest.param((1, 1, 2), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_ddp(sizes, tokens):
    one = trained(Shape(), config(steps=4), tokens)[0]
    for rank in trained(
        Shape(*sizes), config(steps=4, mesh={"dp_engine": "ddp"}, micro_batch=1), tokens
    ):
        expect_same(one, rank)


@pytest.mark.parametrize(
    "algorithm, layout",
    [
        ("ringx3", "contiguous"),
        ("ringx4", "striped"),
        # test_exact.py proves each of them exact; here it is seen to be handed on
        *(pytest.param(a, "zigzag", marks=pytest.mark.slow) for a in ringx.algorithms()),
    ],
)
def test_every_algorithm_and_layout(algorithm, layout, tokens):
    one = trained(Shape(), config(steps=3), tokens)[0]
    overlap = layout != "contiguous"
    expect_same(
        one,
        trained(
            Shape(2), config(steps=3, algorithm=algorithm, layout=layout, overlap=overlap), tokens
        )[1],
    )


@pytest.mark.parametrize(
    "optimizer, how",
    [
        ("adamw", {"checkpointing": "full", "mlp_tiles": 3}),
        ("adamw", {"checkpointing": "selective", "mlp_tiles": 2, "micro_batch": 1}),
        ("lamb", {"mlp_tiles": 5, "micro_batch": 2, "loss_chunk": 1000}),
    ],
    ids=str,
)
def test_saving_memory_and_accumulating_change_nothing(optimizer, how, tokens):
    one = trained(Shape(), config(steps=3, optimizer=optimizer), tokens)[0]
    expect_same(one, trained(Shape(2), config(steps=3, optimizer=optimizer, **how), tokens)[0])


def test_tiles_and_checkpointing_under_tp(tokens):
    one = trained(Shape(), config(steps=2), tokens)[0]
    c = config(steps=2, checkpointing="selective", mlp_tiles=2, micro_batch=1)
    expect_same(one, trained(Shape(2, 2), c, tokens)[3])


@pytest.mark.fast
def test_equals_a_plain_trainer(tokens, alone):
    """The whole recipe once more, with none of this repository's code but data and model.

    Attention and mean loss are torch's; clipping, schedule and AdamW are written out."""
    c, state = TRAIN, {}
    model = Llama.make(MODEL, sdpa, seed=0, dtype=torch.float64)
    for step, record in enumerate(alone[0]):
        x, labels, _ = tokens.rows(
            step, global_batch=4, seqlen=c.seqlen, seed=c.seed, rows=range(4)
        )
        loss = F.cross_entropy(model(x, torch.arange(c.seqlen)).flatten(0, 1), labels.flatten())
        model.zero_grad()
        loss.backward()
        norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
        clip = min(1.0, 1.0 / norm.item())
        assert math.isclose(loss.item(), record["loss"], rel_tol=1e-9)
        assert math.isclose(norm.item(), record["grad_norm"], rel_tol=1e-9)
        lr = (
            c.lr * (step + 1) / 3
            if step < 3
            else c.lr * (0.55 + 0.45 * math.cos(math.pi * (step - 2) / 17))
        )
        assert math.isclose(lr, record["lr"], rel_tol=1e-12)
        with torch.no_grad():
            for name, p in model.named_parameters():
                m, v = state.get(name, (0, 0))
                g = p.grad * clip
                state[name] = m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g**2
                p -= lr * 0.1 * p * (p.dim() > 1)  # decay of matrices only
                p -= (
                    lr
                    * (m / (1 - 0.9 ** (step + 1)))
                    / ((v / (1 - 0.95 ** (step + 1))).sqrt() + 1e-8)
                )
    for name, p in model.state_dict().items():
        assert (p - alone[1][name]).abs().max() <= 1e-9, name
    assert max(r["grad_norm"] for r in alone[0]) > 1  # it did clip


def sdpa(q, k, v):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


@pytest.mark.parametrize(
    "shape, tied",
    [
        pytest.param(Shape(3), True, marks=pytest.mark.fast),
        (Shape(2, 2), False),
        (Shape(1, 2), True),
        pytest.param(Shape(3), False, marks=pytest.mark.slow),
        pytest.param(Shape(2, 2), True, marks=pytest.mark.slow),
        pytest.param(Shape(1, 2), False, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_gradient_of_every_parameter_equals_plain_sdpa(shape, tied, tokens):
    """The independent side: torch's own attention on the whole sequence and mean over tokens."""
    c = config({"tied": tied}, seqlen=56)
    x, labels, _ = tokens.rows(3, global_batch=2, seqlen=56, seed=0, rows=range(2))
    labels = labels.clone()
    labels[0, 5:30] = -100  # ranks then hold unequal numbers of labels
    plain = Llama.make(c.model, sdpa, seed=0, dtype=torch.float64)
    F.cross_entropy(plain(x, torch.arange(56)).flatten(0, 1), labels.flatten()).backward()
    want = {name: p.grad for name, p in plain.named_parameters()}

    def rank(_):
        mesh = Mesh.make(shape)
        attend = Attend(c, mesh)
        engine = build(c, mesh, attend)
        mine = [ringx.shard(t, group=mesh.cp, layout=attend.layout) for t in (x, labels)]
        where = ringx.positions(56, group=mesh.cp, layout=attend.layout)
        with engine.accumulate(last=True):
            engine.backward(engine(mine[0], where, mine[1]) / (labels != -100).sum())
        return {
            n: getattr(p.grad, "full_tensor", lambda p=p: p.grad)()
            for n, p in engine.module.named_parameters()
        }

    for got in run(shape.world_size, rank):
        assert got.keys() == want.keys()
        for name, g in want.items():
            torch.testing.assert_close(got[name], g, rtol=1e-9, atol=1e-13, msg=name)


# ---- what is asked for is done


@pytest.mark.fast
def test_what_is_asked_for_reaches_attention(tokens, monkeypatch):
    seen = []
    attention = ringx.attention
    monkeypatch.setattr(
        ringx, "attention", lambda *qkv, **kw: (seen.append(kw), attention(*qkv, **kw))[1]
    )
    c = config(
        steps=2, seqlen=63, algorithm="ringx4", layout="striped", kernel="reference", overlap=False
    )
    trained(Shape(2), c, tokens)
    want = {
        "algorithm": "ringx4",
        "layout": ringx.Sharding(63, 2, "striped"),
        "kernel": "reference",
        "overlap": False,
        "causal": True,
    }
    assert seen and all(kw.items() >= want.items() for kw in seen)
    assert [kw["check"] for kw in seen].count(True) == len(seen) / 2  # in the first of two steps


@pytest.mark.fast
@pytest.mark.parametrize("checkpointing, times", [("none", 1), ("selective", 1), ("full", 2)])
def test_selective_checkpointing_never_attends_again(checkpointing, times, tokens, monkeypatch):
    import ringx.patterns.gather_kv as pattern

    calls, forward = [], pattern.forward
    monkeypatch.setattr(pattern, "forward", lambda *a: (calls.append(0), forward(*a))[1])
    trained(Shape(), config(steps=1, checkpointing=checkpointing, mlp_tiles=2), tokens)
    assert len(calls) == times * MODEL.layers


@pytest.mark.fast
def test_offload_saves_on_the_host(tokens, monkeypatch):
    """On a GPU these would be copies; here only the use of the hook can be seen."""
    used, hook = [], torch.autograd.graph.save_on_cpu
    monkeypatch.setattr(
        torch.autograd.graph, "save_on_cpu", lambda **kw: (used.append(kw), hook(**kw))[1]
    )
    one = trained(Shape(), config(steps=2), tokens)[0]
    assert not used
    expect_same(
        one, trained(Shape(), config(steps=2, checkpointing="full", offload=True), tokens)[0]
    )
    assert used == [{"pin_memory": False}] * 2 * MODEL.layers


def test_second_run_is_bitwise_the_same(tokens):
    a, b = (trained(Shape(2), config(steps=5), tokens)[0] for _ in range(2))
    assert [r["loss"] for r in a[0]] == [r["loss"] for r in b[0]]
    assert all(torch.equal(p, b[1][name]) for name, p in a[1].items())


@pytest.mark.fast
def test_seed_changes_weights_and_order(tokens):
    a, b = (trained(Shape(), config(steps=1, seed=seed), tokens)[0] for seed in (0, 1))
    assert a[0][0]["loss"] != b[0][0]["loss"]
    assert not torch.equal(a[1]["embed_tokens.weight"], b[1]["embed_tokens.weight"])


@pytest.mark.parametrize("engine", ["fsdp", pytest.param("ddp", marks=pytest.mark.slow)])
def test_fp32_and_bf16_keep_fp32_parameters(engine, tokens, monkeypatch):
    wide = trained(Shape(), config(steps=8), tokens)[0]
    seen, attention = [], ringx.attention
    monkeypatch.setattr(
        ringx,
        "attention",
        lambda q, k, v, **kw: (seen.append(q.dtype), attention(q, k, v, **kw))[1],
    )
    for dtype, tolerance in (("float32", 1e-4), ("bfloat16", 3e-2)):
        got = trained(Shape(2), config(steps=8, dtype=dtype, mesh={"dp_engine": engine}), tokens)[0]
        assert {p.dtype for p in got[1].values()} == {torch.float32}
        for x, y in zip(wide[0], got[0], strict=True):
            assert math.isclose(x["loss"], y["loss"], rel_tol=tolerance)
        assert set(seen) == {getattr(torch, dtype)}
        seen.clear()


def test_validation_does_not_disturb_training(tokens):
    plain = trained(Shape(), config(steps=4), tokens)[0]
    c = config(steps=4, val_every=2, val_batches=2)
    one, two = (trained(shape, c, tokens, val=tokens)[0] for shape in (Shape(), Shape(2, 1, 2)))
    expect_same(plain, one)
    losses = [[r["val_loss"] for r in run[0] if "val_loss" in r] for run in (one, two)]
    assert len(losses[0]) == 2 and losses[0] == pytest.approx(losses[1], rel=1e-9)
    model = Llama.make(MODEL, sdpa, seed=0, dtype=torch.float64)
    model.load_state_dict(one[1])
    want = [tokens.rows(i, global_batch=4, seqlen=64, seed=0, rows=range(4)) for i in range(2)]
    with torch.no_grad():
        by_hand = [
            F.cross_entropy(model(x, torch.arange(64)).flatten(0, 1), y.flatten()).item()
            for x, y, _ in want
        ]
    assert losses[0][1] == pytest.approx(sum(by_hand) / 2, rel=1e-12)


def test_a_loss_that_is_not_finite_stops_the_run_on_all_ranks(tokens):
    with pytest.raises(FloatingPointError, match=r"step \d+: loss"):
        trained(Shape(), config(lr=1e300, clip=0.0), tokens)

    def rank(_):
        c, mesh = config(lr=1e300, clip=0.0), Mesh.make(Shape(2))
        attend = Attend(c, mesh)
        train(c, tokens, mesh, build(c, mesh, attend), attend)

    assert [type(e) for e in attempt(2, rank)] == [FloatingPointError] * 2


@pytest.mark.fast
def test_records_say_what_a_step_cost(tokens):
    c = config(steps=2)
    (records, _), *_ = trained(Shape(2), c, tokens)
    for n, r in enumerate(records):
        assert r["step"] == n and r["tokens"] == (n + 1) * 4 * 64 and 0 <= r["data_wait_share"] <= 1
        assert (
            r["tokens_per_s"] == pytest.approx(256 / r["seconds"])
            and r["peak_memory_bytes"] > 2**20
        )
        matmul = 2 * (32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 48) + 264 * 32
        full, causal = 6 * matmul + 2 * 12 * 32 * 64, 6 * matmul + 2 * 6 * 32 * 64
        per_rank = 256 / r["seconds"] / 2 / 1e12
        assert r["tflops_per_rank_full"] == pytest.approx(full * per_rank)
        assert r["tflops_per_rank_causal"] == pytest.approx(causal * per_rank)
        assert r["mfu_full"] is None  # of a CPU no peak is known
