"""One module an architecture, found by the name in the file's `general.architecture`."""

from __future__ import annotations

from verify.model.architectures.architecture import Architecture
from verify.model.architectures.deepseek2 import Deepseek2
from verify.model.architectures.gemma2 import Gemma2
from verify.model.architectures.gemma3 import Gemma3
from verify.model.architectures.gemma4 import Gemma4
from verify.model.architectures.glm4 import Glm4
from verify.model.architectures.glm4moe import Glm4Moe
from verify.model.architectures.glm_dsa import Deepseek32, GlmDsa
from verify.model.architectures.gpt_oss import GptOss
from verify.model.architectures.llama import Llama
from verify.model.architectures.minimax_m2 import MinimaxM2
from verify.model.architectures.mistral3 import Mistral3
from verify.model.architectures.mistral4 import Mistral4
from verify.model.architectures.qwen2 import Qwen2
from verify.model.architectures.qwen3 import Qwen3
from verify.model.architectures.qwen3moe import Qwen3Moe
from verify.model.architectures.qwen35 import Qwen3Next, Qwen35, Qwen35Moe
from verify.model.architectures.step35 import Step35
from verify.model.errors import ModelError
from verify.model.gguf.file import GGUFFile

ARCHITECTURES: dict[str, type[Architecture]] = {
    "llama": Llama,
    "qwen2": Qwen2,
    "qwen3": Qwen3,
    "gemma3": Gemma3,
    "glm4": Glm4,
    "glm4moe": Glm4Moe,
    "deepseek2": Deepseek2,
    "step35": Step35,
    "qwen35": Qwen35,
    "qwen35moe": Qwen35Moe,
    "qwen3next": Qwen3Next,
    "gemma4": Gemma4,
    "deepseek32": Deepseek32,
    "glm-dsa": GlmDsa,
    "qwen3moe": Qwen3Moe,
    "mistral4": Mistral4,
    "mistral3": Mistral3,
    "minimax-m2": MinimaxM2,
    "gpt-oss": GptOss,
    "gemma2": Gemma2,
}


# What files are that are no models, by `general.type`.
NO_MODELS = {
    "adapter": "a LoRA adapter, which is applied to a model",
    "imatrix": "an importance matrix, which helps to quantise a model",
    "mmproj": "the part of a model that sees or hears",
    "vocab": "a vocabulary without weights",
}


def architecture_of(file: GGUFFile) -> Architecture:
    """The architecture of a file, its metadata and tensors checked. Raises ModelError."""
    kind = file.optional("general.type", str, "model")
    if kind != "model":
        what = f", {NO_MODELS[kind]}" if kind in NO_MODELS else ""
        raise ModelError(f"{file.path}: metadata key general.type is {kind!r:.40}{what}: expected a model")
    found = ARCHITECTURES.get(file.architecture)
    if found is None:
        known = ", ".join(ARCHITECTURES)
        raise ModelError(
            f"{file.path}: general.architecture is {file.architecture!r}, expected one of: {known}"
        )
    architecture = found(file)
    architecture.check()
    return architecture
