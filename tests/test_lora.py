"""lora.py against peft and the formula."""
import pytest
import torch
from safetensors.torch import load_file
from test_model import named, small

from model import Transformer
from support.lora import add_lora, merge_lora, projections

IDS = torch.arange(50)[None]


def plain(k=2):
    return Transformer(small(n_kv_heads=2, tie_embeddings=False), k=k, seed=1).double()


def with_lora(k=2, dropout=0.0):
    model = Transformer(small(n_kv_heads=2, tie_embeddings=False), k=k, seed=1)
    add_lora(model, 3, dropout, seed=1)
    return model.double()


def logits(model):
    with torch.inference_mode():
        return model.head(model(IDS)) if isinstance(model, Transformer) else model(IDS).logits


def steps(model, n):
    """n large steps on random ids, [PRED] among them."""
    ids = torch.randint(52, (2, 20), generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.SGD([weight for weight in model.parameters() if weight.requires_grad], lr=5.0)
    for _ in range(n):
        optimizer.zero_grad()
        (model.head(model(ids)) ** 2).mean().backward()
        optimizer.step()


def test_what_is_trained():
    """An untrained adapter changes nothing. Training changes the adapters, 14 in all, and [PRED]."""
    model = with_lora(dropout=0.5)
    assert torch.equal(logits(model), logits(plain()))
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    steps(model, 2)  # in the first, A does not move: B is 0
    for name, weight in model.named_parameters():
        assert torch.equal(weight, before[name]) != ("lora_" in name or name == "pred_embedding"), name
    assert [layer.lora_a.shape[0] for layer in projections(model)] == [3] * 14
    assert not torch.equal(logits(model), logits(model))  # dropout, in front of the adapter
    model.eval()
    assert torch.equal(logits(model), logits(model))


def test_merged_equals_adapted(tmp_path):
    """By the formula, W + 2 B A, in float64; and a folder that transformers reads."""
    transformers = pytest.importorskip("transformers")
    model = with_lora()
    steps(model, 3)
    adapted = logits(model)
    assert (adapted - logits(plain())).abs().max() > 1e-3
    layer = model.layers[0].mlp.up_proj
    expected = layer.weight + 2 * layer.lora_b @ layer.lora_a
    with pytest.raises(ValueError, match="merge_lora"):
        model.save_pretrained(tmp_path)
    merge_lora(model)
    assert torch.equal(layer.weight, expected) and named(model).keys() == named(plain()).keys()
    torch.testing.assert_close(logits(model), adapted, atol=1e-12, rtol=0)
    model.float().save_pretrained(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(theirs), adapted.float(), atol=1e-5, rtol=0)
    assert not [name for name in load_file(tmp_path / "model.safetensors") if "lora" in name]


def test_adapters_equal_peft_s(tmp_path):
    """The same A and B in peft: the same logits and gradients."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    ours = with_lora(k=0)
    plain(k=0).save_pretrained(tmp_path)
    seven = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    theirs = peft.get_peft_model(
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64),
        peft.LoraConfig(r=3, lora_alpha=6, lora_dropout=0.0, target_modules=seven)).double()
    pairs = []
    for name, layer in ours.named_modules():
        if layer in projections(ours):
            other = theirs.get_submodule(f"base_model.model.model.{name}")
            with torch.no_grad():
                layer.lora_b.normal_(generator=torch.Generator().manual_seed(2))
                other.lora_A.default.weight.copy_(layer.lora_a)
                other.lora_B.default.weight.copy_(layer.lora_b)
            pairs += [(layer.lora_a, other.lora_A.default.weight),
                      (layer.lora_b, other.lora_B.default.weight)]
    a, b = ours.head(ours(IDS)), theirs(IDS).logits
    torch.testing.assert_close(a, b, atol=1e-6, rtol=0)  # their rotary tables are float32
    a.pow(2).mean().backward()
    b.pow(2).mean().backward()
    for mine, other in pairs:
        torch.testing.assert_close(mine.grad, other.grad, atol=1e-5, rtol=1e-4)
