"""Plain ``transformers`` in a process of its own: what ``farflung demo`` compares with. Nothing of Farflung's engine is used.

It loads at the lowest priority while the nodes start, prints ``{"event": "loaded"}``, reads one JSON line from stdin,
``{"prompt_ids": [...], "max_tokens": N, "end_ids": [...]}``, and prints ``{"token_ids": [...]}``. It ends when stdin closes.
"""

from __future__ import annotations

import functools
import json
import os
import sys
from pathlib import Path
from typing import Any

from farflung.cli.stopping import ParentWatch


def main(model: str) -> None:
    watch = ParentWatch()
    _yield_to_others()
    loaded = load_plainly(model)
    _say({"event": "loaded"})
    request = json.loads(watch.lines.get())
    _say({"token_ids": _greedy(loaded, request["prompt_ids"], request["max_tokens"], request["end_ids"])})


def load_plainly(model: str) -> Any:
    """The whole model as plain transformers makes it of a folder or a GGUF file, fp32."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    if not Path(model).is_file():
        return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, trust_remote_code=False).eval()
    # The reader behind from_pretrained(gguf_file=...), called by itself: that one wants `accelerate` and reads the file thrice.
    import gguf
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    # transformers opens the file for the configuration and again for the tensors: some 15 s each, for a large vocabulary.
    gguf.GGUFReader = functools.lru_cache(maxsize=1)(gguf.GGUFReader)
    path = Path(model)
    config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name, trust_remote_code=False)
    whole = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
    tensors = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=whole)["tensors"]
    missing, unexpected = whole.load_state_dict(tensors, strict=False, assign=True)
    if unexpected or any(not name.startswith("lm_head") for name in missing):  # a tied head takes the embedding's values
        raise RuntimeError(f"transformers left tensors unread: missing {missing[:3]}, unexpected {unexpected[:3]}")
    whole.tie_weights()
    return whole.eval()


def _greedy(model: Any, prompt_ids: list[int], max_tokens: int, end_ids: list[int]) -> list[int]:
    """The new tokens, without the one that ended them."""
    import torch

    model.generation_config.eos_token_id = end_ids or None
    inputs = torch.tensor([prompt_ids])
    with torch.inference_mode():
        out = model.generate(inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=max_tokens, do_sample=False)
    found: list[int] = out[0, len(prompt_ids) :].tolist()
    return found[:-1] if found and found[-1] in end_ids else found


def _yield_to_others() -> None:
    """The nodes and the generation come first; this process has time."""
    import psutil

    psutil.Process().nice(psutil.IDLE_PRIORITY_CLASS if sys.platform == "win32" else 19)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def _say(value: dict[str, object]) -> None:
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1])
