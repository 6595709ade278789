"""What caches cost a model: `verify ppl --caches`, and the same caches in llama.cpp on the same windows.

    python benchmarks/caches.py -f wiki.test.raw --chunks 2 --run RUN [--engine] [--out FILE.json]

RUN: the folder of a finished `verify ppl --caches ...`, whose table is stored. --engine: asks the engine of
the wheel xllamacpp too, a window at a time, for its logits over float16, q8_0, q8_0/q4_0 and q4_0, the
quantised ones rotated by its own rule and not; its divergences are to its own float16 cache, so that its
rounding of activations is in both.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from commit import commit

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

# Types of K and V, and whether the engine's rule of rotation is on.
ASKED = (
    (("q8_0", "q8_0"), True),
    (("q8_0", "q4_0"), True),
    (("q4_0", "q4_0"), True),
    (("q4_0", "q4_0"), False),
)


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64)
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def of_engine(model: Path, windows: np.ndarray, first: int) -> list[dict[str, Any]]:
    """Divergence, top-1 changes and difference of nll of each cache to float16's; windows [W, n_ctx]."""
    from support.model_engine import model_engine

    engine = model_engine()
    sums: dict[str, list[np.ndarray]] = {}
    for window in windows:
        targets = window[first + 1 :]
        base = log_softmax(engine.logits(model, window, cache=("f16", "f16"))[first:-1])
        rows = np.arange(len(targets))
        for types, rotated in ASKED:
            found = log_softmax(engine.logits(model, window, cache=types, rotated=rotated)[first:-1])
            kld = (np.exp(base) * (base - found)).sum(-1)
            changed = base.argmax(-1) != found.argmax(-1)
            nll = base[rows, targets] - found[rows, targets]
            name = ("/".join(dict.fromkeys(types))) + ("+rotate=mainline" if rotated else "")
            sums.setdefault(name, []).append(np.stack([kld, changed, nll]))
            print(f"{name}: {kld.mean():.3e}", file=sys.stderr, flush=True)
    engine.close()
    records = []
    for name, parts in sums.items():
        kld, changed, nll = np.concatenate(parts, 1)
        records.append(
            {
                "cache": name,
                "tokens": kld.size,
                "kld_mean": kld.mean(),
                "kld_se": kld.std(ddof=1) / np.sqrt(kld.size),
                "top1_changes": int(changed.sum()),
                "dlnppl": nll.mean(),
                "dlnppl_se": nll.std(ddof=1) / np.sqrt(nll.size),
            }
        )
    return records


def kld_errors(folder: Path, candidates: list[str]) -> dict[str, float]:
    """Standard error of each candidate's mean divergence to the baseline, tokens taken as independent."""
    tokens = pq.read_table(folder / "tokens.parquet", columns=["arm", "kld_to_baseline"])
    arms, kld = tokens["arm"].to_numpy(zero_copy_only=False), tokens["kld_to_baseline"].to_numpy()
    return {name: float(kld[arms == name].std(ddof=1) / np.sqrt((arms == name).sum())) for name in candidates}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-f", "--file", required=True)
    parser.add_argument("--chunks", type=int, default=2)
    parser.add_argument("-c", "--ctx", type=int, default=512)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--engine", action="store_true")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    run = json.loads((arguments.run / "run.json").read_text())
    pairs = {pair["candidate"]: pair for pair in run["pairs"]}
    errors = kld_errors(arguments.run, list(pairs))
    keys = (
        "distance_ratio",
        "distance_ratio_ci",
        "kld_mean",
        "dlnppl",
        "dlnppl_se",
        "top1_changes",
        "tokens",
    )
    ours = [
        {
            **{k: v for k, v in record.items() if k != "candidate"},
            **{key: pairs[record["candidate"]][key] for key in keys},
            "kld_se": errors[record["candidate"]],
        }
        for record in run["caches"]
    ]
    result: dict[str, Any] = {
        "command": " ".join(["python", *sys.argv]),
        "commit": commit(),
        "run_command": run["settings"],
        "model": Path(run["model"]["path"]).name,
        "environment": run["environment"],
        "baseline_ppl": next(arm["ppl"] for arm in run["arms"] if arm["role"] == "baseline"),
        "caches": ours,
    }
    if arguments.engine:
        from verify.data.corpora import read_any_text
        from verify.data.windows import cut_windows
        from verify.model.gguf.file import GGUFFile
        from verify.model.locate import locate_model
        from verify.model.tokenizer import Tokenizer

        path = locate_model(None)
        with GGUFFile.open(path) as file:
            tokenizer = Tokenizer.from_gguf(file)
            enough = arguments.chunks * arguments.ctx + 64
            corpus = read_any_text(arguments.file)
            ids = tokenizer.encode_texts(corpus.pieces(1 << 20), enough=enough)[0]
            bos = tokenizer.bos_id if tokenizer.add_bos else None
            result["weight_types"] = sorted({t.type_name for t in file.tensors.values()})
        windows = cut_windows(ids, n_ctx=arguments.ctx, chunks=arguments.chunks, bos_id=bos)
        result["engine"] = of_engine(path, windows.tokens, windows.first_scored)
    text = json.dumps(result, indent=1, default=float) + "\n"
    if arguments.out:
        arguments.out.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
