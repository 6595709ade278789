"""Logits files beside a run of our own: an arm's logits written, an engine's measured against `exact`.

An engine's file is one more arm, of role `engine`: it is scored, never run. Both sides use one model file, so
the quantised weights are the same numbers; between an engine and `exact` lie its attention kernel, its
rounding of activations (engines round them to 8 bits beside quantised weights), its cache, or a fault.

A file raises what it clips to the clip: at 16 nats that is up to 1e-7 for each of tens of thousands of
tokens, and would itself be a divergence of 1e-3. Tokens that a record clips are therefore taken as exact has
them. What is left is, to second order, sum (P ln(P/Q) - P + Q) over the tokens that the record holds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

from verify.arms.likelihood import log_probabilities
from verify.data import Windows
from verify.engines.divergence import check_tokens
from verify.engines.logits_file import LogitsFile, LogitsWriter
from verify.machine.errors import UsageError
from verify.model.logits import LogitSlice
from verify.ppl.record import EngineRecord

PLAIN_TYPES = ("F32", "F16", "BF16")
# A divergence of up to this many times our own kernel's is what any other order of sums may give.
KERNEL_FACTOR = 4.0
EXACT = "exact"


class LogitsFiles:
    """Files of one run: `against` by name of the engine's arm, and perhaps one to save exact's logits in.

    expanded: tokens [windows, n_ctx] of the text with its backslashes expanded, None where it has none or
    they are too few. Raises UsageError where a file is not of these windows and this vocabulary.
    """

    def __init__(
        self,
        windows: Windows,
        vocabulary: int,
        *,
        against: Mapping[str, str],
        save: str | None,
        expanded: Callable[[], np.ndarray | None] | None = None,
    ) -> None:
        self.windows, self.vocabulary, self.save = windows, vocabulary, save
        self._writer: LogitsWriter | None = None
        self.against: dict[str, LogitsFile] = {}
        try:
            for name, path in against.items():
                self.against[name] = file = LogitsFile(path)
                found = file.layout
                expected = {"n_vocab": vocabulary, "n_ctx": windows.n_ctx, "n_chunk": windows.n_windows}
                options = {"n_vocab": "the model", "n_ctx": "-c", "n_chunk": "--chunks"}
                for field, value in expected.items():
                    if getattr(found, field) != value:
                        raise UsageError(
                            f"--against {path}: {field} is {getattr(found, field)},"
                            f" expected {value} as {options[field]} says"
                        )
                try:
                    check_tokens(file, windows.text_tokens, "the text of this run")
                except UsageError:
                    other = expanded() if expanded is not None else None
                    if other is None or not np.array_equal(file.tokens, other):
                        raise
                    raise UsageError(
                        f"--against {path}: the engine expanded the backslashes of the text before it cut it"
                        " into tokens; expected a file of a run with --no-escape"
                    ) from None
        except BaseException:
            self.close()
            raise

    def __bool__(self) -> bool:
        return bool(self.against) or self.save is not None

    def begin(self, *, resume: bool) -> None:
        """Make the file to save in, or go on with the one that a run cut off left. Raises UsageError."""
        if self.save is not None:
            self._writer = LogitsWriter(self.save, self.windows.text_tokens, self.vocabulary, resume=resume)

    def pass_through(self, piece: LogitSlice, first_window: int) -> LogitSlice:
        """Save exact's logits, and add the engines' own. The slice must hold the whole vocabulary."""
        window, row = self.windows.rows.place(piece.rows.start)
        window += first_window
        if self._writer is not None and EXACT in piece.logits:
            mine = piece.logits[EXACT][: len(piece.rows)]
            self._writer.write(window, row, mine.float().cpu().numpy())
        tile, device = next((len(x), x.device) for x in piece.logits.values())
        found = dict(piece.logits)
        if self.against:
            exact = log_probabilities(piece.logits[EXACT][: len(piece.rows)]).float()
        for name, file in self.against.items():
            # Rows beyond the last only fill the tile.
            rows = torch.zeros((tile, self.vocabulary), device=device)
            records = file.read(window, row, len(piece.rows))
            clipped = torch.from_numpy(records.codes == 0).to(device)
            decoded = torch.from_numpy(records.log_probs()).to(device)
            rows[: len(piece.rows)] = torch.where(clipped, exact, decoded)
            found[name] = rows
        return piece._replace(logits=found)

    def close(self) -> None:
        for file in self.against.values():
            file.close()
        if self._writer is not None:
            self._writer.close()


def engine_records(
    files: LogitsFiles, kld_of: Mapping[str, float], kernel: str, types: Sequence[str]
) -> list[EngineRecord]:
    """What is said of each engine's file.

    kld_of: arm -> mean KLD to exact; kernel: the arm of our own kernel; types: of the model's tensors.
    """
    nearest = min((kld_of[name] for name in files.against if math.isfinite(kld_of[name])), default=math.nan)
    records = []
    for name, file in files.against.items():
        kld, resolution = kld_of[name], resolution_of_file(file)
        cause, sentence = cause_of_distance(
            f"{name} ({file.path})", kld, resolution, kernel=kld_of[kernel], nearest=nearest, types=types
        )
        records.append(
            EngineRecord(
                arm=name, path=str(file.path), kld=kld, resolution=resolution, cause=cause, said=sentence
            )
        )
    return records


def resolution_of_file(file: LogitsFile) -> float:
    """What the rounding of the file's logarithms adds to a mean divergence whose rows are normalised again.

    First-order terms cancel then: half the variance of an error uniform over one step, step^2 / 24.
    """
    steps = np.concatenate([block.scale.astype(np.float64) for block in file.blocks()])
    return float((steps**2).mean()) / 24


def cause_of_distance(
    called: str, kld: float, resolution: float, *, kernel: float, nearest: float, types: Sequence[str]
) -> tuple[str, str]:
    """What explains an engine's distance to exact: one of five words, and a sentence.

    called: arm and file; kld, kernel, nearest: mean KLD to exact of this engine, of our own kernel, and of
    the nearest of all engines; types: of the model's tensors.
    """
    where = f"{called}: KLD to exact {kld:.2g}"
    if not math.isfinite(kld):
        return "engine", f"{where}: NaN or Inf in its file"
    if not math.isfinite(kernel):
        return "not known", f"{where}; our own baseline failed, so there is nothing to hold it against"
    limit = max(KERNEL_FACTOR * kernel, resolution)
    if kld <= limit:
        return "kernel", (
            f"{where}: no more than rounding in the attention kernel gives ({kernel:.2g} in our own) or the"
            f" file's 16 bits hide ({resolution:.2g})"
        )
    far = (
        f"{where}, {kld / max(kernel, 1e-300):.0f} times what our own kernel's rounding gives ({kernel:.2g})"
    )
    quantised = sorted(set(types) - set(PLAIN_TYPES))
    if nearest <= limit:
        return "not the kernel", (
            f"{far}; another file is as near as rounding allows, so what this run did differently"
            " (quantised products, cache type, kernel) is the cause"
        )
    if quantised:
        return "quantisation or engine", (
            f"{far}: not the attention kernel's rounding. The weights are quantised ({', '.join(quantised)}),"
            " the same numbers on both sides, but engines also round activations to 8 bits beside them:"
            " a file of the engine on these weights in F32, as a second --against, tells that from a fault"
        )
    return "engine", f"{far}: the weights are not quantised, so the engine itself is the cause"
