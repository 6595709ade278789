"""Split modes of an engine with several GPUs: `layer` gives each whole layers, `graph` some of every layer.

`layer` changes no arithmetic. `graph` is tensor parallel (`docs/split-mode.md`): every arm's attention runs
once a GPU on its KV heads, and the products that end a branch are summed over the GPUs, which changes
roundings of every arm alike.
"""

from __future__ import annotations

from verify.arms.records import TensorParallelRecord
from verify.kernels.errors import SpecError
from verify.kernels.kernel import Kernel
from verify.kernels.plans.asked import SPLIT_MODES
from verify.kernels.plans.spec import number, parse_spec, with_options
from verify.kernels.registry import build_kernel
from verify.kernels.tensor_parallel import TensorParallelKernel, shares
from verify.machine.errors import UsageError
from verify.model.architectures.architecture import Architecture
from verify.model.architectures.deepseek2 import Deepseek2


def check_split_mode(split_mode: str, gpus: int) -> None:
    """Raises UsageError on what no model could be shared out by."""
    if split_mode not in SPLIT_MODES:
        raise UsageError(f"--split-mode {split_mode}: expected {' or '.join(SPLIT_MODES)}")
    if gpus < 1:
        raise UsageError(f"--gpus {gpus}: expected at least 1")
    if gpus > 1 and split_mode == "layer":
        raise UsageError(
            f"--gpus {gpus}: split mode layer gives each GPU whole layers, which changes no arithmetic;"
            " expected --split-mode graph beside it"
        )


def check_model(architecture: Architecture, gpus: int) -> None:
    """Raises UsageError where the KV heads of a layer are too few for the GPUs."""
    for layer in filter(architecture.attends, range(architecture.sizes.layers if gpus > 1 else 0)):
        heads = architecture.kv_heads_of(layer)
        if heads < gpus:
            mla = isinstance(architecture, Deepseek2)
            raise UsageError(
                f"--gpus {gpus}: layer {layer} of {architecture.file.path} has {heads} KV"
                f" head{'s' if heads > 1 else ''}{' (the latent one of MLA)' if mla else ''},"
                " expected at least one for each GPU"
            )


def build_shared_kernel(spec: str, gpus: int) -> Kernel:
    """The kernel of a specification as it runs where `gpus` GPUs share each layer.

    A policy is told of split mode graph, and sees the KV heads of one GPU. With one GPU nothing is shared
    out, and the specification stands as it is. Raises SpecError, also where a specification speaks of another
    split mode or number of GPUs.
    """
    if gpus == 1:
        return build_kernel(spec)
    parsed = parse_spec(spec)
    own = spec
    if "policy" in parsed.options:
        given = parsed.options.get("split_mode", "graph"), number(parsed, "gpus", gpus)
        if given != ("graph", gpus):
            raise SpecError(
                f"kernel {spec!r}: split_mode={given[0]},gpus={given[1]}, but the run has --split-mode graph"
                f" --gpus {gpus}: expected the same, or neither in the specification"
            )
        # What it is called with are the heads of one GPU: there is nothing left to divide.
        own = with_options(spec, {"split_mode": "graph", "gpus": "1"})
    return TensorParallelKernel(spec, build_kernel(own), gpus)


def tensor_parallel_record(architecture: Architecture, gpus: int) -> TensorParallelRecord | None:
    """What `run.json` says of it: KV heads by GPU, in the first layer with attention; None on one GPU."""
    if gpus == 1:
        return None
    first = next(filter(architecture.attends, range(architecture.sizes.layers)))
    by_gpu = [len(heads) for heads in shares(architecture.kv_heads_of(first), gpus)]
    return TensorParallelRecord(gpus=gpus, kv_heads_by_gpu=by_gpu)
