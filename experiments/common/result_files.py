"""The result files: what each holds, what tells its records apart, what makes it.

`results/NAME.jsonl` is committed, and `make results` makes it again by the commands
below; programs write files of the same names to `runs/`. `$DATA` in a command is a
folder with data that cannot be shipped: its folders `glue`, `wikitext2`, `lambada`.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

__all__ = ["RESULT_FILES", "ResultFile"]


class ResultFile(NamedTuple):
    """One file of records.

    Attributes:
      about: What its records measure.
      key: Fields that tell two records apart: every choice that changes a number.
      commands: What makes its records, without `python -m` and `--out`.
    """

    about: str
    key: tuple[str, ...]
    commands: tuple[str, ...]


_MODEL = ("model", "weights_sha256")
_ROW = ("method", "bits", "basis", "seed", "rtol", "max_steps")
_RIVALS = "kashin-joint,rtn-g128,nf4-g64,hqq-g64,rotate-rtn-g64,k-means-channel,"
_RIVALS += "rotate-k-means"
_RATES = "kashin-joint,rotate-k-means,k-means-channel,rtn-g128,nf4-g64,hqq-g64,"
_RATES += "rotate-rtn-g64"
_OPT = "experiments/assets/opt-wiki-18m/model.safetensors"
_LLAMA = "runs/llama-wiki-12m"
_THREE = "--max_tokens=16384 --seed=0,1,2"
_WIKITEXT = "experiments.opt_ppl --dataset=wikitext2 --data_dir=$DATA"
_LAMBADA = "experiments.opt_ppl --dataset=lambada --data_dir=$DATA"

_CALIBRATED = "experiments.opt_ppl --max_tokens=16384 --calibration=default"
_FED = "kashin-joint-calibrated,gptq-g128"
_BOTH = "kashin-joint-two-sided"
_FED_GLUE = "experiments.glue --seeds=3 --data_dir=$DATA"


def _figure(about: str, name: str, *key: str) -> ResultFile:
    return ResultFile(about, key, (f"experiments.{name}",))


RESULT_FILES: Mapping[str, ResultFile] = MappingProxyType({
    "table2_opt": ResultFile(
        "perplexity of quantized language models",
        (
            *_MODEL, "dataset", "protocol", "text_sha256", "context", "stride",
            "max_tokens", *_ROW
        ),
        (
            f"experiments.opt_ppl --bits=2,2.5,3,3.5,4 {_THREE} "
            f"--methods=kashin,uniform,k-means,rtn-channel,{_RIVALS}",
            f"experiments.opt_ppl --bits=2,3,4 {_THREE} --methods=kashin-dct",
            "experiments.opt_ppl --model=experiments/assets/llama-wiki-12m "
            f"--bits=2,3,4 --max_tokens=16384 --methods={_RIVALS}",
            f"{_WIKITEXT} --bits=4 --max_tokens=all",
            f"{_WIKITEXT} --bits=4",
            f"{_WIKITEXT} --bits=2,2.5,3,3.5,4 {_THREE} --methods={_RIVALS}",
            f"{_WIKITEXT} --bits=2,3,4 {_THREE} "
            "--methods=kashin,uniform,k-means,rtn-channel",
            f"{_WIKITEXT} --bits=4 --max_tokens=16384 --methods=kashin --basis=haar",
            f"{_WIKITEXT} --bits=2,3,4 --methods=kashin-joint "
            "--basis=hadamard,hadamard:identity --seed=0,1",
            f"{_WIKITEXT} --bits=2.5,2.7,3,3.07,3.5 --methods=kashin-joint --seed=0,1",
            f"{_LAMBADA} --bits=2,3,4 {_THREE} --methods={_RIVALS}",
        ),
    ),
    "calibrated_opt": ResultFile(
        "perplexity of OPT models quantized with a calibration text",
        (
            *_MODEL, "dataset", "protocol", "text_sha256", "context", "stride",
            "max_tokens", *_ROW, "calibration", "calibration_sha256",
            "calibration_tokens",
        ),
        (
            f"{_CALIBRATED} --bits=2,3,4 --seed=0,1,2 --methods={_FED}",
            f"{_CALIBRATED} --bits=2,3,4 --seed=0,1,2 --methods={_BOTH}",
            f"{_CALIBRATED} --bits=2,3,4 --seed=0,1,2 --methods=kashin-joint-refined",
            f"{_CALIBRATED} --bits=2 --methods=gptq-g128-act-order,"
            "kashin-joint-distilled",
            f"{_CALIBRATED} --bits=4 --methods=kashin-dct-calibrated,"
            "rotate-kashin-dct-calibrated",
            f"{_CALIBRATED} --bits=8 --methods=gptq-g128,gptq-g128-refined",
            f"{_CALIBRATED} --dataset=wikitext2 --data_dir=$DATA --bits=2 "
            f"--seed=0,1,2 --methods={_FED}",
            f"{_CALIBRATED} --dataset=lambada --data_dir=$DATA --bits=2 "
            f"--seed=0,1,2 --methods={_FED}",
        ),
    ),
    "table3_glue": ResultFile(
        "GLUE metrics of quantized classifiers",
        (*_MODEL, "task", "metric", "data_sha256", "max_length", *_ROW),
        (
            "experiments.glue --bits=2,3,4 --seeds=3 --methods=all,kashin-joint",
            "experiments.glue --bits=2,3,4,6 --seeds=3 --data_dir=$DATA "
            "--tasks=cola,sst2,rte,stsb,mrpc",
            "experiments.glue --bits=2,3 --seeds=3 --data_dir=$DATA "
            "--tasks=cola,sst2,rte,stsb,mrpc --methods=kashin-joint",
        ),
    ),
    "calibrated_glue": ResultFile(
        "classifiers quantized with a calibration text",
        (
            *_MODEL, "task", "metric", "data_sha256", "max_length", *_ROW,
            "calibration", "calibration_sha256", "calibration_tokens",
        ),
        (
            f"{_FED_GLUE} --bits=2,3 --tasks=mrpc,stsb --calibration=train "
            f"--methods=kashin-joint,{_FED}",
            f"{_FED_GLUE} --bits=2 --tasks=sst2,sentiment-amazon,sentiment-nyt "
            "--calibration=default --methods=kashin-joint,kashin-joint-calibrated",
            f"{_FED_GLUE} --bits=3 --tasks=sst2,sentiment-amazon,sentiment-nyt "
            f"--calibration=default --methods=kashin-joint,{_FED}",
        ),
    ),
    "rate_distortion": ResultFile(
        "weight error against stored bits",
        (
            "source", "source_sha256", "weights", "method", "bits", "effort", "seed"
        ),
        (
            "experiments.rate_distortion --bits=2,2.5,3,3.5,4,4.5,5 "
            "--methods=kashin-joint --effort=fast,default,max",
            f"experiments.rate_distortion --bits=2,3,4,5 --methods={_RATES}",
            f"experiments.rate_distortion --source=student_t3 --methods={_RATES}",
            f"experiments.rate_distortion --source=outlier_columns --methods={_RATES}",
            f"experiments.rate_distortion --source={_OPT} --methods={_RATES} "
            "--effort=fast",
        ),
    ),
    "refine_glue": ResultFile(
        "classifiers refined with fixed codes",
        (
            *_MODEL, "task", "data_sha256", "max_length", "method", "bits", "basis",
            "seed", "epochs", "batch_size", "learning_rate",
        ),
        ("experiments.refine_glue --task=mrpc --data_dir=$DATA",),
    ),
    "depth": ResultFile(
        "error, perplexity and GLUE against greedy steps and tolerance",
        (
            *_MODEL, "data", "data_sha256", "examples", "protocol", "metric", "axis",
            "bits", "max_steps", "rtol", "basis", "seed",
        ),
        (
            "experiments.depth",
            "experiments.depth --dataset=wikitext2 --data_dir=$DATA --tasks=sst2,stsb",
        ),
    ),
    "robustness": ResultFile(
        "which matrices which bases decompose",
        ("matrix", "basis", "size", "seeds", "max_steps", "rtol"),
        ("experiments.robustness",),
    ),
    "ablate_bases": ResultFile(
        "structured against random bases on layers",
        (
            "model", "layer", "basis", "bits", "seeds", "max_steps", "rtol", "restarts"
        ),
        ("experiments.ablate_bases",),
    ),
    "learn_butterfly": ResultFile(
        "learned angles against random ones",
        (
            "model", "layer", "family", "loss", "bits", "steps", "learning_rate",
            "seed",
        ),
        ("experiments.learn_butterfly --bits=2",),
    ),
    "sizes": ResultFile(
        "bytes on disk of quantized checkpoints",
        (*_MODEL, "method", "bits", "config", "seed"),
        ("experiments.sizes",),
    ),
    "table1": ResultFile(
        "how well each basis spreads a vector",
        ("family", "n", "seed", "seeds", "starts", "steps"),
        ("experiments.table1",),
    ),
    "fig1": _figure("the greedy choice in the plane", "fig1", "seed", "part"),
    "fig2": _figure(
        "convergence on random vectors", "fig2", "seed", "family", "length"
    ),
    "fig3": _figure(
        "convergence on layers", "fig3", "model", "seed", "part", "layer", "family"
    ),
    "fig4": _figure(
        "cost as size grows", "fig4", "seed", "part", "curve", "fit", "size", "device"
    ),
    "fig5": _figure("butterfly factors", "fig5", "seed", "order", "factor"),
    "fig6": _figure(
        "entries of U and V", "fig6", "model", "seed", "layer", "family", "bits"
    ),
    "fig7": _figure(
        "good clusterings", "fig7", "model", "seed", "layer", "family", "bits"
    ),
    "fig8": _figure(
        "bad clusterings", "fig8", "model", "seed", "layer", "family", "bits"
    ),
    "depth_curves": _figure(
        "the curves of depth.jsonl", "depth_curves", "model", "metric", "axis", "bits"
    ),
    "train_lm": ResultFile(
        "training a small OPT, and the embedded Llama, on a CPU",
        ("config", "kind", "step"),
        (
            "experiments.train_lm "
            "--text_file=experiments/assets/wiki_vital/calibration.txt "
            "--eval_file=experiments/assets/wiki_vital/valid.txt --eval_every=200 "
            "--layers=2 --hidden_size=128 --heads=2 --ffn_dim=512 --max_positions=64 "
            "--context=64 --steps=3600 --warmup_steps=120 --batch_size=16 "
            "--dtype=float32 --log_every=40 --checkpoint_every=600 "
            "--out=runs/train_lm --results=results",
            f"experiments.write_text --out={_LLAMA}.txt --tokens=260000",
            f"experiments.train_lm --text_file={_LLAMA}.txt "
            "--even_file=experiments/assets/wiki_vital/calibration.txt "
            "--architecture=llama --teacher=experiments/assets/opt-wiki-18m "
            "--teacher_weight=0.9 --start=teacher --layers=7 --hidden_size=384 "
            "--heads=6 --kv_heads=3 --ffn_dim=704 --max_positions=512 --context=512 "
            "--steps=1600 --batch_size=4 --learning_rate=1e-3 --warmup_steps=40 "
            "--weight_decay=0.01 --dtype=float32 --log_every=20 --checkpoint_every=50 "
            "--eval_file=experiments/assets/wiki_vital/valid.txt --eval_every=100 "
            f"--eval_tokens=8192 --patience=3 --out={_LLAMA} --results=results",
        ),
    ),
    "bench_core": ResultFile(
        "time, memory and quality of the decomposition",
        ("part", "basis", "restarts", "sample", "shape", "stage", "device"),
        ("benchmarks.core",),
    ),
    "bench_joint": ResultFile(
        "error and speed of the joint search; on a GPU --steps=50,200",
        ("bits", "steps", "repulsion", "weights", "device"),
        ("benchmarks.joint",),
    ),
    "bench_calibration": ResultFile(
        "time and memory of calibrating a layer, and estimates for models on GPUs",
        ("part", "inputs", "outputs", "model", "effort", "devices", "device"),
        (
            "benchmarks.calibration_cost",
            "benchmarks.calibration_cost --inputs=4096,8192 --outputs=256",
        ),
    ),
    "bench_matmul": ResultFile(
        "products with packed matrices against dense ones",
        ("block", "method", "bits", "rows", "device"),
        ("benchmarks.matmul",),
    ),
    "bench_generate": ResultFile(
        "tokens per second, dense and packed, with the CPU kernel and without",
        ("model", "weights", "batch", "device"),
        ("benchmarks.generate",),
    ),
    "bench_peers": ResultFile(
        "products by packed weights of other libraries and by ours",
        ("method", "rows", "device"),
        ("benchmarks.peers --libraries=.peers",),
    ),
    "bench_streaming": ResultFile(
        "time and memory of `kashin quantize`",
        ("layout", "method", "bits", "effort", "device"),
        (
            "benchmarks.streaming --layout=4gb --method=rtn",
            "benchmarks.streaming --layout=opt-1.3b --method=kashin-joint "
            "--effort=fast",
            "benchmarks.streaming --layout=llama-3.2-1b --method=kashin-joint "
            "--effort=fast",
            "benchmarks.streaming --layout=matrix --method=kashin",
            "benchmarks.streaming --layout=matrix --method=kashin-joint",
        ),
    ),
})  # fmt: skip
