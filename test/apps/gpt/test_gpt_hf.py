"""Hugging Face's Llama and ours: the same logits on any mesh, files read and written without loss,
and clear refusals.

python -m pytest test/apps/gpt/test_gpt_hf.py
"""

import json
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from helpers.paths import ROOT
from helpers.ranks import run
from safetensors.torch import load_file, save_file

import ringx
from apps.common.checkpoint import Checkpoints
from apps.common.weights import CheckpointWeights
from apps.gpt import convert
from apps.gpt.config import Config, ModelConfig, TrainConfig
from apps.gpt.huggingface import (
    HuggingFaceWeights,
    open_model,
    open_tokenizer,
    open_weights,
    parameter_shapes,
    read_model_config,
    save_hugging_face,
)
from apps.gpt.parallel import Attend, build
from ringx.launch.mesh import Mesh, Shape

pytestmark = pytest.mark.filterwarnings(
    "ignore:torch.distributed is disabled"
)  # pytest undoes the filter of checkpoint.py
transformers = pytest.importorskip(
    "transformers",
    minversion="4.46",
    reason="transformers is not installed: no independent Llama to compare with",
)

MODEL = ModelConfig(
    dim=32, layers=2, heads=8, kv_heads=4, ffn=48, vocab=64, head_dim=16, rope_base=10_000.0
)
SCALED = {
    "rope_factor": 8.0,
    "rope_low": 1.0,
    "rope_high": 4.0,
    "rope_original": 32,
}  # most of the test's positions are beyond
S = 64


def random_weights(config: ModelConfig, dtype=torch.float32, seed=2) -> dict[str, torch.Tensor]:
    """Of a size that matters: fresh ones hardly attend, and norms are all one."""
    g = torch.Generator().manual_seed(seed)
    return {
        name: ((torch.randn(shape, generator=g) * 0.25) + (1.0 if len(shape) == 1 else 0.0)).to(
            dtype
        )
        for name, shape in parameter_shapes(config).items()
    }


def theirs(config: ModelConfig, weights) -> "transformers.LlamaForCausalLM":
    """Made by transformers alone: nothing of what is tested reads or writes it."""
    rope = {"rope_type": "default"}
    if config.rope_factor != 1:
        rope = {
            "rope_type": "llama3",
            "factor": config.rope_factor,
            "low_freq_factor": config.rope_low,
            "high_freq_factor": config.rope_high,
            "original_max_position_embeddings": config.rope_original,
        }
    llama = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=config.vocab,
            hidden_size=config.dim,
            intermediate_size=config.ffn,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.kv_heads,
            head_dim=config.head_dim,
            rms_norm_eps=config.norm_eps,
            tie_word_embeddings=config.tied,
            max_position_embeddings=256,
            rope_parameters={"rope_theta": config.rope_base, **rope},
            attn_implementation="eager",
            bos_token_id=None,
            eos_token_id=None,
        )
    ).eval()
    state = {
        ("" if name.startswith("lm_head") else "model.") + name: w for name, w in weights.items()
    }
    missing, unexpected = llama.load_state_dict(state, strict=False)
    assert not unexpected and set(missing) <= ({"lm_head.weight"} if config.tied else set())
    return llama.to(next(iter(weights.values())).dtype)


CASES = {
    "tied": MODEL,
    "untied": replace(MODEL, tied=False),
    "scaled": replace(MODEL, **SCALED),
    "scaled_untied": replace(MODEL, tied=False, **SCALED),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{case: (folder that transformers has written, its logits)}"""
    out = {}
    for name, config in CASES.items():
        llama = theirs(config, random_weights(config))
        folder = tmp_path_factory.mktemp("hf") / name
        llama.save_pretrained(folder)
        with torch.no_grad():
            out[name] = folder, llama(tokens()).logits
    return out


def tokens():
    return torch.randint(0, MODEL.vocab, (2, S), generator=torch.Generator().manual_seed(0))


def logits(folder, cp=1, tp=1):
    """Of the model in `folder`, computed by cp x tp ranks."""
    config = Config("test", read_model_config(folder), TrainConfig(seqlen=S, dtype="float32"))

    def rank(_):
        mesh = Mesh.make(Shape(cp=cp, tp=tp))
        attend = Attend(config, mesh)
        weights = HuggingFaceWeights(folder)
        weights.check(parameter_shapes(config.model))
        engine = build(config, mesh, attend, weights=weights)
        mine = ringx.shard(tokens(), group=mesh.cp, layout=attend.layout)
        with torch.no_grad():
            got = engine(mine, ringx.positions(S, group=mesh.cp, layout=attend.layout))
        return ringx.unshard(got, group=mesh.cp, layout=attend.layout)

    return run(cp * tp, rank)


# ---- the same logits


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    "cp, tp",
    [
        pytest.param(1, 1, marks=pytest.mark.fast),
        (2, 2),
        pytest.param(2, 1, marks=pytest.mark.slow),
        pytest.param(1, 2, marks=pytest.mark.slow),
    ],
)
def test_logits_equal_transformers(case, cp, tp, folders):
    folder, want = folders[case]
    assert want.std() > 0.3
    for got in logits(folder, cp, tp):
        assert (got - want).norm() / want.norm() <= 1e-5
        assert (got - want).abs().max() <= 1e-5 * max(1.0, want.abs().max().item())


@pytest.mark.fast
def test_rope_scaling_matters_here(folders):
    """So that the test above would notice another."""
    (_, a), (_, b) = folders["tied"], folders["scaled"]
    assert (a - b).norm() / a.norm() > 0.01


@pytest.mark.fast
def test_transformers_loads_what_we_write(folders, tmp_path):
    for case, (folder, want) in folders.items():
        config, out = CASES[case], tmp_path / case
        save_hugging_face(
            out, config, HuggingFaceWeights(folder), torch.float32, "20KB", seqlen=256, eos=[3]
        )
        assert not (tmp_path / f"{case}.partial").exists()
        assert len(list(out.glob("model-*.safetensors"))) > 1
        llama, info = transformers.LlamaForCausalLM.from_pretrained(out, output_loading_info=True)
        assert not any(
            info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")
        ), info
        assert (
            llama.dtype == torch.float32
            and llama.config.eos_token_id == 3
            and llama.config.bos_token_id is None
        )
        with torch.no_grad():
            assert (
                torch.equal(llama(tokens()).logits, want)
                or (llama(tokens()).logits - want).abs().max() < 1e-5
            )
        assert read_model_config(out) == replace(
            config, rope_original=config.rope_original if config.rope_factor != 1 else 8192
        )


# ---- files


def same(a, b):
    assert a.keys() == b.keys()
    for name, x in a.items():
        assert x.dtype == b[name].dtype and torch.equal(x, b[name]), name


def all_of(folder: Path):
    files = sorted(folder.glob("*.safetensors"))
    return {name: x for file in files for name, x in load_file(file).items()}


@pytest.mark.fast
@pytest.mark.parametrize("tied", [True, False])
def test_round_trip_is_bitwise(tied, tmp_path):
    """transformers' files -> ours -> Hugging Face's again, in their dtype, by both commands."""
    config = replace(MODEL, tied=tied, **SCALED)
    theirs(config, random_weights(config, torch.bfloat16)).save_pretrained(
        tmp_path / "hf", max_shard_size="10KB"
    )
    (tmp_path / "hf" / "tokenizer.json").write_text("{}")
    assert (tmp_path / "hf" / "model.safetensors.index.json").exists()
    assert convert.main(["from-hf", str(tmp_path / "hf"), str(tmp_path / "run")]) == 0
    assert convert.main(["to-hf", str(tmp_path / "run"), str(tmp_path / "back")]) == 0
    same(all_of(tmp_path / "hf"), all_of(tmp_path / "back"))
    for path in (
        tmp_path / "run",
        tmp_path / "run" / "checkpoints" / "step-00000000",
        tmp_path / "back",
    ):
        source = open_model(path)
        assert (
            source.model == config
            and source.weights.dtype == torch.bfloat16
            and source.seqlen == 256
        )
        for name, shape in parameter_shapes(config).items():
            want = HuggingFaceWeights(tmp_path / "hf")(name, torch.Size(shape))
            assert torch.equal(open_weights(path, config)(name, torch.Size(shape)), want)
    assert (tmp_path / "back" / "tokenizer.json").read_text() == "{}"


def save_three(world, config, folder):
    """A rank of a run that saves after each of three steps; returns the parameters at each."""
    mesh = Mesh.make(Shape(cp=2))
    attend = Attend(config, mesh)
    engine = build(config, mesh, attend)
    mine, labels = (
        ringx.shard(x, group=mesh.cp, layout=attend.layout)
        for x in (tokens(), tokens().roll(-1, 1))
    )
    where = ringx.positions(S, group=mesh.cp, layout=attend.layout)
    saved = []
    with Checkpoints(folder, world) as checkpoints:
        for step in (1, 2, 3):
            with engine.accumulate(last=True):
                engine.backward(engine(mine, where, labels) / tokens().numel())
            engine.step(1e-2, 1.0)
            state = engine.state()
            checkpoints.save(step, state, {"step": step, "config": asdict(config), "data": ""})
            saved.append({name: p.full_tensor().clone() for name, p in state["model"].items()})
    return saved


def test_to_hf_takes_the_newest_good_checkpoint_of_any_mesh(tmp_path):
    """Optimizer and all, each rank its shards; the newest is damaged."""
    config = Config("test", replace(MODEL, tied=False), TrainConfig(seqlen=S, dtype="float32"))
    folder = tmp_path / "run" / "checkpoints"
    states = ringx.launch.run(save_three, 2, config, folder, device="cpu")[0]
    damaged = next((folder / "step-00000003").glob("*.distcp"))
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    for out, arguments, want in (("newest", [], states[1]), ("first", ["--step", "1"], states[0])):
        assert convert.main(["to-hf", str(tmp_path / "run"), str(tmp_path / out), *arguments]) == 0
        got = all_of(tmp_path / out)
        same({name.removeprefix("model."): x for name, x in got.items()}, want)
    assert not torch.equal(states[0]["lm_head.weight"], states[1]["lm_head.weight"])
    assert (
        convert.main(
            ["to-hf", str(folder / "step-00000002"), str(tmp_path / "bf16"), "--dtype", "bf16"]
        )
        == 0
    )
    got = all_of(tmp_path / "bf16")
    assert torch.equal(got["lm_head.weight"], states[1]["lm_head.weight"].bfloat16())
    assert json.loads((tmp_path / "bf16" / "config.json").read_text())["torch_dtype"] == "bfloat16"


@pytest.mark.fast
def test_reads_lazily_one_file_or_many(tmp_path):
    weights = random_weights(MODEL)
    save_hugging_face(tmp_path / "one", MODEL, weights, torch.float32)
    save_hugging_face(tmp_path / "many", MODEL, weights, torch.float32, 5000)
    assert (tmp_path / "one" / "model.safetensors").exists()
    shards = len(list((tmp_path / "many").glob("model-*.safetensors")))
    assert shards > 3
    for folder in ("one", "many"):
        stored = HuggingFaceWeights(tmp_path / folder)
        same({name: stored(name, x.shape) for name, x in weights.items()}, weights)
    stored = HuggingFaceWeights(tmp_path / "many")
    stored.check(parameter_shapes(MODEL))
    for file in (tmp_path / "many").glob("model-*.safetensors"):
        if "model.norm.weight" not in load_file(file):
            file.unlink()
    assert torch.equal(
        stored("norm.weight", weights["norm.weight"].shape), weights["norm.weight"]
    )  # reads no other file


@pytest.mark.fast
def test_what_is_left_out(tmp_path):
    """Frequencies that old files hold, and the output projection that is tied anyway."""
    save_hugging_face(tmp_path / "hf", MODEL, random_weights(MODEL), torch.float32)
    file = tmp_path / "hf" / "model.safetensors"
    extra = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
        "lm_head.weight": torch.ones(MODEL.vocab, MODEL.dim),
    }
    save_file(load_file(file) | extra, file)
    HuggingFaceWeights(tmp_path / "hf").check(parameter_shapes(MODEL))
    with pytest.raises(ValueError, match=r"lm_head\.weight is missing"):
        HuggingFaceWeights(tmp_path / "hf").check(parameter_shapes(replace(MODEL, tied=False)))


@pytest.mark.fast
def test_tokenizer_goes_along(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.train_from_iterator(
        ["some text to learn from, some text"],
        trainers.BpeTrainer(vocab_size=60, special_tokens=["</s>"]),
    )
    made.save(str(tmp_path / "tokenizer.json"))
    save_hugging_face(
        tmp_path / "hf",
        MODEL,
        random_weights(MODEL),
        torch.float32,
        tokenizer=tmp_path / "tokenizer.json",
        bos=0,
        eos=[0, 5],
    )
    source = open_model(tmp_path / "hf")
    assert (source.bos, source.eos) == (0, (0, 5))
    text = "some more text"
    ids = made.encode(text).ids
    assert open_tokenizer(source.tokenizer).encode(text) == ids
    assert (
        transformers.AutoTokenizer.from_pretrained(tmp_path / "hf").encode(
            text, add_special_tokens=False
        )
        == ids
    )


# ---- configurations


BASE = {
    **{
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "vocab_size": 64,
    },
    **{
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "intermediate_size": 48,
        "rms_norm_eps": 1e-5,
    },
    "tie_word_embeddings": True,
}
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def config_of(tmp_path, **changes):
    (tmp_path / "config.json").write_text(
        json.dumps({k: v for k, v in (BASE | changes).items() if v != "absent"})
    )
    return read_model_config(tmp_path)


@pytest.mark.fast
@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 500_000.0, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
        {"rope_theta": 500_000.0, "rope_scaling": {"type": "llama3", **LLAMA3}},
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 500_000.0, **LLAMA3}},
        {"rope_theta": 500_000.0, "rope_parameters": {"rope_type": "llama3", **LLAMA3}},
    ],
)
def test_rope_in_both_spellings(rope, tmp_path):
    got = config_of(tmp_path, **rope)
    assert got.rope_base == 500_000.0 and asdict(got).items() >= SCALED.items()


@pytest.mark.fast
def test_defaults_are_those_of_transformers(tmp_path):
    got = config_of(
        tmp_path,
        num_key_value_heads="absent",
        tie_word_embeddings="absent",
        rms_norm_eps="absent",
        head_dim=None,
    )
    theirs = transformers.LlamaConfig(
        **{k: BASE[k] for k in ("hidden_size", "num_attention_heads")}
    )
    assert (
        got.kv_heads == theirs.num_key_value_heads == 8
        and got.tied is theirs.tie_word_embeddings is False
    )
    assert got.norm_eps == theirs.rms_norm_eps and got.head_dim == theirs.head_dim == 4
    assert got.rope_base == 10_000.0 and got.rope_factor == 1.0
    assert config_of(tmp_path, rope_scaling=None, rope_theta=7.0).rope_base == 7.0
    assert (
        config_of(tmp_path, rope_parameters={"rope_type": "default", "rope_theta": 7.0}).rope_base
        == 7.0
    )


@pytest.mark.fast
@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"architectures": ["MistralForCausalLM"], "model_type": "mistral"},
            r"MistralForCausalLM \(mistral\) is not Llama",
        ),
        ({"model_type": "qwen2"}, "qwen2"),
        ({"attention_bias": True}, "attention_bias=True is not supported"),
        ({"mlp_bias": True}, "mlp_bias=True is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported, only 'silu'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0}},
            "RoPE of type 'linear' is not supported",
        ),
        (
            {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}},
            "RoPE of type 'yarn' is not supported",
        ),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "low_freq_factor is missing"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"hidden_size": "absent"}, "hidden_size is missing"),
        ({"num_key_value_heads": 3}, "heads=8 must be a multiple of kv_heads=3"),
    ],
)
def test_configurations_that_are_refused(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message) as refusal:
        config_of(tmp_path, **changes)
    assert str(refusal.value).startswith(str(tmp_path / "config.json")) and "\n" not in str(
        refusal.value
    )


# ---- mistakes


@pytest.fixture
def written(tmp_path):
    save_hugging_face(tmp_path / "hf", MODEL, random_weights(MODEL), torch.float32, 5000)
    return tmp_path / "hf"


def edit(folder, **changes):
    """Rewrites the folder's weights as one file; None leaves a tensor out."""
    tensors = all_of(folder) | changes
    for file in folder.glob("model*"):
        file.unlink()
    save_file(
        {name: x for name, x in tensors.items() if x is not None}, folder / "model.safetensors"
    )


@pytest.mark.fast
def test_missing_unexpected_and_misshapen_tensors_are_named(written):
    names = {
        "model.norm.weight": None,
        "model.extra": torch.ones(1),
        "model.layers.1.mlp.up_proj.weight": torch.ones(3, 4),
    }
    edit(written, **names)
    with pytest.raises(ValueError) as refusal:
        HuggingFaceWeights(written).check(parameter_shapes(MODEL))
    for part in (
        "norm.weight is missing",
        "extra is unexpected",
        "layers.1.mlp.up_proj.weight is [3, 4], not [48, 32]",
    ):
        assert part in str(refusal.value)
    with pytest.raises(ValueError, match=r"norm\.weight is missing"):
        HuggingFaceWeights(written)("norm.weight", torch.Size([32]))
    with pytest.raises(ValueError, match=r"\[3, 4\], not \[5\]"):
        HuggingFaceWeights(written)("layers.1.mlp.up_proj.weight", torch.Size([5]))
    with pytest.raises(ValueError, match="and 18 more"):
        HuggingFaceWeights(written).check(parameter_shapes(replace(MODEL, layers=4)))


@pytest.mark.fast
def test_weights_for_another_model_are_refused(written):
    assert (
        open_weights(written, replace(MODEL, rope_base=1e6, rope_factor=2.0)) is not None
    )  # a longer context
    for change in (
        {"heads": 4, "kv_heads": 2, "head_dim": 32},
        {"vocab": 128},
        {"norm_eps": 1e-6},
        {"tied": False},
    ):
        with pytest.raises(ValueError, match=f"has {next(iter(change))} "):
            open_weights(written, replace(MODEL, **change))


@pytest.mark.fast
def test_damaged_files_are_named(written):
    shard = sorted(written.glob("model-*"))[1]
    kept = shard.read_bytes()
    for content in (kept[: len(kept) // 2], b"", b"garbage" * 10):
        shard.write_bytes(content)
        with pytest.raises(ValueError, match=shard.name):
            HuggingFaceWeights(written)
    shard.unlink()
    with pytest.raises(ValueError, match=rf"{shard.name} cannot be read"):
        HuggingFaceWeights(written)
    index = written / "model.safetensors.index.json"
    index.write_text("{")
    with pytest.raises(ValueError, match=r"index\.json is no JSON"):
        HuggingFaceWeights(written)
    index.write_text("{}")
    with pytest.raises(ValueError, match="no weight_map"):
        HuggingFaceWeights(written)


@pytest.mark.fast
def test_a_failed_write_leaves_nothing(tmp_path):
    weights = random_weights(MODEL)
    del weights["norm.weight"]
    with pytest.raises(KeyError):
        save_hugging_face(tmp_path / "hf", MODEL, weights, torch.float32)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.fast
def test_mistakes_are_one_line_and_exit_2(written, tmp_path, capsys):
    empty, other = tmp_path / "empty", tmp_path / "other"
    empty.mkdir()
    other.mkdir()
    (other / "config.json").write_text("{}")
    (tmp_path / "pickled").mkdir()
    shutil.copy(written / "config.json", tmp_path / "pickled")
    (tmp_path / "pickled" / "pytorch_model.bin").touch()
    assert convert.main(["from-hf", str(written), str(tmp_path / "run")]) == 0
    (tmp_path / "run" / "checkpoints" / "step-00000007").mkdir()
    capsys.readouterr()
    out = tmp_path / "out"
    for arguments, message in (
        (["from-hf", empty, out], "holds no model"),
        (["from-hf", tmp_path / "nowhere", out], "holds no model"),
        (["from-hf", other, out], "hidden_size is missing"),
        (["from-hf", tmp_path / "pickled", out], "only pytorch_model.bin, which is not read"),
        (["from-hf", written, other], "is there already"),
        (["to-hf", tmp_path / "run", other], "is there already"),
        (
            ["to-hf", tmp_path / "run", out, "--step", "5"],
            "step-00000005 is not there; there are step-00000000, step-00000007",
        ),
        (["to-hf", tmp_path / "run", out, "--step", "7"], "step-00000007' is no checkpoint"),
        (["to-hf", written, out, "--step", "5"], "--step 5"),
        (["to-hf", tmp_path / "run", out, "--dtype", "int4"], "--dtype"),
        (["to-hf", tmp_path / "run", out, "--max-shard-size", "big"], "max_shard_size='big'"),
        (
            ["to-hf", tmp_path / "run", out, "--tokenizer", tmp_path / "no.json"],
            "no.json is not there",
        ),
        ([], "to-hf|from-hf"),
    ):
        with pytest.raises(SystemExit) as stop:
            convert.main([str(a) for a in arguments])
        printed = capsys.readouterr()
        assert stop.value.code == 2 and printed.err.count("\n") == 1 and message in printed.err, (
            printed.err
        )
        assert not out.exists() and not (tmp_path / "out.partial").exists()


@pytest.mark.fast
def test_a_checkpoint_of_something_else(tmp_path):
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(1, {"model": {"w": torch.ones(2)}}, {"step": 1})
        checkpoints.save(2, {"state": {"w": torch.ones(2)}}, {"config": asdict(Config("x", MODEL))})
    with pytest.raises(ValueError, match=r"not written by this version .*'config'"):
        open_model(tmp_path, step=1)
    with pytest.raises(ValueError, match="holds no model"):
        open_model(tmp_path)
    assert list(CheckpointWeights(tmp_path / "checkpoints" / "step-00000001")) == ["w"]


def test_runs_as_a_file(written, tmp_path):
    command = [
        sys.executable,
        "apps/gpt/convert.py",
        "from-hf",
        str(written),
        str(tmp_path / "run"),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "parameters" in done.stdout, done.stderr
