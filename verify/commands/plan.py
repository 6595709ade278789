"""`verify plan`: which plan every policy runs at which length."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from verify.commands import options
from verify.engines.plans import Setting, chosen_policies, find_shape, plans_json
from verify.kernels.cache_types import CACHE_TYPES, PLAIN_BITS
from verify.machine.errors import UsageError
from verify.machine.jsontext import to_json_text
from verify.reports.plan import print_plans

DEFAULT_N_KV = "4096,8192,16384,32768,65536"


def command(
    arch: Annotated[
        str,
        typer.Option("--arch", "--shape", "-m", help="glm4moe, glm-4.5-air, 96/8x128, or a GGUF file"),
    ] = "glm4moe",
    n_kv: Annotated[str, typer.Option("--n-kv", help="lengths, comma between")] = DEFAULT_N_KV,
    cache_type: Annotated[str, typer.Option("--cache-type", "-ctk", help="f16, q8_0, q4_0 ...")] = "f16",
    gpus: options.Gpus = 1,
    split_mode: options.SplitMode = "layer",
    policy: Annotated[
        list[str] | None,
        typer.Option("--policy", help="may be repeated; default all (verify list names them)"),
    ] = None,
    json_: options.Json = False,
) -> int:
    """Print; exit 0."""
    setting = setting_of(arch, cache_type, gpus, split_mode)
    policies, lengths = chosen_policies(policy), options.parse_lengths(n_kv)
    print_plans(setting, policies, lengths, sys.stderr if json_ else sys.stdout)
    if json_:
        print(to_json_text(plans_json(setting, policies, lengths)), end="")
    return 0


def setting_of(arch: str, cache_type: str, gpus: int, split_mode: str) -> Setting:
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
    return Setting(shape, cache_type, gpus, "graph" if split_mode == "graph" else "layer")
