"""Every architecture's tiny files on a GPU: what the CPU gives, within the rounding of float32.

How far that rounding takes a file's logits is measured on the CPU, by weights that are rounded otherwise:
layers that keep a state, and deep ones, carry it farther than others.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from support.plain_arms import ExactArm, KernelArm, logits_of, relative
from support.tiny_files import TOKENS, TinyFile
from support.tiny_models import TINY
from verify.model.architectures import ARCHITECTURES, architecture_of
from verify.model.gguf.file import GGUFFile
from verify.model.runner import Runner
from verify.model.steps import Stepper

LEAST_ALLOWED = 2e-5
# The first file of each.
FIRST = {
    name: next(case for case, file in TINY.items() if file.architecture == name) for name in ARCHITECTURES
}


# Those whose layers attend to a list of keys.
CHOSEN = [name for name, file in TINY.items() if "chosen" in name and file.architecture in ARCHITECTURES]


def exact_logits(path: Path, device: str) -> torch.Tensor:
    runner = Runner(architecture_of(GGUFFile.open(path)), device=torch.device(device), attention_type="f32")
    found = logits_of(runner, TOKENS[None], [ExactArm()], range(len(TOKENS)))["exact"].cpu()
    runner.stream.close()
    return found


def moved_by_rounding(folder: Path, file: TinyFile) -> float:
    """How far the logits go when every weight is off by a unit of float32's last place or so."""
    plain, moved = exact_logits(file.write(folder / "plain.gguf"), "cpu"), []
    for seed in range(2):
        noise = np.random.default_rng(seed)
        values = {
            name: (x * (1 + 1.2e-7 * noise.standard_normal(x.shape))).astype(np.float32)
            for name, x in file.tensors().items()
        }
        path = file.with_(values=values).write(folder / "moved.gguf")
        moved.append(relative(exact_logits(path, "cpu"), plain))
    return max(moved)


@pytest.mark.cuda
@pytest.mark.parametrize("name", TINY)
def test_every_tiny_file_gives_the_cpus_logits(tmp_path: Path, name: str) -> None:
    path = TINY[name].write(tmp_path / "tiny.gguf")
    allowed = max(LEAST_ALLOWED, 4 * moved_by_rounding(tmp_path, TINY[name]))
    assert allowed < 2e-4
    assert relative(exact_logits(path, "cuda"), exact_logits(path, "cpu")) < allowed


@pytest.mark.cuda
@pytest.mark.parametrize("name", CHOSEN)
@pytest.mark.parametrize("path", ["decode", "prefill"])
def test_a_kernel_is_given_the_list_of_keys(tmp_path: Path, name: str, path: str) -> None:
    file = architecture_of(GGUFFile.open(TINY[name].write(tmp_path / "tiny.gguf")))
    runner = Runner(file, device=torch.device("cuda"), attention_type="f32")
    arms = [ExactArm(), KernelArm("eager", path)]
    found = logits_of(runner, TOKENS[None], arms, range(len(TOKENS)))
    # It keeps P in float16; another choice of keys is off by as much as the logits are.
    assert relative(found[arms[1].name].cpu(), found["exact"].cpu()) < 2e-3


@pytest.mark.cuda
@pytest.mark.parametrize("name", FIRST.values())
def test_a_gpu_gives_the_cpus_logits(tmp_path: Path, name: str) -> None:
    path = TINY[name].write(tmp_path / "tiny.gguf")
    arms = [ExactArm(), KernelArm("flash:kv=2,p=f32", "decode"), KernelArm("flash:p=f32", "prefill")]
    found = {}
    for device in ("cpu", "cuda"):
        architecture = architecture_of(GGUFFile.open(path))
        runner = Runner(architecture, device=torch.device(device), attention_type="f32")
        chosen = arms if device == "cuda" else arms[:1]
        found[device] = logits_of(runner, TOKENS[None], chosen, range(len(TOKENS)))
    expected = found["cpu"]["exact"]
    assert relative(found["cuda"]["exact"].cpu(), expected) < 2e-5
    for arm in arms[1:]:
        # Its products are of float16, or of tf32.
        assert relative(found["cuda"][arm.name].cpu(), expected) < 2e-2, arm.name


@pytest.mark.cuda
@pytest.mark.parametrize("name", FIRST.values())
def test_steps_on_a_gpu_give_the_windows_logits(tmp_path: Path, name: str) -> None:
    path = TINY[name].write(tmp_path / "tiny.gguf")
    device = torch.device("cuda")
    runner = Runner(architecture_of(GGUFFile.open(path)), device=device, attention_type="f32")
    whole = logits_of(runner, TOKENS[None], [ExactArm()], range(len(TOKENS)))["exact"][0].cpu()
    stepper = Stepper(architecture_of(GGUFFile.open(path)), [ExactArm()], device=device, attention_type="f32")
    found = [stepper.step(torch.from_numpy(part).to(device))["exact"] for part in (TOKENS[:30], TOKENS[30:])]
    assert relative(torch.cat(found).cpu(), whole) < 2e-5
