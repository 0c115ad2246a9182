#!/usr/bin/env bash
# The chain of stages, from post-training to the paper's tables and figures.
#
#   bash run_all.sh                             the demo: embedded images and backbone, minutes on a CPU
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
#   MODEL_ARGS, TRAIN_ARGS                     flags for every stage, such as "--backbone dinov2_vitb14"; for post-training only
#   SEG_MODEL_ARGS, SEG_TRAIN_ARGS, SEG_EVAL_ARGS    more of them for segmentation, which override the former
#
# A stage whose result file exists is skipped, whatever settings it was made with: started again, the chain goes on where it
# stopped; other settings, or another folder of images, need another OUT.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)

if (($# == 0)); then # the demo: small batches and their learning rate, so that a small network learns in few epochs
    set -- shapes shapes_seg
    SEEDS=${SEEDS:-0 1}
    OUT=${OUT:-runs/demo}
    NPROC=${NPROC:-1}
    MODEL_ARGS=${MODEL_ARGS:---limit-train 2000}
    TRAIN_ARGS=${TRAIN_ARGS:---batch-size 64 --lr 1e-3 --eval-every 4}
    SEG_MODEL_ARGS=${SEG_MODEL_ARGS:---limit-train 400 --limit-val 80 --map-size 56}
    SEG_TRAIN_ARGS=${SEG_TRAIN_ARGS:---batch-size 32 --epochs ${EPOCHS:-8} --eval-every 2}
    SEG_EVAL_ARGS=${SEG_EVAL_ARGS:---batch-size 32 --epochs 10 --lr 3e-3}
    EPOCHS=${EPOCHS:-16}
fi
SEEDS=${SEEDS:-0 1 2 3 4}
METHODS=${METHODS:-frozen finetune grpo_rm}
EPOCHS=${EPOCHS:-100}
OUT=${OUT:-runs}
FRACTIONS=${FRACTIONS:-1}
NPROC=${NPROC:-$(python -c 'import torch; print(max(1, torch.cuda.device_count()))')}

launch=(python)
if ((NPROC > 1)); then launch=(torchrun --standalone --nproc_per_node="$NPROC"); fi
read -ra train_launch <<<"${TORCHRUN:-${launch[*]}}"
read -ra seg_eval_args <<<"${SEG_EVAL_ARGS:-}"
start_args=()
if [[ -n ${WEIGHTS:-} ]]; then start_args+=(--weights "$WEIGHTS"); fi

segmentation() { # segmentation DATASET: whether it has masks
    case $1 in
        voc2012 | ade20k | coco_stuff | shapes_seg) true ;;
        folder) [[ -d ${DATA_ROOT:-${GRPO_RM_DATA:-datasets}}/masks ]] ;;
        *) false ;;
    esac
}

variants() { # variants METHOD: for each run directory of it a line with its name and the flags that make it
    local fraction fractions=$FRACTIONS
    if [[ $1 == frozen ]]; then fractions=1; fi # nothing is trained
    for fraction in $fractions; do
        if [[ $fraction == 1 ]]; then echo "$1"; else echo "${1}_fraction$fraction --train-fraction $fraction"; fi
    done
    if [[ $1 == grpo_rm && ${ABLATIONS:-0} != 0 ]]; then printf 'grpo_rm_%s --uniformity %s\n' none none eq5 eq5; fi
}

stage() { # stage RESULT_FILE COMMAND...: runs the command unless its result is there; "" always runs
    local result=$1
    shift
    if [[ -e $result ]]; then
        echo "# $result exists: skipped"
    elif [[ ${DRY_RUN:-0} != 0 ]]; then
        printf '%q ' "$@"
        echo
    else
        echo "== $*"
        "$@"
    fi
}

judge() { # judge RUN FLAGS...: both evaluations of frozen features
    local linear=$1/eval_linear.json multiscale=$1/eval_linear_multiscale.json knn=$1/eval_knn.json
    shift
    if [[ $task == cls ]]; then
        stage "$linear" "${launch[@]}" "$here/eval_linear.py" "$@" --output "$linear"
        stage "$knn" "${launch[@]}" "$here/eval_knn.py" "$@" --output "$knn"
    else
        local images=()
        if [[ $seed == "${SEEDS%% *}" ]]; then images=(--save-images 4); fi # the panels of Figure 2
        set -- "$@" "${seg_eval_args[@]}"
        stage "$linear" "${launch[@]}" "$here/eval_linear.py" "$@" --features linear "${images[@]}" --output "$linear"
        stage "$multiscale" "${launch[@]}" "$here/eval_linear.py" "$@" --features multiscale --output "$multiscale"
    fi
}

for dataset in "$@"; do
    task=cls
    if segmentation "$dataset"; then task=seg; fi
    read -ra model_args <<<"${MODEL_ARGS:-} $([[ $task == cls ]] || echo "${SEG_MODEL_ARGS:-}")"
    read -ra train_args <<<"${TRAIN_ARGS:-} $([[ $task == cls ]] || echo "${SEG_TRAIN_ARGS:-}")"
    if [[ -n ${DATA_ROOT:-} ]]; then model_args+=(--data-root "$DATA_ROOT"); fi
    for method in $METHODS; do
        mapfile -t lines < <(variants "$method")
        for line in "${lines[@]}"; do
            read -r name flags <<<"$line"
            read -ra flags <<<"$flags"
            for seed in $SEEDS; do
                run=$OUT/$dataset/$name/seed$seed
                common=(--dataset "$dataset" --seed "$seed" "${model_args[@]}")
                if [[ $method == frozen ]]; then
                    judge "$run" "${common[@]}" --frozen "${start_args[@]}"
                else
                    stage "$run/backbone.pth" "${train_launch[@]}" "$here/train_$task.py" "${common[@]}" --method "$method" \
                        --epochs "$EPOCHS" "${start_args[@]}" "${train_args[@]}" "${flags[@]}" --output-dir "$run" --resume
                    judge "$run" "${common[@]}" --weights "$run/backbone.pth"
                fi
            done
        done
    done
done
stage "" python "$here/report.py" "$OUT" --csv "$OUT/tables" --figures "$OUT/figures"
