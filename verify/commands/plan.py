"""`verify plan`: which plan every policy runs at which length."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from verify.commands import options
from verify.engines.plans import chosen_policies, plans_json, setting_of
from verify.kernels.plans.asked import GENERATIONS
from verify.machine.command_line import parse_lengths
from verify.machine.jsontext import to_json_text
from verify.reports.plan import print_plans, print_setting, print_versions

DEFAULT_N_KV = "4096,8192,16384,32768,65536"


def command(
    arch: Annotated[
        str,
        typer.Option("--arch", "--shape", "-m", help="glm4moe, glm-4.5-air, 96/8x128, or a GGUF file"),
    ] = "glm4moe",
    n_kv: Annotated[
        str | None,
        typer.Option("--n-kv", help="lengths, comma between: a table of every policy's plan there"),
    ] = None,
    cache_type: Annotated[str, typer.Option("--cache-type", "-ctk", help="f16, q8_0, q4_0 ...")] = "f16",
    gpus: options.Gpus = 1,
    split_mode: options.SplitMode = "layer",
    policy: Annotated[
        list[str] | None,
        typer.Option("--policy", help="its own plans; may be repeated (verify list names them)"),
    ] = None,
    n_q: Annotated[int, typer.Option("--n-q", help="query tokens a call")] = 1,
    gpu: Annotated[str, typer.Option("--gpu", help=", ".join(GENERATIONS))] = "ada",
    json_: options.Json = False,
) -> int:
    """Print; exit 0."""
    setting = setting_of(arch, cache_type, gpus, split_mode, n_q=n_q, gpu=gpu)
    policies, lengths = chosen_policies(policy), parse_lengths(n_kv or DEFAULT_N_KV)
    screen = sys.stderr if json_ else sys.stdout
    print_setting(setting, screen)
    if policy is None:
        print_versions(setting, screen)
    if policy is not None or n_kv is not None:
        print_plans(setting, policies, lengths if n_kv is not None else [], screen)
    if json_:
        print(to_json_text(plans_json(setting, policies, lengths)), end="")
    return 0
