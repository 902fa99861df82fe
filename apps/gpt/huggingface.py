"""Models on disk: a Hugging Face folder (config.json, *.safetensors), a run's folder, a checkpoint.

    stored = open_model("Llama-3.2-1B")                     # or a run, or one of its checkpoints
    build(config, mesh, attend, weights=stored.weights)     # each rank reads one tensor at a time
    save_hugging_face("out", stored.model, stored.weights, torch.bfloat16)

Our parameters are named as Hugging Face's without the leading "model.", and hold the same numbers:
nothing is permuted.
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
from ringx.files import write_folder
from ringx.launch import World, decide

from .config import ModelConfig
from .data.format import INDEX
from .data.tokenizer import ByteTokenizer, JsonTokenizer, TextTokenizer, load_tokenizer
from .model import AttentionFunction, Llama

SINGLE_FILE = "model.safetensors"
SHARD_INDEX = "model.safetensors.index.json"
TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
TOKENIZER_FILES = (TOKENIZER, TOKENIZER_CONFIG, "special_tokens_map.json")
CHECKPOINT_NAME = re.compile(r"step-\d{8,}(\.old)?")
SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


# ---- opening a model


class HuggingFaceWeights(StoredWeights):
    """The parameters of a Hugging Face Llama: one safetensors file, or shards with an index.

    Left out are RoPE's frequencies, which old files hold, and the output projection where the
    configuration ties it to the embedding.

    Raises:
        ValueError: there are no such files, or they cannot be read."""

    def __init__(self, folder: str | Path):
        folder = Path(folder)
        self._files = {_our_name(name): file for name, file in _tensor_files(folder).items()}
        stored = self._read_shapes_and_dtypes()
        self._expect_complete(stored)
        ignored = _ignored_tensors(folder, stored)
        parameters = {name: entry for name, entry in stored.items() if name not in ignored}
        super().__init__(folder, parameters)
        if not self._stored:
            raise ValueError(f"{folder} holds no parameters.")

    def _read_shapes_and_dtypes(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """(shape, dtype) of each tensor that is in the file in which it is to be found."""
        stored = {}
        for file in dict.fromkeys(self._files.values()):
            with _open_safetensors(file) as tensors:
                for hf_name in tensors.keys():  # noqa: SIM118 - it is no dict
                    tensor = tensors.get_slice(hf_name)
                    name = _our_name(hf_name)
                    if self._files.get(name) == file:
                        dtype = _torch_dtype(file, hf_name, tensor.get_dtype())
                        stored[name] = (tuple(tensor.get_shape()), dtype)
        return stored

    def _expect_complete(self, stored: Collection[str]) -> None:
        """ValueError where a file lacks a tensor that the index says is in it."""
        for name, file in self._files.items():
            if name not in stored:
                raise ValueError(
                    f"{file} lacks {name}, which {SHARD_INDEX} says is in it; "
                    "download or write it again."
                )

    def _read(self, name: str) -> Tensor:
        with _open_safetensors(self._files[name]) as tensors:
            return tensors.get_tensor(_hf_name(name))


def _ignored_tensors(folder: Path, stored: Collection[str]) -> set[str]:
    """The stored tensors that are no parameters of our model, by our names."""
    ignored = {name for name in stored if name.endswith("rotary_emb.inv_freq")}
    if stored and (folder / "config.json").exists() and read_model_config(folder).tied:
        ignored.add("lm_head.weight")
    return ignored


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
    data: Path | None  # the prepared text that it was trained on, where it was kept

    def make(
        self, attend: AttentionFunction, *, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> Llama:
        """The model in this process alone, for inference."""
        llama = Llama.empty(self.model, attend, dtype=dtype)
        llama = llama.to_empty(device=device).requires_grad_(False)
        fill_parameters(llama, self.weights)
        return llama


def open_model(
    path: str | Path, *, step: int | None = None, world: World | None = None
) -> StoredModel:
    """The model at `path`; reads no tensor yet.

    Args:
        path: a Hugging Face folder; a run's folder, of which the newest checkpoint without damage
            is taken; or a checkpoint, which is taken as it is.
        step: of a run: the checkpoint of this step, as it is.
        world: of ``ringx.launch.init``: where all ranks call this, they share the search for
            damage.

    Raises:
        ValueError: there is no such model, or it is none that apps/gpt can be; on every rank."""
    path = Path(path)
    if (path / "checkpoints").is_dir():
        checkpoint = _choose_checkpoint(path, step, world)
        return decide(world, lambda: _open_checkpoint(checkpoint, run=path))
    if step is not None:
        raise ValueError(
            f"--step {step}: {path} is no run's folder (with checkpoints/ in it); leave --step out."
        )
    if (path / ".metadata").is_file():
        return decide(world, lambda: _open_checkpoint(path, run=path.parent.parent))
    return decide(world, lambda: _open_hugging_face(path))


def open_weights(path: str | Path, model: ModelConfig, world: World | None = None) -> StoredWeights:
    """The weights at `path` (as for ``open_model``) for a model of this shape, on any mesh.

    RoPE may differ: that is how a context is made longer.

    Raises:
        ValueError: naming what differs."""
    stored = open_model(path, world=world)
    for field in fields(ModelConfig):
        name = field.name
        stored_value = getattr(stored.model, name)
        wanted_value = getattr(model, name)
        if stored_value != wanted_value and not name.startswith("rope_"):
            raise ValueError(
                f"{path} has {name} {stored_value}, but this model has {name} {wanted_value}; "
                "give the --config of its sizes."
            )
    stored.weights.check(parameter_shapes(model))
    return stored.weights


def open_tokenizer(path: str | Path) -> TextTokenizer:
    """The tokenizer at `path`.

    Args:
        path: "bytes", a folder made by apps/gpt/prepare.py, a tokenizer.json, or its folder.

    Raises:
        ValueError: it is none of these."""
    if str(path) == "bytes":
        return ByteTokenizer()
    path = Path(path)
    if (path / INDEX).exists():
        return load_tokenizer(path)
    file = path / TOKENIZER if path.is_dir() else path
    config_file = file.with_name(TOKENIZER_CONFIG)
    if not config_file.exists():
        return JsonTokenizer(file)
    eos = _read_json(config_file).get("eos_token")
    if isinstance(eos, dict):  # with its options
        eos = eos["content"]
    return JsonTokenizer(file, eos)


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter, by our names."""
    llama = Llama.empty(config, lambda q, k, v: q)
    return {name: tuple(parameter.shape) for name, parameter in llama.named_parameters()}


def _choose_checkpoint(run: Path, step: int | None, world: World | None) -> Path:
    """The checkpoint of a step; None: the newest one without damage."""
    folder = run / "checkpoints"
    if step is not None:
        path = folder / f"step-{step:08d}"
        if not path.is_dir():
            existing = sorted(p.name for p in folder.iterdir() if CHECKPOINT_NAME.fullmatch(p.name))
            raise ValueError(
                f"--step {step}: {path} is not there; there are {', '.join(existing) or 'none'}."
            )
        return path
    with Checkpoints(folder, world, report=lambda text: print(text, flush=True)) as checkpoints:
        newest = checkpoints.newest()
    if newest is None:
        raise ValueError(f"{run} holds no checkpoint that can be used.")
    return newest[0]


def _open_checkpoint(path: Path, run: Path) -> StoredModel:
    metadata = read_metadata(path)
    if not (path / MANIFEST).exists():
        raise ValueError(
            f"{path} is no complete checkpoint ({MANIFEST} is missing); take another step."
        )
    try:
        config = metadata["config"]
        model = ModelConfig(**config["model"])
        seqlen = int(config["train"]["seqlen"])
    except (TypeError, KeyError, ValueError) as e:
        raise ValueError(
            f"{path} was not written by this version of apps.gpt.train: {type(e).__name__}: {e}."
        ) from None
    weights = CheckpointWeights(path)
    weights.check(parameter_shapes(model))
    data = run / "data"
    is_prepared_text = (data / INDEX).exists()
    tokenizer = None
    if is_prepared_text or data.is_file():
        tokenizer = data
    elif (run / TOKENIZER).is_file():
        tokenizer = run / TOKENIZER
    bos = metadata.get("bos")
    eos = metadata.get("eos")
    if eos is None and tokenizer is not None:
        # In prepared text a document follows the end of another one.
        bos = open_tokenizer(tokenizer).eos
        eos = [bos]
    return StoredModel(
        folder=path,
        model=model,
        weights=weights,
        seqlen=seqlen,
        bos=bos,
        eos=tuple(eos or ()),
        tokenizer=tokenizer,
        data=data if is_prepared_text else None,
    )


def _open_hugging_face(folder: Path) -> StoredModel:
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"{folder} holds no model: neither a Hugging Face folder (config.json), "
            "nor a run (checkpoints/), nor a checkpoint."
        )
    model = read_model_config(folder)
    weights = HuggingFaceWeights(folder)
    weights.check(parameter_shapes(model))
    config = _read_json(folder / "config.json")
    tokenizer = folder / TOKENIZER
    return StoredModel(
        folder=folder,
        model=model,
        weights=weights,
        seqlen=config.get("max_position_embeddings", 2048),
        bos=config.get("bos_token_id"),
        eos=_end_tokens(folder, config),
        tokenizer=tokenizer if tokenizer.exists() else None,
        data=None,
    )


def _end_tokens(folder: Path, config: dict[str, Any]) -> tuple[int, ...]:
    """The tokens that end a text: generation_config.json decides before config.json."""
    end = config.get("eos_token_id")
    generation_file = folder / "generation_config.json"
    if generation_file.exists():
        end = _read_json(generation_file).get("eos_token_id", end)
    if end is None:
        return ()
    if isinstance(end, int):
        return (end,)
    return tuple(end)


# ---- config.json


def read_model_config(folder: str | Path) -> ModelConfig:
    """The shape of the Llama in a Hugging Face folder, from its config.json.

    It may be of transformers 4 or 5.

    Raises:
        ValueError: naming what apps/gpt's model cannot do: other architectures, biases, RoPE types
            and activations."""
    file = Path(folder) / "config.json"
    config = _read_json(file)
    _expect_known_model(file, config)
    try:
        return ModelConfig(
            dim=config["hidden_size"],
            layers=config["num_hidden_layers"],
            heads=config["num_attention_heads"],
            kv_heads=config.get("num_key_value_heads") or config["num_attention_heads"],
            ffn=config["intermediate_size"],
            vocab=config["vocab_size"],
            head_dim=config.get("head_dim") or 0,
            norm_eps=config.get("rms_norm_eps", 1e-6),
            tied=config.get("tie_word_embeddings", False),
            **_rope_config(file, config),
        )
    except KeyError as e:
        raise ValueError(f"{file}: {e.args[0]} is missing.") from None
    except ValueError as e:
        raise ValueError(str(e) if str(e).startswith(str(file)) else f"{file}: {e}") from None


def _expect_known_model(file: Path, config: dict[str, Any]) -> None:
    """ValueError for an architecture or an option that our model does not have."""
    architectures = config.get("architectures") or ["LlamaForCausalLM"]
    model_type = config.get("model_type", "llama")
    if architectures != ["LlamaForCausalLM"] or model_type != "llama":
        raise ValueError(
            f"{file}: {', '.join(architectures)} ({config.get('model_type')}) is not "
            "LlamaForCausalLM, the only one known here."
        )
    supported = {
        "attention_bias": False,
        "mlp_bias": False,
        "hidden_act": "silu",
        "quantization_config": None,
    }
    for name, value in supported.items():
        if config.get(name, value) != value:
            raise ValueError(f"{file}: {name}={config[name]!r} is not supported, only {value!r}.")


def _rope_config(file: Path, config: dict[str, Any]) -> dict[str, Any]:
    """RoPE's fields of ModelConfig.

    transformers 5 has all in rope_parameters; 4 has rope_theta and rope_scaling, whose rope_type
    was once named type."""
    parameters = config.get("rope_parameters") or config.get("rope_scaling") or {}
    rope_type = parameters.get("rope_type", parameters.get("type", "default"))
    if rope_type not in ("default", "llama3"):
        raise ValueError(
            f"{file}: RoPE of type {rope_type!r} is not supported, only default and llama3."
        )
    factor = parameters.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    if factor != 1:
        raise ValueError(f"{file}: partial_rotary_factor={factor} is not supported, only 1.")
    base = float(parameters.get("rope_theta", config.get("rope_theta", 10_000.0)))
    if rope_type == "default":
        return {"rope_base": base}
    return {
        "rope_base": base,
        "rope_factor": parameters["factor"],
        "rope_low": parameters["low_freq_factor"],
        "rope_high": parameters["high_freq_factor"],
        "rope_original": parameters["original_max_position_embeddings"],
    }


def _config_json(
    config: ModelConfig, dtype: torch.dtype, *, seqlen: int, bos: int | None, eos: Collection[int]
) -> dict[str, Any]:
    """config.json with the keys of transformers 4, which version 5 and all others understand."""
    scaling = None
    if config.rope_factor != 1:
        scaling = {
            "rope_type": "llama3",
            "factor": config.rope_factor,
            "low_freq_factor": config.rope_low,
            "high_freq_factor": config.rope_high,
            "original_max_position_embeddings": config.rope_original,
        }
    end_tokens = list(eos)
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": config.dim,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.ffn,
        "vocab_size": config.vocab,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied,
        "rope_theta": config.rope_base,
        "rope_scaling": scaling,
        "max_position_embeddings": seqlen,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": bos,
        "eos_token_id": end_tokens[0] if len(end_tokens) == 1 else end_tokens or None,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }


# ---- writing


def save_hugging_face(
    folder: str | Path,
    config: ModelConfig,
    tensors: ReadWeight | Mapping[str, Tensor],
    dtype: torch.dtype,
    max_shard_size: int | str = "5GB",
    *,
    seqlen: int = 8192,
    bos: int | None = None,
    eos: Collection[int] = (),
    tokenizer: str | Path | None = None,
) -> None:
    """Writes a folder that transformers.LlamaForCausalLM.from_pretrained loads, in one step.

    Args:
        folder: new, or empty.
        tensors: by our names: a dict, or what ``build`` takes as weights; then one shard is in
            memory at a time.
        dtype: of the files.
        max_shard_size: of a file, in bytes or as "5GB".
        seqlen: the context that the model was trained for; it is only noted.
        bos, eos: tokens that begin and end a text; they are only noted.
        tokenizer: a tokenizer.json to put beside it.

    Raises:
        ValueError: `folder` holds something, FOLDER.partial exists, or max_shard_size makes no
            sense."""
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file

    folder = Path(folder)
    expect_new(folder)
    read = tensors if callable(tensors) else (lambda name, shape: tensors[name])
    shapes = {name: torch.Size(shape) for name, shape in parameter_shapes(config).items()}
    meta_tensors = {
        _hf_name(name): torch.empty(shape, dtype=dtype, device="meta")
        for name, shape in shapes.items()
    }
    try:
        shards = split_torch_state_dict_into_shards(meta_tensors, max_shard_size=max_shard_size)
    except ValueError as e:
        raise ValueError(
            f"max_shard_size={max_shard_size!r} must be bytes, or as 5GB: {e}"
        ) from None

    def read_as(hf_name: str) -> Tensor:
        name = _our_name(hf_name)
        return read(name, shapes[name]).detach().to("cpu", dtype).contiguous()

    def fill(aside: Path) -> None:
        for file, hf_names in shards.filename_to_tensors.items():
            shard = {hf_name: read_as(hf_name) for hf_name in hf_names}
            save_file(shard, aside / file, metadata={"format": "pt"})
        if shards.is_sharded:
            shard_index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
            _write_json(aside / SHARD_INDEX, shard_index)
        config_json = _config_json(config, dtype, seqlen=seqlen, bos=bos, eos=eos)
        _write_json(aside / "config.json", config_json)
        if tokenizer is not None:
            copy_tokenizer(tokenizer, aside)

    try:
        write_folder(folder, fill)
    except FileExistsError as e:  # the user's to solve, unlike other OSErrors
        raise ValueError(str(e)) from None


def copy_tokenizer(tokenizer: str | Path, folder: Path) -> None:
    """Copies a tokenizer.json, and the files that tell transformers how to read it."""
    file = Path(tokenizer)
    if file.is_dir():
        file = file / TOKENIZER
    if not file.exists():
        raise ValueError(f"{file} is not there.")
    for name in TOKENIZER_FILES:
        source = file if name == TOKENIZER else file.with_name(name)
        if source.exists():
            shutil.copyfile(source, folder / name)
    if not (folder / TOKENIZER_CONFIG).exists():
        _write_json(folder / TOKENIZER_CONFIG, {"tokenizer_class": "PreTrainedTokenizerFast"})


def expect_new(folder: Path) -> None:
    """ValueError if `folder` is a file, or holds something."""
    is_empty_folder = folder.is_dir() and not any(folder.iterdir())
    if folder.exists() and not is_empty_folder:
        raise ValueError(f"{folder} is there already; name a new or an empty folder.")


# ---- files


def _tensor_files(folder: Path) -> dict[str, Path]:
    """{Hugging Face's name of a tensor: its file}."""
    if (folder / SHARD_INDEX).exists():
        index = _read_json(folder / SHARD_INDEX)
        if not isinstance(index.get("weight_map"), dict):
            raise ValueError(
                f"{folder / SHARD_INDEX} has no weight_map; download or write it again."
            )
        return {name: folder / file for name, file in index["weight_map"].items()}
    if not (folder / SINGLE_FILE).exists():
        if any(folder.glob("pytorch_model*.bin")):
            raise ValueError(
                f"{folder} has no {SINGLE_FILE}, only pytorch_model.bin, which is not read; "
                "save the model with transformers again."
            )
        raise ValueError(f"{folder} has no {SINGLE_FILE} and no {SHARD_INDEX}.")
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


def _torch_dtype(file: Path, name: str, safetensors_dtype: str) -> torch.dtype:
    if safetensors_dtype not in SAFETENSORS_DTYPES:
        raise ValueError(
            f"{file}: {name} is {safetensors_dtype}; "
            f"only {', '.join(SAFETENSORS_DTYPES)} are known here."
        )
    return SAFETENSORS_DTYPES[safetensors_dtype]


def _our_name(hf_name: str) -> str:
    return hf_name.removeprefix("model.")


def _hf_name(name: str) -> str:
    return name if name.startswith("lm_head.") else f"model.{name}"


def _read_json(file: Path) -> dict[str, Any]:
    """A JSON object.  ValueError if the file is none."""
    try:
        contents = json.loads(file.read_text(encoding="utf-8"))
    except OSError as e:
        raise ValueError(f"{file} cannot be read: {e.strerror}.") from None
    except ValueError as e:
        raise ValueError(f"{file} is no JSON: {e}.") from None
    if not isinstance(contents, dict):
        raise ValueError(f"{file} is no JSON object.")
    return contents


def _write_json(file: Path, contents: dict[str, Any]) -> None:
    file.write_text(json.dumps(contents, indent=2) + "\n", encoding="utf-8")
