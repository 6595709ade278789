"""The cases that laws are tried on: small records that say all there is to a problem, and nothing else.

A case is written as JSON on a command line (`--case`) and as a constructor in a test; both leave out what is
as usual, so that a shrunk case is short.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any, ClassVar, Self, get_args, get_type_hints

import torch

from verify.kernels.cache_types import parse_cache
from verify.kernels.call import PATHS, AttentionPath, Call
from verify.kernels.errors import SpecError
from verify.kernels.heads import Heads
from verify.kernels.judging.families import FAMILIES, draw
from verify.kernels.judging.input_sizes import InputSizes
from verify.kernels.numbers import FLOAT_TYPES
from verify.kernels.plans.asked import MOST_SEVERAL
from verify.machine.errors import UsageError

# Of a size that a case names: what is larger is a slip of the pen.
MOST = 1 << 20


class Case:
    """Reading and writing of a case; its kinds are below. ALWAYS: fields that are never left out."""

    ALWAYS: ClassVar[tuple[str, ...]] = ()

    def __str__(self) -> str:
        """A constructor, fields that are as usual left out."""
        changed = ", ".join(f"{name}={value!r}" for name, value in self._changed().items())
        return f"{type(self).__name__}({changed})".replace("-inf", '-float("inf")')

    def to_json(self) -> str:
        return json.dumps(self._changed())

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Raises UsageError, one line that names the field and what was expected."""
        try:
            given = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UsageError(f"--case {text:.80}: not JSON: {error}") from None
        if not isinstance(given, dict):
            raise UsageError(f"--case {text}: expected an object such as {cls().to_json()}")
        kinds = {f.name: get_type_hints(cls)[f.name] for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
        for name, value in given.items():
            if name not in kinds:
                raise UsageError(f"--case: unknown field {name!r} (known: {', '.join(kinds)})")
            given[name] = _read(name, value, kinds[name])
        case = cls(**given)
        case.check()
        return case

    def check(self) -> None:
        """Raises UsageError for values that make no problem."""

    def _changed(self) -> dict[str, Any]:
        fields = dataclasses.fields(self)  # type: ignore[arg-type]
        return {
            f.name: value
            for f in fields
            if (value := getattr(self, f.name)) != f.default or f.name in self.ALWAYS
        }


def _read(name: str, value: Any, kind: Any) -> Any:
    """A JSON value as the type of its field."""
    inner = get_args(kind)
    if inner and isinstance(value, list):
        if inner[-1] is Ellipsis:
            return tuple(_read(name, x, inner[0]) for x in value)
        if len(inner) == len(value):
            return tuple(_read(name, x, t) for x, t in zip(value, inner, strict=True))
    elif kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    elif kind in (int, str) and type(value) is kind:
        return value
    expected = "a list" if inner else {int: "a whole number", float: "a number", str: "text"}[kind]
    raise UsageError(f"--case: {name}: expected {expected}, got {json.dumps(value)}")


@dataclass(frozen=True)
class Problem(Case):
    """One attention call, drawn from a family of inputs, and what a law does with it."""

    ALWAYS: ClassVar[tuple[str, ...]] = ("n_kv",)

    family: str = "gaussian"  # of `verify.kernels.judging.families`
    n_kv: tuple[int, ...] = (1,)  # visible keys of each row
    batch: int = 1  # sequences
    fewer: tuple[int, ...] = ()  # keys by which the rows of each sequence are shorter
    kv_heads: int = 1  # KV heads
    ratio: int = 1  # query heads a KV head
    k_size: int = 16  # head size of q and k
    v_size: int = 16  # head size of v
    spare: int = 0  # keys held beyond the longest row
    dtype: str = "f16"  # f16, bf16, f32
    path: str = "decode"  # decode, several or prefill
    page: int = 0  # keys of a page, of laws of paged calls
    seed: int = 0  # of what is drawn
    cuts: tuple[int, ...] = ()  # keys at which the KV range is cut
    groups: tuple[int, ...] = ()  # head groups
    parts: int = 1  # of a plan
    block: int = 64  # keys a tile, of a plan
    cache: str = ""  # a quantised type
    twist: int = 0  # what else a law varies: a shift, a power of two, the seed of a permutation

    @property
    def heads(self) -> Heads:
        return Heads.grouped(kv=self.kv_heads, ratio=self.ratio, k_size=self.k_size, v_size=self.v_size)

    @property
    def sizes(self) -> InputSizes:
        path: AttentionPath = "decode"
        if self.path in PATHS:
            path = self.path
        return InputSizes(
            n_kv=self.n_kv,
            batch=self.batch,
            heads=self.heads,
            fewer=self.fewer,
            spare=self.spare if max(self.n_kv) + self.spare else 1,
            edges=(16, 64, 128),
            dtype=FLOAT_TYPES[self.dtype].dtype,
            path=path,
        )

    def call(self, device: torch.device | str = "cpu") -> Call:
        """The call; the same bits on every device."""
        return draw(self.family, self.sizes, self.seed, device=device)

    @property
    def options(self) -> dict[str, str]:
        """The plan of this problem as options of a specification; one that it leaves open is not named."""
        found = {"kv": str(self.parts), "block": str(self.block)}
        return {**found, "heads": "+".join(map(str, self.groups))} if self.groups else found

    def check(self) -> None:
        for name, allowed in (("family", FAMILIES), ("dtype", FLOAT_TYPES), ("path", PATHS)):
            if getattr(self, name) not in allowed:
                known = ", ".join(allowed)
                raise UsageError(f"--case: {name}: expected one of {known}, got {getattr(self, name)!r}")
        if not self.n_kv or min(self.n_kv) < 0:
            raise UsageError(f"--case: n_kv: expected at least one length from 0, got {list(self.n_kv)}")
        for name in ("batch", "kv_heads", "ratio", "k_size", "v_size", "parts", "block"):
            if not 1 <= getattr(self, name) <= MOST:
                raise UsageError(f"--case: {name}: expected 1 to {MOST}, got {getattr(self, name)}")
        if self.fewer and (len(self.fewer) != self.batch or min(self.fewer) < 0):
            raise UsageError(
                f"--case: fewer: expected {self.batch} numbers from 0, one a sequence, got {list(self.fewer)}"
            )
        if max(self.n_kv) > MOST or not 0 <= self.spare <= MOST:
            raise UsageError(f"--case: n_kv, spare: expected 0 to {MOST}, got {max(self.n_kv)}, {self.spare}")
        if not 0 <= self.page <= MOST:
            raise UsageError(f"--case: page: expected 0 to {MOST}, got {self.page}")
        if self.path == "several" and len(self.n_kv) > MOST_SEVERAL:
            raise UsageError(f"--case: n_kv: expected at most {MOST_SEVERAL} rows on the path several")
        if self.block % 16:
            raise UsageError(f"--case: block: expected a multiple of 16, got {self.block}")
        if self.groups and (min(self.groups) < 1 or sum(self.groups) != self.ratio):
            raise UsageError(
                f"--case: groups: expected head groups that sum to ratio = {self.ratio},"
                f" got {list(self.groups)}"
            )
        if any(not 0 <= cut <= max(self.n_kv) for cut in self.cuts):
            raise UsageError(f"--case: cuts: expected 0 to {max(self.n_kv)}, got {list(self.cuts)}")
        try:
            parse_cache(self.cache or "f16")
        except SpecError as error:
            raise UsageError(f"--case: {error}") from None


@dataclass(frozen=True)
class Parts(Case):
    """Partial results: (lse, value) each; two columns hold the value, and 1. An lse of -inf is an empty part.

    order: which two neighbours are merged next, or a permutation's seed; shift: added to every lse.
    """

    ALWAYS: ClassVar[tuple[str, ...]] = ("parts",)

    parts: tuple[tuple[float, int], ...] = ((0.0, 0),)
    order: tuple[int, ...] = ()
    shift: int = 0

    def check(self) -> None:
        if not self.parts:
            raise UsageError("--case: parts: expected at least one part")


@dataclass(frozen=True)
class Rule(Case):
    """A plan, as options of a specification, and the row that it is asked about."""

    ALWAYS: ClassVar[tuple[str, ...]] = ("ratio", "n_kv")

    ratio: int = 1  # query heads a KV head
    kv_heads: int = 1  # of the layer
    n_kv: int = 0  # visible keys
    heads: str = ""  # as in a specification
    kv: str = "1"  # as in a specification
    block: int = 64  # keys a tile
    policy: str = ""  # its name, in the place of `heads`
    threshold: int = 0  # of the policy; 0: its own
    gpus: int = 1  # of the engine
    split_mode: str = "layer"  # of the engine

    @property
    def options(self) -> dict[str, str]:
        found = {"kv": self.kv, "block": str(self.block)}
        if self.policy:
            found |= {"policy": self.policy, "gpus": str(self.gpus), "split_mode": self.split_mode}
            if self.threshold:
                found["threshold"] = str(self.threshold)
        elif self.heads:
            found["heads"] = self.heads
        return found
