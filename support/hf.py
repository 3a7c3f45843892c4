"""Any causal language model of the transformers library, as a model of ours (requirements-hf.txt).

    uses_transformers   does a folder go through the library, or through model.py?
    HFModel             called like model.Transformer: model(ids, positions, mask), model.head(hidden)

No family is named here. What a folder's model does is found out by checks when it is loaded (hf_check.py);
a model that fails one is refused by its name.

Letters: B rows, T tokens in a row, S keys, C width, V vocabulary, k predictor tokens.
"""
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from support.checkpoint import HEAD_FILE, PRED_FILE, load_extras, save_tensors
from support.files import BadInput, atomic, library, printable, read_json, regular
from support.hf_check import brief, check

BACKENDS = ("auto", "ours", "transformers")


def uses_transformers(folder: str | Path, backend: str = "auto") -> bool:
    """Is the model of this folder the library's? auto: if config.json names a model_type other than llama."""
    if backend != "auto" or not Path(folder, "config.json").exists():
        return backend == "transformers"
    return read_json(Path(folder, "config.json")).get("model_type", "llama") != "llama"


@dataclass
class Shape:
    """What the programs ask of a model's config, under the names of model.ModelConfig."""
    vocab_size: int  # V: rows of the embedding
    dim: int  # C
    n_layers: int
    max_seq_len: int  # the longest context; at most the width of a sliding window, which then never slides


def shape_of(lm: nn.Module) -> Shape:
    c, embedding = lm.config.get_text_config(), lm.get_input_embeddings()
    limits = [getattr(c, name, None) for name in ("max_position_embeddings", "sliding_window")]
    return Shape(embedding.num_embeddings, embedding.embedding_dim, c.num_hidden_layers,
                 min([n for n in limits if n], default=2048))


class HFModel(nn.Module):
    """lm: an AutoModelForCausalLM. make_predictor(width, kind, generator): model.Predictor."""
    takes_block_masks = False  # of FlexAttention

    def __init__(self, lm: nn.Module, make_predictor: Callable | None = None):
        super().__init__()
        self.lm, self.config, self.make_predictor = lm, shape_of(lm), make_predictor
        lm.get_input_embeddings().padding_idx = None  # or this token's row would have no gradient
        self.pred_embedding = None  # (k, C)
        self.predictor = None
        self.embed_layer, self.recompute = -1, False
        self.code = []  # files of Python in the folder, with --trust_remote_code

    def add_pred_rows(self, k: int, seed: int) -> None:
        """k new [PRED] rows, the same that model.Transformer draws."""
        generator = torch.Generator().manual_seed(seed + 1)
        rows = torch.empty(k, self.config.dim).normal_(0.0, 0.02, generator=generator)
        self.pred_embedding = nn.Parameter(rows) if k else None

    def add_predictor(self, kind: str, seed: int) -> None:
        self.predictor = self.make_predictor(self.config.dim, kind, torch.Generator().manual_seed(seed + 3))

    def forward(self, ids: Tensor, positions: Tensor | None = None, mask: Tensor | None = None, cache=None,
                layer: int = -1) -> Tensor | tuple[Tensor, Tensor]:
        """Hidden states (B, T, C) after the final norm; with layer >= 0, those after that block as well.
        ids, positions (B, T), mask (B, 1, T, S): see model.Transformer. BadInput for the last block as layer:
        the library gives it only after the norm."""
        if 0 <= self.config.n_layers - 1 <= layer:
            raise BadInput(f"--layer {layer}: transformers gives the last block's output only after the "
                           "final norm, which is --layer -1")
        V = self.config.vocab_size
        x = self.lm.get_input_embeddings()(ids.clamp(max=V - 1))  # (B, T, C)
        if self.pred_embedding is not None:
            preds = F.embedding((ids - V).clamp(min=0), self.pred_embedding)
            x = torch.where((ids >= V)[..., None], preds, x)
        if positions is None:
            positions = torch.arange(ids.shape[1], device=ids.device)[None]  # (1, T)
        out = self.lm.base_model(
            inputs_embeds=x, position_ids=positions, attention_mask=self.their_mask(mask, x.dtype),
            past_key_values=cache, use_cache=cache is not None, output_hidden_states=layer >= 0)
        hidden = out.last_hidden_state
        return (hidden, out.hidden_states[layer + 1]) if layer >= 0 else hidden

    def their_mask(self, mask: Tensor | None, dtype: torch.dtype) -> Tensor | dict | None:
        """The mask as the library wants it: boolean for PyTorch's kernels, a number to add to the scores for
        the written-out attention, and one for each kind of layer where there are several kinds."""
        if mask is None:
            return None
        if not isinstance(mask, Tensor):
            raise BadInput("--attention flex is for model.py alone: --attention dense")
        if self.lm.config._attn_implementation == "eager":
            hidden = torch.finfo(dtype).min
            mask = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, hidden)
        kinds = set(getattr(self.lm.config.get_text_config(), "layer_types", None) or ())
        return dict.fromkeys(kinds, mask) if len(kinds) > 1 else mask

    def head(self, hidden: Tensor) -> Tensor:
        """(..., C) -> logits (..., V), with the factors and the cap that config.json may name."""
        c, logits = self.lm.config.get_text_config(), self.lm.get_output_embeddings()(hidden)
        if getattr(c, "logit_scale", None):
            logits = logits * c.logit_scale
        if getattr(c, "logits_scaling", None):
            logits = logits / c.logits_scaling
        cap = getattr(c, "final_logit_softcapping", None)
        return cap * torch.tanh(logits / cap) if cap else logits

    def new_cache(self, rows: int):
        """The library's cache, with the one method that support/generation.py calls."""
        cache = library("transformers", "generation").DynamicCache()
        cache.select = cache.batch_select_indices
        return cache

    @property
    def layers(self) -> Iterable[nn.Module]:
        """The blocks."""
        lists = (module for module in self.lm.modules() if isinstance(module, nn.ModuleList))
        return next((blocks for blocks in lists if len(blocks) == self.config.n_layers), ())

    @property
    def device(self) -> torch.device:
        return self.lm.get_input_embeddings().weight.device

    @property
    def grad_checkpointing(self) -> bool:
        return self.recompute

    @grad_checkpointing.setter
    def grad_checkpointing(self, on: bool) -> None:
        if on != self.recompute:
            self.recompute = on
            self.lm.gradient_checkpointing_enable({"use_reentrant": False}) if on else (
                self.lm.gradient_checkpointing_disable())

    def n_params(self) -> int:
        return sum(weight.numel() for weight in self.parameters())

    def flops(self, n_real: int, n_visible: int, n_labels: int, backward: bool = True) -> int:
        """An estimate in the way of model.Transformer.flops, from the number of weights: every matrix outside
        the embedding and the head counts as a product per token (so all experts of a mixture do)."""
        def per(weight: Tensor) -> int:
            return 2 if not backward else 6 if weight.requires_grad else 4

        c, head = self.lm.config.get_text_config(), self.lm.get_output_embeddings().weight
        apart, heads = {id(self.lm.get_input_embeddings().weight), id(head)}, c.num_attention_heads
        blocks = sum(per(w) * w.numel() for w in self.lm.parameters() if id(w) not in apart)
        width = (getattr(c, "head_dim", None) or c.hidden_size // heads) * heads
        pair = (12 if backward else 4) * c.num_hidden_layers * width
        return blocks * n_real + pair * n_visible + per(head) * head.numel() * n_labels

    # ---- adapters, by peft ---------------------------------------------------------------------------------

    def add_adapters(self, rank: int, dropout: float, seed: int) -> None:
        """What support.lora.add_lora does, by peft: an adapter for every linear layer but the head."""
        peft = library("peft", "--lora_rank with a model of transformers")
        config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=dropout,
                                 target_modules="all-linear")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed + 2)
            self.__dict__["adapters"] = peft.get_peft_model(self.lm, config)  # no submodule: it holds lm

    def merge_adapters(self) -> None:
        if "adapters" in self.__dict__:
            self.lm = self.__dict__.pop("adapters").merge_and_unload()

    # ---- folders -------------------------------------------------------------------------------------------

    def save_pretrained(self, folder: str | Path) -> None:
        """The library's own files, the folder's own code if it had any, and our [PRED] rows and predictor."""
        if "adapters" in self.__dict__:
            raise ValueError("merge_lora first: a Hugging Face folder has no place for adapters")
        self.lm.save_pretrained(folder)
        for path in self.code:
            with atomic(Path(folder) / path.name) as temporary:
                shutil.copy(path, temporary)
        own = {PRED_FILE: {}, HEAD_FILE: {}}
        if self.pred_embedding is not None:
            own[PRED_FILE]["pred_embedding"] = self.pred_embedding.detach().cpu()
        if self.predictor is not None:
            own[HEAD_FILE] |= {name: w.detach().cpu() for name, w in self.predictor.named_parameters()}
        save_tensors(Path(folder), own)

    @classmethod
    def from_pretrained(cls, folder: str | Path, make_predictor: Callable,
                        trust_remote_code: bool = False) -> "HFModel":
        """The model of a folder in float32, from safetensors alone, checked. trust_remote_code: run the
        Python files of the folder. BadInput names what is wrong."""
        config = read_json(Path(folder) / "config.json")
        kind = config.get("model_type")
        if config.get("quantization_config"):
            raise BadInput(f"{folder}: its weights are quantized; only float32, bfloat16, float16 are read")
        transformers = library("transformers", f"{folder}: model_type {kind!r}")
        transformers.utils.logging.disable_progress_bar()
        for path in Path(folder).glob("*.*"):
            path.is_dir() or regular(path)
        try:
            lm, info = transformers.AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.float32, local_files_only=True, use_safetensors=True,
                trust_remote_code=trust_remote_code, output_loading_info=True)
        except Exception as error:  # the library raises a dozen kinds
            raise BadInput(f"{folder}: transformers cannot load it ({brief(error)})") from None
        wrong = [str(name) for name in [*info["missing_keys"], *info["mismatched_keys"]]]
        if wrong:
            raise BadInput(f"{folder}: tensor {min(wrong)} is missing or misshapen; is config.json another "
                           "model's?")
        if info["unexpected_keys"]:
            print(f"note: {folder}: {len(info['unexpected_keys'])} tensors are no part of the model, such as "
                  f"{printable(min(info['unexpected_keys']))}")
        lm.generation_config = transformers.GenerationConfig()  # the folder's own file is carried unchanged
        model = cls(lm, make_predictor)
        model.code = sorted(Path(folder).glob("*.py")) if trust_remote_code else []
        load_extras(model, Path(folder), torch.float32, model.config.dim)
        check(model.eval(), f"{folder}: {kind}")
        return model.train()
