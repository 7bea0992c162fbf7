"""The pool of links that a node or driver keeps, on a memory network and the virtual clock."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence

import pytest
from link_worlds import numbered

from farflung.core.errors import FarflungError, LinkLost, Unreachable
from farflung.core.ids import NodeId
from farflung.lab.virtual_clock import run_virtual
from farflung.transport.lines import Line, LinkPool, PoolLimits
from farflung.transport.link import Frame, Link, Priority
from farflung.transport.memory import LinkShape, MemoryNetwork

A, B = (NodeId(letter * 64) for letter in "ab")


class Holder:
    """Holds a line and writes down what it is told."""

    def __init__(self) -> None:
        self.frames: list[Frame] = []
        self.lost: list[FarflungError] = []

    def on_frame(self, line: Line, frame: Frame) -> None:
        self.frames.append(frame)

    def on_lost(self, line: Line, error: FarflungError) -> None:
        self.lost.append(error)


class Quiet:
    """A handler of a link that wants nothing."""

    def on_frame(self, link: Link, channel: int, frame: Frame) -> None: ...

    def on_lost(self, link: Link, error: FarflungError) -> None: ...


class Pair:
    """A pool of node A and the bare transport of node B, both listening, 20 ms apart."""

    def __init__(self, limits: PoolLimits | None = None) -> None:
        self.network = MemoryNetwork(random.Random(1), shape=LinkShape(delay_s=0.02))
        self.here, self.there = self.network.endpoint(A), self.network.endpoint(B)
        self.opened: list[Line] = []
        self.pool = LinkPool(self.here, self.addresses_of, self.on_new_line, limits=limits)
        self.is_known = True

    def on_new_line(self, line: Line, frame: Frame) -> None:
        self.opened.append(line)
        line.bind(Holder())

    async def addresses_of(self, peer: NodeId) -> Sequence[str]:
        if not self.is_known:
            await asyncio.sleep(60)
        return ["b:1"]

    async def listen(self) -> Pair:
        await self.here.listen("a:1", self.pool.adopt)
        await self.there.listen("b:1", lambda link: link.start(Quiet()))
        return self

    async def dial_back(self) -> Link:
        link = await self.there.dial(A, ["a:1"])
        link.start(Quiet())
        await asyncio.sleep(0.1)
        return link


def run(scenario: Callable[[Pair], Awaitable[None]], limits: PoolLimits | None = None) -> None:
    async def whole() -> None:
        pair = await Pair(limits).listen()
        await scenario(pair)
        await pair.pool.close()
        await asyncio.gather(pair.here.close(), pair.there.close())
        assert asyncio.all_tasks() == {asyncio.current_task()}

    run_virtual(whole())


def test_a_peer_is_dialled_once_for_all_who_ask() -> None:
    async def scenario(pair: Pair) -> None:
        impatient = asyncio.ensure_future(pair.pool.line(B, Holder()))
        asking = [asyncio.ensure_future(pair.pool.line(B, Holder())) for _ in range(3)]
        await asyncio.sleep(0.01)
        impatient.cancel()
        lines = await asyncio.gather(*asking)
        assert len({line.channel for line in lines}) == 3
        assert len(pair.pool.links) == 1

    run(scenario)


def test_a_link_that_the_peer_dials_serves_those_who_wait_for_a_dial_to_it() -> None:
    async def scenario(pair: Pair) -> None:
        pair.is_known = False
        waiting = asyncio.ensure_future(pair.pool.line(B, Holder()))
        await asyncio.sleep(0.1)
        await pair.dial_back()
        assert waiting.done()
        assert (await waiting).link.is_up
        assert len(pair.pool.links) == 1

    run(scenario)


def test_of_two_links_to_a_peer_either_serves_when_the_other_is_lost() -> None:
    for lost in (0, 1):

        async def scenario(pair: Pair, lost: int = lost) -> None:
            links = [await pair.dial_back(), await pair.dial_back()]
            await links[lost].close()
            await asyncio.sleep(0.1)
            pair.is_known = False
            assert (await pair.pool.line(B, Holder())).link.is_up

        run(scenario)


def test_one_peer_has_two_links_at_most_and_the_oldest_goes() -> None:
    async def scenario(pair: Pair) -> None:
        links = [await pair.dial_back() for _ in range(5)]
        assert [link.is_up for link in links] == [False, False, False, True, True]
        assert len(pair.pool.links) == 2

    run(scenario)


def test_only_links_that_are_up_are_listed() -> None:
    async def scenario(pair: Pair) -> None:
        line = await pair.pool.line(B, Holder())
        assert pair.pool.links == [line.link]
        line.link.end(LinkLost("enough"))
        assert pair.pool.links == []

    run(scenario)


def test_closing_tells_those_who_wait_for_a_dial_and_none_is_begun_afterwards() -> None:
    async def scenario(pair: Pair) -> None:
        pair.is_known = False
        waiting = asyncio.ensure_future(pair.pool.line(B, Holder()))
        await asyncio.sleep(0.1)
        await pair.pool.close()
        with pytest.raises(LinkLost, match="closing"):
            await waiting
        with pytest.raises(LinkLost, match="closing"):
            await pair.pool.line(B, Holder())
        assert not (await pair.dial_back()).is_up

    run(scenario)


def test_a_peer_that_cannot_be_found_is_unreachable_in_time() -> None:
    async def scenario(pair: Pair) -> None:
        pair.is_known = False
        with pytest.raises(Unreachable, match=r"5\.0 s"):
            await pair.pool.line(B, Holder())

    run(scenario)


def test_a_link_lost_at_any_moment_is_told_by_an_error_or_to_the_holder() -> None:
    for steps in range(30):

        async def scenario(pair: Pair, steps: int = steps) -> None:
            holder = Holder()
            asyncio.get_running_loop().call_later(0.005 * steps, pair.network.crash, B)
            try:
                await pair.pool.line(B, holder)
            except FarflungError:
                assert holder.lost == []
            else:
                await asyncio.sleep(1)
                assert len(holder.lost) == 1

        run(scenario)


def test_a_frame_opens_a_line_on_a_channel_of_the_peer_and_never_on_one_of_ours() -> None:
    async def scenario(pair: Pair) -> None:
        link, holder = await pair.dial_back(), Holder()
        for channel in (1, 2):
            link.send(channel, numbered(channel), Priority.DECODE)
        await asyncio.sleep(0.1)
        assert [line.channel for line in pair.opened] == [2]
        line = await pair.pool.line(B, holder)
        assert line.channel == 1
        assert holder.frames == []
        link.send(1, numbered(3), Priority.DECODE)
        await asyncio.sleep(0.1)
        line.release()
        link.send(1, numbered(4), Priority.DECODE)
        await asyncio.sleep(0.1)
        assert [frame.message for frame in holder.frames] == [numbered(3).message]
        assert len(pair.opened) == 1

    run(scenario)


def test_an_accepted_link_on_which_nothing_is_ever_opened_ends_though_its_peer_pings() -> None:
    async def scenario(pair: Pair) -> None:
        link = await pair.dial_back()
        await asyncio.sleep(20)
        assert link.is_up
        await asyncio.sleep(20)
        assert not link.is_up
        assert pair.pool.links == []

    run(scenario)


def test_a_link_that_was_used_may_rest_for_longer_and_one_in_use_for_ever() -> None:
    async def scenario(pair: Pair) -> None:
        link = await pair.dial_back()
        link.send(link.new_channel(), numbered(1), Priority.DECODE)
        await asyncio.sleep(5000)
        assert link.is_up  # something is open on it
        pair.opened[0].release()
        await asyncio.sleep(800)
        assert link.is_up
        await asyncio.sleep(200)
        assert not link.is_up

    run(scenario)


def test_a_link_that_this_end_dialled_is_kept_warm() -> None:
    async def scenario(pair: Pair) -> None:
        line = await pair.pool.line(B, Holder())
        line.release()
        await asyncio.sleep(5000)
        assert line.link.is_up

    run(scenario)


def test_where_links_are_too_many_the_one_that_was_idle_longest_makes_room() -> None:
    async def scenario(pair: Pair) -> None:
        names = [NodeId(digit * 64) for digit in "1234"]
        links = []
        for name in names[:3]:
            link = await pair.network.endpoint(name).dial(A, ["a:1"])
            link.start(Quiet())
            links.append(link)
            await asyncio.sleep(1)
        links[0].send(links[0].new_channel(), numbered(1), Priority.DECODE)
        await asyncio.sleep(1)
        links.append(await pair.network.endpoint(names[3]).dial(A, ["a:1"]))
        await asyncio.sleep(1)
        assert [link.is_up for link in links] == [True, False, True, True]
        await asyncio.gather(*(link.close() for link in links))

    run(scenario, PoolLimits(links=3))


def test_where_all_links_are_in_use_the_newcomer_is_turned_away() -> None:
    async def scenario(pair: Pair) -> None:
        links = []
        for digit in "123":
            link = await pair.network.endpoint(NodeId(digit * 64)).dial(A, ["a:1"])
            link.start(Quiet())
            link.send(link.new_channel(), numbered(1), Priority.DECODE)
            links.append(link)
            await asyncio.sleep(1)
        assert [link.is_up for link in links] == [True, True, False]
        await asyncio.gather(*(link.close() for link in links))

    run(scenario, PoolLimits(links=2))


def test_frames_for_nobody_are_dropped_and_without_end_they_end_their_link() -> None:
    async def scenario(pair: Pair) -> None:
        pair.pool._on_new_line = lambda line, frame: None  # wants none of them
        link = await pair.dial_back()
        for _ in range(2000):
            link.send(2, numbered(1), Priority.DECODE)
        await asyncio.sleep(1)
        assert link.is_up
        for _ in range(2000):
            link.send(2, numbered(1), Priority.DECODE)
        await asyncio.sleep(1)
        assert not link.is_up

    run(scenario)
