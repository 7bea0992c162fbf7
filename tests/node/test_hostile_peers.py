"""What a stranger may try on a node, over raw links: each gets a typed fault, leaves nothing behind, and others go on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import pytest
from models import tiny_model
from virtual_swarm import World, WorldConfig, seeded_identity, world

from farflung.core.errors import BadSignature, FarflungError, RecordRefused
from farflung.core.ids import ModelDigest, NodeId, SessionId
from farflung.core.messages import (
    Answer,
    Attach,
    Close,
    Credit,
    Fault,
    Grant,
    Ids,
    Message,
    Open,
    OpenText,
    Report,
    Trouble,
    Window,
)
from farflung.core.model import LayerRange
from farflung.core.route import Hop, Route
from farflung.core.sampling import SamplingOptions
from farflung.core.window import Commit, SlotRun, SlotSpan
from farflung.identity.allow_list import AllowList
from farflung.identity.keys import Identity
from farflung.identity.swarm_key import SwarmKey
from farflung.lab.virtual_clock import run_virtual
from farflung.node.admission import Admission
from farflung.node.quotas import Quotas
from farflung.node.service import NodeConfig
from farflung.protocol.opening import OPEN_CONTEXT, encode_open_text
from farflung.session.options import GenerateOptions
from farflung.swarm.records import RECORD_CONTEXT, NodeRecord, SignedRecord
from farflung.transport.link import Frame, Link, Priority
from farflung.transport.memory import LinkShape

STRANGER = seeded_identity(77)
SESSION = SessionId("ab" * 16)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("llama", tmp_path_factory.mktemp("llama"), layers=4)


@dataclass
class Stranger:
    """A raw link to one node, and what came back."""

    made: World
    link: Link
    identity: Identity
    inbox: asyncio.Queue[tuple[int, Message]]

    def on_frame(self, link: Link, channel: int, frame: Frame) -> None:
        self.inbox.put_nowait((channel, frame.message))

    def on_lost(self, link: Link, error: FarflungError) -> None:
        self.inbox.put_nowait((0, Close(str(error))))

    def send(self, channel: int, message: Message, *buffers: bytes) -> None:
        self.link.send(channel, Frame(message, buffers), Priority.DECODE)

    async def receive(self, channel: int) -> Message:
        """The next message that is not a grant."""
        async with asyncio.timeout(3):
            came, message = await self.inbox.get()
            while isinstance(message, Grant):
                came, message = await self.inbox.get()
        assert came == channel
        return message

    async def hears_nothing(self, for_s: float = 0.5) -> None:
        await asyncio.sleep(for_s)
        while not self.inbox.empty():
            assert isinstance(self.inbox.get_nowait()[1], Grant)

    def text(self, **changes: object) -> OpenText:
        hops = tuple(
            Hop(node.node_id, backend.layers) for node, backend in zip(self.made.nodes, self.made.backends, strict=True)
        )
        text = OpenText(
            session=SESSION,
            owner=self.identity.node_id,
            route=Route(hops),
            lease_tokens=16,
            lease_s=60.0,
            expires_unix_s=1_700_000_300.0,
            digest=self.made.spec.digest,
            codecs=("fp32",),
            sampling=SamplingOptions(),
            prompt_tokens=2,
            max_tokens=14,
        )
        return replace_struct(text, changes)

    def open(self, channel: int, **changes: object) -> None:
        text = encode_open_text(self.text(**changes))
        self.send(channel, Open(text, self.identity.sign(text, context=OPEN_CONTEXT), codec="fp32"))


def replace_struct(text: OpenText, changes: dict[str, object]) -> OpenText:
    return msgspec.structs.replace(text, **changes)


@asynccontextmanager
async def stranger_at(
    model: Path, node: int = 0, *, identity: Identity = STRANGER, config: NodeConfig | None = None
) -> AsyncGenerator[Stranger, None]:
    async with world(WorldConfig(model=model, cuts=(2,), node=config or NodeConfig())) as made:
        transport = made.network.endpoint(identity.node_id)
        link = await transport.dial(made.nodes[node].node_id, [made.nodes[node].listen])
        stranger = Stranger(made, link, identity, asyncio.Queue())
        link.start(stranger)
        yield stranger
        # Whatever was tried: nothing stays behind, and an honest driver is served.
        await transport.close()
        await made.settle(12)  # nodes wait ten seconds for an owner whose line broke
        options = GenerateOptions(max_tokens=3, codecs=("fp32",), ignore_eos=True)
        assert len([token async for token in made.swarm.generate([5, 6, 7], options)]) == 3
        assert not any(node.table.waiting_owners for node in made.nodes)


def prompt(count: int = 2, first: int = 0, start: int = 0) -> Window:
    run = SlotRun(first, count, first - 1)
    return Window(1, (run,), (SlotSpan(first + count - 1, 1),), Commit(start, (SlotSpan(first, count),)))


IDS = (5).to_bytes(4, "little") * 2
OTHER = Route((Hop(NodeId("c" * 64), LayerRange(0, 2)), Hop(NodeId("d" * 64), LayerRange(2, 4))))


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"digest": ModelDigest("1" * 64)}, "digest_mismatch"),
        ({"route": OTHER}, "protocol_violation"),
        ({"route": Route((Hop(seeded_identity(1).node_id, LayerRange(0, 4)),))}, "protocol_violation"),
        ({"codecs": ("zip",)}, "session_refused"),
        ({"lease_tokens": 0}, "session_refused"),
        ({"lease_tokens": 10**9}, "session_refused"),
        ({"lease_tokens": 400}, "session_refused"),
        ({"expires_unix_s": 1_600_000_000.0}, "session_refused"),
        ({"expires_unix_s": 1_800_000_000.0}, "session_refused"),
        ({"expires_unix_s": float("nan")}, "session_refused"),
        ({"owner": seeded_identity(78).node_id}, "bad_signature"),
        ({"session": SessionId("x")}, "malformed_frame"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_an_opening_that_does_not_fit_is_refused_with_its_reason(model: Path, changes: dict[str, object], code: str) -> None:
    async def run() -> None:
        async with stranger_at(model) as stranger:
            stranger.open(2, **changes)
            fault = await stranger.receive(2)
            assert isinstance(fault, Fault)
            assert fault.code == code

    run_virtual(run())


def test_a_full_node_says_what_it_has_free(model: Path) -> None:
    async def run() -> None:
        async with stranger_at(model) as stranger:
            stranger.open(2, lease_tokens=400)
            fault = await stranger.receive(2)
            assert isinstance(fault, Fault)
            assert "256" in fault.message

    run_virtual(run())


@pytest.mark.parametrize("text", [b"", b"junk", bytes(20_000), b"\x99" + bytes(100)])
def test_an_opening_that_does_not_decode_is_refused(model: Path, text: bytes) -> None:
    async def run() -> None:
        async with stranger_at(model) as stranger:
            stranger.send(2, Open(text, bytes(64)))
            fault = await stranger.receive(2)
            assert isinstance(fault, Fault)
            assert fault.code == "malformed_frame"

    run_virtual(run())


def test_only_the_hop_before_may_bring_an_opening(model: Path) -> None:
    async def run() -> None:
        async with stranger_at(model, node=1) as stranger:
            stranger.open(2)
            fault = await stranger.receive(2)
            assert isinstance(fault, Fault)
            assert "may bring" in fault.message

    run_virtual(run())


def test_a_session_that_is_over_cannot_be_opened_again(model: Path) -> None:
    async def run() -> None:
        async with stranger_at(model) as stranger:
            stranger.open(2)
            stranger.send(2, Close())
            assert isinstance(await stranger.receive(2), Report)
            stranger.open(4)
            fault = await stranger.receive(4)
            assert isinstance(fault, Fault)
            assert "opened before" in fault.message

    run_virtual(run())


@pytest.mark.parametrize("changes", [{"lease_tokens": 200}, {"codecs": ("bf16", "fp32")}, {"max_tokens": 3}], ids=str)
def test_a_second_opening_changes_nothing_but_the_route(model: Path, changes: dict[str, object]) -> None:
    async def run() -> None:
        async with stranger_at(model) as stranger:
            stranger.open(2)
            stranger.open(4, **changes)
            fault = await stranger.receive(4)
            assert isinstance(fault, Fault)
            assert fault.code == "protocol_violation"
            assert len(stranger.made.nodes[0].table.sessions) == 1

    run_virtual(run())


def test_an_opening_of_an_older_epoch_is_refused(model: Path) -> None:
    async def run() -> None:
        async with stranger_at(model) as stranger:
            hops = stranger.text().route.hops
            stranger.open(2, route=Route((msgspec.structs.replace(hops[0], epoch=2), hops[1])))
            stranger.open(4)
            fault = await stranger.receive(4)
            assert isinstance(fault, Fault)
            assert "epoch" in fault.message
            assert len(stranger.made.nodes[0].table.sessions) == 1

    run_virtual(run())


def test_a_driver_cannot_hold_more_sessions_than_its_share(model: Path) -> None:
    async def run() -> None:
        config = NodeConfig(quotas=Quotas(sessions_per_owner=2, waiting_per_peer=3))
        async with stranger_at(model, config=config) as stranger:
            for number in range(3):
                stranger.open(2 + 2 * number, session=SessionId(f"{number:032x}"))
            fault = await stranger.receive(6)
            assert isinstance(fault, Fault)
            assert fault.code == "session_refused"

    run_virtual(run())


Attempt = Callable[[Stranger], None]


@pytest.mark.parametrize(
    ("attempt", "code"),
    [
        (lambda s: s.send(2, prompt(), (999).to_bytes(4, "little") * 2), "protocol_violation"),
        (lambda s: s.send(2, prompt(), b"\xff\xff\xff\xff" * 2), "protocol_violation"),
        (lambda s: s.send(2, prompt(), IDS[:5]), "protocol_violation"),
        (lambda s: s.send(2, prompt()), "protocol_violation"),
        (lambda s: s.send(2, prompt(), IDS, IDS), "protocol_violation"),
        (lambda s: s.send(2, replace_window(epoch=0), IDS), "protocol_violation"),
        (lambda s: s.send(2, prompt(17), (5).to_bytes(4, "little") * 17), "lease_exceeded"),
        (lambda s: s.send(2, replace_window(commit=Commit(0, (SlotSpan(0, 2**30),))), IDS), "protocol_violation"),
        (lambda s: s.send(2, replace_window(want=(SlotSpan(0, 2**30),)), IDS), "protocol_violation"),
        (lambda s: and_then(s, window(2, 1), window(2, 0)), "protocol_violation"),
        (lambda s: and_then(s, window(2, 1), window(3, 2, Commit(2, (SlotSpan(3, 1),)))), "protocol_violation"),
        (lambda s: and_then(s, window(2, 1), window(3, 1, Commit(2, (SlotSpan(2, 1), SlotSpan(3, 1))))), "protocol_violation"),
        (lambda s: and_then(s, window(2, 1, Commit(1, (SlotSpan(0, 1), SlotSpan(2, 1))))), "protocol_violation"),
        (lambda s: s.send(2, Credit(5)), "protocol_violation"),
        (lambda s: s.send(2, Answer((), (), 0)), "protocol_violation"),
        (lambda s: s.send(2, Attach(SESSION)), "protocol_violation"),
    ],
    ids=[
        "token id beyond the vocabulary", "negative token id", "half a token", "no buffer", "two buffers", "older epoch",
        "over the lease", "huge commit", "huge want", "slot used again elsewhere", "commit that skips a token",
        "commit that is no path down the tree", "commit against an earlier one", "credit from nowhere", "an answer", "attach",
    ],
)  # fmt: skip
def test_a_window_that_breaks_a_rule_ends_its_session_only(model: Path, attempt: Attempt, code: str) -> None:
    async def run() -> None:
        async with stranger_at(model) as stranger:
            stranger.open(2)
            attempt(stranger)
            fault = await stranger.receive(2)
            assert isinstance(fault, Fault)
            assert fault.code == code
            assert stranger.link.is_up

    run_virtual(run())


def test_a_window_that_builds_on_what_never_comes_waits_and_goes_with_its_session(model: Path) -> None:
    async def run() -> None:
        async with stranger_at(model) as stranger:
            stranger.open(2)
            stranger.send(2, replace_window(commit=Commit(7, (SlotSpan(0, 1),))), IDS)
            await stranger.hears_nothing()
            for _ in range(64):
                stranger.send(2, replace_window(commit=Commit(7, (SlotSpan(0, 1),))), IDS)
            fault = await stranger.receive(2)
            assert isinstance(fault, Fault)
            assert fault.code == "protocol_violation"

    run_virtual(run())


def window(slot: int, parent: int, commit: Commit | None = None) -> Window:
    """One more token, after a prompt of two."""
    return Window(1, (SlotRun(slot, 1, parent),), (SlotSpan(slot, 1),), commit)


def and_then(stranger: Stranger, *windows: Window) -> None:
    """A prompt and then windows of a token each."""
    stranger.send(2, prompt(), IDS)
    for one in windows:
        stranger.send(2, one, IDS[:4])


def replace_window(**changes: object) -> Window:
    return msgspec.structs.replace(prompt(), **changes)


def test_a_window_for_somebody_elses_session_has_no_channel_to_arrive_on(model: Path) -> None:
    async def run() -> None:
        async with stranger_at(model) as stranger:
            async for _ in stranger.made.swarm.generate(
                [5, 6, 7], GenerateOptions(max_tokens=40, codecs=("fp32",), ignore_eos=True)
            ):
                stranger.send(2, prompt(), IDS)
            await stranger.hears_nothing()

    run_virtual(run())


def test_a_stranger_cannot_attach_to_a_session_that_is_not_its_own(model: Path) -> None:
    async def run() -> None:
        async with stranger_at(model, node=1) as stranger:
            options = GenerateOptions(max_tokens=20, codecs=("fp32",), ignore_eos=True)
            count = 0
            async for _ in stranger.made.swarm.generate([5, 6, 7], options):
                if count == 0:
                    session = stranger.made.nodes[1].table.sessions[0].opening.text.session
                    stranger.send(2, Attach(session))
                count += 1
            assert count == 20
            await stranger.hears_nothing()  # it waits for a session of its own by that name

    run_virtual(run())


def test_owner_lines_that_wait_for_nothing_are_bounded_and_time_out(model: Path) -> None:
    async def run() -> None:
        config = NodeConfig(quotas=Quotas(sessions_per_owner=2, waiting_per_peer=3))
        async with stranger_at(model, config=config) as stranger:
            for number in range(5):
                stranger.send(2 * number + 2, Attach(SessionId(f"{number:032x}")))
            assert {type(await stranger.receive(channel)) for channel in (8, 10)} == {Fault}
            assert stranger.made.nodes[0].table.waiting_owners == 3
            await asyncio.sleep(10)
            assert stranger.made.nodes[0].table.waiting_owners == 0

    run_virtual(run())


def test_a_session_whose_owner_never_comes_to_the_tail_ends(model: Path) -> None:
    async def run() -> None:
        async with stranger_at(model) as stranger:
            stranger.open(2)
            stranger.send(2, prompt(), IDS)
            await asyncio.sleep(1)
            assert len(stranger.made.nodes[1].table.sessions) == 1
            await asyncio.sleep(10)
            assert len(stranger.made.nodes[1].table.sessions) == 0
            trouble = await stranger.receive(2)
            assert isinstance(trouble, Trouble)
            assert trouble.node_id == stranger.made.nodes[1].node_id

    run_virtual(run())


def test_a_next_hop_that_is_not_in_the_directory_is_reported_within_three_seconds(model: Path) -> None:
    async def run() -> None:
        async with stranger_at(model) as stranger:
            first = stranger.made.nodes[0].node_id
            stranger.open(2, route=Route((Hop(first, LayerRange(0, 2)), Hop(NodeId("e" * 64), LayerRange(2, 4)))))
            fault = await stranger.receive(2)
            assert isinstance(fault, Fault)
            assert (fault.code, fault.node_id) == ("stage_lost", "e" * 64)
            assert first[:8] in fault.message
            assert fault.hint

    run_virtual(run())


def test_frames_on_unknown_channels_are_dropped(model: Path) -> None:
    async def run() -> None:
        async with stranger_at(model) as stranger:
            for message in (Close(), Credit(1), prompt(), Fault(STRANGER.node_id, "x", "y")):
                stranger.send(2, message, IDS)
            await stranger.hears_nothing()
            assert stranger.link.is_up

    run_virtual(run())


def test_a_fault_of_the_tail_reaches_an_owner_that_is_not_attached_there(model: Path) -> None:
    """The stranger opens through node 0 with a digest check that only the tail fails: too large a lease for it alone."""

    async def run() -> None:
        async with stranger_at(model) as stranger:
            held = replace(STRANGER_OPTIONS, max_tokens=200)
            async for _ in stranger.made.swarm.generate([5, 6, 7], held):
                stranger.made.backends[0].close(stranger.made.nodes[0].table.sessions[0].id)
                stranger.open(2, lease_tokens=100)
                trouble = await stranger.receive(2)
                assert isinstance(trouble, Trouble)
                assert (trouble.code, trouble.node_id) == ("session_refused", stranger.made.nodes[1].node_id)
                break

    run_virtual(run())


def test_a_slot_that_hangs_under_a_dead_one_is_dropped_and_nothing_else_happens(model: Path) -> None:
    async def run() -> None:
        async with stranger_at(model) as stranger:
            stranger.open(2)
            and_then(stranger, window(2, 1, Commit(2, (SlotSpan(2, 1),))), window(3, 0))
            await stranger.hears_nothing()
            tree = stranger.made.nodes[0].table.sessions[0].state.tree
            assert (tree.committed_tokens, len(tree.alive)) == (3, 0)

    run_virtual(run())


@pytest.mark.parametrize("signed", [True, False], ids=["good signatures", "bad signatures"])
def test_a_flood_of_openings_is_refused_and_costs_an_honest_session_no_token(model: Path, signed: bool) -> None:
    async def run() -> None:
        async with stranger_at(model) as stranger:
            owner = {} if signed else {"owner": seeded_identity(78).node_id}
            options = GenerateOptions(max_tokens=40, codecs=("fp32",), ignore_eos=True)
            alone = [token.id async for token in stranger.made.swarm.generate([5, 6, 7], options)]
            tokens = []
            async for token in stranger.made.swarm.generate([5, 6, 7], options):
                tokens.append(token.id)
                for number in range(50 * len(tokens), 50 * len(tokens) + 50):
                    if stranger.link.is_up:
                        stranger.open(2 * number + 2, session=SessionId(f"{number:032x}"), lease_tokens=16, **owner)
            assert tokens == alone
            await asyncio.sleep(1)
            assert len(stranger.made.nodes[0].table.sessions) <= 16  # as many as fit the KV

    run_virtual(run())


def test_a_stranger_that_reads_nothing_is_ended_and_holds_up_nobody(model: Path) -> None:
    async def run() -> None:
        async with stranger_at(model) as stranger:
            node = stranger.made.nodes[0]
            stranger.made.network.shape(node.node_id, STRANGER.node_id, LinkShape(rate_bytes_per_s=10.0), LinkShape())
            for number in range(400):
                stranger.send(2 * number + 2, Attach(SessionId(f"{number:032x}")))  # most are refused, in words
            options = GenerateOptions(max_tokens=200, codecs=("fp32",), ignore_eos=True)
            began_s = asyncio.get_running_loop().time()
            assert len([token async for token in stranger.made.swarm.generate([5, 6, 7], options)]) == 200
            assert asyncio.get_running_loop().time() - began_s < 200 * 0.06  # a ring of three times 10 ms, and jitter
            await asyncio.sleep(30)
            assert STRANGER.node_id not in [link.peer for link in node._pool.links]

    run_virtual(run())


@pytest.mark.parametrize("message", [None, Attach(SESSION)], ids=["open", "attach"])
def test_a_driver_that_is_not_listed_is_refused_by_name(model: Path, message: Attach | None) -> None:
    async def run() -> None:
        listed = Admission(drivers=AllowList(frozenset({seeded_identity(200).node_id})))
        async with stranger_at(model, config=NodeConfig(admission=listed)) as stranger:
            if message is None:
                stranger.open(2)
            else:
                stranger.send(2, message)
            fault = await stranger.receive(2)
            assert isinstance(fault, Fault)
            assert fault.code == "not_admitted"
            assert fault.hint

    run_virtual(run())


def test_a_driver_that_is_listed_later_is_served_then(model: Path) -> None:
    async def run() -> None:
        listed = AllowList(frozenset({seeded_identity(200).node_id}))
        async with stranger_at(model, config=NodeConfig(admission=Admission(drivers=listed))) as stranger:
            stranger.open(2)
            assert isinstance(await stranger.receive(2), Fault)
            for node in stranger.made.nodes:
                node.admit(Admission(drivers=AllowList(listed.node_ids | {STRANGER.node_id})))
            stranger.open(4, session=SessionId("cd" * 16))
            await stranger.hears_nothing()
            assert len(stranger.made.nodes[0].table.sessions) == 1

    run_virtual(run())


def test_an_owner_without_the_swarms_key_is_refused_though_a_member_brings_its_opening(model: Path) -> None:
    async def run() -> None:
        async with stranger_at(model) as stranger:
            tail = stranger.made.nodes[1]
            tail.admit(Admission(swarm_key=SwarmKey(bytes(32))))
            stranger.open(2)
            trouble = await stranger.receive(2)
            assert isinstance(trouble, Trouble | Fault)
            assert (trouble.code, trouble.node_id) == ("not_admitted", tail.node_id)
            tail.admit(Admission())

    run_virtual(run())


def test_forged_and_replayed_records_lead_nobody_astray(model: Path) -> None:
    async def run() -> None:
        async with stranger_at(model) as stranger:
            service, node = stranger.made.service, stranger.made.nodes[0]
            entry = next(entry for entry in service.entries() if entry.record.node_id == node.node_id)
            mine = replace_record(entry.record, sequence=entry.record.sequence + 1, addresses=("192.0.2.66:1",))
            text = msgspec.json.encode(mine)
            with pytest.raises(BadSignature):
                service.announce(SignedRecord(text, STRANGER.sign(text, context=RECORD_CONTEXT)))
            with pytest.raises(RecordRefused, match="not newer"):
                service.announce(entry.signed)
            await asyncio.sleep(86_400)
            with pytest.raises(RecordRefused, match="ago"):
                service.announce(entry.signed)
            now = next(entry for entry in service.entries() if entry.record.node_id == node.node_id)
            assert now.record.addresses == entry.record.addresses

    run_virtual(run())


def replace_record(record: NodeRecord, **changes: object) -> NodeRecord:
    return msgspec.structs.replace(record, **changes)


STRANGER_OPTIONS = GenerateOptions(max_tokens=20, codecs=("fp32",), ignore_eos=True)


def test_who_takes_a_sessions_name_under_his_own_key_takes_nothing_from_its_owner(model: Path) -> None:
    """Every stage knows the session's id. Another owner's opening by that name concerns another session, whatever its epoch."""

    async def run() -> None:
        async with stranger_at(model, node=1) as stranger:
            options = GenerateOptions(max_tokens=20, codecs=("fp32",), ignore_eos=True)
            made, found = stranger.made, []
            alone = [token.id async for token in made.swarm.generate([5, 6, 7], options)]
            async for token in made.swarm.generate([5, 6, 7], options):
                found.append(token.id)
                if len(found) == 1:
                    session = made.nodes[1].table.sessions[0].opening.text.session
                    hops = (
                        Hop(stranger.identity.node_id, made.backends[0].layers),
                        Hop(made.nodes[1].node_id, made.backends[1].layers, 2**40),
                    )
                    stranger.open(2, session=session, route=Route(hops), lease_tokens=10**6)
            assert found == alone
            assert isinstance(await stranger.receive(2), Fault)

    run_virtual(run())


def test_ids_nobody_asked_for_are_refused_before_they_are_looked_at(model: Path) -> None:
    async def run() -> None:
        async with stranger_at(model) as stranger:
            stranger.open(2)
            stranger.send(2, Ids((SlotSpan(0, 2**20),)), bytes(4 * 2**20))
            fault = await stranger.receive(2)
            assert isinstance(fault, Fault)
            assert fault.code == "protocol_violation"

    run_virtual(run())
