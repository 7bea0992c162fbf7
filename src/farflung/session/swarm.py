"""A driver's view of one model in a swarm: its nodes, kept current, and the links to them, kept warm."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass
from random import Random
from types import TracebackType
from typing import Self

from farflung.core.errors import DigestMismatch, LayersMissing, UsageError
from farflung.core.ids import NodeId, SessionId, short
from farflung.core.messages import OpenText
from farflung.core.model import ModelSpec
from farflung.core.route import Route
from farflung.engine.open_model import open_source
from farflung.identity.keys import Identity
from farflung.identity.swarm_key import SwarmKey
from farflung.planning.routes import RouteOptions, choose_route
from farflung.protocol.driver import GenerationPlan, plan_generation
from farflung.protocol.opening import LEASE_S, OPENING_VALID_S
from farflung.session.chunks import DEFAULT_CHUNK_TOKENS, Chunks, Prompt
from farflung.session.generation import Generation, GenerationSetup
from farflung.session.options import GenerateOptions
from farflung.session.ring import RingPorts
from farflung.session.text_output import TextOutput
from farflung.swarm.directory import Directory
from farflung.swarm.http_client import HttpDirectory, HttpDirectoryConfig
from farflung.swarm.members import members_only
from farflung.swarm.offers import find_model, offers_of
from farflung.swarm.records import NodeRecord, Query
from farflung.swarm.roster import Roster
from farflung.text.detokenize import Detokenizer
from farflung.text.stop import StopStrings
from farflung.text.tokenizer import Tokenizer
from farflung.transport.lines import LinkPool
from farflung.transport.link import LinkConfig, Transport
from farflung.transport.tcp import TcpTransport


@dataclass(frozen=True, kw_only=True)
class DriverPorts:
    """What a driver talks through; every one has a real and a simulated kind.

    Attributes:
        identity: the driver's key; it owns its sessions.
        transport: links under that key.
        directory: who serves what.
        clock: wall clock, seconds since 1970.
        random_bytes: for session ids, and waits between tries.
        swarm_key: of the private swarm, which every opening proves.
    """

    identity: Identity
    transport: Transport
    directory: Directory
    clock: Callable[[], float]
    random_bytes: Callable[[int], bytes]
    swarm_key: SwarmKey | None = None


class Swarm:
    """Use it as an async context manager; ``connect`` makes one for a directory on the network.

    Args:
        spec: the model meant; nodes with another digest are not used.
        tokenizer: None: prompts are token ids, tokens come without text.
        ports: see above.
        find_timeout_s: how long to look for a node's address.
        directory_url: named in hints.
    """

    def __init__(
        self,
        spec: ModelSpec,
        tokenizer: Tokenizer | None,
        ports: DriverPorts,
        *,
        find_timeout_s: float = 2.0,
        directory_url: str = "",
    ) -> None:
        self.spec = spec
        self._tokenizer = tokenizer
        self._ports = ports
        self._find_timeout_s = find_timeout_s
        self._directory_url = directory_url
        self._roster = Roster(ports.directory, Query(model=spec.digest))
        self._pool = LinkPool(ports.transport, self._addresses_of, dial_timeout_s=find_timeout_s + 0.5)
        self._chunks = Chunks()
        self._stack = AsyncExitStack()

    @classmethod
    @asynccontextmanager
    async def connect(
        cls,
        directory_url: str,
        model: str,
        *,
        identity: Identity | None = None,
        swarm_key: SwarmKey | None = None,
        link: LinkConfig | None = None,
    ) -> AsyncGenerator[Self, None]:
        """A swarm for ``model`` (hub id, folder, ``.gguf`` file or catalogue name), found through a directory.

        The model's files are needed here for its tokenizer and digest. Without ``identity`` a fresh key is used.
        ``swarm_key`` is that of a private swarm, e.g. ``SwarmKey.read(Path("swarm.key"))``.
        Raises ModelError, DirectoryUnreachable.
        """
        source = open_source(model)
        spec = source.spec()
        path, arguments = source.tokenizer_arguments()
        tokenizer = Tokenizer(path, arguments)
        identity = identity or Identity.generate()
        transport = TcpTransport(identity, link or LinkConfig(), swarm_key=swarm_key)
        directory = HttpDirectory(
            HttpDirectoryConfig(url=directory_url),
            wall_clock=time.time,
            random=Random(secrets.randbits(64)),  # noqa: S311 - jitter
        )
        ports = DriverPorts(
            identity=identity,
            transport=transport,
            directory=members_only(directory, swarm_key),
            clock=time.time,
            random_bytes=secrets.token_bytes,
            swarm_key=swarm_key,
        )
        async with aclosing(directory), cls(spec, tokenizer, ports, directory_url=directory_url) as swarm:
            yield swarm

    async def __aenter__(self) -> Self:
        await self._stack.__aenter__()
        self._stack.push_async_callback(self._ports.transport.close)
        self._stack.push_async_callback(self._pool.close)
        try:
            await self._stack.enter_async_context(self._roster)
            await self._ports.directory.records(Query(model=self.spec.digest))  # a directory that is away is named at once
            await self._roster.until(lambda _: True, self._find_timeout_s)
        except BaseException:  # cancelled, too: nobody calls __aexit__ for what was never entered
            await self._stack.aclose()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.__aexit__(kind, error, trace)

    @property
    def tokenizer(self) -> Tokenizer:
        """Raises UsageError where this swarm was made without one."""
        if self._tokenizer is None:
            raise UsageError("this swarm has no tokenizer", hint="prompt with token ids")
        return self._tokenizer

    def generate(self, prompt: str | Sequence[int], options: GenerateOptions | None = None) -> Generation:
        """Continues ``prompt``, text or token ids. Raises UsageError, PromptTooLong at once; the rest while iterating."""
        options = options or GenerateOptions()
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        end_tokens: frozenset[int] = frozenset()
        if not options.ignore_eos:
            end_tokens = frozenset(self.spec.eos_token_ids)
            if self._tokenizer is not None:
                end_tokens |= frozenset(self._tokenizer.eos_token_ids)
        plan = GenerationPlan(
            prompt=tuple(ids),
            max_tokens=options.max_tokens,
            vocab_size=self.spec.vocab_size,
            end_tokens=end_tokens,
            chunk_tokens=options.chunk_tokens or DEFAULT_CHUNK_TOKENS,
            tells_ids=options.sampling.needs_history,
        )
        return Generation(
            GenerationSetup(
                ring=RingPorts(
                    identity=self._ports.identity,
                    pool=self._pool,
                    random=Random(int.from_bytes(self._ports.random_bytes(8))),  # noqa: S311 - waits between tries
                ),
                opening=self._opening(plan_generation(plan, self.spec), options),
                plan=plan,
                output=TextOutput(
                    None if self._tokenizer is None else Detokenizer(self._tokenizer, plan.prompt),
                    StopStrings(options.stop) if options.stop else None,
                ),
                answer_timeout_s=options.answer_timeout_s,
                chunk_tokens=None if options.chunk_tokens else lambda route: self._chunk_tokens(route, plan, options),
                learn=self._chunks.learn,
            )
        )

    def chat(self, messages: Sequence[Mapping[str, str]], options: GenerateOptions | None = None) -> Generation:
        """Answers a conversation (``role`` and ``content`` each) through the model's chat template. Raises UsageError."""
        return self.generate(self.tokenizer.encode_chat(messages), options)

    async def route(self, lease_tokens: int, avoid: frozenset[NodeId] = frozenset()) -> Route:
        """The route a generation of that lease would take now, around the nodes to ``avoid``.

        Raises NoSuchModel, DigestMismatch where only another model of that name is served, LayersMissing.
        """
        options = RouteOptions(lease_tokens=lease_tokens, avoid=avoid, model=self.spec.name, directory=self._directory_url)
        if not avoid:
            try:
                return self._route_over(self._roster.records, options)
            except LayersMissing:
                pass  # what the roster knows of free KV ages, and a node may just have come: ask once before giving up
        everything = await self._ports.directory.records()
        wanted = self.spec.digest if self._is_served(everything) else self.spec.name
        served = find_model(everything, wanted, directory=self._directory_url)
        if served.digest != self.spec.digest:
            raise DigestMismatch(
                f"the swarm serves {self.spec.name} as {short(served.digest)}, the files here make {short(self.spec.digest)}",
                hint="use the same weight files: compare `farflung models inspect` on both machines",
            )
        return self._route_over(everything, options)

    def _chunk_tokens(self, route: Route, plan: GenerationPlan, options: GenerateOptions) -> int:
        nodes = {hop.node_id for hop in route.hops}
        round_trips = {link.peer: link.stats.round_trip_s for link in self._pool.links if link.peer in nodes}
        return self._chunks.choose(
            Prompt(
                tokens=len(plan.prompt),
                route=route,
                codec_name=options.codecs[0],
                hidden_size=self.spec.hidden_size,
                curves={record.node_id: record.t_curve_ms for record in self._roster.records if record.node_id in nodes},
                round_trips_s={node: time_s for node, time_s in round_trips.items() if time_s is not None},
            )
        )

    def _is_served(self, records: Sequence[NodeRecord]) -> bool:
        return any(record.digest == self.spec.digest and record.status == "serving" for record in records)

    def _route_over(self, records: Sequence[NodeRecord], options: RouteOptions) -> Route:
        return choose_route(offers_of(records, self.spec.digest, self.spec.layers), self.spec.layers, options)

    def _opening(self, plan: GenerationPlan, options: GenerateOptions) -> Callable[[frozenset[NodeId]], Awaitable[OpenText]]:
        async def opening(avoid: frozenset[NodeId]) -> OpenText:
            owner, session = self._ports.identity.node_id, SessionId(self._ports.random_bytes(16).hex())
            expires_unix_s, key = self._ports.clock() + OPENING_VALID_S, self._ports.swarm_key
            return OpenText(
                session=session,
                owner=owner,
                route=await self.route(plan.lease_tokens, avoid),
                lease_tokens=plan.lease_tokens,
                lease_s=LEASE_S,
                expires_unix_s=expires_unix_s,
                digest=self.spec.digest,
                codecs=options.codecs,
                sampling=options.sampling,
                prompt_tokens=len(plan.prompt),
                max_tokens=plan.max_tokens,
                batch=options.batch,
                proof=b"" if key is None else key.open_proof(owner, session, expires_unix_s),
            )

        return opening

    async def _addresses_of(self, node_id: NodeId) -> Sequence[str]:
        record = await self._roster.find(node_id, timeout_s=self._find_timeout_s)
        return record.addresses
