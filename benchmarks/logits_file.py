"""How fast `verify kld` reads logits files, and in how much memory, beside a plain read of the same files.

    python benchmarks/logits_file.py --folder /tmp [--gigabytes 2] [--out benchmarks/results/logits-file.json]

Writes two files of that size with a vocabulary of 49,152 (the second is the first with codes moved by up to
3), and removes them. A plain read is `readinto` of the same blocks and nothing else, once before and once
after: neither side has the page cache to itself. Each command runs in a process of its own.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from commit import commit, write_result

from verify.engines.logits_file import BLOCK_BYTES, LogitsWriter, encode
from verify.machine.environment import describe

N_CTX, N_VOCAB = 512, 49152


def write_pair(folder: Path, size: int) -> tuple[Path, Path]:
    """Two files of about `size` bytes: the records of one window, again and again."""
    rng = np.random.default_rng(0)
    scored = N_CTX - 1 - N_CTX // 2
    chunks = max(round(size / (scored * (8 + 2 * N_VOCAB))), 1)
    tokens = rng.integers(0, N_VOCAB, (chunks, N_CTX)).astype(np.int32)
    records = encode(rng.normal(0, 3, (scored, N_VOCAB)).astype(np.float32))
    moved = records.copy()
    codes = moved.view("<u2")[:, 4:]
    codes[:] = np.clip(codes.astype(np.int32) + rng.integers(-3, 4, codes.shape), 0, 65535)
    paths = folder / "a.kld", folder / "b.kld"
    for path, content in zip(paths, (records, moved), strict=True):
        with LogitsWriter(path, tokens, N_VOCAB):
            pass
        with path.open("r+b") as f:
            f.seek(20 + 4 * tokens.size)
            for _ in range(chunks):
                f.write(content.data)
    return paths


def plain_read(paths: list[Path]) -> float:
    """Seconds to read the files through one buffer."""
    buffer = bytearray(BLOCK_BYTES)
    started = time.perf_counter()
    for path in paths:
        with path.open("rb", buffering=0) as f:
            while f.readinto(buffer):
                pass
    return time.perf_counter() - started


def kld(paths: list[Path]) -> dict[str, float]:
    """`verify kld` of the files: seconds, processor seconds, and the most memory it held."""
    code = (
        "import sys; sys.argv[0] = 'verify'\n"
        "from verify.__main__ import main\n"
        "try: main()\nexcept SystemExit: pass\n"
        # Not ru_maxrss, which a child has from its parent.
        "line = next(x for x in open('/proc/self/status') if x.startswith('VmHWM:'))\n"
        "print(int(line.split()[1]) * 1024, file=sys.stderr)\n"
    )
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    command = [sys.executable, "-c", code, "kld", *map(str, paths)]
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=True)
    seconds, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "seconds": seconds,
        "processor_seconds": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        "bytes_per_second": sum(p.stat().st_size for p in paths) / seconds,
        "most_memory_bytes": int(done.stderr.split()[-1]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        a, b = write_pair(Path(folder), int(arguments.gigabytes * 1e9))
        both = a.stat().st_size + b.stat().st_size
        read = plain_read([a, b])
        result = {
            "command": " ".join(["python", *sys.argv]),
            "commit": commit(),
            "environment": describe("cpu"),
            "load_average": os.getloadavg(),
            "file_bytes": a.stat().st_size,
            "plain_read_bytes_per_second": both / read,
            "one_file": kld([a]),
            "two_files": kld([a, b]),
            "plain_read_again_bytes_per_second": both / plain_read([a, b]),
        }
    write_result(result, arguments.out)


if __name__ == "__main__":
    main()
