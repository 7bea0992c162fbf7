"""``farflung chat``: a conversation in the terminal.

The links live on an event loop in a thread of its own, so they stay warm while the main thread waits for a person to type; the
main thread is where line editing and Ctrl-C work on every platform.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
import threading
from collections.abc import Coroutine, Iterator
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from farflung.cli.admission import IdentityFile, SwarmKeyOption
from farflung.cli.choices import check_codec, check_speculation
from farflung.cli.driving import Driver
from farflung.cli.options import (
    DEFAULT_DIRECTORY,
    Codec,
    Debug,
    Directory,
    Json,
    MaxTokens,
    Model,
    Seed,
    Temperature,
    TopP,
    examples,
)
from farflung.cli.output import Output, command
from farflung.core.errors import FarflungError

if TYPE_CHECKING:
    from farflung.session import GenerateOptions, Swarm

app = typer.Typer()

HELP = "/reset forgets the conversation, /exit leaves, Ctrl-C stops an answer"

Message = dict[str, str]
_T = TypeVar("_T")


@app.command(
    epilog=examples(
        "farflung chat -m qwen2.5-coder-0.5b",
        'farflung chat -m qwen2.5-coder-0.5b --system "Answer in one sentence."',
        "echo 'What is a monad?' | farflung chat -m qwen2.5-coder-0.5b",
    )
)
def chat(
    *,
    directory: Directory = DEFAULT_DIRECTORY,
    model: Model,
    system: Annotated[str, typer.Option("--system", metavar="TEXT", help="Instructions before the conversation.")] = "",
    max_tokens: MaxTokens = 512,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    codec: Codec = "int8",
    speculate: Annotated[str, typer.Option("--speculate", help="Guess tokens ahead: not built yet, auto is off.")] = "auto",
    swarm_key: SwarmKeyOption = "",
    identity: IdentityFile = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Talk with an instruct model over the nodes of a swarm; it remembers what was said.

    /reset forgets the conversation, /exit (or the end of input) leaves. Ctrl-C stops a running answer; at the prompt it leaves.
    With piped input every line is one message.
    """
    with command(json=json, debug=debug) as out:
        from farflung.core.sampling import SamplingOptions
        from farflung.session import GenerateOptions

        check_speculation(speculate)
        check_codec(codec)
        sampling = SamplingOptions(temperature=temperature, top_p=top_p, seed=seed)
        options = GenerateOptions(max_tokens=max_tokens, sampling=sampling, codecs=(codec,))
        driver = Driver(directory=directory, model=model, swarm_key=swarm_key, identity=identity)
        with _connected(driver) as (loop, swarm):
            _converse(out, loop, swarm, options, [{"role": "system", "content": system}] if system else [])


def _converse(out: Output, loop: _LoopThread, swarm: Swarm, options: GenerateOptions, opening: list[Message]) -> None:
    messages = list(opening)
    interactive = sys.stdin.isatty()
    if interactive:
        out.note(f"{swarm.spec.name}; {HELP}")
    for line in _lines(interactive):
        text = line.strip()
        if text == "/exit":
            return
        if text == "/reset":
            messages = list(opening)
            out.note("forgotten")
        elif text in ("/help", "/?"):
            out.note(HELP)
        elif text:
            try:
                answer = loop.run(_answer(out, swarm, [*messages, {"role": "user", "content": text}], options))
            except KeyboardInterrupt:
                out.note("\n(stopped)")
                continue
            except FarflungError as error:
                if not interactive:
                    raise
                out.error(error)
                continue
            messages += [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]


def _lines(interactive: bool) -> Iterator[str]:
    """What the person types, or the lines of a pipe."""
    if not interactive:
        yield from sys.stdin
        return
    with contextlib.suppress(ImportError):  # Windows has its own line editing
        import readline  # noqa: F401 - input() uses it once it is imported
    while True:
        try:
            yield input("> ")
        except EOFError:
            sys.stdout.write("\n")
            return


async def _answer(out: Output, swarm: Swarm, messages: list[Message], options: GenerateOptions) -> str:
    from farflung.cli.generation import as_json, headline, stream

    generation = swarm.chat(messages, options)
    await stream(out, generation)
    out.json({"role": "assistant", **as_json(generation)})
    if out.live:
        from rich.text import Text

        out.note(Text(headline(generation.stats), style="dim"))
    return generation.stats.text


@contextlib.contextmanager
def _connected(driver: Driver) -> Iterator[tuple[_LoopThread, Swarm]]:
    """A swarm whose links live on a loop thread until the block ends."""
    with _LoopThread() as loop:
        connection = _Connection(driver)
        try:
            swarm = loop.run(connection.open())
            yield loop, swarm
        finally:
            loop.run(connection.close())


class _Connection:
    """Holds a connection open in one task, because what a task enters that task must leave."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self._task: asyncio.Task[None] | None = None
        self._leave = asyncio.Event()

    async def open(self) -> Swarm:
        opened: asyncio.Future[Swarm] = asyncio.get_running_loop().create_future()
        self._task = asyncio.create_task(self._hold(opened), name="swarm")
        waits: set[asyncio.Future[Any]] = {opened, self._task}
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        if not opened.done():
            self._task.result()  # raises why
        return opened.result()

    async def close(self) -> None:
        if self._task is not None:
            self._leave.set()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _hold(self, opened: asyncio.Future[Swarm]) -> None:
        async with self._driver.connect() as swarm:
            opened.set_result(swarm)
            await self._leave.wait()


class _LoopThread:
    """An event loop in a thread, for the length of a ``with``."""

    def __enter__(self) -> _LoopThread:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="chat-loop", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.run(self._loop.shutdown_asyncgens())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def run(self, coroutine: Coroutine[Any, Any, _T]) -> _T:
        """The coroutine's result. Ctrl-C cancels it, waits until it has cleaned up, and is raised then."""
        ended = threading.Event()

        async def whole() -> _T:
            try:
                return await coroutine
            finally:
                ended.set()

        future = asyncio.run_coroutine_threadsafe(whole(), self._loop)
        try:
            while True:
                try:
                    return future.result(timeout=0.2)  # on Windows only a wait that ends lets Ctrl-C in
                except TimeoutError:
                    if future.done():
                        raise
        except KeyboardInterrupt:
            future.cancel()
            ended.wait(5.0)
            raise
