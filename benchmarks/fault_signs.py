"""The signs of every known fault under several plans: writes what `verify.diff.naming` reads.


python benchmarks/fault_signs.py
"""

from __future__ import annotations

from pathlib import Path

import torch

from verify.diff.naming import STORED, computed_library, stored_form


def main() -> None:
    torch.set_num_threads(1)
    known = computed_library()
    path = Path(__file__).parents[1] / "verify/diff" / STORED
    path.write_text(stored_form(known), encoding="utf-8")
    print(f"{len(known)} sets of signs of {len({each.fault for each in known})} faults: {path}")


if __name__ == "__main__":
    main()
