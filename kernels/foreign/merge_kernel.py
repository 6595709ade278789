"""A user's merge alone, `merge:FILE.py::FUNCTION`: our parts, combined by it, in a process of its own.

    FUNCTION(o_a, lse_a, o_b, lse_b) -> (o, lse)     o [N, H, D], lse [N, H] float32

as FlashInfer's merge_state has it; one whose parameters are named `prefix_output`, ... and that writes into
`output`, as vLLM's merge_attn_states, is called so, with lse [H, N]. Attention is computed as `eager` does,
its KV range cut into parts, and the parts of a row are merged from the left, two at a time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace

import torch

from verify.kernels.budget.arithmetic import Arithmetic
from verify.kernels.call import AttentionPath, Call, Shape
from verify.kernels.capabilities import Capabilities
from verify.kernels.catalogue import CALL_LIMIT_S, TILE_OPTIONS
from verify.kernels.eager import EagerKernel
from verify.kernels.foreign.process import WorkerProcess
from verify.kernels.foreign.python_kernel import Target, file_of, is_file, parse_target
from verify.kernels.merge import Merge, Part
from verify.kernels.numbers import FLOAT_TYPES, U_F32
from verify.kernels.plans.spec import Spec, choice, number
from verify.kernels.plans.tile_options import TileOptions, parse_tile_options

# log2 e: lse in base 2 is log2(e) times the natural one.
LOG2_E = 1.4426950408889634
# Roundings of a weight, in units of those that a merge of ours makes: weights may go through the merged lse,
# and an lse in base 2 is converted on its way in and out.
OF_BASE = {"e": 4, "2": 8}


class MergeKernel(EagerKernel):
    """`eager` whose parts are combined by a merge of somebody's."""

    merges_pairs = True

    def __init__(
        self, spec: str, target: Target, options: TileOptions, *, base: str, dtype: str, limit_s: int
    ) -> None:
        super().__init__(spec, options)
        self.file, self.function = file_of(target.where), target.name
        self.base, self.dtype, self.limit_s = base, dtype, limit_s
        self.binary = hashlib.sha256(self.file.read_bytes()).hexdigest()[:12] if self.file.is_file() else ""
        where = str(self.file.resolve()) if is_file(target.where) else target.where
        arguments = {**target._asdict(), "where": where}
        self._worker = WorkerProcess(spec, target.name, "merge_servant.py", arguments)
        self.merge_u, self.merge_out = OF_BASE[base] * U_F32, dtype

    @classmethod
    def from_spec(cls, spec: Spec) -> MergeKernel:
        """Raises SpecError, one line, if the file or the function cannot be used."""
        target = parse_target(spec)
        # Without a cut there is nothing to merge.
        tiles = {name: x for name, x in spec.options.items() if name in TILE_OPTIONS}
        options = parse_tile_options(spec._replace(options={"kv": "2", **tiles}))
        return cls(
            spec.text,
            target,
            options,
            base=choice(spec, "base", "e", tuple(OF_BASE)),
            dtype=choice(spec, "dtype", "f32", tuple(FLOAT_TYPES)),
            limit_s=number(spec, "timeout", CALL_LIMIT_S),
        )

    def called(self, label: str) -> str:
        return f"merge:{self.file.name}::{self.function}@{self.binary}[{label}]"

    def capabilities(self) -> Capabilities:
        # The function may do anything: of bits nothing is promised.
        return replace(
            super().capabilities(), plans=False, head_groups=False, deterministic=False, row_alone=False,
            zero_for_empty_rows=False, caches=(),
        )  # fmt: skip

    def arithmetic(self, shape: Shape, path: AttentionPath) -> Arithmetic:
        return self._with_merges(super().arithmetic(shape, path), shape.keys, sinks=True)

    def arithmetic_of(self, call: Call) -> Arithmetic:
        longest = int(call.n_kv.max()) if call.n_kv.numel() else 0
        return self._with_merges(super().arithmetic_of(call), longest, sinks=call.sinks is not None)

    def _with_merges(self, parts: Arithmetic, longest: int, *, sinks: bool) -> Arithmetic:
        """The roundings of the parts, and of as many merges as follow one another."""
        merges = max(parts.depths(longest).parts - 1 + sinks, 1)
        kind = FLOAT_TYPES[self.dtype]
        out = parts.out if self.dtype == "f32" else self.dtype
        return replace(parts, u=self.merge_u * merges, u_part=merges * kind.u, out=out, stated=False)

    def merger(self) -> Merge:
        return self._fold

    def _fold(self, parts: Sequence[Part]) -> Part:
        """All parts, from the left."""
        if not parts:
            raise ValueError("parts: expected at least one part")
        kept = FLOAT_TYPES[self.dtype].dtype
        if len(parts) == 1:
            return Part(parts[0].out.to(kept).float(), parts[0].lse)
        merged, *others = (self._given(part, kept) for part in parts)
        for part in others:
            merged = self._pair(merged, part)
        lse = merged.lse / LOG2_E if self.base == "2" else merged.lse
        return Part(merged.out.float(), lse)

    def _given(self, part: Part, kept: torch.dtype) -> Part:
        """A part as the function has it: its type of outputs, its base of the lse."""
        return Part(part.out.to(kept), part.lse * LOG2_E if self.base == "2" else part.lse)

    def _pair(self, a: Part, b: Part) -> Part:
        """One merge, o [..., H, D] of any leading shape."""
        shape, device = a.out.shape, a.out.device
        tokens = (-1, *shape[-2:]) if len(shape) > 1 else (1, 1, shape[-1])
        flat = {"o_a": a.out.reshape(tokens), "o_b": b.out.reshape(tokens)}
        rows = flat["o_a"].shape[:2]
        flat |= {"lse_a": a.lse.reshape(rows), "lse_b": b.lse.reshape(rows)}
        found = self._worker.ask(
            {"device": str(device)},
            {name: x.detach().cpu().contiguous() for name, x in flat.items()},
            {"out": tuple(flat["o_a"].shape), "lse": tuple(rows)},
            self.limit_s,
        )
        out, lse = (found[name].to(device) for name in ("out", "lse"))
        return Part(out.view(shape).to(a.out.dtype), lse.view(shape[:-1]))

    def forgive(self) -> None:
        self._worker.forgive()

    def close(self) -> None:
        self._worker.close()

    def __del__(self) -> None:
        if hasattr(self, "_worker"):
            self.close()
