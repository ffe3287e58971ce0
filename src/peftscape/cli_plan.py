"""`peftscape plan`: what a design, or a whole space of them, will cost on a model and a device; nothing is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from peftscape.cli_common import Json, plain_table, print_json, show

if TYPE_CHECKING:
    from peftscape.spaces.devices import Device
    from peftscape.spaces.plan import Plan, Setting
    from peftscape.spaces.plan_device import Fit
    from peftscape.spaces.plan_space import Spread


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command()(plan)


def plan(
    model: Annotated[str, typer.Option(help="A shipped shape (roberta-large, llama-3-8b ...), a folder or a hub id.")],
    design: Annotated[
        list[str], typer.Option(help="A file, JSON, or a name: lora, ia3 ...; a preset's gives its space. Repeatable.")
    ],
    batch: Annotated[int, typer.Option(help="Texts a step.")] = 8,
    length: Annotated[int, typer.Option(help="Tokens of the longest text, to which the others are padded.")] = 512,
    target: Annotated[
        int | None, typer.Option(help="Tokens of an encoder-decoder's longest target; as many by default.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16, int8, nf4, nf4-dq.")] = "bfloat16",
    profile: Annotated[str, typer.Option(help="peftscape, peft, litgpt: what the implementation keeps.")] = "peftscape",
    objective: Annotated[str | None, typer.Option(help="lm, class, mean, token; the profile's own by default.")] = None,
    attention: Annotated[str | None, typer.Option(help="eager or fused; the profile's own by default.")] = None,
    checkpointing: Annotated[
        bool, typer.Option("--checkpointing", help="Layers are run again in the backward.")
    ] = False,
    dropout: Annotated[float | None, typer.Option(help="Of the adapters.")] = None,
    outputs: Annotated[int, typer.Option(help="Of a classification head.")] = 2,
    device: Annotated[
        str | None, typer.Option(help="a100-80gb, l40s ...; this: as doctor measured it, the default then.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Trained parameters; of a space, what this excludes.")] = None,
    trials: Annotated[int, typer.Option(help="Of a space's search, for its time.")] = 30,
    steps: Annotated[int, typer.Option(help="Of each training, for its time.")] = 1000,
    figure: Annotated[Path | None, typer.Option(help="Write a page of stacked bars: where the memory goes.")] = None,
    why: Annotated[bool, typer.Option("--why", help="Also say what the profile assumes, and why.")] = False,
    as_json: Json = False,
) -> None:
    """Say what a design will cost before anything is trained: parameters, bytes, memory, FLOPs, time."""
    from peftscape.spaces.cost import QUANTISED
    from peftscape.spaces.plan import Setting
    from peftscape.spaces.plan import plan as make
    from peftscape.spaces.plan_device import fit
    from peftscape.spaces.plan_input import read_design, read_model
    from peftscape.spaces.plan_space import spread
    from peftscape.spaces.profiles import profile as named_profile
    from peftscape.spaces.space_file import read_space

    _known("dtype", dtype, ("float32", "bfloat16", "float16", "int8", "nf4", "nf4-dq"))
    _known("objective", objective, ("lm", "class", "mean", "token"))
    _known("attention", attention, ("eager", "fused"))
    chosen, on = named_profile(profile), _device(device, dtype)
    known = read_model(model)
    setting = Setting(
        batch=batch, length=length, target=target, dtype=dtype, attention=attention, checkpointing=checkpointing,  # type: ignore[arg-type]
        dropout=dropout, objective=objective, outputs=outputs,  # type: ignore[arg-type]
        compute=on.compute if on and dtype in QUANTISED else None,
    )  # fmt: skip
    results: list[tuple[Plan, Fit | None]] = []
    spaces: list[Spread] = []
    for word in design:
        read = read_design(word)
        if isinstance(read, str):
            space = read_space(read, known.sites)
            spaces.append(
                spread(
                    space, known.sites, chosen, setting, limit=limit, device=on, trials=trials, steps=steps,
                    tied=known.tied,
                )
            )  # fmt: skip
            continue

        def at(size: int, read: Any = read, setting: Setting = setting) -> Plan:
            return make(read, known.sites, chosen, replace(setting, batch=size), model=model, tied=known.tied)

        results.append((at(batch), fit(at, batch, on) if on else None))
    if figure is not None:
        from peftscape.analysis.plan_figure import memory_figure, memory_page

        bars = memory_figure([found.json() for found, _ in results], on.memory_bytes if on else None)
        figure.write_text(memory_page(bars), encoding="utf-8")
    if as_json:
        rows = [
            found.json() | {"device": of.json() if of else None, "reasons": chosen.reasons} for found, of in results
        ]
        rows += [one.json() for one in spaces]
        print_json(rows[0] if len(rows) == 1 else rows)
        return
    for found, of in results:
        _show(found, of)
    for one in spaces:
        _show_space(model, one)
    if why:
        show(f"what {chosen.name} keeps", *(f"- {reason}" for reason in chosen.reasons))


def _device(name: str | None, dtype: str) -> Device | None:
    """The device asked for; without a name this machine, if `peftscape doctor` has measured it."""
    from peftscape.spaces.devices import device
    from peftscape.spaces.rates import read_rates

    return device(name, dtype) if name else device("this", dtype) if read_rates() else None


def _used(of: Fit) -> tuple[float, float, float]:
    from peftscape.spaces.devices import OF_MEASURED, UTILISATION

    return OF_MEASURED if of.measured else UTILISATION


def _known(name: str, value: str | None, choices: Sequence[str]) -> None:
    from peftscape.spaces.words import InputError, nearest

    if value is not None and value not in choices:
        raise InputError("plan", [f'--{name}: no "{value}"{nearest(value, choices)}'])


def _show(found: Plan, of: Fit | None) -> None:
    from peftscape.analysis.plan_figure import PARTS
    from peftscape.analysis.units import amount

    s = found.setting
    long = f"{s.length} tokens" + (f" to {s.target or s.length}" if found.two_stacks else "")
    token = "token of the source" if found.two_stacks else "token"
    held = f"{s.dtype} computed in {s.compute}" if s.compute else s.dtype
    how = f"batch {s.batch}, {long}, {held}{', checkpointing' if s.checkpointing else ''}"
    show(f"{found.design} on {found.model} ({found.backbone:,} parameters), {how}, as {found.profile} trains it", "")
    share = f"{100 * found.total / found.backbone:.3g} % of the backbone"
    rows = [
        ("trained parameters", f"{found.total:,}", f"adapter {found.adapter:,}, head {found.head:,}; {share}"),
        ("adapter file", amount(found.adapter_bytes, "B"), f"{found.adapter_bytes:,} bytes"),
    ]
    weights = ", ".join(f"{name} {amount(size, 'B')}" for name, size in found.frozen_bytes.items() if name != "float64")
    rows.append(("backbone", amount(found.frozen_bytes[s.dtype], "B"), weights))
    if found.mixed_precision_bytes is not None:
        rows.append(("model states", amount(found.mixed_precision_bytes, "B"), _states(found)))
    memory = found.memory
    rows.append(("peak memory", amount(memory.peak, "B"), f"highest at {memory.phase}; what the allocator holds"))
    split = memory.parts()
    rows += [(f"  {title.lower()}", amount(split[key], "B"), "") for key, title, _ in PARTS if key in split]
    rows += [
        ("training", amount(found.train_flops, "FLOP"), f"a {token}, forward and backward"),
        ("inference", amount(found.infer_extra_flops, "FLOP"), f"a {token} more than the backbone's, merged if it can"),
    ]
    if of is not None:
        rows += _device_rows(of)
    show(plain_table("", "", "", rows=rows, right=(1,)))
    show("")


def _states(found: Plan) -> str:
    """16 bytes a parameter, and the smallest number of devices; the survey's figure is a capacity."""
    size = found.mixed_precision_bytes or 0
    nominal = ""
    digits = found.model.lower().rsplit("-", 1)[-1]
    if digits.endswith("b") and digits[:-1].replace(".", "", 1).isdigit():
        billions = float(digits[:-1])
        nominal = f"; {16 * billions:,.0f} GB at {billions:g} billion parameters"
    text = (
        f"at 16 bytes a parameter (mixed-precision Adam){nominal}; {-(-size // (80 * 10**9))} devices of 80 GB hold it"
    )
    if "falcon-180b" in found.model.lower():
        text += ". The survey's 5,120 GB is the capacity of 64 such devices, the smallest cluster its source lists"
    return text


def _device_rows(of: Fit) -> list[tuple[str, str, str]]:
    from peftscape.analysis.units import amount

    batch = f"largest batch {of.largest_batch}" if of.largest_batch else "not one text fits"
    sharded = f"{of.devices} under plain sharding" if of.devices else "none under plain sharding"
    memory = f"{amount(of.usable_bytes, 'B')} of {amount(of.memory_bytes, 'B')} usable"
    best, worst = (f"{100 * u:.0f}" for u in (_used(of)[2], _used(of)[0]))
    share = f"{best} to {worst} % of {'the rates measured here' if of.measured else 'its peak'}"
    lanes = f", {of.lanes} lanes" if of.lanes is not None else ""
    return [
        (of.device, "fits" if of.fits else "too small", f"{batch}{lanes}; {memory}"),
        (
            "devices",
            sharded.split()[0],
            f"{sharded}; {of.state_devices} hold the model states alone, at 16 bytes a parameter if all train",
        ),
        ("a step", f"{of.step_s:.3g} s", f"{of.fastest_s:.3g} to {of.slowest_s:.3g} s ({share})"),
    ]


def _show_space(model: str, one: Spread) -> None:
    from peftscape.analysis.units import amount
    from peftscape.spaces.plan_space import QUANTILES

    show(f"{one.space} on {model}: {one.designs} designs drawn, {one.impossible} more are impossible here", "")
    unit = {
        "trainable": "",
        "adapter_bytes": "B",
        "peak_bytes": "B",
        "train_flops": "FLOP",
        "infer_extra_flops": "FLOP",
    }
    rows = [(name, *(amount(v, unit[name]) for v in values)) for name, values in one.quantiles.items()]
    show(plain_table("", *(f"{q:.0%}" for q in QUANTILES), rows=rows, right=tuple(range(1, 8))))
    more = [("cheapest", one.cheapest), ("dearest", one.dearest)]
    more += [(f"excluded by {name}", f"{part:.0%}") for name, part in one.excluded.items()]
    if one.search_s is not None:
        fast, middle, slow = (f"{s / 3600:.3g}" for s in one.search_s)
        more.append(("search", f"{middle} h, between {fast} and {slow} h, each trial alone"))
    show("", plain_table("", "", rows=more), "")
