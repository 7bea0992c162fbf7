"""Another node takes the place of a stage in the middle of a generation: only the edges beside it are renewed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import pytest
from models import tiny_model
from virtual_swarm import START_UNIX_S, World, WorldConfig, seeded_identity, world

from farflung.core.errors import FarflungError
from farflung.core.ids import NodeId, SessionId
from farflung.core.messages import Answer, Attach, Close, Message, Open, OpenText, Window
from farflung.core.route import Hop, Route
from farflung.core.sampling import SamplingOptions
from farflung.core.window import Commit, SlotRun, SlotSpan
from farflung.lab.virtual_clock import run_virtual
from farflung.protocol.opening import OPEN_CONTEXT, encode_open_text
from farflung.session.options import GenerateOptions
from farflung.transport.link import Frame, Link, Priority

PROMPT = tuple(range(5, 45))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("llama", tmp_path_factory.mktemp("llama"), layers=6)


@dataclass
class Owner:
    """A driver by hand: raw links to the stages, one channel each."""

    made: World
    links: dict[NodeId, Link] = field(default_factory=dict)
    channels: dict[NodeId, int] = field(default_factory=dict)
    answers: asyncio.Queue[tuple[NodeId, Answer]] = field(default_factory=asyncio.Queue)

    identity = seeded_identity(77)
    session = SessionId("ab" * 16)

    def on_frame(self, link: Link, channel: int, frame: Frame) -> None:
        if isinstance(frame.message, Answer):
            self.answers.put_nowait((link.peer, frame.message))

    def on_lost(self, link: Link, error: FarflungError) -> None:
        del self.links[link.peer]

    def send(self, node_id: NodeId, message: Message, *buffers: bytes) -> None:
        self.links[node_id].send(self.channels[node_id], Frame(message, buffers), Priority.DECODE)

    async def next_token(self, first: NodeId, tail: NodeId, sent: Window, tokens: list[int] | tuple[int, ...]) -> int:
        """The token after the window's wanted row, as that tail answers it."""
        self.send(first, sent, in_bytes(tuple(tokens)))
        (wanted,) = sent.want
        async with asyncio.timeout(5):
            while True:
                by, answer = await self.answers.get()
                slots = [slot for span in answer.slots for slot in span]
                if by == tail and wanted.first in slots:
                    return answer.tokens[slots.index(wanted.first)]

    def opening(self, route: Route) -> Open:
        text = encode_open_text(
            OpenText(
                session=self.session,
                owner=self.identity.node_id,
                route=route,
                lease_tokens=len(PROMPT) + 24,
                lease_s=60.0,
                expires_unix_s=START_UNIX_S + 100,
                digest=self.made.spec.digest,
                codecs=("fp32",),
                sampling=SamplingOptions(),
                prompt_tokens=len(PROMPT),
                max_tokens=24,
            )
        )
        return Open(text, self.identity.sign(text, context=OPEN_CONTEXT))


@asynccontextmanager
async def owner_of(made: World) -> AsyncGenerator[Owner, None]:
    owner = Owner(made)
    transport = made.network.endpoint(owner.identity.node_id)
    for node in made.nodes:
        link = owner.links[node.node_id] = await transport.dial(node.node_id, [node.listen])
        owner.channels[node.node_id] = link.new_channel()
        link.start(owner)
    yield owner
    await transport.close()


def window(first: int, count: int, epoch: int = 1) -> Window:
    committed = (SlotSpan(first, count),)
    last = first + count - 1
    return Window(epoch, (SlotRun(first, count, first - 1),), (SlotSpan(last, 1),), Commit(first, committed), first + count)


def in_bytes(tokens: tuple[int, ...]) -> bytes:
    return b"".join(token.to_bytes(4, "little") for token in tokens)


@pytest.mark.parametrize("dies", [True, False], ids=["dead", "alive"])
@pytest.mark.parametrize("victim", [0, 1, 2])
def test_another_node_takes_a_stage_in_mid_generation_and_no_token_changes(model: Path, victim: int, *, dies: bool) -> None:
    """The owner sends the stage before it a newer opening; whether or not the old node still lives, only the edges beside it
    are renewed, and the stages that stay keep what they hold."""

    async def run() -> list[int]:
        async with world(WorldConfig(model=model, cuts=(2, 4), replicas=2)) as made, owner_of(made) as owner:
            old, stands_in = made.nodes[:3], made.nodes[3 + victim]
            hops = [Hop(node.node_id, backend.layers) for node, backend in zip(old, made.backends, strict=False)]
            first, tail = old[0].node_id, old[2].node_id
            owner.send(first, owner.opening(Route(tuple(hops))))
            for node in old[1:]:
                owner.send(node.node_id, Attach(owner.session))
            tokens = [await owner.next_token(first, tail, window(0, len(PROMPT)), PROMPT)]
            for number in range(8):
                tokens.append(await owner.next_token(first, tail, window(len(PROMPT) + number, 1), tokens[-1:]))

            stay = [node.table.sessions[0] for node in old if node is not old[victim]]
            if dies:
                made.network.crash(old[victim].node_id)
            hops[victim] = msgspec.structs.replace(hops[victim], node_id=stands_in.node_id, epoch=2)
            newer = owner.opening(Route(tuple(hops)))
            if victim == 0:
                first = stands_in.node_id
                owner.send(first, newer)
                again = window(0, len(PROMPT) + 8, epoch=2)
                owner.send(first, again, in_bytes(PROMPT + tuple(tokens[:8])))
            else:
                owner.send(stands_in.node_id, Attach(owner.session))
                owner.send(old[victim - 1].node_id, newer)
                tail = hops[2].node_id
            for number in range(8, 23):
                sent = window(len(PROMPT) + number, 1, epoch=2 if victim == 0 else 1)
                tokens.append(await owner.next_token(first, tail, sent, tokens[-1:]))

            assert [node.table.sessions[0] for node in old if node is not old[victim]] == stay
            for node in (*old, stands_in):
                if node.node_id in owner.links:
                    owner.send(node.node_id, Close())
            await made.settle(12)
            return tokens

    async def undisturbed() -> list[int]:
        async with world(WorldConfig(model=model, cuts=(2, 4))) as made:
            asked = GenerateOptions(max_tokens=24, codecs=("fp32",), ignore_eos=True)
            return [token.id async for token in made.swarm.generate(PROMPT, asked) if token.id is not None]

    assert run_virtual(run()) == run_virtual(undisturbed())
