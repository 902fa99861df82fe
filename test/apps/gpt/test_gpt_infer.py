"""Generation equals Hugging Face's and recomputation; evaluation equals a direct computation, on
any number of ranks.

python -m pytest test/apps/gpt/test_gpt_infer.py
"""

import json
import math
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from helpers.paths import ROOT
from helpers.ranks import run

from apps.gpt import evaluate, generate
from apps.gpt.config import ModelConfig
from apps.gpt.data.dataset import open_dataset
from apps.gpt.data.prepare import prepare
from apps.gpt.data.tokenizer import ByteTokenizer
from apps.gpt.huggingface import open_model, parameter_shapes, save_hugging_face
from apps.gpt.model import Llama

pytestmark = pytest.mark.filterwarnings(
    "ignore:torch.distributed is disabled"
)  # pytest undoes the filter of checkpoint.py

MODEL = ModelConfig(
    dim=32,
    layers=2,
    heads=8,
    kv_heads=4,
    ffn=48,
    vocab=300,
    head_dim=16,
    rope_base=10_000.0,
    rope_factor=8.0,
    rope_original=32,
)


def random_weights(config: ModelConfig, seed=2) -> dict[str, torch.Tensor]:
    """Of a size that matters: fresh ones hardly attend, and norms are all one."""
    g = torch.Generator().manual_seed(seed)
    return {
        n: torch.randn(shape, generator=g) * 0.25 + (len(shape) == 1)
        for n, shape in parameter_shapes(config).items()
    }


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def folder(request, tmp_path_factory):
    """A Hugging Face folder."""
    config = replace(MODEL, tied=request.param)
    out = tmp_path_factory.mktemp("infer") / "hf"
    save_hugging_face(out, config, random_weights(config), torch.float32, seqlen=256)
    return out


def sdpa(q, k, v):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


def model_of(folder, dtype=torch.float32) -> Llama:
    return open_model(folder).make(sdpa, dtype=dtype)


PROMPT = [5, 17, 250, 3, 99]


# ---- generation


@pytest.mark.fast
def test_greedy_equals_transformers(folder):
    transformers = pytest.importorskip(
        "transformers", reason="transformers is not installed: nothing to compare with"
    )
    theirs = transformers.LlamaForCausalLM.from_pretrained(
        folder, attn_implementation="eager"
    ).eval()
    want = theirs.generate(
        torch.tensor([PROMPT]), do_sample=False, max_new_tokens=60, pad_token_id=0
    )[0, len(PROMPT) :].tolist()
    assert len(want) == 60 and len(set(want)) > 5
    assert generate.generate(model_of(folder), PROMPT, 60, temperature=0) == want
    theirs.generation_config.eos_token_id = end = want[20]
    short = theirs.generate(
        torch.tensor([PROMPT]), do_sample=False, max_new_tokens=60, pad_token_id=0
    )[0, len(PROMPT) :].tolist()
    assert short == want[: want.index(end) + 1]
    assert generate.generate(model_of(folder), PROMPT, 60, temperature=0, eos=[end]) == short


@pytest.mark.fast
def test_cached_logits_equal_recomputation(folder):
    """Prefilled in one piece, then token by token, then several at once."""
    model = model_of(folder, torch.float64)
    tokens = torch.randint(0, MODEL.vocab, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        want = model(tokens, torch.arange(40))
        got = []
        with generate.replaced_attention(model, lambda: generate.KeyValueCache(40)):
            for start, end in [(0, 25), *((i, i + 1) for i in range(25, 33)), (33, 40)]:
                x = model.hidden(tokens[:, start:end], torch.arange(start, end))
                got.append(generate.head_logits(x, model.head))
    assert all(layer.self_attn.attend is sdpa for layer in model.layers)
    torch.testing.assert_close(torch.cat(got, 1), want, rtol=0, atol=1e-12)


@pytest.mark.fast
def test_sampled_tokens_equal_those_without_cache(folder):
    model = model_of(folder, torch.float64)
    got = generate.generate(
        model, PROMPT, 20, temperature=0.7, top_p=0.9, generator=torch.Generator().manual_seed(3)
    )
    again, tokens = torch.Generator().manual_seed(3), list(PROMPT)
    with torch.no_grad():
        for _ in range(20):
            logits = model(torch.tensor([tokens]), torch.arange(len(tokens)))[0, -1]
            p = generate.probabilities(logits, 0.7, 0.9)
            tokens.append(int(torch.multinomial(p, 1, generator=again)))
    assert got == tokens[len(PROMPT) :]
    assert got != generate.generate(
        model, PROMPT, 20, temperature=0.7, top_p=0.9, generator=torch.Generator().manual_seed(4)
    )


@pytest.mark.fast
@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("top_p", [1e-9, 0.3, 0.6, 0.95, 1.0])
def test_probabilities_by_their_definition(temperature, top_p):
    logits = [1.5, -0.5, 3.0, 0.0, 2.9, -4.0, 0.7]
    p = [math.exp(z / temperature) for z in logits]
    p = [x / sum(p) for x in p]
    kept, total = [], 0.0
    for i in sorted(range(len(p)), key=lambda i: -p[i]):
        kept.append(i)
        total += p[i]
        if total >= top_p:
            break
    want = torch.tensor(
        [p[i] / total if i in kept else 0.0 for i in range(len(p))], dtype=torch.float64
    )
    got = generate.probabilities(torch.tensor(logits, dtype=torch.float64), temperature, top_p)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)


@pytest.mark.fast
def test_likeliest_token_and_ties():
    assert generate.probabilities(torch.tensor([0.0, 2.0, 2.0, 1.0]), 0, 0.5).tolist() == [
        0,
        1,
        0,
        0,
    ]
    assert generate.probabilities(torch.zeros(4), 1.0, 0.5).tolist() == [
        0.5,
        0.5,
        0,
        0,
    ]  # the fewest that have half
    assert generate.probabilities(torch.full((100_000,), 3.0).bfloat16(), 1.0, 1.0).min() > 0


class Fixed(Llama):
    """A Llama that says the same, whatever it has read."""

    logits = torch.tensor([0.0, 1.0, 2.0, 1.5, -1.0])

    def __init__(self):
        super().__init__(
            ModelConfig(dim=5, layers=0 + 1, heads=1, kv_heads=1, ffn=2, vocab=5, head_dim=2), sdpa
        )
        with torch.no_grad():
            for p in self.parameters():
                p.zero_()
            self.embed_tokens.weight.fill_(1.0)
            self.norm.weight.copy_(torch.tensor([1.0, 0, 0, 0, 0]))
        self.lm_head = torch.nn.Linear(5, 5, bias=False)
        with torch.no_grad():
            self.lm_head.weight.zero_()[:, 0] = self.logits


@pytest.mark.fast
def test_what_is_drawn_has_that_distribution():
    model, n = Fixed(), 1000
    p = generate.probabilities(Fixed.logits, 0.8, 0.9)
    assert (p > 0).sum() == 3
    drawn = generate.generate(
        model, [1], n, temperature=0.8, top_p=0.9, generator=torch.Generator().manual_seed(0)
    )
    counts = torch.tensor(drawn).bincount(minlength=5).double()
    assert (counts[p == 0] == 0).all()
    chi2 = ((counts - n * p) ** 2 / (n * p))[p > 0].sum()
    assert chi2 < 13.8  # 2 degrees of freedom: one in a thousand is above


@pytest.mark.fast
@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"temperature": -0.1}, "temperature=-0.1"),
        ({"temperature": math.nan}, "temperature=nan"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"top_p": 1.1}, "top_p=1.1"),
        ({"n": 0}, "tokens=0"),
        ({"tokens": []}, "tokens is empty"),
    ],
)
def test_options_that_make_no_sense(wrong, message):
    with pytest.raises(ValueError, match=message):
        generate.generate(Fixed(), **{"tokens": [1], "n": 2, **wrong})


@pytest.mark.fast
def test_text_comes_in_whole_characters():
    text = "aé – 漢字 🙂 end"
    tokenizer = ByteTokenizer()
    pieces = list(
        generate.decode_stream(tokenizer, iter([*tokenizer.encode(text), 290, tokenizer.eos]))
    )  # 290: no token of its
    assert "".join(pieces) == text and "漢" in pieces and "🙂" in pieces
    cut = tokenizer.encode("é")[:1]
    assert "".join(generate.decode_stream(tokenizer, iter(cut))) == "\ufffd"


@pytest.mark.fast
def test_the_command_prints_the_text(folder, capsys):
    tokenizer, prompt = ByteTokenizer(), "some é"
    arguments = [
        str(folder),
        "--prompt",
        prompt,
        "--tokens=30",
        "--temperature=0",
        "--tokenizer=bytes",
        "--device=cpu",
    ]
    assert generate.main(arguments) == 0
    want = generate.generate(model_of(folder), tokenizer.encode(prompt), 30, temperature=0, eos=[0])
    shown = tokenizer.decode([i for i in want if i < tokenizer.vocab])
    assert capsys.readouterr().out == prompt + shown + "\n"


@pytest.mark.fast
def test_mistakes_of_generate_are_one_line_and_exit_2(folder, tmp_path, capsys):
    (tmp_path / "bad.json").write_text("{}")
    for arguments, message in (
        (["nowhere", "--prompt", "a"], "nowhere holds no model"),
        ([folder], "--prompt"),
        ([folder, "--prompt", "a"], "name one with --tokenizer"),
        ([folder, "--prompt", "a", "--tokenizer", tmp_path / "bad.json"], "bad.json"),
        ([folder, "--prompt", "a", "--tokenizer", tmp_path / "no.json"], "no.json: cannot be read"),
        ([folder, "--prompt", "", "--tokenizer", "bytes"], "--prompt is empty"),
        ([folder, "--prompt", "a", "--tokens", "0"], "tokens=0"),
        ([folder, "--prompt", "a", "--top-p", "2"], "top_p=2.0"),
        ([folder, "--prompt", "a", "--temperature", "-1"], "temperature=-1.0"),
        ([folder, "--prompt", "a", "--seed", "-1"], "--seed -1"),
        ([folder, "--prompt", "a", "--step", "3"], "--step 3"),
    ):
        with pytest.raises(SystemExit) as stop:
            generate.main([str(a) for a in arguments])
        printed = capsys.readouterr()
        assert stop.value.code == 2 and printed.err.count("\n") == 1 and message in printed.err, (
            printed.err
        )


# ---- evaluation


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Prepared bytes of random words, a tenth held back."""
    at = tmp_path_factory.mktemp("text")
    g = torch.Generator().manual_seed(0)
    words = [
        "".join(chr(97 + int(c)) for c in torch.randint(0, 26, (5,), generator=g))
        for _ in range(40)
    ]
    lines = [
        " ".join(words[int(i)] for i in torch.randint(0, 40, (12,), generator=g))
        for _ in range(120)
    ]
    (at / "text.txt").write_text("\n".join(lines))
    prepare([at / "text.txt"], at / "tokens", tokenizer="bytes", val_fraction=0.1)
    return at / "tokens"


def direct(model, tokens, seqlen, windows, context):
    """[windows * seqlen]: each token's loss, by whole logits and torch's own functions."""
    out = []
    for i in range(windows * seqlen // context):
        rows = tokens.take([i], context)
        logits = model(rows.tokens, torch.arange(context))
        out.append(F.cross_entropy(logits[0], rows.labels[0], reduction="none"))
    return torch.cat(out).view(windows, seqlen)


@pytest.mark.parametrize("world, layout", [(1, "zigzag"), (2, "zigzag"), (3, "striped")])
def test_evaluation_equals_a_direct_computation(world, layout, folder, text):
    tokens, contexts = open_dataset(text, "val"), (64, 32, 8)
    options = {"seqlen": 128, "windows": 3, "contexts": contexts, "layout": layout}
    with torch.no_grad():
        model = model_of(folder, torch.float64)
        want = {c: direct(model, tokens, 128, 3, c) for c in (*contexts, 128)}
    for got in run(
        world, lambda _: evaluate.evaluate(model_of(folder, torch.float64), tokens, **options)
    ):
        assert sorted(got) == [8, 32, 64, 128]
        for context, mean in got.items():
            torch.testing.assert_close(mean, want[context].mean(0), rtol=0, atol=1e-10)
    rows = {(r["context"], r["from"], r["to"]): r for r in evaluate.summarize(got, 3)}
    assert len(rows) == 4 * 9
    for (context, start, end), row in rows.items():
        assert math.isclose(row["loss"], want[context][:, start:end].mean().item(), rel_tol=1e-10)
        assert math.isclose(row["perplexity"], math.exp(row["loss"])) and row["tokens"] == 3 * (
            end - start
        )
    assert rows[8, 0, 1]["loss"] == pytest.approx(rows[128, 0, 1]["loss"])  # no other context yet
    assert abs(rows[8, 64, 128]["loss"] - rows[128, 64, 128]["loss"]) > 1e-3


@pytest.mark.fast
def test_another_tokenizer_is_noticed(text, tmp_path):
    from tokenizers import Tokenizer, models, trainers

    made = Tokenizer(models.BPE())
    made.train_from_iterator(["text"], trainers.BpeTrainer(vocab_size=60, special_tokens=["</s>"]))
    made.save(str(tmp_path / "tokenizer.json"))
    tokens = open_dataset(text, "val")
    assert evaluate.same_tokenizer(tokens, text) and not evaluate.same_tokenizer(tokens, tmp_path)
    assert evaluate.same_tokenizer(tokens, tmp_path / "none")  # cannot be told


@pytest.mark.fast
def test_buckets_double():
    assert evaluate.buckets(1) == [(0, 1)]
    assert evaluate.buckets(2) == [(0, 1), (1, 2)]
    assert evaluate.buckets(8) == [(0, 1), (1, 2), (2, 4), (4, 8)]
    assert evaluate.buckets(11) == [(0, 1), (1, 2), (2, 4), (4, 8), (8, 11)]


@pytest.mark.fast
def test_table_fits_100_columns():
    seqlen = 2**20
    means = {seqlen >> i: torch.full((seqlen,), 10.0) for i in range(9)}
    table = evaluate.table(evaluate.summarize(means, 1000)).splitlines()
    assert max(map(len, table)) <= 100 and "3 lengths in between" in table[-1]
    assert sum("524,288-1,048,575" in line for line in table) == 1


@pytest.mark.parametrize("folder", [True], indirect=True, ids=["tied"])
def test_the_command_on_two_processes_equals_one(folder, text, tmp_path, capsys):
    arguments = (
        f"--data {text} --seqlen 96 --windows 2 --contexts 48,12 --dtype fp64 --device cpu".split()
    )
    found = []
    for nproc in (1, 2):
        out = tmp_path / str(nproc)
        words = [str(folder), *arguments, "--out", str(out), "--nproc", str(nproc)]
        if nproc == 1:
            assert evaluate.main(words) == 0
            printed = capsys.readouterr().out
        else:
            command = [sys.executable, "apps/gpt/evaluate.py", *words]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
            assert done.returncode == 0, done.stderr
            printed = done.stdout
        assert (
            f"2 windows of 96 tokens of {open_dataset(text).source} (val), {nproc} rank(s)"
            in printed
        )
        found.append(json.loads((out / "evaluation.json").read_text()))
        assert f"{found[-1]['rows'][-1]['loss']:.4f}" in printed and "perplexity of all" in printed
    one, two = (r["rows"] for r in found)
    assert len(one) == len(two) == 3 * 9
    for a, b in zip(one, two, strict=True):
        assert math.isclose(a.pop("loss"), b.pop("loss"), rel_tol=1e-10)
        assert math.isclose(a.pop("perplexity"), b.pop("perplexity"), rel_tol=1e-8) and a == b
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: no figures")
    assert {p.name for p in out.iterdir()} == {
        "evaluation.json",
        "perplexity.png",
        "perplexity.svg",
        "perplexity.csv",
    }


@pytest.mark.fast
def test_mistakes_of_evaluate_are_one_line_and_exit_2(folder, text, tmp_path, capsys):
    (tmp_path / "file").touch()
    good = [str(folder), "--data", str(text)]
    for arguments, message in (
        (["nowhere"], "nowhere is no folder"),
        ([str(tmp_path)], "holds no model"),
        ([str(folder)], "--data is needed"),
        ([str(folder), "--data", "nowhere"], "--data nowhere is no folder"),
        ([str(folder), "--data", str(tmp_path)], "dataset.json"),
        ([*good, "--seqlen", "-1"], "--seqlen -1"),
        ([*good, "--seqlen", "100000"], "one sequence of --seqlen 100000"),
        ([*good, "--seqlen", "64", "--windows", "1000"], "windows=1000"),
        ([*good, "--seqlen", "64", "--contexts", "48"], "contexts=48 must divide seqlen=64"),
        ([*good, "--contexts", "short"], "--contexts short"),
        ([*good, "--layout", "zigzig"], "Did you mean 'zigzag'"),
        ([*good, "--algorithm", "ringx7"], "Did you mean"),
        ([*good, "--dtype", "fp46"], "Did you mean 'fp64'"),
        ([*good, "--step", "3"], "--step 3"),
        ([*good, "--out", str(tmp_path / "file")], "--out"),
        ([*good, "--nproc", "0"], "nproc"),
    ):
        with pytest.raises(SystemExit) as stop:
            sys.exit(evaluate.main([*arguments, "--device", "cpu"]))
        printed = capsys.readouterr()
        assert stop.value.code == 2 and printed.err.count("\n") == 1 and message in printed.err, (
            printed.err
        )
