"""Scripts that stand for a build's llama-perplexity: they write a logits file from the format's table."""

from __future__ import annotations

import sys
from pathlib import Path

_SCRIPT = """#!{python}
import math, random, struct, sys, time
option = dict(zip(sys.argv[1::2], sys.argv[2::2]))
n_ctx, chunks = int(option["-c"]), int(option["--chunks"])
assert (option["-b"], option["-ub"]) == ("1", "1")
text = open(option["-f"], "rb").read()
n_vocab, kind, noise = 257, {kind!r}, {noise!r}
print("loading", option["-m"], flush=True)
if kind == "hangs":
    time.sleep(600)
if kind == "dies":
    import os, signal
    print("ggml_cuda error", file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGSEGV)
tokens = list(text[: n_ctx * chunks])
if kind == "other tokens":
    tokens[n_ctx + 3] ^= 1
random.seed(int(option.get("--seed", 0)))
wobble = random.Random(7)
with open(option["--kl-divergence-base"], "wb") as out:
    out.write(b"_logits_" + struct.pack("<3i", n_ctx, n_vocab, chunks))
    out.write(struct.pack(f"<{{len(tokens)}}i", *tokens))
    for chunk in range(chunks):
        for _ in range(n_ctx - 1 - n_ctx // 2):
            codes = [random.randrange(30000) for _ in range(n_vocab)]
            if noise:
                codes = [c + wobble.randrange(noise) for c in codes]
            low = -math.log(sum(math.exp(3e-4 * c) for c in codes))
            out.write(struct.pack("<2f", 3e-4, low) + struct.pack(f"<{{n_vocab}}H", *codes) + bytes(2))
        out.flush()
        print(f"[{{chunk + 1}}]12.3456,", end="", flush=True)
        if kind == "fails half-way" and chunk == chunks // 2:
            print("\\nCUDA error: an illegal memory access was encountered", file=sys.stderr, flush=True)
            sys.exit(3)
        if kind == "stops half-way" and chunk == chunks // 2:
            sys.exit(0)
print("\\nFinal estimate: PPL = 12.3456 +/- 0.1")
"""


def write_engine(folder: Path, kind: str = "correct", *, noise: int = 0) -> Path:
    """A build folder with bin/llama-perplexity of this kind."""
    program = folder / "bin" / "llama-perplexity"
    program.parent.mkdir(parents=True)
    program.write_text(_SCRIPT.format(python=sys.executable, kind=kind, noise=noise))
    program.chmod(0o755)
    return folder
