"""Where the last layer needs no more than the tokens that a head reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from peftscape.search.groups import Stage
    from peftscape.spaces.sites import SiteMap


def after_attention(stages: Sequence[Stage], sites: SiteMap) -> str | None:
    """Where the last layer has mixed its tokens for the last time and what follows takes them one by one.

    Known for post-norm layers like BERT's, whose attention.output adds the residual itself. None elsewhere, and where a
    method looks at a whole text after it, as a side network does.
    """
    own = [s.path for s in sites.sites if s.kind == "o" and s.layer == sites.layers - 1]
    if sites.norm_place != "post" or not own or not own[0].endswith("attention.output.dense"):
        return None
    for stage in stages:
        late = stage.site.layer == sites.layers - 1 and stage.site.kind not in ("q", "k", "v", "kv")
        if late and any(g.placement.gate or g.method.needs_text for g in stage.groups):
            return None
    if any(stage.site.kind == "ladder" for stage in stages):
        return None
    return own[0].removesuffix(".dense")
