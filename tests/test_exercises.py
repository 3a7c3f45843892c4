"""docs/exercises.md does what it says: its snippets are pasted where it says into a copy of the project, and
the commands below them run there."""
import json
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

EXERCISES = (ROOT / "docs" / "exercises.md").read_text(encoding="utf-8")
SHORT = ["--dim", "16", "--n_layers", "1", "--n_heads", "2", "--ffn_dim", "16", "--n_train", "64",
         "--n_test", "8", "--epochs", "1", "--max_new_tokens", "4", "--log_every", "1", "--device", "cpu"]


@pytest.mark.parametrize("name,term", [("DISTANCES", "jepa"), ("REGULARISERS", "reg")])
def test_an_objective_takes_a_function_and_a_line(tmp_path, pairs, name, term):
    snippet, = re.findall(rf"```python\n([^`]*\n{name}\[[^`]*)```", EXERCISES)
    after = EXERCISES[EXERCISES.index(snippet):]
    command = re.search(r"```bash\npython train.py ([^`]*)\n```", after)[1]
    assert len([line for line in snippet.splitlines() if line.strip()]) <= 12
    for folder in ("support", "tasks"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    for path in ROOT.glob("*.py"):
        shutil.copy(path, tmp_path)
    code = (tmp_path / "jepa_loss.py").read_text()
    below = re.search(rf"^{name} = .*\n", code, re.M).end()
    (tmp_path / "jepa_loss.py").write_text(code[:below] + "\n\n" + snippet + "\n" + code[below:])
    flags = command.split()[2:]  # without --dataset nlrx_synth: generating it takes a while
    data = ["--dataset", str(pairs / "train.jsonl"), "--test_file", str(pairs / "test.jsonl")]
    reply = subprocess.run([sys.executable, "train.py", *data, *flags, *SHORT, "--out", "run"], cwd=tmp_path,
                           capture_output=True, text=True)
    assert reply.returncode == 0, reply.stderr
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 2 and rows[0][term] > 0
