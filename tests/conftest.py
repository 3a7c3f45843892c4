"""Shared by the tests: the project's root on the path, where the published data may be, and a tiny model."""
import contextlib
import http.server
import json
import os
import re
import shutil
import sys
import threading
import time
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch starts: tiny models are quicker on one thread

import pytest  # noqa: E402
import torch  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
SHARED_DATA = ROOT.parent / "shared" / "data"

from model import ModelConfig, Transformer  # noqa: E402
from support import tokenizer as tokenizer_module  # noqa: E402
from support.tokenizer import FORMAT_TOKENS, Tokenizer, train_bpe  # noqa: E402
from tasks.datasets import PUBLISHED, Example, git_blob_id, read_jsonl  # noqa: E402
from tasks.nlrx import generate  # noqa: E402

PAIRS = [("lines with a vowel", "[AEIOUaeiou]"),
         ("lines with 'dog' or a number, 3 or more times", "((dog)|([0-9])){3,}"),
         ("a", "b"), ("lines not ending with a capital letter", "~((.*)([A-Z]))"),
         ("starting with x", "(x)(.*)")]


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer(train_bpe([text for pair in PAIRS for text in pair], 280))


@pytest.fixture(scope="session")
def examples() -> list[Example]:
    return [Example(text, code) for text, code in PAIRS]


def jsonl(path, pairs):
    """A file of these pairs, read again."""
    path.write_text("".join(json.dumps({"text": text, "code": code}) + "\n" for text, code in pairs))
    return read_jsonl(path)


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@contextlib.contextmanager
def serving(folder, cut: int | None = None, pause: float = 0):
    """The address of a server of the folder's files. It sends at most `cut` bytes of what it announces, and
    waits after each tenth of a file for `pause` seconds."""
    class Handler(http.server.SimpleHTTPRequestHandler):
        def copyfile(self, source, target):
            content = source.read()[:cut]
            for tenth in range(10):
                target.write(content[len(content) * tenth // 10:len(content) * (tenth + 1) // 10])
                time.sleep(pause)

        def log_message(self, *_):
            pass
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=folder)) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    """A folder of two small files that stands for the published one, as nlrx_synth and as spider."""
    folder = tmp_path / "mirror"
    folder.mkdir()
    files = {}
    for split in ("train", "test"):
        path = folder / f"small_{split}.jsonl"
        path.write_text(json.dumps({"text": split, "code": "c" * 60}) + "\n")
        files[split] = (path.name, git_blob_id(path))
    monkeypatch.setitem(PUBLISHED, "nlrx_synth", files)
    monkeypatch.setitem(PUBLISHED, "spider", files)
    return folder


@pytest.fixture(scope="session")
def pairs(tmp_path_factory):
    """Files of 80 and 12 pairs."""
    folder = tmp_path_factory.mktemp("pairs")
    rows = [{"text": f"the number {i} and then {'dog ' * (i % 5)}", "code": f"{i}[a-z]{{{i % 7},}}"}
            for i in range(92)]
    for name, part in (("train.jsonl", rows[:80]), ("test.jsonl", rows[80:])):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in part))
    return folder


@pytest.fixture(scope="session")
def talks(tmp_path_factory):
    """Files of 24 and 6 conversations with a system turn."""
    folder = tmp_path_factory.mktemp("talks")
    rows = [{"messages": [{"role": "system", "content": "Count."},
                          {"role": "user", "content": f"the number {i} " + "dog " * (i % 4)},
                          {"role": "assistant", "content": f"{i}[a-z]"}]} for i in range(30)]
    for name, part in (("train.jsonl", rows[:24]), ("test.jsonl", rows[24:])):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in part))
    return folder


@pytest.fixture(scope="session")
def corpus() -> list[tuple[str, str]]:
    """The pairs of the embedded grammar."""
    return generate(10_000)


@pytest.fixture(scope="session")
def small_run(pairs):
    """The settings of a run of four steps, with a checkpoint after two."""
    return ["--dataset", str(pairs / "train.jsonl"), "--test_file", str(pairs / "test.jsonl"),
            "--dim", "16", "--n_layers", "1", "--n_heads", "2", "--ffn_dim", "16", "--vocab_size", "300",
            "--batch_size", "8", "--max_steps", "4", "--checkpoint_every", "2", "--log_every", "1",
            "--max_new_tokens", "4", "--device", "cpu"]


@pytest.fixture(scope="session")
def small_run_once(small_run, tmp_path_factory):
    import train
    folder = tmp_path_factory.mktemp("runs") / "finished"
    train.train(train.parse_config([*small_run, "--out", str(folder)]))
    return folder


@pytest.fixture
def finished_run(small_run_once, tmp_path):
    """A copy of the folder of a finished `small_run`."""
    return Path(shutil.copytree(small_run_once, tmp_path / "finished"))


@pytest.fixture
def tiny(tokenizer):
    """A function k -> small float64 model, large enough weights for every path to matter."""
    def make(k: int = 1, **shape) -> Transformer:
        config = ModelConfig(**{**dict(vocab_size=tokenizer.vocab_size, dim=32, n_layers=2, n_heads=4,
                                       n_kv_heads=2, head_dim=8, ffn_dim=48), **shape})
        model = Transformer(config, k, seed=3).double()
        with torch.no_grad():
            for weight in model.parameters():
                weight.mul_(8 if weight.dim() > 1 else 1)
        return model
    return make


def resident() -> int:
    """Bytes of memory that this process holds; 0 where /proc does not say."""
    path = Path("/proc/self/statm")
    return int(path.read_text().split()[1]) * os.sysconf("SC_PAGESIZE") if path.exists() else 0


def peak(use) -> int:
    """Bytes that use() takes at its peak, beyond what was held before; 0 where that cannot be measured."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return bool(use()) * 0
    before = resident()
    use()
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) * 1024 - before


# ---- checkpoints of others, made by their own libraries ----------------------------------------------------

CHAT = [token for tokens in FORMAT_TOKENS.values() for token in tokens]


def json_tokenizer(family: str, folder, more_texts=()):
    """A tokenizer.json with the pieces of a family, trained by the `tokenizers` library; returns theirs."""
    tokenizers = pytest.importorskip("tokenizers")
    from tokenizers import Regex, models, normalizers, pre_tokenizers, trainers
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    bare = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    cuts = {"gpt2": whole,
            "smollm2": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), whole])}
    for name in ("llama3", "qwen2"):
        split = pre_tokenizers.Split(Regex(getattr(tokenizer_module, name.upper())), "isolated", False)
        cuts[name] = pre_tokenizers.Sequence([split, bare])
    theirs = tokenizers.Tokenizer(models.BPE(ignore_merges=family == "llama3"))
    theirs.pre_tokenizer = cuts[family]
    if family == "qwen2":
        theirs.normalizer = normalizers.NFC()
    special = CHAT if family == "smollm2" else []  # SmolLM2 has them in front of all others
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=special, show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    theirs.train_from_iterator([text for pair in PAIRS for text in pair] * 3 + list(more_texts), trainer)
    theirs.add_special_tokens(CHAT)
    theirs.save(str(folder / "tokenizer.json"))
    return theirs


def llama_folder(folder, dtype="float32", shard_size="5GB", **shape):
    """A small Llama with random weights, saved by transformers, without a tokenizer; returns theirs."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(**{**dict(
        vocab_size=620, hidden_size=32, intermediate_size=56, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.3, bos_token_id=3,
        eos_token_id=4, tie_word_embeddings=False), **shape})
    torch.manual_seed(0)
    theirs = transformers.LlamaForCausalLM(config).to(getattr(torch, dtype)).eval()
    theirs.save_pretrained(folder, max_shard_size=shard_size)
    return theirs


@pytest.fixture(scope="session")
def chat_folder(tmp_path_factory):
    """A whole checkpoint: a small Llama, its tokenizer.json, a chat template, a generation config."""
    folder = tmp_path_factory.mktemp("llama")
    llama_folder(folder)
    json_tokenizer("llama3", folder)
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return folder
