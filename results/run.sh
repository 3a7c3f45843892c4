#!/usr/bin/env bash
# Every run behind RESULTS.md, two at a time, a thread each:
#
#     bash results/run.sh DATA_DIR [SECTION ...]
#
# Stop it and start it again at will: finished runs are skipped, others go on from their last checkpoint. Runs lie
# in runs/results/SECTION/NAME; the eval.json of each is copied to results/SECTION/NAME.
set -euo pipefail
data=$(realpath "$1")
shift
cd "$(dirname "$0")/.."
wanted=" ${*:-stopping turk_choice} "  # turk: once its epochs are chosen
seeds="82 23 37 84 4"

run() {  # SECTION NAME FLAGS
    kept=results/$1/$2/eval.json
    [ -e "$kept" ] && return
    echo "$(date +%T) $1/$2"
    folder=runs/results/$1/$2
    mkdir -p runs/results/"$1"
    OMP_NUM_THREADS=1 python train.py --data_dir "$data" --device cpu --out "$folder" "${@:3}" > "$folder.log" 2>&1 || {
        tail -n 1 "$folder.log"
        return 1
    }
    mkdir -p "$(dirname "$kept")"
    cp "$folder/eval.json" "$kept"
}

list() {  # what to run, a line each: SECTION NAME FLAGS
    for seed in $seeds; do
        for eos in train_eos no-train_eos; do
            common="--epochs 4 --$eos --seed $seed"
            echo stopping plain-$eos-$seed --lam 0 "$common"
            echo stopping jepa-$eos-$seed "$common"
            echo stopping jepa23-$eos-$seed --lam 2 --k 3 "$common"
        done
    done
    # how long to train on TURK: plain training, one seed, on the held-out tenth of train
    for epochs in 4 8 12; do
        echo turk_choice epochs$epochs --dataset nlrx_turk --eval_split valid --lam 0 --epochs $epochs --seed 82
    done
    for seed in $seeds; do
        echo turk plain-$seed --dataset nlrx_turk --lam 0 --epochs 4 --seed $seed
        echo turk jepa-$seed --dataset nlrx_turk --epochs 4 --seed $seed
    done
}

export -f run
export data
list | while read -r section rest; do
    case $wanted in *" $section "*) echo "$section $rest" ;; esac
done | xargs -P 2 -I {} bash -c 'run $1' _ {}
