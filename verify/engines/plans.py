"""Which plan a policy runs at which length, and what that costs: KV walks, padded columns, bytes.

Sizes are of one GPU, one layer and one call. Every head group reads the cache once (a walk); a group's
columns fill a tile of the matrix product, padded to a power of two (in llama.cpp to its groups of 8); a
quantised cache is first expanded to float16 (read once, written once), and the walks read that. A policy's
conditions compare lengths padded to 256. These are predictions from the engines' rules, not measurements.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from verify.kernels.cache_types import CACHE_TYPES, PLAIN_BITS, bits_per_number
from verify.kernels.errors import SpecError, nearest
from verify.kernels.heads import Heads
from verify.kernels.plans.asked import GENERATIONS, N_KV_PADDING, Generation, RowAsked, SplitMode
from verify.kernels.plans.policy import (
    KERNEL_SUMS,
    POLICIES,
    EngineKernel,
    Launch,
    Policy,
    PolicyRule,
    policy_named,
)
from verify.kernels.plans.shapes import SHAPES, ModelShape, shape_named
from verify.machine.errors import UsageError
from verify.model.errors import ModelError
from verify.model.gguf.file import GGUFFile
from verify.model.locate import locate_model

# What engines' names of architectures stand for here; other sizes of a family have shapes of their own.
ARCHITECTURE_SHAPES = {
    "glm4moe": "glm-4.5",
    "deepseek2": "glm-4.7-flash",
    "llama": "llama-3-8b",
    "qwen2": "qwen2.5-7b",
    "gemma3": "gemma-3",
    "gpt-oss": "gpt-oss",
    "qwen3moe": "qwen3-235b-a22b",
    "gemma2": "gemma-2-9b",
    "minimax-m2": "minimax-m2",
    "step35": "step-3.5",
    "qwen3next": "qwen3-next",
    "qwen35": "qwen3.5-27b",
    "qwen35moe": "qwen3.5-397b-a17b",
    "gemma4": "gemma-4-31b",
    "deepseek32": "deepseek-v3.2",
    "glm-dsa": "glm-5",
    "mistral3": "mistral-small-3",
    "mistral4": "mistral-small-4",
}
LONGEST = 1 << 20
# Those of whose layers some or all see a window; others may have the key, and engines pass it over.
WINDOWED_ARCHITECTURES = {
    "gemma2", "gemma3", "gemma3n", "gemma4", "gpt-oss", "step35", "cohere2", "mimo2", "llama4", "exaone4",
}  # fmt: skip


class Setting(NamedTuple):
    """What does not change with the length."""

    shape: ModelShape  # of the layer
    cache_type: str = "f16"  # f16, q8_0 ...
    gpus: int = 1  # of the engine
    split_mode: SplitMode = "layer"  # how layers are shared out
    # Query tokens a call.
    n_q: int = 1
    generation: Generation = "ada"  # of the GPUs
    # Of the windowed layers, where their heads are others than those of `shape`'s layers.
    windowed: ModelShape | None = None

    @property
    def kv_heads_a_gpu(self) -> int:
        return self.call(1).kv_heads_a_gpu

    def call(self, n_kv: int) -> RowAsked:
        return RowAsked(
            heads=self.shape.heads,
            n_kv=n_kv,
            n_q=self.n_q,
            cache_type=self.cache_type,
            sinks=self.shape.sinks,
            sliding_window=self.shape.sliding_window is not None,
            gpus=self.gpus,
            split_mode=self.split_mode,
            generation=self.generation,
        )

    @property
    def layer_kinds(self) -> dict[str, Setting]:
        """Windowed layers and others of a model that has both; one entry without a name elsewhere."""
        if self.windowed is not None:
            own = self._replace(windowed=None)
            return {"windowed layers": own._replace(shape=self.windowed), "other layers": own}
        if self.shape.sliding_window is None:
            return {"": self}
        full = self._replace(shape=self.shape._replace(sliding_window=None))
        return {"windowed layers": self, "other layers": full}


class PlanAt(NamedTuple):
    """A policy's plan at one length."""

    policy: str  # its name
    n_kv: int  # visible keys
    head_groups: tuple[int, ...]  # query heads of each
    launch: Launch  # of the head groups
    kernel: EngineKernel  # of the engine
    # What each group is padded to.
    columns: tuple[int, ...]
    # Share of the columns that no head fills.
    waste: float
    bytes_read: int  # of one GPU, layer and call
    bytes_written: int  # likewise

    @property
    def name(self) -> str:
        return plan_name(self.head_groups, self.launch, self.columns)

    @property
    def walks(self) -> int:
        """How often the cache is read."""
        return len(self.head_groups)


class Stretch(NamedTuple):
    """A plan and the keys that it starts at."""

    from_n_kv: int  # visible keys
    padded: int  # length that the policy compares
    head_groups: tuple[int, ...]  # query heads of each
    launch: Launch  # of the head groups
    kernel: EngineKernel  # of the engine
    columns: tuple[int, ...]  # what each group is padded to

    @property
    def runs(self) -> tuple[object, ...]:
        """What is launched, the lengths left aside."""
        return self.head_groups, self.launch, self.kernel, self.columns

    @property
    def name(self) -> str:
        return plan_name(self.head_groups, self.launch, self.columns)


class Change(NamedTuple):
    """Keys from which two policies run different things, up to and without the next change."""

    from_n_kv: int
    padded: int
    before: Stretch
    after: Stretch


# Versions of each engine from old to new.
VERSIONS = (
    ("before", "ik-1182", "ik-1183", "ik-1190", "ik-1192", "ik-1193", "ik-2026-08"),
    ("mainline", "mainline-2026-10"),
)


def kernel_words(kernel: EngineKernel) -> str:
    """`mma kernel, float16 sums`."""
    if kernel == "none":
        return "no kernel: the engine ends"
    if kernel == "unknown":
        return "a kernel that was not looked up"
    return f"{kernel} kernel, {KERNEL_SUMS[kernel]} sums"


def plan_name(groups: tuple[int, ...], launch: Launch, columns: tuple[int, ...]) -> str:
    """`8+4 padded to 8+8, one launch`, `8+4, 2 launches on copies of Q`."""
    single = len(groups) > 1 and set(groups) == {1}
    written = f"{len(groups)} heads, each alone" if single else "+".join(map(str, groups))
    if columns != groups:
        written += f" padded to {'+'.join(map(str, columns))}"
    if launch == "one" or len(groups) == 1:
        return f"{written}, one launch"
    return f"{written}, {len(groups)} launches on {'copies of Q' if launch == 'each' else 'views'}"


def find_shape(text: str) -> ModelShape:
    """A GGUF file, an engine's name of an architecture, or what `verify.kernels.plans.shapes` takes.

    Raises SpecError or ModelError.
    """
    if text.endswith(".gguf") or Path(text).is_file():
        return _shape_of_file(text)
    if text in ARCHITECTURE_SHAPES:
        return shape_named(ARCHITECTURE_SHAPES[text])._replace(name=text)
    try:
        return shape_named(text)
    except SpecError:
        if text.partition("@")[0] in SHAPES or text[:1].isdigit():
            raise
        known = list(dict.fromkeys([*ARCHITECTURE_SHAPES, *SHAPES]))
        raise SpecError(
            f"--arch {text}: unknown architecture{nearest(text, known)}"
            f" (known: {', '.join(known)}, heads such as 96/8x128, or a GGUF file)"
        ) from None


def find_windowed(text: str, shape: ModelShape) -> ModelShape | None:
    """The shape of a model's windowed layers, where it has both kinds and their heads are not those of
    `shape`, which `find_shape` gave; else None."""
    if text.endswith(".gguf") or Path(text).is_file():
        return _windowed_of_file(text, shape)
    return SHAPES.get(f"{ARCHITECTURE_SHAPES.get(text, text)}-window")


def _windowed_of_file(text: str, shape: ModelShape) -> ModelShape | None:
    file = GGUFFile.open(locate_model(text))
    name = file.architecture
    window = file.get(f"{name}.attention.sliding_window") if name in WINDOWED_ARCHITECTURES else None
    pattern = file.get(f"{name}.attention.sliding_window_pattern")
    if not window or not isinstance(pattern, np.ndarray) or not any(pattern) or all(pattern):
        return None
    counts = [
        [int(x) for x, windowed in zip(listed, pattern, strict=False) if windowed]
        if isinstance(listed := file.get(f"{name}.attention.{key}"), np.ndarray)
        else []
        for key in ("head_count", "head_count_kv")
    ]
    q, kv = (max(of, default=own) for of, own in zip(counts, shape.heads[:2], strict=True))
    k_size = file.get(f"{name}.attention.key_length_swa", shape.k_size)
    v_size = file.get(f"{name}.attention.value_length_swa", shape.v_size)
    heads = Heads(q, kv, k_size, v_size)
    if min(heads) < 1 or q % kv or heads == shape.heads:
        return None
    return shape._replace(heads=heads, sliding_window=int(window))


def _shape_of_file(text: str) -> ModelShape:
    """Heads and sizes from a file's metadata alone: an architecture that cannot be run has a plan too."""

    file = GGUFFile.open(locate_model(text))
    name = file.architecture
    pattern = file.get(f"{name}.attention.sliding_window_pattern")
    seeing_all = [not x for x in pattern] if isinstance(pattern, np.ndarray) else None
    heads = _one_number(file.require(f"{name}.attention.head_count", object), seeing_all)
    kv_heads = _one_number(file.get(f"{name}.attention.head_count_kv", heads), seeing_all)
    width = file.get(f"{name}.embedding_length", 0)
    k_size = file.get(f"{name}.attention.key_length", width // heads if heads else 0)
    v_size = file.get(f"{name}.attention.value_length", k_size)
    if file.get(f"{name}.attention.kv_lora_rank") is not None and "blk.0.attn_k_b.weight" in file.tensors:
        # Multi-head latent attention over the cache: one latent KV head, V a part of K.
        kv_heads = 1
    if min(heads, kv_heads, k_size, v_size) < 1 or heads % kv_heads:
        raise ModelError(
            f"{file.path}: {heads} heads over {kv_heads} of size {k_size}/{v_size}: no attention"
        )
    window = file.get(f"{name}.attention.sliding_window") if name in WINDOWED_ARCHITECTURES else None
    return ModelShape(
        name=file.path.name,
        heads=Heads(heads, kv_heads, k_size, v_size),
        sliding_window=int(window) if window else None,
        sinks=any(t.endswith("attn_sinks.weight") for t in file.tensors),
        v_in_k=kv_heads == 1 and k_size > v_size,
    )


def _one_number(value: Any, of: Sequence[bool] | None = None) -> int:
    """A number a model, or the largest of one a layer; of: the layers that count, where there are such."""
    if isinstance(value, int):
        return value
    counted = [int(x) for x, yes in zip(value, of, strict=False) if yes] if of is not None else []
    return max(counted or map(int, value), default=0)


def plan_at(policy: Policy, setting: Setting, n_kv: int) -> PlanAt:
    """What `policy` runs for one generated token with n_kv visible keys."""
    call = setting.call(n_kv)
    found = policy.launched(call)
    own = setting.shape._replace(heads=setting.shape.heads.with_kv(call.kv_heads_a_gpu))
    numbers = own.cache_bytes(call.n_kv_padded, 1)
    walked = len(found.head_groups) * 2 * numbers
    if setting.cache_type in ("f16", "bf16"):
        read, written = walked, 0
    else:
        read, written = walked + int(numbers * bits_per_number(setting.cache_type) / 8), 2 * numbers
    return PlanAt(
        policy=policy.name,
        n_kv=n_kv,
        head_groups=found.head_groups,
        launch=found.launch,
        kernel=found.kernel,
        columns=found.columns,
        waste=1 - setting.shape.ratio / sum(found.columns),
        bytes_read=read,
        bytes_written=written,
    )


@cache
def stretches(policy: Policy, setting: Setting) -> tuple[Stretch, ...]:
    """The plans of a policy from short to long, each with the length from which it runs."""
    found: list[Stretch] = []
    decides: PolicyRule | None = None
    for padded in range(N_KV_PADDING, LONGEST + 1, N_KV_PADDING):
        call = setting.call(padded)
        if (rule := policy.rule_of(call)) is decides:
            continue
        decides, ran = rule, policy.launched(call)
        here = Stretch(
            from_n_kv=padded - N_KV_PADDING + 1,
            padded=padded,
            head_groups=ran.head_groups,
            launch=ran.launch,
            kernel=ran.kernel,
            columns=ran.columns,
        )
        if not found or found[-1].runs != here.runs:
            found.append(here)
    return tuple(found)


def changes(before: Policy, after: Policy, setting: Setting) -> list[Change]:
    """Where two policies run different things, from short to long; empty where they never do.

    A length at which only the old one, or only the new one, changes its plan begins a change of its own.
    """
    old, new = stretches(before, setting), stretches(after, setting)
    found: list[Change] = []
    for padded in sorted({s.padded for s in (*old, *new)}):
        a, b = ([s for s in plans if s.padded <= padded][-1] for plans in (old, new))
        if a.runs != b.runs:
            found.append(Change(padded - N_KV_PADDING + 1, padded, a, b))
    return found


def plans_json(setting: Setting, policies: Sequence[Policy], n_kvs: Sequence[int]) -> dict[str, Any]:
    """All of it, as `verify plan --json` prints it."""
    s = setting.shape
    return {
        "schema": 1,
        "command": "plan",
        "shape": s.to_json(),
        "windowed_shape": setting.windowed.to_json() if setting.windowed is not None else None,
        "cache_type": setting.cache_type,
        "gpus": setting.gpus,
        "split_mode": setting.split_mode,
        "kv_heads_a_gpu": setting.kv_heads_a_gpu,
        "n_q": setting.n_q,
        "generation": setting.generation,
        "versions": [
            {
                "before": a,
                "after": b,
                "layers": kind,
                "changes": [
                    {
                        "from_n_kv": c.from_n_kv, "padded": c.padded,
                        "before": c.before.name, "before_kernel": c.before.kernel,
                        "after": c.after.name, "after_kernel": c.after.kernel,
                    }
                    for c in changes(POLICIES[a], POLICIES[b], one)
                ],
            }
            for names in VERSIONS
            for a, b in pairwise(names)
            for kind, one in setting.layer_kinds.items()
        ],
        "policies": [
            {
                "policy": policy.name,
                "summary": policy.summary,
                "starts": [
                    {**x._asdict(), "plan": x.name} for x in stretches(policy, setting)
                ],
                "plans": [
                    {**p._asdict(), "plan": p.name, "walks": p.walks}
                    for p in (plan_at(policy, setting, n) for n in n_kvs)
                ],
            }
            for policy in policies
        ],
    }  # fmt: skip


def setting_of(
    arch: str, cache_type: str, gpus: int, split_mode: str, *, n_q: int = 1, gpu: str = "ada"
) -> Setting:
    """The setting that options name. Raises UsageError, SpecError or ModelError."""
    if cache_type not in (known := (*PLAIN_BITS, *CACHE_TYPES)):
        raise UsageError(f"--cache-type {cache_type}: expected one of {', '.join(known)}")
    if gpus < 1:
        raise UsageError(f"--gpus {gpus}: expected at least 1")
    if split_mode not in ("layer", "graph"):
        raise UsageError(f"--split-mode {split_mode}: expected layer or graph")
    shape = find_shape(arch)
    if split_mode == "graph" and shape.kv_heads % gpus and shape.kv_heads > 1:
        raise UsageError(
            f"--gpus {gpus}: {shape.kv_heads} KV heads are not equal shares for {gpus} GPUs, and a plan is"
            " that of one GPU (verify ppl runs unequal shares)"
        )
    if n_q < 1:
        raise UsageError(f"--n-q {n_q}: expected query tokens from 1")
    if gpu not in GENERATIONS:
        raise UsageError(f"--gpu {gpu}: expected one of {', '.join(GENERATIONS)}")
    mode: SplitMode = "graph" if split_mode == "graph" else "layer"
    windowed = find_windowed(arch, shape)
    return Setting(
        shape=shape if windowed is None else shape._replace(sliding_window=None),
        cache_type=cache_type,
        gpus=gpus,
        split_mode=mode,
        n_q=n_q,
        generation=gpu,
        windowed=windowed,
    )


def chosen_policies(names: Sequence[str] | None) -> list[Policy]:
    """The named policies, all for none. Raises SpecError."""
    return [policy_named(name) for name in dict.fromkeys(names)] if names else list(POLICIES.values())
