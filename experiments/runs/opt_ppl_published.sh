#!/usr/bin/env bash
# The OPT perplexity table of arXiv 2404.09737 on the published checkpoints, one GPU or
# TPU. Needs `pip install -e '.[experiments,cuda]'` (or tpu), a network for the first
# download, and `.[torch]` for sizes that ship pytorch_model.bin only. DATA_DIR may name
# a folder with lambada/lambada_test.jsonl and wikitext2/wiki.test.raw.
#
#   experiments/runs/opt_ppl_published.sh            # 125m 350m 1.3b
#   DATA_DIR=texts experiments/runs/opt_ppl_published.sh 2.7b 6.7b
set -euo pipefail
data_dir=${DATA_DIR:+$(realpath -m "$DATA_DIR")}
cd "$(dirname "$0")/../.."
sizes=("$@")
[ ${#sizes[@]} -gt 0 ] || sizes=(125m 350m 1.3b)
for size in "${sizes[@]}"; do
  # The paper's protocol: LAMBADA, stride 512, window 2048; QR bases; 4, 5 and 6 bits.
  python -m experiments.opt_ppl --model="facebook/opt-$size" --dataset=lambada \
    --basis=haar,hadamard --bits=4,5,6 --max_tokens=all --data_dir="$data_dir" \
    --out=runs/published
  # The protocol of the quantization literature, for published numbers of the controls.
  python -m experiments.opt_ppl --model="facebook/opt-$size" --dataset=wikitext2-gptq \
    --bits=3,4 --max_tokens=all --data_dir="$data_dir" --out=runs/published
done
