"""The README's scores. Not a pytest file: six training runs, about half an hour on 2 cores.

    python tests/check_scores.py DIR_OF_THE_PUBLISHED_FILES

For each of three seeds, train.py's default run on generated data and on the published train split, both
scored on the published test split. Ends with status 1 unless every published run reaches 80 % exact match,
stops by itself on 99 % of the items and, where it ran from start to end here, took at most five minutes,
scoring included; and unless the two means are within 5 points, which says that the embedded grammar is the
real one. Finished runs are kept under runs/scores and not repeated.
"""
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from eval import EvalOptions, score_run  # noqa: E402
from support.tables import table  # noqa: E402

SEEDS = (82, 23, 37)


def main(published: str) -> int:
    results, failures = {}, []
    for seed in SEEDS:
        for source, data_dir in (("generated", "runs/scores/data"), ("published", published)):
            out, began = f"runs/scores/{source}-{seed}", time.monotonic()
            flags = ["--dataset", "nlrx_synth", "--data_dir", data_dir, "--seed", str(seed), "--out", out]
            subprocess.run([sys.executable, ROOT / "train.py", *flags], check=True)
            seconds = time.monotonic() - began
            print(f"{out}: {seconds:.0f} s", flush=True)
            results[out] = score_run(out, EvalOptions([out], data_dir=published, other_data=True))
            if source == "published" and (results[out]["exact"] < 0.8 or results[out]["stopped"] < 0.99):
                failures.append(f"{out}: below 80 % exact or 99 % stopped")
            if seconds > 300:
                failures.append(f"{out}: {seconds:.0f} s, more than five minutes")
    print(table(results))
    means = []
    for source in ("generated", "published"):
        exact = [100 * result["exact"] for out, result in results.items() if source in out]
        means.append(statistics.mean(exact))
        print(f"{source}: exact {means[-1]:.2f} +- {statistics.stdev(exact):.2f} %")
    print(f"published - generated: {means[1] - means[0]:+.2f} points")
    if abs(means[1] - means[0]) > 5:
        failures.append("the grammar is more than 5 points off")
    print("\n".join(failures) or "all as the README says")
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
