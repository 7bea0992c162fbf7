"""``farflung node``: serves some layers of a model until it is stopped."""

from __future__ import annotations

import asyncio
import os
from collections.abc import MutableMapping
from typing import TYPE_CHECKING, Annotated

import typer

from farflung.cli.admission import Allow, OpenToAnyone, SwarmKeyOption, read_admission
from farflung.cli.choices import Part, check_dtype, offered_codecs, parse_codecs, parse_layers, quantised, torch_dtype
from farflung.cli.directory import directory_at
from farflung.cli.options import DEFAULT_DIRECTORY, Debug, Directory, ExitWithStdin, Json, Model, State, examples
from farflung.cli.output import Output, command
from farflung.cli.serving import NodeOptions, serve_stage
from farflung.cli.stopping import ParentWatch
from farflung.core.errors import UsageError
from farflung.core.model import LayerRange

if TYPE_CHECKING:
    from farflung.core.model import ModelSpec
    from farflung.engine.source import ModelSource
    from farflung.engine.torch_backend import TorchBackend
    from farflung.node.admission import Admission

app = typer.Typer()


@app.command(
    epilog=examples(
        "farflung node -m gemma3-270m --layers 0:6",
        "farflung node -m gemma3-270m --layers 2/3      (the second of three equal parts)",
        "farflung node -d http://10.0.0.5:7700 -m Qwen/Qwen2.5-7B-Instruct --listen 10.0.0.7:7800 --swarm-key swarm.key",
    )
)
def node(
    *,
    directory: Directory = DEFAULT_DIRECTORY,
    model: Model,
    layers: Annotated[
        str,
        typer.Option(
            "--layers",
            metavar="A:B|K/N|auto",
            help="Layers A to B-1, part K of N, or auto: all that are missing and fit in memory.",
        ),
    ] = "auto",
    listen: Annotated[
        str,
        typer.Option("--listen", metavar="HOST:PORT", help="Where others connect; port 0 takes a free one."),
    ] = "127.0.0.1:0",
    advertise: Annotated[
        list[str] | None,
        typer.Option("--advertise", metavar="HOST:PORT", help="Address to announce where --listen is not it; repeatable."),
    ] = None,
    dtype: Annotated[str, typer.Option("--dtype", help="Precision of the weights: auto, fp32, bf16, int8 or int4.")] = "auto",
    codec: Annotated[
        str,
        typer.Option(
            "--codec",
            metavar="NAME[,NAME]",
            help="Codecs that drivers may choose here, of fp32, bf16, int8 and int4; finer ones are taken too.",
        ),
    ] = "int4",
    threads: Annotated[int, typer.Option("--threads", min=0, help="Compute threads; 0 takes one per core.")] = 0,
    kv_tokens: Annotated[
        int, typer.Option("--kv-tokens", min=0, help="KV cache in tokens, over all sessions; 0 fits it to free memory.")
    ] = 0,
    model_digest: Annotated[
        str,
        typer.Option("--model-digest", metavar="HEX", help="Refuse to serve any model but the one with this digest."),
    ] = "",
    swarm_key: SwarmKeyOption = "",
    allow: Allow = None,
    open_to_anyone: OpenToAnyone = False,
    driver_share: Annotated[
        float,
        typer.Option(
            "--driver-share",
            min=0.0,
            max=1.0,
            help="Share of the KV that one driver may hold; 0: half for strangers, else all.",
        ),
    ] = 0.0,
    log_memory: Annotated[
        int, typer.Option("--log-memory", min=1, help="MiB of memory for rows sent on, so that they can be sent again.")
    ] = 256,
    log_disk: Annotated[int, typer.Option("--log-disk", min=0, help="MiB of disk for those rows where memory is full.")] = 4096,
    state: State = None,
    ephemeral: Annotated[
        bool, typer.Option("--ephemeral", help="Use a new key and forget it at the end: for trying things out.")
    ] = False,
    exit_with_stdin: ExitWithStdin = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Serve some layers of MODEL until Ctrl-C or SIGTERM.

    Loads only its own layers, measures its speed, announces itself to the directory. When told to stop it takes no new
    sessions, lets the running ones end and leaves; a second Ctrl-C ends it at once. Where other machines can reach it, it wants
    to know whom to serve: --swarm-key, --allow or --open-to-anyone.
    """
    watch = ParentWatch() if exit_with_stdin else None
    with command(json=json, debug=debug) as out:
        check_dtype(dtype)
        codecs = offered_codecs(parse_codecs(codec))
        wanted_layers = parse_layers(layers)
        admission = _admission(swarm_key, tuple(allow or ()), (listen, *(advertise or ())), open_to_anyone=open_to_anyone)
        options = NodeOptions(
            directory=directory,
            model=model,
            layers=wanted_layers,
            listen=listen,
            advertise=tuple(advertise or ()),
            dtype=dtype,
            codecs=codecs,
            threads=threads,
            kv_tokens=kv_tokens,
            model_digest=model_digest,
            state=state,
            ephemeral=ephemeral,
            admission=admission,
            allow=tuple(allow or ()),
            driver_share=driver_share,
            log_memory_mib=log_memory,
            log_disk_mib=log_disk,
        )
        prepare_environment(threads, os.environ)
        _run(out, options, watch)


def _admission(swarm_key: str, allow: tuple[str, ...], addresses: tuple[str, ...], *, open_to_anyone: bool) -> Admission:
    """Whom to serve, before anything else is done. Raises UsageError, IdentityError."""
    from farflung.node.admission import check_exposure
    from farflung.swarm.addresses import split_address

    for address in addresses:
        split_address(address)
    admission = read_admission(swarm_key, allow)
    check_exposure(addresses, admission, open_to_anyone=open_to_anyone)
    return admission


def prepare_environment(threads: int, environ: MutableMapping[str, str]) -> None:
    """Sets how OpenMP waits and with how many threads, unless the user did. OpenMP reads this when torch is imported.

    Passive waiting, because several nodes on few cores otherwise spin against each other (measured: 64 ms a token, not 43).
    """
    environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if threads:
        environ.setdefault("OMP_NUM_THREADS", str(threads))


def _run(out: Output, options: NodeOptions, watch: ParentWatch | None) -> None:
    from farflung.cli.state import claimed_identity
    from farflung.core.ids import parse_model_digest
    from farflung.engine.open_model import open_source

    wanted = parse_model_digest(options.model_digest) if options.model_digest else None
    with claimed_identity(options.state, ephemeral=options.ephemeral) as identity:
        asyncio.run(_check_port(options.listen))  # before minutes of loading, not after
        with out.progress(f"opening {options.model}") as progress:
            source = open_source(options.model, progress=progress)
            spec = source.spec(progress=progress)
        if wanted is not None:
            source.manifest().check_digest(wanted, source.name)
        backend = _load_what_is_needed(out, options, source, spec)
        asyncio.run(serve_stage(out, options, identity, backend, watch))


async def _check_port(listen: str) -> None:
    """Raises AddressInUse, Unreachable."""
    from farflung.identity.keys import Identity
    from farflung.transport.link import LinkConfig
    from farflung.transport.tcp import TcpTransport

    transport = TcpTransport(Identity.generate(), LinkConfig())
    try:
        listener = await transport.listen(listen, lambda link: None)
        await listener.close()
    finally:
        await transport.close()


async def _choose_layers(options: NodeOptions, source: ModelSource, spec: ModelSpec) -> LayerRange:
    """The range to serve. Asks the directory in any case: if that cannot be reached, better to know before loading."""
    from farflung.cli.sizes import layers_that_fit
    from farflung.planning.placement import choose_layers

    served = await _served(options, spec)
    wanted = options.layers
    if wanted is None:
        fit = layers_that_fit(source, torch_dtype(options.dtype).itemsize, quantised(options.dtype))
        return choose_layers(served, spec.layers, fit)
    if isinstance(wanted, Part):
        return wanted.layers(spec.layers)
    if wanted.stop > spec.layers:
        raise UsageError(
            f"layers {wanted} were asked for, but {spec.name} has {spec.layers}", hint=f"use at most 0:{spec.layers}"
        )
    return wanted


async def _served(options: NodeOptions, spec: ModelSpec) -> list[LayerRange]:
    """What other nodes serve of the model now."""
    from farflung.swarm.offers import ranges_of
    from farflung.swarm.records import Query

    async with directory_at(options.directory, options.admission.swarm_key) as directory:
        records = await directory.records(Query(model=spec.digest))
    return ranges_of(records, spec.digest, spec.layers)


def _load_what_is_needed(out: Output, options: NodeOptions, source: ModelSource, spec: ModelSpec) -> TorchBackend:
    """Loads the layers to serve. With ``auto`` it looks again afterwards: nodes that were started together chose the same ones,
    and the first to be ready keeps them."""
    from farflung.planning.placement import is_still_needed

    while True:
        layers = asyncio.run(_choose_layers(options, source, spec))
        backend = _load(out, options, source, spec, layers)
        if options.layers is not None or is_still_needed(layers, asyncio.run(_served(options, spec)), spec.layers):
            return backend
        out.note(f"layers {layers} are served by others by now, and layers are missing elsewhere: choosing again")
        asyncio.run(backend.aclose())
        del backend  # its memory is wanted


def _load(out: Output, options: NodeOptions, source: ModelSource, spec: ModelSpec, layers: LayerRange) -> TorchBackend:
    from farflung.cli.sizes import kv_tokens_that_fit, weights_room
    from farflung.engine.torch_backend import BackendConfig, load_backend

    dtype = torch_dtype(options.dtype)
    kv_tokens = options.kv_tokens or kv_tokens_that_fit(source, layers, dtype.itemsize)
    config = BackendConfig(
        kv_tokens=kv_tokens,
        threads=options.threads or None,
        quantised=quantised(options.dtype),
        weight_bytes=weights_room(),
    )
    with out.progress(f"layers {layers} of {spec.name}") as progress:
        return load_backend(source, layers, dtype, config, progress=progress, expected_digest=spec.digest)
