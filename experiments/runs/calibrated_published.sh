#!/usr/bin/env bash
# Calibrated rows on published checkpoints, by the protocol of the quantization
# literature: WikiText-2 and C4, windows of 2048, calibrated with 128 windows of the
# training text of WikiText-2 (or CALIBRATION=c4), one GPU. Needs
# `pip install -e '.[experiments,cuda]'`, a network for the first download, access to
# gated models, and `.[torch]` for those that ship pytorch_model.bin only. DATA_DIR may
# name a folder with wikitext2/wiki.test.raw, wikitext2/wiki.train.raw and c4/.
#
#   experiments/runs/calibrated_published.sh                     # all of the models below
#   SEEDS=0,1,2 experiments/runs/calibrated_published.sh facebook/opt-125m
set -euo pipefail
data_dir=${DATA_DIR:+$(realpath -m "$DATA_DIR")}
cd "$(dirname "$0")/../.."
models=("$@")
[ ${#models[@]} -gt 0 ] || models=(
  facebook/opt-125m facebook/opt-350m facebook/opt-1.3b facebook/opt-2.7b
  facebook/opt-6.7b meta-llama/Llama-2-7b-hf meta-llama/Llama-2-13b-hf
  meta-llama/Meta-Llama-3-8B meta-llama/Llama-3.2-1B
)
methods=kashin-joint,kashin-joint-calibrated,kashin-joint-two-sided
methods+=,kashin-joint-refined,gptq-g128,gptq-g128-asymmetric
methods+=,gptq-g128-act-order,kashin-dct-calibrated,rotate-kashin-dct-calibrated,rtn-g128
for model in "${models[@]}"; do
  for dataset in wikitext2-gptq c4; do
    python -m experiments.opt_ppl --model="$model" --dataset="$dataset" \
      --context=2048 --max_tokens=all --bits=2,3,4 --seed="${SEEDS:-0}" \
      --calibration="${CALIBRATION:-wikitext2}" --calibration_tokens=262144 \
      --methods="$methods" --data_dir="$data_dir" --out=runs/calibrated-published
  done
done
