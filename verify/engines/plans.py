"""Which plan a policy runs at which length, and what that costs: KV walks, padded columns, bytes.

Sizes are of one GPU, one layer and one generated token. Every head group reads the cache once (a walk); a
group's columns fill a tile of the matrix product, padded to a power of two (in llama.cpp to its groups of 8);
a quantised cache is first expanded to float16 (read once, written once), and the walks read that. A policy's
conditions compare lengths padded to 256. These are predictions from the engines' rules, not measurements.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from verify.kernels.cache_types import bits_per_number
from verify.kernels.errors import SpecError, nearest
from verify.kernels.plans.policy import (
    N_KV_PADDING,
    POLICIES,
    CallShape,
    Launch,
    Policy,
    SplitMode,
    policy_named,
)
from verify.kernels.plans.shapes import SHAPES, ModelShape, shape_named

# What engines' names of architectures stand for here; other sizes of a family have shapes of their own.
ARCHITECTURE_SHAPES = {
    "glm4moe": "glm-4.5",
    "deepseek2": "glm-4.7-flash",
    "llama": "llama-3-8b",
    "qwen2": "qwen2.5-7b",
    "gemma3": "gemma-3",
    "gpt-oss": "gpt-oss",
}
LONGEST = 1 << 20
MAINLINE_COLUMNS = 8


class Setting(NamedTuple):
    """What does not change with the length."""

    shape: ModelShape
    cache_type: str = "f16"
    gpus: int = 1
    split_mode: SplitMode = "layer"

    @property
    def kv_heads_a_gpu(self) -> int:
        return self.call(1).kv_heads_a_gpu

    def call(self, n_kv: int) -> CallShape:
        s = self.shape
        return CallShape(
            s.ratio, s.kv_heads, s.k_size, s.v_size, 1, n_kv, self.cache_type, s.sinks,
            s.sliding_window is not None, self.gpus, self.split_mode,
        )  # fmt: skip


class PlanAt(NamedTuple):
    """A policy's plan at one length. waste: share of the tiles' columns that no head fills."""

    policy: str
    n_kv: int
    head_groups: tuple[int, ...]
    launch: Launch
    columns: tuple[int, ...]
    waste: float
    bytes_read: int
    bytes_written: int

    @property
    def name(self) -> str:
        return plan_name(self.head_groups, self.launch, self.columns)

    @property
    def walks(self) -> int:
        """How often the cache is read."""
        return len(self.head_groups)


class Stretch(NamedTuple):
    """A plan and the keys that it starts at; `padded` is the length that the policy compares."""

    from_n_kv: int
    padded: int
    head_groups: tuple[int, ...]
    launch: Launch
    columns: tuple[int, ...]

    @property
    def name(self) -> str:
        return plan_name(self.head_groups, self.launch, self.columns)


def plan_name(groups: tuple[int, ...], launch: Launch, columns: tuple[int, ...]) -> str:
    """`8+4 padded to 8+8, one launch`, `8+4, 2 launches on copies of Q`."""
    written = "+".join(map(str, groups))
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


def _shape_of_file(text: str) -> ModelShape:
    from verify.model.architectures import architecture_of
    from verify.model.gguf.file import GGUFFile
    from verify.model.locate import locate_model

    file = GGUFFile.open(locate_model(text))
    sizes = architecture_of(file).sizes
    latent = file.architecture == "deepseek2" and sizes.kv_heads == 1
    return ModelShape(file.path.name, sizes.heads, sizes.kv_heads, sizes.k_size, sizes.v_size, v_in_k=latent)


def plan_at(policy: Policy, setting: Setting, n_kv: int) -> PlanAt:
    """What `policy` runs for one generated token with n_kv visible keys."""
    call = setting.call(n_kv)
    groups, launch = policy.head_groups(call)
    columns = tuple(_padded(policy, g) for g in groups)
    own = setting.shape._replace(
        kv_heads=call.kv_heads_a_gpu, q_heads=call.kv_heads_a_gpu * setting.shape.ratio
    )
    numbers = own.cache_bytes(call.n_kv_padded, 1)
    walked = len(groups) * 2 * numbers
    if setting.cache_type in ("f16", "bf16"):
        read, written = walked, 0
    else:
        read, written = walked + int(numbers * bits_per_number(setting.cache_type) / 8), 2 * numbers
    return PlanAt(
        policy.name, n_kv, groups, launch, columns, 1 - setting.shape.ratio / sum(columns), read, written
    )


def stretches(policy: Policy, setting: Setting) -> list[Stretch]:
    """The plans of a policy from short to long, each with the length from which it runs."""
    found: list[Stretch] = []
    for padded in range(N_KV_PADDING, LONGEST + 1, N_KV_PADDING):
        groups, launch = policy.head_groups(setting.call(padded))
        if not found or (found[-1].head_groups, found[-1].launch) != (groups, launch):
            columns = tuple(_padded(policy, g) for g in groups)
            found.append(Stretch(padded - N_KV_PADDING + 1, padded, groups, launch, columns))
    return found


def plans_json(setting: Setting, policies: Sequence[Policy], n_kvs: Sequence[int]) -> dict[str, Any]:
    """All of it, as `verify plan --json` prints it."""
    s = setting.shape
    return {
        "schema": 1,
        "command": "plan",
        "shape": {**s._asdict(), "ratio": s.ratio},
        "cache_type": setting.cache_type,
        "gpus": setting.gpus,
        "split_mode": setting.split_mode,
        "kv_heads_a_gpu": setting.kv_heads_a_gpu,
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


def chosen_policies(names: Sequence[str] | None) -> list[Policy]:
    """The named policies, all for none. Raises SpecError."""
    return [policy_named(name) for name in dict.fromkeys(names)] if names else list(POLICIES.values())


def _padded(policy: Policy, group: int) -> int:
    if policy.name == "mainline" and group < MAINLINE_COLUMNS:
        return MAINLINE_COLUMNS
    return 1 << (group - 1).bit_length()
