"""What one more stage costs when it computes nothing: TLS, event loop, compute thread and a row of 8 KB.

    python -m bench.hops [--stages 4] [--tokens 400] [--json]

Real node processes over loopback TLS, a real driver; only the layers are missing. The cost of a hop is the difference between a
ring of ``--stages`` nodes and one of a single node, in the same run, by the number of hops more. Target: <= 0.5 ms median.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import secrets
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack, aclosing

from farflung.core.ids import ModelDigest, SessionId
from farflung.core.model import LayerRange, ModelSpec
from farflung.engine.backend import SessionSpec, StageResult, StageWork, StepReport
from farflung.engine.compute import ComputeThread
from farflung.identity.keys import Identity
from farflung.node.service import Node, NodeConfig, NodePorts
from farflung.session.options import GenerateOptions
from farflung.session.swarm import DriverPorts, Swarm
from farflung.swarm.http_client import HttpDirectory, HttpDirectoryConfig
from farflung.swarm.http_server import DirectoryServer, DirectoryServerConfig
from farflung.transport.link import LinkConfig
from farflung.transport.tcp import TcpTransport

WIDTH = 4096
ROW = bytes(2 * WIDTH)  # bf16


def spec_of(stages: int) -> ModelSpec:
    return ModelSpec(
        name=f"nothing-{stages}",
        family="none",
        digest=ModelDigest(f"{stages:064x}"),
        layers=stages,
        hidden_size=WIDTH,
        vocab_size=1000,
        context_tokens=100_000,
    )


class PassingBackend:
    """Hands rows on through the compute thread and computes nothing."""

    engine_class = "passing"
    kv_tokens = kv_free_tokens = 1_000_000

    def __init__(self, spec: ModelSpec, layers: LayerRange) -> None:
        self.spec = spec
        self.layers = layers
        self._thread = ComputeThread("compute")

    def open(self, spec: SessionSpec) -> None: ...

    def close(self, session: SessionId) -> None: ...

    async def step(self, work: Sequence[StageWork]) -> StepReport:
        return StepReport(await self._thread.run(lambda: tuple(map(self._pass, work))), 0.0)

    def _pass(self, work: StageWork) -> StageResult:
        if self.layers.stop == self.spec.layers:
            return StageResult(session=work.session, tokens=(5,) * len(work.want))
        rows = ROW * sum(run.count for run in work.runs) if work.rows is None else bytes(work.rows)
        return StageResult(session=work.session, rows=rows)

    async def aclose(self) -> None:
        await self._thread.aclose()


def client(url: str) -> HttpDirectory:
    return HttpDirectory(HttpDirectoryConfig(url=url), wall_clock=time.time, random=random.Random())


async def serve(url: str, stages: int, index: int) -> None:
    identity = Identity.generate()
    backend = PassingBackend(spec_of(stages), LayerRange(index, index + 1))
    async with aclosing(client(url)) as directory:
        ports = NodePorts(
            identity=identity,
            transport=TcpTransport(identity, LinkConfig()),
            directory=directory,
            backend=backend,
            clock=time.time,
            random=random.Random(),
        )
        node = Node(NodeConfig(), ports)
        await node.start()
        print("ready", flush=True)
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)  # the parent closes it, or dies
        await node.drain()
    await backend.aclose()


async def ring_ms(url: str, stages: int, tokens: int) -> list[float]:
    """Times between tokens over a ring of that many nodes."""
    async with AsyncExitStack() as stack:
        directory = await stack.enter_async_context(aclosing(client(url)))
        identity = Identity.generate()
        ports = DriverPorts(
            identity=identity,
            transport=TcpTransport(identity, LinkConfig()),
            directory=directory,
            clock=time.time,
            random_bytes=secrets.token_bytes,
        )
        swarm = await stack.enter_async_context(Swarm(spec_of(stages), None, ports))
        generation = swarm.generate([1, 2, 3], GenerateOptions(max_tokens=tokens, codecs=("bf16",), ignore_eos=True))
        async for _ in generation:
            pass
        return [1e3 * time_s for time_s in generation.stats.inter_token_s]


async def measure(stages: int, tokens: int, repeats: int) -> dict[str, float]:
    async with DirectoryServer(DirectoryServerConfig()) as directory:
        wanted = [(count, index) for count in (1, stages) for index in range(count)]
        children = [
            await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "bench.hops", "--serve", directory.url, str(count), str(index)),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
            for count, index in wanted
        ]
        try:
            for child in children:
                await child.stdout.readline()  # type: ignore[union-attr]
            one, many = [], []
            for _ in range(repeats):
                one += await ring_ms(directory.url, 1, tokens)
                many += await ring_ms(directory.url, stages, tokens)
        finally:
            await asyncio.gather(*(child.communicate(b"") for child in children))
    one_ms, many_ms = statistics.median(one), statistics.median(many)
    return {"ring_of_1_ms": one_ms, f"ring_of_{stages}_ms": many_ms, "added_per_hop_ms": (many_ms - one_ms) / (stages - 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=400)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--serve", nargs=3, metavar=("URL", "STAGES", "INDEX"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        url, stages, index = arguments.serve
        asyncio.run(serve(url, int(stages), int(index)))
        return
    result = asyncio.run(measure(arguments.stages, arguments.tokens, arguments.repeats))
    print(json.dumps(result) if arguments.json else "\n".join(f"{key:<18} {value:7.3f}" for key, value in result.items()))


if __name__ == "__main__":
    main()
