"""`verify logits`: a model's logits on a text, for whoever holds another program's against them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from verify.commands import options
from verify.data import read_text_file
from verify.machine.errors import UsageError
from verify.machine.outfile import check_writable
from verify.model.gguf.file import GGUFFile
from verify.model.locate import locate_model


def command(
    file: Annotated[Path, typer.Option("-f", "--file", help="text file, byte-exact")],
    out: Annotated[Path, typer.Option("--out", help="file to write, .npz")],
    model: options.Model = None,
    tokens: Annotated[
        int, typer.Option("-n", "--tokens", help="of the text's beginning, BOS included")
    ] = 512,
    kernel: Annotated[str, typer.Option("--kernel", help="kernel specification")] = "exact",
    path: Annotated[str, typer.Option("--path", help="decode or prefill")] = "decode",
    cache_type: options.CacheType = "f16",
    hidden: Annotated[
        str | None, typer.Option("--hidden", help="states after so many layers, comma between; 0: embeddings")
    ] = None,
    device: options.Device = None,
) -> int:
    """Write tokens [T], logits [T, vocabulary] and hidden_N [T, width]; exit 0."""

    if out.suffix != ".npz":
        raise UsageError(f"--out {out}: expected a file that ends in .npz")
    check_writable("--out", out, [model, file])
    if tokens < 1:
        raise UsageError(f"-n {tokens}: expected at least 1")
    try:
        layers = [int(part) for part in hidden.split(",")] if hidden else []
    except ValueError:
        raise UsageError(f"--hidden {hidden}: expected numbers of layers, comma between") from None

    import numpy as np

    from verify.model.tokenizer import Tokenizer
    from verify.reference import reference

    text = read_text_file(str(file)).text
    with GGUFFile.open(locate_model(model)) as opened:
        tokenizer = Tokenizer.from_gguf(opened)
    ids = tokenizer.encode(text).tolist()
    if tokenizer.add_bos and tokenizer.bos_id is not None:
        ids = [tokenizer.bos_id, *ids]
    ids = ids[:tokens]
    if not ids:
        raise UsageError(f"-f {file}: the text has no tokens, expected at least one")
    found = reference(
        model,
        np.array(ids, dtype=np.int32),
        kernel=kernel,
        cache_type=cache_type,
        path=path,  # type: ignore[arg-type]
        device=device,
        hidden=layers,
    )
    states = {f"hidden_{layer}": x for layer, x in found.hidden.items()}
    np.savez(out, tokens=np.array(ids, np.int32), logits=found.logits, **states)  # type: ignore[arg-type]
    rows, vocabulary = found.logits.shape
    print(f"{out}: logits of {rows} tokens x {vocabulary}, kernel {kernel}", file=sys.stdout)
    return 0
