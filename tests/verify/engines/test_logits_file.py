from __future__ import annotations

import os
import struct
from pathlib import Path

import numpy as np
import pytest
from scipy.special import log_softmax

from support.cli import assert_refused, verify
from support.logits_files import decode, write_file
from verify.engines import logits_file
from verify.engines.logits_file import LogitsFile, LogitsWriter, encode
from verify.machine.errors import UsageError


@pytest.mark.parametrize("n_vocab", [30, 31])
@pytest.mark.parametrize("clip", [16.0, 24.0])
def test_what_is_written_is_what_the_format_says(tmp_path: Path, n_vocab: int, clip: float) -> None:
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, n_vocab, (2, 9)).astype(np.int32)
    logits = rng.normal(0, 8, (2, 4, n_vocab)).astype(np.float32)
    path = tmp_path / "a.kld"
    with LogitsWriter(path, tokens, n_vocab, clip=clip) as writer:
        # Windows, and halves of them, in any order.
        writer.write(1, 2, logits[1, 2:])
        writer.write(0, 0, logits[0])
        writer.write(1, 0, logits[1, :2])
    n_ctx, vocabulary, n_chunk, found, records = decode(path.read_bytes())
    assert (n_ctx, vocabulary, n_chunk) == (9, n_vocab, 2)
    assert found == tokens.ravel().tolist()
    truth = log_softmax(logits.astype(np.float64).reshape(8, n_vocab), axis=1)
    for record, row in zip(records, truth, strict=True):
        bottom = max(row.min(), row.max() - clip)
        step = (row.max() - bottom) / 65535
        # What lies below the clip is raised to it; all else is within half a step and float32's rounding.
        np.testing.assert_allclose(record, np.maximum(row, bottom), atol=step / 2 + 4e-6, rtol=0)


def test_the_padding_of_an_odd_vocabulary_is_zero_and_codes_end_at_both_ends() -> None:
    records = encode(np.array([[0.0, -1.0, -3.0]], np.float32))
    assert records.shape == (1, 16)
    scale, low = struct.unpack_from("<2f", records[0].tobytes())
    assert scale == pytest.approx(3 / 65535)
    assert low == pytest.approx(-3 - np.log(np.exp([0.0, -1.0, -3.0]).sum()))
    assert struct.unpack_from("<4H", records[0].tobytes(), 8) == (65535, 43690, 0, 0)


def test_equal_logits_have_no_scale_and_no_codes() -> None:
    records = encode(np.full((1, 4), 7.0, np.float32))
    assert struct.unpack_from("<2f4H", records[0].tobytes()) == (0.0, pytest.approx(-np.log(4)), 0, 0, 0, 0)


def test_the_clip_of_either_program(tmp_path: Path) -> None:
    for clip in (16.0, 24.0):
        records = encode(np.array([[0.0, -15.0, -20.0, -90.0]], np.float32), clip)
        scale, low = struct.unpack_from("<2f", records[0].tobytes())
        codes = struct.unpack_from("<4H", records[0].tobytes(), 8)
        assert 65535 * scale == pytest.approx(clip)
        assert low == pytest.approx(-clip, abs=1e-5)
        assert (codes[2] == 0) == (clip == 16)
        assert codes[3] == 0


@pytest.mark.parametrize("rows", [1, 3, 100])
def test_the_reader_gives_every_record_whatever_its_block(
    tmp_path: Path, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.kld"
    write_file(path)
    *_, records = decode(path.read_bytes())
    monkeypatch.setattr(logits_file, "BLOCK_BYTES", rows * (8 + 64))
    with LogitsFile(path) as file:
        found = [row for block in file.blocks() for row in block.log_probs()]
        assert max(len(b.scale) for b in file.blocks()) == min(rows, 7)
    np.testing.assert_allclose(found, records, atol=2e-6)


def test_a_file_is_gone_on_with_and_not_another(tmp_path: Path) -> None:
    path = tmp_path / "a.kld"
    logits = write_file(path)
    whole = path.read_bytes()
    with LogitsFile(path) as file:
        tokens = file.tokens.copy()
    path.write_bytes(whole[: 20 + 4 * 48] + bytes(len(whole) - 20 - 4 * 48))
    for windows in ((0,), (1, 2)):
        with LogitsWriter(path, tokens, 31, resume=True) as writer:
            for window in windows:
                writer.write(window, 0, logits[window])
    assert path.read_bytes() == whole
    with pytest.raises(UsageError, match="is not the logits file that this run began"):
        LogitsWriter(path, tokens + 1, 31, resume=True)
    with pytest.raises(UsageError, match="cannot be written"):
        LogitsWriter(tmp_path / "no" / "a.kld", tokens, 31)


def test_foreign_and_truncated_files_are_one_line(tmp_path: Path) -> None:
    path = tmp_path / "a.kld"
    write_file(path)
    whole = path.read_bytes()
    bad = tmp_path / "bad.kld"
    cases = [
        (b"GGUF" + whole[4:], "expected b'_logits_'"),
        (b"", "begins with b''"),
        (whole[:15], "ends after 15 bytes, in the header"),
        (whole[:-1], "cut off after 2 whole windows"),
        (whole[:100], "cut off after 0 whole windows"),
        (whole + b"\0", "there is more after the last record"),
        (whole[:8] + struct.pack("<i", -1) + whole[12:], "n_ctx is -1"),
        (whole[:12] + struct.pack("<i", 0) + whole[16:], "n_vocab is 0"),
        (whole[:20] + struct.pack("<i", 31) + whole[24:], "token 0 is 31, expected 0 to 30"),
    ]
    for content, said in cases:
        bad.write_bytes(content)
        assert_refused(verify("kld", str(bad)), "bad.kld", said)
        assert_refused(verify("kld", str(path), str(bad)), "bad.kld", said)
    assert_refused(verify("kld", str(tmp_path / "none.kld")), "none.kld", "No such file")
    assert_refused(verify("kld", str(tmp_path)), "cannot be read")


def test_a_large_header_does_not_make_a_large_buffer(tmp_path: Path) -> None:
    path = tmp_path / "a.kld"
    path.write_bytes(b"_logits_" + struct.pack("<3i", 512, 2**31 - 1, 2**31 - 1))
    before = os.times()
    assert_refused(verify("kld", str(path)), "cut off")
    assert os.times().user - before.user < 5
