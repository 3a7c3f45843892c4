"""Is the embedded grammar the real one? Not a pytest file: six training runs, about half an hour on 2 cores.

    python tests/check_grammar.py DIR_OF_THE_PUBLISHED_FILES

For each of three seeds, train.py's default run on generated data and on the published train split, both
scored on the published test split. Ends with status 1 if the mean exact match differs by more than 5 points.
Finished runs are kept under runs/grammar and not repeated.
"""
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from eval import score_run, table  # noqa: E402

SEEDS = (82, 23, 37)


def main(published: str) -> int:
    results = {}
    for seed in SEEDS:
        for source, data_dir in (("generated", "runs/grammar/data"), ("published", published)):
            out = f"runs/grammar/{source}-{seed}"
            subprocess.run([sys.executable, ROOT / "train.py", "--data_dir", data_dir, "--seed", str(seed),
                            "--out", out], check=True)
            results[f"{source}-{seed}"] = score_run(out, published, True, None)
    print(table(results))
    exact = {source: [100 * r["exact"] for name, r in results.items() if name.startswith(source)]
             for source in ("generated", "published")}
    for source, values in exact.items():
        print(f"{source}: exact {statistics.mean(values):.2f} +- {statistics.stdev(values):.2f} %")
    gap = statistics.mean(exact["published"]) - statistics.mean(exact["generated"])
    print(f"published - generated: {gap:+.2f} points")
    return int(abs(gap) > 5)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
