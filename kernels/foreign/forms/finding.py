"""Which form a callable has: its signature says so, its owner, or it shows it on small calls."""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from .form import (
    CALL_FORMS,
    CAUSAL_NAMES,
    DTYPES,
    LAYOUTS,
    MASK_NAMES,
    MASKS,
    OPTIONAL,
    PACKED_NAMES,
    SCALE_NAMES,
    Form,
    FormError,
    Wanted,
    text_of,
)

# A right result, when it is asked how it sees keys: what types of 16 bits leave of it.
NEAR = 0.05


def form_of(function: Callable[..., Any], name: str, wanted: Wanted) -> Form:
    """How a callable is called. One whose signature says all is not called for it. Raises FormError."""
    for what, value, known in (
        ("layout", wanted.layout, LAYOUTS), ("mask", wanted.mask, MASKS), ("dtype", wanted.dtype, DTYPES),
    ):  # fmt: skip
        if value and value not in known:
            raise FormError(f"{what}={value}, expected one of {', '.join(known)}")
    # A module's call takes anything and hands it to `forward`.
    stated = function.forward if isinstance(function, torch.nn.Module) else function
    try:
        parameters = inspect.signature(stated).parameters
    except (TypeError, ValueError):
        # Built in, or an operator: it does not say what it takes.
        return _asked(function, name, wanted)
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return _asked(function, name, wanted)
    its = f"{name}{inspect.signature(stated)}"
    needed = [n for n, p in parameters.items() if p.default is p.empty and p.kind is not p.VAR_POSITIONAL]
    for option in wanted.options:
        if option not in parameters:
            near = difflib.get_close_matches(option, list(parameters), n=1, cutoff=0.5)
            hint = f", did you mean {near[0]!r}?" if near else ""
            raise FormError(f"{its}: has no option {option!r}{hint}")
    names = {
        what: next((n for n in known if n in parameters and n not in wanted.options), "")
        for what, known in (("scale", SCALE_NAMES), ("mask", MASK_NAMES), ("causal", CAUSAL_NAMES))
    }
    if all(n in parameters for n in PACKED_NAMES):
        names["packed"] = "yes"
    known_names = {"kv_len", *OPTIONAL, *CALL_FORMS, *names.values(), *wanted.options}
    known_names |= set(PACKED_NAMES) if "packed" in names else set()
    unknown = [n for n in needed[3:] if n not in known_names]
    if len(needed) < 3 or unknown:
        ways = f"; {unknown[0]}=VALUE in the specification gives it {unknown[0]}" if unknown else ""
        any_of = ", ".join((*OPTIONAL, *CALL_FORMS))
        raise FormError(f"{its}: expected (q, k, v, *, kv_len, scale) and any of {any_of}{ways}")
    dtypes = (DTYPES[wanted.dtype],) if wanted.dtype else ()
    form = Form(
        function=function,
        name=name,
        names=names,
        layout=wanted.layout or ("thd" if "packed" in names else "bshd"),
        takes=tuple(n for n in OPTIONAL if n in parameters and n not in wanted.options),
        options=wanted.options,
        dtypes=dtypes,
    )
    if "kv_len" in parameters and not wanted.mask:
        taken = {n: n for n in CALL_FORMS if n in parameters and n not in wanted.options}
        if names["mask"]:
            taken["mask"] = names["mask"]
        needs = tuple(form for form, its_name in taken.items() if its_name in needed)
        said = (f"takes {' and '.join(needs)} alone: every call is given so",) if needs else ()
        return replace(form, forms=tuple(taken), needs=needs, said=said)
    if lost := [n for n in needed if n in CALL_FORMS and n != names["mask"]]:
        raise FormError(f"{its}: takes {lost[0]}, and no kv_len")
    if names["mask"] and not wanted.mask:
        return replace(
            form, way="mask", forms=("mask",), said=(f"takes no kv_len: is given {names['mask']}",)
        )
    return _shown(form, wanted, ways=())


def _shown(form: Form, wanted: Wanted, ways: tuple[Form, ...]) -> Form:
    """The form in which it is right on a small call, of those that it may have; or the first that runs."""
    masks = (wanted.mask,) if wanted.mask else MASKS
    tried = list(ways)
    layouts = [wanted.layout] if wanted.layout else [form.layout]
    if layouts == ["bshd"] and not wanted.layout:
        layouts.append("bhsd")
    for layout in layouts:
        for mask in masks:
            tried.append(replace(form, way=mask, layout=layout))
            if mask == "causal":
                tried.append(replace(form, way="square", layout=layout))
    runs, failure = None, ""
    for one_head_each in (False, True):
        for each in tried:
            for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
                for dtype in each.dtypes or ("float16", "bfloat16", "float32"):
                    some = replace(each, one_head_each=one_head_each)
                    try:
                        right = _is_right(some, device, getattr(torch, dtype))
                    except Exception as error:
                        failure = failure or f"{type(error).__name__}: {text_of(error)}"
                        continue
                    if not each.dtypes and dtype != "float16":
                        some = replace(some, dtypes=(dtype,))
                    if right:
                        return _explained(some)
                    runs = runs or some
    if runs is None:
        raise FormError(f"{form.name}: fails when it is asked how it sees keys: {failure}")
    return replace(_explained(runs), never_right=True)


def _is_right(form: Form, device: str, dtype: torch.dtype) -> bool:
    """Whether it gives attention on a small call in which every way of seeing keys gives another result."""
    call = small_call(device, dtype, ratio=1 if form.one_head_each else 2)
    n = call["k"].shape[1]
    q, kv_len = call["q"], call["kv_len"]
    if form.way in ("causal", "square"):
        kv_len = torch.arange(n - q.shape[1] + 1, n + 1, device=device, dtype=torch.int32)[None]
    elif form.way == "none":
        kv_len = torch.full_like(kv_len, n)
    out, _ = form.run(q, call["k"], call["v"], kv_len=kv_len, scale=q.shape[-1] ** -0.5)
    due = plain_softmax(q, call["k"], call["v"], kv_len)
    return bool(((out.double() - due).abs() < NEAR).all())


def plain_softmax(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kv_len: torch.Tensor) -> torch.Tensor:
    """[B, T, Hq, Dv] in float64, scale D^-1/2: what a small call is held against."""
    k, v = (x.double().repeat_interleave(q.shape[2] // k.shape[2], 2) for x in (k, v))
    s = torch.einsum("bthd,bshd->bths", q.double(), k) * q.shape[-1] ** -0.5
    hidden = torch.arange(k.shape[1], device=q.device) >= kv_len[:, :, None, None]
    return torch.einsum("bths,bshd->bthd", s.masked_fill(hidden, -math.inf).softmax(-1), v)


_WAYS = {
    "mask": "is given a mask of the keys that each row sees",
    "none": "sees every key that it is given, and is given those that a row sees (mask=none)",
    "causal": "sees a triangle whose last row sees the last key (mask=causal)",
    "square": "sees a triangle of as many rows as keys: prefill alone, filled up in front (mask=causal)",
}


def _explained(form: Form) -> Form:
    """The same, with what it lacks in words."""
    said = [f"takes no kv_len: asked, it {_WAYS[form.way]}"] if form.way in _WAYS else []
    if form.layout != "bshd":
        said.append(f"layout={form.layout}")
    if not form.names.get("scale") and not form.by_position:
        said.append("takes no scale: judged at D^-1/2 alone")
    if form.one_head_each:
        said.append("takes as many KV heads as query heads: judged at ratio 1 alone")
    if form.dtypes:
        said.append(f"takes {', '.join(form.dtypes)} alone")
    return replace(form, said=tuple(said))


def _asked(function: Callable[..., Any], name: str, wanted: Wanted) -> Form:
    """The form of a callable that does not say what it takes: small calls, with each of OPTIONAL and without.

    An option that it raises on, or that changes nothing though it must, is not taken. One without keywords
    is given lengths and scale by position. Where it fails in every way, calls will show why.
    """
    layout, dtypes = wanted.layout or "bshd", (DTYPES[wanted.dtype],) if wanted.dtype else ()
    first = Form(function, name, layout=layout, options=wanted.options, dtypes=dtypes)
    plain = (first, replace(first, by_position=True, names={})) if not wanted.mask else ()
    failure = ""
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        call = small_call(device, getattr(torch, (dtypes or ("float16",))[0]))
        for form in plain:
            try:
                without = _out_of(form, call)
            except Exception as error:
                failure = failure or f"fails when it is asked: {type(error).__name__}: {text_of(error)}"
                continue
            takes, left_out = [], {}
            for option, value in call["options"].items():
                if option in wanted.options:
                    continue
                try:
                    changed = not torch.equal(
                        _out_of(replace(form, takes=(option,)), call, **{option: value}), without
                    )
                except Exception as error:
                    left_out[option] = type(error).__name__
                    continue
                if changed or option == "path":
                    takes.append(option)
                else:
                    left_out[option] = "ignored"
            forms = () if form.by_position else tuple(n for n in CALL_FORMS if _takes_form(form, n, call))
            names = {**form.names, "mask": "mask"} if "mask" in forms else form.names
            return replace(form, takes=tuple(takes), left_out=left_out, forms=forms, names=names)
    masked = [
        replace(
            first,
            way="mask",
            layout=order,
            names={"scale": scale, "mask": mask},
            options=options,
            forms=("mask",),
        )
        for order in ([wanted.layout] if wanted.layout else ["bshd", "bhsd"])
        for mask in MASK_NAMES
        for scale in SCALE_NAMES[:1]
        for options in ({**wanted.options, "enable_gqa": True}, wanted.options)
    ]
    left_out = dict.fromkeys(OPTIONAL, failure)
    bare = replace(first, names={})
    ways = () if wanted.mask else tuple(masked)
    try:
        return _shown(bare, wanted, ways=ways)
    except FormError:
        return replace(first, left_out=left_out)


def _takes_form(form: Form, name: str, call: Mapping[str, Any]) -> bool:
    """Whether a callable that does not say what it takes is right on a small call of that form."""
    form = replace(form, forms=(name,), names={**form.names, "mask": "mask"})
    q, k, v, kv_len = (call[x] for x in ("q", "k", "v", "kv_len"))
    due_k, due_v, due_len, given = k, v, kv_len, {}
    if name == "block_table":
        # Pages in another order, with keys beyond the first row's in the last.
        k, v = (torch.cat((x, x), 1).unflatten(1, (4, -1))[0].flip(0).contiguous() for x in (k, v))
        given[name] = torch.tensor([[3, 2, 1, 0]], dtype=torch.int32, device=q.device)
        due_k, due_v = (torch.cat((call[x], call[x]), 1) for x in ("k", "v"))
    elif name == "cu_seqlens":
        k, v = (torch.cat((x, x.flip(1))) for x in (k, v))
        given[name] = torch.tensor([0, 1, 2], dtype=torch.int32, device=q.device)
        due_k, due_v = k, v
    elif name == "mask":
        seen = torch.arange(k.shape[1], device=q.device) < 5
        given[name] = seen.expand(1, 1, q.shape[1], -1)
        due_len = torch.full_like(kv_len, 5)
    else:
        given[name] = torch.arange(5, dtype=torch.int32, device=q.device).flip(0).expand(1, 2, -1)
        due_len = torch.full_like(kv_len, 5)
    try:
        out, _ = form.run(q, k, v, kv_len=kv_len, scale=q.shape[-1] ** -0.5, **given)
    except Exception:
        return False
    if name == "cu_seqlens":
        due = plain_softmax(q.transpose(0, 1), k, v, kv_len.T).transpose(0, 1)
    else:
        due = plain_softmax(q, due_k, due_v, due_len)
    return bool(((out.double() - due).abs() < NEAR).all())


def _out_of(form: Form, call: Mapping[str, Any], **options: Any) -> torch.Tensor:
    out, _ = form.run(call["q"], call["k"], call["v"], kv_len=call["kv_len"], scale=0.125, **options)
    return out


def small_call(device: str, dtype: torch.dtype = torch.float16, *, ratio: int = 2) -> dict[str, Any]:
    """A call of two rows over 16 keys on which each of OPTIONAL, and every way to see keys, tells."""
    g = torch.Generator().manual_seed(0)
    # Several KV heads: one alone is broadcast by kernels that share none.
    shapes = ((2, 2 * ratio), (16, 2), (16, 2))
    q, k, v = (torch.randn(1, n, h, 64, generator=g).to(dtype).to(device) for n, h in shapes)
    kv_len = torch.tensor([[16, 11]], dtype=torch.int32, device=device)
    per_head = torch.ones(2 * ratio, device=device)
    options = {"path": "decode", "sliding_window": 3, "softcap": 0.5, "sinks": 3 * per_head}
    return {"q": q, "k": k, "v": v, "kv_len": kv_len, "options": options | {"alibi_slopes": 0.5 * per_head}}
