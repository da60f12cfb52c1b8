"""The small golden decoders, one of every family and kind of rope."""

import importlib.util
import pathlib
import shutil

GOLDEN = pathlib.Path(__file__).parent / "golden" / "decoder"
_spec = importlib.util.spec_from_file_location("make_decoders", GOLDEN / "make.py")
make = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(make)


def checkpoint(variant, directory):
    """The directory of a variant; made of its family's weights for a kind of rope."""
    if variant in make.FAMILIES:
        return GOLDEN / variant
    weights = GOLDEN / make.family_of(variant) / "model.safetensors"
    shutil.copy(weights, directory)
    make.write_config(variant, directory)
    return directory
