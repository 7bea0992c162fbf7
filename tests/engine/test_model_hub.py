"""A model on a hub: a real HTTP server that answers as the hub does, with a real sharded model behind it."""

import hashlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from models import tiny_model

from farflung.core.errors import ModelError, NotAModel
from farflung.core.model import LayerRange
from farflung.engine.hub import HubFiles
from farflung.engine.loader import load_stage
from farflung.engine.open_model import looks_like_hub_id
from farflung.engine.safetensors_source import SafetensorsSource

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    url: str
    folder: Path
    fetched: list[str] = field(default_factory=list)


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    found = Hub("", tiny_model("llama", tmp_path / "remote", shard="200KB"))

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def answer(self, body: bool) -> None:
            path = self.path.partition("?")[0]
            if path.startswith("/api/models/acme/tiny"):
                names = [{"rfilename": file.name} for file in sorted(found.folder.iterdir())]
                self.reply(json.dumps({"id": "acme/tiny", "sha": COMMIT, "siblings": names}).encode(), body)
            elif path.startswith((f"/acme/tiny/resolve/{COMMIT}/", "/acme/tiny/resolve/main/")):
                data = (found.folder / path.rpartition("/")[2]).read_bytes()
                if body:
                    found.fetched.append(path.rpartition("/")[2])
                self.reply(data, body)
            else:
                self.send_response(404)
                self.send_header("X-Error-Code", "RepoNotFound")
                self.send_header("Content-Length", "0")
                self.end_headers()

        def reply(self, data: bytes, body: bool) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.end_headers()
            if body:
                self.wfile.write(data)

        def log_message(self, format: str, *args: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    found.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield found
    server.shutdown()
    thread.join()
    server.server_close()


def source_of(hub: Hub, tmp_path: Path) -> SafetensorsSource:
    return SafetensorsSource(HubFiles("acme/tiny", endpoint=hub.url, hub_cache=tmp_path / "hub"), tmp_path / "cache")


def test_a_stage_fetches_only_the_shards_that_hold_its_layers(hub: Hub, tmp_path: Path) -> None:
    local = SafetensorsSource.of_folder(hub.folder, cache=tmp_path / "cache")
    stage = load_stage(source_of(hub, tmp_path), LayerRange(2, 3), torch.float32)
    expected = load_stage(local, LayerRange(2, 3), torch.float32)
    for ours, theirs in zip(stage.layers[0].parameters(), expected.layers[0].parameters(), strict=True):
        assert torch.equal(ours, theirs)
    shards = {file.name for file in hub.folder.glob("*.safetensors")}
    fetched = {name for name in hub.fetched if name.endswith(".safetensors")}
    assert 0 < len(fetched) < len(shards)


def test_a_published_manifest_lets_a_part_of_the_model_be_checked(hub: Hub, tmp_path: Path) -> None:
    local = SafetensorsSource.of_folder(hub.folder, cache=tmp_path / "cache")
    with pytest.raises(ModelError, match="weight files are not here"):
        source_of(hub, tmp_path).manifest()
    local.manifest().save(hub.folder / "farflung-manifest.json")
    source = source_of(hub, tmp_path)
    assert source.spec().digest == local.spec().digest
    load_stage(source, LayerRange(2, 3), torch.float32, expected_digest=local.spec().digest)


def test_what_was_fetched_is_used_when_the_hub_is_gone(hub: Hub, tmp_path: Path) -> None:
    load_stage(source_of(hub, tmp_path), LayerRange(2, 3), torch.float32)
    hub.url = "http://127.0.0.1:1"
    load_stage(source_of(hub, tmp_path), LayerRange(2, 3), torch.float32)
    with pytest.raises(ModelError, match="weight file"):
        load_stage(source_of(hub, tmp_path), LayerRange(0, 1), torch.float32)


def test_a_model_that_the_hub_does_not_have_is_named(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(NotAModel, match="acme/other"):
        HubFiles("acme/other", endpoint=hub.url, hub_cache=tmp_path)


def test_a_hub_that_cannot_be_reached_is_an_error_with_a_hint(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot be reached") as raised:
        HubFiles("acme/tiny", endpoint="http://127.0.0.1:1", hub_cache=tmp_path)
    assert "network" in raised.value.hint


@pytest.mark.parametrize(
    ("text", "is_id"),
    [
        ("acme/tiny", True),
        ("tiny", False),
        ("a/b/c", False),
        ("./tiny", False),
        ("/tiny", False),
        ("~/tiny", False),
        ("a\\b/c", False),
    ],
)
def test_a_hub_id_is_an_owner_and_a_name(text: str, is_id: bool) -> None:
    assert looks_like_hub_id(text) == is_id
