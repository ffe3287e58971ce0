"""What a training step of an encoder-decoder computes and keeps: a walk over its operations in their order.

Each operation is counted as `cost.py` and `activations.py` count it for one stack; whether it has a gradient, and
keeps something for it, follows from what is adapted before it. Of one sequence: S tokens of a source, T of a target.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from peftscape.spaces.activations import ACTIVATION_TENSORS
from peftscape.spaces.sites import LINEARS, Site, SiteMap

if TYPE_CHECKING:
    from peftscape.spaces.design import Design


def is_two_stacks(sites: SiteMap) -> bool:
    """Whether it is an encoder-decoder."""
    return sites.decoder_layers > 0


def tokens_at(site: Site, source: int, target: int) -> int:
    """How many tokens a site sees: keys and values of cross-attention are the source's."""
    return source if site.reads_source else target


@dataclass
class Walk:
    """FLOPs and kept bytes of one sequence of the frozen backbone's training step.

    Args:
        fused: attention in one kernel; T5's has a mask of its own in every layer, as large as the scores
            (transformers/integrations/sdpa_attention.py, create_position_bias_mask).
        cache: keys and values of the decoder are held by the model's output, kept or not.
    """

    design: Design
    sites: SiteMap
    source: int
    target: int
    width: int
    fused: bool = False
    cache: bool = False
    forward: int = 0
    backward: int = 0
    kept: int = 0
    #: Bytes that are kept once for all sequences; bytes that are not kept but held by the cache.
    once: int = 0
    held: int = 0
    #: Sites whose input, and whose output before it is adapted, has a gradient.
    reads: set[Site] = field(default_factory=set)
    gives: set[Site] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.full = self.design.full
        places = [(p, s) for p in self.design.placements for s in p.where(self.sites)]
        self.adapted = {s.path for _, s in places if s.kind != "input"}
        self.inputs = {s.path for p, s in places if p.method.side(s) in ("input", "both")}
        prompted = any(s.kind == "input" for _, s in places)
        encoded = self._stack([s for s in self.sites.sites if s.stack == "encoder"], prompted or self.full, False)
        decoder = [s for s in self.sites.sites if s.stack != "encoder"]
        self.trained = self._stack(decoder, self.full, encoded)
        if self.full:  # what cross-attention and the output weights read; which row of the table each place takes
            self.kept += (self.source + self.target) * self.sites.d_model * self.width
            self.once += 8 * (self.source**2 + self.target**2) * (self.sites.positions == "relative")

    def _stack(self, sites: list[Site], grad: bool, memory: bool) -> bool:
        """Walk one stack; returns whether what it gives has a gradient."""
        tokens = self.source if sites[0].stack == "encoder" else self.target
        layers: dict[int, list[Site]] = {}
        for site in sites:
            if site.layer >= 0:
                layers.setdefault(site.layer, []).append(site)
        pre = self.sites.norm_place == "pre"
        outer = [s for s in sites if s.kind == "norm" and s.layer < 0]
        for norm in (s for s in outer if "embedding" in s.path):
            grad = self._norm(norm, tokens, grad)
        for inner in layers.values():
            norms = [s for s in inner if s.kind == "norm"]
            for part, norm in zip(_parts(inner), norms, strict=True):
                x = self._norm(norm, tokens, grad) if pre else grad
                grad = (self._ffn if part[0].kind in ("up", "gate") else self._attention)(part, x, memory) or grad
                grad = grad if pre else self._norm(norm, tokens, grad)
            for block in (s for s in inner if s.kind == "block"):
                self._note(block, grad, grad)
                grad = grad or block.path in self.adapted
        for norm in (s for s in outer if "embedding" not in s.path):
            grad = self._norm(norm, tokens, grad)
        return grad

    def _attention(self, part: list[Site], x: bool, memory: bool) -> bool:
        by = {s.kind: s for s in part}
        cross = by["q"].stack == "cross"
        there = memory if cross else x
        queries, keys = (tokens_at(by[k], self.source, self.target) for k in "qk")
        q, k, v = self._linear(by["q"], x), self._linear(by["k"], there), self._linear(by["v"], there)
        if "kv" in by:
            self._note(by["kv"], q, q)
            if by["kv"].path in self.adapted:
                k = v = True
        a, heads = by["o"].d_in, self.sites.heads
        product, scored = 2 * queries * keys * a, q or k
        self.forward += 2 * product
        if self.cache and by["q"].stack != "encoder":
            self.held += self.width * keys * a * ((not q) + (not scored)) * (not self.fused or not (scored or v))
        if self.fused and (scored or v):
            self.backward += 5 * product  # the scores once more, and four gradients
            self.kept += queries * (2 * a * self.width + 4 * heads) + 2 * keys * a * self.width
            relative = self.sites.positions == "relative"
            mask = queries * keys * self.width * (heads if relative else 1)
            # Nothing but the order masks a decoder: one mask serves all sequences, and without biases there is none.
            self.once += mask * (by["q"].stack == "decoder" and relative)
            self.kept += mask * (by["q"].stack != "decoder")
        else:
            self.backward += product * (q + k + scored + v)
            self.kept += self.width * (k * queries * a + (q + scored) * keys * a)
            self.kept += self.width * heads * queries * keys * (scored or v)
        given = self._linear(by["o"], scored or v)
        return self._sublayer(by.get("attention"), x, given)

    def _ffn(self, part: list[Site], x: bool, _: bool) -> bool:
        by = {s.kind: s for s in part}
        tokens = tokens_at(by["up"], self.source, self.target)
        number = tokens * self.sites.d_ff * self.width
        steps = ACTIVATION_TENSORS.get(self.sites.activation, 1)
        if "gate" in by:
            gate, up = self._linear(by["gate"], x), self._linear(by["up"], x)
            self.kept += number * (gate * (steps + 1) + up)
            inner = gate or up
        else:
            inner = self._linear(by["up"], x)
            self.kept += number * steps * inner
        given = self._linear(by["down"], inner)
        return self._sublayer(by.get("ffn"), x, given)

    def _sublayer(self, site: Site | None, x: bool, given: bool) -> bool:
        if site is None:
            return given
        self._note(site, x, given)
        return given or site.path in self.adapted

    def _linear(self, site: Site, grad: bool) -> bool:
        """A product; returns whether what it gives has a gradient."""
        self._note(site, grad, grad)
        grad = grad or site.path in self.inputs
        tokens = tokens_at(site, self.source, self.target)
        product = 2 * tokens * site.d_in * site.d_out
        self.forward += product
        self.backward += product * (grad + self.full)
        # Of what q, k and v, or gate and up, read there is one tensor; what cross-attention reads is the encoder's.
        shared = site.kind in ("k", "v", "gate")
        shared = shared or self.has_kept(site)
        self.kept += self.full * (not shared) * tokens * site.d_in * self.width
        return grad or self.full or site.path in self.adapted

    def _norm(self, site: Site, tokens: int, grad: bool) -> bool:
        """RMSNorm keeps its input as float32 and, in another precision, as it is (modeling_t5.py, T5LayerNorm)."""
        trains = self.full or site.path in self.adapted
        self._note(site, grad, grad)
        rms = self.sites.norm_kind == "rmsnorm"
        number = (4 + (self.width if self.width < 4 else 0)) if rms else self.width
        if grad or (trains and not rms):
            self.kept += tokens * (site.d_out * number + (4 if rms else 8))
        if trains and rms:  # a trained gain keeps what it scales
            self.kept += tokens * site.d_out * self.width
        return grad or trains

    def _note(self, site: Site, reads: bool, gives: bool) -> None:
        if reads:
            self.reads.add(site)
        if gives:
            self.gives.add(site)

    def has_kept(self, site: Site) -> bool:
        """Whether what a linear reads is kept anyway: a fused kernel keeps its output, ReLU its own."""
        if site not in self.reads or site.kind not in ("o", "down"):
            return False
        plain = self.sites.activation == "relu" and "gate" not in self.sites.kinds
        return self.fused if site.kind == "o" else plain

    def has_input_gradient(self, site: Site, reads: Iterable[str]) -> bool:
        """Whether what a method changes at a site needs the gradient of what it reads there."""
        return site in self.reads if "x" in reads or site.kind in LINEARS else site in self.gives


def _parts(inner: list[Site]) -> list[list[Site]]:
    """The sites of one layer by sub-layer: self-attention, cross-attention where there is one, FFN."""
    found: dict[str, list[Site]] = {"self": [], "cross": [], "ffn": []}
    for site in inner:
        if site.kind in ("gate", "up", "down", "ffn"):
            found["ffn"].append(site)
        elif site.kind in ("q", "k", "v", "o", "attention", "kv"):
            found["cross" if site.stack == "cross" else "self"].append(site)
    order = {"gate": 0, "up": 0}
    return [sorted(part, key=lambda s: order.get(s.kind, 1)) for part in found.values() if part]
