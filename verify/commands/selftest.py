"""`verify selftest`: the mutation score of this machine's detectors, and what the gates of others see."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from verify.commands import options
from verify.machine.environment import prepare_torch, usable_cpus
from verify.machine.jsontext import to_json_text


def command(
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="seeds to draw inputs with")] = 2,
    device: options.Device = None,
    json_: options.Json = False,
) -> int:
    """Run the command. Exit 0 if every fault is caught with every seed and no clean variant is, else 1."""
    from verify.machine.devices import chosen_device, default_device
    from verify.reports.progress import telling
    from verify.reports.selftest import print_result
    from verify.selftest import MOST_PROCESSES, run_selftest

    prepare_torch()
    chosen = str(chosen_device(device or default_device()))
    processes = min(usable_cpus(), MOST_PROCESSES) if chosen == "cpu" and hasattr(os, "fork") else 1
    with telling("selftest") as progress:
        result = run_selftest(seeds, device=chosen, processes=processes, progress=progress)
    print_result(result, sys.stderr if json_ else sys.stdout)
    if json_:
        print(to_json_text(result.to_json()), end="")
    return result.exit_code
