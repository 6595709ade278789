from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from support.cli import assert_refused, verify
from support.logits_files import write_file
from verify.engines.logprob_files import check_same_tokens, columns_of, open_logprobs
from verify.engines.logprobs import clustered_interval, compare_logprobs, floor_ratio

VOCABULARY, TOP = 200, 20


class Drawn(NamedTuple):
    """Logs of two programs' distributions [sequences, N, V], and tokens sampled from the first."""

    p: np.ndarray
    q: np.ndarray
    tokens: np.ndarray


def draw(rng: np.random.Generator, sequences: int = 24, n: int = 24, noise: float = 0.1) -> Drawn:
    logits = rng.normal(0, 2.5, (sequences, n, VOCABULARY))
    moved = logits + noise * rng.normal(0, 1, logits.shape)
    p, q = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (logits, moved))
    u = rng.random((sequences, n, 1))
    tokens = (np.exp(p).cumsum(-1) < u).sum(-1).clip(max=VOCABULARY - 1)
    return Drawn(p, q, tokens)


def record(logs: np.ndarray, tokens: np.ndarray, top: int) -> dict[str, Any]:
    """A record of vLLM's form: the most likely tokens, and the one that came beside them."""
    rows = np.arange(len(tokens))
    found: dict[str, Any] = {"token_ids": tokens.tolist()}
    if not top:
        return found | {"logprobs": logs[rows, tokens].tolist()}
    listed = np.argsort(-logs, 1)[:, :top]
    found["logprobs"] = [
        {str(t): {"logprob": float(logs[i, t])} for t in {*listed[i].tolist(), int(tokens[i])}} for i in rows
    ]
    return found


def write(path: Path, logs: np.ndarray, tokens: np.ndarray, top: int) -> str:
    lines = [json.dumps(record(x, t, top)) for x, t in zip(logs, tokens, strict=True)]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def true_kl(rng: np.random.Generator, noise: float = 0.1) -> float:
    d = draw(rng, 200, 100, noise)
    return float((np.exp(d.p) * (d.p - d.q)).sum(-1).mean())


@pytest.mark.parametrize("top", [pytest.param(TOP, marks=pytest.mark.slow), 0])
def test_intervals_cover_a_known_divergence_at_their_rate(tmp_path: Path, top: int) -> None:
    """A rollout and its trainer, cut to the 20 most likely tokens, and to the sampled one."""
    rng = np.random.default_rng(1)
    truth, runs, confidence = true_kl(rng), 120, 0.9
    assert 4e-3 < truth < 6e-3
    missed = bounds_above = 0
    for _ in range(runs):
        d = draw(rng)
        a, b = (
            open_logprobs(write(tmp_path / f"{n}.jsonl", x, d.tokens, top))
            for n, x in (("a", d.p), ("b", d.q))
        )
        columns = columns_of(a, b)
        assert columns.kind == ("top" if top else "sampled")
        interval = clustered_interval(columns.divergence, confidence)
        missed += not interval.low <= truth <= interval.high
        if columns.bound is not None:
            bounds_above += float(np.concatenate(columns.bound).mean()) > truth * 1.05
    # Binomial, 120 runs at 10 %: 12 expected, 3 to 23 in 99.9 %.
    assert 3 <= missed <= 23, missed
    assert bounds_above == 0


def test_truncation_hides_little_where_the_list_holds_most(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    d = draw(rng, 40, 50)
    exact = float((np.exp(d.p) * (d.p - d.q)).sum(-1).mean())
    a, b = (open_logprobs(write(tmp_path / n, x, d.tokens, TOP)) for n, x in (("a", d.p), ("b", d.q)))
    found = compare_logprobs(a, columns_of(a, b))
    assert found.bound is not None and found.hidden is not None
    assert 0.7 * exact < found.bound.mean < exact
    listed = np.sort(np.exp(d.p), -1)[..., -TOP:].sum(-1)
    # Tokens that the other file does not list are hidden too.
    assert 1 - listed.mean() < found.hidden < 1 - listed.mean() + 0.05
    # A token that an engine adds to its list because it came is none of the listed: that would be a bias.
    assert a.listed == TOP
    assert any(len(x) == TOP + 1 for position in a.top or () for x in position)


def test_full_vocabularies_give_the_divergence_itself(tmp_path: Path) -> None:
    d = draw(np.random.default_rng(3), 9, 20)
    for name, x in (("a", d.p), ("b", d.q)):
        np.savez(tmp_path / f"{name}.npz", logits=(x + 7).astype(np.float32), tokens=d.tokens)
    a, b = (open_logprobs(str(tmp_path / f"{n}.npz")) for n in "ab")
    found = compare_logprobs(a, columns_of(a, b))
    exact = (np.exp(d.p) * (d.p - d.q)).sum(-1)
    assert found.divergence.mean == pytest.approx(float(exact.mean()), rel=1e-4)
    w = np.exp(np.take_along_axis(d.q - d.p, d.tokens[..., None], -1))
    assert found.ratios.mean == pytest.approx(float(w.mean()), rel=1e-5)
    assert found.ratios.sd == pytest.approx(float(w.std()), rel=1e-4)
    assert found.ratios.effective == pytest.approx(float(w.sum() ** 2 / w.size / (w**2).sum()), rel=1e-5)
    assert found.ratios.sequence_sd == pytest.approx(float(np.log(w).sum((1, 2)).std()), rel=1e-4)
    # One file whole, the other cut: on what both know.
    cut = open_logprobs(write(tmp_path / "cut.jsonl", d.q, d.tokens, TOP))
    assert columns_of(a, cut).kind == "top"
    assert compare_logprobs(a, columns_of(a, cut)).divergence.mean == pytest.approx(
        float(exact.mean()), rel=0.3
    )


def test_the_first_position_that_departs_and_the_floor(tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    base = -rng.exponential(1, (12, 40)) - 0.1
    noise = 1e-5 * rng.normal(0, 1, (3, 12, 40))
    other = base + noise[0]
    other[:, 17:] += 0.05
    other[5, 12:17] += 0.05
    files = {
        "a": base,
        "same": base.copy(),
        "repeat": base + noise[1],
        "quiet": base + noise[2],
        "off": other,
    }
    for name, values in files.items():
        lines = [json.dumps({"ids": list(range(40)), "log_probs": v.tolist()}) for v in values]
        (tmp_path / name).write_text("\n".join(lines))
    a, same, repeat, quiet, off = (str(tmp_path / n) for n in ("a", "same", "repeat", "quiet", "off"))
    done = verify("logprobs", a, off, repeat, "--json")
    found = json.loads(done.stdout)
    assert (done.returncode, found["verdict"]) == (3, "inconclusive")
    assert (found["first"]["sequence"], found["first"]["position"]) == (5, 12)
    assert "at token 13 of sequence 6, by +0.05" in done.stderr
    assert found["floor"]["low"] > 100
    done = verify("logprobs", a, quiet, repeat, "--json")
    assert (done.returncode, json.loads(done.stdout)["verdict"]) == (0, "round-off")
    assert json.loads(done.stdout)["floor"]["ratio"] == pytest.approx(1, abs=0.1)
    assert verify("logprobs", a, same).returncode == 0
    assert "identical: all 480 logprobs" in verify("logprobs", a, same).stdout
    # Without a floor two files say no more than how far they lie apart.
    assert verify("logprobs", a, quiet).returncode == 3
    assert verify("logprobs", a, quiet, "--max-kld", "1e-6").returncode == 0
    assert verify("logprobs", a, off, "--max-kld", "1e-9").returncode in (1, 3)
    far = json.loads(verify("logprobs", a, off, "--json").stdout)["by_position"]
    assert far[0]["rms"] < 1e-4 < far[-1]["rms"]


def test_the_floors_interval_covers() -> None:
    rng = np.random.default_rng(5)
    missed = 0
    for _ in range(300):
        b, c = (list(rng.standard_t(5, (30, 20))) for _ in range(2))
        found = floor_ratio(b, c, 0.9)
        missed += not found.low <= 1 <= found.high
    assert 14 <= missed <= 50, missed


def test_two_logits_files_are_read_with_their_rounding(tmp_path: Path) -> None:
    for name, noise in (("a", 0.0), ("b", 0.05)):
        write_file(tmp_path / f"{name}.kld", noise=noise, n_ctx=64, n_chunk=9)
    kld = json.loads(verify("kld", str(tmp_path / "a.kld"), str(tmp_path / "b.kld"), "--json").stdout)
    done = verify("logprobs", str(tmp_path / "a.kld"), str(tmp_path / "b.kld"), "--json")
    found = json.loads(done.stdout)
    assert found["kld"]["mean"] == pytest.approx(kld["pairs"][0]["table"]["kld"]["value"])
    assert found["by_position"][0]["name"].startswith("n_kv 33 to")


TOKENS = [(5, " a", -0.5), (7, " b", -1.5), (5, " a", -0.25)]
CHAT = [{"token": t, "logprob": lp, "top_logprobs": [{"token": t, "logprob": lp}]} for _, t, lp in TOKENS]
LOGS, NAMES = [lp for *_, lp in TOKENS], [t for _, t, _ in TOKENS]
SERVED = [{"id": i, "token": t, "logprob": lp, "top_logprobs": []} for i, t, lp in TOKENS]
LISTED = [{str(i): {"logprob": lp, "rank": 1}} for i, _, lp in TOKENS]
IDS_AS_TEXT = {"tokens": [f"token_id:{i}" for i, *_ in TOKENS], "token_logprobs": LOGS}
FORMS: dict[str, Any] = {
    "openai chat": {"choices": [{"message": {"content": " a b a"}, "logprobs": {"content": CHAT}}]},
    "openai completion": {
        "choices": [{"text": " a b a", "logprobs": {"tokens": NAMES, "token_logprobs": LOGS}}]
    },
    "vllm server with ids": {"choices": [{"logprobs": IDS_AS_TEXT}]},
    "llama-server": {"content": " a b a", "tokens": [5, 7, 5], "completion_probabilities": SERVED},
    "sglang": {"text": " a b a", "meta_info": {"output_token_logprobs": [[x, i, t] for i, t, x in TOKENS]}},
    "vllm": {"prompt_token_ids": [1, 2], "outputs": [{"token_ids": [5, 7, 5], "logprobs": LISTED}]},
    "trl": {"completion_ids": [5, 7, 5], "logprobs": LOGS},
    "verl": {
        "responses": [5, 7, 5, 0],
        "rollout_log_probs": [*LOGS, 0.0],
        "response_mask": [1, 1, 1, 0],
    },
}


@pytest.mark.parametrize("form", FORMS)
def test_what_engines_and_trainers_write_is_read(tmp_path: Path, form: str) -> None:
    for name, content in (
        ("one", json.dumps(FORMS[form])),
        ("lines", json.dumps(FORMS[form]) + "\n" + json.dumps(FORMS[form])),
    ):
        (tmp_path / name).write_text(content)
        found = open_logprobs(str(tmp_path / name))
        assert [x.tolist() for x in found.chosen] == [[-0.5, -1.5, -0.25]] * len(found.names)
        by_text = form.startswith("openai")
        assert found.names[0] == ([t for _, t, _ in TOKENS] if by_text else [5, 7, 5])
    assert len(found.names) == 2


ONE = {"ids": [1], "logprobs": [-1]}
TWO = {"ids": [1, 2], "logprobs": [-1, -1]}
OLD = {"completion_probabilities": [{"content": "x", "probs": []}], "content": "x"}


@pytest.mark.parametrize(
    ("a", "b", "said"),
    [
        (TWO, {"ids": [1, 3], "logprobs": [-1, -1]}, "token 1 of sequence 1 is 3, expected 2"),
        (TWO, ONE, "sequence 1 has 1 tokens, expected 2"),
        (ONE, {"choices": [{"logprobs": {"content": CHAT[:1]}}]}, "one has ids, the other texts"),
        (ONE, {"logprobs": [-1]}, "has logprobs and no ids"),
        (ONE, {"ids": [1]}, "has no logprobs"),
        (ONE, {"ids": [1], "logprobs": [0.5]}, "logprob 0 is 0.5"),
        (ONE, {"ids": [1], "logprobs": [-1, -2]}, "2 logprobs for 1 tokens"),
        (ONE, {"ids": ["x"], "logprobs": [-1]}, "has logprobs and no ids"),
        (ONE, OLD, "an old llama-server"),
        ({**ONE, "prompt_ids": [9]}, {**ONE, "prompt_ids": [9, 9]}, "its token 1 is 9, expected its end"),
    ],
)
def test_files_that_do_not_match_are_one_line(tmp_path: Path, a: Any, b: Any, said: str) -> None:
    for name, content in (("a.json", a), ("b.json", b)):
        (tmp_path / name).write_text(json.dumps(content))
    done = verify("logprobs", str(tmp_path / "a.json"), str(tmp_path / "b.json"))
    assert_refused(done, "b.json", said)


def test_arrays_that_are_none_are_one_line(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", logits=np.zeros((3, 5)), tokens=np.zeros(3, int))
    for arrays, said in (
        ({"x": np.zeros(3)}, "holds x, expected 'logprobs' or 'logits' [N, V] and 'tokens' [N]"),
        ({"logits": np.zeros((3, 5)), "tokens": np.zeros(4, int)}, "tokens (4,), expected [N, V] and [N]"),
        ({"logits": np.zeros((3, 5)), "tokens": np.full(3, 5)}, "tokens: expected whole numbers from 0 to 4"),
        ({"logits": np.full((3, 5), np.nan), "tokens": np.zeros(3, int)}, "logits holds NaN or Inf"),
        ({"logits": np.zeros((3, 6)), "tokens": np.zeros(3, int)}, "a vocabulary of 6, expected 5"),
    ):
        np.savez(tmp_path / "b.npz", **arrays)
        assert_refused(verify("logprobs", str(tmp_path / "a.npz"), str(tmp_path / "b.npz")), "b.npz", said)
    (tmp_path / "b.npz").write_bytes(b"PK but no archive")
    assert_refused(
        verify("logprobs", str(tmp_path / "a.npz"), str(tmp_path / "b.npz")), "cannot be read as .npz"
    )


def test_the_same_tokens_are_the_same_whatever_the_form(tmp_path: Path) -> None:
    for name in ("vllm", "sglang"):
        (tmp_path / name).write_text(json.dumps(FORMS[name]))
    check_same_tokens(*(open_logprobs(str(tmp_path / n)) for n in ("vllm", "sglang")))
