"""Models on disk: a folder of Hugging Face's (config.json, *.safetensors), a run's folder, a checkpoint; read and written.

    source = open_model("Llama-3.2-1B")                      # or a run, or run/checkpoints/step-00001000
    build(config, mesh, attend, weights=source.weights)      # on any mesh: each rank reads one tensor at a time
    save_hugging_face("out", source.model, source.weights, torch.bfloat16)

Our parameters are named as Hugging Face's without the leading "model.", and hold the same numbers: nothing is permuted.
"""

import contextlib
import json
import re
import shutil
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from apps.common.checkpoint import MANIFEST, Checkpoints, read_metadata
from apps.common.engine import fill_parameters
from apps.common.weights import CheckpointWeights, ReadWeight, StoredWeights
from ringx.launch import World, decide

from .config import ModelConfig
from .data.format import INDEX
from .data.tokenizer import ByteTokenizer, JsonTokenizer, load_tokenizer
from .model import Attend, Llama

SINGLE_FILE, SHARD_INDEX = "model.safetensors", "model.safetensors.index.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
CHECKPOINT_NAME = re.compile(r"step-\d{8,}(\.old)?")


# ---- what is there


class HuggingFaceWeights(StoredWeights):
    """The parameters of a Hugging Face Llama: one safetensors file, or shards with an index.

    Left out: RoPE's frequencies, which old files hold, and the output projection where the configuration ties it.

    Raises ValueError if there are no such files, or they cannot be read."""

    def __init__(self, folder: "str | Path"):
        folder = Path(folder)
        self._files = {_our_name(name): file for name, file in _tensor_files(folder).items()}
        stored = {}
        for file in dict.fromkeys(self._files.values()):
            with _open_safetensors(file) as f:
                for name in f.keys():  # noqa: SIM118 - it is no dict
                    piece = f.get_slice(name)
                    if self._files.get(_our_name(name)) == file:
                        stored[_our_name(name)] = (
                            tuple(piece.get_shape()),
                            _torch_dtype(file, name, piece.get_dtype()),
                        )
        if lost := [name for name in self._files if name not in stored]:
            raise ValueError(
                f"{self._files[lost[0]]} lacks {lost[0]}, which {SHARD_INDEX} says is in it; download or write it again."
            )
        ignored = {name for name in stored if name.endswith("rotary_emb.inv_freq")}
        if stored and (folder / "config.json").exists() and read_model_config(folder).tied:
            ignored.add("lm_head.weight")
        super().__init__(
            folder, {name: about for name, about in stored.items() if name not in ignored}
        )
        if not self._stored:
            raise ValueError(f"{folder} holds no parameters.")

    def _read(self, name: str) -> Tensor:
        with _open_safetensors(self._files[name]) as f:
            return f.get_tensor(name if name.startswith("lm_head.") else f"model.{name}")


@dataclass(frozen=True)
class StoredModel:
    """A model on disk."""

    folder: Path  # of Hugging Face's files, or the checkpoint
    model: ModelConfig
    weights: StoredWeights
    seqlen: int  # the context that it was trained for
    bos: int | None  # the token that a text begins with
    eos: tuple[int, ...]  # the tokens that end one
    tokenizer: Path | None  # for ``open_tokenizer``, where it was kept with the model
    data: Path | None  # the prepared text that it was trained on, likewise

    def make(
        self, attend: Attend, *, dtype: torch.dtype, device: "torch.device | str" = "cpu"
    ) -> Llama:
        """The model in this process alone, for inference."""
        llama = (
            Llama.empty(self.model, attend, dtype=dtype)
            .to_empty(device=device)
            .requires_grad_(False)
        )
        fill_parameters(llama, self.weights)
        return llama


def open_model(
    path: "str | Path", *, step: int | None = None, world: World | None = None
) -> StoredModel:
    """The model at `path`; reads no tensor yet.

    Args:
        path: a Hugging Face folder; a run's folder, of which the newest checkpoint without damage is taken; or a checkpoint, which
            is taken as it is.
        step: of a run: the checkpoint of this step, as it is.
        world: of ``ringx.launch.init``: where all ranks call this, they share the search for damage.

    Raises:
        ValueError: there is no such model, or it is none that apps/gpt can be; on every rank."""
    path = Path(path)
    checkpoint, run = path, path.parent.parent
    if (path / "checkpoints").is_dir():
        checkpoint, run = _choose_checkpoint(path, step, world), path
    elif step is not None:
        raise ValueError(
            f"--step {step}: {path} is no run's folder (with checkpoints/ in it); leave --step out."
        )
    elif not (path / ".metadata").is_file():
        return decide(world, lambda: _open_hugging_face(path))
    return decide(world, lambda: _open_checkpoint(checkpoint, run))


def open_weights(
    path: "str | Path", model: ModelConfig, world: World | None = None
) -> StoredWeights:
    """The weights at `path` (as for ``open_model``) for such a model, on any mesh.  RoPE may be another: that is how a context is
    made longer.

    Raises ValueError naming what differs."""
    source = open_model(path, world=world)
    for f in fields(ModelConfig):
        there, here = getattr(source.model, f.name), getattr(model, f.name)
        if there != here and not f.name.startswith("rope_"):
            raise ValueError(
                f"{path} has {f.name} {there}, but this model has {f.name} {here}; give the --config of its sizes."
            )
    source.weights.check(parameter_shapes(model))
    return source.weights


def open_tokenizer(path: "str | Path") -> "ByteTokenizer | JsonTokenizer":
    """ "bytes", a folder made by apps/gpt/prepare.py, a tokenizer.json, or the folder of one; ValueError if it is none of these."""
    if str(path) == "bytes":
        return ByteTokenizer()
    path = Path(path)
    if (path / INDEX).exists():
        return load_tokenizer(path)
    file = path / TOKENIZER_FILES[0] if path.is_dir() else path
    said = (
        _read_json(file.with_name(TOKENIZER_FILES[1])).get("eos_token")
        if file.with_name(TOKENIZER_FILES[1]).exists()
        else None
    )
    return JsonTokenizer(file, said["content"] if isinstance(said, dict) else said)


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Of every parameter."""
    return {
        name: tuple(p.shape)
        for name, p in Llama.empty(config, lambda q, k, v: q).named_parameters()
    }


def _choose_checkpoint(run: Path, step: int | None, world: World | None) -> Path:
    folder = run / "checkpoints"
    if step is not None:
        path = folder / f"step-{step:08d}"
        if not path.is_dir():
            there = sorted(p.name for p in folder.iterdir() if CHECKPOINT_NAME.fullmatch(p.name))
            raise ValueError(
                f"--step {step}: {path} is not there; there are {', '.join(there) or 'none'}."
            )
        return path
    with Checkpoints(folder, world, report=lambda text: print(text, flush=True)) as checkpoints:
        found = checkpoints.newest()
    if found is None:
        raise ValueError(f"{run} holds no checkpoint that can be used.")
    return found[0]


def _open_checkpoint(path: Path, run: Path) -> StoredModel:
    about = read_metadata(path)
    if not (path / MANIFEST).exists():
        raise ValueError(
            f"{path} is no complete checkpoint ({MANIFEST} is missing); take another step."
        )
    try:
        said = about["config"]
        model, seqlen = ModelConfig(**said["model"]), int(said["train"]["seqlen"])
    except (TypeError, KeyError, ValueError) as e:
        raise ValueError(
            f"{path} was not written by this version of apps.gpt.train: {type(e).__name__}: {e}."
        ) from None
    weights = CheckpointWeights(path)
    weights.check(parameter_shapes(model))
    tokenizer = next(
        (
            p
            for p in (run / "data", run / TOKENIZER_FILES[0])
            if (p / INDEX).exists() or p.is_file()
        ),
        None,
    )
    eos, bos = about.get("eos"), about.get("bos")
    if (
        eos is None and tokenizer is not None
    ):  # in prepared text, documents follow the end of another
        bos = open_tokenizer(tokenizer).eos
        eos = [bos]
    data = run / "data" if (run / "data" / INDEX).exists() else None
    return StoredModel(path, model, weights, seqlen, bos, tuple(eos or ()), tokenizer, data)


# ---- Hugging Face's files


def read_model_config(folder: "str | Path") -> ModelConfig:
    """The shape of the Llama in a Hugging Face folder, from its config.json (of transformers 4 or 5).

    Raises ValueError naming what apps/gpt's model cannot do: other architectures, biases, RoPE types and activations."""
    file = Path(folder) / "config.json"
    c = _read_json(file)
    kinds = c.get("architectures") or ["LlamaForCausalLM"]
    if kinds != ["LlamaForCausalLM"] or c.get("model_type", "llama") != "llama":
        raise ValueError(
            f"{file}: {', '.join(kinds)} ({c.get('model_type')}) is not LlamaForCausalLM, the only one known here."
        )
    for name, known in (
        ("attention_bias", False),
        ("mlp_bias", False),
        ("hidden_act", "silu"),
        ("quantization_config", None),
    ):
        if c.get(name, known) != known:
            raise ValueError(f"{file}: {name}={c[name]!r} is not supported, only {known!r}.")
    try:
        return ModelConfig(
            dim=c["hidden_size"],
            layers=c["num_hidden_layers"],
            heads=c["num_attention_heads"],
            kv_heads=c.get("num_key_value_heads") or c["num_attention_heads"],
            ffn=c["intermediate_size"],
            vocab=c["vocab_size"],
            head_dim=c.get("head_dim") or 0,
            norm_eps=c.get("rms_norm_eps", 1e-6),
            tied=c.get("tie_word_embeddings", False),
            **_rope_config(file, c),
        )
    except KeyError as e:
        raise ValueError(f"{file}: {e.args[0]} is missing.") from None
    except ValueError as e:
        raise ValueError(str(e) if str(e).startswith(str(file)) else f"{file}: {e}") from None


def _rope_config(file: Path, c: dict[str, Any]) -> dict[str, Any]:
    """transformers 5 says all in rope_parameters, 4 has rope_theta and rope_scaling, whose rope_type once was named type."""
    said = c.get("rope_parameters") or c.get("rope_scaling") or {}
    kind = said.get("rope_type", said.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise ValueError(
            f"{file}: RoPE of type {kind!r} is not supported, only default and llama3."
        )
    if (part := said.get("partial_rotary_factor", c.get("partial_rotary_factor", 1.0))) != 1:
        raise ValueError(f"{file}: partial_rotary_factor={part} is not supported, only 1.")
    base = {"rope_base": float(said.get("rope_theta", c.get("rope_theta", 10_000.0)))}
    if kind == "default":
        return base
    return base | {
        "rope_factor": said["factor"],
        "rope_low": said["low_freq_factor"],
        "rope_high": said["high_freq_factor"],
        "rope_original": said["original_max_position_embeddings"],
    }


def save_hugging_face(
    folder: "str | Path",
    config: ModelConfig,
    tensors: "ReadWeight | Mapping[str, Tensor]",
    dtype: torch.dtype,
    max_shard_size: "int | str" = "5GB",
    *,
    seqlen: int = 8192,
    bos: int | None = None,
    eos: Collection[int] = (),
    tokenizer: "str | Path | None" = None,
) -> None:
    """Writes a folder that transformers.LlamaForCausalLM.from_pretrained loads: aside, as FOLDER.partial, then renamed.

    Args:
        folder: new, or empty.
        tensors: by our names: a dict, or what ``build`` takes as weights; then one shard is in memory at a time.
        dtype: of the files.
        max_shard_size: of a file, in bytes or as "5GB".
        seqlen: the context that the model was trained for; others are told.
        bos, eos: tokens that begin and end a text; others are told.
        tokenizer: a tokenizer.json to put beside it.

    Raises ValueError if `folder` holds something, or max_shard_size makes no sense."""
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file

    folder, read = (
        Path(folder),
        tensors if callable(tensors) else (lambda name, shape: tensors[name]),
    )
    expect_new(folder)
    want = {
        _hf_name(name): (name, torch.Size(shape))
        for name, shape in parameter_shapes(config).items()
    }
    try:
        plan = split_torch_state_dict_into_shards(
            {
                theirs: torch.empty(shape, dtype=dtype, device="meta")
                for theirs, (_, shape) in want.items()
            },
            max_shard_size=max_shard_size,
        )
    except ValueError as e:
        raise ValueError(
            f"max_shard_size={max_shard_size!r} must be bytes, or as 5GB: {e}"
        ) from None
    with _aside(folder) as aside:
        for file, names in plan.filename_to_tensors.items():
            part = {
                name: read(*want[name]).detach().to("cpu", dtype).contiguous() for name in names
            }
            save_file(part, aside / file, metadata={"format": "pt"})
        if plan.is_sharded:
            _write_json(
                aside / SHARD_INDEX,
                {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename},
            )
        _write_json(aside / "config.json", _config_json(config, dtype, seqlen, bos, eos))
        if tokenizer is not None:
            copy_tokenizer(tokenizer, aside)


def copy_tokenizer(tokenizer: "str | Path", to: Path) -> None:
    """A tokenizer.json, and what says how transformers is to read it."""
    file = Path(tokenizer)
    file = file / TOKENIZER_FILES[0] if file.is_dir() else file
    if not file.exists():
        raise ValueError(f"{file} is not there.")
    for name in TOKENIZER_FILES:
        source = file if name == TOKENIZER_FILES[0] else file.with_name(name)
        if source.exists():
            shutil.copyfile(source, to / name)
    if not (to / TOKENIZER_FILES[1]).exists():
        _write_json(to / TOKENIZER_FILES[1], {"tokenizer_class": "PreTrainedTokenizerFast"})


def expect_new(folder: Path) -> None:
    """ValueError if there is something already."""
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ValueError(f"{folder} is there already; name a new or an empty folder.")


def _config_json(
    c: ModelConfig, dtype: torch.dtype, seqlen: int, bos: int | None, eos: Collection[int]
) -> dict[str, Any]:
    """In the words of transformers 4, which 5 and all others understand."""
    scaling = None
    if c.rope_factor != 1:
        scaling = {
            "rope_type": "llama3",
            "factor": c.rope_factor,
            "low_freq_factor": c.rope_low,
            "high_freq_factor": c.rope_high,
            "original_max_position_embeddings": c.rope_original,
        }
    ends = list(eos)
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": c.dim,
        "num_hidden_layers": c.layers,
        "num_attention_heads": c.heads,
        "num_key_value_heads": c.kv_heads,
        "head_dim": c.head_dim,
        "intermediate_size": c.ffn,
        "vocab_size": c.vocab,
        "rms_norm_eps": c.norm_eps,
        "tie_word_embeddings": c.tied,
        "rope_theta": c.rope_base,
        "rope_scaling": scaling,
        "max_position_embeddings": seqlen,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": bos,
        "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }


def _open_hugging_face(folder: Path) -> StoredModel:
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"{folder} holds no model: neither a Hugging Face folder (config.json), nor a run (checkpoints/), nor a checkpoint."
        )
    model, weights = read_model_config(folder), HuggingFaceWeights(folder)
    weights.check(parameter_shapes(model))
    said = _read_json(folder / "config.json")
    more = (
        _read_json(folder / "generation_config.json")
        if (folder / "generation_config.json").exists()
        else {}
    )
    ends = more.get("eos_token_id", said.get("eos_token_id"))
    eos = () if ends is None else (ends,) if isinstance(ends, int) else tuple(ends)
    tokenizer = folder / TOKENIZER_FILES[0]
    bos, seqlen = said.get("bos_token_id"), said.get("max_position_embeddings", 2048)
    return StoredModel(
        folder, model, weights, seqlen, bos, eos, tokenizer if tokenizer.exists() else None, None
    )


def _tensor_files(folder: Path) -> dict[str, Path]:
    """Their name of each tensor -> its file."""
    if (folder / SHARD_INDEX).exists():
        index = _read_json(folder / SHARD_INDEX)
        if not isinstance(index.get("weight_map"), dict):
            raise ValueError(
                f"{folder / SHARD_INDEX} has no weight_map; download or write it again."
            )
        return {name: folder / file for name, file in index["weight_map"].items()}
    if not (folder / SINGLE_FILE).exists():
        pickled = "pytorch_model.bin" if any(folder.glob("pytorch_model*.bin")) else None
        raise ValueError(
            f"{folder} has no {SINGLE_FILE}"
            + (
                f", only {pickled}, which is not read; save the model with transformers again."
                if pickled
                else f" and no {SHARD_INDEX}."
            )
        )
    with _open_safetensors(folder / SINGLE_FILE) as f:
        return dict.fromkeys(f.keys(), folder / SINGLE_FILE)


@contextlib.contextmanager
def _open_safetensors(file: Path) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as f:
            yield f
    except OSError as e:
        raise ValueError(f"{file} cannot be read: {e.strerror or e}.") from None
    except SafetensorError as e:
        raise ValueError(f"{file} is damaged: {e}; download or write it again.") from None


def _torch_dtype(file: Path, name: str, kind: str) -> torch.dtype:
    known = {
        "F64": torch.float64,
        "F32": torch.float32,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
    }
    if kind not in known:
        raise ValueError(f"{file}: {name} is {kind}; only {', '.join(known)} are known here.")
    return known[kind]


def _our_name(name: str) -> str:
    return name.removeprefix("model.")


def _hf_name(name: str) -> str:
    return name if name.startswith("lm_head.") else f"model.{name}"


def _read_json(file: Path) -> dict[str, Any]:
    try:
        said = json.loads(file.read_text(encoding="utf-8"))
    except OSError as e:
        raise ValueError(f"{file} cannot be read: {e.strerror}.") from None
    except ValueError as e:
        raise ValueError(f"{file} is no JSON: {e}.") from None
    if not isinstance(said, dict):
        raise ValueError(f"{file} is no JSON object.")
    return said


def _write_json(file: Path, what: dict[str, Any]) -> None:
    file.write_text(json.dumps(what, indent=2) + "\n", encoding="utf-8")


@contextlib.contextmanager
def _aside(folder: Path) -> Iterator[Path]:
    """A folder to write into, which becomes `folder` if all goes well."""
    aside = folder.with_name(folder.name + ".partial")
    if aside.exists():
        raise ValueError(
            f"{aside} is there, of a process that is writing or was killed; delete it."
        )
    aside.mkdir(parents=True)
    try:
        yield aside
        aside.rename(folder)  # over nothing or an empty folder, never over files
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
