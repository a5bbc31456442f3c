"""Random perturbations: the generator is the published one, and its numbers depend on seed, row and element alone."""

import math

import pytest
import torch
from torch import Tensor

from sam_kernels import functional, use_backend
from sam_kernels.reference.random import philox
from tests.helpers.backends import widest
from tests.helpers.compare import assert_same_bits

# Random123's kat_vectors, "philox4x32 10": counter, key, output.
KNOWN = [
    ([0, 0, 0, 0], [0, 0], [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


def philox_in_integers(counter: list[int], key: list[int]) -> list[int]:
    """As the paper's figure 2 reads, in Python's unbounded integers."""
    left, right, (key0, key1) = counter[0::2], counter[1::2], key
    for _ in range(10):
        (high0, low0), (high1, low1) = (divmod(a * b, 2**32) for a, b in zip((0xD2511F53, 0xCD9E8D57), left, strict=True))
        left, right = [high1 ^ right[0] ^ key0, high0 ^ right[1] ^ key1], [low1, low0]
        key0, key1 = (key0 + 0x9E3779B9) % 2**32, (key1 + 0xBB67AE85) % 2**32
    return [left[0], right[0], left[1], right[1]]


def numbers(*shapes: tuple[int, ...], seed: int = 0, distribution: str = "normal", dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """z itself: a perturbation of zeros by 1."""
    params = [torch.zeros(shape, dtype=dtype) for shape in shapes]
    functional.random_perturb_(params, [torch.zeros_like(p) for p in params], seed=seed, scale=1.0, distribution=distribution)
    return params


@pytest.mark.parametrize(("counter", "key", "output"), KNOWN)
def test_the_reference_is_the_published_generator(counter: list[int], key: list[int], output: list[int]) -> None:
    assert philox(torch.tensor(counter)[:, None], (key[0], key[1])).flatten().tolist() == output
    assert philox_in_integers(counter, key) == output


def test_a_sign_is_the_word_the_contract_says(backend: str) -> None:
    seed, numel = 0x0123456789ABCDEF, 70_000
    signs = numbers((5,), (0,), (numel,), seed=seed, distribution="rademacher")[2]
    assert set(signs.tolist()) == {-1.0, 1.0}
    for i in (0, 1, 255, 256, 511, 512, 1023, 1024, 1300, 65_535, 65_536, 69_999):
        c = i // 1024 * 256 + i % 256
        word = philox_in_integers([c, 0, 2, 0], [0x89ABCDEF, 0x01234567])[i % 1024 // 256]
        assert signs[i] == (-1.0 if word >> 31 else 1.0), i


def test_normals_are_box_and_muller(backend: str) -> None:
    z = numbers((2048,), seed=7)[0].double()
    for i in (0, 300, 767, 1023, 1500):
        words = philox_in_integers([i // 1024 * 256 + i % 256, 0, 0, 0], [7, 0])
        first = i % 1024 // 512 * 2
        radius = math.sqrt(-2 * math.log(((words[first] >> 8) + 1) * 2.0**-24))
        angle = 2 * math.pi * (words[first + 1] >> 8) * 2.0**-24
        assert z[i].item() == pytest.approx(radius * (math.sin(angle) if i % 512 >= 256 else math.cos(angle)), abs=1e-6)


@pytest.mark.parametrize("distribution", ["rademacher", "normal"])
def test_numbers_depend_on_seed_row_and_element_alone(backend: str, distribution: str) -> None:
    """Not on the row's size, dtype or neighbours."""
    first, second = numbers((3000,), (3000,), seed=3, distribution=distribution)
    shorter, wide = numbers((7,), (1500,), seed=3, distribution=distribution, dtype=widest(backend))
    assert_same_bits("z", [shorter.float(), wide.float()], [first[:7], second[:1500]])
    others = [
        first,
        second,
        *numbers((3000,), seed=4, distribution=distribution),
        *numbers((3000,), seed=3 + 2**32, distribution=distribution),
    ]
    for i, z in enumerate(others):
        for other in others[:i]:
            assert abs(torch.dot(z, other).item()) < 5 * math.sqrt(3000)


def test_numbers_follow_memory_order(backend: str) -> None:
    """A permuted parameter gets what a contiguous one of its memory gets; where old_params lie otherwise, C order counts."""
    flat = numbers((2 * 3 * 5 * 7,))[0]
    for param in (torch.zeros(2, 3, 5, 7).to(memory_format=torch.channels_last), torch.zeros(6, 35).t()):
        old = torch.zeros_like(param)
        functional.random_perturb_([param], [old], seed=0, scale=1.0, distribution="normal")
        assert_same_bits("memory order", [param.as_strided((210,), (1,))], [flat])
        functional.random_perturb_([param], [old.contiguous()], seed=0, scale=1.0, distribution="normal", from_old=True)
        assert_same_bits("C order", [param.reshape(-1)], [flat])


@pytest.mark.usefixtures("wide_blocks")
@pytest.mark.parametrize("distribution", ["rademacher", "normal"])
def test_moments_and_tails(backend: str, distribution: str) -> None:
    z = numbers((1_000_000,), seed=11, distribution=distribution)[0].double()
    fourth, error = (3.0, math.sqrt(96)) if distribution == "normal" else (1.0, 0.0)
    assert abs(z.mean().item()) < 5e-3
    assert abs(z.square().mean().item() - 1) < 5 * math.sqrt(2) / 1000
    assert abs(z.pow(3).mean().item()) < 5 * math.sqrt(15) / 1000
    assert abs(z.pow(4).mean().item() - fourth) <= 5 * error / 1000
    for shift in (1, 256, 512, 1024):
        assert abs((z[shift:] * z[:-shift]).mean().item()) < 5e-3, shift
    if distribution == "normal":
        for limit in (1.0, 2.0, 3.0, 4.0):
            p = math.erfc(limit / math.sqrt(2))
            assert abs((z.abs() > limit).double().mean().item() - p) < 5 * math.sqrt(p / 1e6), limit
        assert 4.2 < z.abs().max() < 5.77


@pytest.mark.native
def test_backends_agree() -> None:
    pytest.importorskip("sam_kernels._cpu")
    for distribution, difference in (("rademacher", 0.0), ("normal", 1.1e-6)):
        found = []
        for backend in ("native", "foreach"):
            with use_backend(backend):
                found.append(numbers((1_000_003,), (5,), (300,), seed=5, distribution=distribution))
        assert max((a.double() - b.double()).abs().max().item() for a, b in zip(*found, strict=True)) <= difference
