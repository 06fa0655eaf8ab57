"""Vectors that a narrower dtype turns to zero are refused; those that lose a few tiny values are not."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lvlmrec import config
from lvlmrec.errors import InputError
from lvlmrec.features import imported, store
from lvlmrec.features.imported import ImportConfig
from lvlmrec.features.rounding import MAX_ERROR, MAX_FLUSHED, first_loss
from tests.feature_sets import recipe_of, vectors

D = 512
TAP = "describe/llm.2/visual_mean"


def normal(scale: float = 1.0, rows: int = 3, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return scale * torch.randn(rows, D, generator=torch.Generator().manual_seed(0), dtype=dtype)


def tiny_but(number: int, value: float = 1.0) -> torch.Tensor:
    """1e-9 all over, but for some values."""
    vector = torch.full((1, D), 1e-9)
    vector[0, :number] = value
    return vector


def spread(decades: float) -> torch.Tensor:
    """Values from 1e-6 down, evenly in their logarithm, as the array that named the fault."""
    return 10 ** (-6 - decades * torch.rand(3, D, generator=torch.Generator().manual_seed(0)))


LOST = {
    "all zero": normal(1e-9),
    "subnormal": normal(1e-6),  # an error of 2 %
    "spread": spread(7),
    "most of it, beside large values": tiny_but(D // 2 - 1),
    "one of three": torch.tensor([[1e-9, 0.0, 0.0]]),
}
KEPT = {
    "ordinary": normal(),
    "small": normal(1e-5),  # an error of 0.2 %, half of what bfloat16 has
    "zeros": torch.zeros(2, D),
    "sparse": normal() * (torch.arange(D) % 9 == 0),
    "one tiny value of eight": torch.tensor([[1.0, 2, -1, 3, 1e-12, 1, 1, 1]]),
    "some tiny values": tiny_but(D // 2),
    "zeros and a few tiny values": torch.tensor([[0.0, 0, 0, 0, 0, 0.5, 1e-10, 0.25]]),
}


@pytest.mark.parametrize("name", LOST)
def test_what_vanishes_is_refused(name: str) -> None:
    loss = first_loss(LOST[name], LOST[name].half())
    assert loss is not None and loss.row == 0 and (loss.flushed > MAX_FLUSHED or loss.error > MAX_ERROR)
    for wider in (torch.bfloat16, torch.float32):
        assert first_loss(LOST[name], LOST[name].to(wider)) is None


@pytest.mark.parametrize("name", KEPT)
def test_what_loses_less_than_rounding_changes_is_kept(name: str) -> None:
    assert first_loss(KEPT[name], KEPT[name].half()) is None


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        (normal(1e-9), torch.float16),
        (normal(1e-41), torch.bfloat16),
        (normal(1e-50, dtype=torch.float64), torch.float32),
        (normal(1e-200, dtype=torch.float64), torch.float32),
        (normal(1e-9).bfloat16(), torch.float16),
    ],
)
def test_every_narrower_dtype_is_looked_at_and_the_row_is_named(values: torch.Tensor, dtype: torch.dtype) -> None:
    rows = torch.cat([normal(dtype=values.dtype) if values.dtype != torch.float32 else normal(), values])
    loss = first_loss(rows, rows.to(dtype))
    assert loss is not None and loss.row == 3 and loss.error > MAX_ERROR


def test_the_rule_is_the_formula_for_every_scale() -> None:
    """The pass that most vectors are spared finds what the whole of it finds."""
    for scale in torch.logspace(-10, 0, 60).tolist():
        for vector in (normal(scale, 1), normal(scale, 1) * (torch.arange(D) % 3 > 0), tiny_but(250, scale)):
            rounded = vector.half().double()
            exact = vector.double()
            flushed = ((exact != 0) & (rounded == 0)).sum() / (exact != 0).sum()
            error = (rounded - exact).norm() / exact.norm()
            refused = bool(flushed > MAX_FLUSHED or error > MAX_ERROR)
            assert (first_loss(vector, vector.half()) is not None) == refused, scale


def test_an_extracted_feature_that_vanishes_names_tap_and_remedy() -> None:
    features = vectors(recipe_of("float16"), ["a", "b"])
    features[TAP] = torch.cat([features[TAP][:1], features[TAP][1:] * 1e-9])
    with pytest.raises(store.CastError) as error:
        store.feature_table(recipe_of("float16"), ["a", "b"], [8, 8], features)
    assert str(error.value) == (
        f"{TAP}: in float16 100% of its nonzero values are too small and become 0, it changes by 100.00%; "
        "use recipe.dtype=bfloat16 or float32, or drop this tap"
    )
    for dtype in ("bfloat16", "float32"):
        store.feature_table(recipe_of(dtype), ["a", "b"], [8, 8], features)


def import_array(folder: Path, array: np.ndarray, dtype: str) -> dict[str, Any]:
    np.save(folder / "features.npy", array)
    given = {"file": f"{folder}/features.npy", "store": f"{folder}/store", "dtype": dtype}
    return imported.run(config.load(ImportConfig, [given]))


def test_an_imported_feature_that_vanishes_names_item_column_and_remedy(tmp_path: Path) -> None:
    array = np.random.default_rng(0).standard_normal((7, 3, 64)).astype(np.float32)
    array[5, 1] = spread(7)[0, :64].numpy()
    match = (
        r"^dtype: float16: item '5', column imported/llm\.1/imported: \d\d% of its nonzero values are too small and "
        r"become 0, it changes by \d+\.\d\d%; choices: bfloat16 or float32$"
    )
    with pytest.raises(InputError, match=match):
        import_array(tmp_path, array, "float16")
    assert not store.committed(str(tmp_path / "store"))
    for dtype in ("bfloat16", "float32"):
        assert import_array(tmp_path, array, dtype)["written"] == 7


def test_an_imported_array_of_doubles_may_vanish_in_float32(tmp_path: Path) -> None:
    array = np.random.default_rng(0).standard_normal((7, 64)) * 1e-60
    with pytest.raises(InputError, match=r"dtype: float32: item '0'.*choices: float32 of a multiple of the values"):
        import_array(tmp_path, array, "float32")


def test_an_ordinary_array_with_zeros_and_tiny_values_is_imported(tmp_path: Path) -> None:
    array = np.maximum(np.random.default_rng(0).standard_normal((50, 64)), 0).astype(np.float32)
    array[:, 0], array[3] = 1e-10, 0.0
    assert import_array(tmp_path, array, "float16")["written"] == 50
