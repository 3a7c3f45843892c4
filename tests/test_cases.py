"""What users meet at the edges: other spellings, other machines, other programs. A test for each kind."""
import io
import json
import os
import shutil
import subprocess
import sys
import threading
import time

import forks
import pytest
import torch
from conftest import ROOT
from test_train import go

import eval
import train
from experiments.compare import read_result, variants_of
from model import Transformer
from support import distributed, runs
from support.files import BadInput, main_guard
from support.tokenizer import Tokenizer
from tasks import datasets, nlrx

# ---- who is who is decided by sums -------------------------------------------------------------------------

def test_the_same_files_under_other_names_are_the_same(pairs, chat_folder, tmp_path, monkeypatch):
    """Two seeds are one variant, where data and base model lie elsewhere by now. (That a run goes on from
    there: test_a_run_that_dies_goes_on, test_other_weights_under_the_same_name.)"""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(pairs, "data"), shutil.copytree(chat_folder, "base")
    rest = ["--test_file", str(pairs / "test.jsonl"), "--batch_size", "8", "--max_steps", "1", "--device",
            "cpu", "--max_new_tokens", "4", "--format", "llama3"]
    for seed, data, base in ((1, "data", "base"), (2, "./data", "./base/"), (3, pairs, chat_folder)):
        go(["--dataset", f"{data}/train.jsonl", "--init_from", str(base), *rest],
           "--seed", seed, "--out", seed)
    variant, = variants_of({seed: read_result(seed) for seed in "123"})
    assert sorted(variant.seeds) == [1, 2, 3]


# ---- a folder that we write, elsewhere ---------------------------------------------------------------------

def generated(folder, prompt: list[int], limit: int) -> list[int]:
    """What transformers' generate() adds to the prompt, with the settings of the folder."""
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.tensor([prompt])
    return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=limit,
                          do_sample=False)[0, len(prompt):].tolist()


@pytest.mark.parametrize("base", ["", "llama3", "chatml"])
def test_transformers_answers_as_we_do(base, pairs, chat_folder, tmp_path, monkeypatch):
    """It stops where ours stops: the end token of the format was no eos_token_id of the folder."""
    transformers = pytest.importorskip("transformers")
    rows = (pairs / "train.jsonl").read_text().splitlines(keepends=True)[:4]
    (tmp_path / "four.jsonl").write_text("".join(rows))
    shape = ["--init_from", str(chat_folder), "--format", base] if base else [
        "--dim", "32", "--n_layers", "1", "--n_heads", "2", "--ffn_dim", "32", "--vocab_size", "300"]
    run = tmp_path / "run"
    monkeypatch.chdir(tmp_path)
    result = go(["--dataset", "four.jsonl", "--test_file", "four.jsonl", *shape, "--batch_size", "4", "--lr",
                 "1e-2", "--epochs", "60", "--checkpoint_every", "100", "--max_new_tokens", "30", "--device",
                 "cpu", "--dtype", "float32", "--out", str(run)])
    assert result["stopped"] == 1
    model = Transformer.from_pretrained(run)
    ours = Tokenizer.load(run, model.config.vocab_size, base or "auto")
    theirs = transformers.AutoTokenizer.from_pretrained(run)
    for row in map(json.loads, rows):
        example = datasets.Example(row["text"], "")
        (answer, stopped), = eval.answer_texts(model, ours, [example], 30)
        prompt = eval.render_prompt(example, ours)
        added = generated(run, prompt, 30)
        assert stopped and added == [*ours.encode(answer), ours.format.end]
        if not base:
            talk = [{"role": "user", "content": row["text"]}]
            assert theirs.apply_chat_template(talk, return_dict=False, add_generation_prompt=True) == prompt
            assert theirs.decode(added, skip_special_tokens=True) == answer
    ends = json.loads((run / "generation_config.json").read_text())["eos_token_id"]
    assert ends == ([4, ours.format.end] if base else ours.format.end)


# ---- the surroundings --------------------------------------------------------------------------------------

def test_two_starts_in_one_folder_of_generated_data(tmp_path, monkeypatch):
    """On a slow disk; one of the two renamed the other's half file, or found none to rename."""
    pairs, replace, wrong = nlrx.generate(30, seed=0), os.replace, []
    monkeypatch.setattr(nlrx, "generate", lambda n, seed: pairs)
    monkeypatch.setattr(os, "replace", lambda a, b: time.sleep(0.2) or replace(a, b))

    def start():
        try:
            assert len(datasets.read_jsonl(datasets.generated_files(tmp_path, 20, 10)["train"])) == 20
        except Exception as error:
            wrong.append(error)
    threads = [threading.Thread(target=start) for _ in range(4)]
    [thread.start() for thread in threads], [thread.join() for thread in threads]
    assert not wrong and len(list(tmp_path.iterdir())) == 2


REST = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "1"}


@pytest.mark.parametrize("environ,rank,world,problem", [
    ({}, 0, 1, ""), ({"RANK": "", "WORLD_SIZE": ""}, 0, 1, ""), ({"WORLD_SIZE": "1"}, 0, 1, ""),
    ({"LOCAL_RANK": "0"}, 0, 1, ""), (REST | {"RANK": "1"}, 1, 2, ""),
    ({"RANK": "0"}, 0, 1, "RANK set, but not WORLD_SIZE, LOCAL_RANK, MASTER_PORT, MASTER_ADDR: start the"),
    (REST | {"RANK": "x"}, 0, 1, "RANK=x: not a number; torchrun sets it"),
    ({"WORLD_SIZE": "-1"}, 0, 1, "WORLD_SIZE=-1: not a number"),
    (REST | {"RANK": "2"}, 2, 2, "below WORLD_SIZE=2")])
def test_what_torchrun_sets_or_would_not(environ, rank, world, problem):
    found = distributed.read_environment(environ)
    assert found[:2] == (rank, world) and bool(found[2]) == bool(problem) and problem in found[2]


def test_a_world_size_alone_is_one_line(small_run, tmp_path):
    reply = forks.run("train", [*small_run, "--out", tmp_path / "run"], env={"WORLD_SIZE": "2"})
    assert reply.returncode == 2 and reply.stderr.startswith("error: WORLD_SIZE set, but not RANK")
    assert reply.stderr.count("\n") == 1 and not (tmp_path / "run").exists()


def test_a_folder_that_not_every_rank_sees(tmp_path):
    with pytest.raises(BadInput, match="run.json: not seen by every rank; --out must be a folder that all"):
        runs.Run(tmp_path / "here", {}, train.Config, {}, writes=False)


def test_windows(small_run, tmp_path, monkeypatch):
    """It has no pread and no fcntl, and its fsync wants a file that may be written."""
    fcntl, fsync = pytest.importorskip("fcntl"), os.fsync

    def strict(fd):
        assert fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDONLY
        fsync(fd)
    monkeypatch.setattr(os, "fsync", strict)
    monkeypatch.delattr(os, "pread")
    monkeypatch.setattr(runs, "fcntl", None)
    monkeypatch.setattr(datasets.generated_files, "__defaults__", (40, 10))
    go(["--dataset", "nlrx_synth", *small_run[4:], "--max_steps", "1"], "--data_dir", tmp_path / "data",
       "--out", tmp_path / "run")
    assert (tmp_path / "run" / "eval.json").exists()


def test_an_older_python_is_told_so(monkeypatch, capsys):
    monkeypatch.setattr(sys, "version_info", (3, 10, 12))
    with pytest.raises(SystemExit, match="2"), main_guard():
        raise AssertionError("not before main()")
    assert capsys.readouterr().err.startswith("error: needs Python 3.11 or newer; this is ")


def test_an_output_that_has_no_such_letter(monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", out)
    with main_guard():
        print("été 数")
    assert out.buffer.getvalue() == rb"\xe9t\xe9 \u6570" + b"\n"


@pytest.mark.parametrize("lines", [10, 10**6])
def test_a_pipe_that_is_closed(lines):
    """`python data.py show nlrx_synth | head -1` ended with a traceback."""
    code = f"from support.files import main_guard\nwith main_guard():\n    for i in range({lines}): print(i)"
    command = f'{sys.executable} -c "$CODE" | (read line; sleep 0.2); echo ${{PIPESTATUS[0]}}'
    reply = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=ROOT,
                           env=os.environ | {"CODE": code})
    assert reply.stdout == ("0\n" if lines == 10 else "141\n") and reply.stderr == ""


def test_an_output_that_is_closed():
    code = "import sys\nfrom support.files import main_guard\nwith main_guard(): print(sys.stdout.isatty())"
    reply = subprocess.run(["bash", "-c", f'{sys.executable} -c "$CODE" >&-'], cwd=ROOT, capture_output=True,
                           text=True, env=os.environ | {"CODE": code})
    assert (reply.returncode, reply.stderr) == (0, "")
