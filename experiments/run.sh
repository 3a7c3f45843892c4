#!/usr/bin/env bash
# Every run behind RESULTS.md, two at a time, a thread each:
#
#     bash experiments/run.sh DATA_DIR [SECTION ...]
#
# Stop it and start it again at will: finished runs are skipped, others go on from their last checkpoint. Runs lie
# in runs/results/SECTION/NAME; the eval.json of each is copied to results/SECTION/NAME.
set -euo pipefail
data=$(realpath "$1")
shift
cd "$(dirname "$0")/.."
wanted=" $* "  # none: all
seeds="82 23 37 84 4"
valid="--eval_split valid --compile --seed 82"
turk="--dataset nlrx_turk --epochs 8"
small="--n_train 1000 --epochs 32"
objectives="cosine
stop_gradient --stop_gradient
infonce --distance infonce
mse --distance mse
lam0.1 --lam 0.1
alpha0.75 --alpha 0.75
stp --objective stp
infonce0.1 --distance infonce --lam 0.1
stp0.02 --objective stp --lam 0.02"

run() {  # SECTION NAME FLAGS
    kept=experiments/results/$1/$2/eval.json
    [ -e "$kept" ] && return
    echo "$(date +%T) $1/$2"
    folder=runs/results/$1/$2
    log=runs/results/logs/$1-$2.log  # not beside the runs, where RESULTS.md's patterns would match it
    mkdir -p runs/results/"$1" runs/results/logs
    OMP_NUM_THREADS=1 python train.py --data_dir "$data" --device cpu --out "$folder" "${@:3}" > "$log" 2>&1 || {
        tail -n 1 "$log"
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
    # how long to train: plain training, one seed, on the held-out tenth of train
    for epochs in 4 8 12; do
        echo turk_choice epochs$epochs --dataset nlrx_turk --lam 0 --epochs $epochs $valid
    done
    for epochs in 16 32 64; do
        echo small_choice epochs$epochs --n_train 1000 --lam 0 --epochs $epochs $valid
    done
    for lr in 3e-4 1e-3; do
        echo transfer_choice lr$lr --init_from runs/results/stopping/plain-train_eos-82 $turk --lam 0 \
            --batch_size 32 --lr $lr $valid
    done
    # what keeps the embeddings apart? one seed, on the held-out tenth of train; the plain runs of TURK and of 1,000
    # examples are turk_choice/epochs8 and small_choice/epochs32
    echo search_synth plain --lam 0 --epochs 4 $valid
    while read -r name flags; do
        echo search_synth $name --epochs 4 $flags $valid
        echo search_turk $name $turk $flags $valid
        echo search_small $name $small $flags $valid
    done <<< "$objectives"
    # search_turk/view2 and view2-infonce0.1: as cosine and infonce0.1, but the code view is SYNTH's text for the same
    # regex (the two corpora are aligned line by line). A flag of earlier versions, --view2, made them
    for seed in $seeds; do
        echo turk plain-$seed $turk --lam 0 --compile --seed $seed
        echo turk jepa-$seed $turk --compile --seed $seed
        for arm in plain jepa; do
            echo transfer $arm-$seed --init_from runs/results/stopping/$arm-train_eos-$seed $turk --lr 1e-3 \
                --batch_size 32 --lam 0 --compile --seed $seed
        done
        budget="--match_flops runs/results/stopping/jepa-train_eos-$seed"
        echo equal plain-$seed --lam 0 $budget --compile --seed $seed
        echo equal alpha0.75-$seed --alpha 0.75 $budget --compile --seed $seed
    done
    # of the searches: alone above plain training in all three. On test
    stp="--objective stp --lam 0.02"
    for seed in $seeds; do
        echo chosen turk-$seed $turk $stp --compile --seed $seed
        echo chosen synth-$seed --epochs 4 $stp --compile --seed $seed
    done
    for seed in 82 23 37; do
        echo overfit plain-$seed --epochs 20 --lam 0 --compile --seed $seed
        echo overfit jepa-$seed --epochs 20 --compile --seed $seed
    done
}

export -f run
export data
list | while read -r section rest; do
    case $wanted in "  " | *" $section "*) echo "$section $rest" ;; esac
done | xargs -P 2 -I {} bash -c 'run $1' _ {}
