"""A directory and nodes with real TLS, HTTP and compute threads, on the running event loop."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import AsyncGenerator, Iterator
from concurrent.futures import Future
from contextlib import AsyncExitStack, aclosing, asynccontextmanager, contextmanager
from itertools import pairwise
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from farflung.core.model import LayerRange
from farflung.engine.loader import load_stage
from farflung.engine.open_model import open_source
from farflung.engine.torch_backend import BackendConfig, TorchBackend
from farflung.identity.keys import Identity
from farflung.node.service import Node, NodeConfig, NodePorts
from farflung.swarm.http_client import HttpDirectory, HttpDirectoryConfig
from farflung.swarm.http_server import DirectoryServer, DirectoryServerConfig
from farflung.transport.link import LinkConfig
from farflung.transport.tcp import TcpTransport


def add_tokenizer(folder: Path) -> Path:
    """Puts a small byte-level tokenizer beside a tiny model."""
    from transformers import PreTrainedTokenizerFast

    pipeline = Tokenizer(models.BPE())
    pipeline.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pipeline.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    pipeline.train_from_iterator(["the quick brown fox jumps over the lazy dog"], trainer)
    PreTrainedTokenizerFast(tokenizer_object=pipeline, eos_token="</s>").save_pretrained(folder)
    return folder


@asynccontextmanager
async def local_swarm(model: Path, cuts: tuple[int, ...], nodes: list[Node] | None = None) -> AsyncGenerator[str, None]:
    """Serves the model's stages, cut at ``cuts``, in fp32 with one compute thread each; gives the directory's URL.

    ``nodes`` takes them, for a test that breaks something.
    """
    source = open_source(str(model))
    spec = source.spec()
    async with AsyncExitStack() as stack:
        server = await stack.enter_async_context(DirectoryServer(DirectoryServerConfig()))
        for start, stop in pairwise((0, *cuts, spec.layers)):
            backend = TorchBackend(
                load_stage(source, LayerRange(start, stop), torch.float32), spec, BackendConfig(kv_tokens=1024, threads=1)
            )
            stack.push_async_callback(backend.aclose)
            directory = HttpDirectory(HttpDirectoryConfig(url=server.url), wall_clock=time.time, random=random.Random())
            await stack.enter_async_context(aclosing(directory))
            identity = Identity.generate()
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
            stack.push_async_callback(node.drain)
            if nodes is not None:
                nodes.append(node)
        yield server.url


@contextmanager
def served(model: Path, cuts: tuple[int, ...]) -> Iterator[str]:
    """``local_swarm`` on an event loop in a thread of its own."""
    ready: Future[tuple[str, asyncio.AbstractEventLoop, asyncio.Event]] = Future()

    async def serve() -> None:
        async with local_swarm(model, cuts) as url:
            stop = asyncio.Event()
            ready.set_result((url, asyncio.get_running_loop(), stop))
            await stop.wait()

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    url, loop, stop = ready.result(timeout=60)
    yield url
    loop.call_soon_threadsafe(stop.set)
    thread.join(timeout=30)
    assert not thread.is_alive()
