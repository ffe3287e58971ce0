"""LST: a small side network that climbs beside the frozen backbone (Sung et al. 2022, arXiv:2206.06522)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from peftscape.spaces.knobs import integer, knob, ladder
from peftscape.spaces.methods.base import Lanes, Method, Tensor, Tensors

if TYPE_CHECKING:
    import torch

    from peftscape.spaces.methods.base import Array
    from peftscape.spaces.sites import Site, SiteMap

#: Of a layer's linears those that a side layer starts as a part of.
PARTS = ("q", "k", "v", "o", "up", "down")
#: The FFN of a side layer, in its widths.
WIDER = 4


class LST(Method):
    """s_0 = D_0 h_0; s <- Layer_n(g_n s + (1 - g_n) (D_n h_n + b_n)), g_n = sigmoid(a_n / T); U norm(s) + u for h_L.

    h_n are the states after n layers, read and never changed, so that no gradient enters the backbone; they are kept
    for each example like other states. D_n in R^{m x d}, U in R^{d x m}. A side layer is x + O softmax(Q n (K n)^T /
    sqrt(m / heads)) V n and then x + W_2 GELU(W_1 n), n = RMSNorm(x), W_1 in R^{4m x m}. There is one beside every
    `every`-th layer counted from the top, R of them: R (12 m^2 + 2 m + 1) + (R + 1) (d m + m) + m + d m + d parameters.
    The start: a = 0; the m dimensions with the largest weights over all layers are picked by D and put back by U, and
    the side layers are the backbone's cut to them (heads' and FFN's dimensions by the weights around them).
    """

    name, category = "lst", "additive"
    sites = frozenset({"ladder"})
    default_sites = ("ladder",)
    exact_start = False
    size_knob, letter = "size", "m"
    needs_weight = True
    needs_text = True

    size: int = knob(ladder(2, 256), default=64)
    every: int = knob(integer(1, 4), default=1)
    heads: int = 1
    temperature: float = 0.1

    #: Nothing below it can learn: it puts its own states in the place of the backbone's.
    alone = True

    def takes(self, site: Site, sites: SiteMap) -> bool:
        return set(PARTS) <= set(sites.kinds)

    def rungs(self, site: Site) -> tuple[int, ...]:
        return (0, *range(site.layer, 0, -self.every)[::-1])

    def tensors(self, site: Site) -> Tensors:
        d, m, count = site.d_in, self.size, len(self.rungs(site)) - 1
        shapes = {
            "down": (count + 1, m, d), "up": (d, m), "qkv": (count, 3 * m, m), "out": (count, m, m),
            "widen": (count, WIDER * m, m), "narrow": (count, m, WIDER * m),
        }  # fmt: skip
        return {
            "gate_logit": Tensor((count,)),
            "down_bias": Tensor((count + 1, m)),
            "up_bias": Tensor((d,)),
            "gain": Tensor((count, 2, m), init="ones"),
            "last_gain": Tensor((m,), init="ones"),
            **{name: Tensor(shape, init="own") for name, shape in shapes.items()},
        }

    def start(self, site: Site, frozen: Mapping[str, Any], source: torch.Generator) -> dict[str, Array]:
        import torch

        rungs, size = self.rungs(site), self.size
        layers = [_widened({k: frozen["linear"](n - 1, k) for k in PARTS}, frozen["queries"]) for n in rungs[1:]]
        reads = [w[k].square().sum(dim=0) for w in layers for k in ("q", "k", "v", "up")]
        writes = [w[k].square().sum(dim=1) for w in layers for k in ("o", "down")]
        kept = _largest(torch.stack(reads + writes).sum(dim=0), size)
        parts = [_cut(w, kept, size) for w in layers]
        chosen = torch.eye(site.d_in, dtype=layers[0]["q"].dtype, device=kept.device)[kept]
        return {
            "down": chosen.repeat(len(rungs), 1, 1),
            "up": chosen.T,
            **{name: torch.stack([part[name] for part in parts]) for name in parts[0]},
        }

    def ladder(self, p: Lanes, states: list[Array], causal: bool) -> Array:
        import torch

        def read(i: int) -> Array:
            return torch.baddbmm(p.down_bias[:, i : i + 1], states[i], p.down[:, i].mT)

        allowed = self._allowed(p, states[0], causal)
        s = read(0)
        for i in range(p.gate_logit.shape[1]):
            gate = torch.sigmoid(p.gate_logit[:, i] / self.temperature)[:, None, None]
            s = gate * s + (1 - gate) * read(i + 1)
            s = s + self._attend(p, _normed(s, p.gain[:, i, 0]), i, allowed)
            wide = torch.nn.functional.gelu(_normed(s, p.gain[:, i, 1]) @ p.widen[:, i].mT)
            s = s + wide @ p.narrow[:, i].mT
        return torch.baddbmm(p.up_bias.unsqueeze(1), _normed(s, p.last_gain), p.up.mT)

    def _allowed(self, p: Lanes, x: Array, causal: bool) -> Array:
        """What a token may look at: lanes x texts x 1 x (1 or longest) x longest."""
        import torch

        here = p.text.rows(torch.ones_like(x[..., :1]))[..., 0] > 0
        place = torch.arange(here.shape[-1], device=x.device)
        late = place > place[p.text.since :, None]
        allowed = here[:, :, None, None, :]
        return allowed & ~late if causal else allowed

    def _attend(self, p: Lanes, x: Array, i: int, allowed: Array) -> Array:
        import torch

        rows = p.text.rows(x @ p.qkv[:, i].mT)  # lanes x texts x longest x 3m
        shape = (*rows.shape[:3], self.heads, -1)
        q, k, v = (t.reshape(shape).transpose(2, 3) for t in rows.chunk(3, dim=-1))
        scores = (q[..., p.text.since :, :] * q.shape[-1] ** -0.5) @ k.mT
        weights = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min).softmax(dim=-1)
        return p.text.flat((weights @ v).transpose(2, 3).flatten(-2)) @ p.out[:, i].mT

    def flops(self, site: Site, tokens: int) -> int:
        m, count = self.size, len(self.rungs(site)) - 1
        inside = 2 * (4 + 2 * WIDER) * m * m + 4 * tokens * m
        return tokens * (count * inside + 2 * (count + 2) * site.d_in * m)

    def first_flops(self, site: Site, tokens: int) -> int:
        return 2 * tokens * len(self.rungs(site)) * site.d_in * self.size

    def saved_floats(self, site: Site, tokens: int) -> int:
        m, count = self.size, len(self.rungs(site)) - 1
        # The states that are read. Then a layer's: s and D h for the gate, what its two norms read and give, q, k, v
        # and their mixture in rows and in a line, the softmax (a decoder's with what is masked of it), and the FFN's
        # width twice; at the end the last norm.
        masked = tokens // 4 if site.stack == "decoder" else 0
        layer = (2 + 2 * 3 + 6 + 2 * WIDER) * m + 4 + tokens * self.heads + masked
        return tokens * (len(self.rungs(site)) * site.d_in + count * layer + 3 * m)

    def group_key(self, site: Site) -> tuple[Any, ...]:
        return (*self.static_knobs(), self.size, self.every, self.heads, self.temperature)

    def check(self, site: Site) -> str | None:
        if not 2 <= self.size <= site.d_in:  # of one number a norm leaves its sign
            return f"size: {self.size} is not from 2 to the backbone's {site.d_in}"
        if not 1 <= self.every <= site.layer:
            return f"every: {self.every} of a backbone with {site.layer} layers"
        if self.heads < 1 or self.size % self.heads:
            return f"heads: {self.heads} do not share {self.size} dimensions evenly"
        return None


def _normed(x: Array, gain: Array) -> Array:
    """RMSNorm: lanes x tokens x m, gain lanes x m."""
    import torch

    normed: Array = torch.nn.functional.rms_norm(x, x.shape[-1:], eps=1e-6) * gain.unsqueeze(1)
    return normed


def _widened(weights: dict[str, Array], queries: tuple[int, int]) -> dict[str, Array]:
    """Keys and values of grouped queries (heads, key heads) once for each head of queries; at least float32."""
    import torch

    wide = {k: w if w.dtype == torch.float64 else w.float() for k, w in weights.items()}
    heads, key_heads = queries
    for kind in ("k", "v"):
        by_head = wide[kind].view(key_heads, -1, wide[kind].shape[1])
        wide[kind] = by_head.repeat_interleave(heads // key_heads, dim=0).flatten(0, 1)
    return wide


def _largest(score: Array, count: int) -> Array:
    """Numbers of the `count` largest, ascending; all of them again and again where there are not as many."""
    import torch

    order = score.argsort(descending=True, stable=True)
    chosen: Array = order[torch.arange(count, device=score.device) % len(order)].sort().values
    return chosen


def _cut(w: dict[str, Array], kept: Array, size: int) -> dict[str, Array]:
    """A layer's linears with what they read and write cut to `kept`, and their inside to what weighs most."""
    import torch

    def norms(rows: Array, columns: Array) -> Array:
        product: Array = rows[:, kept].norm(dim=1) * columns.norm(dim=1)
        return product

    pairs = _largest(norms(w["q"], w["k"][:, kept]), size)
    values = _largest(norms(w["v"], w["o"].T[:, kept]), size)
    units = _largest(norms(w["up"], w["down"].T[:, kept]), WIDER * size)
    qkv = [w["q"][pairs], w["k"][pairs], w["v"][values]]
    return {
        "qkv": torch.cat([part[:, kept] for part in qkv]),
        "out": w["o"][kept][:, values],
        "widen": w["up"][units][:, kept],
        "narrow": w["down"][kept][:, units],
    }
