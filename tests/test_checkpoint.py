"""Hugging Face folders: theirs read by us, ours read by them, LoRA, and folders that are damaged."""
import json
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, llama_folder
from safetensors.torch import load_file, save_file
from test_model import LLAMA3, small

from support.files import BadInput
from model import PRESETS, ModelConfig, Projection, Transformer

IDS = torch.randint(600, (2, 60), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("tied", [True, False])
def test_checkpoint_round_trip(tmp_path, tied):
    model = Transformer(small(tie_embeddings=tied, rope_scaling=LLAMA3), k=2, seed=4)
    model.save_pretrained(tmp_path)
    again = Transformer.from_pretrained(tmp_path)
    assert again.config == model.config
    theirs = dict(again.named_parameters())
    assert theirs.keys() == dict(model.named_parameters()).keys()
    for name, weight in model.named_parameters():
        assert torch.equal(weight, theirs[name]), name
    assert not list(tmp_path.glob("*.tmp"))


# ---- transformers' folders ---------------------------------------------------------------------------------

ROPE = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
            original_max_position_embeddings=32)


def logits(model, ids=IDS):
    with torch.inference_mode():
        return model.head(model(ids)) if isinstance(model, Transformer) else model(ids).logits


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("shape", [
    dict(), dict(tie_word_embeddings=True), dict(num_key_value_heads=1, head_dim=12),
    dict(num_key_value_heads=4, rope_parameters=dict(rope_theta=500.0, **ROPE)),
    dict(rope_parameters=dict(rope_theta=100.0, rope_type="default"), rms_norm_eps=1e-3)], ids=str)
def test_round_trip(shape, dtype, tmp_path):
    """transformers -> ours -> transformers: the same logits, and every bit of every tensor."""
    transformers = pytest.importorskip("transformers")
    llama_folder(tmp_path / "a", dtype, "20KB" if dtype == "bfloat16" else "5GB", **shape)
    assert (len(list((tmp_path / "a").glob("*.safetensors"))) > 2) == (dtype == "bfloat16")  # shards
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a", dtype=torch.float32)
    ours = Transformer.from_pretrained(tmp_path / "a", torch.float32)
    torch.testing.assert_close(logits(ours), logits(theirs), atol=1e-5, rtol=0)
    as_stored = Transformer.from_pretrained(tmp_path / "a")
    as_stored.save_pretrained(tmp_path / "b")
    before = {name: tensor for path in (tmp_path / "a").glob("*.safetensors")
              for name, tensor in load_file(path).items()}
    after = load_file(tmp_path / "b" / "model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype == getattr(torch, dtype) and torch.equal(tensor, after[name])
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "b", dtype=torch.float32)
    torch.testing.assert_close(logits(again), logits(theirs), atol=1e-5, rtol=0)
    assert (again.config.bos_token_id, again.config.eos_token_id) == (3, 4)  # handed back as they were
    assert Transformer.from_pretrained(tmp_path / "b").config == as_stored.config


def test_old_and_sparse_configs(tmp_path):
    """Keys that are missing have LlamaConfig's defaults; transformers 4 wrote rope entries of their own; old
    exports carry rope tables and the tied head twice."""
    theirs = llama_folder(tmp_path, tie_word_embeddings=True, num_key_value_heads=4,
                          max_position_embeddings=2048, rms_norm_eps=1e-6)
    path, weights = tmp_path / "config.json", tmp_path / "model.safetensors"
    config = json.loads(path.read_text())
    kept = {"model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
            "num_attention_heads", "tie_word_embeddings"}
    path.write_text(json.dumps({key: config[key] for key in kept} | {"head_dim": None}))
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
    old = {"rope_theta": 500.0, "rope_scaling": {"type": "llama3", **ROPE}}
    path.write_text(json.dumps({key: config[key] for key in kept} | old))
    del tensors["lm_head.weight"]
    save_file(tensors, weights)
    ours = Transformer.from_pretrained(tmp_path)
    assert ours.config.rope_theta == 500.0 and ours.config.rope_scaling == ROPE
    import transformers
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, ignore_mismatched_sizes=True)
    torch.testing.assert_close(logits(ours), logits(theirs), atol=1e-5, rtol=0)


MEASURE = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from model import Transformer
def memory(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))
before = memory("VmRSS")
model = Transformer.from_pretrained(sys.argv[2], torch.float32 if sys.argv[3] == "float32" else None)
for weight in model.parameters():
    weight.detach().view(-1)[::512].sum()  # every page is here
print((memory("VmHWM") - before) / sum(w.numel() * w.element_size() for w in model.parameters()))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("stored,wanted", [("float32", "float32"), ("bfloat16", "float32"),
                                           ("bfloat16", "stored")])
def test_memory_of_loading(stored, wanted, tmp_path):
    """The peak is at most 1.2 times the weights."""
    config = small(vocab_size=20_000, dim=512, n_heads=8, head_dim=64, ffn_dim=2048, n_layers=16)
    Transformer(config, seed=1).to(getattr(torch, stored)).save_pretrained(tmp_path)
    reply = subprocess.run([sys.executable, "-c", MEASURE, ROOT, tmp_path, wanted], capture_output=True,
                           text=True)
    assert reply.returncode == 0, reply.stderr
    assert float(reply.stdout) < 1.2


def test_the_file_of_a_loaded_model_stays_as_it_is(tmp_path):
    """Weights may be mapped from the file: to change them must not change it."""
    Transformer(small(), seed=1).save_pretrained(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    model = Transformer.from_pretrained(tmp_path)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(1)
    assert (tmp_path / "model.safetensors").read_bytes() == before
    model.save_pretrained(tmp_path)  # over itself
    assert torch.equal(Transformer.from_pretrained(tmp_path).norm.weight, model.norm.weight)


def test_a_preset_has_the_published_shape():
    """llama-3.2-1b: 1,235,814,400 parameters, as its card says. tests/check_llama.py runs it."""
    model = Transformer(ModelConfig(128_256, **PRESETS["llama-3.2-1b"]), seed=None)
    assert model.n_params() == 1_235_814_400 and model.device.type == "meta"


# ---- LoRA --------------------------------------------------------------------------------------------------

def with_lora(rank=3, k=2, dropout=0.0, dtype=torch.float64):
    model = Transformer(small(n_kv_heads=2, tie_embeddings=False), k=k, seed=1)
    model.add_lora(rank, dropout, seed=1)
    return model.to(dtype)


def a_step(model):
    ids = torch.randint(52, (2, 20), generator=torch.Generator().manual_seed(1))
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.SGD(weights, lr=5.0)
    (model.head(model(ids)) ** 2).mean().backward()
    optimizer.step()


def test_an_untrained_adapter_changes_nothing():
    ids = torch.arange(50)[None]
    plain = Transformer(small(n_kv_heads=2, tie_embeddings=False), k=2, seed=1).double()
    assert torch.equal(logits(with_lora(dropout=0.5), ids), logits(plain, ids))


def test_lora_trains_adapters_and_predictors_alone():
    model = with_lora()
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    for _ in range(2):  # in the first, A does not move: B is 0
        a_step(model)
    for name, weight in model.named_parameters():
        trained = "lora_" in name or name == "pred_embedding"
        assert torch.equal(weight, before[name]) != trained, name
    adapted = [module for module in model.modules() if isinstance(module, Projection)]
    assert len(adapted) == 2 * 7 and all(module.lora_a.shape[0] == 3 for module in adapted)


def test_merged_equals_adapted(tmp_path):
    """By the formula, W + 2 B A, in float64; and a folder that transformers reads."""
    transformers = pytest.importorskip("transformers")
    model, ids = with_lora(), torch.arange(50)[None]
    for _ in range(3):
        a_step(model)
    adapted, base = logits(model, ids), logits(Transformer(small(n_kv_heads=2, tie_embeddings=False), seed=1)
                                               .double(), ids)
    assert (adapted - base).abs().max() > 1e-3
    projection = model.layers[0].mlp.up_proj
    expected = projection.weight + 2 * projection.lora_b @ projection.lora_a
    with pytest.raises(ValueError, match="merge_lora"):
        model.save_pretrained(tmp_path)
    model.merge_lora()
    assert torch.equal(model.layers[0].mlp.up_proj.weight, expected)
    torch.testing.assert_close(logits(model, ids), adapted, atol=1e-12, rtol=0)
    model.float().save_pretrained(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(theirs, ids), adapted.float(), atol=1e-5, rtol=0)
    assert not [name for name in load_file(tmp_path / "model.safetensors") if "lora" in name]


def test_adapters_equal_peft_s(tmp_path):
    """The same A and B in peft: the same logits and gradients."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    ours = with_lora(k=0)
    plain = Transformer(small(n_kv_heads=2, tie_embeddings=False), seed=1).double()
    plain.save_pretrained(tmp_path)
    seven = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    theirs = peft.get_peft_model(
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64),
        peft.LoraConfig(r=3, lora_alpha=6, lora_dropout=0.0, target_modules=seven)).double()
    pairs = []
    for name, module in ours.named_modules():
        if isinstance(module, Projection):
            other = theirs.get_submodule(f"base_model.model.model.{name}")
            with torch.no_grad():
                module.lora_b.normal_(generator=torch.Generator().manual_seed(2))
                other.lora_A.default.weight.copy_(module.lora_a)
                other.lora_B.default.weight.copy_(module.lora_b)
            pairs += [(module.lora_a, other.lora_A.default.weight),
                      (module.lora_b, other.lora_B.default.weight)]
    ids = torch.arange(50)[None]
    a, b = ours.head(ours(ids)), theirs(ids).logits
    torch.testing.assert_close(a, b, atol=1e-6, rtol=0)  # their rotary tables are float32
    a.pow(2).mean().backward()
    b.pow(2).mean().backward()
    for mine, other in pairs:
        torch.testing.assert_close(mine.grad, other.grad, atol=1e-5, rtol=1e-4)


def test_dropout_is_in_front_of_the_adapters_and_only_in_training():
    model, ids = with_lora(dropout=0.5), torch.arange(50)[None]
    a_step(model)
    assert not torch.equal(logits(model, ids), logits(model, ids))
    model.eval()
    assert torch.equal(logits(model, ids), logits(model, ids))


# ---- damaged folders ---------------------------------------------------------------------------------------

def test_damaged_checkpoints_are_named(tmp_path):
    Transformer(small(), k=1).save_pretrained(tmp_path)
    config, weights = tmp_path / "config.json", tmp_path / "model.safetensors"
    good_config, good_weights = config.read_text(), weights.read_bytes()
    entries, tensors = json.loads(good_config), load_file(weights)

    def refused(match):
        with pytest.raises(BadInput, match=match) as error:
            Transformer.from_pretrained(tmp_path)
        assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)
        config.write_text(good_config)
        weights.write_bytes(good_weights)

    for changes, match in (
            ({"model_type": "gpt2"}, "model_type is 'gpt2', only 'llama' is known"),
            ({"model_type": None}, "model_type is None"),
            ({"attention_bias": True}, "attention_bias is True"), ({"mlp_bias": True}, "mlp_bias is True"),
            ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
            ({"quantization_config": {"bits": 4}}, "quantization_config"),
            ({"rope_scaling": {"rope_type": "yarn"}}, "rope_type is 'yarn'"),
            ({"rope_scaling": {"rope_type": "llama3"}}, "llama3 needs factor, a number above 0"),
            ({"rope_scaling": ["linear"]}, "must be objects"),
            ({"rope_parameters": "abc"}, "must be objects"),
            ({"rope_theta": 10**400}, "rope_theta is 1000"),
            ({"rope_scaling": ROPE | {"high_freq_factor": 1.0}}, "two different freq_factors"),
            ({"hidden_size": "32"}, "hidden_size is '32'; it must be of type int, above 0 and"),
            ({"vocab_size": 10**15}, "vocab_size is 1000000000000000; it must be"),
            ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
            ({"vocab_size": None}, "vocab_size is None"),
            ({"num_attention_heads": True}, "num_attention_heads is True"),
            ({"rms_norm_eps": float("inf")}, "rms_norm_eps is inf"),
            ({"tie_word_embeddings": 1}, "tie_word_embeddings is 1"),
            ({"num_key_value_heads": 3}, "num_key_value_heads must divide"),
            ({"head_dim": 7}, "head_dim be even"), ({"num_hidden_layers": 10**8}, "fewer tensors than"),
            ({"num_hidden_layers": 3}, r"model\.layers\.2\.\S+ is missing"),
            ({"num_hidden_layers": 1}, r"unknown tensor model\.layers\.1"),
            ({"vocab_size": 51}, r"model\.embed_tokens\.weight has shape \(50, 32\).*\(51, 32\)"),
            ({"tie_word_embeddings": False}, r"tensor lm_head\.weight is missing")):
        config.write_text(json.dumps(entries | changes))
        refused(match)
    config.write_text("{")
    refused("config.json: not valid JSON")
    config.unlink()
    refused("config.json: no such file")
    weights.write_bytes(good_weights[:-100])
    refused("model.safetensors: not a whole safetensors file")
    weights.write_bytes(b"")
    refused("model.safetensors: not a whole safetensors file")
    weights.unlink()
    refused("model.safetensors: no such file")
    weights.unlink()
    weights.mkdir()
    with pytest.raises(BadInput, match="model.safetensors: not a whole safetensors file"):
        Transformer.from_pretrained(tmp_path)
    weights.rmdir()
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    refused("has pytorch_model.bin, a pickle, which may run code and is never loaded")
    (tmp_path / "pytorch_model.bin").unlink()
    save_file({**tensors, "model.norm.weight": torch.ones(32, dtype=torch.int8)}, weights)
    refused(r"model.norm.weight is of type I8 \(quantized\?\)")
    save_file({**tensors, "model.norm.weight": torch.ones(1, 32)}, weights)
    refused(r"model.norm.weight has shape \(1, 32\), config.json asks for \(32,\)")
    save_file({"other": torch.ones(1, 32)}, tmp_path / "pred_embedding.safetensors")
    refused("tensor pred_embedding is missing")
    save_file({"pred_embedding": torch.ones(1, 31)}, tmp_path / "pred_embedding.safetensors")
    refused(r"pred_embedding has shape \(1, 31\)")
    save_file({"pred_embedding": torch.ones(0, 32)}, tmp_path / "pred_embedding.safetensors")
    refused("pred_embedding has no row")
    Transformer(small(), k=0).save_pretrained(tmp_path)  # over a model that had predictors
    assert Transformer.from_pretrained(tmp_path).pred_embedding is None


def test_damaged_shards_are_named(tmp_path):
    llama_folder(tmp_path, shard_size="20KB")
    index, shards = tmp_path / "model.safetensors.index.json", sorted(tmp_path.glob("model-*.safetensors"))
    entries, content = json.loads(index.read_text()), shards[1].read_bytes()
    assert len(shards) > 2 and Transformer.from_pretrained(tmp_path).n_params() > 1000

    def refused(match):
        with pytest.raises(BadInput, match=match):
            Transformer.from_pretrained(tmp_path)
        index.write_text(json.dumps(entries))
        shards[1].write_bytes(content)

    shards[1].unlink()
    refused(f"{shards[1].name}: no such file")
    shards[1].write_bytes(content[:50])
    refused(f"{shards[1].name}: not a whole safetensors file")
    shards[1].write_bytes(shards[0].read_bytes())
    refused(rf"{shards[1].name}: tensor \S+ is in {shards[0].name} too")
    index.write_text(json.dumps({"weight_map": {"a": "../../evil.safetensors"}}))
    refused("weight_map must name, for every tensor, a file of its folder")
    for name in ("..", "", "a\nb.safetensors", "model.bin"):
        index.write_text(json.dumps({"weight_map": {"a": name}}))
        refused("weight_map must name")
    index.write_text("{}")
    refused("weight_map must name")
    smaller = {name: shard for name, shard in entries["weight_map"].items() if shard != shards[1].name}
    index.write_text(json.dumps({"weight_map": smaller}))
    refused("is missing; is config.json another model's")
