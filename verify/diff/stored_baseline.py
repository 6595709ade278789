"""A baseline's figures as a file, so that who checks a candidate again need not run the baseline.

    verify diff --candidate NEW --baseline OLD --store old.npz       # once
    verify diff --candidate NEW --baseline OLD --against-stored old.npz

An npz without pickles: `header`, JSON in UTF-8 with the rules, the settings of each path and, for each input,
what was found of the baseline; `energies`, float32, the arrays of all inputs one after another. Where what is
asked for is not what was stored (settings, rules, the bits of the inputs) it is refused by name.
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from verify import __version__
from verify.diff.examining import AloneEvidence, CellInputs, KernelEvidence, finite_of
from verify.diff.inputs import DiffSettings
from verify.diff.probing import Probing
from verify.kernels.bits import digest_of
from verify.kernels.call import Call
from verify.kernels.judging.detectors import Finding, Measures
from verify.kernels.said import all_visible
from verify.kernels.trace import LaunchTrace
from verify.machine.errors import UsageError

KIND = "baseline of verify diff"
# One more when a baseline's figures would be others: how inputs are drawn, budgets, detectors, energies.
RULES = 2
# Settings that must be the same, by the option that says them, and those of which a part may be asked for.
_SAME = {
    "dtype": "dtype", "rows": "rows", "seeds": "seeds", "first-seed": "first_seed", "sequences": "sequences",
    "n-q": "n_q", "strict": "strict",
}  # fmt: skip
# Likewise the same, of the lengths that are asked for.
_BRIEF = "brief_n_kvs"
_PARTS = {"shape": "shapes", "n-kv": "n_kvs", "inputs": "families"}
_ENERGIES = ("energy", "given_energy")
_PLAIN = (
    "failure", "probes_failed", "refused", "contract", "nmse", "worst", "worst_values", "cache",
    "result_type", "typical", "bits", "bits_of_first",
)  # fmt: skip
_PLAIN_ALONE = ("calls", "refused", "failure", "other_bits", "against_many", "bits")
_UNREADABLE = (
    *(OSError, ValueError, LookupError, TypeError, AttributeError, EOFError, MemoryError, zipfile.BadZipFile),
    RecursionError,
)


class BaselineStore:
    """What is found of baselines, kept while a diff runs."""

    def __init__(self) -> None:
        self._settings: dict[str, dict[str, Any]] = {}
        self._inputs: list[dict[str, Any]] = []
        self._arrays: list[np.ndarray] = []
        self._size = 0

    def begin(self, settings: DiffSettings) -> None:
        """The settings of one path, before its inputs. Raises UsageError for what cannot be stored."""
        if settings.captured_from is not None:
            raise UsageError("--store: expected drawn inputs, not --captured-from")
        self._settings[settings.path] = _told(settings)

    def keep(
        self, settings: DiffSettings, spec: str, each: CellInputs | Probing, found: KernelEvidence | None
    ) -> None:
        """What one baseline did on one input; None: it does not take it."""
        evidence = None if found is None else self._evidence(found)
        self._inputs.append({"key": _key(settings, spec, each), "is": identity(each), "found": evidence})

    def _evidence(self, found: KernelEvidence) -> dict[str, Any]:
        kept = {name: getattr(found, name) for name in _PLAIN}
        kept |= {
            "measures": _figures(found.measures),
            "findings": found.findings,
            "trace": found.trace.to_json(),
        }
        kept |= {name: self._place(getattr(found, name)) for name in _ENERGIES}
        finite = finite_of(found)
        if finite is not None and not bool(finite.all()):
            packed = np.packbits(finite.cpu().numpy().ravel())
            kept["finite"] = {"shape": list(finite.shape), "bits": packed.tobytes().hex()}
        if (alone := found.alone) is not None:
            own = {name: getattr(alone, name) for name in _PLAIN_ALONE}
            own |= {"measures": _figures(alone.measures), "findings": alone.findings}
            kept["alone"] = own | {name: self._place(getattr(alone, name)) for name in _ENERGIES}
        return kept

    def _place(self, array: np.ndarray) -> list[int]:
        at = [self._size, *array.shape]
        self._arrays.append(np.asarray(array, np.float32).ravel())
        self._size += array.size
        return at

    def packed(self, device: str) -> bytes:
        """The file."""
        header = {
            "kind": KIND, "rules": RULES, "version": __version__, "device": device,
            "settings": self._settings, "inputs": self._inputs,
        }  # fmt: skip
        file = io.BytesIO()
        np.savez_compressed(
            file,
            header=np.frombuffer(json.dumps(header).encode(), dtype=np.uint8),
            energies=np.concatenate([np.zeros(0, np.float32), *self._arrays]),
        )
        return file.getvalue()


class StoredBaseline:
    """A file of them, read again."""

    def __init__(self, path: Path) -> None:
        """Raises UsageError for a file that is none, or of other rules."""
        self.path = path
        try:
            with np.load(path, allow_pickle=False) as stored:
                # A stranger's, it may be: no text in it steers a terminal.
                header = all_visible(json.loads(stored["header"].tobytes()))
                self._energies = stored["energies"].astype(np.float64)
            if header["kind"] != KIND:
                raise ValueError(f"it is {header['kind']}")
            self.rules, self.device = int(header["rules"]), str(header["device"])
            self._settings = {str(name): dict(x) for name, x in header["settings"].items()}
            self._found: dict[tuple[str, str], Any] = {
                (x["key"], x["is"]): x["found"] for x in header["inputs"]
            }
            self._keys = {key for key, _ in self._found}
        except _UNREADABLE as error:
            said = " ".join(str(error).split())
            raise UsageError(f"{self}: expected what --store wrote: {said}") from None
        if self.rules != RULES:
            raise UsageError(f"{self}: measured by rules {self.rules}, these are {RULES}: store it again")

    def __str__(self) -> str:
        return f"--against-stored {self.path}"

    def check(self, settings: DiffSettings) -> None:
        """Raises UsageError that names the first setting which is not the stored one."""
        if settings.captured_from is not None:
            raise UsageError(f"{self}: expected drawn inputs, not --captured-from")
        stored, asked = self._settings.get(settings.path), _told(settings)
        if stored is None:
            raise UsageError(f"{self}: has path {', '.join(self._settings)}, asked for {settings.path}")
        for option, name in _SAME.items():
            if stored.get(name) != asked[name]:
                raise UsageError(f"{self}: stored with --{option} {stored.get(name)}, not {asked[name]}")
        for option, name in _PARTS.items():
            has = stored.get(name, ())
            if lacking := [x for x in asked[name] if x not in has]:
                raise UsageError(f"{self}: has --{option} {', '.join(map(str, has))}, and not {lacking[0]}")
        brief = [n for n in stored.get(_BRIEF, ()) if n in settings.n_kvs]
        if brief != asked[_BRIEF]:
            told, wanted = (", ".join(map(str, x)) or "no length" for x in (brief, asked[_BRIEF]))
            raise UsageError(f"{self}: stored with --brief {told}, not {wanted}")

    def has(self, settings: DiffSettings, spec: str, each: CellInputs | Probing) -> bool:
        """Whether anything is stored of this baseline and input, whatever its bits were."""
        return _key(settings, spec, each) in self._keys

    def evidence(
        self, settings: DiffSettings, spec: str, each: CellInputs | Probing
    ) -> KernelEvidence | None:
        """What was found; None: the baseline does not take it. Raises UsageError for inputs of other bits, or
        of which nothing is stored."""
        family = each.inputs.family if isinstance(each, Probing) else each.family
        which = f"{family} at {each.shape}, {each.n_kv} keys"
        if not self.has(settings, spec, each):
            raise UsageError(f"{self}: has nothing of baseline {spec} on {which}")
        try:
            kept = self._found[_key(settings, spec, each), identity(each)]
        except KeyError:
            raise UsageError(
                f"{self}: the inputs {which} are others than those stored (a candidate of other cuts gets"
                " inputs beside its own): store it with this candidate"
            ) from None
        try:
            return None if kept is None else self._read(spec, kept)
        except _UNREADABLE as error:
            said = " ".join(str(error).split())
            raise UsageError(f"{self}: {which}: expected what --store wrote: {said}") from None

    def _read(self, spec: str, kept: dict[str, Any]) -> KernelEvidence:
        found = KernelEvidence(spec, **{name: kept[name] for name in _PLAIN})
        found.worst, found.worst_values = tuple(found.worst), (found.worst_values[0], found.worst_values[1])
        found.measures, found.findings = _measures(kept["measures"]), _findings(kept["findings"])
        found.trace = LaunchTrace.from_json(kept["trace"])
        for name in _ENERGIES:
            setattr(found, name, self._array(kept[name]))
        if (finite := kept.get("finite")) is not None:
            bits = np.unpackbits(np.frombuffer(bytes.fromhex(finite["bits"]), np.uint8))
            count = int(np.prod(finite["shape"]))
            found.finite = torch.from_numpy(bits[:count].astype(bool)).view(finite["shape"])
        if (own := kept.get("alone")) is not None:
            found.alone = alone = AloneEvidence(**{name: own[name] for name in _PLAIN_ALONE})
            alone.measures, alone.findings = _measures(own["measures"]), _findings(own["findings"])
            for name in _ENERGIES:
                setattr(alone, name, self._array(own[name]))
        return found

    def _array(self, at: list[int]) -> np.ndarray:
        first, *shape = at
        return self._energies[first : first + int(np.prod(shape))].reshape(shape)


def _figures(found: Measures | None) -> dict[str, Any] | None:
    return None if found is None else found._asdict()


def _measures(kept: Any) -> Measures | None:
    if kept is None:
        return None
    b, t, h, column = kept["worst"]
    return Measures(**{**kept, "worst": (b, t, h, column)})


def _findings(kept: Any) -> list[Finding]:
    return [Finding(detector, said) for detector, said in kept]


def _told(settings: DiffSettings) -> dict[str, Any]:
    """Settings as JSON has them."""
    same = {name: getattr(settings, name) for name in _SAME.values()}
    same[_BRIEF] = list(settings.brief_n_kvs)
    return same | {name: list(getattr(settings, name)) for name in _PARTS.values()}


def _key(settings: DiffSettings, spec: str, each: CellInputs | Probing) -> str:
    inputs = each.inputs if isinstance(each, Probing) else each
    return json.dumps([settings.path, spec, each.shape, each.n_kv, inputs.family, inputs.seed])


def identity(each: CellInputs | Probing) -> str:
    """A hash of the inputs: of a call, all of q, lengths and options, and every so many keys and values; of
    probes, their sizes, of which all follows."""
    digest = hashlib.sha256()
    if isinstance(each, Probing):
        digest.update(repr(each.sizes).encode())
        return digest.hexdigest()[:16]
    for call in (each.call, each.before):
        if call is not None:
            _digest_call(digest, call)
    return digest.hexdigest()[:16]


def _digest_call(digest: Any, call: Call) -> None:
    keys = call.k.shape[0] * call.k.shape[1]
    some = slice(0, None, max(keys // 64, 1))
    digest.update(repr((call.scale, call.path, call.sliding_window, call.softcap, call.shape)).encode())
    tensors = [call.q, call.kv_len, *(x.flatten(0, 1)[some] for x in (call.k, call.v))]
    tensors += [
        x
        for x in (call.sinks, call.alibi_slopes, call.mask, call.keys, call.block_table, call.cu_seqlens)
        if x is not None
    ]
    for x in tensors:
        digest.update(digest_of(x).encode())
