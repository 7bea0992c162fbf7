"""How the tail turns logits into a token: the options that travel with a session, and what comes back beside the token."""

from __future__ import annotations

from msgspec import Struct

from farflung.core.errors import UsageError

MAX_LOGPROBS = 20
"""Alternatives per token that may be asked for."""

MAX_BIASES = 1024
"""Tokens that one session may bias."""


class SamplingOptions(Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """Options of one generation. Raises UsageError out of range.

    They apply in this order: logit bias, repetition penalty, frequency and presence penalties, temperature, top-k, top-p (over
    what top-k left, renormalised), min-p, draw. The order is vLLM's up to the temperature and that of ``transformers`` after
    it (vLLM takes min-p before top-k). Greedy stops after the penalties.

    An option that is not known here is refused where they are decoded: ignoring it would change the text.

    Attributes:
        temperature: 0 is greedy. In [0, 2] for most texts; at most 100.
        top_k: keep the k tokens with the greatest logits, of equal ones those with the lowest ids; 0 keeps all.
        top_p: keep the smallest set of tokens whose probability reaches this; 1 keeps all.
        min_p: keep the tokens at least this likely, relative to the likeliest one; 0 keeps all.
        repetition_penalty: of every token in the prompt or the output, a positive logit is divided by this, another multiplied
            (CTRL, ``transformers``, vLLM); 1 changes nothing.
        presence_penalty: subtracted from the logit of every token in the output (OpenAI; vLLM: the prompt does not count).
        frequency_penalty: subtracted from the logit of a token for each time it stands in the output (the same).
        logit_bias: (token id, addend) pairs, each id once.
        seed: chooses the noise; the same seed gives the same text (see ``sampling.noise``). 64 bits unsigned.
        choice: index of the choice (OpenAI's ``n``), mixed into the noise.
        logprobs: None, or how many alternatives to report beside each token's log-probability (0: only its own).
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int = 0
    choice: int = 0
    logprobs: int | None = None

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature <= 100.0:
            raise UsageError(f"temperature {self.temperature} is out of range", hint="0 is greedy; 0.7 is usual; at most 100")
        if not 0 <= self.top_k < 2**31:
            raise UsageError(f"top_k {self.top_k} is out of range", hint="0 keeps all tokens; 50 is usual")
        if not 0.0 < self.top_p <= 1.0:
            raise UsageError(f"top_p {self.top_p} is out of range", hint="it lies above 0 and at most at 1")
        if not 0.0 <= self.min_p <= 1.0:
            raise UsageError(f"min_p {self.min_p} is out of range", hint="it lies between 0 and 1; 0.05 is usual")
        if not 0.01 <= self.repetition_penalty <= 100.0:
            raise UsageError(
                f"repetition_penalty {self.repetition_penalty} is out of range",
                hint="1 changes nothing; 1.1 is usual; 0.01 to 100",
            )
        if not -2.0 <= self.presence_penalty <= 2.0:
            raise UsageError(f"presence_penalty {self.presence_penalty} is out of range", hint="it lies between -2 and 2")
        if not -2.0 <= self.frequency_penalty <= 2.0:
            raise UsageError(f"frequency_penalty {self.frequency_penalty} is out of range", hint="it lies between -2 and 2")
        self._check_bias()
        if not 0 <= self.seed < 2**64:
            raise UsageError(f"seed {self.seed} is out of range", hint="it is an unsigned number of 64 bits")
        if not 0 <= self.choice < 2**32:
            raise UsageError(f"choice {self.choice} is out of range")
        if self.logprobs is not None and not 0 <= self.logprobs <= MAX_LOGPROBS:
            raise UsageError(f"logprobs {self.logprobs} is out of range", hint=f"0 to {MAX_LOGPROBS} alternatives per token")

    def _check_bias(self) -> None:
        if len(self.logit_bias) > MAX_BIASES:
            raise UsageError(f"logit_bias names {len(self.logit_bias)} tokens", hint=f"at most {MAX_BIASES}")
        seen: set[int] = set()
        for token, bias in self.logit_bias:
            if not (0 <= token < 2**31 and -100.0 <= bias <= 100.0):
                raise UsageError(f"logit_bias {bias} of token {token} is out of range", hint="a bias lies between -100 and 100")
            if token in seen:
                raise UsageError(f"logit_bias names token {token} twice")
            seen.add(token)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def needs_history(self) -> bool:
        """Whether the next token depends on which tokens came before it (penalties): the tail must be told their ids."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0


class TokenLogprob(Struct, frozen=True, array_like=True):
    """How likely the model itself found a token: natural logarithms of the softmax of its logits as they came.

    Before bias, penalties, temperature and truncation, which is vLLM's default (``raw_logprobs``) and makes the numbers of one
    text comparable whatever it was sampled with.

    Attributes:
        logprob: of the token.
        top: (token id, logprob) of the likeliest tokens, likeliest first, of equal ones the lowest id first; as many as
            ``SamplingOptions.logprobs`` asked for (and the vocabulary has). The token itself need not be among them.
    """

    logprob: float
    top: tuple[tuple[int, float], ...] = ()
