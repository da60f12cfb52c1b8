"""Published perplexities of OPT, to stand beside ours where the protocol is the same.

WikiText-2 in the GPTQ protocol (rows joined by blank lines, windows of 2048). Sources:
full precision and RTN g128 from OmniQuant (arXiv 2308.13137), appendix; RTN per
channel, and everything of 350m, from GPTQ (arXiv 2210.17323).
"""

from experiments.methods import FULL_PRECISION

__all__ = ["published_perplexity"]

_SIZES = ("125m", "350m", "1.3b", "2.7b", "6.7b")
_GPTQ_WIKITEXT2: dict[tuple[str, int], tuple[float | None, ...]] = {
    (FULL_PRECISION, 16): (27.65, 22.00, 14.62, 12.47, 10.86),
    ("rtn-channel", 4): (37.28, 25.94, 48.17, 16.92, 12.10),
    ("rtn-g128", 4): (30.47, None, 15.29, 13.02, 11.15),
    ("rtn-channel", 3): (1.2e3, 64.57, 1.3e4, 1.6e4, 5.8e3),
    ("rtn-g128", 3): (51.22, None, 119.0, 298.0, 23.54),
}


def published_perplexity(
    model: str, dataset: str, context: int, tokens_limited: bool, method: str, bits: int
) -> float | None:
    """The published value, or None where there is none for exactly this protocol."""
    size = model.rsplit("/", 1)[-1].removeprefix("opt-")
    row = _GPTQ_WIKITEXT2.get((method, bits))
    if dataset != "wikitext2-gptq" or context != 2048 or tokens_limited or row is None:
        return None
    return row[_SIZES.index(size)] if size in _SIZES else None
