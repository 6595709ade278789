"""`verify doctor`: versions, device, which kernels can run here, who else claims our package's name."""

from __future__ import annotations

import sys

from verify.commands import options
from verify.machine.jsontext import to_json_text
from verify.reports.installation import doctor_json, print_doctor


def command(json_: options.Json = False) -> int:
    """Print what was found; exit 0."""
    import torch

    found = doctor_json("cuda" if torch.cuda.is_available() else "cpu")
    if json_:
        print(to_json_text(found), end="")
    else:
        print_doctor(found, sys.stdout)
    return 0
