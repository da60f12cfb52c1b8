"""A language model as lm-evaluation-harness asks one: by tokens, texts and stops.

`HarnessModel` answers in the terms of this library; `template_model` is the thin class
of the harness around it, made when it is asked for, since only then the harness is
imported.

References:
  Gao et al., "The Language Model Evaluation Harness" (2024),
  doi:10.5281/zenodo.12608602.
"""

import dataclasses
import functools
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Int

from kashin_jax.continuations import (
    Question,
    RowScores,
    Score,
    count_cut,
    padded_length,
    row_scores,
    score_continuations,
)
from kashin_jax.errors import UsageError
from kashin_jax.models.generation import generate, stop_tokens
from kashin_jax.models.loading import LoadedModel
from kashin_jax.models.tokenizer import Tokenizer, prefix_token_id
from kashin_jax.progress import progress_bar

__all__ = ["Drawing", "HarnessModel", "cut_at", "read_drawing", "template_model"]

_MOST_NEW = 256
_LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_KNOWN = frozenset(
    {*_LIMITS, "until", "do_sample", "temperature", "top_k", "top_p"}
)  # fmt: skip


class Drawing(NamedTuple):
    """How a task wants its prompts continued.

    Attributes:
      stops: Texts that end a continuation and are no part of it.
      max_new_tokens: At most so many.
      temperature: 0 takes the likeliest token.
      top_k: As `generate` takes it.
      top_p: Likewise.
    """

    stops: tuple[str, ...] = ()
    max_new_tokens: int = _MOST_NEW
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None


def read_drawing(arguments: Mapping[str, Any]) -> Drawing:
    """What a task's `generation_kwargs` ask for.

    Raises:
      UsageError: If they ask for what is not done here; the message names it.
    """
    if unknown := sorted(set(arguments) - _KNOWN):
        raise UsageError(
            f"`generation_kwargs` of the task: `{unknown[0]}` is not known here; leave "
            f"it out. There are {', '.join(sorted(_KNOWN))}."
        )
    until = arguments.get("until") or []
    stops = tuple([until] if isinstance(until, str) else until)
    limits = [arguments[name] for name in _LIMITS if arguments.get(name) is not None]
    limit = int(limits[0]) if limits else _MOST_NEW
    temperature = float(arguments.get("temperature") or 0.0)
    draws = arguments.get("do_sample", temperature > 0)
    if not draws:
        return Drawing(tuple(filter(None, stops)), limit)
    return Drawing(
        stops=tuple(filter(None, stops)),
        max_new_tokens=limit,
        temperature=temperature or 1.0,
        top_k=arguments.get("top_k"),
        top_p=arguments.get("top_p"),
    )


def cut_at(text: str, stops: Sequence[str]) -> str:
    """The text before the first of the stops in it."""
    return text[: min([text.find(s) for s in stops if s in text], default=len(text))]


@dataclasses.dataclass(frozen=True, kw_only=True)
class HarnessModel:
    """A loaded model, and how much of a text it reads at a time.

    Attributes:
      loaded: Packed or dense.
      tokenizer: Of the model; its `bos_id` stands in front of contexts.
      max_length: Tokens that are read at a time; contexts lose what is before them.
      batch_size: Rows at a time.
    """

    loaded: LoadedModel
    tokenizer: Tokenizer
    max_length: int
    batch_size: int

    @functools.cached_property
    def ends(self) -> tuple[int, ...]:
        """Tokens that end a text."""
        return stop_tokens(self.loaded.directory, self.loaded.config)

    @functools.cached_property
    def prefix(self) -> int:
        """The token that stands in for a missing context.

        Raises:
          UsageError: If no file of the checkpoint names one.
        """
        found = prefix_token_id(self.loaded.directory, self.tokenizer)
        if found is None:
            raise UsageError(
                f"{self.loaded.directory}: names no token that begins or ends a text, "
                "which an empty context needs; give one by `--bos`."
            )
        return found

    def encode(self, text: str, add_bos: bool | None = None) -> list[int]:
        """Tokens of a text, behind the one that begins it unless it is there.

        Args:
          text: May be empty.
          add_bos: False adds none; None and True what the model expects.
        """
        ids, bos = self.tokenizer.encode(text).tolist(), self.tokenizer.bos_id
        if bos is None or add_bos is False or ids[:1] == [bos]:
            return ids
        return [bos, *ids]

    def score(self, questions: Sequence[Question]) -> list[Score]:
        """Scores continuations; without a context they follow `prefix`.

        Raises:
          DataError: As `score_continuations`.
        """
        asked = [Question(c or [self.prefix], target) for c, target in questions]
        if count := count_cut(asked, self.max_length):
            print(
                f"{count} of {len(asked)} contexts lose their beginning: the model "
                f"reads {self.max_length} tokens at a time.",
                file=sys.stderr,
            )
        graphdef, state = nnx.split(self.loaded.model)
        return score_continuations(
            functools.partial(_score_rows, graphdef, state),
            asked,
            max_length=self.max_length,
            batch_size=self.batch_size,
        )

    def continue_texts(
        self, prompts: Sequence[str], drawings: Sequence[Drawing]
    ) -> list[str]:
        """Continues every prompt as its drawing says.

        Prompts are padded in front to a few lengths, and lose their beginning where
        they leave no room for the new tokens.

        Raises:
          UsageError: If new tokens leave no room for a prompt.
        """
        found = [""] * len(prompts)
        todo: dict[tuple[Drawing, int], list[tuple[int, list[int]]]] = {}
        for index, (prompt, drawing) in enumerate(zip(prompts, drawings, strict=True)):
            room = self._room(drawing)
            ids = (self.encode(prompt) or [self.prefix])[-room:]
            length = padded_length(len(ids), room)
            todo.setdefault((drawing, length), []).append((index, ids))
        with progress_bar(len(prompts), "prompts", desc="continuations") as bar:
            for (drawing, length), rows in todo.items():
                holding = self._holding(drawing.stops)
                for first in range(0, len(rows), self.batch_size):
                    batch = rows[first : first + self.batch_size]
                    key = jax.random.fold_in(jax.random.key(0), batch[0][0])
                    new = self._continue(batch, drawing, holding, length, key)
                    for (index, _), tokens in zip(batch, new, strict=False):
                        found[index] = self._text(tokens, holding, drawing.stops)
                    bar.update(len(batch))
        return found

    def _room(self, drawing: Drawing) -> int:
        if (room := self.max_length - drawing.max_new_tokens) < 1:
            raise UsageError(
                f"A task wants {drawing.max_new_tokens} new tokens of a model that "
                f"reads {self.max_length} at a time, which leaves none for a prompt; "
                "lower the task's `max_gen_toks` or raise `--context`."
            )
        return room

    def _continue(
        self,
        batch: Sequence[tuple[int, list[int]]],
        drawing: Drawing,
        holding: Sequence[int],
        length: int,
        key: Array,
    ) -> Int[np.ndarray, "b new"]:
        """New tokens; rows that the batch lacks repeat its last."""
        ids = np.zeros((self.batch_size, length), np.int32)
        mask = np.zeros_like(ids)
        for i in range(self.batch_size):
            row = batch[min(i, len(batch) - 1)][1]
            ids[i, length - len(row) :], mask[i, length - len(row) :] = row, 1
        tokens = generate(
            self.loaded.model,
            jnp.asarray(ids),
            attention_mask=jnp.asarray(mask),
            max_new_tokens=drawing.max_new_tokens,
            temperature=drawing.temperature,
            top_k=drawing.top_k,
            top_p=drawing.top_p,
            key=key,
            eos_token_id=[*self.ends, *holding],
        )
        return np.asarray(tokens)[:, length:]

    def _holding(self, stops: Sequence[str]) -> list[int]:
        """Tokens that end a continuation since a stop is in their text.

        Stops that several tokens make are found when all is written.
        """
        return [
            i for i, text in enumerate(self._texts) if any(s in text for s in stops)
        ]

    @functools.cached_property
    def _texts(self) -> list[str]:
        ids = np.arange(self.tokenizer.vocab_size, dtype=np.int32)
        return [self.tokenizer.decode(ids[i : i + 1]) for i in ids]

    def _text(
        self,
        tokens: Int[np.ndarray, " new"],
        holding: Sequence[int],
        stops: Sequence[str],
    ) -> str:
        """What was written before anything that ends it."""
        (ends,) = np.nonzero(np.isin(tokens, self.ends))
        (holds,) = np.nonzero(np.isin(tokens, holding))
        # In front of a stop its token may have text; behind that token is filling.
        last = min([*ends[:1], *(holds[:1] + 1)], default=tokens.size)
        return cut_at(self.tokenizer.decode(tokens[:last], skip_special=True), stops)


# One compilation per shape for all models of equal structure.
@functools.partial(jax.jit, static_argnums=0)
def _score_rows(
    graphdef: Any,
    state: Any,
    tokens: Int[Array, "b t"],
    positions: Int[Array, "b t"],
    targets: Int[Array, "b t"],
) -> RowScores:
    return row_scores(nnx.merge(graphdef, state)(tokens), positions, targets)


def template_model(model: HarnessModel) -> Any:
    """The model as an `lm_eval.api.model.TemplateLM`.

    Of a text without context it scores every token but one that begins the text, each
    once, given the tokens in front as far as a window has them.
    """
    from lm_eval.api.model import TemplateLM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    class KashinLM(TemplateLM):
        @property
        def eot_token_id(self) -> int:
            return model.ends[0] if model.ends else model.prefix

        @property
        def prefix_token_id(self) -> int:
            return model.prefix

        def tok_encode(
            self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
        ) -> list[int]:
            return model.encode(string, add_special_tokens)

        def _loglikelihood_tokens(
            self, requests: Sequence[tuple[Any, list[int], list[int]]], **kwargs: Any
        ) -> list[tuple[float, bool]]:
            scores = model.score([Question(*tokens) for _, *tokens in requests])
            return [(score.log_likelihood, score.is_greedy) for score in scores]

        def loglikelihood_rolling(
            self, requests: Sequence[Any], disable_tqdm: bool = False
        ) -> list[float]:
            questions, of_request = [], []
            for index, request in enumerate(requests):
                for window in get_rolling_token_windows(
                    model.encode(request.args[0], False),
                    prefix_token=model.prefix,
                    max_seq_len=model.max_length,
                    context_len=1,
                ):
                    questions.append(Question(*make_disjoint_window(window)))
                    of_request.append(index)
            totals = [0.0] * len(requests)
            for index, score in zip(of_request, model.score(questions), strict=True):
                totals[index] += score.log_likelihood
            return totals

        def generate_until(
            self, requests: Sequence[Any], disable_tqdm: bool = False
        ) -> list[str]:
            prompts, arguments = zip(*(r.args for r in requests), strict=True)
            return model.continue_texts(prompts, [*map(read_drawing, arguments)])

    return KashinLM()
