"""Hugging Face's folders: config.json and *.safetensors, read and written. Nothing here knows of layers.

    read_config, write_config     config.json of a Llama
    tensor_files, load_tensor     one file or many (shards), one tensor at a time
    save_tensors
"""
import contextlib
import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from support.files import BadInput, atomic, read_json, write_text

# field of model.ModelConfig -> (its name in config.json, type)
HF_NAMES = {"vocab_size": ("vocab_size", int), "dim": ("hidden_size", int),
            "n_layers": ("num_hidden_layers", int), "n_heads": ("num_attention_heads", int),
            "n_kv_heads": ("num_key_value_heads", int), "head_dim": ("head_dim", int),
            "ffn_dim": ("intermediate_size", int), "max_seq_len": ("max_position_embeddings", int),
            "rope_theta": ("rope_theta", float), "norm_eps": ("rms_norm_eps", float),
            "tie_embeddings": ("tie_word_embeddings", bool)}


def hf_name(name: str) -> str:
    return name if name.startswith("lm_head") else "model." + name


def write_config(path: Path, config: dict, dtype: str) -> None:
    """What `transformers.AutoModelForCausalLM` wants to know; config: a ModelConfig as a dict."""
    entries = {"architectures": ["LlamaForCausalLM"], "hidden_act": "silu", "attention_bias": False,
               "mlp_bias": False, "bos_token_id": None, "eos_token_id": None, **config["others"],
               "model_type": "llama", "torch_dtype": dtype, "rope_scaling": config["rope_scaling"],
               **{theirs: config[ours] for ours, (theirs, _) in HF_NAMES.items()}}
    write_text(path, json.dumps(entries, indent=2) + "\n")


def read_config(path: Path) -> dict:
    """The fields of a ModelConfig, with the defaults of transformers' LlamaConfig; BadInput if the file is
    that of another kind of model."""
    theirs = read_json(path)
    for key, known in (("model_type", "llama"), ("hidden_act", "silu"), ("attention_bias", False),
                       ("mlp_bias", False), ("quantization_config", None)):
        if theirs.get(key, None if key == "model_type" else known) != known:
            raise BadInput(f"{path}: {key} is {theirs.get(key)!r}, only {known!r} is known here")
    rope = theirs.get("rope_parameters") or {}  # transformers 5 writes both rope entries into this one
    scaling = theirs.get("rope_scaling") or rope
    if not isinstance(rope, dict) or not isinstance(scaling, dict):
        raise BadInput(f"{path}: rope_parameters and rope_scaling must be objects")
    given = {"rope_theta": rope.get("rope_theta", 1e4), "max_position_embeddings": 2048, "rms_norm_eps": 1e-6,
             "tie_word_embeddings": False, "num_key_value_heads": theirs.get("num_attention_heads"),
             **{key: value for key, value in theirs.items() if value is not None}}
    ours = {"rope_scaling": rope_scaling(path, scaling)}
    for name, (key, kind) in HF_NAMES.items():
        value = given.get(key, ours["dim"] // ours["n_heads"] if key == "head_dim" else None)
        good = type(value) is kind or kind is float and type(value) is int
        limit = 2**28 if kind is int else 1e30  # no tensor's size can overflow then, no number a float
        if not good or kind is not bool and not 0 < value < limit:
            raise BadInput(f"{path}: {key} is {value!r}; it must be of type {kind.__name__}"
                           + ("" if kind is bool else f", above 0 and below {limit}"))
        ours[name] = value
    if ours["n_heads"] % ours["n_kv_heads"] or ours["head_dim"] % 2:
        raise BadInput(f"{path}: num_key_value_heads must divide num_attention_heads, and head_dim be even")
    known = {*(key for key, _ in HF_NAMES.values()), "rope_scaling", "rope_parameters", "torch_dtype",
             "dtype", "transformers_version", "architectures", "model_type", "hidden_act", "attention_bias",
             "mlp_bias"}
    others = {key: value for key, value in theirs.items() if key not in known and value is not None}
    return ours | {"others": others}


def rope_scaling(path: Path, scaling: dict) -> dict | None:
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return None
    if kind != "llama3":
        raise BadInput(f"{path}: rope_type is {kind!r}, only 'default' and 'llama3' are known here")
    needed = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    for key in needed:
        if type(scaling.get(key)) not in (int, float) or not 0 < scaling[key] < 1e30:
            raise BadInput(f"{path}: rope scaling llama3 needs {key}, a number above 0")
    if scaling["low_freq_factor"] == scaling["high_freq_factor"]:
        raise BadInput(f"{path}: rope scaling llama3 needs two different freq_factors")
    return {"rope_type": "llama3", **{key: scaling[key] for key in needed}}


def save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file atomically; OSError if the disk does not take it."""
    try:
        with atomic(path) as temporary:
            save_file(tensors, temporary, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"{path}: cannot be written ({error})") from None


@contextlib.contextmanager
def opened(path: Path):
    """A safetensors file, mapped into memory; BadInput if there is none or it is damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file") from None
    except (SafetensorError, OSError) as error:
        raise BadInput(f"{path}: not a whole safetensors file ({error})") from None


def weight_files(folder: Path) -> list[Path]:
    """model.safetensors, or the shards that model.safetensors.index.json names."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").exists() or not index.exists():
        pickles = sorted(path.name for path in folder.glob("*") if path.suffix in (".bin", ".pt", ".pth"))
        if pickles and not (folder / "model.safetensors").exists():
            raise BadInput(f"{folder}: has {pickles[0]}, a pickle, which may run code and is never loaded; "
                           "save the model as safetensors first (transformers: save_pretrained)")
        return [folder / "model.safetensors"]
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(s, str) and Path(s).name == s and s.isprintable()
                                               and s.endswith(".safetensors") for s in shards.values()):
        raise BadInput(f"{index}: weight_map must name, for every tensor, a file of its folder")
    return [folder / shard for shard in sorted(set(shards.values()))]


def tensor_files(folder: Path) -> dict[str, Path]:
    """Which file every stored tensor is in. Left out: the rope tables that old checkpoints carry."""
    where = {}
    for path in weight_files(folder):
        with opened(path) as file:
            for name in file.keys():
                if name in where:
                    raise BadInput(f"{path}: tensor {name} is in {where[name].name} too")
                if not name.endswith("rotary_emb.inv_freq"):
                    where[name] = path
    return where


def load_tensor(path: Path, name: str, shape: tuple, dtype: torch.dtype | None) -> Tensor:
    """One tensor of a safetensors file, as it is stored or as dtype; None in shape: any size. Mapped, not
    read, where it keeps its type; where not, the mapping (whose pages count as memory) ends with the call."""
    with opened(path) as file:
        if name not in file.keys():
            raise BadInput(f"{path}: tensor {name} is missing")
        stored, kind = file.get_slice(name).get_shape(), file.get_slice(name).get_dtype()
        if len(stored) != len(shape) or any(b not in (None, a) for a, b in zip(stored, shape, strict=True)):
            raise BadInput(f"{path}: tensor {name} has shape {tuple(stored)}, config.json asks for "
                           f"{tuple(shape)}")
        if kind not in ("F64", "F32", "BF16", "F16"):
            raise BadInput(f"{path}: tensor {name} is of type {kind} (quantized?); only float32, bfloat16 "
                           "and float16 are read")
        return file.get_tensor(name).to(dtype)
