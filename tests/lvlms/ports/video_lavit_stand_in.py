"""A package with the interface of Video-LaVIT's repository and none of its code: a tiny LLaMA that sees motion.

It holds what the adapter relies on: modules that import each other as `models`, `conversation` and `utils`, a selector
that keeps patches at random, `<video>` as -201, marks around what stands for each clip.
"""

from __future__ import annotations

import json
from pathlib import Path

LAYERS, WIDTH = 4, 32
REQUIRED = "only_in_the_models_environment"  # a library that the package imports when it is told to

FILES = {
    "conversation.py": "VIDEO_TOKEN_INDEX = -201\n",
    "utils.py": "MARKS = {'image': (100, 101), 'motion': (102, 103)}\nFIRST_CODE = 104\n",
    "models/__init__.py": """
        from models.modeling_video_lavit_hf import Model, Tokenizer


        class Runner:
            def __init__(self, path, dtype, device_id, max_clips):
                import json, pathlib, torch
                self.tokenizer, self.max_clips = Tokenizer(), max_clips
                tree = json.loads((pathlib.Path(path) / "config.json").read_text())
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(tree["weights_seed"])
                    model = Model(tree).to({"bf16": torch.bfloat16, "fp16": torch.float16}[dtype])
                self.model = model.to("cpu" if device_id == "cpu" else f"cuda:{device_id}").eval()


        def build_model(model_path="./", model_dtype="bf16", device_id=None, image_size=224, use_xformers=False,
                        understanding=True, local_files_only=False, model_sub_dir="language_model",
                        max_video_clips=16):
            assert understanding and not use_xformers
            return Runner(model_path, model_dtype, device_id, max_video_clips)
        """,
    "models/modeling_video_lavit_hf.py": """
        import types

        import torch
        from conversation import VIDEO_TOKEN_INDEX
        from torch import nn
        from transformers import LlamaConfig, LlamaForCausalLM
        from utils import FIRST_CODE, MARKS


        class Tokenizer:
            bos_token_id, all_special_tokens = 1, ["<s>", "</s>", "<unk>"]

            def __call__(self, text):
                return types.SimpleNamespace(input_ids=[1, *(3 + ord(letter) % 97 for letter in text)])


        class Model(LlamaForCausalLM):
            def __init__(self, tree):
                super().__init__(LlamaConfig(
                    vocab_size=160, hidden_size=tree["hidden_size"], intermediate_size=64, initializer_range=0.3,
                    num_hidden_layers=tree["num_hidden_layers"], num_attention_heads=4, num_key_value_heads=4,
                    max_position_embeddings=4096,
                ))
                self.config.tokenizer_model_max_length = tree.get("tokenizer_model_max_length")
                self.see, self.select = nn.Linear(3, tree["hidden_size"]), nn.Linear(3, 2)
                self.codes = nn.Linear(2, 50)

            def encode(self, keyframes, motion):
                dtype, embed = self.see.weight.dtype, self.model.embed_tokens
                patches = nn.functional.avg_pool2d(keyframes, 56).flatten(2).transpose(1, 2).to(self.device, dtype)
                kept = nn.functional.gumbel_softmax(self.select(patches), hard=True)[..., 0].bool()
                cells = nn.functional.avg_pool2d(motion.mean(dim=2), (10, 12)).flatten(2).transpose(1, 2)
                codes = self.codes(cells.to(self.device, dtype)).argmax(dim=-1) + FIRST_CODE
                marks = {k: embed(torch.tensor(ids, device=self.device)).split(1) for k, ids in MARKS.items()}
                span = []
                for clip in range(len(patches)):
                    span += [marks["image"][0], self.see(patches[clip][kept[clip]]), marks["image"][1]]
                    span += [marks["motion"][0], embed(codes[clip]), marks["motion"][1]]
                return torch.cat(span)

            def prepare_inputs_labels_for_multimodal(
                self, input_ids, position_ids, attention_mask, past_key_values, labels, images
            ):
                (((keyframes, motion), kind),) = images
                assert kind == "video" and input_ids.shape == attention_mask.shape and attention_mask.all()
                ids = input_ids[0]
                (place,) = (ids == VIDEO_TOKEN_INDEX).nonzero()[0].tolist()
                embed = self.model.embed_tokens
                embeds = torch.cat([embed(ids[:place]), self.encode(keyframes, motion), embed(ids[place + 1 :])])
                embeds = embeds[: self.config.tokenizer_model_max_length][None]
                mask = torch.ones(embeds.shape[:2], dtype=attention_mask.dtype, device=self.device)
                return None, None, mask, past_key_values, embeds, labels

            def forward(
                self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None,
                inputs_embeds=None, labels=None, use_cache=None, output_attentions=None, output_hidden_states=None,
                images=None, return_dict=None,
            ):
                _, position_ids, attention_mask, _, inputs_embeds, _ = self.prepare_inputs_labels_for_multimodal(
                    input_ids, position_ids, attention_mask, past_key_values, labels, images
                )
                return super().forward(
                    attention_mask=attention_mask, inputs_embeds=inputs_embeds, use_cache=use_cache,
                    output_hidden_states=output_hidden_states,
                )
        """,
}


def write_code(folder: Path, *, requires: str = "") -> Path:
    """The repository, the package in one of its folders; with `requires` it imports that library first."""
    (folder / "LaVIT" / "models").mkdir(parents=True)  # as in theirs, the code of another model lies beside it
    (folder / "LaVIT" / "models" / "__init__.py").write_text("raise AssertionError\n")
    for name, text in FILES.items():
        path = folder / "VideoLaVIT" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text.replace("\n        ", "\n"))
    if requires:
        path.write_text(f"import {requires}\n{path.read_text()}")
    return folder


def write_weights(folder: Path, **changes: object) -> Path:
    """config.json; the weights are drawn from the seed in it."""
    folder.mkdir(parents=True)
    tree = {"num_hidden_layers": LAYERS, "hidden_size": WIDTH, "weights_seed": 0}
    (folder / "config.json").write_text(json.dumps(tree | changes))
    return folder
