#!/usr/bin/env bash
# Runs of results.csv again, two at a time; results go to runs/NAME/seed<SEED>. From the repository's root:
#
#   hub=DIR bash docs/study/run.sh PATTERN SEED...     the rows whose names match the regular expression
#
# DIR holds hubconf.py and vit_tiny16.pth; datasets/ holds what cuts.sh makes, and camvid/. Rows with a remark in
# brackets are passed over.
set -euo pipefail
export OMP_NUM_THREADS=1 hub=${hub:-hub}

job() { # job NAME DATASET FLAGS... --seed N: post-train and evaluate
    local name=$1 data="--dataset folder --data-root datasets/$2 --seed ${!#}" run=runs/$1/seed${!#}
    local vit_tiny16="--hub-repo $hub --backbone vit_tiny16" start=$hub/vit_tiny16.pth train="" task=cls
    local segmenter="--batch-size 32 --lr 1e-3 --lr-end 1.25e-6"
    case $name in
        tiny/*)
            start=runs/tiny/start.pth data+=" --image-size 42 --backbone vit_tiny"
            train="--epochs 40 --warmup-epochs 0 --grad-accum 4 --amp bf16" ;;
        ti16/*)
            data+=" --limit-train 4000 --image-size 64 $vit_tiny16" train="--epochs 60 --batch-size 512 --amp bf16" ;;
        noise/* | noise2/* | noise200/* | noise4000/* | asymmetric/*)
            case $name in noise/* | noise2/*) data+=" --limit-train 2000" ;; esac
            case $name in noise200/* | noise4000/*) data+=" --limit-train 4000" ;; esac
            [[ $name == asymmetric/* ]] && data=${data/asymmetric/asymmetric${!#}}
            data+=" --image-size 64 --amp bf16 $vit_tiny16" train="--batch-size 256 --eval-every 3" ;;
        camvid/*)
            task=seg data+=" --image-size 224 --amp bf16 $vit_tiny16"
            train="--map-size 112 --epochs 20 --batch-size 16" ;;
        camvid_random/*)
            task=seg start="" data+=" --image-size 224 --map-size 112 --backbone vit_tiny" train="--batch-size 16" ;;
        *) echo "$name: made with older or edited code" && return 1 ;;
    esac
    local weights=${start:+--weights $start}
    if [[ $name != */frozen ]]; then
        python train_$task.py $data $weights $train --output-dir "$run" --resume "${@:3}" || return
        weights="--weights $run/backbone.pth"
    fi
    data=${data/asymmetric${!#}/cifar10 --limit-train 2000} # frozen features take true labels
    if [[ $task == cls ]]; then
        python eval_linear.py $data $weights --output "$run/eval_linear.json" || return
        python eval_knn.py $data $weights --output "$run/eval_knn.json" || return
    else
        python eval_linear.py $data $weights $segmenter --output "$run/eval_linear.json" || return
    fi
    if [[ $name == noise*/0.* ]]; then
        python -m tools.label_errors "$run" || return
        PYTHONPATH=. python docs/study/replaced.py "$run" || return
    fi
    if [[ $name == camvid_random/* ]]; then
        python eval_linear.py $data $weights $segmenter --features multiscale \
            --output "$run/eval_linear_multiscale.json"
    fi
}
export -f job

rows=$(for seed in "${@:2}"; do
    awk -F, -v name="$1" -v seed="$seed" '$1 ~ name && $5 !~ /\[/ {print $1, $2, $5, "--seed", seed}' \
        docs/study/results.csv
done | sort -u)
if [[ -z $rows ]]; then
    echo "run.sh: no row of docs/study/results.csv matches; usage: run.sh PATTERN SEED..." >&2
    exit 2
fi
if grep -q '^tiny/' <<<"$rows" && [[ ! -e runs/tiny/start.pth ]]; then # what tiny/ starts from
    python train_cls.py --dataset folder --data-root datasets/tiny_a --image-size 42 --backbone vit_tiny \
        --method finetune --batch-size 256 --lr 1e-3 --lr-end 1e-5 --epochs 40 --warmup-epochs 0 --amp bf16 \
        --output-dir runs/start --resume
    mkdir -p runs/tiny && cp runs/start/backbone.pth runs/tiny/start.pth # beside no config.json: it has no method
fi
xargs -r -P 2 -L 1 bash -c 'job "$@"' _ <<<"$rows"
