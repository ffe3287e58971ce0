"""Rotations: orthogonal where they say so, BOFT's factors those that peft builds, LoReFT's rows orthonormal."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from contract import CONFIGS, SITES, cohort, lane, move, split
from peft.tuners.boft.layer import BOFTLayer
from peft.tuners.oft.layer import OFTLayer
from torch import Tensor, nn
from transformers import AutoModel

from peftscape.search.lane import Lane
from peftscape.spaces.design import Design
from peftscape.spaces.methods.base import Lanes
from peftscape.spaces.methods.boft import BOFT
from peftscape.spaces.methods.loreft import LoReFT
from peftscape.spaces.methods.oft import OFT, nearest_divisor
from peftscape.spaces.sites import Site


def normal(*shape: int, seed: int, size: float = 0.3) -> Tensor:
    source = torch.Generator().manual_seed(seed)
    return torch.empty(shape, dtype=torch.float64).normal_(0, size, generator=source)


def boft_matrix(upper: Tensor, b: int) -> Tensor:
    """The rotation as peft's forward builds it from its own permutations and Cayley transform, written out."""
    peft_layer: Any = BOFTLayer(nn.Linear(4, 4))
    factors, blocks = upper.shape[:2]
    rows, columns = torch.triu_indices(b, b, 1)
    full = torch.zeros(factors, blocks, b, b, dtype=upper.dtype)
    full[..., rows, columns] = 2 * upper  # of which peft takes the skew-symmetric half
    rotations = [peft_layer.cayley_batch(full[i].float()).double() for i in range(factors)]
    total = torch.eye(blocks * b, dtype=upper.dtype)
    for i in range(factors):
        order = peft_layer.block_butterfly_perm(blocks * b, blocks // 2**i, b // 2, factors - 1)
        mix = peft_layer.perm2mat(order).to(upper.dtype)
        total = mix @ torch.block_diag(*rotations[i]) @ mix.T @ total
    return total


@pytest.mark.parametrize(("factors", "block", "width"), [(1, 4, 24), (2, 4, 24), (2, 2, 32), (3, 4, 32), (4, 2, 48)])
def test_bofts_factors_are_pefts(factors: int, block: int, width: int) -> None:
    method, site = BOFT(block=block, factors=factors), Site("q", 0, "x", width, 20)
    b = method.width(site)
    assert b == block
    upper = normal(*method.tensors(site)["R"].shape, seed=1)
    [seen] = method.expand([{"R": upper, "s": torch.ones(20, dtype=torch.float64)}], (site,), None)
    x = normal(1, 7, width, seed=2)
    found = method.apply_input(Lanes({"R": seen["R"].unsqueeze(0)}), x)
    torch.testing.assert_close(found[0], x[0] @ boft_matrix(upper, b), rtol=0, atol=1e-6)
    torch.testing.assert_close(found.norm(dim=-1), x.norm(dim=-1), rtol=1e-12, atol=0)


def test_bofts_factors_together_mix_every_coordinate_with_every_other() -> None:
    """m factors of blocks of b reach b 2^{m - 1} coordinates."""
    method, site = BOFT(block=4, factors=4), Site("q", 0, "x", 32, 8)
    matrix = boft_matrix(normal(*method.tensors(site)["R"].shape, seed=3), 4)
    assert bool((matrix.abs() > 1e-9).all())
    one = BOFT(block=4, factors=1)
    assert int((boft_matrix(normal(*one.tensors(site)["R"].shape, seed=3), 4).abs() > 1e-9).sum()) == 32 * 4


@pytest.mark.parametrize(("rotation", "far"), [("cayley", 1e-12), ("neumann", 1e-3)])
def test_ofts_blocks_are_orthogonal(rotation: str, far: float) -> None:
    method, site = OFT(block=8, rotation=rotation), Site("q", 0, "x", 32, 32)
    upper = normal(*method.tensors(site)["R"].shape, seed=4, size=0.02)
    [seen] = method.expand([{"R": upper}], (site,), None)
    gram = seen["R"] @ seen["R"].mT
    assert float((gram - torch.eye(8, dtype=torch.float64)).abs().max()) < far


@pytest.mark.parametrize("width", [32, 48, 384, 768])
def test_a_block_that_does_not_divide_is_brought_to_pefts_nearest(width: int) -> None:
    layer: Any = OFTLayer(nn.Linear(4, 4))
    for wanted in range(1, width + 5):
        assert nearest_divisor(width, wanted) == layer.adjust_oft_parameters(width, wanted), wanted


def test_an_input_that_a_fused_linear_shares_is_refused() -> None:
    for name in ("oft", "boft"):
        errors = Design.from_json({"placements": [{"method": name, "sites": ["v"]}]}).check(SITES["gpt2"])
        assert errors == ["placements[0].sites: v shares its input with others in a fused linear"]


# -- LoReFT


def edited(frozen: nn.Module, own: Lane, first: int, last: int) -> list[tuple[Tensor, Tensor]]:
    """Each text's output of the lower layer, and what the paper's formula makes of it."""
    config, found = copy.deepcopy(CONFIGS["bert"]), []
    config._attn_implementation = "eager"
    model: Any = AutoModel.from_config(config).to(torch.float64).eval()
    model.load_state_dict(frozen.state_dict())
    held = {key.rpartition("/")[2]: v for key, v in own.params.items() if key.startswith("0/")}
    q, upper = np.linalg.qr(held["V"].detach().numpy().T)
    rows = torch.from_numpy((q * np.sign(np.diag(upper))).T)
    for ids in split().ids[:6]:
        with torch.no_grad():
            h = model(input_ids=torch.from_numpy(ids).unsqueeze(0), output_hidden_states=True).hidden_states[1][0]
        new = h.clone()
        for place in range(len(ids)):
            if place < first or place >= len(ids) - last:
                new[place] = h[place] + rows.T @ (held["W"] @ h[place] + held["b"] - rows @ h[place])
        found.append((h, new.detach()))
    return found


@pytest.mark.parametrize(("first", "last"), [(2, 3), (1, 0), (0, 4)])
def test_loreft_edits_the_first_and_the_last_tokens_of_each_text(first: int, last: int) -> None:
    row = {"method": "loreft", "rank": 3, "first": first, "last": last, "layers": [0]}
    own, shared = lane(Design.from_json({"placements": [row]}), 1, "bert"), cohort("bert")
    move([own])
    states: list[Tensor] = []
    shared.admit(own)
    hook = shared.backbone.model.get_submodule("encoder.layer.1").register_forward_pre_hook(
        lambda module, args: states.append(args[0])
    )
    with torch.no_grad():
        shared.logits([np.arange(6)], split())
    hook.remove()
    shared.close()
    packed = states[0].reshape(-1, states[0].shape[-1])
    for before, after in edited(shared.backbone.model, own, first, last):
        distance = torch.cdist(after, packed, compute_mode="donot_use_mm_for_euclid_dist")
        assert float(distance.min(dim=1).values.max()) < 1e-9  # each token stands somewhere among the packed
        assert not torch.allclose(before, after)


def test_lorefts_rows_stay_orthonormal_and_its_count_is_the_papers() -> None:
    rank, d = 3, SITES["bert"].d_model
    own, shared = (
        lane(Design.from_json({"placements": [{"method": "loreft", "rank": rank}]}), 1, "bert"),
        cohort("bert"),
    )
    shared.admit(own)
    for _ in range(5):
        shared.step()
    shared.close()
    method = own.design.placements[0].method
    for row in method.expand(own.own[0], own.sites[0], None):
        torch.testing.assert_close(row["R"] @ row["R"].T, torch.eye(rank, dtype=torch.float64))
    counted = sum(v.numel() for k, v in own.params.items() if k.startswith("0/"))
    assert counted == SITES["bert"].layers * (2 * rank * d + rank)
    assert LoReFT(first=0, last=0).check(own.sites[0][0]) == "first: no token is edited"
