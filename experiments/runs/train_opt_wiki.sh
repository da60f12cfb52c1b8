#!/usr/bin/env bash
# The full recipe of the embedded checkpoint opt-wiki-18m: 9,000 steps of 192 x 512
# tokens, about 11 minutes on one H100. Give English Wikipedia as UTF-8 text: articles
# separated by empty lines, each a title, an empty line, and one line per paragraph.
# Remove WikiText-2's validation and test articles first.
#
#     experiments/runs/train_lm_wiki.sh wikipedia.txt runs/opt-wiki-18m
#
# Expected training loss: 9.06 (start), 5.4 (200 steps), 3.66 (1,000), 3.45 (2,000),
# 3.21 (4,000), 3.07 (6,000), 3.01 (8,000), 2.97 (9,000). Run it again to resume; add
# --grad_accumulation=4 where memory is short.
set -euo pipefail
usage="usage: train_opt_wiki.sh WIKIPEDIA_TEXT OUTPUT_DIRECTORY [FLAGS]"
text=$(realpath -m "${1:?$usage}")
out=$(realpath -m "${2:?$usage}")
shift 2
cd "$(dirname "$0")/../.."

"${PYTHON:-python}" -m experiments.train_lm \
  --text_file="$text" \
  --out="$out" \
  --wikitext_spacing=0.8 \
  --tokenizer=experiments/assets/opt-wiki-18m \
  --layers=8 \
  --hidden_size=384 \
  --heads=6 \
  --ffn_dim=1536 \
  --max_positions=1024 \
  --context=512 \
  --dropout=0.05 \
  --steps=9000 \
  --batch_size=192 \
  --learning_rate=2e-3 \
  --warmup_steps=300 \
  --final_fraction=0.05 \
  --weight_decay=0.1 \
  --beta1=0.9 \
  --beta2=0.95 \
  --clip=1.0 \
  --dtype=bfloat16 \
  --seed=0 \
  --eval_file=experiments/assets/wiki_vital/valid.txt \
  --eval_every=500 \
  --eval_tokens=0 \
  "$@"
