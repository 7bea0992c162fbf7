from __future__ import annotations

import asyncio
import random

import pytest
from link_worlds import Recorder, VirtualWorld, linked, numbered

from farflung.core.errors import LinkLost, Unreachable, UsageError
from farflung.core.ids import NodeId
from farflung.lab.virtual_clock import run_virtual
from farflung.transport.link import Link, LinkConfig, Priority
from farflung.transport.memory import LinkShape, MemoryNetwork

A, B, C = (NodeId(letter * 64) for letter in "abc")


async def dialled(network: MemoryNetwork, recorder: Recorder, **endpoint: float) -> Link:
    """A link from A to a listening B, whose frames go to ``recorder``."""
    listener = await network.endpoint(B).listen("b:0", lambda link: link.start(recorder))
    link = await network.endpoint(A, **endpoint).dial(B, [listener.address])  # type: ignore[arg-type]
    link.start(Recorder())
    return link


def test_a_dial_takes_three_round_trips_and_a_frame_half_of_one() -> None:
    async def scenario() -> tuple[float, float]:
        heard, loop = Recorder(), asyncio.get_running_loop()
        network = MemoryNetwork(random.Random(1), shape=LinkShape(delay_s=0.05))
        link = await dialled(network, heard)
        up_at = loop.time()
        link.send(2, numbered(1), Priority.DECODE)
        await heard.until_frames(1)
        return up_at, loop.time() - up_at

    assert run_virtual(scenario()) == pytest.approx((0.25, 0.05))


def test_bytes_pass_at_the_rate_of_the_path() -> None:
    async def scenario() -> float:
        heard, loop = Recorder(), asyncio.get_running_loop()
        network = MemoryNetwork(random.Random(1), shape=LinkShape(rate_bytes_per_s=1e6))
        link = await dialled(network, heard)
        start = loop.time()
        link.send(2, numbered(1, [bytes(500_000)]), Priority.BULK)
        await heard.until_frames(1)
        return loop.time() - start

    assert run_virtual(scenario()) == pytest.approx(0.5, rel=0.01)


def test_an_urgent_frame_waits_for_the_queue_of_the_path_only() -> None:
    async def scenario() -> float:
        heard, loop = Recorder(), asyncio.get_running_loop()
        network = MemoryNetwork(random.Random(1), shape=LinkShape(rate_bytes_per_s=1e6, queue_bytes=32_768))
        link = await dialled(network, heard)
        link.send(2, numbered(1, [bytes(2_000_000)]), Priority.BULK)
        await asyncio.sleep(0.5)
        start = loop.time()
        link.send(4, numbered(2), Priority.DECODE)
        await heard.until_frames(1)
        return loop.time() - start

    assert run_virtual(scenario()) < 0.06


def test_links_of_one_node_share_its_uplink_and_the_urgent_goes_first() -> None:
    async def scenario() -> tuple[list[int], float]:
        loop, order = asyncio.get_running_loop(), Recorder()
        network = MemoryNetwork(random.Random(1))
        sender = network.endpoint(A, uplink_bytes_per_s=1e6)
        links = []
        for name in (B, C):
            listener = await network.endpoint(name).listen(f"{name[0]}:0", lambda link: link.start(order))
            links.append(await sender.dial(name, [listener.address]))
            links[-1].start(Recorder())
        start = loop.time()
        links[0].send(2, numbered(1, [bytes(400_000)]), Priority.BULK)
        links[1].send(2, numbered(2, [bytes(100_000)]), Priority.DECODE)
        await order.until_frames(2)
        return order.numbers(2), loop.time() - start

    numbers, seconds = run_virtual(scenario())
    assert numbers == [2, 1]
    assert seconds == pytest.approx(0.5, rel=0.02)


def test_loss_costs_time_and_never_bytes() -> None:
    async def scenario(loss: float) -> tuple[list[int], float]:
        heard, loop = Recorder(), asyncio.get_running_loop()
        network = MemoryNetwork(random.Random(1), shape=LinkShape(delay_s=0.02, loss=loss))
        link = await dialled(network, heard)
        start = loop.time()
        for number in range(50):
            link.send(2, numbered(number, [bytes(2000)]), Priority.DECODE)
        await heard.until_frames(50)
        return heard.numbers(2), loop.time() - start

    whole, lossy = run_virtual(scenario(0.0)), run_virtual(scenario(0.3))
    assert whole[0] == lossy[0] == list(range(50))
    assert lossy[1] > whole[1]


def test_a_cut_ends_links_at_once_on_both_sides_and_new_ones_come_up() -> None:
    async def scenario(world: VirtualWorld) -> None:
        link, heard_here, back, heard_there = await linked(world)
        world.network.cut(link.peer, back.peer)
        assert not link.is_up
        assert not back.is_up
        for heard in (heard_here, heard_there):
            assert isinstance(await heard.until_lost(), LinkLost)
        await linked(world)

    VirtualWorld().run(scenario)


def test_silence_ends_links_after_the_time_that_is_set_and_says_how_long() -> None:
    async def scenario(world: VirtualWorld) -> None:
        loop = asyncio.get_running_loop()
        link, heard_here, back, heard_there = await linked(world)
        await asyncio.sleep(1)
        world.network.silence(link.peer, back.peer)
        start = loop.time()
        for heard in (heard_here, heard_there):
            error = await heard.until_lost()
            assert "silent for 2.0 s" in str(error) or "silent for 2.1 s" in str(error)
        assert 1.5 < loop.time() - start <= 2.1
        with pytest.raises(Unreachable):
            await world.node().transport.dial(link.peer, ["127.0.0.1:1"])

    VirtualWorld().run(scenario, LinkConfig(dead_after_s=2.0))


def test_what_is_sent_into_a_short_silence_arrives_after_it() -> None:
    async def scenario(world: VirtualWorld) -> None:
        link, _, back, heard = await linked(world)
        world.network.silence(link.peer, back.peer)
        for number in range(40):
            link.send(2, numbered(number, [bytes(10_000)]), Priority.DECODE)
        await asyncio.sleep(1.5)
        assert heard.frames == []
        world.network.heal(back.peer, link.peer)
        await heard.until_frames(40)
        assert heard.numbers(2) == list(range(40))
        assert link.is_up

    VirtualWorld().run(scenario)


def test_closing_a_link_waits_a_second_for_a_peer_that_is_gone_and_no_longer() -> None:
    async def scenario(world: VirtualWorld) -> None:
        loop = asyncio.get_running_loop()
        link, heard, back, _ = await linked(world)
        world.network.silence(link.peer, back.peer)
        link.send(2, numbered(1, [bytes(1_000_000)]), Priority.BULK)
        start = loop.time()
        await link.close()
        assert loop.time() - start == pytest.approx(1.0)
        await heard.until_lost()

    VirtualWorld().run(scenario)


def test_a_dial_of_two_addresses_that_is_called_off_at_any_moment_leaves_no_link_up() -> None:
    async def scenario() -> None:
        accepted: list[Link] = []
        network = MemoryNetwork(random.Random(1), shape=LinkShape(delay_s=0.3))  # both attempts overlap
        there, here = network.endpoint(B), network.endpoint(A)
        addresses = [(await there.listen(f"b:{port}", accepted.append)).address for port in (1, 2)]
        for steps in range(100):
            dialling = asyncio.ensure_future(here.dial(B, addresses))
            await asyncio.sleep(0.02 * steps)
            if dialling.done():
                await (await dialling).close()
            dialling.cancel()
            await asyncio.wait([dialling])
            await asyncio.sleep(3)
            assert not any(link.is_up for link in accepted)

    run_virtual(scenario())


def test_a_dial_into_a_silence_times_out_or_waits_for_its_end() -> None:
    async def scenario() -> None:
        network = MemoryNetwork(random.Random(1), config=LinkConfig(handshake_timeout_s=3.0))
        here = network.endpoint(A)
        listener = await network.endpoint(B).listen("b:0", lambda link: link.start(Recorder()))
        network.silence(A, B)
        with pytest.raises(Unreachable, match=r"3\.0 s"):
            await here.dial(B, [listener.address])
        asyncio.get_running_loop().call_later(1.0, network.heal, A, B)
        assert (await here.dial(B, [listener.address])).is_up

    run_virtual(scenario())


def test_a_crashed_node_is_gone_for_all_and_its_address_is_free() -> None:
    async def scenario() -> None:
        network, heard = MemoryNetwork(random.Random(1)), Recorder()
        listener = await network.endpoint(B).listen("b:1", lambda link: link.start(Recorder()))
        here = network.endpoint(A)
        link = await here.dial(B, [listener.address])
        link.start(heard)
        network.crash(B)
        await heard.until_lost()
        with pytest.raises(Unreachable):
            await here.dial(B, ["b:1"])
        await network.endpoint(B).listen("b:1", lambda link: link.start(Recorder()))
        assert (await here.dial(B, ["b:1"])).is_up

    run_virtual(scenario())


def test_paths_differ_by_direction_where_they_are_shaped_so() -> None:
    async def scenario() -> tuple[float, float]:
        loop, heard, back_heard = asyncio.get_running_loop(), Recorder(), Recorder()
        network = MemoryNetwork(random.Random(1))
        accepted: list[Link] = []
        listener = await network.endpoint(B).listen("b:0", accepted.append)
        link = await network.endpoint(A).dial(B, [listener.address])
        accepted[0].start(heard)
        link.start(back_heard)
        network.shape(A, B, LinkShape(delay_s=0.3), LinkShape(delay_s=0.1))
        start = loop.time()
        link.send(2, numbered(1), Priority.DECODE)
        await heard.until_frames(1)
        there = loop.time() - start
        accepted[0].send(2, numbered(1), Priority.DECODE)
        await back_heard.until_frames(1)
        return there, loop.time() - start - there

    assert run_virtual(scenario()) == pytest.approx((0.3, 0.1))


def test_a_shape_that_cannot_be_is_refused() -> None:
    for wrong in ({"delay_s": -1.0}, {"loss": 1.0}, {"rate_bytes_per_s": 0.0}, {"queue_bytes": -1}):
        with pytest.raises(UsageError):
            LinkShape(**wrong)  # type: ignore[arg-type]


async def busy_network(seed: int) -> list[tuple[float, str, int, int]]:
    """Eight nodes on bad paths send each other frames at random, are cut and fall silent; every event is written down."""
    draw = random.Random(seed)
    shape = LinkShape(delay_s=0.03, jitter_s=0.02, rate_bytes_per_s=1e6, loss=0.05)
    network = MemoryNetwork(random.Random(seed), shape=shape)
    loop, log = asyncio.get_running_loop(), list[tuple[float, str, int, int]]()

    class Logger:
        def __init__(self, name: str) -> None:
            self.name = name

        def on_frame(self, link: Link, channel: int, frame: object) -> None:
            log.append((loop.time(), self.name + link.peer[0], channel, link.stats.bytes_received))

        def on_lost(self, link: Link, error: Exception) -> None:
            log.append((loop.time(), f"{self.name}{link.peer[0]} {error}", 0, link.stats.bytes_sent))

    names = [NodeId(letter * 64) for letter in "01234567"]
    ends = [network.endpoint(name, uplink_bytes_per_s=2e6) for name in names]
    links: list[Link] = []
    for end in ends:
        await end.listen(f"{end.node_id[0]}:1", lambda link, name=end.node_id[0]: link.start(Logger(name)))  # type: ignore[misc]
    for end in ends:
        for peer in draw.sample(names, 3):
            if peer != end.node_id:
                link = await end.dial(peer, [f"{peer[0]}:1"])
                link.start(Logger(end.node_id[0]))
                links.append(link)
    for step in range(300):
        await asyncio.sleep(draw.uniform(0, 0.05))
        link = draw.choice(links)
        if link.is_up:
            link.send(draw.choice((2, 4, 6)), numbered(step, [bytes(draw.randrange(60_000))]), draw.choice(list(Priority)))
        a, b = draw.sample(names, 2)
        if step % 50 == 49:
            network.cut(a, b)
        if step % 60 == 30:
            network.silence(a, b)
            loop.call_later(draw.uniform(0.5, 5.0), network.heal, a, b)
    await asyncio.sleep(30)
    for end in ends:
        await end.close()
    return log


def test_the_same_seed_gives_the_same_events_and_another_seed_others() -> None:
    first, again, other = (run_virtual(busy_network(seed)) for seed in (11, 11, 12))
    assert len(first) > 200
    assert first == again
    assert first != other
