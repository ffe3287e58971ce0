"""A tuner of HF peft as a folder of peft's: what `peft:NAME` trained, under peft's own names, and back.

Both directions go through peft's functions, and each is tried out before it is believed: a second model that has
nothing but what was written must give what the first one gives at every adapted linear.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from peftscape.search.adapter_folder import Shapes, check
from peftscape.search.lane import HEAD, own_model
from peftscape.search.peft_folder import InexpressibleError
from peftscape.search.peft_place import about_base
from peftscape.spaces.hf_peft import PREFIX, HFPeft, inject
from peftscape.spaces.peft_knobs import config_class, own_names
from peftscape.spaces.words import InputError, nearest

if TYPE_CHECKING:
    from peftscape.search.backbone import Backbone
    from peftscape.search.head import Head
    from peftscape.spaces.sites import Site

#: Entries of a configuration that say where its modules lie or how it is kept, and change nothing else.
_PLACES = (
    "peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "target_modules", "exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern", "fan_in_fan_out",
)  # fmt: skip
_START = "base_model.model."


@dataclass(frozen=True)
class TunerFolder:
    """A lone `peft:NAME` in peft's terms, as `PeftFolder` is for methods of ours.

    Args:
        seed: of the lane: what a tuner draws and keeps in no tensor is drawn by it again.
    """

    method: HFPeft
    sites: tuple[Site, ...]
    backbone: Backbone
    head: Head
    seed: int

    @cached_property
    def config(self) -> dict[str, Any]:
        """`adapter_config.json`: the tuner's own, and what it stands on."""
        whole, _ = self._built(self.seed)
        own = dataclasses.asdict(whole.peft_config["default"])
        own |= {key: sorted(value) for key, value in own.items() if isinstance(value, set)}
        own["target_modules"] = [self._within + path for path in self._paths]
        return own | about_base(self.backbone, self.head)

    @property
    def note(self) -> str:
        return f"HF peft's {self.method.tuner} on {len(self._paths)} modules"

    def to_peft(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """peft's tensors from a lane's. Raises InexpressibleError if peft could not read them back from a file."""
        whole = self._holding(tensors)
        state = _state(whole)
        if any(value.dtype in (torch.bool, torch.uint8) for value in state.values()):
            raise InexpressibleError(f"HF peft's {self.method.tuner} stores less than it trained with these knobs")
        other, _ = self._built(self.seed + 1)
        _load(other, state)
        if path := self._differs(whole, other):
            raise InexpressibleError(f"HF peft's {self.method.tuner} does not store all that it does at {path}")
        found = {self._renamed(name, "", self._within): v.cpu().contiguous() for name, v in state.items()}
        return found | {f"{_START}{name}": tensors[f"{HEAD}/{name}"].detach().cpu() for name in self.head.shapes}

    def from_peft(self, stored: Mapping[str, Tensor], shapes: Shapes, where: str) -> dict[str, Tensor]:
        """A lane's tensors, of these shapes, from peft's. Raises InputError with all that does not fit."""
        whole, held = self._built(self.seed)
        wanted = {self._renamed(name, "", self._within): tuple(v.shape) for name, v in _state(whole).items()}
        check(stored, wanted | {f"{_START}{name}": shape for name, shape in self.head.shapes.items()}, where)
        found = {f"{HEAD}/{name}": stored[f"{_START}{name}"].clone() for name in self.head.shapes}
        _load(whole, {self._renamed(name, self._within, ""): stored[name] for name in wanted})
        found |= {f"0/{name}": value.detach().clone() for name, value in held.items()}
        check(found, shapes, where)
        if path := self._differs(whole, self._holding(found)):
            raise InputError(
                where, [f"{self.method.tuner} drew at random what it does at {path}, and nothing says how"]
            )
        return found

    @property
    def _paths(self) -> list[str]:
        return list(dict.fromkeys(site.path for site in self.sites))

    @property
    def _within(self) -> str:
        return self.backbone.sites.within(lm=self.head.kind == "lm")

    def _renamed(self, name: str, without: str, within: str) -> str:
        """A tensor's name where the backbone lies within another module."""
        start = _START + without
        return f"{_START}{within}{name.removeprefix(start)}" if name.startswith(start) else name

    def _built(self, seed: int) -> tuple[Any, dict[str, Tensor]]:
        """peft's model on the shared weights at a seed's start, and its tensors by name."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            whole, held = inject(self.method, own_model(self.backbone), self.sites)
        for value in held.values():
            if value.is_floating_point():
                value.data = value.data.to(self.backbone.master_dtype)
        return whole, held

    def _holding(self, tensors: Mapping[str, Tensor]) -> Any:
        """As a lane with these tensors."""
        whole, held = self._built(self.seed)
        with torch.no_grad():
            for name, value in held.items():
                value.copy_(tensors[f"0/{name}"])
        return whole

    @torch.no_grad()
    def _differs(self, one: Any, other: Any) -> str | None:
        """The first linear at which two models do not give the same, if any."""
        for site in self.sites:
            x = torch.randn(1, 3, site.d_in, generator=torch.Generator().manual_seed(0))
            x = x.to(self.backbone.dtype).to(self.backbone.device)
            made, again = (whole.get_submodule(f"{_START}{site.path}")(x) for whole in (one, other))
            if not torch.allclose(made, again, rtol=1e-5, atol=1e-6 * float(made.abs().max())):
                return site.path
        return None


def _state(whole: Any) -> dict[str, Tensor]:
    from peft import get_peft_model_state_dict

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = get_peft_model_state_dict(whole, save_embedding_layers=False)
    return {name: value.detach().clone() for name, value in found.items()}


def _load(whole: Any, state: Mapping[str, Tensor]) -> None:
    from peft import set_peft_model_state_dict

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        set_peft_model_state_dict(whole, dict(state))


def tuner_row(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """peft's configuration as the method and `config` of a placement. Raises InputError where it says more."""
    kind = str(config["peft_type"])
    theirs = config_class(kind)
    fields = {f.name: f for f in dataclasses.fields(theirs)}
    knobs = own_names(theirs)
    errors = [f"{key}: peft's {kind} has no such entry{nearest(key, fields)}" for key in config if key not in fields]
    for name in config.keys() & (fields.keys() - knobs - set(_PLACES)):
        default = fields[name].default
        if config[name] and config[name] != default and name != "runtime_config":
            errors.append(f"{name}: {config[name]!r} of peft's {kind} is said by no design")
    if errors:
        raise InputError(where, sorted(errors))
    plain = {name: config[name] for name in sorted(knobs & config.keys()) if config[name] != fields[name].default}
    return {"method": f"{PREFIX}{kind}", "config": plain}


def tuner_sites(config: Mapping[str, Any], backbone: Backbone, start: str, where: str) -> list[Site]:
    """The sites whose modules a configuration names. Raises InputError for modules that are none."""
    from peft.tuners.tuners_utils import BaseTuner

    asked = config_class(str(config["peft_type"]))(**{k: v for k, v in config.items() if k != "runtime_config"})
    names = [name for name, _ in backbone.model.named_modules() if name]
    aimed = [name for name in names if BaseTuner._check_target_module_exists(asked, f"{start}{name}")]
    linears = [site for site in backbone.sites.sites if site.path and site.kind in HFPeft.sites]
    known = {site.path for site in linears}
    if errors := [f"{n}: {backbone.sites.family} has no such site{nearest(n, known)}" for n in aimed if n not in known]:
        raise InputError(where, errors[:5])
    if not aimed:
        raise InputError(where, ["target_modules: it adapts no module of this backbone"])
    return [site for site in linears if site.path in aimed]
