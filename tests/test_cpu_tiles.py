"""The CPU kernel on AMX tiles: the instruction, on the processor and in plain C; padding; torch beside it."""

from __future__ import annotations

import pytest
import torch
from test_cpu_kernels import assert_as_good_as_reference, draw

from grads_dist.stats import native

TILES = [name for name in ("amx", "wideamx") if name in native.variants()]
TINY = 2.0**-126
"""The smallest number that is not denormal, in bfloat16 as in float32."""
BIG = 2.0**12

on_tiles = pytest.mark.parametrize("variant", TILES)
pytestmark = pytest.mark.skipif(not TILES, reason="only where wideamx runs")


@on_tiles
@pytest.mark.parametrize(
    ("b", "a", "expected"),
    [
        ([3.0], [5.0], 15.0),
        ([3.0, 2.0, 1.0], [5.0, 7.0, 11.0], 40.0),
        # The first tokens of all pairs are summed apart from the second: the 1 does not meet 2^24.
        ([BIG, 0.0, BIG, 1.0], [BIG, 0.0, -BIG, 1.0], 1.0),
        # Each product is rounded into its sum: 2^24 + 1 is 2^24, twice.
        ([BIG, 0.0, 1.0, 1.0], [BIG, 0.0, 1.0, 1.0], 2.0**24),
        # The sums of the next 32 tokens begin at zero, and are joined before they meet what was there.
        ([BIG, *[0.0] * 31, 1.0, 1.0], [BIG, *[0.0] * 31, 1.0, 1.0], 2.0**24 + 2),
        # To the nearest, to even where there are two: 2^24 + 3 lies between 2^24 + 2 and 2^24 + 4.
        ([3.0, BIG], [1.0, BIG], 2.0**24 + 4),
        # A product keeps its bits until it is added: what the square of 1 + 2^-7 has above 1 decides.
        ([BIG, 0.0, 1 + 2.0**-7], [BIG, 0.0, 1 + 2.0**-7], 2.0**24 + 2),
        # Denormal factors and denormal sums are zeros.
        ([TINY / 2, 1.0], [2.0**60, 1.0], 1.0),
        ([TINY, 0.0], [0.5, 1.0], 0.0),
        ([TINY, 1.0], [1.5, -TINY], 0.0),
        ([TINY, 0.0, TINY, 0.0, TINY], [1.5, 0.0, -1.0, 0.0, 1.0], TINY),
        ([0.0, TINY, 0.0, TINY, 0.0, TINY], [0.0, 1.5, 0.0, -1.0, 0.0, 1.0], TINY),
    ],
)
def test_the_instruction(variant, b, a, expected):
    b, a = (torch.tensor(x).bfloat16()[:, None] for x in (b, a))
    assert native.outer_product_stats(b, a, [len(b)], None, None, variant)[3].item() == expected


@pytest.mark.skipif("amx" not in TILES, reason="only where amx runs")
@pytest.mark.parametrize(("num_b", "num_a"), [(1, 1), (32, 32), (31, 65), (70, 300)])
@pytest.mark.parametrize("exponents", [4, 60, 120])
def test_the_processor_gives_the_same_bits(num_b, num_a, exponents):
    """Sums of any order of magnitude, denormal ones and infinities included."""
    lengths = [1, 2, 31, 32, 33, 0, 64, 255, 257, 600, 1100]
    b, a = draw(lengths, num_b, num_a)
    generator = torch.Generator().manual_seed(1)
    powers = [torch.randint(-exponents, exponents, x.shape, generator=generator) for x in (b, a)]
    b, a = (torch.ldexp(x, power).bfloat16() for x, power in zip((b, a), powers, strict=True))
    found, totals = [], []
    for variant in ("amx", "wideamx"):
        totals.append(torch.zeros(num_b, num_a))
        found.append(torch.stack(native.outer_product_stats(b, a, lengths, totals[-1], None, variant)))
    torch.testing.assert_close(*found, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(*totals, rtol=0, atol=0, equal_nan=True)


@on_tiles
def test_every_number_of_tokens(variant):
    lengths = list(range(70))
    b, a = draw(lengths, 33, 65, torch.bfloat16)
    found = native.outer_product_stats(b, a, lengths, None, None, variant)
    assert_as_good_as_reference(found, b, a, lengths)


@on_tiles
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("sample", range(5))
def test_padding_takes_nothing_of_a_neighbour(variant, bad, sample):
    """All of a sample's factors are bad: what is read past another's end would show."""
    lengths = [33, 31, 1, 64, 290]
    b, a = draw(lengths, 40, 70, torch.bfloat16)
    clean = torch.stack(native.outer_product_stats(b, a, lengths, None, None, variant))
    for x in (b, a):
        x.split(lengths)[sample].fill_(bad)
    found = torch.stack(native.outer_product_stats(b, a, lengths, None, None, variant))
    others = [i for i in range(5) if i != sample]
    assert not found[1, sample].isfinite() and torch.equal(found[:, others], clean[:, others])


@on_tiles
def test_memory_that_held_something_else(variant):
    """Padding is written each time: a buffer that comes back holds the panels of the call before."""
    lengths = [5, 40]
    b, a = draw(lengths, 40, 70, torch.bfloat16)
    clean = torch.stack(native.outer_product_stats(b, a, lengths, None, None, variant))
    for _ in range(3):
        native.outer_product_stats(torch.full_like(b, torch.nan), a, [45], None, None, variant)
        again = torch.stack(native.outer_product_stats(b, a, lengths, None, None, variant))
        assert torch.equal(again, clean)


@on_tiles
def test_tiles_are_left_as_torch_needs_them(variant, monkeypatch):
    """oneDNN multiplies on the same tiles, in the same threads."""
    monkeypatch.setattr(native, "WORK_OF_A_THREAD", 1)
    b, a = draw([512], 256, 192, torch.bfloat16)
    ours, theirs = torch.stack(native.outer_product_stats(b, a, [512], None, None, variant)), b.t() @ a
    for _ in range(5):
        assert torch.equal(b.t() @ a, theirs)
        again = native.outer_product_stats(b, a, [512], None, None, variant)
        assert torch.equal(torch.stack(again), ours)
