"""Tiny random models that are ordinary Hugging Face directories: for tests and for the embedded sample.

One module for each entry of `LVLMS` that has one, under its name, with `write(directory, seed)`.

Random weights of a sensible scale keep what a video looks like: colour, brightness and layout of the frames pass
through every layer, so that pooled features of different videos differ. transformers' own initialisation (a standard
deviation of 0.02, meant for wide layers) would leave a tiny model's layers almost without effect.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lvlmrec.lvlms.files import source, torchvision_shim

if TYPE_CHECKING:
    import torch

torchvision_shim.ensure_importable()  # before any module here imports transformers

END_OF_TEXT, CHAT_START, CHAT_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
VOCABULARY_SIZE = 400
POSITION_SCALE = 0.2  # positions beside content of scale one
SENTENCES = (
    "Describe this video.",
    "A person shows how to cook a quick meal at home.",
    "The dog runs across the field and catches the ball.",
    "What is the main topic of the video? Answer in one word.",
    "Music plays while colours move over the screen, frame after frame, second after second.",
)


def write(
    model_config: Any, processor: Any, directory: Path, seed: int, auto_class: str = "AutoModelForImageTextToText"
) -> None:
    """Write configuration, weights drawn from `seed`, and processor. The global random state is left as it was."""
    import torch
    import transformers

    with torch.random.fork_rng(devices=[]):
        model = getattr(transformers, auto_class).from_config(model_config, dtype=torch.float32)
    initialise(model, seed)
    with source.quiet():
        model.save_pretrained(directory)
    processor.save_pretrained(directory)


def initialise(model: torch.nn.Module, seed: int) -> None:
    """Draw every weight from `seed`: fan-in scaling for matrices, one for norms, zero for biases.

    Embeddings of tokens have scale one, those of positions `POSITION_SCALE`.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            if name.endswith("bias"):
                weight.zero_()
            elif weight.ndim <= 1 and "newline" not in name:
                weight.fill_(1.0)
            elif "position" in name or "pos_embed" in name:
                weight.normal_(0.0, POSITION_SCALE, generator=generator)
            elif "embed_tokens" in name or "word_embeddings" in name or weight.ndim == 1 or "cls_token" in name:
                weight.normal_(0.0, 1.0, generator=generator)
            else:
                weight.normal_(0.0, weight[0].numel() ** -0.5, generator=generator)


def tokenizer(named_tokens: Mapping[str, str], other_tokens: Sequence[str] = ()) -> Any:
    """A byte-level BPE tokenizer trained on `SENTENCES`, padding on the left.

    `named_tokens` (attribute -> special token) become attributes of it, `other_tokens` are special tokens only.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = [END_OF_TEXT, CHAT_START, CHAT_END, *named_tokens.values(), *other_tokens]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(SENTENCES, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        additional_special_tokens=[CHAT_START, CHAT_END, *other_tokens],
        extra_special_tokens=dict(named_tokens),
        padding_side="left",
    )


def chat_template(video: str, image: str) -> str:
    """A chat template that keeps the order of its parts and writes `video` or `image` for each of those."""
    return (
        "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
        "{% for part in message['content'] %}{% if part['type'] == 'video' %}"
        + video
        + "{% elif part['type'] == 'image' %}"
        + image
        + "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )


def chat_sizes(words: Any) -> dict[str, Any]:
    """What every text configuration reads off its tokenizer."""
    return {
        "vocab_size": len(words),
        "eos_token_id": words.eos_token_id,
        "bos_token_id": words.eos_token_id,
        "pad_token_id": words.pad_token_id,
        "max_position_embeddings": 4096,
    }
