#!/usr/bin/env bash
# shellcheck disable=SC2086,SC2206 # the variables that hold flags are to be split into words
# The chain of stages: post-training, evaluation of frozen features, the paper's tables and figures.
#
#   bash run_all.sh                             the demo: drawn images, a small network, minutes on a CPU
#   bash run_all.sh tiny_imagenet voc2012       the paper's protocol on every GPU of this machine
#   DRY_RUN=1 bash run_all.sh tiny_imagenet     prints the commands that it would run
#   LRS="2e-3 5e-4" bash run_all.sh cifar10     each method at two learning rates
#   OUT=runs/part METHODS="finetune grpo_rm" TRAIN_ARGS="--train-fraction 0.1" bash run_all.sh voc2012
#   OUT=runs/eq5 METHODS=grpo_rm TRAIN_ARGS="--uniformity eq5" bash run_all.sh tiny_imagenet
#   python -m tools.report runs                 Tables 2 to 6 from all of them
#
# From the environment, with their defaults (the demo's in brackets):
#   SEEDS      "0 1 2 3 4" ["0 1"]             METHODS    "frozen finetune grpo_rm"
#   EPOCHS     100 [16; segmentation 6]        LRS        learning rates; default: the dataset's
#   OUT        runs [runs/demo]                DATA_ROOT  directory of the datasets
#   NPROC      processes; the number of GPUs, or 1 [1]
#   WEIGHTS    file that all methods start from [segmentation: the first backbone that classification post-trained]
#   MODEL_ARGS, TRAIN_ARGS, LINEAR_ARGS        flags for all stages, for post-training, for eval_linear.py
#
# A stage whose result file exists is skipped, whatever settings it was made with: started again, the chain goes on
# where it stopped; other settings, or another folder of images, need another OUT. A stage that fails with status 1
# (loss not finite, disk full) ends its seed; the others follow, then a list of the failed stages, and status 1. Any
# other status (2: bad input; 130: Ctrl-C) ends the chain at once; but torchrun, which starts several processes, makes a
# 1 of every status.
set -euo pipefail

case ${1:-} in -h | --help) sed -n '3,/^set/s/^# \{0,1\}//p' "$0" && exit ;; esac
if (($# == 0)); then SEEDS=${SEEDS:-0 1} OUT=${OUT:-runs/demo} NPROC=${NPROC:-1}; fi
SEEDS=${SEEDS:-0 1 2 3 4} METHODS=${METHODS:-frozen finetune grpo_rm} OUT=${OUT:-runs}
NPROC=${NPROC:-$(python -c 'import torch; print(max(1, torch.cuda.device_count()))')}
launch=(python)
if ((NPROC > 1)); then launch=(torchrun --standalone --nproc_per_node="$NPROC"); fi
here=$(cd "$(dirname "$(readlink -f "$0")")" && pwd)
export PYTHONPATH=$here${PYTHONPATH:+:$PYTHONPATH} # for python -m tools.report
trap 'exit 130' INT                                # torchrun ends with status 1 after Ctrl-C
first_trained="" # the first backbone that was post-trained
failed=()        # the results that failed stages left out

stage() { # stage RESULT_FILE COMMAND...: runs the command unless its result is there; fails where it ends with status 1
    local status=0
    if [[ -e $1 ]]; then
        echo "# $1 exists: skipped"
    elif [[ ${DRY_RUN:-0} != 0 ]]; then
        printf '%q ' "${@:2}" && echo
    else
        echo "== ${*:2}"
        "${@:2}" || status=$?
    fi
    if ((status > 1)); then exit "$status"; fi
    if ((status == 1)); then failed+=("$1"); fi
    return "$status"
}

run_seed() { # run_seed DIRECTORY: one seed, as the variables of run_dataset say, up to the first stage that fails
    local run=$1 flags=(--dataset "$dataset" --seed "$seed" "${data[@]}" ${MODEL_ARGS:-}) weights=()
    if [[ -n ${WEIGHTS:-} ]]; then weights=(--weights "$WEIGHTS"); fi
    if [[ $method != frozen ]]; then
        stage "$run/backbone.pth" "${launch[@]}" "$here/train_$task.py" "${flags[@]}" "${weights[@]}" \
            --method "$method" --epochs "${EPOCHS:-100}" ${TRAIN_ARGS:-} "${rate[@]}" \
            --output-dir "$run" --resume || return
        first_trained=${first_trained:-$run/backbone.pth}
        weights=(--weights "$run/backbone.pth")
    fi
    flags+=("${weights[@]}")
    local linear=("${launch[@]}" "$here/eval_linear.py" "${flags[@]}" ${LINEAR_ARGS:-})
    if [[ $task == cls ]]; then
        stage "$run/eval_linear.json" "${linear[@]}" --output "$run/eval_linear.json" || return
        stage "$run/eval_knn.json" "${launch[@]}" "$here/eval_knn.py" "${flags[@]}" --output "$run/eval_knn.json"
    else
        stage "$run/eval_linear.json" "${linear[@]}" --save-images 4 --output "$run/eval_linear.json" || return
        linear+=(--features multiscale --output "$run/eval_linear_multiscale.json")
        stage "$run/eval_linear_multiscale.json" "${linear[@]}"
    fi
}

run_dataset() { # run_dataset DATASET: all methods, learning rates and seeds
    local dataset=$1 task=cls data=() method name rates lr rate seed
    if [[ -n ${DATA_ROOT:-} ]]; then data=(--data-root "$DATA_ROOT"); fi
    case $dataset in shapes | shapes_seg) data=() ;; esac # these are drawn
    case $dataset in voc2012 | ade20k | coco_stuff | shapes_seg) task=seg ;; esac
    if [[ $dataset == folder && -d ${DATA_ROOT:-${GRPO_RM_DATA:-datasets}}/masks ]]; then task=seg; fi
    for method in $METHODS; do
        rates=${LRS:-default}
        if [[ $method == frozen ]]; then rates=default; fi # nothing is trained
        for lr in $rates; do
            name=$method rate=()
            if [[ $lr != default ]]; then name=${method}_lr$lr rate=(--lr "$lr"); fi
            for seed in $SEEDS; do
                run_seed "$OUT/$dataset/$name/seed$seed" || true # the other seeds can still succeed
            done
        done
    done
}

for dataset in "$@"; do run_dataset "$dataset"; done
if (($# == 0)); then # the demo: small batches and their learning rates, so that a small network learns in few epochs
    MODEL_ARGS="--limit-train 2000 ${MODEL_ARGS:-}" EPOCHS=${EPOCHS:-16} \
        TRAIN_ARGS="--batch-size 64 --lr 1e-3 --eval-every 4 ${TRAIN_ARGS:-}" run_dataset shapes
    if [[ -z ${WEIGHTS:-} && -n $first_trained ]]; then
        WEIGHTS=$OUT/start.pth # a copy: with a run's config.json beside it, frozen features would count as that run's
        stage "$WEIGHTS" cp "$first_trained" "$WEIGHTS"
    fi
    MODEL_ARGS="--limit-train 300 --limit-val 80 --map-size 56 ${MODEL_ARGS:-}" EPOCHS=${EPOCHS:-6} \
        TRAIN_ARGS="--batch-size 16 --lr 1e-3 --eval-every 2 ${TRAIN_ARGS:-}" \
        LINEAR_ARGS="--batch-size 32 --epochs 10 --lr 3e-3 ${LINEAR_ARGS:-}" run_dataset shapes_seg
fi
status=0 # in parentheses, because a stage can end the chain: where nothing succeeded there is nothing to report
(stage "" python -m tools.report "$OUT" --csv "$OUT/tables" --figures "$OUT/figures") || status=$?
if ((${#failed[@]})); then printf 'failed: %s\n' "${failed[@]}" >&2 && exit 1; fi
exit "$status"
