"""LST: the side network against a plain formula, its start against the backbone's weights, and what it does not do."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from contract import CONFIGS, OUTPUTS, SITES, backbone, cohort, lane, move, split
from plain import ROWS, close, design, lane_logits, plain_model
from torch import Tensor

from peftscape.search.cohort import Cohort
from peftscape.search.head import Head
from peftscape.search.states import StateCache
from peftscape.spaces.price import adapter_size

FAMILIES = pytest.mark.parametrize("family", CONFIGS)


def normed(x: Tensor, gain: Tensor) -> Tensor:
    return x * (x.square().mean(dim=-1, keepdim=True) + 1e-6).rsqrt() * gain


def climb(p: dict[str, Tensor], states: list[Tensor], heads: int, causal: bool) -> Tensor:
    """One text: tokens x d at each rung, to tokens x d."""
    s = states[0] @ p["down"][0].T + p["down_bias"][0]
    width = s.shape[1] // heads
    for i, h in enumerate(states[1:]):
        gate = torch.sigmoid(p["gate_logit"][i] / 0.1)
        s = gate * s + (1 - gate) * (h @ p["down"][i + 1].T + p["down_bias"][i + 1])
        q, k, v = (normed(s, p["gain"][i, 0]) @ p["qkv"][i].T).chunk(3, dim=1)
        mixed = []
        for head in range(heads):
            part = slice(head * width, (head + 1) * width)
            scores = q[:, part] @ k[:, part].T / width**0.5
            if causal:
                scores = scores + torch.full_like(scores, -torch.inf).triu(1)
            mixed.append(scores.softmax(dim=1) @ v[:, part])
        s = s + torch.cat(mixed, dim=1) @ p["out"][i].T
        wide = torch.nn.functional.gelu(normed(s, p["gain"][i, 1]) @ p["widen"][i].T)
        s = s + wide @ p["narrow"][i].T
    return normed(s, p["last_gain"]) @ p["up"].T + p["up_bias"]


@FAMILIES
def test_it_is_its_equation_and_its_gradients_are_that_equations(family: str) -> None:
    """On transformers' own hidden states, one text at a time, under transformers' own classifier."""
    own = lane(design({"method": "lst", "size": 6, "heads": 2}), 3, family)
    move([own])
    model = plain_model(family)
    for name, value in own.params.items():
        if name.startswith("head/"):
            model.get_parameter(name.removeprefix("head/")).data.copy_(value.detach())
    p = {k.rpartition("/")[2]: v.detach().clone().requires_grad_() for k, v in own.params.items() if k[0] == "0"}
    passed: list[Tensor] = []
    for path in (s.path for s in SITES[family].sites if s.kind == "block"):
        block = model.base_model.get_submodule(path)
        if not passed:
            block.register_forward_pre_hook(
                lambda _, args, more: passed.append(args[0] if args else more["hidden_states"]), with_kwargs=True
            )
        block.register_forward_hook(lambda _, args, out: passed.append(out[0] if isinstance(out, tuple) else out))
        passed.append(torch.empty(0))
    head = Head(backbone(family), kind="class", outputs=OUTPUTS)

    def replace(module: Any, args: Any, out: Any) -> Any:
        states = [x[0] for x in passed if x.numel()]
        passed.clear()
        assert len(states) == 3
        out.last_hidden_state = climb(p, states, 2, SITES[family].causal)[None]
        if "pooler_output" in out and head.pooling == "pooler":
            out.pooler_output = module.pooler(out.last_hidden_state)
        return out

    passed.clear()
    model.base_model.register_forward_hook(replace)
    wanted = torch.cat([model(input_ids=torch.from_numpy(split().ids[i])[None]).logits for i in ROWS])
    found = lane_logits(own, family)
    close(found, wanted, family)
    weights = torch.from_numpy(np.random.default_rng(0).normal(size=wanted.shape))
    (found * weights).sum().backward()  # type: ignore[no-untyped-call]
    (wanted * weights).sum().backward()  # type: ignore[no-untyped-call]
    for name, value in p.items():
        close(own.params[f"0/ladder/{name}"].grad, value.grad, family, name)


@FAMILIES
def test_at_full_width_the_start_holds_the_backbones_own_weights(family: str) -> None:
    """Nothing is cut then: rows of q and k come in pairs, v and o too, whatever their order."""
    d, base = 32, backbone(family)
    own = {
        k.rpartition("/")[2]: v.detach()
        for k, v in lane(design({"method": "lst", "size": d}), 0, family).params.items()
    }
    assert torch.equal(own["down"], torch.eye(d).double().repeat(3, 1, 1))
    assert torch.equal(own["up"], torch.eye(d).double())
    for layer in range(2):
        q, k, v = own["qkv"][layer].chunk(3)
        weight = {kind: base.linear(layer, kind) for kind in ("q", "k", "v", "o", "up", "down")}
        if len(weight["k"]) < d:  # grouped queries: two heads of 8 read the same keys and values
            for kind in ("k", "v"):
                weight[kind] = weight[kind].view(2, 1, 8, d).expand(2, 2, 8, d).reshape(d, d)
        torch.testing.assert_close(q.T @ k, weight["q"].T @ weight["k"])
        torch.testing.assert_close(own["out"][layer] @ v, weight["o"] @ weight["v"])
        # 48 units for 4 * 32 places: each is there two or three times.
        units = {tuple(row) for row in own["widen"][layer].tolist()}
        assert units == {tuple(row) for row in weight["up"].tolist()}


def test_a_small_one_keeps_the_dimensions_with_the_largest_weights() -> None:
    base = backbone("bert")
    score = torch.zeros(32, dtype=torch.float64)
    for layer in range(2):
        for kind in ("q", "k", "v", "up"):
            score += base.linear(layer, kind).square().sum(dim=0)
        for kind in ("o", "down"):
            score += base.linear(layer, kind).square().sum(dim=1)
    own = lane(design({"method": "lst", "size": 5}), 0, "bert")
    chosen = own.params["0/ladder/up"].detach().argmax(dim=0)
    assert set(chosen.tolist()) == set(score.topk(5).indices.tolist())


@pytest.mark.parametrize(("size", "every", "rungs"), [(4, 1, 2), (4, 2, 1), (7, 1, 2)])
def test_its_count_is_the_papers(size: int, every: int, rungs: int) -> None:
    """R side layers of 12 m^2, R + 1 projections down and one up, with biases, gains and gates."""
    d, m = 32, size
    layers = rungs * (12 * m**2 + 2 * m + 1)
    of = design({"method": "lst", "size": size, "every": every})
    assert adapter_size(of, SITES["bert"]) == layers + (rungs + 1) * (d * m + m) + m + d * m + d


def test_with_its_states_kept_no_layer_runs_and_neighbours_are_not_disturbed() -> None:
    """Alone it needs no layer. Beside a lane that starts above, its lower rungs come from the cache."""
    base = backbone("bert")
    cache = StateCache(base)
    shared = Cohort(base, cohort("bert").head, split(), batch_size=3, cache=cache)
    own, other = (
        lane(d, 1, "bert") for d in (design({"method": "lst", "size": 4}), design({"method": "lora", "layers": [1]}))
    )
    move([own, other])
    calls: list[int] = []
    hooks = [
        base.model.get_submodule(f"encoder.layer.{n}.attention.self.query").register_forward_hook(
            lambda *_, n=n: calls.append(n)
        )
        for n in range(2)
    ]
    shared.admit(own)
    alone = shared.predict(split())[0]
    assert set(calls) == {0, 1}, "filled in one pass over the layers"
    assert calls.count(0) == 1
    calls.clear()
    shared.predict(split())
    assert calls == []
    shared.admit(other)
    together = shared.logits([np.arange(3)] * 2, split())
    assert calls == [1]
    for hook in hooks:
        hook.remove()
    mine = shared.lanes.index(own)
    np.testing.assert_allclose(together[mine].detach().numpy(), alone[:3], rtol=1e-5)
    shared.close()


def test_it_trains_alike_with_states_kept_and_without() -> None:
    found = []
    for cache in (None, StateCache(backbone("gpt2")), StateCache(backbone("gpt2"), memory_limit=0, disk_limit=0)):
        shared = Cohort(backbone("gpt2"), cohort("gpt2").head, split(), batch_size=3, cache=cache)
        rows: list[dict[str, Any]] = [
            {"method": "lst", "size": 4},
            {"method": "lora", "layers": [1]},
            {"method": "lora"},
        ]
        lanes = [lane(design(row, lr=1e-2), seed, "gpt2") for seed, row in enumerate(rows)]
        shared.admit(*lanes)
        for _ in range(6):
            shared.step()
        shared.close()
        found.append([one.losses for one in lanes])
    np.testing.assert_allclose(found[1], found[0], rtol=1e-9)
    np.testing.assert_allclose(found[2], found[0], rtol=1e-9)


def test_what_cannot_be_is_refused() -> None:
    def errors(**knobs: Any) -> list[str]:
        return design({"method": "lst", **knobs}).check(SITES["bert"])

    assert errors(size=33) == ["placements[0].size: 33 is not from 2 to the backbone's 32"]
    assert errors(size=4, every=3) == ["placements[0].every: 3 of a backbone with 2 layers"]
    assert errors(size=6, heads=4) == ["placements[0].heads: 4 do not share 6 dimensions evenly"]
    assert errors(size=6, heads=3) == []
