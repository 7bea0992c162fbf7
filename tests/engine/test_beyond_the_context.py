"""A window that reaches too far fails its own session: by the model's context, or by the length the session declared."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from stage_ring import A, B, path_work, text
from structlog.testing import capture_logs
from tiny_configs import any_tiny_config
from torch import nn

from farflung.core.errors import LeaseExceeded, StageFailed
from farflung.core.ids import SessionId
from farflung.core.model import LayerRange
from farflung.core.sampling import SamplingOptions
from farflung.engine.backend import SessionSpec, StageResult
from farflung.engine.layer_calls import RotaryCall
from farflung.engine.loader import load_stage
from farflung.engine.safetensors_source import SafetensorsSource
from farflung.engine.torch_backend import BackendConfig, TorchBackend

CONTEXT = 64


def backend_of(family: str, path: Path, fault: Exception | None = None) -> TorchBackend:
    """The first of two layers of a tiny model; it raises ``fault``."""
    from transformers import AutoModelForCausalLM

    config = any_tiny_config(family, n_layer=2, n_positions=CONTEXT)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(path)
    source = SafetensorsSource.of_folder(path)
    stage = load_stage(source, LayerRange(0, 1), torch.float32)
    backend = TorchBackend(stage, source.spec(), BackendConfig(kv_tokens=300, inline=True))
    if fault is not None:

        def fail(*_: object) -> None:
            raise fault

        stage.layers[0].register_forward_pre_hook(fail)
    for session in (A, B):
        backend.open(SessionSpec(session=session, lease_tokens=100, sampling=SamplingOptions(), codec="fp32"))
    return backend


def steps(backend: TorchBackend, *windows: Sequence[tuple[SessionId, int, int]]) -> list[tuple[StageResult, ...]]:
    """Results of each step of (session, first position, first position after)."""
    ids = text(CONTEXT + 20, seed=1)

    async def body() -> list[tuple[StageResult, ...]]:
        return [(await backend.step([path_work(*window) for window in step])).results for step in tokens]

    tokens = [[(session, ids, start, stop) for session, start, stop in step] for step in windows]
    return asyncio.run(body())


@pytest.mark.parametrize("family", ["gptj", "codegen"])
def test_a_window_beyond_a_table_of_positions_fails_its_session_before_its_tree_grows(family: str, tmp_path: Path) -> None:
    backend = backend_of(family, tmp_path)
    first, second, third = steps(
        backend, [(A, 0, 60), (B, 0, 5)], [(A, 60, CONTEXT + 1), (B, 5, 6)], [(A, 60, CONTEXT), (B, 6, 7)]
    )
    assert [result.error for result in (*first, *third)] == [None] * 4
    assert isinstance(second[0].error, LeaseExceeded)
    assert f"position {CONTEXT} is beyond the {CONTEXT} tokens" in second[0].error.message
    assert second[1].error is None


@pytest.mark.parametrize("fault", [IndexError("out of range"), RuntimeError("a kernel gave up\nat length")], ids=repr)
def test_what_torch_raises_fails_the_sessions_of_the_step_and_stands_in_the_log(fault: Exception, tmp_path: Path) -> None:
    with capture_logs() as logs:
        ((mine, other),) = steps(backend_of("gptj", tmp_path, fault), [(A, 0, 5), (B, 0, 7)])
    for result in (mine, other):
        assert isinstance(result.error, StageFailed)
        assert str(fault).partition("\n")[0] in result.error.message
    assert [(entry["log_level"], entry["exc_info"]) for entry in logs] == [("error", fault)]


@pytest.mark.parametrize("words", ["std::bad_alloc", "could not create a primitive"])
def test_memory_that_a_kernel_lacks_is_called_so(words: str, tmp_path: Path) -> None:
    with capture_logs() as logs:
        ((result,),) = steps(backend_of("gptj", tmp_path, RuntimeError(words)), [(A, 0, 5)])
    assert "not enough memory" in str(result.error)
    assert not logs


def longrope() -> nn.Module:
    from transformers import Phi3Config
    from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

    factors = {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8, "original_max_position_embeddings": 64}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": 1.0, **factors}
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "pad_token_id": 0}
    return Phi3RotaryEmbedding(
        Phi3Config(**sizes, max_position_embeddings=4096, original_max_position_embeddings=64, rope_parameters=rope)
    )


def dynamic() -> nn.Module:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    return LlamaRotaryEmbedding(
        LlamaConfig(hidden_size=64, num_attention_heads=4, max_position_embeddings=64, rope_parameters=rope)
    )


@pytest.mark.parametrize("make", [longrope, dynamic])
def test_a_session_that_goes_beyond_what_it_declared_moves_nobody_elses_factors(make: type[nn.Module]) -> None:
    call, hidden = RotaryCall(make(), (), (), keyword=True), torch.zeros(1, 1, 64)
    honest = torch.arange(10, 15)[None]
    alone = call(hidden, honest, torch.full((5,), 40))
    beside = call(hidden, torch.cat([honest, torch.tensor([[200]])], 1), torch.full((6,), 40))
    longer = call(hidden, honest, torch.full((5,), 300))
    for one, other, far in zip(alone, beside, longer, strict=True):
        assert torch.equal(one, other[:, :5])
        assert not torch.equal(one, far)
