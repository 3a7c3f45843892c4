"""The transformer: Llama (arXiv 2302.13971), the same function as `transformers.LlamaForCausalLM`.

Parameters have the names of a Hugging Face Llama checkpoint. But:
- `forward` returns hidden states, not logits: LLM-JEPA needs them for all views, and logits at few positions;
- `positions` and `mask` come from the caller: in the fused pass a row is a tree of segments (jepa_loss.py);
- predictor tokens [PRED] are not in the vocabulary: ids V .. V+k-1 read the rows of `pred_embedding`. So the
  head cannot emit them, and an exported checkpoint has the vocabulary of its base model.

Letters: B rows, T tokens in a row, S keys (cached ones included), C width, H heads, K key-value heads, D head
width, V vocabulary, k predictor tokens.
"""
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.utils.checkpoint import checkpoint

from support.checkpoint import load_folder, save_folder
from support.lora import Projection  # nn.Linear without bias; with --lora_rank also an adapter


@dataclass
class ModelConfig:
    """The shape of a model. support/checkpoint.py has the names of these fields in config.json."""
    vocab_size: int  # V, without predictor tokens
    dim: int = 256  # C
    n_layers: int = 4
    n_heads: int = 4  # H
    n_kv_heads: int = 4  # K, divides H
    head_dim: int = 64  # D, even; H * D need not be C
    ffn_dim: int = 704
    max_seq_len: int = 512  # the longest context in tokens
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None  # Llama 3.1's, of rope_type llama3
    norm_eps: float = 1e-5
    tie_embeddings: bool = True  # the head is the embedding
    others: dict = field(default_factory=dict)  # unknown config.json keys, written back unchanged


PRESETS = {
    "nano": dict(),  # the defaults above: about 3.3 M parameters
    "llama-3.2-1b": dict(dim=2048, n_layers=16, n_heads=32, n_kv_heads=8, head_dim=64, ffn_dim=8192,
                         max_seq_len=131072, rope_theta=500000.0, tie_embeddings=True,
                         rope_scaling=dict(rope_type="llama3", factor=32.0, low_freq_factor=1.0,
                                           high_freq_factor=4.0, original_max_position_embeddings=8192)),
}

Mask = Tensor | BlockMask | None  # see Transformer.forward


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (arXiv 1910.07467)."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)


def rope_frequencies(config: ModelConfig, device: torch.device) -> Tensor:
    """Radians per position, (D/2,). Llama 3.1's scaling divides frequencies that are low for the original
    context by `factor`, keeps the high ones, and interpolates between them."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device) / config.head_dim
    frequencies = 1.0 / config.rope_theta**exponents  # (D/2,)
    if config.rope_scaling is None:
        return frequencies
    s = config.rope_scaling
    rotations = s["original_max_position_embeddings"] * frequencies / (2 * math.pi)  # in the original context
    high = (rotations - s["low_freq_factor"]) / (s["high_freq_factor"] - s["low_freq_factor"])
    high = high.clamp(0, 1)  # 1: a high frequency, 0: a low one
    return high * frequencies + (1 - high) * frequencies / s["factor"]


def rope_table(config: ModelConfig, positions: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of the angles at positions (B, T), for `rotate`."""
    angles = positions[..., None, None].float() * rope_frequencies(config, positions.device)  # (B, T, 1, D/2)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary embedding (arXiv 2104.09864) of x (B, T, H, D). Component d is paired with d + D/2, as Hugging
    Face checkpoints have it, not with its neighbour."""
    cos, sin = (table.to(x.dtype) for table in rope)
    a, b = x.chunk(2, dim=-1)  # (B, T, H, D/2)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)  # (B, T, H, D)


class KVCache:
    """Keys and values of the `length` tokens so far, in every layer. Room is added for 64 at a time."""

    def __init__(self, config: ModelConfig, rows: int, device: torch.device, dtype: torch.dtype):
        shape = (config.n_layers, 2, rows, config.n_kv_heads, 0, config.head_dim)
        self.stored = torch.zeros(shape, device=device, dtype=dtype)
        self.length = 0

    def append(self, layer: int, k: Tensor, v: Tensor) -> Tensor:
        """Store k and v (B, K, T, D) after the earlier ones; return all keys and values (2, B, K, S, D). The
        model moves `length` on after its last layer."""
        start, end = self.length, self.length + k.shape[2]
        if end > self.stored.shape[4]:
            self.stored = F.pad(self.stored, (0, 0, 0, -end % 64 + end - self.stored.shape[4]))
        self.stored[layer, 0, :, :, start:end] = k
        self.stored[layer, 1, :, :, start:end] = v
        return self.stored[layer, :, :, :, :end]

    def select(self, rows: Tensor) -> None:
        """Keep only the rows with these indices."""
        self.stored = self.stored[:, :, rows]


def attend_by_hand(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """softmax(q k' / sqrt(D)) v over the keys that the mask shows (None: causal).

    q (B, H, T, D); k, v (B, K, S, D). Each key-value head serves H / K query heads."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))  # (B, H, S, D)
    if mask is None:
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()  # (T, S)
    scores = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).masked_fill(~mask, float("-inf"))  # (B, H, T, S)
    return scores.softmax(dim=-1).to(v.dtype) @ v  # (B, H, T, D)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
    """The same by PyTorch's kernels, which never hold the (T, S) scores. But on a CPU their bfloat16 backward
    takes three times as long (PyTorch 2.13)."""
    grouped = q.shape[1] != k.shape[1]
    if isinstance(mask, BlockMask):
        return flex_attention(q, k, v, block_mask=mask, enable_gqa=grouped)
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:
        return attend_by_hand(q, k, v, mask)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped)


class Attention(nn.Module):
    """Self-attention with grouped key-value heads (arXiv 2305.13245)."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        C, H, K, D = config.dim, config.n_heads, config.n_kv_heads, config.head_dim
        self.layer, self.head_dim = layer, D
        self.q_proj = Projection(C, H * D)
        self.k_proj = Projection(C, K * D)
        self.v_proj = Projection(C, K * D)
        self.o_proj = Projection(H * D, C)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Mask, cache: KVCache | None) -> Tensor:
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, -1, self.head_dim)  # (B, T, H, D)
        k = self.k_proj(x).view(B, T, -1, self.head_dim)  # (B, T, K, D)
        v = self.v_proj(x).view(B, T, -1, self.head_dim)  # (B, T, K, D)
        q, k, v = (heads.transpose(1, 2) for heads in (rotate(q, rope), rotate(k, rope), v))  # (B, H, T, D)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)  # (B, K, S, D)
        y = attend(q, k, v, mask)  # (B, H, T, D)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))  # (B, T, C)


class MLP(nn.Module):
    """SwiGLU (arXiv 2002.05202)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate_proj = Projection(config.dim, config.ffn_dim)
        self.up_proj = Projection(config.dim, config.ffn_dim)
        self.down_proj = Projection(config.ffn_dim, config.dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.dim, config.norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.dim, config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Mask, cache: KVCache | None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rope, mask, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Predictor(nn.Module):
    """A learned head for the embedding that predicts: W x + b ("linear"), or x + U gelu(W x + b) ("mlp"). It
    begins as the identity."""

    def __init__(self, dim: int, kind: str, generator: torch.Generator):
        super().__init__()
        self.hidden, self.out = nn.Linear(dim, dim), None
        if kind == "mlp":
            self.out = nn.Linear(dim, dim, bias=False)
            nn.init.zeros_(self.out.weight)
            nn.init.normal_(self.hidden.weight, 0.0, dim**-0.5, generator=generator)
        else:
            nn.init.eye_(self.hidden.weight)
        nn.init.zeros_(self.hidden.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C) -> (N, C)."""
        return self.hidden(x) if self.out is None else x + self.out(F.gelu(self.hidden(x)))


class Transformer(nn.Module):
    """`model(ids, positions, mask)` gives hidden states after the final norm, `model.head(hidden)` logits.

    The weights depend on config and seed alone. `pred_embedding` has a generator of its own, so k changes no
    other weight. With seed None the weights take no memory until `from_pretrained` replaces them.
    """

    def __init__(self, config: ModelConfig, k: int = 0, seed: int | None = 0):
        super().__init__()
        self.config = config
        with torch.device("meta"):
            empty = torch.empty(config.vocab_size, config.dim)  # for nn.Embedding to draw it takes seconds
            self.embed_tokens = nn.Embedding(config.vocab_size, config.dim, _weight=empty)
            self.layers = nn.ModuleList(Block(config, i) for i in range(config.n_layers))
            self.norm = RMSNorm(config.dim, config.norm_eps)
            if not config.tie_embeddings:
                self.lm_head = nn.Linear(config.dim, config.vocab_size, bias=False)
        self.pred_embedding = None  # (k, C)
        self.predictor = None  # a Predictor after the last token of the view that predicts
        self.embed_layer = -1  # the block after which views are embedded; -1: after the final norm
        self.grad_checkpointing = False  # recompute activations in the backward pass
        if seed is not None:
            self.to_empty(device="cpu")
            self.init_weights(seed)
            self.add_pred_rows(k, seed)

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Matrices have standard deviation 0.02. The two of a block that write to the residual stream are
        divided by the root of their number, as in GPT-2, so that its variance does not grow with depth."""
        generator = torch.Generator().manual_seed(seed)
        for name, weight in self.named_parameters():
            if weight.dim() == 1:
                weight.fill_(1.0)
            else:
                residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                std = 0.02 / math.sqrt(2 * self.config.n_layers) if residual else 0.02
                weight.normal_(0.0, std, generator=generator)

    def add_pred_rows(self, k: int, seed: int) -> None:
        """Give the model k new [PRED] rows in place of those that it has."""
        generator = torch.Generator().manual_seed(seed + 1)
        rows = torch.empty(k, self.config.dim).normal_(0.0, 0.02, generator=generator)
        self.pred_embedding = nn.Parameter(rows) if k else None

    def add_predictor(self, kind: str, seed: int) -> None:
        """Give the model a Predictor, "linear" or "mlp", in place of the one that it has."""
        generator = torch.Generator().manual_seed(seed + 3)
        self.predictor = Predictor(self.config.dim, kind, generator)

    def embed(self, ids: Tensor) -> Tensor:
        """(B, T) -> (B, T, C); ids from V on are predictor tokens."""
        if self.pred_embedding is None:
            return self.embed_tokens(ids)
        V = self.config.vocab_size
        words = self.embed_tokens(ids.clamp(max=V - 1))
        preds = F.embedding((ids - V).clamp(min=0), self.pred_embedding)
        return torch.where((ids >= V)[..., None], preds, words)

    def forward(self, ids: Tensor, positions: Tensor | None = None, mask: Mask = None,
                cache: KVCache | None = None, layer: int = -1) -> Tensor | tuple[Tensor, Tensor]:
        """Hidden states (B, T, C) after the final norm; with layer >= 0, those after that block as well.

        ids        (B, T) token ids; V .. V+k-1 are predictor tokens
        positions  (B, T) rotary positions; None: 0 .. T-1 in every row
        mask       (B, 1, T, S) boolean, True where query i sees key j, or such a BlockMask; None: causal
        cache      S - T earlier tokens; these T are added. It needs positions and a mask (ValueError)
        """
        if cache is not None and (mask is None or positions is None):
            raise ValueError("with a cache, positions and mask must be given: the model cannot guess them")
        if positions is None:
            positions = torch.arange(ids.shape[1], device=ids.device)[None]  # (1, T)
        rope = rope_table(self.config, positions)
        x = self.embed(ids)  # (B, T, C)
        tapped = None  # the hidden states after block `layer`
        for i, block in enumerate(self.layers):
            if self.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, rope, mask, cache, use_reentrant=False)
            else:
                x = block(x, rope, mask, cache)
            tapped = x if i == layer else tapped
        if cache is not None:
            cache.length += ids.shape[1]
        return (self.norm(x), tapped) if layer >= 0 else self.norm(x)

    def head(self, hidden: Tensor) -> Tensor:
        """(..., C) -> logits (..., V)."""
        tied = self.config.tie_embeddings
        return F.linear(hidden, self.embed_tokens.weight if tied else self.lm_head.weight)

    def new_cache(self, rows: int) -> KVCache:
        return KVCache(self.config, rows, self.device, self.embed_tokens.weight.dtype)

    @property
    def device(self) -> torch.device:
        return self.embed_tokens.weight.device

    def n_params(self) -> int:
        return sum(weight.numel() for weight in self.parameters())

    def flops(self, n_real: int, n_visible: int, n_labels: int, backward: bool = True) -> int:
        """FLOPs that a forward and backward pass need, without what padding and masked attention add:

            6 (4 if frozen)          per weight of the blocks and real token: 2 forward, 4 (2) backward
            12 * layers * H * D      per (query, key) pair that the mask shows: scores and values
            6 (4 if frozen) * C * V  per token with a label: the head

        backward=False: of a forward pass alone, 2, 4 and 2 instead. A target without gradient (--target
        stopgrad) counts as if it had one; a Predictor is not counted.
        """
        def per(weight: Tensor) -> int:
            return 2 if not backward else 6 if weight.requires_grad else 4

        c, head = self.config, self.embed_tokens if self.config.tie_embeddings else self.lm_head
        blocks = sum(per(w) * w.numel() for w in self.layers.parameters())
        pair = (12 if backward else 4) * c.n_layers * c.n_heads * c.head_dim
        label = per(head.weight) * c.dim * c.vocab_size
        return blocks * n_real + pair * n_visible + label * n_labels

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json, model.safetensors and, where there are [PRED] rows or a learned head,
        pred_embedding.safetensors and predictor.safetensors. ValueError if the model has adapters: merge them
        first."""
        save_folder(Path(folder), asdict(self.config), dict(self.named_parameters()))

    @classmethod
    def from_pretrained(cls, folder: str | Path, dtype: torch.dtype | None = None) -> "Transformer":
        """The model of a Hugging Face folder with model_type llama, or of a run of ours. dtype: of the
        weights; None: as they are stored. For errors see load_folder."""
        return load_folder(Path(folder), lambda config: cls(ModelConfig(**config), seed=None), dtype)
