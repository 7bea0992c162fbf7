"""The serving half of ``farflung node``: from loaded layers to the end of its last session."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

import platformdirs

from farflung.cli.admission import describe, quotas_for, read_admission
from farflung.cli.directory import directory_at
from farflung.cli.output import Output
from farflung.cli.stopping import ParentWatch, first_of, on_hangup, stop_requests
from farflung.core.errors import FarflungError
from farflung.core.ids import short

if TYPE_CHECKING:
    from farflung.cli.choices import Part
    from farflung.core.model import LayerRange
    from farflung.engine.torch_backend import TorchBackend
    from farflung.identity.keys import Identity
    from farflung.node.admission import Admission
    from farflung.node.log_budget import LogConfig
    from farflung.node.service import Node


@dataclass(frozen=True, kw_only=True)
class NodeOptions:
    """What the command line says; see the command for the meaning of each."""

    directory: str
    model: str
    layers: LayerRange | Part | None
    listen: str
    advertise: tuple[str, ...]
    dtype: str
    codecs: frozenset[str]
    threads: int
    kv_tokens: int
    model_digest: str
    state: Path | None
    ephemeral: bool
    admission: Admission
    allow: tuple[str, ...]
    driver_share: float
    log_memory_mib: int
    log_disk_mib: int

    @property
    def log(self) -> LogConfig:
        """Room for the rows that may have to be sent again."""
        from farflung.node.log_budget import LogConfig

        place = self.state or platformdirs.user_cache_path("farflung", appauthor=False)
        return LogConfig(
            memory_bytes=self.log_memory_mib << 20,
            disk_bytes=self.log_disk_mib << 20,
            directory=place / "rows" if self.log_disk_mib else None,
        )

    @property
    def addresses(self) -> tuple[str, ...]:
        """Where others may try to reach it."""
        return (self.listen, *self.advertise)


async def serve_stage(
    out: Output, options: NodeOptions, identity: Identity, backend: TorchBackend, watch: ParentWatch | None
) -> None:
    """Announces the node, serves until it is told to stop, then drains."""
    from farflung.engine.t_curve import measure_t_curve
    from farflung.node.service import Node, NodeConfig, NodePorts
    from farflung.node.table import TableConfig
    from farflung.transport.hello import hello_with
    from farflung.transport.link import LinkConfig
    from farflung.transport.tcp import TcpTransport

    config = NodeConfig(
        listen=options.listen,
        advertise=options.advertise,
        t_curve_ms=await measure_t_curve(backend),
        admission=options.admission,
        quotas=quotas_for(options.admission, options.addresses, options.driver_share),
        log=options.log,
        table=TableConfig(codecs=options.codecs),
    )
    with stop_requests(watch) as stop:
        async with directory_at(options.directory, options.admission.swarm_key) as directory:
            node = Node(
                config,
                NodePorts(
                    identity=identity,
                    transport=TcpTransport(
                        identity, LinkConfig(), hello=hello_with(options.codecs), swarm_key=options.admission.swarm_key
                    ),
                    directory=directory,
                    backend=backend,
                    clock=time.time,
                    random=Random(),  # noqa: S311 - jitter, not keys
                ),
            )
            await node.start()
            out.json(
                {
                    "event": "ready",
                    "node_id": node.node_id,
                    "listen": node.listen,
                    "layers": [backend.layers.start, backend.layers.stop],
                    "engine": backend.engine_class,
                    "kv_tokens": backend.kv_tokens,
                    "serves": describe(options.admission, options.addresses),
                }
            )
            whom = describe(options.admission, options.addresses)
            out.print(
                f"node {short(node.node_id)} at {node.listen} serves layers {backend.layers} of {backend.spec.name} "
                f"({backend.engine_class}, {backend.kv_tokens} tokens of KV) to {whom}"
            )
            try:
                with on_hangup((lambda: _read_list_again(out, options, node)) if options.allow else None):
                    await first_of(stop.wait(), node.ended())
                out.note("draining: running sessions may end, no new ones are taken")
            finally:
                await node.drain()
                await backend.aclose()


def _read_list_again(out: Output, options: NodeOptions, node: Node) -> None:
    """The operator has changed the list. Where it cannot be read the old one holds."""
    try:
        admission = replace(options.admission, drivers=read_admission("", options.allow).drivers)
    except FarflungError as error:
        out.error(error)
        return
    node.admit(admission)
    out.note(f"serves {describe(admission, options.addresses)} from now on; sessions that are open go on")
