"""An adapter's folder on disk: `design.json`, and its tensors as safetensors. Nothing in it is ever executed.

`design.json` says what the tensors mean and which backbone they belong to. It is written last, with the size
and SHA-256 of the tensors' file, so that a folder whose writing was interrupted is told from a whole one.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from peftscape.search.disk import write_file
from peftscape.search.fingerprint import describe
from peftscape.search.folders import replacing
from peftscape.search.lane import HEAD, declared_tensors
from peftscape.search.tensor_file import read_tensors_file
from peftscape.spaces.design import Design
from peftscape.spaces.file_size import form
from peftscape.spaces.heads import HeadKind
from peftscape.spaces.words import InputError, unique

if TYPE_CHECKING:
    from peftscape.search.backbone import Backbone
    from peftscape.search.head import Head
    from peftscape.spaces.file_size import Form

SCHEMA = 1
CARD = "design.json"
TENSORS: dict[Format, str] = {"peftscape": "adapter.safetensors", "peft": "adapter_model.safetensors"}
#: What either format writes; the files of the other one go when a folder is written again.
OWNED = (CARD, *TENSORS.values(), "adapter_config.json", "README.md")

# The card of an adapter for 10,000 classes with long names has a few megabytes.
_CARD_BYTES = 16 * 2**20
PART_ENDS = (".kept", ".mask", ".index", ".bits")

Format = Literal["peft", "peftscape"]
Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True, kw_only=True)
class Card:
    """What an adapter is, beside its tensors.

    Args:
        head, outputs: the head's kind and width (1 for regression; 2 for language modelling: see `Task.num_outputs`).
        labels: class names by id; empty for regression.
        max_length: tokens of a text, special tokens included; longer ones are cut.
        metric, task: what it was chosen by, and anything in JSON to know it by; for people alone.
    """

    design: Design
    head: HeadKind
    outputs: int
    max_length: int
    labels: tuple[str, ...] = ()
    metric: str | None = None
    task: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.labels and len(self.labels) != self.outputs:
            raise ValueError(f"{len(self.labels)} labels for a head with {self.outputs} outputs")


def save(tensors: Mapping[str, Tensor], card: Card, backbone: Backbone, head: Head, directory: str | Path) -> Path:
    """Write an adapter in peftscape's own format, which holds every design.

    A sparse tensor is stored as its kept values and where they lie, a learned mask as bits: the file is as small as
    it claims.

    Args:
        tensors: those of a lane (`Lane.adapter()`), head included.
    Returns:
        the folder.

    Raises:
        InputError: the tensors are not those of the design, or hold values that are not finite.
    """
    stored: dict[str, Tensor] = {}
    shapes, forms = declared(card.design, backbone, head)
    check(tensors, shapes, str(directory))
    for key in shapes:
        value = tensors[key].detach().cpu().contiguous()
        kept = value.reshape(-1) != 0
        match forms[key]:
            case "dense":
                stored[key] = value
            case "integer":
                stored[key] = value.int()
            case "binary":
                stored[f"{key}.bits"] = _bits(kept)
            case "masked":
                stored |= {f"{key}.kept": value.reshape(-1)[kept], f"{key}.mask": _bits(kept)}
            case "indexed":
                stored |= {f"{key}.kept": value.reshape(-1)[kept], f"{key}.index": kept.nonzero()[:, 0].int()}
    return write(directory, "peftscape", stored, card, backbone, {})


def _bits(flags: Tensor) -> Tensor:
    return torch.from_numpy(np.packbits(flags.numpy()))


def unpack(
    stored: Mapping[str, Tensor], design: Design, backbone: Backbone, head: Head, where: str
) -> dict[str, Tensor]:
    """The tensors of a lane from those that `save` stored. Raises InputError with all that does not fit."""
    shapes, forms = declared(design, backbone, head)
    tensors = {key: value for key, value in stored.items() if not key.endswith(PART_ENDS)}
    for key, how in forms.items():
        if how == "integer" and key in tensors:
            tensors[key] = tensors[key].long()
        if how in ("dense", "integer"):
            continue
        ends = {"binary": (".bits",), "masked": (".kept", ".mask"), "indexed": (".kept", ".index")}[how]
        found = [stored[f"{key}{end}"] for end in ends if f"{key}{end}" in stored]
        if len(found) == len(ends):  # otherwise it is said below: it is missing
            tensors[key] = _unpacked(key, found, shapes[key], where, indexed=how == "indexed")
    check(tensors, shapes, where)
    return tensors


def _unpacked(key: str, found: list[Tensor], shape: tuple[int, ...], where: str, *, indexed: bool) -> Tensor:
    """A sparse tensor or a mask from its parts, the last of which says where its entries lie."""
    size, places = int(np.prod(shape)), found[-1]
    if indexed:
        inside = places.dtype == torch.int32 and bool(((places >= 0) & (places < size)).all())
        if not inside:
            raise InputError(where, [f"{key}.index: places below {size:,} were expected"])
        kept = torch.zeros(size, dtype=torch.bool).index_fill(0, places.long(), True)
    else:
        if places.dtype != torch.uint8 or places.numel() != -(-size // 8):
            raise InputError(where, [f"{key}: {-(-size // 8)} bytes of bits were expected"])
        kept = torch.from_numpy(np.unpackbits(places.numpy(), count=size)).bool()
    if len(found) == 1:
        return kept.float().view(shape)
    if int(kept.sum()) != found[0].numel():
        raise InputError(where, [f"{key}.kept: {int(kept.sum())} values were expected, as many as places"])
    return torch.zeros(size, dtype=found[0].dtype).masked_scatter(kept, found[0]).view(shape)


def declared(design: Design, backbone: Backbone, head: Head) -> tuple[Shapes, dict[str, Form]]:
    """The shapes of a lane's stored tensors by key, and how each lies in the file."""
    forms: dict[str, Form] = {}
    shapes: Shapes = {}
    for key, placement, tensor in declared_tensors(design, backbone):
        if tensor.stored:
            shapes[key], forms[key] = tensor.shape, form(placement, tensor)
    on_top = {f"{HEAD}/{name}": shape for name, shape in head.shapes.items()}
    return shapes | on_top, forms | dict.fromkeys(on_top, "dense")


def check(tensors: Mapping[str, Tensor], shapes: Shapes, where: str) -> None:
    """Compare names, shapes and finiteness. Raises InputError with all that is wrong."""
    errors = [f"{key}: missing; {_by(shape)} was expected" for key, shape in shapes.items() if key not in tensors]
    errors += [f"{key}: the design has no such tensor" for key in tensors if key not in shapes]
    for key in shapes.keys() & tensors.keys():
        value = tensors[key]
        if tuple(value.shape) != shapes[key]:
            errors.append(f"{key}: {_by(tuple(value.shape))}, {_by(shapes[key])} was expected")
        elif value.dtype in (torch.bool, torch.uint8) or not bool(torch.isfinite(value).all()):
            errors.append(f"{key}: finite numbers were expected")
    if errors:
        raise InputError(where, errors)


def _by(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "a number"


def write(
    directory: str | Path, form: Format, stored: Mapping[str, Tensor], card: Card, backbone: Backbone,
    texts: Mapping[str, str],
) -> Path:  # fmt: skip
    """Write the tensors, for peft the tokenizer, further `texts` by file name, and at last `design.json`."""
    from safetensors.torch import save as to_bytes

    raw: bytes = to_bytes(dict(stored), metadata={"format": "pt"})
    with replacing(Path(directory), OWNED, last=CARD) as folder:
        _fill(folder, form, raw, card, backbone, texts)
    return Path(directory)


def _fill(
    folder: Path, form: Format, raw: bytes, card: Card, backbone: Backbone, texts: Mapping[str, str]
) -> None:  # fmt: skip
    if form == "peft" and backbone.tokenizer is not None:  # ours takes it from the backbone
        backbone.tokenizer.save_pretrained(str(folder))
    for name, text in texts.items():
        write_file(folder / name, text.encode())
    write_file(folder / TENSORS[form], raw)
    value = {
        "schema": SCHEMA,
        "format": form,
        "label": card.design.label,
        "digest": card.design.digest,
        "design": card.design.json(),
        "head": {"kind": card.head, "outputs": card.outputs},
        "labels": list(card.labels),
        "max_length": card.max_length,
        "metric": card.metric,
        "task": dict(card.task),
        "backbone": describe(backbone, card.head),
        "tensors": {"file": TENSORS[form], "bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()},
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("peftscape", "torch", "transformers", "safetensors")},
    }
    value["card_sha256"] = _digest(value)
    write_file(folder / CARD, (json.dumps(value, indent=2) + "\n").encode())


def read_card(directory: str | Path) -> tuple[Card, dict[str, Any]]:
    """What `design.json` says, checked, and all of it as it stands there.

    Raises:
        InputError: it is missing, not JSON, newer than this version, incomplete or changed by hand.
    """
    path = Path(directory) / CARD
    try:
        if path.stat().st_size > _CARD_BYTES:
            raise InputError(str(path), [f"larger than the {_CARD_BYTES:,} bytes that are read"])
        value = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unique)
    except FileNotFoundError:
        expected = "a folder written by peftscape's export was expected, or its writing was interrupted"
        raise InputError(str(directory), [f"no {CARD} in it: {expected}"]) from None
    except InputError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(str(path), [f"it cannot be read as JSON: {error}"]) from None
    if not isinstance(value, dict) or not isinstance(value.get("schema"), int):
        raise InputError(str(path), ['no number "schema": not a design.json that peftscape wrote'])
    if value["schema"] > SCHEMA:
        newer = f"schema {value['schema']} is of a newer peftscape; this one reads up to {SCHEMA}"
        raise InputError(str(path), [newer])
    try:
        digest = hashlib.sha256(json.dumps(value["design"], sort_keys=True).encode()).hexdigest()[:16]
        if digest != value["digest"]:
            wrong = f"the design has the digest {digest}, {value['digest']} was expected: it was changed by hand"
            raise InputError(str(path), [wrong])
        card = Card(
            design=Design.from_json(value["design"], where=str(path)),
            head=value["head"]["kind"], outputs=int(value["head"]["outputs"]), labels=tuple(value["labels"]),
            max_length=int(value["max_length"]), metric=value["metric"], task=value["task"],
        )  # fmt: skip
        _ = [value[k] for k in ("format", "backbone", "tensors")], value["backbone"]["source"]
    except KeyError as error:
        raise InputError(str(path), [f"{error}: missing"]) from None
    except (TypeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(str(path), [f"a value is not what was expected: {error}"]) from None
    if card.head not in get_args(HeadKind) or value["format"] not in tuple(TENSORS):
        raise InputError(str(path), [f'head "{card.head}" or format "{value["format"]}" is unknown'])
    if value.get("card_sha256", _digest(value)) != _digest(value):
        raise InputError(str(path), ["its checksum is not its own: it was changed or damaged"])
    return card, value


def _digest(value: Mapping[str, Any]) -> str:
    own = {key: item for key, item in value.items() if key != "card_sha256"}
    return hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()


def read_tensors(directory: str | Path, value: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a folder as they are stored. Raises InputError if the file is not the one written."""
    path = Path(directory) / TENSORS[value["format"]]
    try:
        size, sha = int(value["tensors"]["bytes"]), str(value["tensors"]["sha256"])
    except (KeyError, TypeError, ValueError):
        raise InputError(str(Path(directory) / CARD), ["tensors: a size and a checksum were expected"]) from None
    return read_tensors_file(path, size=size, sha256=sha, described=CARD)
