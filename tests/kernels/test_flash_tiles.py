"""Tile sizes by device limits: the estimate of shared memory against what Triton compiles."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from verify.kernels.flash.tiles import choose_tiles, split_head

# Shared memory that a program may ask for, by compute capability: an RTX 8000, an RTX 3090, an H100.
SHARED_BYTES = {75: 65_536, 86: 101_376, 90: 232_448}
# ratio, k size, v size, tokens of a tile (None: as many as do), keys of a page, whether rows share it
SHAPES = [
    (12, 128, 128, 1, 0, False), (4, 80, 80, 1, 0, False), (20, 576, 512, 1, 0, False),
    (12, 128, 128, None, 0, False), (12, 128, 128, 4, 16, False), (3, 64, 64, 1, 0, True),
]  # fmt: skip

COMPILE = """
import json, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from verify.kernels.flash import device as code
from verify.kernels.flash.tiles import choose_tiles, shared_bytes, split_head

for capability, ratio, k_size, v_size, tokens, page, shared, limit in json.loads(sys.argv[1]):
    cores = capability >= 80
    plain = tokens is None
    copied = plain and capability >= 90
    tiles = choose_tiles(ratio, k_size, v_size, tokens=tokens, block=64, item_size=2, v_is_k=False,
                         shared_limit=limit, tensor_cores=cores)
    if tiles is None:
        print(json.dumps([capability, k_size, tokens, None, None, None]))
        continue
    dk, dv = split_head(k_size, tiles.rows), split_head(v_size, tiles.rows)
    constants = dict(DK=k_size, DK1=dk.first, DK2=dk.rest, DV=v_size, DV1=dv.first, DV2=dv.rest, V_IS_K=False,
                     M=tiles.rows, TILE=tiles.keys, BLOCK=64, DECODE=tokens == 1 and not shared,
                     SEVERAL=shared or (tokens or 0) > 1, AS_ALONE=shared, PACKED=page > 0, PAGE=page,
                     LISTED=False, MASK=0, P_TYPE=code.tl.float16, ACC_F16=False, SOFTCAP=not plain,
                     WINDOW=not plain, ALIBI=not plain, COPIED=copied, OVERLAP=capability >= 90)
    unused = ("listed", "last_key", "mask") + (() if page else ("tile_rows", "table"))
    unused += () if copied else ("k_tiles", "v_tiles")
    constants |= dict.fromkeys(unused)
    names = code.attend_tiles.arg_names
    types = dict.fromkeys(("kv_len", "groups", "tile_rows", "table"), "*i32")
    types |= {"logit_scale": "fp32", "softcap": "fp32"}
    for name, size in (("k_tiles", k_size), ("v_tiles", v_size)):
        types[name] = f"tensordesc<fp16[{tiles.keys}, {size}]>"
    types |= {name: "*fp16" for name in "qkv"} | {name: "*fp32" for name in ("alibi", "out", "lse")}
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    aligned = {"q", "k", "v", "out"} | {f"{x}_{y}" for x in "qkv" for y in "bths"}
    attrs = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name in aligned}
    source = ASTSource(fn=code.attend_tiles, signature=signature, attrs=attrs,
                       constexprs={(names.index(name),): value for name, value in constants.items()})
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32),
                              options={"num_warps": tiles.warps, "num_stages": tiles.stages})
    estimate = shared_bytes(tiles, k_size, v_size, 2, False, tensor_cores=cores)
    print(json.dumps([capability, k_size, tokens, list(tiles), compiled.metadata.shared, estimate]))
"""


def test_head_sizes_are_split_into_powers_of_two() -> None:
    sizes = (64, 72, 80, 96, 128, 192, 256, 576)
    assert [tuple(split_head(size)) for size in sizes] == [
        (64, 0), (64, 16), (64, 16), (64, 32), (128, 0), (128, 64), (256, 0), (512, 64)
    ]  # fmt: skip
    assert [tuple(split_head(size, rows=64)) for size in (32, 64, 80, 96, 128, 192, 576)] == [
        (64, 0), (64, 0), (64, 64), (64, 64), (128, 0), (128, 64), (512, 64)
    ]  # fmt: skip


def test_tiles_do_not_depend_on_what_a_plan_varies() -> None:
    """Head groups, cuts and lengths are not even asked for; the block bounds the keys a tile."""
    for block, keys in ((16, 16), (48, 16), (64, 64), (96, 32)):
        tiles = choose_tiles(
            12, 128, 128, tokens=1, block=block, item_size=2, v_is_k=False, shared_limit=SHARED_BYTES[90]
        )
        assert tiles is not None
        assert (tiles.rows, tiles.keys) == (16, keys)
        assert block % tiles.keys == 0


@pytest.mark.parametrize(("ratio", "rows"), [(1, 16), (12, 16), (16, 16), (17, 32), (20, 32), (33, 64)])
def test_rows_of_a_decode_tile_are_the_ratio_padded(ratio: int, rows: int) -> None:
    tiles = choose_tiles(
        ratio, 64, 64, tokens=1, block=64, item_size=2, v_is_k=False, shared_limit=SHARED_BYTES[86]
    )
    assert tiles is not None and tiles.rows == rows


# In fast tests a row alone, and rows that share tiles.
FEW_SHAPES = [SHAPES[0], SHAPES[-1]]


@pytest.mark.parametrize(
    ("capability", "shapes"),
    [
        pytest.param(86, FEW_SHAPES, id="86-few"),
        *(pytest.param(c, SHAPES, id=f"{c}-all", marks=pytest.mark.slow) for c in SHARED_BYTES),
    ],
)
def test_compiles_within_a_generations_shared_memory(
    capability: int, shapes: list[tuple[object, ...]], tmp_path: Path
) -> None:
    pytest.importorskip("triton", reason="Triton is not installed: nothing can be compiled")
    wanted = [[capability, *shape, SHARED_BYTES[capability]] for shape in shapes]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    source = tmp_path / "compile_flash.py"
    source.write_text(COMPILE)
    found = subprocess.run(
        [sys.executable, str(source), json.dumps(wanted)],
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr[-2000:]
    lines = [json.loads(line) for line in found.stdout.splitlines()]
    assert len(lines) == len(wanted)
    for capability, k_size, tokens, tiles, shared, estimate in lines:
        if tiles is None:
            # MLA's tiles do not fit a Turing GPU: `flash` runs as `eager` there, with a note.
            assert (capability, k_size, tokens) == (75, 576, 1)
            continue
        assert shared <= SHARED_BYTES[capability], (capability, k_size, tiles)
        # What is chosen by the estimate would otherwise be refused by the device, or waste half of it.
        assert shared <= estimate + 2048, (capability, k_size, tiles, shared, estimate)
