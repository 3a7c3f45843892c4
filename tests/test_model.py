"""model.py against transformers, and its own promises: attention, cache, weights by seed, [PRED] rows."""
import pytest
import torch

from model import KVCache, ModelConfig, Transformer, attend, attend_by_hand

LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=32)
SHAPES = {
    "plain": dict(),
    "grouped": dict(n_kv_heads=2),
    "untied": dict(tie_embeddings=False),
    "head_dim": dict(head_dim=12, n_kv_heads=1),
    "llama3_rope": dict(rope_scaling=LLAMA3, rope_theta=500.0, tie_embeddings=False),
}


def small(**shape) -> ModelConfig:
    return ModelConfig(**{**dict(vocab_size=50, dim=32, n_layers=2, n_heads=4, n_kv_heads=4, head_dim=8,
                                 ffn_dim=56, max_seq_len=128), **shape})


def named(model) -> dict[str, torch.Tensor]:
    return dict(model.named_parameters())


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_equals_transformers(shape, tmp_path):
    """The exported folder, loaded by transformers, gives our logits (1e-5) and gradients (1e-4)."""
    transformers = pytest.importorskip("transformers")
    ours = Transformer(small(**shape), seed=5)
    with torch.no_grad():
        for weight in ours.parameters():
            weight.mul_(5) if weight.dim() > 1 else weight.uniform_(0.5, 1.5)
    ours.save_pretrained(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    g = torch.Generator().manual_seed(0)
    ids, weight = torch.randint(50, (3, 100), generator=g), torch.randn(3, 100, 50, generator=g)
    our_logits, their_logits = ours.head(ours(ids)), theirs(ids).logits
    torch.testing.assert_close(our_logits, their_logits, atol=1e-5, rtol=0)
    for logits in (our_logits, their_logits):
        (logits * weight / weight.numel() ** 0.5).sum().backward()
    gradients = {name.removeprefix("model."): weight.grad for name, weight in theirs.named_parameters()}
    for name, weight in ours.named_parameters():
        torch.testing.assert_close(weight.grad, gradients[name], atol=1e-4, rtol=1e-4,
                                   msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("masked", [False, True])
def test_attention_by_hand_equals_torch(masked):
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, 9, 6, dtype=torch.float64, generator=g).requires_grad_()
               for heads in (4, 2, 2))
    random_mask = (torch.rand(2, 1, 9, 9, generator=g) < 0.5) | torch.eye(9, dtype=torch.bool)
    results = []
    for f in (attend, attend_by_hand):
        out = f(q, k, v, random_mask if masked else None)
        results.append((out, *torch.autograd.grad(out.sin().sum(), (q, k, v))))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


def test_bfloat16_on_a_cpu_stays_close():
    """The path that training takes on a CPU: autocast, attention by hand."""
    model, ids = Transformer(small(n_kv_heads=2), seed=5), torch.arange(40)[None]
    exact = model(ids)
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(ids)
    assert 0 < (rough.float() - exact).abs().max() < 0.1


def test_cache_equals_no_cache():
    """In parts of 5, 1 and 6 tokens; row 1 of 3 leaves the cache on the way."""
    model, ids = Transformer(small(n_kv_heads=2), seed=5).double(), torch.randint(50, (3, 12))
    cache, column = KVCache(model.config, 3, ids.device, torch.float64), torch.arange(12)
    rows, parts = torch.tensor([0, 2]), []
    for start, end in ((0, 5), (5, 6), (6, 12)):
        if start == 6:
            cache.select(rows)
            ids = ids[rows]
        mask = column[:end] <= column[start:end, None]  # (T, S)
        parts.append(model(ids[:, start:end], column[None, start:end], mask[None, None], cache))
    cached = torch.cat([parts[0][rows], parts[1][rows], parts[2]], 1)
    torch.testing.assert_close(cached, model(ids), atol=1e-12, rtol=0)
    with pytest.raises(ValueError, match="positions and mask"):
        model(ids, cache=cache)


def test_weights_by_seed():
    """0.02, and less for the matrices that write to the residual stream. The seed changes every matrix; k
    changes none."""
    model, other = (Transformer(ModelConfig(300), k=4, seed=seed) for seed in (1, 2))
    without = named(Transformer(ModelConfig(300), k=0, seed=1))
    assert 3.0e6 < model.n_params() < 4.0e6 and model.pred_embedding.shape == (4, 256)
    for name, weight in model.named_parameters():
        assert torch.equal(weight, without.get(name, model.pred_embedding)), name
        if weight.dim() == 1:
            assert (weight == 1).all(), name
        else:
            residual = name.endswith(("o_proj.weight", "down_proj.weight"))
            assert weight.std().item() == pytest.approx(0.02 / (8**0.5 if residual else 1), rel=0.1), name
            assert not torch.equal(weight, named(other)[name]), name


def test_predictors_are_not_in_the_vocabulary():
    """Ids V, V+1 read their own rows, in order; the head knows nothing of them."""
    model = Transformer(small(), k=2, seed=1)
    embedded = model.embed(torch.tensor([[49, 50, 51, 0]]))[0]
    rows = torch.stack([model.embed_tokens.weight[49], *model.pred_embedding, model.embed_tokens.weight[0]])
    assert torch.equal(embedded, rows)
    assert model.head(model(torch.tensor([[1, 50, 51]]))).shape == (1, 3, 50)


def test_a_layer_is_what_its_block_gives(tiny):
    """The hidden states after block 0, held against a model of one block."""
    model, ids = tiny(0), torch.arange(10)[None]
    final, first = model(ids, layer=0)
    assert torch.equal(final, model(ids))
    model.layers, model.norm = model.layers[:1], torch.nn.Identity()
    assert torch.equal(first, model(ids))


def test_a_predictor_begins_as_the_identity(tiny):
    for kind in ("linear", "mlp"):
        model = tiny(1)
        model.add_predictor(kind, seed=0)
        x = torch.randn(3, 32)
        torch.testing.assert_close(model.predictor(x), x)
