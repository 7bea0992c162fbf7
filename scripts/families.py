"""Tries every causal language model type of transformers, tiny, split in three, and writes docs/families.md.

    python scripts/families.py [--types a,b] [--jobs 2] [--out docs/families.md]

Every type runs in a process of its own, with limits of time and memory, so that one bad type stops nothing.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import signal
import sys
import tempfile
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests")]

VERDICTS = ("failing", "right", "refused")
SECONDS, BYTES = 120, 16 * 2**30


def try_type(model_type: str) -> dict[str, Any]:
    """Verdict, reason and errors of one type."""
    import torch
    from stage_ring import Ring, errors_of
    from tiny_configs import NO_DEFAULT, any_tiny_config
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    from farflung.core.errors import UnsupportedModel
    from farflung.engine.attention import ATTENTION
    from farflung.engine.skeleton import anatomy, build_skeleton, layer_count

    torch.set_num_threads(1)
    try:
        layer_count(CONFIG_MAPPING[model_type](**NO_DEFAULT.get(model_type, {})))
        anatomy(build_skeleton(any_tiny_config(model_type), ATTENTION))
    except UnsupportedModel as error:
        return {"verdict": "refused", "reason": error.message}
    config = any_tiny_config(model_type)
    torch.manual_seed(0)
    with torch.inference_mode():
        AutoModelForCausalLM.from_config(config)(input_ids=torch.arange(9)[None] + 3, use_cache=False)  # is it one at all?
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.08)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
        for name, buffer in model.named_buffers():
            if "correction_bias" in name:
                buffer.add_(torch.randn_like(buffer) * 0.1)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        try:
            ring = Ring.of_folder(Path(folder), layer_count(config))
        except UnsupportedModel as error:
            return {"verdict": "refused", "reason": error.message}

        def whole(ids: torch.Tensor) -> torch.Tensor:
            with torch.inference_mode():
                return model(input_ids=ids[None], use_cache=False).logits[0].float()

        errors = errors_of(ring, whole)
    worst = max(errors.values())
    return {"verdict": "right" if worst <= 1e-5 else "failing", "errors": errors, "worst": worst}


def _child(model_type: str, queue: Any) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
    signal.alarm(SECONDS)
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - for the life of the process
    sys.stderr = sys.stdout
    try:
        queue.put(try_type(model_type))
    except BaseException as error:  # noqa: BLE001 - whatever it is, it is this type's verdict
        queue.put(
            {"verdict": "failing", "reason": f"{type(error).__name__}: {error}"[:300], "trace": traceback.format_exc()[-1500:]}
        )


def tried(model_type: str) -> dict[str, Any]:
    """One type in a process of its own."""
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    process = context.Process(target=_child, args=(model_type, queue))
    process.start()
    process.join(SECONDS + 30)
    found = queue.get() if not queue.empty() else {"verdict": "failing", "reason": f"ended with {process.exitcode} and no word"}
    print(model_type, found["verdict"], found.get("worst", found.get("reason", "")), flush=True)
    return found


def page(found: dict[str, dict[str, Any]], version: str) -> str:
    """docs/families.md."""
    counts = {verdict: sum(one["verdict"] == verdict for one in found.values()) for verdict in ("right", "refused", "failing")}
    worst = max((one["worst"] for one in found.values() if one["verdict"] == "right"), default=0.0)
    lines = [
        "# Families",
        "",
        "Every type that `transformers` counts among its causal language models, tried: a tiny random model of it (fp32,",
        "otherwise its defaults, and what these switch off but its models have) in three stages, against the whole model as",
        "plain transformers computes it. Cases: one prompt and tokens one by one, a prompt in chunks, two packed sessions",
        "of different lengths, a token tree with commits and rollbacks. The figure is the largest difference of a logit, as",
        "a share of the largest logit: up to 1e-5 is right.",
        "",
        "A type that cannot be split right is refused by name, with the reason, before it serves: the same reason that",
        "`farflung models inspect` and `farflung node` give.",
        "",
        f"transformers {version}: **{counts['right']} split right** (largest error {worst:.1e}), {counts['refused']} refused, "
        f"{counts['failing']} failing, of {len(found)}.",
        "",
        "This page is made by `make families` (`python scripts/families.py --out docs/families.md`).",
        "",
        "| type | verdict | largest error, or why not |",
        "|---|---|---|",
    ]
    for model_type, one in sorted(found.items(), key=lambda item: (VERDICTS.index(item[1]["verdict"]), item[0])):
        reason = one.get("reason", "").replace("|", "\\|").replace("\n", " ")
        detail = f"{one['worst']:.1e}" if "worst" in one else reason
        lines.append(f"| {model_type} | {one['verdict']} | {detail} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", default="", help="only these, by commas")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", type=Path, help="all that was found")
    parser.add_argument("--out", type=Path, help="the page")
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    import stage_ring  # noqa: F401 - loaded once, before the forks
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES

    types = arguments.types.split(",") if arguments.types else sorted(NAMES)
    with ThreadPoolExecutor(arguments.jobs) as pool:
        found = dict(zip(types, pool.map(tried, types), strict=True))
    if arguments.json:
        arguments.json.write_text(json.dumps({"transformers": transformers.__version__, "types": found}, indent=1))
    if arguments.out:
        arguments.out.write_text(page(found, transformers.__version__))
    sys.exit(any(one["verdict"] == "failing" for one in found.values()))


if __name__ == "__main__":
    main()
