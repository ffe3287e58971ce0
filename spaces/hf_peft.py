"""Any tuner of the installed HF peft as a method: `{"method": "peft:MISS", "config": {"r": 8}}`.

A tuner's knobs are the plain fields of its configuration (numbers, words, flags), with peft's defaults; its sites and
layers say which linears it targets. It trains alone on the backbone. peft is imported when a tuner is named, no sooner.
"""

from __future__ import annotations

import dataclasses
import warnings
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar

from peftscape.spaces.methods.base import Method, Tensor, Tensors
from peftscape.spaces.peft_knobs import REFUSED, config_class, own_names, read_knob
from peftscape.spaces.sites import LINEARS

if TYPE_CHECKING:
    from torch import nn

    from peftscape.spaces.sites import Site

PREFIX = "peft:"


class HFPeft(Method):
    """The tuner of HF peft that the name says, on the linears of its sites; its equation is in peft's documentation."""

    category, execution = "hybrid", "solo"
    sites = frozenset(LINEARS)
    default_sites = ("q", "v")
    exact_start = False
    alone = True
    tuner: ClassVar[str] = ""

    def shared(self, sites: tuple[Site, ...]) -> Tensors:
        return dict(_declared(self, sites))

    def tensors(self, site: Site) -> Tensors:
        return {}

    def flops(self, site: Site, tokens: int) -> int:
        return 0  # peft says nothing of it: a run counts the frozen products alone

    def check(self, site: Site) -> str | None:
        if self.tuner in REFUSED:
            return f"method: peft:{self.tuner}: {REFUSED[self.tuner]}"
        try:
            _declared(self, (site,))
        except Exception as error:  # whatever code of others raises
            return f"config: peft refuses it: {(str(error) or type(error).__name__).splitlines()[0]}"
        return None

    def config(self, targets: list[str]) -> Any:
        """peft's configuration for these modules."""
        return config_class(self.tuner)(target_modules=targets, **self.knobs())

    @classmethod
    def read_knob(cls, name: str, value: Any) -> Any:
        """A knob's value as peft takes it. Raises ValueError with what was expected."""
        return read_knob(cls.tuner, name, value, cls.__dataclass_fields__[name].default)


@cache
def tuner(name: str) -> type[HFPeft]:
    """The method of a tuner, `peft:MISS`.

    Raises:
        InputError: peft is not installed, or has no tuner of that name that targets modules.
    """
    kind = name.removeprefix(PREFIX).upper()
    config = config_class(kind)
    fields = [
        (f.name, Any, dataclasses.field(default=f.default))
        for f in dataclasses.fields(config)
        if f.name in own_names(config) and (f.default is None or isinstance(f.default, (bool, int, float, str)))
    ]
    body = {
        "__annotations__": {n: t for n, t, _ in fields},
        "__doc__": HFPeft.__doc__,
        "__module__": HFPeft.__module__,
        "name": f"{PREFIX}{kind}",
        "tuner": kind,
        **{n: f for n, _, f in fields},
    }
    made: type[HFPeft] = type(f"Peft{kind.title()}", (HFPeft,), body)
    return made


def inject(method: HFPeft, model: nn.Module, sites: tuple[Site, ...]) -> tuple[Any, dict[str, Any]]:
    """Put the tuner into a model, in place: peft's model, and what it added by name, parameters and buffers."""
    from peft import get_peft_model

    before = {name for name, _ in (*model.named_parameters(), *model.named_buffers())}
    before |= {f"{site.path}.base_layer.{name}" for site in sites for name in ("weight", "bias")}
    with warnings.catch_warnings():  # of peft's to those who call it themselves
        warnings.simplefilter("ignore")
        whole = get_peft_model(model, method.config(list(dict.fromkeys(site.path for site in sites))))
    found = {}
    for name, value in (*whole.named_parameters(), *whole.named_buffers()):
        own = name.removeprefix("base_model.").removeprefix("model.")
        if own not in before and value.numel():
            found[own] = value
    set_training(whole, False)
    return whole, found


def set_training(model: nn.Module, training: bool) -> None:
    """Have a tuner's layers drop and draw, or not; the backbone's own dropout stays off."""
    for module in model.modules():
        if hasattr(module, "base_layer"):
            for name, child in module.named_children():
                if name != "base_layer":
                    child.train(training)
            module.training = training


@cache
def _declared(method: HFPeft, sites: tuple[Site, ...]) -> tuple[tuple[str, Tensor], ...]:
    """What the tuner would add to these linears, found on stand-ins of their shapes."""
    import torch

    model = _stand_in(sites)
    start = {id(p): p.detach().clone() for p in model.parameters()}
    with torch.random.fork_rng():
        _, added = inject(method, model, sites)
    if not all(torch.equal(start[id(p)], p) for p in model.parameters() if id(p) in start):
        raise ValueError("its start writes the weights that all lanes share")
    return tuple(
        (
            name,
            Tensor(
                tuple(value.shape),
                init="own",
                scope="placement",
                trains=value.requires_grad,
                integer=not value.is_floating_point(),
            ),
        )
        for name, value in added.items()
    )


def _stand_in(sites: tuple[Site, ...]) -> nn.Module:
    """A model of nothing but these linears, under their names."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    widths: dict[str, int] = {}
    for site in sites:
        widths[site.path] = max(widths.get(site.path, 0), site.span[1] if site.span else site.d_out)
    root = nn.Module()
    for site in sites:
        *parents, last = site.path.split(".")
        at = root
        for name in parents:
            if not hasattr(at, name):
                at.add_module(name, nn.Module())
            at = at.get_submodule(name)
        wide = widths[site.path]
        at.add_module(last, Conv1D(wide, site.d_in) if site.transposed else nn.Linear(site.d_in, wide, bias=site.bias))
    return root
