"""Kronecker and element-wise products against the matrices that they stand for, and the counts of their papers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from contract import SITES
from peft.tuners.lokr.layer import factorization
from torch import Tensor

from peftscape.spaces.design import Design
from peftscape.spaces.methods.base import Lanes
from peftscape.spaces.methods.compacter import Compacter
from peftscape.spaces.methods.krona import KronA
from peftscape.spaces.methods.lokr import factors
from peftscape.spaces.price import adapter_size
from peftscape.spaces.sites import Site, SiteMap, site_map

LAYERS, D, F = 12, 768, 3072
ROBERTA: SiteMap = site_map({
    "model_type": "roberta", "hidden_size": D, "num_hidden_layers": LAYERS, "num_attention_heads": 12,
    "intermediate_size": F, "vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1,
    "pad_token_id": 1,
})  # fmt: skip


def count(**placement: Any) -> int:
    return adapter_size(Design.from_json({"placements": [placement]}), ROBERTA)


def normal(*shape: int, seed: int) -> Tensor:
    source = torch.Generator().manual_seed(seed)
    return torch.empty(shape, dtype=torch.float64).normal_(generator=source).requires_grad_()


def alike(found: Tensor, wanted: Tensor, leaves: list[Tensor]) -> None:
    """Outputs and gradients."""
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
    weights = torch.randn(wanted.shape, dtype=wanted.dtype)
    gradients = [torch.autograd.grad((out * weights).sum(), leaves) for out in (found, wanted)]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("size", [1, 2, 7, 16, 64])
def test_krona_adds_the_product_that_torch_forms(size: int) -> None:
    method, site = KronA(size=size, scale=0.7), Site("up", 0, "x", 24, 36)
    (a, b) = method.shapes(site)
    A, B, x, y = normal(2, *a, seed=1), normal(2, *b, seed=2), normal(2, 5, 24, seed=3), normal(2, 5, 36, seed=4)
    assert (a[0] * b[0], a[1] * b[1]) == (36, 24)
    p = Lanes({"A": A, "B": B, "scale": torch.full((2, 1, 1), 0.7, dtype=torch.float64)})
    wanted = torch.stack([y[i] + 0.7 * x[i] @ torch.kron(A[i], B[i]).T for i in range(2)])
    alike(method.apply(p, x, y), wanted, [A, B, x, y])


@pytest.mark.parametrize("factor", [-1, 1, 2, 4, 7, 8, 64])
def test_lokrs_factors_are_pefts(factor: int) -> None:
    for width in range(1, 800):
        assert factors(width, factor) == factorization(width, factor), width


@pytest.mark.parametrize(("n", "rank", "size"), [(2, 1, 6), (4, 1, 7), (4, 2, 12), (8, 3, 8)])
def test_compacter_is_the_papers_sum_of_kronecker_products(n: int, rank: int, size: int) -> None:
    method, site = Compacter(size=size, n=n, rank=rank), SITES["bert"].select(["ffn"], [0])[0]
    d, m = site.d_out, method.bottleneck
    assert m % n == 0
    assert size <= m < size + n
    declared = method.tensors(site) | method.shared((site,))
    held = {name: normal(2, *t.shape, seed=i) for i, (name, t) in enumerate(declared.items())}
    y = normal(2, 5, d, seed=99)
    wanted = []
    for lane in range(2):
        own = {name: value[lane] for name, value in held.items()}
        down = sum(torch.kron(own["A"][i], own["down_t"][i] @ own["down_s"][i]) for i in range(n))
        up = sum(torch.kron(own["A"][i], own["up_t"][i] @ own["up_s"][i]) for i in range(n))
        assert isinstance(down, Tensor)
        assert isinstance(up, Tensor)
        assert (down.shape, up.shape) == ((m, d), (d, m))
        z = y[lane] @ down.T + own["down_bias"].flatten()
        hidden = z * 0.5 * (1 + torch.erf(z / math.sqrt(2)))
        wanted.append(y[lane] + hidden @ up.T + own["up_bias"])
    alike(method.apply(Lanes(held), y, y), torch.stack(wanted), [*held.values(), y])


@pytest.mark.parametrize(("n", "rank", "m"), [(4, 1, 24), (2, 1, 64), (8, 2, 48)])
def test_compacter_counts_what_its_paper_counts(n: int, rank: int, m: int) -> None:
    each = 2 * rank * (D + m) + m + D
    assert count(method="compacter", size=m, n=n, rank=rank) == 2 * LAYERS * each + n**3
    # Compacter++ is the FFN alone.
    assert count(method="compacter", size=m, n=n, rank=rank, sites=["ffn"]) == LAYERS * each + n**3


def test_the_others_count_what_their_papers_count() -> None:
    assert count(method="krona", size=32, sites=["q", "v", "up"]) == LAYERS * (
        2 * (32 * 32 + (D // 32) ** 2) + 32 * 32 + (F // 32) * (D // 32)
    )
    assert count(method="loha", rank=8, sites=["q", "up"]) == LAYERS * 2 * 8 * (2 * D + D + F)
    # 768 = 24 * 32: a whole 24 x 24 and 32 x 8, 8 x 32.
    assert count(method="lokr", rank=8, sites=["q"]) == LAYERS * (24 * 24 + 2 * 32 * 8)
    assert count(method="vera", rank=64, sites=["q", "up"]) == LAYERS * (64 + D + 64 + F)


def test_compacters_factors_a_are_one_for_the_placement() -> None:
    of = Design.from_json({"placements": [{"method": "compacter", "n": 4}]})
    keys = [key for key, _, _, _ in of.placements[0].tensors(ROBERTA)]
    assert keys.count("A") == 1
    assert len(keys) == 1 + 6 * 2 * LAYERS


def test_a_width_that_does_not_divide_is_refused() -> None:
    of = Design.from_json({"placements": [{"method": "compacter", "n": 5}]})
    assert "placements[0].n: the attention output (768) does not divide into 5 parts" in of.check(ROBERTA)
