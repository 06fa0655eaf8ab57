"""A tiny BERT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lvlmrec.lvlms import tiny


def make() -> tuple[Any, Any]:
    """3 layers x 48; its processor is the tokenizer."""
    from tokenizers.processors import TemplateProcessing
    from transformers import BertConfig

    words = tiny.tokenizer({"cls_token": "[CLS]", "sep_token": "[SEP]"})
    marks = [("[CLS]", words.cls_token_id), ("[SEP]", words.sep_token_id)]
    words.backend_tokenizer.post_processor = TemplateProcessing("[CLS] $A [SEP]", special_tokens=marks)
    sizes: dict[str, Any] = {
        "num_hidden_layers": 3,
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_attention_heads": 4,
    }
    return BertConfig(vocab_size=len(words), pad_token_id=words.pad_token_id, **sizes), words


def write(directory: Path, seed: int) -> None:
    """Write the model that `make` describes."""
    tiny.write(*make(), directory, seed, "AutoModel")
