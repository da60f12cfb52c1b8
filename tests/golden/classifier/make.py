"""Makes the golden outputs of classifiers from Hugging Face's Flax models, once.

  PYTHONPATH=.oracle:tests/oracle .venv/bin/python tests/golden/classifier/make.py

`.oracle` is what `make oracle` installs. Writes, beside this file, small random
checkpoints as Hugging Face saves them and `golden.npz`, with keys `<model>/ids`,
`<model>/types`, `<model>/<padding>/logits` and `<model>/<padding>/hidden`. Hidden
states of the embedded checkpoint, `minilm`, are at every 8th coordinate only.
"""

import pathlib
import shutil

import classifier_oracle as oracle
import numpy as np

HERE = pathlib.Path(__file__).parent
ASSETS = HERE.parents[2] / "experiments" / "assets"
PAIR = (
    "A man with a hard hat is dancing to a song that nobody else can hear.",
    "A man wearing a hard hat is dancing.",
)
SINGLE = "it 's a charming and often affecting journey ."


def sentences() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A pair and a shorter single sentence: ids, mask, token types."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(ASSETS / "minilm-glue" / "tokenizer.json"))
    tokenizer.enable_padding(pad_id=0)
    found = tokenizer.encode_batch([PAIR, SINGLE])
    columns = ("ids", "attention_mask", "type_ids")
    ids, mask, types = (
        np.asarray([getattr(e, name) for e in found], np.int32) for name in columns
    )
    return ids, mask, types


def small(name: str, seed: int) -> dict:
    model = oracle.random_model(name, seed)
    directory = HERE / name
    shutil.rmtree(directory, ignore_errors=True)
    # Safetensors with Flax names for one, msgpack for the others.
    model.save_pretrained(directory, safe_serialization=name == "roberta")
    kind, fields = oracle.VARIANTS[name]
    rng = np.random.RandomState(100 + seed)
    ids = rng.randint(3, 61, size=(2, 14))
    has_types = fields.get("type_vocab_size", 2) > 1 and kind == "Bert"
    types = rng.randint(0, 2 if has_types else 1, size=ids.shape)
    result = {f"{name}/ids": ids, f"{name}/types": types}
    for padding in oracle.PADDINGS:
        filled, mask = oracle.padded(ids, padding, oracle.PAD[kind])
        hidden, logits = oracle.outputs(model, filled, mask, types)
        result |= {
            f"{name}/{padding}/hidden": hidden,
            f"{name}/{padding}/logits": logits,
        }
    return result


def main() -> None:
    everything = {}
    for seed, name in enumerate(oracle.VARIANTS):
        everything |= small(name, seed)
    ids, mask, types = sentences()
    everything |= {"minilm/ids": ids, "minilm/mask": mask, "minilm/types": types}
    for head, count in {"mrpc": 2, "sst2": 2, "stsb": 1}.items():
        model = oracle.model_with_head(ASSETS / "minilm-glue", head, count)
        hidden, logits = oracle.outputs(model, ids, mask, types)
        everything[f"minilm/{head}/logits"] = logits
        everything["minilm/hidden"] = hidden[:, :, ::8]
    np.savez_compressed(HERE / "golden.npz", **everything)


if __name__ == "__main__":
    main()
