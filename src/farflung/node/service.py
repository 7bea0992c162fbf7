"""A node: listens, opens sessions for drivers, computes its layers, and tells the directory that it is there."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from random import Random

import structlog

from farflung import __version__
from farflung.core.errors import StageLost, first_cause
from farflung.core.ids import NodeId, short
from farflung.engine.backend import StageBackend
from farflung.identity.keys import Identity
from farflung.node.admission import Admission
from farflung.node.compute import ComputeConfig, compute_forever
from farflung.node.log_budget import LogBudget, LogConfig
from farflung.node.quotas import Quotas
from farflung.node.stage_session import StageSession
from farflung.node.table import SessionTable, TableConfig
from farflung.swarm.announcer import Announcer, AnnouncerConfig
from farflung.swarm.directory import Directory
from farflung.swarm.records import NodeRecord, Query
from farflung.swarm.roster import Roster
from farflung.transport.lines import Line, LinkPool
from farflung.transport.link import Frame, Listener, Transport

log = structlog.get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class NodeConfig:
    """How a node serves.

    Attributes:
        listen: ``host:port``; port 0 takes any.
        advertise: addresses announced to others; empty announces the one listened on.
        t_curve_ms: measured time of a step by number of tokens.
        threads: compute threads, announced with the T-curve.
        record_ttl_s: how long the directory believes a record that is not renewed.
        announce_timeout_s: how long ``start`` waits for the directory to take the record.
        drain_timeout_s: how long running sessions may go on after ``drain`` began.
        find_timeout_s: how long to look for the address of a next hop.
        dial_timeout_s: how long to find and dial it in all.
        admission: whose sessions it takes.
        quotas: how much of it one driver may have.
        log: room for what stages sent, so that it can be sent again.
    """

    listen: str = "127.0.0.1:0"
    advertise: tuple[str, ...] = ()
    t_curve_ms: Mapping[int, float] = field(default_factory=dict)
    record_ttl_s: float = 15.0
    announce_timeout_s: float = 3.0
    drain_timeout_s: float = 30.0
    find_timeout_s: float = 2.0
    dial_timeout_s: float = 2.5
    admission: Admission = field(default_factory=Admission)
    quotas: Quotas = field(default_factory=Quotas)
    log: LogConfig = field(default_factory=LogConfig)
    table: TableConfig = field(default_factory=TableConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)


@dataclass(frozen=True, kw_only=True)
class NodePorts:
    """What a node talks through; every one has a real and a simulated kind.

    Attributes:
        identity: the node's key.
        transport: links under that key.
        directory: where it announces itself and finds others.
        backend: computes.
        clock: wall clock, seconds since 1970.
        random: for jitter of renewals.
    """

    identity: Identity
    transport: Transport
    directory: Directory
    backend: StageBackend
    clock: Callable[[], float]
    random: Random


class Node:
    """``start`` it, wait on ``ended``, end it with ``drain``. Its tasks live inside ``start`` .. ``drain``."""

    def __init__(self, config: NodeConfig, ports: NodePorts) -> None:
        self._config = config
        self._ports = ports
        backend = ports.backend
        self._pool = LinkPool(ports.transport, self._addresses_of, self._on_new_line, dial_timeout_s=config.dial_timeout_s)
        self._logs = LogBudget(config.log)
        self._table = SessionTable(
            replace(config.table, quotas=config.quotas),
            self.node_id,
            backend,
            self._pool,
            logs=self._logs,
            admission=config.admission,
            clock=ports.clock,
            random=ports.random,
            connect=self._connect,
        )
        self._roster = Roster(ports.directory, Query(model=backend.spec.digest, beside=backend.layers))
        self._announcer = Announcer(
            AnnouncerConfig(ttl_s=config.record_ttl_s),
            ports.directory,
            ports.identity,
            self._record,
            wall_clock=ports.clock,
            random=ports.random,
        )
        self._stop = asyncio.Event()
        self._main: asyncio.Task[None] | None = None
        self._group: asyncio.TaskGroup | None = None
        self._listener: Listener | None = None

    @property
    def node_id(self) -> NodeId:
        return self._ports.identity.node_id

    @property
    def listen(self) -> str:
        """Where it listens, with the real port. Before ``start`` what was asked for."""
        return self._listener.address if self._listener is not None else self._config.listen

    @property
    def table(self) -> SessionTable:
        """Its sessions, for status and tests."""
        return self._table

    @property
    def log_memory(self) -> int:
        """Bytes in memory of what its stages sent and keep."""
        return self._logs.memory_used

    def admit(self, admission: Admission) -> None:
        """Judges openings by it from now on; sessions that are open go on."""
        self._table.admit(admission)

    async def start(self) -> None:
        """Listens, and announces this node once. Raises AddressInUse, DirectoryUnreachable, RecordRefused."""
        started: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._main = asyncio.create_task(self._run(started), name=f"node {short(self.node_id)}")
        done, _ = await asyncio.wait({started, self._main}, return_when=asyncio.FIRST_COMPLETED)
        if self._main in done:
            started.cancel()
            self._main.result()

    async def ended(self) -> None:
        """Returns once the node has ended; raises why, where it could not go on."""
        if self._main is not None:
            await asyncio.shield(self._main)

    async def drain(self) -> None:
        """No new sessions; running ones end by themselves or after the timeout; then everything is closed."""
        if self._main is None:
            return
        self._table.draining = True
        if not self._main.done():
            self._announcer.announce_now()
            try:
                async with asyncio.timeout(self._config.drain_timeout_s):
                    await self._table.empty.wait()
            except TimeoutError:
                log.warning("drain timeout", sessions=len(self._table.sessions), seconds=self._config.drain_timeout_s)
        self._stop.set()
        await self._main

    async def _run(self, started: asyncio.Future[None]) -> None:
        try:
            self._listener = await self._ports.transport.listen(self._config.listen, self._pool.adopt)
            async with asyncio.TaskGroup() as group:
                self._group = group
                paced = self._config.compute.with_curve(self._config.t_curve_ms)
                compute = group.create_task(compute_forever(self._table, self._ports.backend, paced))
                async with self._roster, self._announcer:
                    for background in (self._roster, self._announcer):
                        group.create_task(background.ended())  # should one fail, so does the node, loudly
                    await self._announcer.announced(self._config.announce_timeout_s)
                    if not started.cancelled():
                        started.set_result(None)
                    await self._stop.wait()
                self._group = None
                compute.cancel()
        except BaseExceptionGroup as failures:
            cause = first_cause(failures)
            if cause is None:
                raise
            raise cause from None
        finally:
            self._group = None
            stopping = StageLost(
                f"node {short(self.node_id)} (layers {self._ports.backend.layers}) stopped", hint="choose another route"
            )
            self._table.end_all(stopping)
            if self._listener is not None:
                await self._listener.close()
            await self._pool.close()
            await self._ports.transport.close()
            self._logs.close()

    def _on_new_line(self, line: Line, frame: Frame) -> None:
        self._table.on_new_line(line, frame)

    def _connect(self, session: StageSession) -> None:
        if self._group is not None:
            self._group.create_task(session.connect(), name=f"connect {short(session.id)}")

    async def _addresses_of(self, node_id: NodeId) -> Sequence[str]:
        record = await self._roster.find(node_id, timeout_s=self._config.find_timeout_s)
        return record.addresses

    def _record(self, sequence: int, now_unix_s: float) -> NodeRecord:
        backend, key = self._ports.backend, self._config.admission.swarm_key
        return NodeRecord(
            node_id=self.node_id,
            sequence=sequence,
            issued_unix_s=now_unix_s,
            ttl_s=self._config.record_ttl_s,
            addresses=self._config.advertise or (self.listen,),
            model=backend.spec.name,
            family=backend.spec.family,
            digest=backend.spec.digest,
            model_layers=backend.spec.layers,
            hidden_size=backend.spec.hidden_size,
            layers=backend.layers,
            t_curve_ms=tuple(sorted(self._config.t_curve_ms.items())),
            kv_tokens=backend.kv_tokens,
            kv_free_tokens=backend.kv_free_tokens,
            codecs=tuple(sorted(self._config.table.codecs)),
            engine_class=backend.engine_class,
            status="draining" if self._table.draining else "serving",
            version=__version__,
            membership="" if key is None else key.record_proof(self.node_id),
        )
