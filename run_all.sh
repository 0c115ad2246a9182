#!/usr/bin/env bash
# The chain of stages, from post-training to the table.
#
#   bash run_all.sh                          the demo: embedded images and backbone, minutes on a CPU
#   bash run_all.sh tiny_imagenet cifar10    the paper's protocol on every GPU of this machine
#
# From the environment, with their defaults (the demo's in brackets):
#   SEEDS    "0 1 2 3 4" ["0 1"]             METHODS  "frozen finetune grpo_rm"
#   NPROC    processes; the number of GPUs, or 1 [1]
#   EPOCHS   100 [16]                        DATA_ROOT  directory of the datasets
#   OUT      runs [runs/demo]                WEIGHTS    file to start from
#   MODEL_ARGS  flags for every stage, such as "--backbone dinov2_vitb14"
#   TRAIN_ARGS  flags for post-training only, such as "--ratio-floor 0"
#
# A stage whose result file exists is skipped: started again, the chain goes on where it stopped.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)

if (($# == 0)); then # the demo: small batches and their learning rate, so that a small network learns in few epochs
    set -- shapes
    SEEDS=${SEEDS:-0 1}
    EPOCHS=${EPOCHS:-16}
    OUT=${OUT:-runs/demo}
    NPROC=${NPROC:-1}
    MODEL_ARGS=${MODEL_ARGS:---limit-train 3000}
    TRAIN_ARGS=${TRAIN_ARGS:---batch-size 64 --lr 1e-3 --eval-every 8}
fi
SEEDS=${SEEDS:-0 1 2 3 4}
METHODS=${METHODS:-frozen finetune grpo_rm}
EPOCHS=${EPOCHS:-100}
OUT=${OUT:-runs}
NPROC=${NPROC:-$(python -c 'import torch; print(max(1, torch.cuda.device_count()))')}

launch=(python)
if ((NPROC > 1)); then launch=(torchrun --standalone --nproc_per_node="$NPROC"); fi
read -ra model_args <<<"${MODEL_ARGS:-}"
read -ra train_args <<<"${TRAIN_ARGS:-}"
if [[ -n ${DATA_ROOT:-} ]]; then model_args+=(--data-root "$DATA_ROOT"); fi
start_args=()
if [[ -n ${WEIGHTS:-} ]]; then start_args+=(--weights "$WEIGHTS"); fi

stage() { # stage RESULT_FILE COMMAND...: runs the command unless its result is there
    local result=$1
    shift
    if [[ -e $result ]]; then
        echo "== $result exists: skipped"
    else
        echo "== $*"
        "${launch[@]}" "$here/$1" "${@:2}"
    fi
}

for dataset in "$@"; do
    for method in $METHODS; do
        for seed in $SEEDS; do
            run=$OUT/$dataset/$method/seed$seed
            common=(--dataset "$dataset" --seed "$seed" "${model_args[@]}")
            if [[ $method == frozen ]]; then
                judged=(--frozen "${start_args[@]}")
            else
                stage "$run/backbone.pth" train_cls.py "${common[@]}" --method "$method" --epochs "$EPOCHS" \
                    "${start_args[@]}" "${train_args[@]}" --output-dir "$run" --resume
                judged=(--weights "$run/backbone.pth")
            fi
            stage "$run/eval_linear.json" eval_linear.py "${common[@]}" "${judged[@]}" --output "$run/eval_linear.json"
            stage "$run/eval_knn.json" eval_knn.py "${common[@]}" "${judged[@]}" --output "$run/eval_knn.json"
        done
    done
done
python "$here/report.py" "$OUT"
