#!/usr/bin/env bash
# Every run behind RESULTS.md, two at a time, with one thread each:
#
#     bash experiments/run.sh DATA_DIR [SECTION ...]
#     bash experiments/run.sh DATA_DIR list      print SECTION NAME FLAGS of each run
#     bash experiments/run.sh DATA_DIR tables    write results/tables from the results that are there
#
# It can be stopped and started again: finished runs are skipped, others go on from their last checkpoint. Runs are
# in runs/results/SECTION/NAME; the eval.json of each is copied to experiments/results/SECTION/NAME.
set -euo pipefail
data=$(realpath "$1")
shift
cd "$(dirname "$0")/.."
wanted=" $* "  # none: all
views=runs/results/turk_views.jsonl
seeds="82 23 37 84 4"
valid="--eval_split valid --compile --seed 82"
turk="--dataset nlrx_turk --epochs 8"
small="--n_train 1000 --epochs 32"
float32="--dtype float32"  # the newer runs: on their machine bfloat16 is native, and half as fast
objectives="cosine
stop_gradient --target stopgrad
infonce --distance infonce
mse --distance mse
lam0.1 --lam 0.1
alpha0.75 --alpha 0.75
stp --lam 0 --stp 1
infonce0.1 --distance infonce --lam 0.1
stp0.02 --lam 0 --stp 0.02"
seams="plain --lam 0
cosine
vicreg0.1 --reg vicreg --reg_weight 0.1
vicreg1 --reg vicreg --reg_weight 1
sigreg1 --reg sigreg --reg_weight 1
sigreg10 --reg sigreg --reg_weight 10
vicreg0.1-alone --lam 0 --reg vicreg --reg_weight 0.1
vicreg1-alone --lam 0 --reg vicreg --reg_weight 1
sigreg1-alone --lam 0 --reg sigreg --reg_weight 1
sigreg10-alone --lam 0 --reg sigreg --reg_weight 10
ema --target ema
linear --predictor linear
ema-linear --target ema --predictor linear
mean --pool mean
lam_warmup --lam_warmup 0.5"
apart="ema-linear --target ema --predictor linear
vicreg1 --reg vicreg --reg_weight 1"
habits="plain --lam 0
jepa
jepa23 --lam 2 --k 3
infonce0.1 --distance infonce --lam 0.1
stopgrad --target stopgrad"
smollm2=${SMOLLM2:-runs/SmolLM2-135M-Instruct}  # a model folder of Hugging Face
overfits="plain --lam 0
jepa
infonce0.1 --distance infonce --lam 0.1"

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
    [[ $* != *--eval_every* ]] || grep '"look"' "$folder/metrics.jsonl" > "${kept%eval.json}looks.jsonl"
}

flops() {  # SECTION/NAME: what this run took
    python -c "import json; print(json.load(open('experiments/results/$1/eval.json'))['trained']['flops'])"
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
    # what the field uses against collapse, alone and with the cosine
    while read -r name flags; do
        echo seams_synth $name --epochs 4 $flags $valid $float32
        echo seams_turk $name $turk $flags $valid $float32
    done <<< "$seams"
    # JEPA between two texts of one regex. The committed runs had the flag --view2 of an older version; with a file
    # of their own they can only be compared with a plain run on it (--lam 0)
    echo search_turk view2 --dataset $views --epochs 8 $valid
    echo search_turk view2-infonce0.1 --dataset $views --epochs 8 --distance infonce --lam 0.1 $valid
    for seed in $seeds; do
        echo turk plain-$seed $turk --lam 0 --compile --seed $seed
        echo turk jepa-$seed $turk --compile --seed $seed
        for variant in plain jepa; do
            echo transfer $variant-$seed --init_from runs/results/stopping/$variant-train_eos-$seed $turk --lr 1e-3 \
                --batch_size 32 --lam 0 --compile --seed $seed
        done
        budget="--max_flops \$(flops stopping/jepa-train_eos-$seed)"  # read when the run starts
        echo equal plain-$seed --lam 0 "$budget" --compile --seed $seed
        echo equal alpha0.75-$seed --alpha 0.75 "$budget" --compile --seed $seed
    done
    # of the searches, the one that is above plain training in all three; on test
    stp="--lam 0 --stp 0.02"
    for seed in $seeds; do
        echo chosen turk-$seed $turk $stp --compile --seed $seed
        echo chosen synth-$seed --epochs 4 $stp --compile --seed $seed
    done
    # a habit of stopping: models that end their answers, fine-tuned with labels that train it and that do not
    for seed in $seeds; do
        echo habit_base plain-$seed --dataset nlrx_turk --epochs 6 --lam 0 --compile $float32 --seed $seed
    done
    tune="--epochs 2 --batch_size 32 $float32 --init_from runs/results/habit_base/plain"
    while read -r name flags; do
        for seed in $seeds; do
            for eos in train_eos no-train_eos; do
                echo habit $name-$eos-$seed $tune-$seed --lr 2e-4 --$eos $flags --eval_every 50 --seed $seed
            done
        done
    done <<< "$habits"
    # the two that kept a part of it in habit_why, on test
    for seed in $seeds; do
        for view in view_end reverse; do
            echo habit $view-no-train_eos-$seed $tune-$seed --lr 2e-4 --no-train_eos --$view --seed $seed
        done
    done
    # other learning rates, and where it comes from: one seed, on the held-out tenth of train
    tune="$tune-82 --eval_split valid --seed 82"
    while read -r name flags; do
        for lr in 5e-5 2e-4 1e-3; do
            for eos in train_eos no-train_eos; do
                echo habit_valid $name-$eos-lr$lr $tune --lr $lr --$eos $flags
            done
        done
    done <<< "$habits"
    official="$tune --lr 2e-4 --no-train_eos"
    echo habit_why k0 $official --k 0
    echo habit_why reverse $official --reverse
    echo habit_why view_end $official --view_end
    for layer in 0 1 2; do
        echo habit_why layer$layer $official --layer $layer
    done
    # a real pretrained model: the learning rate, on held-out items; then all weights, and adapters
    small_tune="--init_from $smollm2 --n_train 500 --epochs 2 $float32 --max_new_tokens 64"
    for lr in 2e-5 8e-5 3e-4 1e-3; do
        choose="$small_tune --lam 0 --lr $lr --n_test 200 --eval_split valid --seed 82"
        echo smollm2_choice lr$lr $choose
        echo smollm2_choice lora-lr$lr $choose --lora_rank 64
    done
    for seed in 82 23 37; do
        for lam in 0 1; do
            for eos in train_eos no-train_eos; do
                echo smollm2 lam$lam-$eos-$seed $small_tune --lr 3e-4 --$eos --n_test 500 --lam $lam --seed $seed
            done
            echo smollm2_lora lam$lam-$seed $small_tune --lr 1e-3 --lora_rank 64 --n_test 500 --lam $lam --seed $seed
        done
    done
    # of those with which a Text finds its Code, the best without and with a regulariser in seams_synth and seams_turk;
    # on test. The plain runs of TURK are infonce/plain-*
    for seed in $seeds; do
        echo apart synth-plain-$seed --epochs 4 --lam 0 $float32 --compile --seed $seed
        while read -r name flags; do
            echo apart synth-$name-$seed --epochs 4 $flags $float32 --compile --seed $seed
            echo apart turk-$name-$seed $turk $flags $float32 --compile --seed $seed
        done <<< "$apart"
    done
    # the one of them that is above plain training in dfa_equal, on eight seeds that nothing was chosen on
    for seed in 1 2 3 5 6 7 8 9; do
        echo apart_again plain-$seed $turk --lam 0 $float32 --compile --seed $seed
        echo apart_again ema-linear-$seed $turk --target ema --predictor linear $float32 --compile --seed $seed
    done
    # on test, five seeds: InfoNCE with a small weight, the one distance with which a Text finds its Code
    for seed in $seeds; do
        echo infonce plain-$seed $turk --lam 0 $float32 --compile --seed $seed
        echo infonce infonce0.1-$seed $turk --distance infonce --lam 0.1 $float32 --compile --seed $seed
    done
    for seed in 82 23 37; do
        while read -r name flags; do
            echo overfit_turk $name-$seed --dataset nlrx_turk --n_train 1000 --epochs 64 $flags $float32 --compile \
                --eval_every 128 --seed $seed
        done <<< "$overfits"
        echo overfit plain-$seed --epochs 20 --lam 0 --compile --seed $seed
        echo overfit jepa-$seed --epochs 20 --compile --seed $seed
    done
}

write_views() {  # the pairs of TURK; the view to predict is SYNTH's text of the same line, which has the same regex
    mkdir -p "$(dirname $views)"
    python - "$data/turk_train.jsonl" "$data/synth_train.jsonl" > $views <<'END'
import json
import sys

for turk, synth in zip(*map(open, sys.argv[1:]), strict=True):
    (text,) = (turn["content"] for turn in json.loads(synth)["messages"] if turn["role"] == "user")
    print(json.dumps(json.loads(turk) | {"code_view": text}))
END
}

tables() {  # each table of RESULTS.md with all its columns
    last=
    mkdir -p experiments/results/tables
    grep "^python -m experiments.compare" experiments/RESULTS.md | while read -r command; do
        section=${command#*results/}
        section=${section%%/*}
        wide=${command% --narrow}
        table=$(eval "$wide")
        [ "$section" = "$last" ] || : > "experiments/results/tables/$section.md"
        printf '```bash\n%s\n```\n\n%s\n\n' "$wide" "$table" >> "experiments/results/tables/$section.md"
        last=$section
    done
}

case $wanted in
    " list ") list; exit ;;
    " tables ") tables; exit ;;
esac
write_views
export -f run flops
export data
list | while read -r section rest; do
    case $wanted in "  " | *" $section "*) echo "$section $rest" ;; esac
done | xargs -P 2 -I {} bash -c 'eval "run $1"' _ {}
