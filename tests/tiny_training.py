"""A training run small enough for a test."""

from pathlib import Path

from experiments.train.recipe import TrainConfig

ASSETS = Path(__file__).resolve().parents[1] / "experiments" / "assets"
TINY = {
    "layers": 1,
    "hidden_size": 16,
    "heads": 2,
    "ffn_dim": 32,
    "max_positions": 24,
    "context": 16,
    "batch_size": 4,
    "steps": 8,
    "warmup_steps": 2,
    "learning_rate": 0.02,
    "dtype": "float32",
    "log_every": 2,
    "checkpoint_every": 4,
}


def config_of(**changes):
    return TrainConfig(**{"text_file": ("t",), "out": "o"} | TINY | changes)


def arguments(**values):
    return [f"--{name}={value}" for name, value in (TINY | values).items()]


def sample_text():
    return (ASSETS / "wiki_vital" / "calibration.txt").read_text("utf-8")[:40_000]
