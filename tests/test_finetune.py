"""Fine-tuning: a checkpoint of others goes in, one that others read comes out; LoRA; transfer; datasets."""
import json
import shutil
from pathlib import Path

import forks
import pytest
import torch
from conftest import SHARED_DATA
from safetensors.torch import load_file
from test_checkpoint import logits
from test_model import named, small
from test_train import assert_equal_runs, die_at_step, go, rows_of, steps_of, untimed, weights

import eval
from data import ViewOptions, render_prompt, render_views
from model import Transformer
from support.files import BadInput
from support.lora import add_lora, merge_lora, projections
from support.tokenizer import Tokenizer
from tasks.datasets import PUBLISHED, Dataset, Example, git_blob_id, load_dataset, read_jsonl

pytestmark = pytest.mark.xdist_group("transformers")  # its import takes seconds
SHORT = ["--epochs", "2", "--batch_size", "8", "--log_every", "1", "--max_new_tokens", "6", "--device", "cpu"]


@pytest.fixture
def argv(talks, chat_folder, tmp_path):
    return ["--dataset", str(talks / "train.jsonl"), "--test_file", str(talks / "test.jsonl"),
            "--init_from", str(chat_folder), "--format", "llama3", "--out", str(tmp_path / "run"), *SHORT]


def tensors(folder):
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("flags", [["--k", "2"], ["--lam", "0"], ["--lora_rank", "2"],
                                   ["--format", "chatml", "--passes", "three", "--lora_rank", "2"]], ids=str)
def test_a_whole_fine_tuning(argv, flags, chat_folder, tmp_path):
    """By the programs, as a user does; transformers then reads the run like any other checkpoint."""
    transformers = pytest.importorskip("transformers")
    reply = forks.run("train", [*argv, *flags])
    assert reply.returncode == 0, reply.stderr
    run, base = tmp_path / "run", tensors(chat_folder)
    record = json.loads((run / "run.json").read_text())
    with_jepa = record["config"]["lam"] > 0
    assert {Path(path).name for path in record["init"]} >= {"model.safetensors", "config.json",
                                                            "tokenizer.json"}
    assert record["system"] == "Count."
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (run / name).read_bytes() == (chat_folder / name).read_bytes()
    rows = steps_of(run)
    assert len(rows) == 6 and rows[0]["examples"] == 8 and (rows[0].get("jepa", 0) > 0) == with_jepa

    theirs = transformers.AutoModelForCausalLM.from_pretrained(run)
    ours = Transformer.from_pretrained(run, torch.float32)
    tokenizer = Tokenizer.load(run, format=record["config"]["format"])
    ids = torch.tensor([render_views(Example("the number 7", "7", system="Count."), tokenizer).main])
    with torch.inference_mode():
        torch.testing.assert_close(ours.head(ours(ids)), theirs(ids).logits, atol=1e-5, rtol=0)
    after = tensors(run)
    assert after.keys() == base.keys()  # the base model's vocabulary: [PRED] lies in a file of its own
    assert (run / "pred_embedding.safetensors").exists() == with_jepa
    for name, tensor in base.items():
        change = after[name] - tensor
        if "--lora_rank" not in flags:
            assert change.abs().max() > 0, name
        elif "_proj" in name:
            assert torch.linalg.matrix_rank(change.double(), rtol=1e-3) == 2, name
        else:
            assert not change.any(), name
    if "--lora_rank" in flags:
        assert {name.rpartition(".")[2] for name in weights(run)} == {"lora_a", "lora_b", "pred_embedding"}

    result = json.loads((run / "eval.json").read_text())
    again = eval.score_run(run, eval.EvalOptions([str(run)], device="cpu"))
    assert untimed(again) == untimed(result) and result["n"] == 6


def test_fine_tuning_with_adapters_resumes_to_the_bit(argv, tmp_path):
    """3 + 3 steps equal 6, dropout included; the state holds adapters alone, the rest is --init_from's."""
    argv = [*argv, "--lora_rank", "2", "--lora_dropout", "0.5", "--checkpoint_every", "3"]
    go(argv, "--out", tmp_path / "whole")
    die_at_step(4, argv)
    torch.manual_seed(12345)  # whatever happened to the generator in between
    go(argv)
    assert_equal_runs(tmp_path / "whole", tmp_path / "run")
    for name, tensor in tensors(tmp_path / "whole").items():
        assert torch.equal(tensor, tensors(tmp_path / "run")[name])
    go(argv, "--lora_dropout", 0, "--out", tmp_path / "without")
    assert rows_of(tmp_path / "without")[-1]["ntp"] != rows_of(tmp_path / "run")[-1]["ntp"]


def test_other_weights_under_the_same_name(argv, chat_folder, tmp_path):
    """A run goes on only from the weights that it began with, wherever they lie now."""
    mine, run = tmp_path / "base", tmp_path / "run"
    shutil.copytree(chat_folder, mine)
    argv = [*argv, "--init_from", str(mine), "--max_steps", "1"]
    go(argv)
    (run / "eval.json").unlink()
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        content = (mine / name).read_bytes()
        (mine / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]) if name == "model.safetensors" else
                                  content + b" ")
        with pytest.raises(BadInput, match="holds a run from another base model than .*base.* now"):
            go(argv)
        (mine / name).write_bytes(content)
    go(argv, "--init_from", chat_folder)
    assert (run / "eval.json").exists()


def test_from_a_run_to_another_task(talks, tmp_path):
    """Transfer: pretrain with [PRED], go on with it, without it, and with more of it."""
    first = ["--dataset", str(talks / "train.jsonl"), "--test_file", str(talks / "test.jsonl"), *SHORT]
    go([*first, "--dim", "16", "--n_layers", "1", "--n_heads", "1", "--ffn_dim", "16", "--k", "2"], "--out",
       tmp_path / "first")
    first_run = tmp_path / "first"
    begun = weights(first_run)
    for k, flags in ((2, ["--k", "2"]), (0, ["--lam", "0"]), (3, ["--k", "3"])):
        out = tmp_path / f"next{k}"
        go([*first, "--lr", "1e-9", "--max_steps", "1", *flags], "--out", out, "--init_from", first_run)
        ended, run = weights(out), json.loads((out / "run.json").read_text())
        assert run["init_run"].startswith("train-k2-") and "dim16" in run["init_run"]
        assert (tmp_path / "first" / "tokenizer.json").read_bytes() == (out / "tokenizer.json").read_bytes()
        assert len(ended.get("pred_embedding", ())) == k
        for name in ("embed_tokens.weight", *(["pred_embedding"] if k == 2 else [])):
            torch.testing.assert_close(ended[name], begun[name], atol=1e-6, rtol=0)
    third = tmp_path / "third"
    go([*first, "--max_steps", "1", "--k", "2"], "--out", third, "--init_from", tmp_path / "next2")
    base = json.loads((third / "run.json").read_text())["init_run"]
    assert json.loads((tmp_path / "next2" / "run.json").read_text())["init_run"] in base  # no folder, no seed


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
    pytest.importorskip("transformers")
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
    for row in map(json.loads, rows):
        example = Example(row["text"], "")
        (answer, stopped), = eval.answer_texts(model, ours, [example], 30)
        prompt = render_prompt(example, ours)
        added = generated(run, prompt, 30)
        assert stopped and added == [*ours.encode(answer), ours.format.end]
    ends = json.loads((run / "generation_config.json").read_text())["eos_token_id"]
    assert ends == ([4, ours.format.end] if base else ours.format.end)


def test_a_checkpoint_is_scored_before_any_training(talks, chat_folder, capsys, monkeypatch):
    """`python eval.py CHECKPOINT --dataset NAME`; nothing is written into the checkpoint's folder."""
    before = sorted(path.name for path in chat_folder.iterdir())

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["eval.py", str(chat_folder), "--format", "chatml",
                                         "--max_new_tokens", "5", *arguments])
        eval.main()
        return capsys.readouterr().out
    table = run("--dataset", str(talks / "train.jsonl"), "--test_file", str(talks / "test.jsonl"),
                "--n_test", "4")
    assert "data: file\n" in table and "| exact |" in table and table.strip().endswith("| 4 |")
    assert run("--prompt", "the number 3", "--system", "Count.") != run("--prompt", "the number 3")
    assert sorted(path.name for path in chat_folder.iterdir()) == before


def test_a_run_keeps_its_format_and_views_on_another_dataset(argv, talks, tmp_path):
    """The checkpoint's tokenizer has the tokens of all formats; auto would take another one."""
    result = go(argv, "--max_steps", 2, "--pred_first")
    files = {"dataset": str(talks / "train.jsonl"), "test_file": str(talks / "test.jsonl")}
    again = eval.score_model(tmp_path / "run", eval.EvalOptions(**files, max_new_tokens=6, device="cpu"))
    assert again | {"seconds": 0} == {name: 0 if name == "seconds" else result[name] for name in again}


def test_hellaswag_s_hits_are_endings_and_not_letters(tiny, tokenizer):
    rows = [Example(f"q{i}", "A", text_view="same", code_view=f"ending {i}") for i in range(8)]
    split = Dataset("d", [], rows, "file", {})
    assert eval.evaluate(tiny(1), tokenizer, split, ViewOptions(), 4)[0]["retrieval_at_1"] == 1 / 8


def test_paraphrases_are_pretrained_on(tmp_path, monkeypatch):
    """Main is one phrasing and its end; there is nothing to answer; the score is the loss on what was held
    out."""
    folder = tmp_path / "data"
    folder.mkdir()
    rows = [{"messages": [{"role": "user", "content": f"one way {i}"},
                          {"role": "assistant", "content": f"another way {i}"}]} for i in range(40)]
    (folder / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.setitem(PUBLISHED, "paraphrase", {"train": ("p.jsonl", git_blob_id(folder / "p.jsonl"))})
    argv = ["--dataset", "paraphrase", "--data_dir", str(folder), "--eval_split", "valid", "--dim", "16",
            "--n_layers", "1", "--n_heads", "1", "--ffn_dim", "16", "--epochs", "2", "--batch_size", "8",
            "--out", str(tmp_path / "run"), "--device", "cpu"]
    result = go(argv)
    assert result["n"] == 4 and 0 < result["ntp"] < 7 and "exact" not in result and "cos_paired" in result
    look = next(row["look"] for row in rows_of(tmp_path / "run") if "look" in row)
    assert result["ntp"] < look["ntp"]
    data = load_dataset("paraphrase", folder, eval_split="valid")
    assert all(e.text_only for e in [*data.train, *data.test]) and len(data.train) == 36
    assert eval.score_run(tmp_path / "run", eval.EvalOptions())["ntp"] == pytest.approx(result["ntp"])
    with pytest.raises(BadInput, match="--max_new_tokens has no effect with .*run, a run on paraphrase"):
        eval.score_run(tmp_path / "run", eval.EvalOptions(max_new_tokens=5))


@pytest.mark.skipif(not SHARED_DATA.exists(), reason="the published files are not here")
def test_every_published_file_is_read_and_rendered(tokenizer, chat_folder):
    """Every line of every file, in every format, within the context of the models that it is for."""
    formats = [tokenizer, *(Tokenizer.load(chat_folder, format=name) for name in ("llama3", "chatml"))]
    for path in sorted(SHARED_DATA.glob("*.jsonl")):
        examples = read_jsonl(path)
        assert all(e.system for e in examples) and all(bool(e.text_view) == ("hellaswag" in path.name) ==
                                                       bool(e.code_view) for e in examples)
        for example in examples[::50]:
            for chosen in formats:
                views = render_views(example, chosen)
                code = chosen.encode(example.code)
                end = len(chosen.format.closing["assistant"])
                assert views.main[-len(code) - end:-end] == code
                said = chosen.encode(example.text_view or example.text)
                assert views.stem[-len(said):] == said
    first = read_jsonl(SHARED_DATA / "hellaswag_test.jsonl")[0]
    assert first.code == "A" and first.text.startswith(first.text_view[:100])
    assert first.code_view.startswith("Likewise, if you already own")


def test_a_folder_that_is_no_checkpoint(argv, tmp_path):
    """By the program: one line, status 2, and no run folder."""
    for flags, message in ((["--init_from", str(tmp_path / "none")], "no such folder"),
                           (["--init_from", str(tmp_path)], "config.json: no such file"),
                           (["--lora_rank", "100000000000"], "000: more than the model's width of 32")):
        reply = forks.run("train", [*argv, *flags])
        assert reply.returncode == 2 and message in reply.stderr and reply.stderr.count("\n") == 1
        assert reply.stderr.startswith("error: ") and not (tmp_path / "run").exists()


# ---- adapters ----------------------------------------------------------------------------------------------

IDS = torch.arange(50)[None]


def plain(k=2):
    return Transformer(small(n_kv_heads=2, tie_embeddings=False), k=k, seed=1).double()


def with_lora(k=2, dropout=0.0):
    model = Transformer(small(n_kv_heads=2, tie_embeddings=False), k=k, seed=1)
    add_lora(model, 3, dropout, seed=1)
    return model.double()


def trained(model, n):
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
    assert torch.equal(logits(model, IDS), logits(plain(), IDS))
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    trained(model, 2)  # in the first, A does not move: B is 0
    for name, weight in model.named_parameters():
        assert torch.equal(weight, before[name]) != ("lora_" in name or name == "pred_embedding"), name
    assert [layer.lora_a.shape[0] for layer in projections(model)] == [3] * 14
    assert not torch.equal(logits(model, IDS), logits(model, IDS))  # dropout, in front of the adapter
    model.eval()
    assert torch.equal(logits(model, IDS), logits(model, IDS))


def test_merged_equals_adapted(tmp_path):
    """By the formula, W + 2 B A, in float64; and a folder that transformers reads."""
    transformers = pytest.importorskip("transformers")
    model = with_lora()
    trained(model, 3)
    adapted = logits(model, IDS)
    assert (adapted - logits(plain(), IDS)).abs().max() > 1e-3
    layer = model.layers[0].mlp.up_proj
    expected = layer.weight + 2 * layer.lora_b @ layer.lora_a
    with pytest.raises(ValueError, match="merge_lora"):
        model.save_pretrained(tmp_path)
    merge_lora(model)
    assert torch.equal(layer.weight, expected) and named(model).keys() == named(plain()).keys()
    torch.testing.assert_close(logits(model, IDS), adapted, atol=1e-12, rtol=0)
    model.float().save_pretrained(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(theirs, IDS), adapted.float(), atol=1e-5, rtol=0)
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
