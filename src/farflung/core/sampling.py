"""How the tail turns logits into a token: the options that travel with a session."""

from __future__ import annotations

from msgspec import Struct

from farflung.core.errors import UsageError


class SamplingOptions(Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """Options of one generation; the meaning of each is OpenAI's. Raises UsageError out of range.

    An option that is not known here is refused where they are decoded: ignoring it would change the text.

    Attributes:
        temperature: 0 is greedy. In [0, 2] for most texts; at most 100.
        top_p: keep the smallest set of tokens whose probability reaches this; 1 keeps all.
        seed: chooses the noise; the same seed gives the same text (see ``sampling.noise``). 64 bits unsigned.
        choice: index of the choice (OpenAI's ``n``), mixed into the noise.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    choice: int = 0

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature <= 100.0:
            raise UsageError(f"temperature {self.temperature} is out of range", hint="0 is greedy; 0.7 is usual; at most 100")
        if not 0.0 < self.top_p <= 1.0:
            raise UsageError(f"top_p {self.top_p} is out of range", hint="it lies above 0 and at most at 1")
        if not 0 <= self.seed < 2**64:
            raise UsageError(f"seed {self.seed} is out of range", hint="it is an unsigned number of 64 bits")
        if not 0 <= self.choice < 2**32:
            raise UsageError(f"choice {self.choice} is out of range")

    @property
    def needs_history(self) -> bool:
        """Whether an option looks back at the text, so that token ids must reach the tail."""
        return False

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0


class TokenLogprob(Struct, frozen=True, array_like=True):
    """Natural log-probability of a sampled token, and the most likely tokens at its place.

    Attributes:
        logprob: of the sampled token.
        top: (token id, log-probability), the most likely first.
    """

    logprob: float
    top: tuple[tuple[int, float], ...] = ()
