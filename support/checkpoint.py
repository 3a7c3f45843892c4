"""Hugging Face folders of Llama models (config.json and *.safetensors): load_folder and save_folder."""
import contextlib
import json
import re
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from support.files import BadInput, atomic, read_json, refuse_other_kinds, write_text

# field of model.ModelConfig -> (its name in config.json, type)
HF_NAMES = {"vocab_size": ("vocab_size", int), "dim": ("hidden_size", int),
            "n_layers": ("num_hidden_layers", int), "n_heads": ("num_attention_heads", int),
            "n_kv_heads": ("num_key_value_heads", int), "head_dim": ("head_dim", int),
            "ffn_dim": ("intermediate_size", int), "max_seq_len": ("max_position_embeddings", int),
            "rope_theta": ("rope_theta", float), "norm_eps": ("rms_norm_eps", float),
            "tie_embeddings": ("tie_word_embeddings", bool)}
MAX_LAYERS, MAX_HEADER = 1000, 1 << 20  # blocks; bytes that name the tensors of a file, some 100 for each
# the keys for which model.py has no setting
FIXED = {"model_type": "llama", "hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
PRED_FILE = "pred_embedding.safetensors"  # the [PRED] rows, for which a Llama folder has no place
HEAD_FILE = "predictor.safetensors"  # the learned head after them, likewise


def hf_name(name: str) -> str:
    """What a Hugging Face checkpoint calls the parameter that our model calls `name`."""
    return name if name.startswith("lm_head") else "model." + name


def rope_scaling(path: Path, scaling: dict) -> dict | None:
    """The rope_scaling of a ModelConfig from what a config.json at `path` says."""
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if scaling.get("partial_rotary_factor", 1.0) != 1.0:
        raise BadInput(f"{path}: partial_rotary_factor is {scaling['partial_rotary_factor']!r}, only 1.0 is "
                       "known here")
    if kind == "default":
        return None
    if kind != "llama3":
        raise BadInput(f"{path}: rope_type is {kind!r}, only 'default' and 'llama3' are known here")
    needed = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    good = all(type(scaling.get(key)) in (int, float) and 0 < scaling[key] < 1e30 for key in needed)
    if not good or scaling["low_freq_factor"] == scaling["high_freq_factor"]:
        raise BadInput(f"{path}: rope scaling llama3 needs {', '.join(needed)}: numbers above 0, the two "
                       "freq_factors not equal")
    return {"rope_type": "llama3", **{key: scaling[key] for key in needed}}


def read_config(path: Path) -> dict:
    """The fields of a ModelConfig, with LlamaConfig's defaults; BadInput if the file describes what model.py
    is not."""
    theirs = {key: value for key, value in read_json(path).items() if value is not None}
    for key, only in (FIXED | {"quantization_config": None}).items():
        value = theirs.get(key, None if key == "model_type" else only)
        if value != only:
            raise BadInput(f"{path}: {key} is {value!r}, only {only!r} is known here")
    # Three places can speak of rope. As in transformers 5: rope_scaling replaces rope_parameters, and what
    # stands in there goes before a rope_theta of its own.
    rope = theirs.get("rope_scaling") or theirs.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise BadInput(f"{path}: rope_parameters and rope_scaling must be objects")
    given = {"max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
             "num_key_value_heads": theirs.get("num_attention_heads"),
             **theirs, "rope_theta": rope.get("rope_theta", theirs.get("rope_theta", 1e4))}
    context = {"original_max_position_embeddings": given["max_position_embeddings"]}
    first = (*context, "partial_rotary_factor")
    scaling = context | rope | {key: theirs[key] for key in first if key in theirs}
    ours = {"rope_scaling": rope_scaling(path, scaling)}
    for name, (key, kind) in HF_NAMES.items():
        value = given.get(key, ours["dim"] // ours["n_heads"] if key == "head_dim" else None)
        good = type(value) is kind or kind is float and type(value) is int
        limit = 2**28 if kind is int else 1e30  # below these no tensor's size and no float overflows
        limit = MAX_LAYERS if name == "n_layers" else limit
        if not good or kind is not bool and not 0 < value < limit:
            raise BadInput(f"{path}: {key} is {value!r}; it must be of type {kind.__name__}"
                           + ("" if kind is bool else f", above 0 and below {limit}"))
        ours[name] = value
    if ours["n_heads"] % ours["n_kv_heads"] or ours["head_dim"] % 2:
        raise BadInput(f"{path}: num_key_value_heads must divide num_attention_heads, and head_dim be even")
    known = {*(key for key, _ in HF_NAMES.values()), *FIXED, "rope_scaling", "rope_parameters", "torch_dtype",
             "dtype", "transformers_version", "architectures"}
    return ours | {"others": {k: v for k, v in theirs.items() if k not in known}}


@contextlib.contextmanager
def opened(path: Path):
    """A safetensors file, mapped into memory; BadInput if it is missing or damaged."""
    try:
        refuse_other_kinds(path)
        with open(path, "rb") as file:
            if int.from_bytes(file.read(8), "little") > MAX_HEADER:  # it is read again for every tensor
                raise BadInput(f"{path}: not a whole safetensors file, or one of too many tensors")
        with safe_open(path, framework="pt") as file:
            yield file
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file; weights come from safetensors alone, never from pickles like "
                       "pytorch_model.bin, which may run code") from None
    except (SafetensorError, OSError) as error:
        raise BadInput(f"{path}: not a whole safetensors file ({error})") from None


def tensor_files(folder: Path) -> dict[str, Path]:
    """The file of every tensor, single or sharded; without the rope tables of old checkpoints."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists() or not index.exists():
        with opened(single) as file:
            shards = dict.fromkeys(file.keys(), single.name)
    else:
        shards = read_json(index).get("weight_map")
        names = shards.values() if isinstance(shards, dict) else [None]
        if not all(isinstance(name, str) and re.fullmatch(r"[\w.-]+\.safetensors", name) for name in names):
            raise BadInput(f"{index}: weight_map must name, for every tensor, a file of its folder")
    return {name: folder / file for name, file in shards.items() if not name.endswith("rotary_emb.inv_freq")}


def load_tensor(path: Path, name: str, shape: tuple, dtype: torch.dtype | None) -> Tensor:
    """One tensor of a safetensors file, a copy in this dtype (None: mapped from the file, as it is stored).
    None in shape: any size but 0."""
    with opened(path) as file:
        stored, kind = file.get_slice(name).get_shape(), file.get_slice(name).get_dtype()
        if len(stored) != len(shape) or 0 in stored or any(
                wanted not in (None, found) for wanted, found in zip(shape, stored, strict=True)):
            raise BadInput(f"{path}: {name} has shape {tuple(stored)}, config.json says {tuple(shape)}")
        if kind not in ("F64", "F32", "BF16", "F16"):
            raise BadInput(f"{path}: tensor {name} is of type {kind} (quantized?); only float32, bfloat16 "
                           "and float16 are read")
        tensor = file.get_tensor(name).to(dtype)
    if not tensor.sum().isfinite() and not tensor.isfinite().all():  # the second, alone, takes a copy
        raise BadInput(f"{path}: tensor {name} holds NaN or infinity; its training diverged, or the file is "
                       "damaged")
    return tensor


def load_extras(model: nn.Module, folder: Path, dtype: torch.dtype | None, width: int) -> None:
    """Give the model what a folder has beyond a model of others: [PRED] rows (k, width) and a predictor."""
    if (folder / PRED_FILE).exists():
        rows = load_tensor(folder / PRED_FILE, "pred_embedding", (None, width), dtype)
        model.pred_embedding = nn.Parameter(rows)
    if (folder / HEAD_FILE).exists():
        with opened(folder / HEAD_FILE) as file:
            model.add_predictor("mlp" if "out.weight" in file.keys() else "linear", seed=0)
        for name, weight in model.predictor.named_parameters():
            weight.data = load_tensor(folder / HEAD_FILE, name, weight.shape, dtype)


def load_folder(folder: Path, build: Callable[[dict], nn.Module], dtype: torch.dtype | None) -> nn.Module:
    """build(fields of a ModelConfig), with the stored tensors as its parameters, one by one: the peak of
    memory is the weights and one tensor. dtype: see load_tensor. BadInput names the file, and the tensor."""
    config, stored = read_config(folder / "config.json"), tensor_files(folder)
    if config["n_layers"] > len(stored):  # or a wrong number could build a billion blocks
        raise BadInput(f"{folder}: has fewer tensors than config.json has layers")
    model = build(config)
    for name, weight in list(model.named_parameters()):
        theirs, (module, _, leaf) = hf_name(name), name.rpartition(".")
        if theirs not in stored:
            raise BadInput(f"{folder}: tensor {theirs} is missing; is config.json another model's?")
        tensor = load_tensor(stored.pop(theirs), theirs, weight.shape, dtype)
        setattr(model.get_submodule(module), leaf, nn.Parameter(tensor))
    embedding = model.get_parameter("embed_tokens.weight")
    head = stored.pop("lm_head.weight", None)  # some exports write it although it is the embedding
    if head and not torch.equal(load_tensor(head, "lm_head.weight", embedding.shape, dtype), embedding):
        raise BadInput(f"{folder}: config.json ties lm_head.weight to the embedding, but they differ")
    if stored:
        raise BadInput(f"{folder}: unknown tensor {min(stored)}; is config.json another model's?")
    load_extras(model, folder, dtype, embedding.shape[1])
    return model


def save_tensors(folder: Path, files: dict[str, dict[str, Tensor]]) -> None:
    """Write these safetensors files, atomically; OSError if the disk does not take one."""
    for file, tensors in files.items():
        if not tensors:  # of a model that was here before
            (folder / file).unlink(missing_ok=True)
            continue
        try:
            with atomic(folder / file) as temporary:
                save_file(tensors, temporary, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(f"{folder / file}: cannot be written ({error})") from None


def save_folder(folder: Path, config: dict, weights: dict[str, Tensor]) -> None:
    """Write what transformers reads, the [PRED] rows and the head. config: the fields of a ModelConfig;
    weights: the parameters by name, ValueError if there are adapters among them."""
    if any("lora_" in name for name in weights):
        raise ValueError("merge_lora first: a Hugging Face folder has no place for adapters")
    folder.mkdir(parents=True, exist_ok=True)
    dtype = str(weights["embed_tokens.weight"].dtype).removeprefix("torch.")
    entries = {"architectures": ["LlamaForCausalLM"], "bos_token_id": None, "eos_token_id": None,
               **config["others"], **FIXED, "torch_dtype": dtype, "rope_scaling": config["rope_scaling"],
               **{theirs: config[ours] for ours, (theirs, _) in HF_NAMES.items()}}
    write_text(folder / "config.json", json.dumps(entries, indent=2) + "\n")
    files = {"model.safetensors": {}, PRED_FILE: {}, HEAD_FILE: {}}
    for name, weight in weights.items():
        if name == "pred_embedding":
            file, key = PRED_FILE, name
        elif name.startswith("predictor."):
            file, key = HEAD_FILE, name.removeprefix("predictor.")
        else:
            file, key = "model.safetensors", hf_name(name)
        files[file][key] = weight.detach().cpu()
    save_tensors(folder, files)


def add_end_token(folder: Path, end: int) -> None:
    """Let the token `end` end an answer elsewhere, as it does here: it joins those of eos_token_id in
    config.json and generation_config.json."""
    config = read_json(folder / "config.json")
    for name in ("config.json", "generation_config.json"):
        path = folder / name
        kept = {key: config[key] for key in ("bos_token_id", "eos_token_id") if config.get(key) is not None}
        entries = read_json(path) if path.exists() else kept
        ends = entries.get("eos_token_id")
        ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
        if end not in ends:
            entries["eos_token_id"] = [*ends, end] if ends else end
            write_text(path, json.dumps(entries, indent=2) + "\n")
