"""Hugging Face folders: theirs read by us, ours read by them, and folders that are damaged."""
import json
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, llama_folder
from safetensors.torch import load_file, save_file
from test_model import LLAMA3, named, small

from model import PRESETS, ModelConfig, Transformer
from support.files import BadInput

IDS = torch.randint(600, (2, 60), generator=torch.Generator().manual_seed(0))


def logits(model, ids=IDS):
    with torch.inference_mode():
        return model.head(model(ids)) if isinstance(model, Transformer) else model(ids).logits


def load_theirs(folder):
    transformers = pytest.importorskip("transformers")
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.mark.parametrize("tied", [True, False])
def test_our_round_trip(tmp_path, tied):
    """Every bit, over a folder that the loaded model may be mapped from; and [PRED] rows only if k > 0."""
    model = Transformer(small(tie_embeddings=tied, rope_scaling=LLAMA3), k=2, seed=4)
    model.save_pretrained(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    again = Transformer.from_pretrained(tmp_path)
    assert again.config == model.config and named(again).keys() == named(model).keys()
    with torch.no_grad():
        for name, weight in again.named_parameters():
            assert torch.equal(weight, named(model)[name]), name
            weight.add_(1)  # which must not reach the file
    assert (tmp_path / "model.safetensors").read_bytes() == before
    again.save_pretrained(tmp_path)
    assert torch.equal(Transformer.from_pretrained(tmp_path).norm.weight, model.norm.weight + 1)
    Transformer(small(), k=0).save_pretrained(tmp_path)
    assert Transformer.from_pretrained(tmp_path).pred_embedding is None
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("shape", [
    dict(), dict(tie_word_embeddings=True), dict(num_key_value_heads=1, head_dim=12),
    dict(num_key_value_heads=4, rope_parameters=dict(rope_theta=500.0, **LLAMA3)),
    dict(rope_parameters=dict(rope_theta=100.0, rope_type="default"), rms_norm_eps=1e-3)], ids=str)
def test_their_round_trip(shape, dtype, tmp_path):
    """transformers -> ours -> transformers: the same logits, and every bit of every tensor."""
    llama_folder(tmp_path / "a", dtype, "20KB" if dtype == "bfloat16" else "5GB", **shape)
    shards = [load_file(path) for path in (tmp_path / "a").glob("*.safetensors")]
    assert (len(shards) > 2) == (dtype == "bfloat16")
    wanted = logits(load_theirs(tmp_path / "a"))
    torch.testing.assert_close(logits(Transformer.from_pretrained(tmp_path / "a", torch.float32)), wanted,
                               atol=1e-5, rtol=0)
    as_stored = Transformer.from_pretrained(tmp_path / "a")
    as_stored.save_pretrained(tmp_path / "b")
    before = {name: tensor for shard in shards for name, tensor in shard.items()}
    after = load_file(tmp_path / "b" / "model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype == getattr(torch, dtype) and torch.equal(tensor, after[name])
    again = load_theirs(tmp_path / "b")
    torch.testing.assert_close(logits(again), wanted, atol=1e-5, rtol=0)
    assert (again.config.bos_token_id, again.config.eos_token_id) == (3, 4)  # unknown keys, written back
    assert Transformer.from_pretrained(tmp_path / "b").config == as_stored.config


def test_old_and_sparse_configs(tmp_path):
    """Keys that are missing have LlamaConfig's defaults; old exports carry rope tables and the tied head
    twice."""
    theirs = llama_folder(tmp_path, tie_word_embeddings=True, num_key_value_heads=4,
                          max_position_embeddings=2048, rms_norm_eps=1e-6)
    path, weights = tmp_path / "config.json", tmp_path / "model.safetensors"
    sparse = {key: value for key, value in json.loads(path.read_text()).items() if key in (
        "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
        "num_attention_heads", "tie_word_embeddings")}
    path.write_text(json.dumps(sparse | {"head_dim": None}))
    tensors = load_file(weights)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(tensors, weights)
    ours = Transformer.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(ours), logits(theirs), atol=1e-5, rtol=0)
    tensors["lm_head.weight"][0, 0] += 1
    save_file(tensors, weights)
    with pytest.raises(BadInput, match="ties lm_head.weight to the embedding, but they differ"):
        Transformer.from_pretrained(tmp_path)


SHORT = {key: value for key, value in LLAMA3.items() if key != "original_max_position_embeddings"}
OLD = {{"rope_type": "type"}.get(key, key): value for key, value in LLAMA3.items()}  # transformers 4's


@pytest.mark.parametrize("places,theta", [
    ({"rope_scaling": LLAMA3 | {"rope_theta": 500.0}}, 500.0),
    ({"rope_theta": 500.0, "rope_scaling": OLD}, 500.0),
    ({"rope_theta": 100.0, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}, 500.0),
    ({"rope_theta": 100.0, "rope_parameters": {"rope_type": "default"}}, 100.0),
    ({"rope_scaling": LLAMA3, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}, 1e4),
    ({"rope_theta": 100.0, "rope_scaling": {}, "rope_parameters": LLAMA3 | {"rope_theta": 500.0}}, 500.0),
    ({"rope_scaling": SHORT, "original_max_position_embeddings": 16}, 1e4), ({"rope_scaling": SHORT}, 1e4),
    ({"rope_scaling": LLAMA3, "original_max_position_embeddings": 16}, 1e4),
    ({"rope_theta": None, "rope_scaling": None}, 1e4)])
def test_what_config_json_says_of_rope(tmp_path, places, theta):
    """In three places, as transformers reads it: ours had 10000 where it stood in rope_scaling."""
    llama_folder(tmp_path, max_position_embeddings=64)
    path = tmp_path / "config.json"
    others = {key: value for key, value in json.loads(path.read_text()).items() if "rope" not in key}
    path.write_text(json.dumps(others | places))
    ours = Transformer.from_pretrained(tmp_path)
    assert ours.config.rope_theta == theta
    if places.get("rope_theta", 0) is None:
        del places["rope_theta"]  # transformers does not start with a null
        path.write_text(json.dumps(others | places))
    wanted = logits(load_theirs(tmp_path))
    torch.testing.assert_close(logits(ours), wanted, atol=1e-5, rtol=0)
    ours.save_pretrained(tmp_path / "ours")
    torch.testing.assert_close(logits(load_theirs(tmp_path / "ours")), wanted, atol=1e-5, rtol=0)


MEASURE = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from model import Transformer
def memory(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))
torch.ones(2, dtype=torch.bfloat16).sum().isfinite()  # the code of what is used below is no memory of weights
before = memory("VmRSS")
model = Transformer.from_pretrained(sys.argv[2], torch.float32 if sys.argv[3] == "float32" else None)
for weight in model.parameters():
    weight.detach().view(-1)[::512].sum()  # every page is here
print((memory("VmHWM") - before) / sum(w.numel() * w.element_size() for w in model.parameters()))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_of_loading(tmp_path):
    """The peak is at most 1.2 times the weights, converted or as they are stored."""
    config = small(vocab_size=20_000, dim=512, n_heads=8, head_dim=64, ffn_dim=2048, n_layers=10)
    model = Transformer(config, seed=1)
    for stored, wanted in (("float32", "float32"), ("bfloat16", "float32"), ("bfloat16", "as stored")):
        model.to(getattr(torch, stored)).save_pretrained(tmp_path)
        reply = subprocess.run([sys.executable, "-c", MEASURE, ROOT, tmp_path, wanted], capture_output=True,
                               text=True)
        assert reply.returncode == 0, reply.stderr
        assert float(reply.stdout) < 1.2, (stored, wanted)


def test_a_preset_has_the_published_shape():
    """llama-3.2-1b: 1,235,814,400 parameters, as its card says."""
    model = Transformer(ModelConfig(128_256, **PRESETS["llama-3.2-1b"]), seed=None)
    assert model.n_params() == 1_235_814_400 and model.device.type == "meta"


@pytest.mark.slow
def test_a_preset_at_full_size(tmp_path):
    """Created, saved, loaded again, and read by transformers: 5 GB of disk, 10 GiB of memory."""
    model = Transformer(ModelConfig(128_256, **PRESETS["llama-3.2-1b"]), k=1, seed=1)
    model.save_pretrained(tmp_path)
    for name, weight in Transformer.from_pretrained(tmp_path).named_parameters():
        assert torch.equal(weight, named(model)[name]), name
    ours = logits(model)
    del model
    torch.testing.assert_close(logits(load_theirs(tmp_path)), ours, atol=1e-4, rtol=0)


# ---- damaged folders ---------------------------------------------------------------------------------------

def assert_refused(folder, match):
    with pytest.raises(BadInput, match=match) as error:
        Transformer.from_pretrained(folder)
    assert "\n" not in str(error.value) and str(folder) in str(error.value)


@pytest.mark.parametrize("changes,match", [
    ({"model_type": "gpt2"}, "model_type is 'gpt2', only 'llama' is known"),
    ({"attention_bias": True}, "attention_bias is True"), ({"mlp_bias": True}, "mlp_bias is True"),
    ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ({"rope_scaling": {"rope_type": "yarn"}}, "rope_type is 'yarn'"),
    ({"rope_scaling": LLAMA3 | {"high_freq_factor": 1.0}}, "freq_factors not equal"),
    ({"rope_scaling": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5, only 1.0"),
    ({"rope_scaling": ["linear"]}, "must be objects"),
    ({"hidden_size": "32"}, "hidden_size is '32'; it must be of type int, above 0 and"),
    ({"vocab_size": 10**15}, "vocab_size is 1000000000000000; it must be"),
    ({"vocab_size": 51}, r"model\.embed_tokens\.weight has shape \(50, 32\).*\(51, 32\)"),
    ({"num_hidden_layers": 999}, "fewer tensors than"),
    ({"num_hidden_layers": 3}, r"model\.layers\.2\.\S+ is missing"),
    ({"num_hidden_layers": 1}, r"unknown tensor model\.layers\.1"),
    ({"num_key_value_heads": 3}, "num_key_value_heads must divide"),
    ({"head_dim": 7}, "head_dim be even"),
    ({"tie_word_embeddings": False}, r"tensor lm_head\.weight is missing"),
], ids=lambda value: str(value)[:40])
def test_another_models_config_is_refused(changes, match, tmp_path):
    Transformer(small(), k=1).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    assert_refused(tmp_path, match)


MODEL, PRED = "model.safetensors", "pred_embedding.safetensors"


@pytest.mark.parametrize("name,content,match", [
    ("config.json", b"{", "config.json: not valid JSON"),
    ("config.json", None, "config.json: no such file"),
    (MODEL, None, f"{MODEL}: no such file; .*never from pickles like pytorch_model.bin"),
    (MODEL, b"", f"{MODEL}: not a whole safetensors file"),
    (MODEL, b"version https://git-lfs.github.com/spec/v1\n", f"{MODEL}: a Git LFS pointer, not the file"),
    (MODEL, {"model.norm.weight": torch.ones(32, dtype=torch.int8)}, r"is of type I8 \(quantized\?"),
    (MODEL, {"model.norm.weight": torch.ones(1, 32)}, r"norm.weight has shape \(1, 32\), .* says \(32,\)"),
    (MODEL, {"model.norm.weight": torch.full((32,), torch.nan)}, "model.norm.weight holds NaN or infinity"),
    (PRED, {"pred_embedding": -torch.ones(1, 32) / 0}, "pred_embedding holds NaN or infinity"),
    (PRED, {"other": torch.ones(1, 32)}, "does not contain tensor pred_embedding"),
    (PRED, {"pred_embedding": torch.ones(0, 32)}, r"pred_embedding has shape \(0, 32\)"),
], ids=lambda value: value[:40] if isinstance(value, str) else "")
def test_damaged_files_are_named(name, content, match, tmp_path):
    """content: new bytes, other tensors, or nothing."""
    Transformer(small(), k=1).save_pretrained(tmp_path)
    path = tmp_path / name
    if isinstance(content, dict):
        save_file((load_file(path) if name.startswith("model") else {}) | content, path)
    elif content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    assert_refused(tmp_path, match)


def test_damaged_shards_are_named(tmp_path):
    llama_folder(tmp_path, shard_size="20KB")
    index, shards = tmp_path / "model.safetensors.index.json", sorted(tmp_path.glob("model-*.safetensors"))
    entries, content, n = json.loads(index.read_text())["weight_map"], shards[1].read_bytes(), shards[1].name
    assert len(shards) > 2 and Transformer.from_pretrained(tmp_path).n_params() > 1000

    shards[1].write_bytes(shards[0].read_bytes())
    assert_refused(tmp_path, f"{n}: .*does not contain tensor")
    shards[1].unlink()
    assert_refused(tmp_path, f"{n}: no such file")
    shards[1].write_bytes(content)
    for wrong, match in (
            (None, "weight_map must name, for every tensor, a file of its folder"),
            *(({"a": name}, "weight_map must name") for name in ("../evil.safetensors", "a\nb", 3)),
            ({name: shard for name, shard in entries.items() if shard != n},
             "is missing; is config.json another model's")):
        index.write_text(json.dumps({"weight_map": wrong}))
        assert_refused(tmp_path, match)
