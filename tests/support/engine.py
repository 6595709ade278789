"""Scripts that stand for a build's llama-perplexity: they write a logits file from the format's table.

They parse their options as the real program does: an option that is not in the table below, or one that lacks
its value, ends them with exit code 1 before anything is loaded.
"""

from __future__ import annotations

import sys
from pathlib import Path

_SCRIPT = """#!{python}
import math, os, random, signal, struct, sys, time
kind, noise, unified = {kind!r}, {noise!r}, {unified!r}
words = sys.argv[1:]
if kind == "no library":
    print("error while loading shared libraries: libggml.so: cannot open shared object file", file=sys.stderr)
    sys.exit(127)
if unified:
    if not words or words[0] not in ("perplexity", "--version"):
        print("Usage: llama <command> [options]")
        sys.exit(1)
    words = words[words[0] == "perplexity":]
# Option -> what its value is called in the help; empty for a flag.
TABLE = {{
    "-m,    --model": "FNAME", "-f,    --file": "FNAME", "-c,    --ctx-size": "N", "--chunks": "N",
    "-b,    --batch-size": "N", "-ub,   --ubatch-size": "N", "--kl-divergence-base": "FNAME",
    "-ngl,  --gpu-layers, --n-gpu-layers": "N", "-s,    --seed": "SEED", "-ctk,  --cache-type-k": "TYPE",
    "-ctv,  --cache-type-v": "TYPE", "-ot,   --override-tensor": "<pattern>=<type>,...",
    "-ncmoe, --n-cpu-moe": "N", "-t,    --threads": "N", "--kl-divergence": "", "-h,    --help, --usage": "",
    "--version": "", "-fa,   --flash-attn": "" if kind == "old" else "[on|off|auto]",
}}
arity = {{name.strip(): bool(value) for names, value in TABLE.items() for name in names.split(",")}}
option = {{}}
while words:
    word = words.pop(0)
    if word not in arity:
        print("error: invalid argument: " + word, file=sys.stderr)
        sys.exit(1)
    if arity[word] and not words:
        print(f'error while handling argument "{{word}}": expected value for argument', file=sys.stderr)
        sys.exit(1)
    option[word] = words.pop(0) if arity[word] else True
    if word == "-fa" and arity[word] and option[word] not in ("on", "off", "auto"):
        print('error while handling argument "-fa": unknown value for --flash-attn', file=sys.stderr)
        sys.exit(1)
if "--version" in option:
    print("version: 4321 (abc1234)\\nbuilt with a compiler", file=sys.stderr)
    sys.exit(0)
if "--help" in option:
    print("----- common params -----\\n")
    for names, value in TABLE.items():
        print(f"{{names}} {{value}}".ljust(40) + "what it is for, and its default (default: 0)")
    sys.exit(0)
n_ctx, chunks = int(option["-c"]), int(option["--chunks"])
batch = int(option.get("-ub", 512))
assert option.get("-b", "2048") == str(batch) or "-b" not in option
text = open(option["-f"], "rb").read()
n_vocab = 257
print("loading", option["-m"], flush=True)
if kind == "out of memory":
    print("ggml_backend_cuda_buffer_type_alloc_buffer: cudaMalloc failed: out of memory", file=sys.stderr)
    sys.exit(1)
if kind == "hangs":
    time.sleep(600)
tokens = list(text[: n_ctx * chunks])
if kind == "other tokens":
    tokens[n_ctx + 3] ^= 1
random.seed(int(option.get("--seed", 0)))
wobble = random.Random(7)
print(f"perplexity: calculating perplexity over {{chunks}} chunks, batch_size={{batch}}, n_seq=1", flush=True)
if kind == "dies":
    print("ggml_cuda error", file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGSEGV)
if kind == "out of memory in a window":
    print("CUDA error: out of memory", file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGABRT)
if kind == "hangs in a window":
    time.sleep(600)
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


def write_engine(folder: Path, kind: str = "correct", *, noise: int = 0, unified: bool = False) -> Path:
    """A build folder with bin/llama-perplexity of this kind, or with the unified bin/llama."""
    program = folder / "bin" / ("llama" if unified else "llama-perplexity")
    program.parent.mkdir(parents=True)
    program.write_text(_SCRIPT.format(python=sys.executable, kind=kind, noise=noise, unified=unified))
    program.chmod(0o755)
    return folder
