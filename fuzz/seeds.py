"""Inputs to begin with: what honest peers send, one of everything."""

from __future__ import annotations

import base64

import msgspec
import numpy as np

from farflung.core.ids import ModelDigest, NodeId, SessionId
from farflung.core.messages import (
    Answer,
    Attach,
    Close,
    Credit,
    Evicted,
    Fault,
    Grant,
    Have,
    Hello,
    Ids,
    Message,
    Open,
    OpenText,
    Ping,
    Pong,
    Renew,
    Report,
    StageTime,
    Trouble,
    Window,
)
from farflung.core.model import LayerRange
from farflung.core.route import Hop, Route
from farflung.core.sampling import SamplingOptions, TokenLogprob
from farflung.core.window import Commit, SlotRun, SlotSpan
from farflung.protocol.opening import encode_open_text
from farflung.swarm import http_api as api
from farflung.swarm.links import LinkReport, LinkTo, sign_links
from farflung.swarm.records import NodeRecord, Withdrawal, sign_record, sign_withdrawal
from farflung.wire.codec import CODEC_NAMES, codec
from farflung.wire.fragment import fragments
from farflung.wire.frame import decode_frame, encode_frame
from fuzz.targets.frames import FRAME, HEADER, OPENING, ROWS, STREAM
from fuzz.targets.records import ANSWER, ANSWERS, GET, GETS, LINK_REPORT, NOW_UNIX_S, POST, RECORD, STRANGER, WITHDRAWAL

_NODES = tuple(NodeId(digit * 64) for digit in "abc")
_DIGEST = ModelDigest("d" * 64)
_SESSION = SessionId("0123456789abcdef" * 2)

_OPENING = OpenText(
    session=_SESSION,
    owner=STRANGER.node_id,
    route=Route(tuple(Hop(node, LayerRange(6 * index, 6 * index + 6)) for index, node in enumerate(_NODES))),
    lease_tokens=512,
    lease_s=60.0,
    expires_unix_s=NOW_UNIX_S + 60,
    digest=_DIGEST,
    codecs=("int8", "bf16"),
    sampling=SamplingOptions(temperature=0.8, top_p=0.9, top_k=40, seed=7, logit_bias=((5, -1.5),), logprobs=2),
    prompt_tokens=100,
    max_tokens=64,
)
_TIMES = (StageTime(20.0, 0.5, 8.0, 3, 1e6),)

MESSAGES: tuple[Message, ...] = (
    Hello((1, 1), ("resume",), CODEC_NAMES),
    Ping(7),
    Pong(7, 1.5e6),
    Open(encode_open_text(_OPENING), bytes(64), "int8", asks_have=True),
    Attach(_SESSION),
    Window(3, (SlotRun(9, 2, 8),), (SlotSpan(10, 1),), Commit(4, (SlotSpan(8, 1),)), 12, _TIMES),
    Answer((SlotSpan(10, 1),), (151643,), 5, 12, 1, (TokenLogprob(-0.5, ((1, -0.5), (2, -1.5))),), _TIMES),
    Credit(4176),
    Fault(_NODES[0], "stage_lost", "gone", "wait"),
    Trouble(_NODES[0], "unreachable", "gone", "wait"),
    Have(3, 100, (SlotSpan(102, 3),), 65536),
    Grant(64),
    Evicted(100),
    Renew(),
    Ids((SlotSpan(8, 1), SlotSpan(10, 1))),
    Close("done"),
    Report(_NODES[0], 3, 4, 1.5, 900, 2, 0.5, 100, 5, bytes(32), bytes(32)),
)


def frame_seeds() -> list[bytes]:
    """For the target ``frames``."""
    whole = [b"".join(encode_frame(message)) for message in MESSAGES]
    whole.append(b"".join(encode_frame(MESSAGES[5], [bytes(range(64)), b"ids"])))
    whole.append(b"".join(encode_frame(Ids((SlotSpan(8, 2),)), [np.array([5, 7], "<i4").tobytes()])))
    stream = b"".join(b"".join(piece) for at, frame in enumerate(whole) for piece in fragments(2 * at, 1, [frame], 64))
    rows = np.random.default_rng(0).standard_normal((2, 130), np.float32)
    return [
        *(bytes([FRAME]) + frame for frame in whole),
        *(bytes([HEADER]) + msgspec.msgpack.encode(decode_frame(frame)[0]) for frame in whole),
        *(bytes([STREAM, size]) + stream for size in (0, 7, 99)),
        bytes([OPENING]) + encode_open_text(_OPENING),
        *(bytes([ROWS, at, 129]) + codec(name).encode(rows) for at, name in enumerate(CODEC_NAMES)),
        *(bytes([ROWS, at, 2]) + codec(name).encode(rows[:, :3].copy()) for at, name in enumerate(CODEC_NAMES)),
    ]


def record_seeds() -> list[bytes]:
    """For the target ``records``."""
    said = {"node_id": STRANGER.node_id, "sequence": 3, "issued_unix_s": NOW_UNIX_S, "ttl_s": 60.0}
    record = sign_record(
        STRANGER,
        NodeRecord(
            **said,  # type: ignore[arg-type]
            addresses=("192.0.2.7:7400", "[2001:db8::7]:7400", "node.example.org:7400"),
            model="someone/some-model",
            family="llama",
            digest=_DIGEST,
            model_layers=18,
            hidden_size=640,
            layers=LayerRange(0, 6),
            t_curve_ms=((1, 10.0), (8, 24.0)),
            kv_tokens=1000,
            kv_free_tokens=600,
            codecs=CODEC_NAMES,
            engine_class="torch-bf16",
            uplink_bytes_per_s=1.25e6,
            version="0.1.0",
        ),
    )
    withdrawal = sign_withdrawal(STRANGER, Withdrawal(**said))  # type: ignore[arg-type]
    links = sign_links(STRANGER, LinkReport(**said, links=(LinkTo(_NODES[0], 0.05, 1e6), LinkTo(_NODES[1], 0.1))))  # type: ignore[arg-type]
    answers = (
        api.RecordsBody((record,)),
        api.WatchBody("fuzz-3", False, (record,), (_NODES[2],)),
        api.LinksBody((links,)),
        api.HealthBody(3, "0.1.0"),
        api.ErrorBody("record_refused", "the record is refused", "sign another"),
    )
    queries = (b"model=someone%2Fsome-model&beside=0:6", b"cursor=fuzz-1&wait_s=0&beside=6%3A12", b"", b"")
    return [
        bytes([RECORD]) + record.text,
        bytes([WITHDRAWAL]) + withdrawal.text,
        bytes([LINK_REPORT]) + links.text,
        *(bytes([POST, at]) + msgspec.json.encode(signed) for at, signed in enumerate((record, withdrawal, links))),
        bytes([POST, 0]) + b'{"text":"' + base64.b64encode(record.text) + b'","signature":""}',
        *(bytes([GET, at]) + query for at, query in zip(range(len(GETS)), queries, strict=True)),
        *(bytes([ANSWER, at]) + msgspec.json.encode(answer) for at, answer in zip(range(len(ANSWERS)), answers, strict=True)),
    ]


SEEDS = {"frames": frame_seeds, "records": record_seeds}
