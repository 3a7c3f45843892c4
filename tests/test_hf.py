"""support/hf.py: models, tokenizers and conversations of other families, held against transformers' own."""
import json
import os
import sys

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("tokenizers")
pytest.importorskip("jinja2")

from conftest import PAIRS, json_tokenizer  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from test_jepa_loss import step  # noqa: E402
from test_train import assert_equal_runs, die_at_step, go, rows_of, untimed  # noqa: E402

import eval  # noqa: E402
from data import collate_fused, collate_three, render_prompt, render_views  # noqa: E402
from jepa_loss import fused, three_pass  # noqa: E402
from model import Predictor, Transformer  # noqa: E402
from support.files import BadInput  # noqa: E402
from support.generation import generate, generate_slow  # noqa: E402
from support.hf import HFModel  # noqa: E402
from support.hf_tokenizer import LibraryTokenizer  # noqa: E402
from support.tokenizer import Tokenizer  # noqa: E402
from tasks.datasets import Example  # noqa: E402

V, C = 300, 32
SHAPE = dict(vocab_size=V, hidden_size=C, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=128, bos_token_id=0, eos_token_id=1,
             pad_token_id=1)
KINDS = {"sliding_window": 96, "layer_types": ["sliding_attention", "full_attention"]}
FAMILIES = {
    "llama": {}, "qwen2": {}, "qwen3": {"head_dim": 8}, "olmo": {}, "olmo2": {},
    "mistral": {"sliding_window": 64},
    "gemma": {"head_dim": 8}, "gemma2": {"head_dim": 8, "attn_logit_softcapping": 2.0, **KINDS},
    "gemma3_text": {"head_dim": 8, **KINDS}, "smollm3": {"no_rope_layers": [1, 0]},
    "phi": {}, "phi3": {},
    "granite": {"logits_scaling": 3.0, "attention_multiplier": 0.2}, "gpt_neox": {},
    "gpt2": {"n_embd": C, "n_layer": 2, "n_head": 4, "n_positions": 128}, "cohere": {"logit_scale": 0.3},
    "falcon": {"alibi": False, "new_decoder_architecture": True, "num_kv_heads": 2},
    "opt": {"word_embed_proj_dim": C, "ffn_dim": 48}, "stablelm": {}, "starcoder2": {}}


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
    model = HFModel.from_pretrained(folder, Predictor).to(dtype).eval()
    model.add_pred_rows(k, seed=1)
    return model.to(dtype)


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
    slow = step(model, three_pass, collate_three(views, has))
    assert slow[1]["pred_embedding"].abs().max() > 1e-4
    for row_len in (0, 120):
        fast = step(model, fused, collate_fused(views, has, row_len))
        assert fast[0] == pytest.approx(slow[0], abs=near, rel=near)
        for name, grad in fast[1].items():
            torch.testing.assert_close(grad, slow[1][name], atol=20 * near, rtol=20 * near)
    none = [False] * len(views)  # --lam 0: rows without a mask
    plain = fused(model, collate_fused(views, none))["ntp"][0]
    wanted = three_pass(model, collate_three(views, none))["ntp"][0]
    torch.testing.assert_close(plain, wanted, atol=near, rtol=near)
    prompts = [[5, 6, 7], [9, 8, 7, 6, 5, 4, 3], [17]]
    assert generate(model, prompts, 1, 6) == [generate_slow(model, prompt, 1, 6) for prompt in prompts]


def test_what_the_checks_find(tmp_path, monkeypatch):
    """Each alone: logits that are not the head's, a mask and positions that are not heeded, attention by
    kernels that are not the model's."""
    family("granite", tmp_path)
    forward = HFModel.forward
    for method, wrong, why in (
            ("head", lambda self, hidden: self.lm.get_output_embeddings()(hidden), "its logits are not"),
            ("forward", lambda self, ids, positions=None, mask=None: forward(self, ids, positions), "heed"),
            ("forward", lambda self, ids, positions=None, mask=None: forward(self, ids, None, mask), "heed"),
            ("forward", lambda self, ids: forward(self, ids), "takes no embeddings, positions and mask")):
        with monkeypatch.context() as patch, pytest.raises(BadInput, match=why):
            patch.setattr(HFModel, method, wrong)
            loaded(tmp_path)
    assert loaded(tmp_path).lm.config._attn_implementation == "sdpa"
    monkeypatch.setattr(HFModel, "forward", lambda self, *inputs: forward(self, *inputs) * (
        1.01 if self.lm.config._attn_implementation == "sdpa" else 1))
    assert loaded(tmp_path).lm.config._attn_implementation == "eager"


def test_the_pad_token_is_trained():
    """transformers gives its row of the embedding no gradient; in SmolLM2 it is the token that ends a
    turn."""
    from transformers import LlamaConfig, LlamaForCausalLM
    lm = LlamaForCausalLM(LlamaConfig(vocab_size=20, hidden_size=16, intermediate_size=16,
                                      num_hidden_layers=1, num_attention_heads=2, pad_token_id=5))
    HFModel(lm)(torch.tensor([[5, 6]])).square().sum().backward()
    assert (lm.get_input_embeddings().weight.grad[[5, 6]] != 0).all()


def test_a_sliding_window_never_slides(tmp_path):
    """The context is capped at it, and up to there a row of segments is what three passes are."""
    family("mistral", tmp_path, sliding_window=24)
    model, theirs = loaded(tmp_path), transformers.AutoModelForCausalLM.from_pretrained(tmp_path).double()
    assert model.config.max_seq_len == 24
    ids = torch.randint(V, (1, 24), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        wanted = theirs(ids).logits
        for mask in (None, torch.ones(1, 1, 24, 24, dtype=torch.bool).tril()):
            torch.testing.assert_close(model.head(model(ids, None, mask)), wanted, atol=1e-9, rtol=1e-9)


def test_a_mixture_of_experts(tmp_path):
    """The checks pass and the logits are its own, in float32: its kernels know no float64."""
    theirs = family("qwen2_moe", tmp_path, moe_intermediate_size=24, shared_expert_intermediate_size=24,
                    num_experts=4)
    model, ids = loaded(tmp_path, torch.float32), torch.arange(22).view(2, 11)
    with torch.no_grad():
        torch.testing.assert_close(model.head(model(ids)), theirs(ids).logits)


@pytest.mark.parametrize("kind", ["mpt", "bloom", "mamba"])
def test_a_family_that_the_check_refuses(kind, tmp_path):
    """Two with ALiBi, and one without attention."""
    family(kind, tmp_path, d_model=C, n_layers=2, n_heads=4, n_layer=2, n_head=4)
    with pytest.raises(BadInput, match=f"{kind}: "):
        loaded(tmp_path)


# ---- conversations and tokenizers --------------------------------------------------------------------------

CHATML = ("{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' "
          "}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
QWEN2 = CHATML.replace("{% for m in messages %}", (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}{{ '<|im_start|>system\nYou are a "
    "helpful assistant.<|im_end|>\n' }}{% endif %}"))
QWEN3 = """{%- set ns = namespace(last=-1) %}
{%- for m in messages %}{%- if m.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}
{%- for m in messages %}
    {%- if m.role == 'assistant' and loop.index0 > ns.last %}
        {{- '<|im_start|>' + m.role + '\\n<think>\\n\\n</think>\\n\\n' }}
        {{- m.content.lstrip('\\n') + '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported')"
    " }}{% endif %}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% if m['role'] == 'assistant' %}"
    "{% set role = 'model' %}{% else %}"
    "{% set role = m['role'] %}{% endif %}{{ '<start_of_turn>' + role + '\n' + m['content'] | trim + "
    "'<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}")
OLMO2 = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ '<|system|>\n' + m['content'] + "
    "'\n' }}{% elif m['role'] == 'user' %}{{ '<|user|>\n' + m['content'] + '\n' }}{% elif m['role'] == "
    "'assistant' %}{% if not loop.last %}{{ '<|assistant|>\n' + m['content'] + eos_token + '\n' }}{% else %}"
    "{{ '<|assistant|>\n' + m['content'] + eos_token }}{% endif %}{% endif %}"
    "{% if loop.last and add_generation_prompt %}"
    "{{ '<|assistant|>\n' }}{% endif %}{% endfor %}")
GENERATION = ("{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}[B]{% generation %}"
              "{{ m.content }}{{ eos_token }}{% endgeneration %}{% else %}"
              "[{{ m.role }} {{ strftime_now('%Y') }}]{{ m.content }}"
              "{% if m.role == 'system' %}{% continue %}{% endif %}{% endif %}{% endfor %}")
PHI3 = ("{% for m in messages %}{{'<|' + m['role'] + '|>\n' + m['content'] + '<|im_end|>\n'}}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}")
BOS, EOS = "<|endoftext|>", "<|im_end|>"
THINK = "<think>\n\n</think>\n\n"
TALK = "<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n"
ASKED = "<|im_start|>system\nS<|im_end|>\n"
# template, its bos and eos, and what it writes without and with an instruction
TEMPLATES = {
    "chatml": (CHATML, "", EOS, TALK, ASKED + TALK),
    "qwen2": (QWEN2, "", EOS, "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n" + TALK,
              ASKED + TALK),
    "smollm2": (QWEN2, "<|im_start|>", EOS,  # its bos begins every turn
                "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n" + TALK, ASKED + TALK),
    "qwen3": (QWEN3, "", EOS, TALK.replace("A", THINK + "A"), ASKED + TALK.replace("A", THINK + "A")),
    "gemma": (GEMMA, "<bos>", "<eos>", "<bos><start_of_turn>user\nU<end_of_turn>\n<start_of_turn>model\n"
              "A<end_of_turn>\n", "<bos><start_of_turn>user\nS\n\nU<end_of_turn>\n<start_of_turn>model\n"
              "A<end_of_turn>\n"),
    "olmo2": (OLMO2, BOS, BOS, f"{BOS}<|user|>\nU\n<|assistant|>\nA{BOS}",
              f"{BOS}<|system|>\nS\n<|user|>\nU\n<|assistant|>\nA{BOS}"),
    "phi3": (PHI3, "", "<eos>", "<|user|>\nU<|im_end|>\n<|assistant|>\nA<|im_end|>\n<eos>",
             "<|system|>\nS<|im_end|>\n<|user|>\nU<|im_end|>\n<|assistant|>\nA<|im_end|>\n<eos>"),
    "generation": (GENERATION, "<bos>", "<eos>", "<bos>[user 2024]U[B]A<eos>",
                   "<bos>[system 2024]S[user 2024]U[B]A<eos>")}
SPECIAL = ["<bos>", "<eos>", BOS, "<|im_start|>", "<|im_end|>", "<start_of_turn>", "<end_of_turn>"]


@pytest.fixture(scope="session")
def library_tokenizer():
    """A small byte-level tokenizer with the special tokens of all these, and two that are not special."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator([text for pair in PAIRS for text in pair], trainers.BpeTrainer(
        vocab_size=280, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False))
    made.add_tokens(["<think>", "</think>"])
    made.enable_truncation(3)  # what some files have, and what must not cut a text
    return made


def add_tokenizer(folder, made, name):
    template, bos, eos, *_ = TEMPLATES[name]
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(
        {"bos_token": bos or None, "eos_token": {"content": eos}, "chat_template": template}))


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_chat_template(name, tmp_path, library_tokenizer):
    """Main is what the template writes; views are one turn each; the end token ends an answer."""
    add_tokenizer(tmp_path, library_tokenizer, name)
    ours = LibraryTokenizer(tmp_path)
    for system, written in zip(("", "S"), TEMPLATES[name][3:], strict=True):
        views = render_views(Example("U", "A", system=system), ours)
        assert ours.decode(views.main) == written
        before, code, after = written.partition("A")
        assert views.main[:-len(ours.format.closing["assistant"])] == [
            *render_prompt(Example("U", "A", system=system), ours), *ours.encode("A")]
        assert ours.decode(ours.format.closing["assistant"]) == after
        assert after.startswith(ours.decode([ours.format.end])) and ours.format.end in range(len(SPECIAL))
        assert views.stem[0] != views.stem[1]  # SmolLM2's bos stood there twice
        assert ours.decode(views.stem).endswith("U") and "S" not in ours.decode(views.stem)
        assert ours.decode(views.enc).endswith("A") and "U" not in ours.decode(views.enc)


@pytest.mark.parametrize("template,why", [
    ("{{ messages[0].content }}", "drops, doubles or changes a turn"),
    ("{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}", "ends an answer with ''"),
    ("{% for m in messages %}{{ m.role }}:{{ m.content }}\n{% endfor %}", "not begin with a special token"),
    ("{{ ''.__class__ }}{{ messages[0].content.__class__.__mro__[1].__subclasses__() }}", "SecurityError"),
    ("{% for m in ", "TemplateSyntaxError"), ("{{ 'x' * 9999999999 }}", "MemoryError"),
    ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "more than 2 seconds"),
    ("", "has no chat template: --format names one of plain, llama3")])
def test_a_template_that_cannot_be_cut(template, why, tmp_path, library_tokenizer, monkeypatch):
    monkeypatch.setattr("support.chat.MAX_SECONDS", 2)
    library_tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "chat_template.jinja").write_text(template)
    with pytest.raises(BadInput, match=why) as error:
        LibraryTokenizer(tmp_path)
    assert str(error.value).startswith(str(tmp_path)) and "\n" not in str(error.value)


def test_library_tokenizer(tmp_path, library_tokenizer):
    """The library's ids; special tokens named in a text are text; a format of ours by name; save and load."""
    add_tokenizer(tmp_path, library_tokenizer, "chatml")
    ours, theirs = LibraryTokenizer(tmp_path, V), library_tokenizer
    theirs.no_truncation()
    for text, code in PAIRS:
        for said in (text, code, f"{text}\n\n  {code}é✓"):
            assert ours.encode(said) == theirs.encode(said).ids and ours.decode(ours.encode(said)) == said
    special = range(len(SPECIAL))
    assert not set(ours.encode("a<|im_end|>b<bos>")) & set(special)
    assert ours.decode(ours.encode("a<|im_end|>b<bos>")) == "a<|im_end|>b<bos>"
    assert ours.encode("<think>") == [theirs.token_to_id("<think>")]  # as in the library: it is not special
    assert (ours.name(V), ours.name(4), ours.name(ours.encode("\n")[0])) == ("[PRED1]", "<|im_end|>", "\\n")
    (tmp_path / "again").mkdir()
    ours.save(tmp_path / "again")
    assert LibraryTokenizer(tmp_path / "again", V).format == ours.format
    by_hand = LibraryTokenizer(tmp_path, format="chatml").format
    assert (by_hand.opening, by_hand.closing, by_hand.end) == (
        ours.format.opening, ours.format.closing, ours.format.end)
    with pytest.raises(BadInput, match="--format llama3: the tokenizer has no"):
        LibraryTokenizer(tmp_path, format="llama3")
    with pytest.raises(BadInput, match="its conversations have token .*, but the model's vocabulary ends at"):
        LibraryTokenizer(tmp_path, 8)


def test_a_vocabulary_as_large_as_gemma_3_s(tmp_path, library_tokenizer):
    """33 MB of tokenizer.json, more than what is read of other JSON files, are the library's to read."""
    add_tokenizer(tmp_path, library_tokenizer, "chatml")
    path = tmp_path / "tokenizer.json"
    path.write_text(path.read_text() + " " * (33 << 20))
    assert LibraryTokenizer(tmp_path).encode("ab")


def test_what_a_vocabulary_lacks_is_no_answer(tmp_path):
    """A sentencepiece vocabulary without bytes, and one of words."""
    from tokenizers import Tokenizer, models
    pieces, words = [("<unk>", 0.0), ("a", -1.0)], {"<unk>": 0, "a": 1}
    for model in (models.Unigram(pieces, 0), models.WordLevel(words, "<unk>")):
        made = Tokenizer(model)
        made.add_special_tokens(["<eos>"])
        made.save(str(tmp_path / "tokenizer.json"))
        template = "{% for m in messages %}{{ m.content }}<eos>{% endfor %}"
        (tmp_path / "chat_template.jinja").write_text(template)
        ours = LibraryTokenizer(tmp_path)
        assert ours.encode("a") == [1]
        with pytest.raises(BadInput, match="'b'... has what the vocabulary lacks"):
            ours.encode("b")


def test_a_llama_folder_whose_template_is_another(tmp_path, capsys):
    """Tokens of Llama 3 and of ChatML, a template that is ChatML after bos: what is written is said."""
    json_tokenizer("llama3", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(
        {"bos_token": "<|begin_of_text|>", "chat_template": "{{ bos_token }}" + CHATML}))
    assert Tokenizer.load(tmp_path, format="llama3").format.name == "llama3"
    note = capsys.readouterr().out
    assert note.startswith("note: ") and note.count("\n") == 1 and "<|begin_of_text|><|im_start|>user" in note
    own = Tokenizer.load(tmp_path, format="template")
    assert capsys.readouterr().out == ""
    assert own.decode(render_views(Example("U", "A"), own).main) == (
        "<|begin_of_text|><|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": CHATML}))
    Tokenizer.load(tmp_path, format="chatml")
    assert capsys.readouterr().out == ""


# ---- whole runs --------------------------------------------------------------------------------------------

SHORT = ("--batch_size 8 --max_steps 4 --checkpoint_every 2 --log_every 1 --max_new_tokens 6 --device cpu "
         "--lr 1e-3")
TALKS = {"qwen2": "qwen2", "gemma2": "gemma", "gpt2": "olmo2"}


@pytest.fixture
def start(talks, tmp_path, library_tokenizer):
    """kind -> flags of a run from a tiny folder of that family."""
    def make(kind, **shape):
        family(kind, tmp_path / "base", **shape)
        add_tokenizer(tmp_path / "base", library_tokenizer, TALKS.get(kind, "chatml"))
        return ["--init_from", str(tmp_path / "base"), "--dataset", str(talks / "train.jsonl"),
                "--test_file", str(talks / "test.jsonl"), *SHORT.split()]
    return make


@pytest.mark.parametrize("flags", ["", "--lora_rank 2 --row_len 120 --grad_checkpointing"])
@pytest.mark.parametrize("kind", TALKS)
def test_a_whole_run(kind, flags, start, tmp_path, capsys):
    """Trained, interrupted and resumed to the same bits, exported, read by transformers and by eval.py."""
    argv, run, half = start(kind), tmp_path / "run", tmp_path / "half"
    result = go(argv, "--out", run, *flags.split())
    assert "in format template" in capsys.readouterr().out
    assert json.loads((run / "run.json").read_text())["format_in_use"] == "template"
    die_at_step(3, [*argv, "--out", str(half), *flags.split()])
    go(argv, "--out", half, *flags.split())
    assert_equal_runs(run, half)

    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(run).eval()
    ours, tokenizer, *_ = eval.load_model(run, eval.EvalOptions(device="cpu"))
    ids = torch.tensor([render_views(Example("number 7", "7", system="Count."), tokenizer).main])
    with torch.no_grad():
        torch.testing.assert_close(ours.head(ours(ids)), theirs(ids).logits, atol=1e-5, rtol=1e-5)
        assert (base(ids).logits - theirs(ids).logits).abs().max() > 1e-3
    assert theirs.state_dict().keys() == base.state_dict().keys()
    assert load_file(run / "pred_embedding.safetensors")["pred_embedding"].shape == (1, C)
    again = eval.score_run(run, eval.EvalOptions(device="cpu"))
    assert untimed(again) == untimed(result)
    assert json.loads((run / "config.json").read_text())["model_type"] == kind


def test_three_passes_train_as_fused_does(start, tmp_path):
    """And --layer, --target ema, --predictor in a whole run."""
    argv = [*start("qwen2", num_hidden_layers=3), "--dtype", "float64", "--layer", "1", "--target", "ema",
            "--predictor", "mlp"]
    go(argv, "--out", tmp_path / "fused")
    go(argv, "--out", tmp_path / "three", "--passes", "three")
    assert_equal_runs(tmp_path / "fused", tmp_path / "three", 1e-6)
    with pytest.raises(BadInput, match="--layer 2: transformers gives the last block's output only after"):
        go([*argv, "--layer", "2"], "--out", tmp_path / "last")


def test_a_llama_folder_by_both(start, tmp_path):
    """--backend transformers on a Llama: the losses of model.py."""
    argv, losses = [*start("llama"), "--format", "chatml", "--dtype", "float64"], []
    for backend in ("ours", "transformers"):
        go(argv, "--out", tmp_path / backend, "--backend", backend)
        losses.append([row["loss"] for row in rows_of(tmp_path / backend) if "loss" in row])
    assert len(losses[0]) == 4
    torch.testing.assert_close(*map(torch.tensor, losses), atol=1e-5, rtol=1e-5)
    ours, theirs = Transformer.from_pretrained(tmp_path / "ours"), loaded(tmp_path / "ours", torch.float32)
    ids = torch.arange(9)[None]
    with torch.no_grad():
        for a, b in zip(ours(ids, layer=0), theirs(ids, layer=0), strict=True):
            torch.testing.assert_close(a.float(), b, atol=1e-5, rtol=1e-5)
    with pytest.raises(BadInput, match="model_type is 'qwen2', only 'llama' is known"):
        go([*start("qwen2"), "--backend", "ours"], "--out", tmp_path / "wrong")


CODE = """
import os
from transformers import LlamaConfig, LlamaForCausalLM
os.environ["RAN"] = "yes"
class OwnConfig(LlamaConfig):
    model_type = "own"
class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


def test_code_of_the_folder_runs_only_by_its_flag(start, tmp_path, monkeypatch):
    monkeypatch.delenv("RAN", raising=False)
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "cache"))
    argv, base = start("llama"), tmp_path / "base"
    (base / "own.py").write_text(CODE)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"model_type": "own", "auto_map": {
        "AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}}))
    with pytest.raises(BadInput, match="transformers cannot load it"):
        go(argv, "--out", tmp_path / "run")
    assert "RAN" not in os.environ
    go(argv, "--out", tmp_path / "run", "--trust_remote_code", "--max_steps", "1")
    assert os.environ["RAN"] == "yes" and (tmp_path / "run" / "own.py").read_text() == CODE
    with pytest.raises(BadInput, match="transformers cannot load it"):
        eval.load_model(tmp_path / "run", eval.EvalOptions(device="cpu"))
    eval.load_model(tmp_path / "run", eval.EvalOptions(device="cpu", trust_remote_code=True))


def test_a_damaged_folder(tmp_path, monkeypatch):
    family("qwen2", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    with monkeypatch.context() as patch, pytest.raises(BadInput, match="'qwen2' needs transformers: pip"):
        patch.setitem(sys.modules, "transformers", None)
        loaded(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": {"bits": 4}}))
    with pytest.raises(BadInput, match="quantized"):
        loaded(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    tensors = load_file(tmp_path / "model.safetensors")
    tensors.pop("model.norm.weight")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BadInput, match="tensor model.norm.weight is missing"):
        loaded(tmp_path)
