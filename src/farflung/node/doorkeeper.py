"""Which openings are good here: signed, admitted, for this stage, and in their time. It opens nothing itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from farflung.core.errors import ProtocolViolation
from farflung.core.ids import NodeId, short
from farflung.core.messages import Open, OpenText
from farflung.core.model import LayerRange, ModelSpec
from farflung.identity.keys import verify
from farflung.node.admission import Admission
from farflung.node.opening import Opening
from farflung.protocol.opening import OPEN_CONTEXT, check_newer, check_open, decode_open_text


class Stage(Protocol):
    """What this node serves."""

    @property
    def spec(self) -> ModelSpec: ...

    @property
    def layers(self) -> LayerRange: ...


@dataclass
class Doorkeeper:
    """Attributes:
    me: this node.
    stage: what it serves.
    codecs: what it speaks between stages.
    admission: whose sessions are taken; may be replaced at any time.
    """

    me: NodeId
    stage: Stage
    codecs: frozenset[str]
    admission: Admission

    def read(self, message: Open) -> OpenText:
        """What the owner signed. Raises MalformedFrame, BadSignature."""
        text = decode_open_text(message.text)
        verify(text.owner, message.text, message.signature, context=OPEN_CONTEXT)
        return text

    def check(self, text: OpenText, message: Open) -> Opening:
        """A text that was read, as an opening of this stage. Raises what ``check_open`` raises, and NotAdmitted."""
        index = check_open(text, message.codec, me=self.me, spec=self.stage.spec, layers=self.stage.layers, codecs=self.codecs)
        self.admission.check_open(text)
        return Opening(text, message, index)

    def check_bringer(self, opening: Opening, peer: NodeId) -> None:
        """Raises ProtocolViolation unless ``peer`` is the predecessor."""
        if peer != opening.predecessor_id:
            raise ProtocolViolation(
                f"node {short(peer)} brings an opening that only node {short(opening.predecessor_id)} may bring"
            )

    def goes_on(self, known: Opening, later: Opening) -> bool:
        """Whether a session that is open goes on with a later opening: it is for the same hop. One with a higher epoch of this
        hop begins anew here.

        Raises ProtocolViolation for an older epoch, another codec, or an opening that is about more than the route.
        """
        check_newer(later.text, known.text)
        if later.epoch_in < known.epoch_in:
            raise ProtocolViolation(f"an opening of epoch {later.epoch_in} came for an edge of epoch {known.epoch_in}")
        if later.hop.epoch != known.hop.epoch:
            return False
        if later.message.codec != known.message.codec:
            raise ProtocolViolation(
                f"session {short(known.text.session)} takes rows in {known.message.codec}, not in {later.message.codec[:40]!r}"
            )
        return True
