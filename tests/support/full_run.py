"""A run's record with every section that `docs/run-json.md` knows, made from a run that measured fewer."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np


def with_every_section(run: dict[str, Any]) -> dict[str, Any]:
    """The same run, with invented figures where it has none of its own."""
    run = copy.deepcopy(run)
    rng = np.random.default_rng(0)
    names = [arm["name"] for arm in run["arms"] if arm["role"] in ("floor", "baseline", "candidate")]
    candidates = [pair["candidate"] for pair in run["pairs"]]
    for arm in run["arms"]:
        frozen = {"nll_mean": arm["nll_mean"], "kld_to_exact_mean": 5.7e-9}
        arm.setdefault("frozen", frozen if arm["name"] in names else None)
    edges = [0, 16, 32, 48, 64]
    run.setdefault(
        "drift",
        {
            "edges": edges,
            "arms": [
                {
                    "arm": name,
                    "layers": [
                        {
                            "layer": layer,
                            "relative": 1e-4 * layer,
                            "by_position": (1e-4 * rng.random(len(edges) - 1)).tolist(),
                        }
                        for layer in range(1, 6)
                    ],
                }
                for name in names
            ],
        },
    )
    run.setdefault(
        "by_n_kv",
        [
            {
                "candidate": name,
                "reference": "baseline",
                "n_kv_min": low,
                "n_kv_max": low + 15,
                "tokens": 96,
                "changed": 0.5,
                "frozen_kld": 6e-9,
                "frozen_kld_reference": 5e-9,
                "floor_kld": 5e-7,
                "kld_mean": 6e-7,
                "dnll": 1e-5,
                "dnll_se": None,
                "cost_nats": 1e-6,
            }
            for name in candidates
            for low in (33, 49)
        ],
    )
    run["top1_changes"] = run.get("top1_changes") or [
        {
            "candidate": candidates[0],
            "reference": "baseline",
            "window": 0,
            "position": 40,
            "n_kv": 41,
            "context": "a text <b>before</b> & a word_of_many_letters_without_a_blank" * 2,
            "target": " the",
            "reference_token": " <the>",
            "candidate_token": " a",
            "p_reference": [0.3101, 0.3099],
            "p_candidate": [0.3099, 0.3101],
            "p_exact": [0.31, 0.31],
            "margin": 4e-4,
            "floor": 1.1e-3,
            "margin_in_floors": 0.36,
        }
    ]
    run["noise"] = run.get("noise") or [
        {
            "reference": "baseline",
            "arms": [
                {
                    "name": f"noise-{i}",
                    "spec": f"eager:kv={i + 2}",
                    "theta": float(t),
                    "distance_ratio": None,
                    "distance_ratio_ci": None,
                    "dlnppl": 1e-5,
                    "kld_mean": 6e-7,
                    "top1_changes": 1,
                }
                for i, t in enumerate(0.03 * rng.standard_normal(8))
            ],
            "theta_mean": 0.0,
            "theta_sd": 0.03,
            "theta_limits": [-0.15, 0.15],
            "candidates": [
                {
                    "candidate": name,
                    "theta": 0.05,
                    "outside": False,
                    "rank": 4,
                    "dlnppl": 1e-5,
                    "dlnppl_outside": False,
                }
                for name in candidates
            ],
        }
    ]
    run["power"] = run.get("power") or {
        "reference": "baseline",
        "faults": [
            {
                "name": f"scale {size:g}",
                "kind": "scale",
                "size": size,
                "distance_ratio": 1 + 1e4 * size,
                "distance_ratio_ci": [1.0, None],
                "frozen_kld": 6e-9,
                "dnll": 1e-6,
                "dnll_se": 1e-5,
                "max_budget_ratio": 0.6,
                "rms_ratio": 0.9,
                "gain": size,
                "seen": {"budget": False, "rms": False, "gain": size > 1e-6, "distance": size > 1e-4},
            }
            for size in (1e-7, 1e-5, 1e-3)
        ],
        "smallest": {"budget": None, "gain": 1e-5, "distance": 1e-3, "nll": None},
    }
    for name in candidates:
        if not isinstance(run["detectable"].get(name), dict):
            run["detectable"][name] = {
                "distance_ratio": run["detectable"].get(name),
                "scale_by_gain": 7e-7,
                "dnll": 4e-5,
                "scale_by_nll": 2e-3,
                "logits_file_nats": 5e-4,
            }
    return run


def write_with_every_section(folder: Path, run: dict[str, Any]) -> None:
    """Write run.json of a folder, every section in it."""
    (folder / "run.json").write_text(json.dumps(with_every_section(run)))
