"""Makes the golden OPT outputs from Hugging Face's Flax models, once.

  PYTHONPATH=.oracle:tests/oracle .venv/bin/python tests/golden/opt/make.py

`.oracle` is what `make oracle` installs. Writes, beside this file, small random
checkpoints as Hugging Face saves them and `golden.npz`, with keys `<model>/ids`,
`<model>/<padding>/logits` and `<model>/greedy`. Logits of the embedded checkpoint,
`wiki`, are at every 8th position and every 16th token only; its ids are those of the
file that is there, since their text, the beginning of WikiText-2's test file, is not
in the repository.
"""

import pathlib
import shutil

import numpy as np
import opt_oracle as oracle

HERE = pathlib.Path(__file__).parent
ASSETS = HERE.parents[2] / "experiments" / "assets"
NEW_TOKENS = 12


def wiki_ids() -> np.ndarray:
    with np.load(HERE / "golden.npz") as golden:
        return golden["wiki/ids"]


def outputs(name: str, model, ids: np.ndarray, positions: slice, tokens: slice) -> dict:
    left = oracle.padding_mask(ids.shape, "left")
    result = {
        f"{name}/ids": ids,
        f"{name}/greedy": oracle.greedy(model, ids, left, NEW_TOKENS),
    }
    for padding in oracle.PADDINGS:
        values = oracle.logits(model, ids, oracle.padding_mask(ids.shape, padding))
        result[f"{name}/{padding}/logits"] = values[:, positions, tokens]
    return result


def main() -> None:
    everything = {}
    for seed, name in enumerate(oracle.VARIANTS):
        model = oracle.random_model(name, seed)
        directory = HERE / name
        shutil.rmtree(directory, ignore_errors=True)
        # Safetensors with Flax names for one, msgpack for the others.
        model.save_pretrained(directory, safe_serialization=name == "untied")
        (directory / "generation_config.json").unlink(missing_ok=True)
        ids = np.random.RandomState(100 + seed).randint(3, 61, size=(2, 14))
        everything |= outputs(name, model, ids, slice(None), slice(None))
    model = oracle.pretrained_model(ASSETS / "opt-wiki-18m")
    ids = wiki_ids()
    everything |= outputs("wiki", model, ids, slice(None, None, 8), slice(0, None, 16))
    np.savez_compressed(HERE / "golden.npz", **everything)


if __name__ == "__main__":
    main()
