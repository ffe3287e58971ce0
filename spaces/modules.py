"""Site maps of models outside the known families: built without weights, their modules matched by name.

Matching is by the last names of a module's path within one layer, as they occur across transformers' models.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from peftscape.spaces.layout import Layout, Linear, Norm
from peftscape.spaces.sites import LINEARS, SUBLAYERS, Head, SiteError
from peftscape.spaces.words import nearest

if TYPE_CHECKING:
    from torch import nn

#: How linears are called; matched against the path within a layer.
PATTERNS = {
    "q": r"(^|\.)(q_proj|q|query|query_proj|q_lin|wq)$",
    "k": r"(^|\.)(k_proj|k|key|key_proj|k_lin|wk)$",
    "v": r"(^|\.)(v_proj|v|value|value_proj|v_lin|wv)$",
    "o": r"(attn|attention|self)\w*\.(\w+\.)*(o_proj|out_proj|o|out_lin|[wW]o|dense|c_proj)$",
    "gate": r"(^|\.)(gate_proj|w1|wi_0)$",
    "up": r"(^|\.)(up_proj|fc1|lin1|c_fc|fc_in|wi|wi_1|w3|intermediate\.dense|dense_h_to_4h|ffn)$",
    "down": r"(^|\.)(down_proj|fc2|lin2|fc_out|wo|w2|ffn_output|dense_4h_to_h|mlp\.(c_proj|Wo))$"
    r"|^output\.dense$",
}
NEEDED = ("q", "k", "v", "o", "up", "down")


def layout_from_modules(config: Mapping[str, Any], overrides: Mapping[str, Any]) -> Layout:
    """The layout of the model that AutoModel builds from this configuration, on torch's meta device.

    Raises:
        SiteError: transformers does not know the model, its layers are not alike, or linears match no
        pattern.
    """
    model = _build(config)
    settings: Any = model.config
    if settings.is_encoder_decoder:
        from peftscape.spaces.encoder_decoders import ENCODER_DECODERS

        known = ", ".join(sorted(ENCODER_DECODERS))
        raise SiteError(f"{config.get('model_type')} is not mapped; of encoder-decoders there are: {known}")
    container, layers = _layers(model, overrides)
    first = layers[0]
    linears = _linears(first)
    if any(_linears(other) != linears for other in layers[1:]):
        raise SiteError(f'the layers of "{container}" have unlike linears; like layers were expected')
    at = f"{container}.{{layer}}"
    found = _overridden(overrides, at, linears, first) if overrides else {}
    for kind in LINEARS:
        matches = [path for path in linears if re.search(PATTERNS[kind], path)]
        taken = {path for path, _, _ in found.values()}
        if kind not in found and len(matches) == 1 and matches[0] not in taken:
            found[kind] = (matches[0], 0, linears[matches[0]].d_out)
    if not overrides and (missing := [k for k in NEEDED if k not in found]):
        raise SiteError(_advice(str(config.get("model_type")), missing, at, linears, found))
    return _layout(config, model, at, first, len(layers), linears, found)


def _layout(
    config: Mapping[str, Any], model: nn.Module, at: str, first: nn.Module, layers: int,
    linears: dict[str, Linear], found: dict[str, tuple[str, int, int]],
) -> Layout:  # fmt: skip
    settings: Any = model.config
    embedding: nn.Module = model.get_input_embeddings()  # type: ignore[operator]
    weight: Any = embedding.weight
    vocab, width = (int(n) for n in weight.shape)
    d = int(settings.hidden_size)
    heads = int(settings.num_attention_heads)
    kv_heads = int(getattr(settings, "num_key_value_heads", None) or heads)
    head_dim = int(getattr(settings, "head_dim", None) or d // heads)
    interface = _calls_interface(first)
    refused = {}
    if interface is None:
        refused["kv"] = "this model's attention does not go through transformers' attention interface"
    relative = any(re.search(r"relative|rel_", name) for name, _ in model.named_parameters())
    if relative or getattr(settings, "alibi", False) or "bloom" in str(config.get("model_type")):
        refused["input"] = "this model's relative positions follow the order in the array"
    elif missing := {"inputs_embeds", "position_ids"} - set(inspect.signature(model.forward).parameters):
        refused["input"] = f"this model's forward does not take {' and '.join(sorted(missing))}"
    for kind in (*LINEARS, *SUBLAYERS):
        if kind not in found and (kind in LINEARS or {"attention": "o", "ffn": "down"}.get(kind, "") not in found):
            refused[kind] = f'no module of this model is known as its {kind}; map it with [model.sites] {kind} = "..."'
    refused.pop("block", None)
    sited = []
    for path, m in linears.items():
        kinds = tuple((k, a, b) for k, (p, a, b) in found.items() if p == path and k in LINEARS)
        sited.append(Linear(path, m.d_in, m.d_out, m.bias, kinds, m.transposed))

    def sublayer(kind: str, out: str, reads: str) -> tuple[str, str] | None:
        y = found.get(kind) or found.get(out)
        return None if y is None else (y[0], found.get(reads, y)[0])

    name = {id(m): path for path, m in model.named_modules()}
    norms = tuple(_norm(path, m) for path, m in first.named_modules() if _is_norm(m))
    inside = at.split(".{layer}")[0] + "."
    outer = tuple(_norm(path, m) for path, m in model.named_modules() if _is_norm(m) and not path.startswith(inside))
    outside = tuple(
        m for p, m in _linears(model).items() if not p.startswith(inside) and "pooler" not in p and "router" not in p
    )
    positions, offset = _positions(model)
    longest = getattr(settings, "max_position_embeddings", None)
    layernorm = all("weight" in dict(m.named_parameters()) and hasattr(m, "normalized_shape") for m in _norms(first))
    causal = _is_causal(str(config.get("model_type")), first, settings)
    down = found.get("down") or found.get("up")
    return Layout(
        layer=at, layers=layers, d_model=d, embedding_width=width, linears=tuple(sited),
        norms=norms, outer_norms=outer, outer_linears=outside, kv=interface or "", heads=heads,
        kv_heads=kv_heads, head_dim=head_dim, attention=sublayer("attention", "o", "q"), ffn=sublayer("ffn",
        "down", "up"), causal=causal, parameters=sum(p.numel() for p in model.parameters()), refused=refused,
        head=_head(config, model), sizes={
            "family": str(config.get("model_type")),
            "d_ff": linears[down[0]].d_in if down and down is found.get("down") else 4 * d,
            "vocab": vocab, "prefix": str(getattr(model, "base_model_prefix", "")),
            "embedding": name.get(id(embedding), ""),
            "activation": next((v for k in ACTIVATIONS if isinstance(v := getattr(settings, k, None), str)),
            "gelu"), "norm_kind": "layernorm" if layernorm else "rmsnorm", "position_offset": offset,
            "positions": "relative" if relative else positions, "norm_place": "pre" if causal else "post",
            "max_positions": int(longest) - offset if longest else None, "attention_interface": interface is
            not None, "softcap": getattr(settings, "attn_logit_softcapping", None),
            "sliding_window": getattr(settings, "sliding_window", None),
        },
    )  # fmt: skip


ACTIVATIONS = ("hidden_activation", "hidden_act", "activation_function", "activation")


def _build(config: Mapping[str, Any], kind: Any = None) -> nn.Module:
    import torch
    from transformers import AutoConfig, AutoModel

    settings = dict(config)
    try:
        with torch.device("meta"):
            built = AutoConfig.for_model(settings.pop("model_type"), **settings)
            model: nn.Module = (kind or AutoModel).from_config(built)
    except (KeyError, ValueError) as error:
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

        name = str(config.get("model_type"))
        if name not in CONFIG_MAPPING_NAMES:
            raise SiteError(f'transformers knows no model "{name}"{nearest(name, CONFIG_MAPPING_NAMES)}') from None
        raise SiteError(f"transformers cannot build this {name}: {error}") from None
    return model


def _layers(model: nn.Module, overrides: Mapping[str, Any]) -> tuple[str, list[nn.Module]]:
    from torch import nn

    wanted = {str(v).split(".{layer}")[0] for v in overrides.values() if ".{layer}" in str(v)}
    stacks = {path: list(m) for path, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)}
    if unknown := sorted(wanted - set(stacks)):
        raise SiteError(f'[model.sites]: "{unknown[0]}" is no list of layers{nearest(unknown[0], stacks)}')
    if len(wanted) > 1:
        raise SiteError(f"[model.sites]: one list of layers was expected, not {', '.join(sorted(wanted))}")
    count = getattr(model.config, "num_hidden_layers", None)
    stacks = {p: m for p, m in stacks.items() if p in wanted or (not wanted and len(m) == count and _linears(m[0]))}
    if not stacks:
        seen = dict.fromkeys(re.sub(r"\.\d+\.", ".{n}.", path) for path in _linears(model))
        shown = "".join(f"\n  {path}" for path in list(seen)[:24])
        raise SiteError(
            f"no list of {count} layers with linears, so nothing that [model.sites] could map by {{layer}};"
            f" linears:{shown or ' none'}"
        )
    return min(stacks.items(), key=lambda item: item[0].count("."))


def _linears(layer: nn.Module) -> dict[str, Linear]:
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    out = {}
    for path, m in layer.named_modules():
        if isinstance(m, nn.Linear):
            out[path] = Linear(path, m.in_features, m.out_features, m.bias is not None)
        elif isinstance(m, Conv1D):
            out[path] = Linear(path, m.nx, m.nf, True, transposed=True)
    return out


def _overridden(
    overrides: Mapping[str, Any], at: str, linears: dict[str, Linear], first: nn.Module
) -> dict[str, tuple[str, int, int]]:
    found, errors = {}, []
    for kind, pattern in overrides.items():
        if kind not in (*LINEARS, *SUBLAYERS):
            errors.append(f'"{kind}" is no site that can be mapped{nearest(kind, (*LINEARS, *SUBLAYERS))}')
            continue
        match = re.fullmatch(r"(.+?)(?:\[(\d+):(\d+)\])?", str(pattern))
        path = match[1] if match else ""
        if kind == "block" and path == at:
            continue
        inner = path.removeprefix(f"{at}.")
        modules = {p for p, _ in first.named_modules() if p}
        if inner == path or inner not in (linears if kind in LINEARS else modules):
            known = [f"{at}.{p}" for p in linears]
            errors.append(f'{kind} = "{pattern}": no such module{nearest(path, known)}')
            continue
        width = linears[inner].d_out if inner in linears else 0
        start, stop = (int(match[2]), int(match[3])) if match and match[2] else (0, width)
        if not 0 <= start <= stop <= width:
            errors.append(f'{kind} = "{pattern}": columns within 0 to {width} were expected')
        found[kind] = (inner, start, stop)
    if errors:
        raise SiteError("[model.sites]: " + "; ".join(errors))
    return found


def _advice(
    family: str,
    missing: list[str],
    at: str,
    linears: dict[str, Linear],
    found: dict[str, tuple[str, int, int]],
) -> str:
    seen = "\n".join(f"  {at}.{m.path}  ({m.d_in} -> {m.d_out})" for m in linears.values())
    text = f"{family}: no linear of a layer is known as {', '.join(missing)}. A layer has\n{seen}\n"
    taken = {path for path, _, _ in found.values()}
    free = [m for m in linears.values() if m.path not in taken]
    if free:
        path, d = f"{at}.{free[0].path}", free[0].d_out
        example = f'{missing[0]} = "{path}"  # or columns of a fused linear: "{path}[0:{d // 3}]"'
    else:
        kind, (path, _, _) = next(iter(found.items()), ("q", ("attention.q_proj", 0, 0)))
        example = f'{kind} = "{at}.{path}"'
    return text + f"Map them by hand; sites that are neither named nor known are refused:\n[model.sites]\n{example}"


def _calls_interface(layer: nn.Module) -> str | None:
    """The path, within a layer, of the module that calls transformers' attention interface."""
    inside = (str(p) for p, m in layer.named_modules() if "ALL_ATTENTION_FUNCTIONS" in _source(m))
    return next(inside, None)


def _source(module: nn.Module) -> str:
    try:
        return inspect.getsource(type(module).forward)
    except (OSError, TypeError):
        return ""


def _is_causal(family: str, layer: nn.Module, settings: Any) -> bool:
    flags = [bool(m.is_causal) for m in layer.modules() if hasattr(m, "is_causal")]
    if flags:
        return any(flags)
    from transformers.models.auto import modeling_auto as auto

    decoder = family in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    masked = family in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    return bool(getattr(settings, "is_decoder", False)) or (decoder and not masked)


def _positions(model: nn.Module) -> tuple[str, int]:
    """How tokens know their places, and what explicit position ids start from."""
    for path, m in model.named_modules():
        if re.search(r"(^|\.)(\w*position\w*|wpe)$", path) and hasattr(m, "num_embeddings"):
            # RoBERTa and its kin keep the padding token's row free and count from the next.
            padding = getattr(m, "padding_idx", None)
            return "absolute", 0 if padding is None else int(padding) + 1
    return ("rotary" if any("Rotary" in type(m).__name__ for m in model.modules()) else "unknown"), 0


def _head(config: Mapping[str, Any], base: nn.Module) -> Head | None:
    """transformers' own classification head where it has one of the usual three forms."""
    from transformers import AutoModelForSequenceClassification

    try:
        model = _build(config, AutoModelForSequenceClassification)
    except SiteError:
        return None
    prefix = str(getattr(base, "base_model_prefix", "")) + "."
    own = {n: tuple(p.shape) for n, p in model.named_parameters() if not n.startswith(prefix)}
    outputs = int(model.config.num_labels)  # type: ignore[union-attr, arg-type]

    def layout(*names: str) -> tuple[tuple[str, tuple[int, ...]], ...] | None:
        if set(own) != set(names) or own[names[-1]][0] != outputs:
            return None
        last = names[-1].rsplit(".", 1)[0]
        return tuple((n, (0, *own[n][1:]) if n.startswith(last) else own[n]) for n in names)

    if score := layout("score.weight"):
        return Head("last", ("score",), score)
    if flat := layout("classifier.weight", "classifier.bias"):
        return Head("pooler", ("classifier",), flat) if hasattr(base, "pooler") else None
    parts = ("dense.weight", "dense.bias", "out_proj.weight", "out_proj.bias")
    if deep := layout(*(f"classifier.{part}" for part in parts)):
        source = _source(model.classifier)  # type: ignore[arg-type]
        if "[:, 0, :]" in source and ("tanh" in source) != ("gelu" in source):
            return Head("first", ("classifier",), deep, "tanh" if "tanh" in source else "gelu")
    return None


def _norms(layer: nn.Module) -> list[nn.Module]:
    return [m for m in layer.modules() if _is_norm(m)]


def _is_norm(m: nn.Module) -> bool:
    own = dict(m.named_parameters(recurse=False))
    return "norm" in type(m).__name__.lower() and "weight" in own and own["weight"].dim() == 1


def _norm(path: str, m: nn.Module) -> Norm:
    return Norm(path, int(m.weight.numel()), getattr(m, "bias", None) is not None)  # type: ignore[operator]
