"""Changes of the model's own tensors beside an adapter of HF peft, which keeps them under their names in the model."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

from peftscape.search.peft_folder import Change, InexpressibleError, PeftFolder, Piece

if TYPE_CHECKING:
    from peftscape.search.backbone import Backbone
    from peftscape.search.head import Head


def apart(changes: Sequence[Change]) -> tuple[list[Change], list[Change]]:
    """The changes that an adapter makes, and those of the model's own tensors. Raises InexpressibleError."""
    for i, change in enumerate(changes):
        for later in changes[i:] if change.form.own else ():
            if later.site.path == change.site.path and not (later.form.adds or later.form.own):
                raise InexpressibleError(f"in HF peft the {change.form.own} of {change.site.path} comes last")
    own = [c for c in changes if c.form.own]
    if own and len(own) == len(changes):
        raise InexpressibleError(f"HF peft trains {own[0].form.note} beside {own[0].form.kind} alone")
    return [c for c in changes if not c.form.own], own


def with_own(folder: PeftFolder, changes: Sequence[Change], backbone: Backbone, head: Head) -> PeftFolder:
    """The folder with these changes; a module that peft wraps has moved to `base_layer`."""
    wrapped = {piece.site.path for piece in folder.pieces}
    shapes, pieces, config = dict(folder.shapes), list(folder.pieces), dict(folder.config)
    for change in changes:
        site, form = change.site, change.form
        module = backbone.sites.within(lm=head.kind == "lm") + site.path
        start = f"base_model.model.{module}" + (".base_layer" if site.path in wrapped else "")
        widths = {"in": site.d_in, "out": site.d_out}
        where = {name: (f"{start}.{form.own}", (slice(None),)) for name in form.axes}
        shapes |= {full: form.shape(name, widths) for name, (full, _) in where.items()}
        pieces.append(Piece(site, form, change.keys, change.frozen, where, widths))
        config |= form.config
    note = f"{folder.note} and {changes[0].form.note}" if changes else folder.note
    return dataclasses.replace(folder, config=config, shapes=shapes, pieces=tuple(pieces), note=note)
