"""The noise of sampled answers: Gumbel numbers that depend on seed, step and token alone, on any device."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats

from lvlmrec.lvlms.engine.generation import _Sampler, gumbel_noise

MASK = (1 << 64) - 1


def mix(number: int) -> int:
    """SplitMix64's output function, in whole numbers without a sign."""
    number = ((number ^ (number >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    number = ((number ^ (number >> 27)) * 0x94D049BB133111EB) & MASK
    return number ^ (number >> 31)


def expected(seed: int, step: int, token: int) -> float:
    golden = 0x9E3779B97F4A7C15
    bits = mix((mix((mix(seed) + (step + 1) * golden) & MASK) + (token + 1) * golden) & MASK)
    return -math.log(-math.log1p(-(bits >> 1) / 2**63))


def test_it_is_the_published_generator() -> None:
    assert [mix(k * 0x9E3779B97F4A7C15 & MASK) for k in (1, 2)] == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4]  # seed 0
    seeds = [0, 7, 2**56 - 1]
    for step in (0, 1, 1000):
        noise = gumbel_noise(torch.tensor(seeds), step, 50)
        assert noise.dtype == torch.float32
        for row, seed in enumerate(seeds):
            told = [expected(seed, step, token) for token in range(50)]
            torch.testing.assert_close(noise[row].tolist(), told, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_it_is_gumbel_and_steps_items_and_tokens_are_independent(dim: int) -> None:
    noise = torch.stack(
        [gumbel_noise(torch.arange(128) + 10**6, step, 48) for step in range(96)]
    )  # steps, items, tokens
    assert stats.kstest(noise.flatten().numpy(), "gumbel_r").pvalue > 0.01
    for slice_ in noise.unbind(dim)[:3]:
        assert stats.kstest(slice_.flatten().numpy(), "gumbel_r").pvalue > 1e-3
    uniform = torch.exp(-torch.exp(-noise.double())).movedim(dim, 0).flatten(1)
    for lagged in (uniform, uniform.roll(1, 1)):
        alike = torch.corrcoef(torch.cat([uniform, lagged]))[: len(uniform), len(uniform) :]
        alike[torch.arange(len(alike)), torch.arange(len(alike))] = 0
        assert float(alike.abs().max()) * uniform.shape[1] ** 0.5 < 5.5  # standard deviations, over up to 16,384 pairs


def test_both_tails_are_there_and_finite() -> None:
    noise = gumbel_noise(torch.tensor([3]), 0, 4_000_000)
    assert bool(noise.isfinite().all())
    assert 13 < float(noise.max()) < 25
    assert -3.1 < float(noise.min()) < -2.5
    assert (
        stats.kstest(noise[noise > 8].numpy(), lambda x: 1 - (1 - stats.gumbel_r.cdf(x)) / stats.gumbel_r.sf(8)).pvalue
        > 0.01
    )


def test_draws_follow_the_softmax() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -3.0])
    sampler = _Sampler(0.7, 1.0, range(20_000))
    for _ in range(2):
        drawn = sampler(torch.empty(0), logits.expand(20_000, -1)).argmax(dim=1)
        expected_counts = (logits.double() / 0.7).softmax(dim=0) * 20_000
        assert stats.chisquare(drawn.bincount(minlength=5).numpy(), expected_counts.numpy()).pvalue > 0.01


def test_a_rows_draws_do_not_depend_on_its_neighbours() -> None:
    logits = torch.randn(4, 1000, generator=torch.Generator().manual_seed(0))
    together, alone = _Sampler(1.0, 0.9, [5, 6, 7, 8]), _Sampler(1.0, 0.9, [7])
    for _ in range(3):
        assert torch.equal(together(torch.empty(0), logits)[2], alone(torch.empty(0), logits[2:3])[0])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_draws_the_same() -> None:
    seeds = torch.arange(8)
    on_gpu = gumbel_noise(seeds.cuda(), 3, 152_064)
    assert on_gpu.device.type == "cuda"
    torch.testing.assert_close(on_gpu.cpu(), gumbel_noise(seeds, 3, 152_064), rtol=1e-6, atol=1e-6)
