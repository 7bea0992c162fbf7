"""What every transport promises, tried over tcp and over memory networks on both clocks."""

from __future__ import annotations

import asyncio
import random

import pytest
from link_worlds import WORLDS, Recorder, World, linked, numbered

from farflung.core.errors import (
    AddressInUse,
    FarflungError,
    FrameTooLarge,
    LinkLost,
    LinkOverloaded,
    NotAdmitted,
    ProtocolViolation,
    Unreachable,
    UsageError,
    VersionMismatch,
    WrongPeer,
)
from farflung.core.ids import NodeId, short
from farflung.core.messages import Answer, Hello, Window
from farflung.core.window import Commit, SlotRun, SlotSpan
from farflung.identity import SwarmKey
from farflung.transport.byte_stream import RECORD_BYTES
from farflung.transport.link import Frame, Link, LinkConfig, Priority

KEY, OTHER_KEY = SwarmKey(bytes(32)), SwarmKey(bytes(range(32)))


@pytest.fixture(params=WORLDS)
def world(request: pytest.FixtureRequest) -> World:
    made: World = WORLDS[request.param]()
    return made


def test_both_ends_of_a_link_know_each_other(world: World) -> None:
    async def scenario(world: World) -> None:
        here, there = world.node(), await world.listening()
        link = await here.transport.dial(there.node_id, [there.address])
        back, _ = await there.first_link()
        assert (link.peer, back.peer) == (there.node_id, here.node_id)
        assert link.is_up
        assert back.is_up

    world.run(scenario)


def test_frames_go_both_ways_on_several_channels_unchanged(world: World) -> None:
    async def scenario(world: World) -> None:
        link, heard_here, back, heard_there = await linked(world)
        sizes = (0, 1, 4096, 16_372, 16_384, 100_000)
        channels = [link.new_channel() for _ in sizes]
        for number, (channel, size) in enumerate(zip(channels, sizes, strict=True)):
            link.send(channel, numbered(number, [bytes([number]) * size, b"second"]), Priority.DECODE)
        await heard_there.until_frames(len(sizes))
        for channel, frame in heard_there.frames:
            back.send(channel, frame, Priority.PREFILL)
        await heard_here.until_frames(len(sizes))
        for number, (channel, size) in enumerate(zip(channels, sizes, strict=True)):
            (frame,) = [frame for at, frame in heard_here.frames if at == channel]
            assert frame.message == numbered(number).message
            assert [bytes(buffer) for buffer in frame.buffers] == [bytes([number]) * size, b"second"]
        assert link.stats.frames_sent == back.stats.frames_received == len(sizes)
        assert link.stats.bytes_sent > sum(sizes)

    world.run(scenario)


def test_sending_says_what_the_frame_costs_but_for_encryption(world: World) -> None:
    async def scenario(world: World) -> None:
        link, _, _, heard = await linked(world)
        before = link.stats.bytes_sent - link.stats.housekeeping_bytes_sent
        costs = [link.send(2, numbered(1, [bytes(size)]), Priority.DECODE) for size in (100, 20_000)]
        await heard.until_frames(2)
        sent = link.stats.bytes_sent - link.stats.housekeeping_bytes_sent - before
        assert sum(costs) + 3 * RECORD_BYTES == sent
        assert 100 < costs[0] < 130

    world.run(scenario)


def test_frames_of_one_channel_never_overtake_each_other(world: World) -> None:
    async def scenario(world: World) -> None:
        link, _, _, heard = await linked(world)
        draw = random.Random(5)
        channels = [link.new_channel() for _ in range(5)]
        sent: dict[int, list[int]] = {channel: [] for channel in channels}
        for number in range(200):
            channel = draw.choice(channels)
            sent[channel].append(number)
            size = draw.choice((0, 10, 5_000, 60_000))
            link.send(channel, numbered(number, [bytes(size)]), draw.choice(list(Priority)))
            if draw.random() < 0.1:
                await asyncio.sleep(0)
        await heard.until_frames(200)
        assert {channel: heard.numbers(channel) for channel in channels} == sent

    world.run(scenario)


def test_more_channels_than_may_be_half_received_share_a_link(world: World) -> None:
    async def scenario(world: World) -> None:
        link, _, _, heard = await linked(world)
        for number in range(300):
            link.send(link.new_channel(), numbered(number, [bytes(40_000)]), Priority.PREFILL)
        await heard.until_frames(300)
        assert link.is_up

    world.run(scenario)


def test_a_small_urgent_frame_passes_a_big_one_that_is_under_way(world: World) -> None:
    async def scenario(world: World) -> None:
        link, _, _, heard = await linked(world)
        big, urgent = link.new_channel(), link.new_channel()
        link.send(big, numbered(1, [bytes(16 * 1024**2)]), Priority.BULK)
        link.send(urgent, numbered(2, [bytes(100)]), Priority.DECODE)
        await heard.until_frames(2)
        assert [channel for channel, _ in heard.frames] == [urgent, big]

    world.run(scenario)


def test_channel_numbers_of_the_two_ends_never_meet(world: World) -> None:
    async def scenario(world: World) -> None:
        link, _, back, _ = await linked(world)
        ours, theirs = {link.new_channel() for _ in range(50)}, {back.new_channel() for _ in range(50)}
        assert len(ours | theirs) == 100
        assert all(channel % 2 == 0 for channel in ours)
        assert 0 not in ours

    world.run(scenario)


def test_frames_that_come_before_the_handler_wait_for_it(world: World) -> None:
    async def scenario(world: World) -> None:
        here, there = world.node(), world.node()
        accepted: asyncio.Future[Link] = asyncio.get_running_loop().create_future()
        there.listener = await there.transport.listen("127.0.0.1:0", accepted.set_result)
        link = await here.transport.dial(there.node_id, [there.address])
        link.start(Recorder())
        channel = link.new_channel()
        for number in range(3):
            link.send(channel, numbered(number, [bytes(20_000)]), Priority.DECODE)
        await link.close()
        heard = Recorder()
        (await accepted).start(heard)
        await heard.until_lost()
        assert heard.numbers(channel) == [0, 1, 2]

    world.run(scenario)


def test_another_key_than_the_one_dialled_is_turned_away_before_it_says_a_word(world: World) -> None:
    async def scenario(world: World) -> None:
        here, there, elsewhere = world.node(), await world.listening(), world.node()
        with pytest.raises(WrongPeer, match=short(elsewhere.node_id)) as caught:
            await here.transport.dial(elsewhere.node_id, [there.address])
        assert short(there.node_id) in str(caught.value)
        assert caught.value.hint
        assert there.accepted == []
        link = await here.transport.dial(there.node_id, [there.address])
        assert link.is_up

    world.run(scenario)


def test_no_version_in_common_is_told_on_both_sides_with_the_numbers(world: World) -> None:
    async def scenario(world: World) -> None:
        here, there = world.node(Hello(versions=(2, 3))), await world.listening(Hello(versions=(5, 9)))
        with pytest.raises(VersionMismatch, match=r"5 to 9.*2 to 3"):
            await here.transport.dial(there.node_id, [there.address])
        error = await there.refusal()
        assert isinstance(error, VersionMismatch)
        assert "2 to 3" in str(error)
        assert there.accepted == []

    world.run(scenario)


@pytest.mark.parametrize(
    ("ours", "theirs", "we_say", "they_say"),
    [
        (None, KEY, "no swarm key is set here", "shows no swarm key"),
        (KEY, None, "shows no swarm key", "no swarm key is set here"),
        (OTHER_KEY, KEY, "another swarm key", "another swarm key"),
    ],
)
def test_a_link_where_only_one_end_knows_the_swarms_key_is_ended_by_name_on_both_sides_before_any_frame(
    world: World, ours: SwarmKey | None, theirs: SwarmKey | None, we_say: str, they_say: str
) -> None:
    async def scenario(world: World) -> None:
        here, there = world.node(swarm_key=ours), await world.listening(swarm_key=theirs)
        with pytest.raises(NotAdmitted, match=we_say) as caught:
            await here.transport.dial(there.node_id, [there.address])
        assert caught.value.hint
        error = await there.refusal()
        assert isinstance(error, NotAdmitted)
        assert they_say in str(error)
        assert there.accepted == []

    world.run(scenario)


def test_two_ends_with_the_swarms_key_link(world: World) -> None:
    async def scenario(world: World) -> None:
        here, there = world.node(swarm_key=KEY), await world.listening(swarm_key=SwarmKey.parse(KEY.text))
        link = await here.transport.dial(there.node_id, [there.address])
        link.start(Recorder())
        link.send(2, numbered(1), Priority.DECODE)
        _, heard = await there.first_link()
        await heard.until_frames(1)

    world.run(scenario)


def test_nobody_there_is_unreachable_and_says_where_it_looked(world: World) -> None:
    async def scenario(world: World) -> None:
        here, gone = world.node(), await world.listening()
        address = gone.address
        await gone.transport.close()
        with pytest.raises(Unreachable) as caught:
            await here.transport.dial(gone.node_id, [address, "no address at all"])
        assert address in str(caught.value)
        assert "no address at all" in str(caught.value)
        assert caught.value.hint
        with pytest.raises(Unreachable, match="no address"):
            await here.transport.dial(gone.node_id, [])

    world.run(scenario)


def test_the_address_that_answers_with_the_right_key_wins(world: World) -> None:
    async def scenario(world: World) -> None:
        here, wrong, gone, right = world.node(), await world.listening(), await world.listening(), await world.listening()
        addresses = [gone.address, wrong.address, right.address]
        await gone.transport.close()
        link = await here.transport.dial(right.node_id, addresses)
        assert link.peer == right.node_id

    world.run(scenario)


def test_an_address_is_listened_on_once(world: World) -> None:
    async def scenario(world: World) -> None:
        first, second = await world.listening(), world.node()
        with pytest.raises(AddressInUse, match=first.address) as caught:
            await second.transport.listen(first.address, second.on_link)
        assert "port" in caught.value.hint
        assert first.listener is not None
        await first.listener.close()
        listener = await second.transport.listen(first.address, second.on_link)
        assert listener.address == first.address

    world.run(scenario)


def test_an_address_that_makes_no_sense_is_a_usage_error(world: World) -> None:
    async def scenario(world: World) -> None:
        with pytest.raises(UsageError, match="nonsense"):
            await world.node().transport.listen("nonsense", lambda link: None)

    world.run(scenario)


def test_closing_a_listener_leaves_its_links_up(world: World) -> None:
    async def scenario(world: World) -> None:
        here, there = world.node(), await world.listening()
        link = await here.transport.dial(there.node_id, [there.address])
        link.start(Recorder())
        _, heard = await there.first_link()
        assert there.listener is not None
        await there.listener.close()
        with pytest.raises(Unreachable):
            await here.transport.dial(there.node_id, [there.address])
        link.send(link.new_channel(), numbered(1), Priority.CONTROL)
        await heard.until_frames(1)

    world.run(scenario)


def test_close_flushes_what_is_queued_and_tells_both_ends_once(world: World) -> None:
    async def scenario(world: World) -> None:
        link, heard_here, _, heard_there = await linked(world)
        channel = link.new_channel()
        for number in range(30):
            link.send(channel, numbered(number, [bytes(100_000)]), Priority.BULK)
        await asyncio.gather(link.close(), link.close())
        await heard_there.until_lost()
        await link.close()
        assert heard_there.numbers(channel) == list(range(30))
        await asyncio.sleep(0.2)
        assert len(heard_here.lost) == len(heard_there.lost) == 1
        assert isinstance(heard_here.lost[0], LinkLost)
        assert isinstance(heard_there.lost[0], LinkLost)
        with pytest.raises(LinkLost):
            link.send(channel, numbered(31), Priority.CONTROL)

    world.run(scenario)


def test_close_tells_the_handler_the_error_it_is_given(world: World) -> None:
    async def scenario(world: World) -> None:
        link, heard, _, _ = await linked(world)
        await link.close(ProtocolViolation("because"))
        assert isinstance(await heard.until_lost(), ProtocolViolation)

    world.run(scenario)


def test_an_error_raised_by_the_handler_ends_the_link_with_it(world: World) -> None:
    class Picky(Recorder):
        def on_frame(self, link: Link, channel: int, frame: Frame) -> None:
            super().on_frame(link, channel, frame)
            raise ProtocolViolation("not that")

    async def scenario(world: World) -> None:
        here, there, picky = world.node(), world.node(), Picky()
        there.listener = await there.transport.listen("127.0.0.1:0", lambda link: link.start(picky))
        link = await here.transport.dial(there.node_id, [there.address])
        heard = Recorder()
        link.start(heard)
        for number in range(3):
            link.send(2, numbered(number), Priority.DECODE)
        assert str(await picky.until_lost()) == "not that"
        assert picky.numbers(2) == [0]
        assert isinstance(await heard.until_lost(), LinkLost)

    world.run(scenario)


def test_a_peer_that_dies_is_a_lost_link_that_names_it(world: World) -> None:
    async def scenario(world: World) -> None:
        here, there = world.node(), await world.listening()
        link = await here.transport.dial(there.node_id, [there.address])
        heard = Recorder()
        link.start(heard)
        await there.first_link()
        world.die(there)
        error = await heard.until_lost()
        assert isinstance(error, LinkLost)
        assert short(there.node_id) in str(error)
        assert error.hint

    world.run(scenario)


def test_a_full_queue_refuses_more_and_loses_nothing_it_took(world: World) -> None:
    async def scenario(world: World) -> None:
        link, _, _, heard = await linked(world)
        channel, taken, refused = link.new_channel(), 0, None
        while refused is None and taken < 1000:
            try:
                link.send(channel, numbered(taken, [bytes(100_000)]), Priority.BULK)
                taken += 1
            except LinkOverloaded as error:
                refused = error
        assert short(link.peer) in str(refused)
        assert taken >= 9
        await heard.until_frames(taken)
        assert heard.numbers(channel) == list(range(taken))
        link.send(channel, numbered(taken), Priority.BULK)
        await heard.until_frames(taken + 1)

    world.run(scenario, LinkConfig(max_queued_bytes=1_000_000))


def test_what_could_never_be_sent_is_refused_at_once(world: World) -> None:
    async def scenario(world: World) -> None:
        link, _, _, heard = await linked(world)
        with pytest.raises(FrameTooLarge):
            link.send(2, numbered(1, [bytes(100_001)]), Priority.BULK)
        with pytest.raises(UsageError):
            link.send(0, numbered(1), Priority.BULK)
        link.send(2, numbered(2), Priority.BULK)
        await heard.until_frames(1)

    world.run(scenario, LinkConfig(max_frame_bytes=100_000))


def test_a_node_that_is_sent_too_much_that_is_not_whole_ends_the_link_that_sends_most(world: World) -> None:
    async def scenario(world: World) -> None:
        hub, modest, greedy = await world.listening(), world.node(), world.node()
        links = [await node.transport.dial(hub.node_id, [hub.address]) for node in (modest, greedy)]
        for link in links:
            link.start(Recorder())
            await hub.until(lambda: len(hub.accepted) == 2)
        (_, heard), (_, heard_of_greedy) = hub.accepted
        for channel in range(2, 12, 2):  # of equal urgency: none of them is whole before all of them nearly are
            links[1].send(channel, numbered(1, [bytes(400_000)]), Priority.BULK)
        links[0].send(2, numbered(2, [bytes(300_000)]), Priority.BULK)
        error = await heard_of_greedy.until_lost()
        assert isinstance(error, LinkOverloaded)
        assert short(greedy.node_id) in str(error)
        await heard.until_frames(1)
        assert links[0].is_up

    world.run(scenario, LinkConfig(max_partial_bytes=1_000_000))


def test_a_quiet_link_stays_up_and_knows_its_round_trip(world: World) -> None:
    async def scenario(world: World) -> None:
        link, _, back, _ = await linked(world)
        await asyncio.sleep(1.0)
        assert link.is_up
        assert back.is_up
        assert 0 < (link.stats.round_trip_s or 0) < 1
        assert 0 < (back.stats.round_trip_s or 0) < 1

    world.run(scenario, LinkConfig(heartbeat_s=0.1, dead_after_s=0.6))


def test_bulk_tells_the_sender_how_fast_its_path_delivers(world: World) -> None:
    async def scenario(world: World) -> None:
        link, _, _, heard = await linked(world)
        link.send(2, numbered(1, [bytes(2_000_000)]), Priority.BULK)
        await heard.until_frames(1)
        await asyncio.sleep(0.5)
        assert (link.stats.delivery_bytes_per_s or 0) > 100_000

    world.run(scenario, LinkConfig(heartbeat_s=0.1))


def test_one_token_costs_the_driver_under_200_bytes_heartbeats_apart(world: World) -> None:
    def counted(link: Link) -> int:
        stats = link.stats
        housekeeping = stats.housekeeping_bytes_sent + stats.housekeeping_bytes_received
        return stats.bytes_sent + stats.bytes_received - housekeeping

    async def scenario(world: World) -> None:
        link, heard_here, back, heard_there = await linked(world)
        assert counted(link) == 0
        for token in range(20):
            slot = 1_000_000 + token
            commit = Commit(900_000 + token, (SlotSpan(slot - 1, 1),))
            window = Window(3, (SlotRun(slot, 1, slot - 1),), (SlotSpan(slot, 1),), commit, next_slot=slot + 1)
            link.send(2, Frame(window, [bytes(4)]), Priority.DECODE)
            await heard_there.until_frames(token + 1)
            answer = Answer((SlotSpan(slot, 1),), (150_000,), 900_001 + token, next_slot=slot + 1, queue_rows=7)
            back.send(2, Frame(answer), Priority.DECODE)
            await heard_here.until_frames(token + 1)
        assert counted(link) <= 200 * 20
        assert counted(link) == counted(back)

    world.run(scenario)


def test_a_closed_transport_dials_no_more(world: World) -> None:
    async def scenario(world: World) -> None:
        here, there = world.node(), await world.listening()
        await here.transport.close()
        with pytest.raises(FarflungError, match="closed"):
            await here.transport.dial(there.node_id, [there.address])

    world.run(scenario)


def test_a_dial_that_is_called_off_leaves_nothing_behind(world: World) -> None:
    async def scenario(world: World) -> None:
        here, there = world.node(), await world.listening()
        for passes in range(12):  # called off at every stage of the handshake
            dialling = asyncio.ensure_future(here.transport.dial(there.node_id, [there.address]))
            for _ in range(passes):
                await asyncio.sleep(0.001)
            dialling.cancel()
            await asyncio.gather(dialling, return_exceptions=True)

    world.run(scenario)


def test_many_nodes_dial_one_at_the_same_time(world: World) -> None:
    async def scenario(world: World) -> None:
        hub, others = await world.listening(), [world.node() for _ in range(8)]
        links = await asyncio.gather(*(other.transport.dial(hub.node_id, [hub.address]) for other in others))
        for number, link in enumerate(links):
            link.start(Recorder())
            link.send(2, numbered(number, [bytes(50_000)]), Priority.DECODE)
        await hub.until(lambda: len(hub.accepted) == 8)
        told: dict[NodeId, list[int]] = {}
        for link, heard in hub.accepted:
            await heard.until_frames(1)
            told[link.peer] = heard.numbers(2)
        assert told == {other.node_id: [number] for number, other in enumerate(others)}

    world.run(scenario)
