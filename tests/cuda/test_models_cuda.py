"""Every architecture's tiny file on a GPU: what the CPU gives, within the rounding of float32."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from support.plain_arms import ExactArm, KernelArm, logits_of, relative
from support.tiny_files import TOKENS
from support.tiny_models import TINY
from verify.model.architectures import ARCHITECTURES, architecture_of
from verify.model.gguf.file import GGUFFile
from verify.model.runner import Runner
from verify.model.steps import Stepper

# The first file of each.
FIRST = {
    name: next(case for case, file in TINY.items() if file.architecture == name) for name in ARCHITECTURES
}


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
