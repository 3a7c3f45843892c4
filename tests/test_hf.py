"""support/hf.py: models, tokenizers and conversations of other families, held against transformers' own."""
import pytest
import torch

transformers = pytest.importorskip("transformers")

from data import collate_fused, collate_three, render_views  # noqa: E402
from jepa_loss import fused, three_pass  # noqa: E402
from model import Predictor, Transformer  # noqa: E402
from support.files import BadInput  # noqa: E402
from support.generation import generate, generate_slow  # noqa: E402
from support.hf import HFModel  # noqa: E402

V, C = 300, 32
SHAPE = dict(vocab_size=V, hidden_size=C, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=128, bos_token_id=0, eos_token_id=1, pad_token_id=1)
KINDS = {"sliding_window": 96, "layer_types": ["sliding_attention", "full_attention"]}
FAMILIES = {
    "llama": {}, "qwen2": {}, "qwen3": {"head_dim": 8}, "olmo": {}, "olmo2": {}, "mistral": {"sliding_window": 64},
    "gemma": {"head_dim": 8}, "gemma2": {"head_dim": 8, "attn_logit_softcapping": 2.0, **KINDS},
    "gemma3_text": {"head_dim": 8, **KINDS}, "smollm3": {"no_rope_layers": [1, 0]}, "phi": {}, "phi3": {},
    "granite": {"logits_scaling": 3.0, "attention_multiplier": 0.2}, "gpt_neox": {},
    "gpt2": {"n_embd": C, "n_layer": 2, "n_head": 4, "n_positions": 128}, "cohere": {"logit_scale": 0.3},
    "falcon": {"alibi": False, "new_decoder_architecture": True, "num_kv_heads": 2},
    "opt": {"word_embed_proj_dim": C, "ffn_dim": 48}}


def family(kind, folder, **shape):
    """A tiny folder of a family with all parameters random (fresh norms and biases would hide errors)."""
    config = transformers.AutoConfig.for_model(kind, **{**SHAPE, **FAMILIES.get(kind, {}), **shape})
    theirs = transformers.AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in theirs.parameters():
            weight.add_(torch.empty(weight.shape).normal_(0.0, 0.15, generator=generator))
    theirs.save_pretrained(folder)
    return theirs


def loaded(folder, dtype=torch.float64, k=2):
    model = HFModel.from_pretrained(folder, torch.float32, Predictor).to(dtype).eval()
    model.add_predictors(k, seed=1)
    return model.to(dtype)


def gradients(model, terms):
    model.zero_grad()
    sum(sum_ / n for sum_, n in terms.values()).backward()
    return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_family(kind, tmp_path, tokenizer, examples):
    """Its own logits; three passes, the fused pass and packed rows give the same terms and gradients; and
    batches with a cache the same answers as the slow loop."""
    theirs = family(kind, tmp_path)
    model = loaded(tmp_path)
    ids = torch.randint(V, (2, 11), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        torch.testing.assert_close(model.head(model(ids)), theirs.double()(ids).logits, atol=1e-9, rtol=1e-9)
    tokenizer.vocab_size, own = V, tokenizer.vocab_size
    views = [render_views(e, tokenizer) for e in examples]
    tokenizer.vocab_size = own
    views = [v._replace(preds=[V, V + 1]) for v in views]
    has, near = [True] * len(views), 5e-6 if model.lm.config._attn_implementation == "eager" else 1e-7
    slow = three_pass(model, collate_three(views, has))
    grads = gradients(model, slow)
    assert grads["pred_embedding"].abs().max() > 1e-4
    for row_len in (0, 120):
        fast = fused(model, collate_fused(views, has, row_len))
        for name in slow:
            torch.testing.assert_close(fast[name][0], slow[name][0], atol=near, rtol=near)
        for name, grad in gradients(model, fast).items():
            torch.testing.assert_close(grad, grads[name], atol=20 * near, rtol=20 * near)
    prompts = [[5, 6, 7], [9, 8, 7, 6, 5, 4, 3], [17]]
    assert generate(model, prompts, 1, 6) == [generate_slow(model, prompt, 1, 6) for prompt in prompts]


@pytest.mark.parametrize("kind", ["mpt", "bloom"])
def test_alibi_is_refused_by_the_check(kind, tmp_path):
    family(kind, tmp_path, d_model=C, n_layers=2, n_heads=4, n_layer=2, n_head=4)
    with pytest.raises(BadInput, match=f"{kind}: "):
        loaded(tmp_path)
