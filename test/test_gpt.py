"""apps/gpt: the same training on any number of ranks, an independent Llama's logits, and clear refusals.

pytest test/test_gpt.py
"""

import itertools
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from ranks import attempt, run

import ringx
from apps.common.gradients import clip_gradients, differing, sum_gradients
from apps.common.log import read_log
from apps.common.schedule import warmup_cosine
from apps.gpt import data
from apps.gpt.config import IGNORE, PRESETS, Config, ModelConfig, TrainConfig
from apps.gpt.model import Llama, rope, token_loss
from apps.gpt.train import main, train

ROOT = Path(__file__).resolve().parents[1]
MODEL = ModelConfig(dim=32, layers=2, heads=4, kv_heads=2, ffn=48)
TRAIN = TrainConfig(seqlen=64, batch=2, steps=20, lr=1e-2, warmup=3, dtype="fp64")
LAYOUTS = ("zigzag", "contiguous", "striped")


def config(model=None, **train) -> Config:
    return Config("test", replace(MODEL, **(model or {})), replace(TRAIN, **train))


@pytest.fixture(scope="module")
def text() -> data.Text:
    return data.read()


def trained(world: int, c: Config, text: data.Text):
    """(records, parameters) of every rank."""

    def rank(_):
        records = []
        model = train(c, text, on_step=records.append)
        return records, model.state_dict()

    return run(world, rank, timeout=60)


def expect_same(a, b, tolerance=1e-9):
    """Losses, gradient norms (AdamW itself would not notice a gradient scaled by the number of ranks) and every parameter."""
    for x, y in zip(a[0], b[0], strict=True):
        for what in ("loss", "grad_norm"):
            assert math.isclose(x[what], y[what], rel_tol=tolerance), (x, y)
    assert a[1].keys() == b[1].keys()
    for name, p in a[1].items():
        worst = (p - b[1][name]).abs().max().item()
        assert worst <= tolerance, name
        assert worst <= tolerance * p.abs().max().item(), name


# ---- the same training


@pytest.fixture(scope="module")
def alone(text):
    return trained(1, config(), text)[0]


@pytest.mark.parametrize("world", [2, 4])
def test_twenty_steps_equal_one_process(world, text, alone):
    for rank in trained(world, config(), text):
        expect_same(alone, rank)
    first, last = alone[0][0]["loss"], alone[0][-1]["loss"]
    assert first - last >= 0.3


def test_odd_length_on_three_ranks_with_untied_head(text):
    c = config({"tied": False}, seqlen=61)
    one, many = trained(1, c, text)[0], trained(3, c, text)
    assert "lm_head.weight" in one[1]
    for rank in many:
        expect_same(one, rank)
    assert one[0][0]["loss"] - one[0][-1]["loss"] >= 0.3


@pytest.mark.parametrize("algorithm", sorted(ringx.algorithms()))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_algorithm_and_layout(algorithm, layout, text):
    one = trained(1, config(steps=4), text)[0]
    overlap = layout != "contiguous"
    expect_same(one, trained(2, config(steps=4, algorithm=algorithm, layout=layout, overlap=overlap), text)[1])


def test_equals_a_plain_trainer(text, alone):
    """The whole recipe once more, with none of this repository's code but data and model: torch's attention and mean
    loss; clipping, schedule and AdamW written out."""
    model = Llama.make(MODEL, sdpa, seed=0, dtype=torch.float64, device="cpu")
    c, state = TRAIN, {}
    for step, record in enumerate(alone[0]):
        tokens, labels = text.batch(step, batch=c.batch, seqlen=c.seqlen, seed=c.seed)
        loss = F.cross_entropy(model(tokens, torch.arange(c.seqlen)).flatten(0, 1), labels.flatten())
        model.zero_grad()
        loss.backward()
        norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
        clip = min(1.0, 1.0 / norm.item())
        assert math.isclose(loss.item(), record["loss"], rel_tol=1e-9)
        assert math.isclose(norm.item(), record["grad_norm"], rel_tol=1e-9)
        lr = c.lr * (step + 1) / 3 if step < 3 else c.lr * (0.55 + 0.45 * math.cos(math.pi * (step - 2) / 17))
        assert math.isclose(lr, record["lr"], rel_tol=1e-12)
        with torch.no_grad():
            for name, p in model.named_parameters():
                m, v = state.get(name, (0, 0))
                g = p.grad * clip
                state[name] = m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g**2
                p -= lr * 0.1 * p * (p.dim() > 1)  # decay of matrices only
                p -= lr * (m / (1 - 0.9 ** (step + 1))) / ((v / (1 - 0.95 ** (step + 1))).sqrt() + 1e-8)
    for name, p in model.state_dict().items():
        assert (p - alone[1][name]).abs().max() <= 1e-9, name
    assert max(r["grad_norm"] for r in alone[0]) > 1  # it did clip


def test_what_is_asked_for_reaches_attention(text, monkeypatch):
    seen = []
    attention = ringx.attention
    monkeypatch.setattr(ringx, "attention", lambda *qkv, **kw: (seen.append(kw), attention(*qkv, **kw))[1])
    c = config(steps=1, seqlen=63, algorithm="ringx4", layout="striped", kernel="reference", overlap=False)
    trained(2, c, text)
    want = {
        "algorithm": "ringx4",
        "layout": ringx.Sharding(63, 2, "striped"),
        "kernel": "reference",
        "overlap": False,
        "causal": True,
    }
    assert seen and all(kw.items() >= want.items() for kw in seen)


def test_second_run_is_bitwise_the_same(text):
    a, b = (trained(2, config(steps=5), text)[0] for _ in range(2))
    assert [r["loss"] for r in a[0]] == [r["loss"] for r in b[0]]
    assert all(torch.equal(p, b[1][name]) for name, p in a[1].items())


def test_seed_changes_weights_and_order(text):
    a, b = (trained(1, config(steps=1, seed=seed), text)[0] for seed in (0, 1))
    assert a[0][0]["loss"] != b[0][0]["loss"]
    assert not torch.equal(a[1]["embed_tokens.weight"], b[1]["embed_tokens.weight"])


def test_fp32_and_bf16_keep_fp32_parameters(text):
    wide = trained(1, config(steps=8), text)[0]
    for dtype, tolerance in (("fp32", 1e-3), ("bf16", 3e-2)):
        got = trained(2, config(steps=8, dtype=dtype), text)[0]
        assert {p.dtype for p in got[1].values()} == {torch.float32}
        for x, y in zip(wide[0], got[0], strict=True):
            assert math.isclose(x["loss"], y["loss"], rel_tol=tolerance)


def test_bf16_computes_in_bf16(text, monkeypatch):
    seen = []
    attention = ringx.attention
    monkeypatch.setattr(
        ringx, "attention", lambda q, k, v, **kw: (seen.extend((q.dtype, k.dtype, v.dtype)), attention(q, k, v, **kw))[1]
    )
    trained(1, config(steps=1, dtype="bf16"), text)
    assert set(seen) == {torch.bfloat16}


# ---- the pieces


def sdpa(q, k, v):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


def ringx_attend(layout, **kwargs):
    return lambda q, k, v: ringx.attention(q, k, v, causal=True, layout=layout, **kwargs)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("world", [2, 4])
def test_gradient_of_every_parameter_equals_plain_sdpa(world, tied, text):
    """The independent side: torch's own attention on the whole sequence, torch's own mean over tokens."""
    c = replace(MODEL, tied=tied)
    tokens, labels = text.batch(3, batch=2, seqlen=53, seed=0)
    labels = labels.clone()
    labels[0, 5:30] = IGNORE  # ranks then hold unequal numbers of labels
    plain = Llama.make(c, sdpa, seed=1, dtype=torch.float64, device="cpu")
    F.cross_entropy(plain(tokens, torch.arange(53)).flatten(0, 1), labels.flatten(), ignore_index=IGNORE).backward()
    want = {name: p.grad for name, p in plain.named_parameters()}

    def rank(_):
        layout = ringx.Sharding(53, world)
        model = Llama.make(c, ringx_attend(layout), seed=1, dtype=torch.float64, device="cpu")
        mine = data.cut(tokens, labels, layout=layout)
        (token_loss(model(mine.tokens, mine.positions), mine.labels) / mine.count).backward()
        sum_gradients(model.parameters(), ringx.comm.Group.of(None))
        return {name: p.grad for name, p in model.named_parameters()}

    for got in run(world, rank):
        assert got.keys() == want.keys()
        for name, g in want.items():
            torch.testing.assert_close(got[name], g, rtol=1e-9, atol=1e-13, msg=name)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("world, seqlen", [(2, 16), (3, 17), (4, 23)])
def test_labels_and_positions_at_shard_edges(layout, world, seqlen, text):
    tokens, labels = text.batch(0, batch=2, seqlen=seqlen, seed=0)
    stream = torch.cat([tokens, labels[:, -1:]], 1)  # [B, S + 1]
    cuts = run(world, lambda _: data.cut(tokens, labels, layout=ringx.Sharding(seqlen, world, layout)))
    for mine in cuts:
        assert torch.equal(mine.tokens, stream[:, mine.positions])
        assert torch.equal(mine.labels, stream[:, mine.positions + 1])  # of a shard's last token: the next one, on another rank
        assert mine.count == labels.numel()
    assert torch.equal(torch.cat([mine.positions for mine in cuts]).sort().values, torch.arange(seqlen))


def test_rope_turns_by_global_position(text):
    """Sharded logits are the whole sequence's; local positions would be noticed."""
    tokens, labels = text.batch(0, batch=1, seqlen=41, seed=0)
    want = Llama.make(MODEL, sdpa, seed=0, dtype=torch.float64, device="cpu")(tokens, torch.arange(41))

    def rank(_):
        layout = ringx.Sharding(41, 3)
        model = Llama.make(MODEL, ringx_attend(layout), seed=0, dtype=torch.float64, device="cpu")
        mine = data.cut(tokens, labels, layout=layout)
        wrong = torch.arange(len(mine.positions))
        with torch.no_grad():
            return [ringx.unshard(model(mine.tokens, p), layout=layout) for p in (mine.positions, wrong)]

    right, wrong = run(3, rank)[0]
    torch.testing.assert_close(right, want.detach(), rtol=0, atol=1e-12)
    assert (wrong - want).abs().max() > 1e-4


def test_rope_angles_at_a_million_tokens():
    cos, _ = rope(torch.tensor([1_000_003]), 8, 500_000.0, torch.float32)
    for i in range(4):
        assert math.isclose(cos[0, 0, i].item(), math.cos(1_000_003 * 500_000.0 ** (-2 * i / 8)), abs_tol=1e-7)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("world", [1, 2])
def test_logits_equal_transformers(world, tied, text):
    transformers = pytest.importorskip(
        "transformers", minversion="5", reason="transformers 5 is not installed: no independent Llama to compare with"
    )
    c = replace(MODEL, tied=tied, heads=8, kv_heads=4, head_dim=16, rope_base=10_000.0)
    model = Llama.make(c, ringx_attend("zigzag"), seed=2, dtype=torch.float32, device="cpu")
    with torch.no_grad():  # weights of a size that matters: fresh ones hardly attend, and norms are all one
        for p in model.parameters():
            p.mul_(3.0).add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())) * 0.1)
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=c.vocab, hidden_size=c.dim, intermediate_size=c.ffn, num_hidden_layers=c.layers, num_attention_heads=c.heads,
            num_key_value_heads=c.kv_heads, head_dim=c.head_dim, rms_norm_eps=c.norm_eps, tie_word_embeddings=tied,
            rope_parameters={"rope_type": "default", "rope_theta": c.rope_base}, attn_implementation="eager",
        )
    )  # fmt: skip
    weights = {("" if name.startswith("lm_head") else "model.") + name: p for name, p in model.state_dict().items()}
    missing, unexpected = theirs.load_state_dict(weights, strict=False)
    assert not unexpected and set(missing) <= ({"lm_head.weight"} if tied else set())
    tokens, labels = text.batch(0, batch=2, seqlen=64, seed=0)

    def rank(_):
        mine = data.cut(tokens, labels, layout=ringx.Sharding(64, world))
        with torch.no_grad():
            return ringx.unshard(model(mine.tokens, mine.positions))

    with torch.no_grad():
        want = theirs(tokens).logits
    got = run(world, rank)[0]
    assert want.std() > 0.3
    assert (got - want).norm() / want.norm() <= 1e-5
    assert (got - want).abs().max() <= 1e-5 * max(1.0, want.abs().max().item())


def test_clipping_uses_the_true_global_norm():
    params = [torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.zeros(2, 2))]
    params[0].grad, params[1].grad = torch.full((3,), 2.0), torch.full((2, 2), -1.0)
    assert clip_gradients(params, 100.0).item() == 4.0
    assert params[0].grad[0].item() == 2.0
    clip_gradients(params, 1.0)
    assert math.isclose(math.hypot(*(g for p in params for g in p.grad.flatten().tolist())), 1.0, rel_tol=1e-6)
    params[0].grad.zero_(), params[1].grad.zero_()
    clip_gradients(params, 1.0)
    assert not params[0].grad.isnan().any()


def test_sum_gradients_in_small_buckets_and_of_unused_parameters(monkeypatch):
    monkeypatch.setattr("apps.common.gradients.BUCKET", 5)

    def rank(r):
        params = [torch.nn.Parameter(torch.zeros(n)) for n in (3, 4, 1, 7)]
        for i, p in enumerate(params):
            if i or r == 0:  # the first is used by rank 0 only
                p.grad = torch.full_like(p, 10.0**i * (r + 1))
        sum_gradients(params, ringx.comm.Group.of(None))
        return [p.grad.tolist() for p in params]

    for got in run(2, rank):
        assert got == [[1.0] * 3, [30.0] * 4, [300.0], [3000.0] * 7]


def test_replicas_that_differ_are_named():
    def rank(r):
        return differing({"same": torch.ones(3), "other": torch.full((2,), 1.0 + r * 1e-7)}, ringx.comm.Group.of(None))

    assert run(3, rank) == [["other"]] * 3


def test_ranks_with_different_texts_are_stopped(text):
    def rank(r):
        return train(config(steps=1), replace(text, sha256=f"{r}" * 64))

    assert all("different texts" in str(e) for e in attempt(2, rank))


def test_a_loss_that_is_not_finite_stops_the_run(text):
    with pytest.raises(FloatingPointError, match=r"step \d+: loss"):
        train(config(lr=1e300, clip=0.0), text)


def test_schedule():
    rates = [warmup_cosine(s, steps=20, peak=1.0, warmup=4, floor=0.1) for s in range(20)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert all(a > b for a, b in itertools.pairwise(rates[3:]))
    assert math.isclose(rates[-1], 0.1)
    assert warmup_cosine(0, steps=1, peak=1.0, warmup=4, floor=0.1) == 0.25
    assert math.isclose(warmup_cosine(0, steps=1, peak=1.0, warmup=0, floor=0.1), 0.1)


# ---- data


def test_an_epoch_reads_every_window_once(tmp_path):
    file = tmp_path / "text"
    file.write_bytes(bytes(i % 251 for i in range(10 * 7 + 1)))
    text = data.read(str(file))
    assert text.windows(7) == 10
    rows = [row.tolist() for step in range(10) for row in text.batch(step, batch=2, seqlen=7, seed=3)[0]]
    first, second = rows[:10], rows[10:]
    assert sorted(first) == sorted(second) == [[(7 * w + i) % 251 for i in range(7)] for w in range(10)]
    assert first != second
    assert [row.tolist() for row in text.batch(4, batch=2, seqlen=7, seed=3)[0]] == rows[8:10]


def test_default_text_is_real_and_repeatable():
    a, b = data.default_text(), data.default_text()
    assert a == b and 100_000 < len(a) <= data.DEFAULT_BYTES and b"def __init__(self" in a


# ---- the command line


def launch(tmp_path, nproc: int, *arguments: str):
    """(header, records, parameters, what it printed) of the command in a process of its own."""
    out, params = tmp_path / f"out{nproc}", tmp_path / f"{nproc}.pt"
    command = [sys.executable, "-m", "apps.gpt.train", "--nproc", str(nproc), "--device", "cpu", "--out", str(out)]
    done = subprocess.run(
        [*command, "--save-params", str(params), *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    header, steps = read_log(out / "log.jsonl")
    assert header["launch"]["world"] == nproc
    return header, steps, torch.load(params), done.stdout


def test_the_command_on_two_processes_equals_one(tmp_path):
    asked = {"steps": 3, "dtype": "fp64", "seqlen": 65, "batch": 1, "algorithm": "ringx4", "lr": 0.002, "seed": 5}
    arguments = ["--no-overlap", *(f"--{name}={value}" for name, value in asked.items())]
    (header, one, params, printed), two = (launch(tmp_path, n, *arguments) for n in (1, 2))
    expect_same((one, params), two[1:3])
    asked["overlap"] = False
    assert header["config"]["train"].items() >= asked.items()
    assert header["versions"]["torch"] == torch.__version__ and header["data"]["sha256"] == two[0]["data"]["sha256"]
    assert [r["step"] for r in one] == [0, 1, 2] and one[0]["tokens_per_s"] > 0 and one[0]["seconds"] > 0
    assert printed.count("step ") == 3
    assert f"loss {one[0]['loss']:.4f} -> {one[-1]['loss']:.4f}" in printed.splitlines()[-1]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--preset huge", "huge"),
        ("--algorithm ringx7", "algorithm='ringx7' is unknown. Did you mean"),
        ("--layout zigzig", "Did you mean 'zigzag'"),
        ("--kernel refrence", "Did you mean 'reference'"),
        ("--dtype fp46", "Did you mean 'fp64'"),
        ("--steps 0", "steps=0 must be at least 1"),
        ("--steps many", "--steps"),
        ("--lr -1", "lr=-1.0"),
        ("--lr 0", "lr=0 must be greater than 0"),
        ("--lr nan", "lr=nan"),
        ("--seqlen 0", "seqlen=0"),
        ("--batch 0", "batch=0"),
        ("--seed -1", "seed=-1"),
        ("--warmup -3", "warmup=-3"),
        ("--nproc 0", "nproc"),
        ("--nproc 4 --seqlen 3", "seqlen=3 is shorter than world=4"),
        ("--data {tmp}/missing", "cannot be read: No such file or directory"),
        ("--data {tmp}", "cannot be read: Is a directory"),
        ("--data {tmp}/empty", "the file is empty"),
        ("--data {tmp}/short --seqlen 10", "has 10 bytes, but one sequence of --seqlen 10 and its last label take 11"),
        ("--out {tmp}/short", "is no directory and cannot be made: File exists"),
        ("--out {tmp}/short/below", "is no directory and cannot be made: Not a directory"),
        ("--save-params {tmp}", "cannot be written"),
        ("--frobnicate", "--frobnicate"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(arguments, message, tmp_path, capsys):
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "short").write_bytes(b"0123456789")
    with pytest.raises(SystemExit) as stop:
        main(arguments.format(tmp=tmp_path).split())
    assert stop.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1
    assert message in printed.err


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"dim": 30, "heads": 4}, "head_dim"),
        ({"dim": 12, "heads": 4, "kv_heads": 2}, "even head size"),
        ({"heads": 4, "kv_heads": 3}, "multiple of kv_heads"),
        ({"layers": 0}, "layers=0"),
        ({"ffn": 2.5}, "ffn=2.5 must be an integer"),
    ],
)
def test_model_configurations_that_cannot_be(wrong, message):
    with pytest.raises(ValueError, match=message):
        replace(replace(MODEL, head_dim=0), **{"head_dim": 0, **wrong})


def test_presets_are_named_as_they_say():
    assert all(name == c.name for name, c in PRESETS.items())
