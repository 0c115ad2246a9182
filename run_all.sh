#!/usr/bin/env bash
# The chain of stages, from post-training to the paper's tables and figures.
#
#   bash run_all.sh                             the demo: drawn images, a small network, minutes on a CPU
#   bash run_all.sh tiny_imagenet voc2012       the paper's protocol on every GPU of this machine
#   DRY_RUN=1 bash run_all.sh tiny_imagenet     prints the commands that it would run
#
# From the environment, with their defaults (the demo's in brackets):
#   SEEDS      "0 1 2 3 4" ["0 1"]             METHODS    "frozen finetune grpo_rm"
#   EPOCHS     100 [16; segmentation 8]        DATA_ROOT  directory of the datasets
#   OUT        runs [runs/demo]                WEIGHTS    file to start from
#   NPROC      processes; the number of GPUs, or 1 [1]
#   ABLATIONS  0; 1 adds GRPO-RM with the other uniformity rewards of Table 6
#   FRACTIONS  "1"; "0.1 1" adds post-training on 10 % of the images (Tables 2 and 4)
#   TORCHRUN   what starts post-training, where it is to span several nodes:
#              "srun torchrun --nnodes=2 --nproc_per_node=4 --rdzv-backend=c10d --rdzv-endpoint=HOST:29500"
#   MODEL_ARGS, TRAIN_ARGS                     flags for every stage, such as "--backbone dinov2_vitb14"; for training
#   SEG_MODEL_ARGS, SEG_TRAIN_ARGS, SEG_EVAL_ARGS    more of them for segmentation, which override the former
#
# A stage whose result file exists is skipped, whatever settings it was made with: started again, the chain goes on
# where it stopped; other settings, or another folder of images, need another OUT.
set -euo pipefail
here=$(cd "$(dirname "$(readlink -f "$0")")" && pwd)
export PYTHONPATH=$here${PYTHONPATH:+:$PYTHONPATH} # for python -m tools.report

if (($# == 0)); then # the demo: small batches and their learning rate, so that a small network learns in few epochs
    set -- shapes shapes_seg
    SEEDS=${SEEDS:-0 1} OUT=${OUT:-runs/demo} NPROC=${NPROC:-1}
    MODEL_ARGS=${MODEL_ARGS:---limit-train 2000}
    TRAIN_ARGS=${TRAIN_ARGS:---batch-size 64 --lr 1e-3 --eval-every 4}
    SEG_MODEL_ARGS=${SEG_MODEL_ARGS:---limit-train 400 --limit-val 80 --map-size 56}
    SEG_TRAIN_ARGS=${SEG_TRAIN_ARGS:---batch-size 32 --epochs ${EPOCHS:-8} --eval-every 2}
    SEG_EVAL_ARGS=${SEG_EVAL_ARGS:---batch-size 32 --epochs 10 --lr 3e-3}
    EPOCHS=${EPOCHS:-16}
fi
SEEDS=${SEEDS:-0 1 2 3 4} METHODS=${METHODS:-frozen finetune grpo_rm} EPOCHS=${EPOCHS:-100} OUT=${OUT:-runs}
NPROC=${NPROC:-$(python -c 'import torch; print(max(1, torch.cuda.device_count()))')}
launch=(python)
if ((NPROC > 1)); then launch=(torchrun --standalone --nproc_per_node="$NPROC"); fi
read -ra train_launch <<<"${TORCHRUN:-${launch[*]}}"

stage() { # stage RESULT_FILE COMMAND...: runs the command unless its result is there
    if [[ -e $1 ]]; then
        echo "# $1 exists: skipped"
    elif [[ ${DRY_RUN:-0} != 0 ]]; then
        printf '%q ' "${@:2}" && echo
    else
        echo "== ${*:2}" && "${@:2}"
    fi
}

evaluate() { # evaluate RUN FLAGS...: both evaluations of frozen features
    local run=$1
    shift
    if [[ $task == cls ]]; then
        stage "$run/eval_linear.json" "${launch[@]}" "$here/eval_linear.py" "$@" --output "$run/eval_linear.json"
        stage "$run/eval_knn.json" "${launch[@]}" "$here/eval_knn.py" "$@" --output "$run/eval_knn.json"
        return
    fi
    local images=()
    if [[ $seed == "${SEEDS%% *}" ]]; then images=(--save-images 4); fi # the panels of Figure 2
    read -ra seg_eval_args <<<"${SEG_EVAL_ARGS:-}"
    set -- "${launch[@]}" "$here/eval_linear.py" "$@" "${seg_eval_args[@]}"
    stage "$run/eval_linear.json" "$@" "${images[@]}" --output "$run/eval_linear.json"
    stage "$run/eval_linear_multiscale.json" "$@" --features multiscale --output "$run/eval_linear_multiscale.json"
}

for dataset in "$@"; do
    case $dataset in voc2012 | ade20k | coco_stuff | shapes_seg) task=seg ;; *) task=cls ;; esac
    if [[ $dataset == folder && -d ${DATA_ROOT:-${GRPO_RM_DATA:-datasets}}/masks ]]; then task=seg; fi
    read -ra model_args <<<"${MODEL_ARGS:-} $([[ $task == cls ]] || echo "${SEG_MODEL_ARGS:-}")"
    read -ra train_args <<<"${TRAIN_ARGS:-} $([[ $task == cls ]] || echo "${SEG_TRAIN_ARGS:-}")"
    if [[ -n ${DATA_ROOT:-} ]]; then model_args+=(--data-root "$DATA_ROOT"); fi
    start=()
    if [[ -n ${WEIGHTS:-} ]]; then start=(--weights "$WEIGHTS"); fi
    for method in $METHODS; do
        variants=() # a run directory's name and the flags that make it
        for fraction in ${FRACTIONS:-1}; do
            if [[ $fraction == 1 ]]; then variants+=("$method"); else
                variants+=("${method}_fraction$fraction --train-fraction $fraction"); fi
        done
        if [[ $method == frozen ]]; then variants=(frozen); fi # nothing is trained
        if [[ $method == grpo_rm && ${ABLATIONS:-0} != 0 ]]; then
            variants+=("grpo_rm_none --uniformity none" "grpo_rm_eq5 --uniformity eq5"); fi
        for variant in "${variants[@]}"; do
            read -ra flags <<<"$variant"
            for seed in $SEEDS; do
                run=$OUT/$dataset/${flags[0]}/seed$seed
                common=(--dataset "$dataset" --seed "$seed" "${model_args[@]}")
                if [[ $method == frozen ]]; then evaluate "$run" "${common[@]}" "${start[@]}"; continue; fi
                stage "$run/backbone.pth" "${train_launch[@]}" "$here/train_$task.py" "${common[@]}" --method "$method" \
                    --epochs "$EPOCHS" "${start[@]}" "${train_args[@]}" "${flags[@]:1}" --output-dir "$run" --resume
                evaluate "$run" "${common[@]}" --weights "$run/backbone.pth"
            done
        done
    done
done
stage "" python -m tools.report "$OUT" --csv "$OUT/tables" --figures "$OUT/figures"
