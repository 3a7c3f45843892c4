"""The transformer: Llama (arXiv 2302.13971), the same function as `transformers.LlamaForCausalLM`.

Tensor names are those of a Hugging Face Llama checkpoint, so loading and saving need no table. But:
- `forward` returns hidden states, not logits: LLM-JEPA needs the hidden states of all views and the logits of
  few positions;
- `positions` and `mask` come from the caller: in the fused pass a row is a tree of segments, not a line;
- predictor tokens [PRED] are no vocabulary entries: ids V .. V+k-1 read rows of `pred_embedding`, so the head
  cannot emit them and an exported checkpoint has the vocabulary of its base model.

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

from support.checkpoint import hf_name, load_tensor, read_config, save_tensors, tensor_files, write_config
from support.files import BadInput


@dataclass
class ModelConfig:
    """The shape of a model; checkpoint.HF_NAMES has the names of these fields in config.json."""
    vocab_size: int  # V; predictor tokens are not counted
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
    others: dict = field(default_factory=dict)  # what else config.json says: handed back as it was


PRESETS = {
    "nano": dict(),  # the defaults above: about 3.5 M parameters
    "llama-3.2-1b": dict(dim=2048, n_layers=16, n_heads=32, n_kv_heads=8, head_dim=64, ffn_dim=8192,
                         max_seq_len=131072, rope_theta=500000.0, tie_embeddings=True,
                         rope_scaling=dict(rope_type="llama3", factor=32.0, low_freq_factor=1.0,
                                           high_freq_factor=4.0, original_max_position_embeddings=8192)),
}


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (arXiv 1910.07467)."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)


def rope_frequencies(config: ModelConfig, device: torch.device) -> Tensor:
    """Radians per position, (D/2,). With Llama 3.1's scaling, wavelengths beyond the original context are
    stretched by `factor`, short ones stay, and those between are interpolated."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device) / config.head_dim
    frequencies = 1.0 / config.rope_theta**exponents
    if config.rope_scaling is None:
        return frequencies
    s = config.rope_scaling
    rotations = s["original_max_position_embeddings"] * frequencies / (2 * math.pi)  # in the original context
    keep = (rotations - s["low_freq_factor"]) / (s["high_freq_factor"] - s["low_freq_factor"])
    keep = keep.clamp(0, 1)
    return keep * frequencies + (1 - keep) * frequencies / s["factor"]


def rope_table(config: ModelConfig, positions: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of every position's angles, each (B, T, 1, D/2), for `rotate`."""
    angles = positions[..., None, None].float() * rope_frequencies(config, positions.device)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary embedding (arXiv 2104.09864) of x (B, T, H, D), in the half-split convention of Hugging Face
    checkpoints: component d is paired with d + D/2, not with its neighbour."""
    cos, sin = (table.to(x.dtype) for table in rope)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


class KVCache:
    """Keys and values of the tokens seen so far: `length` of `capacity` places are filled, in all rows."""

    def __init__(self, config: ModelConfig, rows: int, capacity: int, device: torch.device,
                 dtype: torch.dtype):
        shape = (rows, config.n_kv_heads, capacity, config.head_dim)
        self.layers = [[torch.zeros(shape, device=device, dtype=dtype) for _ in "kv"]
                       for _ in range(config.n_layers)]
        self.length = 0

    def append(self, layer: int, k: Tensor, v: Tensor) -> list[Tensor]:
        """Store k, v (B, K, T, D) behind the others and return all, each (B, K, S, D)."""
        end = self.length + k.shape[2]
        for store, new in zip(self.layers[layer], (k, v), strict=True):
            store[:, :, self.length:end] = new
        return [store[:, :, :end] for store in self.layers[layer]]

    def keep(self, rows: Tensor) -> None:
        """Drop every row but these (indices)."""
        self.layers = [[store[rows] for store in layer] for layer in self.layers]


Mask = Tensor | BlockMask | list | None  # see Transformer.forward


def attend_by_hand(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """softmax(q k' / sqrt(D)) v over the keys that the mask shows (None: causal).

    q (B, H, T, D); k, v (B, K, S, D); each key-value head serves H / K query heads."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))  # (B, H, S, D)
    if mask is None:
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
    scores = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).masked_fill(~mask, float("-inf"))  # (B, H, T, S)
    return scores.softmax(dim=-1).to(v.dtype) @ v  # (B, H, T, D)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
    """The same, by PyTorch's kernels, which never hold (T, S) scores. But on a CPU their bfloat16 backward
    takes three times as long as attend_by_hand (PyTorch 2.13), at the few dozen tokens of our rows."""
    if isinstance(mask, list):
        return attend_in_turn(q, k, v, mask)
    grouped = q.shape[1] != k.shape[1]
    if isinstance(mask, BlockMask):
        return flex_attention(q, k, v, block_mask=mask, enable_gqa=grouped)
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:
        return attend_by_hand(q, k, v, mask)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped)


def attend_in_turn(q: Tensor, k: Tensor, v: Tensor, masks: list) -> Tensor:
    """attend for one row of tokens that stands for several batches, one after the other; (rows, T) of each
    are its mask's. So examples without views (loss dropout) are not padded to the length of those with views:
    all else takes tokens one by one, attention alone must take the batches apart again."""
    shapes = [(mask.shape[0], mask.shape[-1]) for mask in masks]
    parts = zip(*(x[0].split([rows * T for rows, T in shapes], dim=1) for x in (q, k, v)), strict=True)
    ys = [attend(*(x.unflatten(1, shape).transpose(0, 1) for x in part), mask)  # (rows, H, T, D)
          for part, shape, mask in zip(parts, shapes, masks, strict=True)]
    return torch.cat([y.transpose(1, 2).flatten(0, 1) for y in ys]).transpose(0, 1)[None]  # (1, H, all T, D)


class Projection(nn.Linear):
    """x W', and with LoRA (arXiv 2106.09685) x W' + 2 dropout(x) A' B': alpha = 2 r, as the paper's code has
    it. A is (r, in), B (out, r); B begins at 0, so that an untrained adapter changes nothing."""

    def __init__(self, n_in: int, n_out: int):
        super().__init__(n_in, n_out, bias=False)
        self.lora_a = self.lora_b = None
        self.dropout = 0.0

    def add_lora(self, rank: int, dropout: float, generator: torch.Generator) -> None:
        bound = self.in_features**-0.5
        a = torch.empty(rank, self.in_features).uniform_(-bound, bound, generator=generator)
        self.lora_a, self.lora_b = nn.Parameter(a), nn.Parameter(torch.zeros(self.out_features, rank))
        self.dropout = dropout

    def merged(self) -> Tensor:
        return self.weight if self.lora_a is None else self.weight + 2 * self.lora_b @ self.lora_a

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight)
        if self.lora_a is None:
            return y
        low = F.linear(F.dropout(x, self.dropout, self.training), self.lora_a)  # (..., r)
        return y + 2 * F.linear(low, self.lora_b)


class Attention(nn.Module):
    """Causal self-attention with grouped key-value heads (arXiv 2305.13245)."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        C, H, K, D = config.dim, config.n_heads, config.n_kv_heads, config.head_dim
        self.layer, self.head_dim = layer, D
        self.q_proj = Projection(C, H * D)
        self.k_proj = Projection(C, K * D)
        self.v_proj = Projection(C, K * D)
        self.o_proj = Projection(H * D, C)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Mask,
                cache: KVCache | None) -> Tensor:
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

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Mask,
                cache: KVCache | None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rope, mask, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Transformer(nn.Module):
    """`model(ids, positions, mask)` gives hidden states after the final norm, `model.head(hidden)` logits.

    Weights depend on (config, seed) alone; the k rows of `pred_embedding` come from a generator of their own,
    so that k changes no other weight. With seed None the weights have no memory yet: `from_pretrained` fills
    them.
    """

    def __init__(self, config: ModelConfig, k: int = 0, seed: int | None = 0):
        super().__init__()
        self.config = config
        with torch.device("meta"):
            empty = torch.empty(config.vocab_size, config.dim)  # given, for nn.Embedding would draw it
            self.embed_tokens = nn.Embedding(config.vocab_size, config.dim, _weight=empty)
            self.layers = nn.ModuleList(Block(config, i) for i in range(config.n_layers))
            self.norm = RMSNorm(config.dim, config.norm_eps)
            if not config.tie_embeddings:
                self.lm_head = nn.Linear(config.dim, config.vocab_size, bias=False)
        self.pred_embedding = None  # (k, C)
        self.grad_checkpointing = False  # keep the inputs of the blocks alone for the backward
        if seed is not None:
            self.to_empty(device="cpu")
            self.init_weights(seed)
            self.add_predictors(k, seed)

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Normal with deviation 0.02; the two matrices of a block that write to the residual stream are
        scaled down by the root of their number, as in GPT-2, so that its variance does not grow with
        depth."""
        generator = torch.Generator().manual_seed(seed)
        for name, weight in self.named_parameters():
            if weight.dim() == 1:
                weight.fill_(1.0)
            else:
                residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                std = 0.02 / math.sqrt(2 * self.config.n_layers) if residual else 0.02
                weight.normal_(0.0, std, generator=generator)

    def add_predictors(self, k: int, seed: int) -> None:
        """k new rows of pred_embedding, in place of those that there are."""
        generator = torch.Generator().manual_seed(seed + 1)
        rows = torch.empty(k, self.config.dim).normal_(0.0, 0.02, generator=generator)
        self.pred_embedding = nn.Parameter(rows) if k else None

    def add_lora(self, rank: int, dropout: float, seed: int) -> None:
        """Adapters on the seven projections of every block; nothing but these and pred_embedding is trained
        then."""
        generator = torch.Generator().manual_seed(seed + 2)
        for weight in self.parameters():
            weight.requires_grad_(weight is self.pred_embedding)
        for module in self.layers.modules():
            if isinstance(module, Projection):
                module.add_lora(rank, dropout, generator)

    @torch.no_grad()
    def merge_lora(self) -> None:
        """Add the adapters to the weights, and drop them."""
        for module in self.layers.modules():
            if isinstance(module, Projection):
                module.weight.copy_(module.merged())
                module.lora_a = module.lora_b = None

    def embed(self, ids: Tensor) -> Tensor:
        """(B, T) -> (B, T, C); ids from V on are predictor tokens."""
        if self.pred_embedding is None:
            return self.embed_tokens(ids)
        V = self.config.vocab_size
        words = self.embed_tokens(ids.clamp(max=V - 1))
        preds = F.embedding((ids - V).clamp(min=0), self.pred_embedding)
        return torch.where((ids >= V)[..., None], preds, words)

    def forward(self, ids: Tensor, positions: Tensor | None = None, mask: Mask = None,
                cache: KVCache | None = None) -> Tensor:
        """Hidden states (B, T, C) after the final norm.

        ids        (B, T) token ids; ids V .. V+k-1 are predictor tokens
        positions  (B, T) rotary positions; None: 0 .. T-1 in every row
        mask       (B, 1, T, S) boolean, True where query i sees key j, or such a BlockMask; None: causal; a
                   list of masks: one row (B = 1) of tokens, those of several batches, in order of their rows
        cache      holds S - T earlier tokens and takes these T; it wants positions and a mask
        """
        if cache is not None and (mask is None or positions is None):
            raise ValueError("with a cache, positions and mask must be given: the model cannot guess them")
        if positions is None:
            positions = torch.arange(ids.shape[1], device=ids.device)[None]
        rope = rope_table(self.config, positions)
        x = self.embed(ids)
        for layer in self.layers:
            if self.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, x, rope, mask, cache, use_reentrant=False)
            else:
                x = layer(x, rope, mask, cache)
        if cache is not None:
            cache.length += ids.shape[1]
        return self.norm(x)

    def head(self, hidden: Tensor) -> Tensor:
        """(..., C) -> logits (..., V)."""
        tied = self.config.tie_embeddings
        return F.linear(hidden, self.embed_tokens.weight if tied else self.lm_head.weight)

    @property
    def device(self) -> torch.device:
        return self.embed_tokens.weight.device

    def n_params(self) -> int:
        return sum(weight.numel() for weight in self.parameters())

    def flops(self, n_real: int, n_visible: int, n_labels: int) -> int:
        """Operations that a forward and backward need, whatever padding and masked attention add to them:

            6 (4 if it is frozen) for a weight of the blocks and a real token: product and sum, once forward,
                twice backward
            12 * layers * H * D for a (query, key) pair that the mask shows: scores and values
            6 * C * V (4 if it is frozen) for a token with a label: the head

        A target without gradient (--stop_gradient) is counted as if it had one.
        """
        c, head = self.config, self.embed_tokens if self.config.tie_embeddings else self.lm_head
        weights = sum((6 if w.requires_grad else 4) * w.numel() for w in self.layers.parameters())
        return (weights * n_real + 12 * c.n_layers * c.n_heads * c.head_dim * n_visible
                + (6 if head.weight.requires_grad else 4) * c.dim * c.vocab_size * n_labels)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors as Hugging Face has them, and pred_embedding.safetensors if
        k > 0. Adapters must be merged."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {hf_name(name): weight.detach().cpu() for name, weight in self.named_parameters()}
        if any("lora_" in name for name in tensors):
            raise ValueError("merge_lora() first: a Hugging Face folder has no place for adapters")
        pred = tensors.pop("model.pred_embedding", None)
        dtype = str(self.embed_tokens.weight.dtype).removeprefix("torch.")
        write_config(folder / "config.json", asdict(self.config), dtype)
        save_tensors(folder / "model.safetensors", tensors)
        if pred is not None:
            save_tensors(folder / "pred_embedding.safetensors", {"pred_embedding": pred})
        else:  # of a model that was here before
            (folder / "pred_embedding.safetensors").unlink(missing_ok=True)

    @classmethod
    def from_pretrained(cls, folder: str | Path, dtype: torch.dtype | None = None) -> "Transformer":
        """The model of a Hugging Face folder with model_type llama, or of a run of ours.

        dtype: of the weights; None: as they are stored. BadInput names the file, and a tensor that is
        missing, unknown, misshapen or of another type. Every tensor goes straight from the mapped file into
        its parameter: the peak of memory is the weights and one tensor.
        """
        folder = Path(folder)
        config, stored = ModelConfig(**read_config(folder / "config.json")), tensor_files(folder)
        if config.n_layers > len(stored):
            raise BadInput(f"{folder}: has fewer tensors than config.json has layers")
        model = cls(config, seed=None)
        for name, weight in list(model.named_parameters()):
            theirs, (module, _, leaf) = hf_name(name), name.rpartition(".")
            if theirs not in stored:
                raise BadInput(f"{folder}: tensor {theirs} is missing; is config.json another model's?")
            tensor = load_tensor(stored.pop(theirs), theirs, weight.shape, dtype)
            setattr(model.get_submodule(module), leaf, nn.Parameter(tensor))
        if config.tie_embeddings and "lm_head.weight" in stored:  # some exports write it twice
            embedding = model.embed_tokens.weight
            twin = load_tensor(stored.pop("lm_head.weight"), "lm_head.weight", embedding.shape, dtype)
            if not torch.equal(twin, embedding):
                raise BadInput(f"{folder}: config.json ties lm_head.weight to the embedding, but they differ")
        if stored:
            raise BadInput(f"{folder}: unknown tensor {min(stored)}; is config.json another model's?")
        pred_file = folder / "pred_embedding.safetensors"
        if pred_file.exists():
            tensor = load_tensor(pred_file, "pred_embedding", (None, config.dim), dtype)
            if not len(tensor):
                raise BadInput(f"{pred_file}: pred_embedding has no row")
            model.pred_embedding = nn.Parameter(tensor)
        return model


DEVICES = ("auto", "cpu", "cuda", "mps")


def device_available(name: str) -> bool:
    return {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available}.get(name, lambda: True)()


def pick_device(name: str) -> torch.device:
    """One of DEVICES; auto is the first that is there of cuda, mps, cpu. BadInput if it is not available."""
    if not device_available(name):
        raise BadInput(f"--device {name}: not available here")
    best = next(device for device in ("cuda", "mps", "cpu") if device_available(device))
    return torch.device(best if name == "auto" else name)
