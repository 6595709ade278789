"""How a user's callable is called: what its signature says, what its owner says, or what it shows when asked.

A form turns a call of the contract into calls of the callable: other orders of dimensions, other names, no
lengths (every key is seen, or a causal triangle), a mask in their place. Runs in the worker too, and so
imports torch and the standard library alone.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

# What a callable is given only if it asks for it; without it, a call that needs it is refused.
OPTIONAL = ("path", "sliding_window", "softcap", "sinks", "alibi_slopes")
# Forms of a call (`docs/contract.md`) that a callable with lengths is given where it takes them. One that
# cannot do without is given every call so.
CALL_FORMS = ("block_table", "cu_seqlens", "mask", "keys")
# Keys a page of a call that has none, for a callable that needs pages; what lies behind its keys there.
PAGE, BEHIND = 16, 6e4
LAYOUTS = ("bshd", "bhsd", "thd")
# Which keys a callable without lengths sees: all that it is given, or those up to a row's own.
MASKS = ("none", "causal")
DTYPES = {"f16": "float16", "bf16": "bfloat16", "f32": "float32"}
SCALE_NAMES = ("scale", "sm_scale", "softmax_scale", "scaling")
MASK_NAMES = ("attn_mask", "attention_mask", "mask")
CAUSAL_NAMES = ("is_causal", "causal")
PACKED_NAMES = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
# A right result, when it is asked how it sees keys: what types of 16 bits leave of it.
NEAR = 0.05


class FormError(Exception):
    """The callable cannot be used as it is: the message is the whole story."""


class FormFailure(Exception):
    """What it returned is not attention. kind: as of `KernelFailure`."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


@dataclass(frozen=True)
class Wanted:
    """What the owner says: layout and mask of the above, dtype (f16, bf16, f32), keywords for the callable;
    empty where it is left to be found."""

    layout: str = ""
    mask: str = ""
    dtype: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Form:
    """A callable and how it is called; `run` computes a call of the contract."""

    # What is called.
    function: Callable[..., Any]
    # What messages call it.
    name: str
    # kv_len: it is given lengths; mask: a mask of them; none, causal: it sees all keys, or a triangle whose
    # last row sees the last key; square: a triangle of as many rows as keys.
    way: str = "kv_len"
    # Order of dimensions of q, k, v and the result: of LAYOUTS.
    layout: str = "bshd"
    # Its names of scale, mask and the switch of a triangle; empty where it has none.
    names: Mapping[str, str] = field(default_factory=lambda: {"scale": "scale"})
    # Which of OPTIONAL it takes.
    takes: tuple[str, ...] = ()
    # Why it does not take others, where it had to be asked.
    left_out: Mapping[str, str] = field(default_factory=dict)
    # Keywords that its owner gives it.
    options: Mapping[str, Any] = field(default_factory=dict)
    # It has no keywords: lengths and scale by position.
    by_position: bool = False
    # Types that it takes, by torch's names; empty: any.
    dtypes: tuple[str, ...] = ()
    # It has no heads that share keys.
    one_head_each: bool = False
    # Which of CALL_FORMS it takes.
    forms: tuple[str, ...] = ()
    # Which of them it cannot do without.
    needs: tuple[str, ...] = ()
    # It was asked, and was right in no form: it runs in this one.
    never_right: bool = False
    # What a reader must know of all this.
    said: tuple[str, ...] = ()

    def run(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        kv_len: torch.Tensor,
        scale: float,
        **options: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """out [B, T, Hq, Dv] in the callable's own type, and lse [B, T, Hq] or None.

        options: those of OPTIONAL and CALL_FORMS that it takes; packed tokens are [1, sum T, ...] here.
        Raises FormFailure for a result of another shape or kind, NotImplementedError for a call that this
        form cannot be given.
        """
        form = {name: options[name] for name in CALL_FORMS if options.get(name) is not None}
        given = {name: x for name, x in options.items() if name in self.takes}
        if not self.names.get("scale") and not self.by_position:
            own = q.shape[-1] ** -0.5
            if abs(scale - own) > 1e-6 * own:
                raise NotImplementedError(f"{self.name}: takes no scale, and {scale:g} is not {own:g}")
        if self.way == "kv_len":
            return self._formed(q, k, v, kv_len, form, scale=scale, **given)
        if self.way == "mask":
            return self._once(q, k, v, kv_len=kv_len, scale=scale, seen=form.get("mask"), **given)
        outs, lses = [], []
        together = bool((kv_len == kv_len[:1]).all()) and self.layout != "thd"
        for b in [slice(None)] if together else [slice(i, i + 1) for i in range(len(q))]:
            out, lse = self._sequences(q[b], k[b], v[b], kv_len[b][0].tolist(), scale, given)
            outs.append(out)
            lses.append(lse)
        return torch.cat(outs), None if lses[0] is None else torch.cat(lses)  # type: ignore[arg-type]

    def _formed(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        kv_len: torch.Tensor,
        form: dict[str, torch.Tensor],
        **given: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """A call in the form that it has, or in the one that the callable cannot do without."""
        batch, rows, keys = q.shape[0], q.shape[1], k.shape[1]
        if "block_table" in form:
            keys *= form["block_table"].shape[1]
        if "mask" in self.needs and "mask" not in form:
            form["mask"] = torch.ones((1, 1, rows, keys), dtype=torch.bool, device=q.device)
        if "keys" in self.needs and "keys" not in form:
            places = torch.arange(max(keys, 1), dtype=torch.int32, device=q.device)
            form["keys"] = torch.where(places < kv_len[..., None], places, -1)
        if "block_table" in self.needs and "block_table" not in form:
            form["block_table"] = table_of(len(k), keys, q.device)
            k, v = in_pages(k, behind=0.0), in_pages(v, behind=BEHIND)
            if "mask" in form:
                room = form["block_table"].shape[1] * PAGE
                form["mask"] = torch.nn.functional.pad(form["mask"], (0, room - keys))
        packs = "cu_seqlens" in self.needs and "cu_seqlens" not in form
        if packs:
            form["cu_seqlens"] = torch.arange(batch + 1, dtype=torch.int32, device=q.device) * rows
            q, kv_len = q.flatten(0, 1)[None], kv_len.flatten()[None]
            if "keys" in form:
                form["keys"] = form["keys"].flatten(0, 1)[None]
            if "mask" in form:
                spread = form["mask"].expand(batch, -1, -1, -1).transpose(1, 2).flatten(0, 1)
                form["mask"] = spread.transpose(0, 1)[None]
        packed = "cu_seqlens" in form
        for name, x in form.items():
            given[self.names["mask"] if name == "mask" else name] = x[0] if name == "keys" and packed else x
        out, lse = self._once(q, k, v, kv_len=kv_len, packed=packed, **given)
        if packs:
            out = out[0].unflatten(0, (batch, rows))
            lse = None if lse is None else lse[0].unflatten(0, (batch, rows))
        return out, lse

    def _sequences(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        lengths: list[int],
        scale: float,
        given: Mapping[str, Any],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Sequences whose rows see equal numbers of keys, of a callable that takes no lengths."""
        out = lse = None
        for rows, n in pieces(lengths, self.way):
            if n == 0:
                continue
            asked = q[:, rows]
            if self.way == "square":
                asked = torch.cat((q.new_zeros((len(q), n - asked.shape[1], *q.shape[2:])), asked), 1)
            some, its = self._once(asked, k[:, :n], v[:, :n], kv_len=None, scale=scale, **given)
            own = slice(asked.shape[1] - q[:, rows].shape[1], None)
            some, its = some[:, own], None if its is None else its[:, own]
            if out is None:
                out = some.new_zeros((len(q), len(lengths), *some.shape[2:]))
                lse = None if its is None else its.new_full(out.shape[:3], -math.inf)
            out[:, rows] = some
            if its is not None and lse is not None:
                lse[:, rows] = its
        if out is None:
            out = q.new_zeros((*q.shape[:3], v.shape[-1]))
        return out, lse

    def _once(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        kv_len: torch.Tensor | None,
        scale: float,
        seen: torch.Tensor | None = None,
        packed: bool = False,
        **given: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """One call of the callable, its result in our order of dimensions.

        seen: a mask that the call has; packed: q is [1, sum T, ...], of which the callable gets [sum T, ...].
        """
        expected = [*q.shape[:3], v.shape[-1]]
        native, words = self.native(q, k, v, kv_len=kv_len, scale=scale, seen=seen, packed=packed, **given)
        with torch.no_grad():
            if self.by_position:
                lengths = kv_len[0] if packed and kv_len is not None else kv_len
                found = self.function(*native, lengths, scale, **words)
            else:
                found = self.function(*native, **words)
        return self.result(found, expected, q.device, packed=packed)

    def native(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        kv_len: torch.Tensor | None,
        scale: float,
        seen: torch.Tensor | None = None,
        packed: bool = False,
        **given: Any,
    ) -> tuple[list[torch.Tensor], dict[str, Any]]:
        """What one call is given: q, k, v in the callable's order of dimensions, and keywords."""
        words: dict[str, Any] = {**self.options, **given}
        if self.way == "kv_len" and not self.by_position:
            words["kv_len"] = kv_len[0] if packed and kv_len is not None else kv_len
        if name := self.names.get("scale"):
            words[name] = scale
        if self.way == "mask":
            assert kv_len is not None
            words[self.names["mask"]] = self._seen(k, kv_len, seen)
        if self.way in ("causal", "square") and (name := self.names.get("causal")):
            # One row sees all keys: some, torch's among them, count a triangle from the first key on.
            words[name] = q.shape[1] > 1
        rows = q.shape[1]
        if "packed" in self.names:
            # One sequence at a time where a callable takes no lengths.
            ends = [torch.tensor([0, n], dtype=torch.int32, device=q.device) for n in (rows, k.shape[1])]
            words |= dict(zip(PACKED_NAMES, (*ends, rows, k.shape[1]), strict=True))
        if packed:
            return [q[0], self._given(k), self._given(v)], words
        return [self._given(x) for x in (q, k, v)], words

    def canonical(self, x: torch.Tensor) -> torch.Tensor:
        """q, k or v in the callable's order of dimensions, back in ours."""
        return self._ours(x)

    @staticmethod
    def _seen(k: torch.Tensor, kv_len: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """Lengths and the call's own mask as one."""
        seen = torch.arange(k.shape[1], device=k.device) < kv_len[:, None, :, None]
        if mask is None:
            return seen
        return seen & mask if mask.dtype == torch.bool else mask.masked_fill(~seen, -math.inf)

    def _given(self, x: torch.Tensor) -> torch.Tensor:
        """[B, S, H, D] in the order of dimensions that the callable has."""
        if self.layout == "bhsd":
            return x.transpose(1, 2).contiguous()
        if self.layout == "thd":
            if len(x) > 1:
                raise NotImplementedError(f"{self.name}: layout thd, and no lengths: one sequence a call")
            return x[0]
        return x

    def result(
        self, found: Any, expected: list[int], device: torch.device, *, packed: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        out, lse = found, None
        if isinstance(found, (tuple, list)):
            if len(found) == 2:
                out, lse = found
            elif found:
                out = found[0]
        batch, rows, heads, size = expected
        if packed:
            # Packed tokens: [sum T, Hq, Dv] in any order of dimensions.
            form = replace(self, layout="thd", names={k: n for k, n in self.names.items() if k != "packed"})
            return form.result(found, expected, device)
        if not isinstance(out, torch.Tensor):
            raise FormFailure("shape", f"out is a {type(out).__name__}, expected a tensor")
        theirs = {"bshd": expected, "bhsd": [batch, heads, rows, size], "thd": expected[1:]}
        if list(out.shape) != theirs[self.layout]:
            others = [name for name in LAYOUTS if list(out.shape) == theirs[name]]
            hint = f": what layout={others[0]} has" if others else ""
            raise FormFailure(
                "shape", f"out has shape {list(out.shape)}, expected {theirs[self.layout]}{hint}"
            )
        out = self._ours(out)
        if lse is not None:
            if not isinstance(lse, torch.Tensor):
                raise FormFailure("shape", f"lse is a {type(lse).__name__}, expected a tensor")
            by_row, by_head = [batch, rows, heads], [batch, heads, rows]
            if self.layout == "thd":
                lse = lse[None]
            # Of [B, H, T] some say it whatever the order of their other dimensions.
            if list(lse.shape) == by_head and (self.layout == "bhsd" or by_head != by_row):
                lse = lse.transpose(1, 2)
            if list(lse.shape) != by_row:
                raise FormFailure("shape", f"lse has shape {list(lse.shape)}, expected {by_row}")
        for name, x in (("out", out), ("lse", lse)):
            if x is None:
                continue
            if not x.dtype.is_floating_point:
                raise FormFailure("dtype", f"{name} is {x.dtype}, expected a float dtype")
            if x.device != device:
                raise FormFailure("device", f"{name} is on {x.device}, expected {device}")
        return out, lse

    def _ours(self, out: torch.Tensor) -> torch.Tensor:
        if self.layout == "thd":
            return out[None]
        return out.transpose(1, 2) if self.layout == "bhsd" else out


def pieces(lengths: list[int], way: str) -> Iterator[tuple[slice | list[int], int]]:
    """Rows that one call of a callable without lengths can answer, and the keys that it is given.

    >>> list(pieces([3, 3, 2], "none"))
    [([0, 1], 3), ([2], 2)]
    >>> list(pieces([3, 4, 5], "causal"))
    [(slice(0, 3, None), 5)]
    >>> list(pieces([5, 5], "causal"))
    [([0], 5), ([1], 5)]
    """
    triangle = all(b - a == 1 for a, b in pairwise(lengths))
    if way != "none" and triangle and (len(lengths) > 1 or way == "square"):
        yield slice(0, len(lengths)), lengths[-1]
        return
    if way == "square":
        raise NotImplementedError("as many rows as keys: rows that see other keys than a triangle's")
    by_length: dict[int, list[int]] = {}
    for row, n in enumerate(lengths):
        by_length.setdefault(n, []).append(row)
    for n, rows in by_length.items():
        for some in [rows] if way == "none" else [[row] for row in rows]:
            yield some, n


def load_callable(
    where: str, names: str, *, arguments: Mapping[str, Any] | None = None, method: str = ""
) -> Callable[..., Any]:
    """The callable NAMES (dotted) of a file or module; arguments: of a class that is to be constructed.

    Raises FormError.
    """
    module = load_module(where)
    found: Any = module
    for name in names.split("."):
        try:
            found = getattr(found, name)
        except AttributeError:
            known = [x for x in dir(found) if not x.startswith("_")]
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f", did you mean {near[0]}?" if near else ""
            raise FormError(f"{where} has no function {names}{hint}") from None
    if isinstance(found, type):
        try:
            # Files of benchmarks say what their classes are constructed with.
            inits = getattr(module, "get_init_inputs", None)
            if arguments is None and callable(inits):
                found = found(*inits())
            else:
                found = found(**(arguments or {}))
        except Exception as error:
            raise FormError(
                f"{names} must be constructed, and {names}({_written(arguments or {})}) fails:"
                f" {type(error).__name__}: {error}"
            ) from error
    elif arguments is not None:
        raise FormError(f"{names} is no class: options of a function stand after a comma, {names},block=64")
    if method:
        found = getattr(found, method, None)
    if not callable(found):
        raise FormError(f"{where} has no function {'.'.join(filter(None, (names, method)))}")
    return found


def _written(arguments: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={x!r}" for name, x in arguments.items())


def load_module(where: str) -> Any:
    """A file, alone or as a part of the package that it lies in, or a module by name. Raises FormError."""
    file = Path(where)
    if file.suffix == ".py" or "/" in where:
        if not (file.parent / "__init__.py").is_file():
            return _load_file(file)
        parts = [file.stem]
        folder = file.resolve().parent
        while (folder / "__init__.py").is_file():
            parts.insert(0, folder.name)
            folder = folder.parent
        path, name = str(folder), ".".join(parts)
    else:
        path, name = str(Path.cwd()), where
    if path not in sys.path:
        sys.path.insert(0, path)
    try:
        return importlib.import_module(name)
    except BaseException as error:  # SystemExit too
        raise FormError(f"{where} does not import: {type(error).__name__}: {_text(error)}") from error


def _load_file(file: Path) -> Any:
    sys.path.insert(0, str(file.resolve().parent))
    spec = importlib.util.spec_from_file_location("user_kernel", file)
    if spec is None or spec.loader is None:
        raise FormError(f"{file} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules["user_kernel"] = module
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        raise FormError(f"{file} does not import: {type(error).__name__}: {_text(error)}") from error
    return module


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
                        failure = failure or f"{type(error).__name__}: {_text(error)}"
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
                failure = failure or f"fails when it is asked: {type(error).__name__}: {_text(error)}"
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


def table_of(sequences: int, keys: int, device: torch.device) -> torch.Tensor:
    """The table of `in_pages`: [B, pages] int32, pages of a sequence from the last to the first."""
    pages = -(-keys // PAGE)
    ids = torch.arange(sequences * pages, dtype=torch.int32, device=device).view(sequences, pages)
    return ids.flip(1)


def in_pages(x: torch.Tensor, *, behind: float) -> torch.Tensor:
    """[B, S, H, D] as pages [B * ceil(S / PAGE), PAGE, H, D] in the order of `table_of`; `behind` fills."""
    padded = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, -x.shape[1] % PAGE), value=behind)
    return padded.unflatten(1, (-1, PAGE)).flip(1).flatten(0, 1).contiguous()


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


def _text(error: BaseException) -> str:
    try:
        return str(error)
    except BaseException:
        return "(its text cannot be had)"
