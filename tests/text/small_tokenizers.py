"""Small real tokenizers of the kinds that language models use, in folders as models have them."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Pipeline

CORPUS = [
    "The quick brown fox jumps over the lazy dog. The dog sleeps; the fox does not.",
    "for i in range(10):\n    print(i, 'times')\n\n\nreturn None",
    "Größe, naïveté, Привет мир, 世界你好 😀😀 ꙮ",
]
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "<|{{ message.role }}|>{{ message.content | tojson }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def byte_level() -> Pipeline:
    """As GPT-2, Llama 3 and Qwen: every byte is a character of the alphabet."""
    pipeline = Pipeline(models.BPE())
    pipeline.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pipeline.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    pipeline.train_from_iterator(CORPUS, trainer)
    pipeline.add_tokens([AddedToken("<tool>", special=False), AddedToken("\n\n", special=False)])
    return pipeline


def byte_fallback(decoder: decoders.Decoder) -> Pipeline:
    """As Llama 2 and Mistral: words begin with U+2581, and a character without a token becomes its bytes."""
    pieces = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "\u2581",
        *"abcdefghijklmnopqrstuvwxyz.,\ufffd",
    ]
    merges = [
        ("\u2581", "t"),
        ("\u2581t", "h"),
        ("\u2581th", "e"),
        ("\u2581", "d"),
        ("\u2581d", "o"),
        ("o", "g"),
        ("\u2581", "\u2581"),
    ]
    pieces += [left + right for left, right in merges]
    pipeline = Pipeline(
        models.BPE(
            vocab={piece: token for token, piece in enumerate(pieces)},
            merges=merges,
            unk_token="<unk>",
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    pipeline.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    pipeline.decoder = decoder
    pipeline.add_special_tokens(["<unk>", "<s>", "</s>"])
    pipeline.post_processor = processors.TemplateProcessing(single="<s> $A", pair=None, special_tokens=[("<s>", 1)])
    return pipeline


PIPELINES = {
    "byte-level": byte_level,
    "sentencepiece": lambda: byte_fallback(
        decoders.Sequence(
            [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
    ),
    "metaspace": lambda: byte_fallback(decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])),
}


def write_folder(folder: Path, pipeline: Pipeline, template: str | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    pipeline.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    if template is not None:
        config["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder
