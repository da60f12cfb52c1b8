"""Chat templates: how a model was taught to be told who said what.

A template is a program of whoever published the checkpoint. It runs in Jinja's sandbox,
as it does in transformers, and reaches nothing but the messages.
"""

import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from kashin_jax.errors import CheckpointError, UsageError
from kashin_jax.io import read_json

__all__ = ["chat_prompt"]

_CONFIG = "tokenizer_config.json"


def chat_prompt(directory: str | Path, messages: Sequence[Mapping[str, str]]) -> str:
    """A conversation as text, up to where the model's answer begins.

    The text has all special tokens in it: nothing is to be put in front.

    Args:
      directory: A checkpoint directory, such as `LoadedModel.directory`; the template
        is `chat_template.jinja`, or in `tokenizer_config.json`.
      messages: Each with a `role`, such as "user", and its `content`.

    Raises:
      UsageError: If there is no template, or Jinja is not installed.
      CheckpointError: If the template has an error, or refuses the messages.
    """
    directory = Path(directory)
    path = directory / _CONFIG
    config = read_json(path) if path.is_file() else {}
    template, source = _template(directory, config)
    environment = _environment()
    try:
        text: str = environment.from_string(template).render(
            messages=list(messages), add_generation_prompt=True, **_tokens(config)
        )
    # A stranger's program: it may fail in any way.
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(
            f"{source}: the chat template fails ({reason}); repair it, or leave out "
            "`--chat`."
        ) from error
    return text


def _template(directory: Path, config: Mapping[str, Any]) -> tuple[str, Path]:
    """The template, and where it is from; of several the one called default."""
    if (path := directory / "chat_template.jinja").is_file():
        return path.read_text("utf-8"), path
    found, path = config.get("chat_template"), directory / _CONFIG
    if isinstance(found, list):
        named = [each for each in found if isinstance(each, Mapping)]
        templates = {each.get("name"): each.get("template") for each in named}
        found = templates.get("default")
    if not isinstance(found, str):
        raise UsageError(
            f"{directory}: has no chat template; leave out `--chat`, or add "
            "`chat_template.jinja`."
        )
    return found, path


def _tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """Special tokens by the names that templates know them by."""
    found = {}
    for name, value in config.items():
        text = value.get("content") if isinstance(value, Mapping) else value
        if name.endswith("_token") and isinstance(text, str):
            found[name] = text
    return found


def _environment() -> Any:
    try:
        from jinja2.ext import Extension, loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError as error:
        raise UsageError(
            "A chat template needs `jinja2`; run: pip install 'kashin_jax[cli]'"
        ) from error

    class Generation(Extension):
        """Marks what the model is to learn, `{% generation %}`; nothing to us."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = _as_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = _now
    return environment


def _as_json(value: Any, indent: int | None = None) -> str:
    """Plain JSON, where Jinja's own would escape it for a web page."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _refuse(message: str) -> NoReturn:
    raise ValueError(message)


def _now(form: str) -> str:
    return datetime.datetime.now().strftime(form)
