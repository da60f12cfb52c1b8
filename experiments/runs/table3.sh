#!/usr/bin/env bash
# Table 3 of arXiv 2404.09737 on one GPU or TPU: fine-tunes each encoder on the nine GLUE
# tasks, then quantizes the classifiers. Needs `pip install -e '.[experiments,cuda]'` (or
# tpu), and a network for models and data, or GLUE in a folder named by DATA_DIR.
#
#   experiments/runs/table3.sh runs/table3                      # both models
#   experiments/runs/table3.sh runs/table3 roberta-base
#   DATA_DIR=GLUE experiments/runs/table3.sh runs/table3 bert-base-uncased
#
# The recipe is the one of transformers' run_glue example, which the paper names: 2e-5, 32
# examples, 128 tokens, no warm-up, no weight decay; 3 epochs, and 5 for the small MRPC and
# WNLI. What is finished is skipped; what is not is resumed.
set -euo pipefail
usage="usage: [DATA_DIR=GLUE] table3.sh OUTPUT_DIRECTORY [MODEL ...]"
out=$(realpath -m "${1:?$usage}")
shift
data_dir=${DATA_DIR:+$(realpath -m "$DATA_DIR")}
[ $# -gt 0 ] || set -- bert-base-uncased roberta-base
models=()
for model in "$@"; do
  # A checkpoint on this disk, or a hub id.
  if [ -d "$model" ]; then model=$(realpath "$model"); fi
  models+=("$model")
done
cd "$(dirname "$0")/../.."

finetune() {
  local model=$1 task=$2 epochs=$3
  local run="$out/$(basename "$model")-$task"
  if [ -f "$run/metrics.json" ]; then
    echo "$run is finished."
    return
  fi
  "${PYTHON:-python}" -m experiments.finetune_glue \
    --task="$task" \
    --model="$model" \
    --data_dir="$data_dir" \
    --out="$run" \
    --epochs="$epochs" \
    --batch_size=32 \
    --learning_rate=2e-5 \
    --warmup_fraction=0 \
    --weight_decay=0 \
    --max_length=128 \
    --dtype=bfloat16 \
    --seed=0
}

for model in "${models[@]}"; do
  finetune "$model" cola 3
  finetune "$model" sst2 3
  finetune "$model" qqp 3
  finetune "$model" qnli 3
  finetune "$model" mnli 3
  finetune "$model" rte 3
  finetune "$model" stsb 3
  finetune "$model" mrpc 5
  finetune "$model" wnli 5
  "${PYTHON:-python}" -m experiments.glue \
    --model="$out/$(basename "$model")-{task}/hf" \
    --tasks=cola,sst2,qqp,qnli,mnli,rte,stsb,mrpc,wnli \
    --data_dir="$data_dir" \
    --bits=4 \
    --seeds=3 \
    --out=runs/table3
done
