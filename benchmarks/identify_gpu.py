"""`identify_table.py` on a GPU: our kernel, torch's, and ggml's CUDA kernels where a library is named.

    python benchmarks/identify_gpu.py [--ggml "ggml CUDA 0.12.0=/path/libggml.so"] [--shape 96/8x128]
        [--only "NAME;..."] [--seconds 20]

With r above 4, as glm-4.5-air's 96/8x128 has it, mainline's switch of kernels shows.
"""

from __future__ import annotations

import sys

from identify_table import main

if __name__ == "__main__":
    sys.exit(main(["--device", "cuda", *sys.argv[1:]]))
