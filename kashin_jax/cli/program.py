"""Command line: `kashin quantize`, `refine`, `inspect`, `eval` and so on."""

import argparse
import io
import json
import math
import os
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from kashin_jax.errors import UsageError
from kashin_jax.interrupts import no_interrupt_is_lost
from kashin_jax.version import library_version

__all__ = [
    "Methods",
    "main",
    "read_bits",
    "read_count",
    "read_none_or_more",
    "read_probability",
    "read_seed",
    "read_setting",
    "read_share",
    "read_size",
    "read_temperature",
]

_EPILOGUE = """\
Exit codes: 0 done; 1 a file or its content is unusable; 2 wrong use; 130 interrupted
(an interrupted `quantize` or `refine` goes on where it was when it is repeated).
"""


_SOURCE = "directory, GGUF file, or id on the hub"


class _Parser(argparse.ArgumentParser):
    """A parser whose help may end in something that takes time to find out."""

    ending: Callable[[], str] | None = None

    def format_help(self) -> str:
        """The help; argparse asks for it only when it is to be printed."""
        ending = "" if self.ending is None else f"\n{self.ending()}\n"
        return super().format_help() + ending


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs `kashin`; returns the exit code.

    Args:
      arguments: Without the program's name; those of the process when None.
    """
    parser = _parser()
    try:
        options = parser.parse_args(arguments)
    except SystemExit as end:
        return int(end.code or 0)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # Names and texts may hold what a terminal cannot show.
            stream.reconfigure(errors="backslashreplace")
    try:
        with no_interrupt_is_lost():
            code = _run(options)
        # Here rather than at exit, where nobody catches what goes wrong.
        sys.stdout.flush()
    except KeyboardInterrupt:
        print(f"kashin {options.command}: interrupted.", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output has had enough; Python would flush once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError) as error:
        # Messages of other libraries, which some errors quote, have several lines.
        text = " ".join(str(error).split())
        print(f"kashin {options.command}: {text}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    return code


def _run(options: argparse.Namespace) -> int:
    # Late, so that `--help` and wrong use need not wait for JAX and the models.
    from kashin_jax.cli import commands

    values = vars(options).copy()
    run: Callable[..., int] = getattr(commands, f"run_{values.pop('command')}")
    return run(**values)


def _parser() -> _Parser:
    parser = _Parser(
        prog="kashin",
        description="Quantizes checkpoints by Kashin's and other methods.",
        epilog=_EPILOGUE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    version = library_version()
    parser.add_argument("--version", action="version", version=version)
    commands = parser.add_subparsers(dest="command", required=True)
    for add in (_quantize, _refine, _inspect, _dequantize, _eval, _generate):
        add(commands)
    return parser


def _quantize(commands: Any) -> None:
    parser: _Parser = commands.add_parser(
        "quantize",
        help="quantize a checkpoint, tensor by tensor",
        description="Quantizes SRC, a checkpoint in Hugging Face's layout (safetensors "
        "or flax_model.msgpack) or a GGUF file of the kind of Llama or Qwen (needs the "
        "extra `gguf`), into DST. Repeat the same command to go on after an "
        "interruption.",
    )
    parser.add_argument("src", metavar="SRC", help=_SOURCE)
    parser.add_argument("dst", metavar="DST", help="directory, which is made")
    _add_choices(parser)
    parser.add_argument(
        "--seed", type=read_seed, default=0, help="of everything random; default: 0"
    )
    parser.add_argument(
        "--max-shard-size",
        type=read_size,
        default="5GB",
        metavar="SIZE",
        help="bytes of a file of weights, such as 500MB; default: 5GB",
    )
    parser.add_argument(
        "--calibration",
        metavar="FILE",
        help="UTF-8 text that says which errors matter, for models that run here: much "
        "less is lost, at 2 bits most of all. Classifiers read a line as an example, "
        "with a tab between the texts of a pair. Needs the extra `cli`",
    )
    _add_calibration_tokens(parser)
    parser.add_argument(
        "--calibration-weighting",
        choices=("none", "gradient", "outputs"),
        default="none",
        help="what an error weighs: all the same; at every token, the squared gradient "
        "of the loss with respect to a layer's outputs; or, for joint coding, at every "
        "output, the second moments of that gradient, which loses least; default: none",
    )
    parser.add_argument(
        "--calibration-asymmetric",
        action="store_true",
        help="code layers for what they would give in full precision, from what they "
        "read behind quantized layers: less is lost, in twice the passes",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print the plan and write nothing"
    )
    _add_replacing(parser)


def _add_replacing(parser: _Parser) -> None:
    again = parser.add_mutually_exclusive_group()
    again.add_argument(
        "--force",
        action="store_true",
        help="replace a finished checkpoint in DST, with all files there",
    )
    again.add_argument(
        "--restart",
        action="store_true",
        help="remove an unfinished run in DST, whatever its flags, and begin anew",
    )


def _add_calibration_tokens(parser: _Parser) -> None:
    parser.add_argument(
        "--calibration-tokens",
        type=read_count,
        metavar="N",
        help="tokens of it to use, drawn in windows by the seed; default: 131072",
    )


def _refine(commands: Any) -> None:
    parser: _Parser = commands.add_parser(
        "refine",
        help="let what decodes the codes of a quantized model learn from a text",
        description="Writes SRC, a quantized language model, into DST with the same "
        "codes and stored bits. Its scales, levels, biases and norms have learned from "
        "a text and from ORIGINAL, the model that it was quantized from: block by "
        "block and then end to end. Repeat the same command to go on after an "
        "interruption. Needs the extra `cli`.",
    )
    parser.add_argument("src", metavar="SRC", help="directory, or id on the hub")
    parser.add_argument("original", metavar="ORIGINAL", help=_SOURCE)
    parser.add_argument("dst", metavar="DST", help="directory, which is made")
    parser.add_argument(
        "--calibration", metavar="FILE", required=True, help="UTF-8 text"
    )
    _add_calibration_tokens(parser)
    parser.add_argument(
        "--block-epochs",
        type=read_none_or_more,
        help="passes in which blocks learn, one after the other",
    )
    parser.add_argument(
        "--epochs", type=read_none_or_more, help="passes in which all learn end to end"
    )
    parser.add_argument(
        "--text-weight",
        type=read_share,
        help="share of the text's own tokens in the loss end to end; the rest is the "
        "distance from ORIGINAL's predictions",
    )
    parser.add_argument(
        "--seed", type=read_seed, default=0, help="of windows and order; default: 0"
    )
    _add_replacing(parser)


def _add_choices(parser: _Parser) -> None:
    """Flags that say which method a layer is quantized by."""
    parser.add_argument(
        "--bits",
        type=read_bits,
        help="code width; the method's own when left out. Joint coding has 2 to 5 in "
        "steps of a half, and takes any other number between, 2.7 say, as the stored "
        "bits of all layers together: each gets the width that suits it",
    )
    parser.add_argument(
        "--method",
        choices=Methods(),
        # In place of the choices: usage is printed for every wrong use.
        metavar="METHOD",
        help="one of those named below; default: the first",
    )
    # Names can be copied from it: no hyphen is taken for the place to break a line.
    parser.ending = lambda: textwrap.fill(
        f"Methods: {', '.join(Methods())}.", 79, break_on_hyphens=False
    )
    parser.add_argument(
        "--set",
        dest="settings",
        action="append",
        default=[],
        type=read_setting,
        metavar="FIELD=VALUE",
        help="another field of the method, such as effort=fast, group_size=64, "
        "block_shape=[32,64] or basis=haar; may be repeated",
    )
    parser.add_argument(
        "--rules",
        metavar="FILE",
        help="JSON with rules for single layers: a list of objects with `pattern` and "
        "`skip` or fields of a method; docs/guides/rules.md has every field",
    )
    parser.add_argument(
        "--skip",
        action="append",
        default=[],
        metavar="REGEX",
        help="leave layers in full precision, beside embeddings, heads and norms; may "
        "be repeated",
    )


def _inspect(commands: Any) -> None:
    parser: _Parser = commands.add_parser(
        "inspect",
        help="list tensors, stored bits and errors, and verify hashes",
        description="Lists the tensors of a checkpoint, their stored bits and errors, "
        "and verifies hashes. Exit code 1 if a file has changed since it was written.",
    )
    parser.add_argument("src", metavar="SRC", help=_SOURCE)
    parser.add_argument(
        "--no-verify", dest="verify", action="store_false", help="verify no hashes"
    )
    parser.add_argument(
        "--json", dest="as_json", action="store_true", help="print a JSON object"
    )


def _dequantize(commands: Any) -> None:
    parser: _Parser = commands.add_parser(
        "dequantize",
        help="decode a quantized checkpoint to its original layout",
        description="Decodes SRC, a quantized checkpoint, into DST: the names, shapes "
        "and types that it had before, for any program.",
    )
    parser.add_argument("src", metavar="SRC", help="directory, or id on the hub")
    parser.add_argument("dst", metavar="DST", help="directory, which is made")
    parser.add_argument(
        "--max-shard-size",
        type=read_size,
        metavar="SIZE",
        help="bytes of a file of weights, such as 500MB; default: the files that the "
        "original had",
    )


def _eval(commands: Any) -> None:
    parser: _Parser = commands.add_parser(
        "eval",
        help="perplexity of a language model on a text, or its scores on benchmarks",
        description="Prints the perplexity of a model, quantized or not, and its bits "
        "per UTF-8 byte, on a text, which is cut into windows; or its scores on tasks "
        "of lm-evaluation-harness. Needs the extra `cli`, and `eval` for tasks.",
    )
    parser.add_argument("src", metavar="SRC", help=_SOURCE)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--text", metavar="FILE", help="UTF-8 text")
    what.add_argument(
        "--tasks",
        metavar="NAMES",
        help="list of tasks, such as lambada_openai,arc_easy; their data come from the "
        "hub, or from where the task's file says",
    )
    parser.add_argument(
        "--tasks-dir",
        metavar="DIR",
        help="folder with more tasks, as YAML files of lm-evaluation-harness",
    )
    parser.add_argument(
        "--num-fewshot", type=read_none_or_more, help="solved examples in front of each"
    )
    parser.add_argument(
        "--limit", type=read_count, help="only so many examples of each task"
    )
    parser.add_argument(
        "--max-tokens",
        type=read_count,
        help="only so many of a text, from the first on",
    )
    parser.add_argument(
        "--context",
        type=read_count,
        help="tokens of a window, of tasks too; when left out, as many as the model "
        "was trained at, if the checkpoint says so, else 2048 or as many as it has "
        "positions for",
    )
    parser.add_argument(
        "--stride",
        type=read_count,
        help="tokens between the beginnings of two windows; when left out they do not "
        "overlap, and all but the first token of each are predicted",
    )
    parser.add_argument(
        "--bos",
        default="auto",
        metavar="TOKEN",
        help="what a text begins with: auto, the default, for what the tokenizer's "
        "files say, none, or a token such as <s>",
    )
    parser.add_argument(
        "--batch-size", type=read_count, default=4, help="windows at a time"
    )
    parser.add_argument(
        "--json", dest="as_json", action="store_true", help="print a JSON object"
    )


def _generate(commands: Any) -> None:
    parser: _Parser = commands.add_parser(
        "generate",
        help="continue a text with a language model, quantized or not",
        description="Prints a text and its continuation, up to a token that ends it. "
        "Needs the extra `cli`.",
    )
    parser.add_argument("src", metavar="SRC", help=_SOURCE)
    parser.add_argument("prompt", help="the text to continue")
    parser.add_argument(
        "--chat",
        action="store_true",
        help="the text is a message: apply the chat template, print the answer alone",
    )
    parser.add_argument(
        "--max-new-tokens", type=read_count, default=50, help="at most; default: 50"
    )
    parser.add_argument(
        "--temperature",
        type=read_temperature,
        default=0.0,
        help="0, the default, takes the likeliest token; higher ones draw more freely",
    )
    parser.add_argument(
        "--top-k",
        type=read_count,
        help="draw from so many of the likeliest tokens; needs a temperature",
    )
    parser.add_argument(
        "--top-p",
        type=read_probability,
        help="draw from the likeliest tokens that together have this probability; "
        "needs a temperature",
    )
    parser.add_argument(
        "--seed", type=read_seed, default=0, help="of what is drawn; default: 0"
    )


_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "B": 1, "": 1}


class Methods:
    """Names of all methods that are registered when somebody asks for them.

    Knowing them takes JAX, which other uses of the command need not wait for.
    """

    def __iter__(self) -> Iterator[str]:
        # Here rather than above: importing it imports JAX.
        from kashin_jax.methods import method_names

        return iter(method_names())

    def __contains__(self, name: object) -> bool:
        return name in tuple(self)


def read_bits(text: str) -> int | float:
    """A positive number; a whole one as an integer."""
    value = _positive(text, "a number of bits such as 4 or 3.5")
    return int(value) if value == int(value) else value


def read_size(text: str) -> int:
    """Bytes of `500MB` and the like, in powers of ten."""
    expected = "a size such as 500MB"
    unit = next(unit for unit in _UNITS if text.upper().endswith(unit))
    size = _number(text[: len(text) - len(unit)]) * _UNITS[unit]
    if not 1 <= size < 2**63:
        raise _refused(text, expected)
    return int(size)


def read_count(text: str) -> int:
    """A whole number of at least 1."""
    return _whole(text, 1, 2**31)


def read_none_or_more(text: str) -> int:
    """A whole number of at least 0."""
    return _whole(text, 0, 2**31)


def read_seed(text: str) -> int:
    """A whole number of 32 bits."""
    return _whole(text, 0, 2**32)


def read_setting(text: str) -> tuple[str, Any]:
    """A field and its value, `effort=fast`; values are JSON, or else text."""
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise _refused(text, "a field and a value such as effort=fast")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def read_temperature(text: str) -> float:
    """A number that is not negative."""
    return 0.0 if _number(text) == 0 else _positive(text, "0 or more")


def read_probability(text: str) -> float:
    """A number above 0, at most 1."""
    expected = "a probability above 0, at most 1"
    if (value := _positive(text, expected)) > 1:
        raise _refused(text, expected)
    return value


def read_share(text: str) -> float:
    """A number from 0 to 1."""
    if not 0 <= (value := _number(text)) <= 1:
        raise _refused(text, "a share from 0 to 1")
    return value


def _whole(text: str, low: int, end: int) -> int:
    expected = f"a whole number from {low} to {end - 1}"
    try:
        value = int(text)
    except ValueError:
        raise _refused(text, expected) from None
    if not low <= value < end:
        raise _refused(text, expected)
    return value


def _positive(text: str, expected: str) -> float:
    value = _number(text)
    if not 0 < value < math.inf:
        raise _refused(text, expected)
    return value


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def _refused(text: str, expected: str) -> argparse.ArgumentTypeError:
    return argparse.ArgumentTypeError(f"{text[:40]!r} is not {expected}")
