"""`mistral4`: Mistral Small 4: DeepSeek's latent attention and experts under another name."""

from __future__ import annotations

from verify.model.architectures.deepseek2 import Deepseek2


class Mistral4(Deepseek2):
    """Otherwise `deepseek2`."""

    multipliers_are_equal = False
