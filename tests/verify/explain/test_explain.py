from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from support.cli import assert_refused, verify
from support.ppl_runs import Tiny
from verify.arms.likelihood import losses
from verify.explain.climb import UNCHANGED
from verify.explain.flips import walk_window
from verify.explain.reference import EXACT, Pass, ReferencePasses, unseen_key

PROMPT = "The river"


@pytest.fixture(scope="module")
def reference(tiny: Tiny) -> Any:
    found = ReferencePasses(str(tiny.model), "cpu")
    yield found
    found.close()


def written(reference: ReferencePasses, way: Pass, n: int) -> tuple[list[int], list[int]]:
    """The prompt's ids, and a greedy text after it."""
    tokenizer = reference.tokenizer
    prompt = tokenizer.encode(PROMPT).tolist()
    if tokenizer.add_bos:
        prompt = [tokenizer.bos_id, *prompt]
    text: list[int] = []
    for _ in range(n):
        text.append(int(reference.logits([*prompt, *text], way, 1)[0].argmax()))
    return prompt, text


def record(path: Path, prompt: list[int], text: list[int]) -> str:
    path.write_text(json.dumps({"prompt_token_ids": prompt, "token_ids": text}))
    return str(path)


def test_texts_beside_a_model(reference: ReferencePasses, tiny: Tiny, tmp_path: Path) -> None:
    prompt, right = written(reference, UNCHANGED, 12)
    likely = reference.logits([*prompt, *right[:5]], EXACT, 1)[0].topk(3).indices
    wrong = [*right[:5], int(likely[2]), *right[6:]]
    a = record(tmp_path / "a.json", prompt, right)
    same = record(tmp_path / "same.json", prompt, right)
    b = record(tmp_path / "b.json", prompt, wrong)
    model = ("-m", str(tiny.model), "--device", "cpu")
    done = verify("explain", "--texts", a, same, *model)
    assert (done.returncode, "verdict: tie" in done.stdout) == (0, True)
    done = verify("explain", "--texts", a, b, *model, "--json")
    found = json.loads(done.stdout)
    assert (done.returncode, found["verdict"]) == (1, "not explained")
    (one,) = found["pairs"]
    assert one["first"] == 5
    assert one["n_kv"] == len(prompt) + 5
    assert {"one rounding of noise", "a change of plan", "a bf16 cache"} <= one["moves"].keys()
    assert one["flips"]["A"] == []
    assert f"the texts part at token 6 (n_kv {one['n_kv']})" in done.stderr
    assert "not explained by rounding: rounding moves so far once in" in done.stderr
    # The other way round the faulty text is A: then nothing is said of B.
    assert verify("explain", "--texts", b, a, *model).returncode == 3
    # Several pairs: the gravest.
    for name, texts in (("as", (right, right)), ("bs", (right, wrong))):
        lines = [json.dumps({"prompt_token_ids": prompt, "token_ids": t}) for t in texts]
        (tmp_path / name).write_text("\n".join(lines))
    done = verify("explain", "--texts", str(tmp_path / "as"), str(tmp_path / "bs"), *model)
    assert done.returncode == 1 and "verdict: not explained (2 pairs)" in done.stdout


def test_a_fault_of_one_key_is_found_by_the_reference_itself(reference: ReferencePasses) -> None:
    tokens = reference.tokenizer.encode(PROMPT * 3).tolist()
    right = reference.logits(tokens, UNCHANGED, len(tokens))
    off = reference.logits(tokens, Pass("off", spec="fault", build=unseen_key), len(tokens))
    # The first row sees one key, which nothing can take away.
    assert torch.equal(right[0], off[0])
    assert not torch.allclose(right[1:], off[1:])


def test_without_a_model_the_files_say_where_and_how_close(tmp_path: Path) -> None:
    def served(path: Path, ids: list[int], logs: list[float], top: list[dict[int, float]]) -> str:
        entries = [
            {"id": i, "token": f"<{i}>", "logprob": x,
             "top_logprobs": [{"id": k, "token": "", "logprob": v} for k, v in t.items()]}
            for i, x, t in zip(ids, logs, top, strict=True)
        ]  # fmt: skip
        path.write_text(json.dumps({"content": "x", "completion_probabilities": entries}))
        return str(path)

    near = {5: -0.70, 6: -0.69}
    a = served(tmp_path / "a", [1, 2, 5], [-0.1, -0.2, -0.69], [{}, {}, {5: -0.69, 6: -0.70}])
    b = served(tmp_path / "b", [1, 2, 6], [-0.11, -0.19, -0.69], [{}, {}, near])
    done = verify("explain", "--texts", a, b, "--json")
    assert done.returncode == 3
    (one,) = json.loads(done.stdout)["pairs"]
    said = " ".join(one["sentences"])
    assert one["first"] == 2
    assert "the texts part at token 3: A has 5, B has 6" in said
    assert "A's token is +0.01 nats ahead, in B's -0.01: moved by 0.02" in said
    assert "over the 2 tokens before, the files' logprobs lie 0.01 nats apart" in said
    assert "as large as elsewhere" in said
    assert "-m MODEL.gguf" in said
    far = served(tmp_path / "c", [1, 2, 6], [-0.1, -0.2, -0.01], [{}, {}, {5: -5.0, 6: -0.01}])
    assert "larger than elsewhere" in verify("explain", "--texts", a, far).stdout
    for name, text in (("x.txt", "one two three"), ("y.txt", "one two four")):
        (tmp_path / name).write_text(text)
    x, y = str(tmp_path / "x.txt"), str(tmp_path / "y.txt")
    assert "the texts part at character 9" in verify("explain", "--texts", x, y).stdout
    assert verify("explain", "--texts", x, x).returncode == 0


def test_plain_texts_are_cut_by_the_models_tokeniser(
    reference: ReferencePasses, tiny: Tiny, tmp_path: Path
) -> None:
    _, right = written(reference, UNCHANGED, 8)
    text = reference.tokenizer.decode(right)
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "b.txt").write_text(text[:-2] + "zz")
    texts = (str(tmp_path / "a.txt"), str(tmp_path / "b.txt"))
    done = verify("explain", "--texts", *texts, "-m", str(tiny.model), "-p", PROMPT, "--device", "cpu")
    assert done.returncode in (1, 3)
    assert "the texts were cut into tokens here" in done.stdout


def test_what_does_not_fit_is_one_line(tiny: Tiny, tmp_path: Path) -> None:
    a = record(tmp_path / "a", [1, 2], [3, 4])
    model = ("-m", str(tiny.model), "--device", "cpu")
    cases = [
        ((), "--texts, --logits, --logprobs: expected two files"),
        (("--texts", a, record(tmp_path / "b", [1, 3], [3, 4]), *model), "its token 1 is 3, expected 2"),
        (
            ("--texts", a, record(tmp_path / "c", [1, 2], [3, 10**6]), *model),
            "token 1 is 1000000, expected 0 to",
        ),
        (("--texts", a, str(tmp_path / "none")), "none: cannot be read"),
        (("--texts", a, a, "-n", "0"), "-n 0: expected tokens from 1"),
        (("--texts", a, a, "-p", "x", "-f", "y"), "-p, -f: expected a prompt"),
    ]
    for arguments, said in cases:
        assert_refused(verify("explain", *arguments), said)
    (tmp_path / "d").write_text('{"usage": 1}')
    assert_refused(verify("explain", "--texts", a, str(tmp_path / "d")), "has neither ids", "nor a text")
    (tmp_path / "e").write_text("[1, 2, -3]")
    assert_refused(verify("explain", "--texts", a, str(tmp_path / "e")), "the list[2] is '-3'")
    (tmp_path / "f").write_text(json.dumps([{"ids": [1]}, {"ids": [2]}]))
    assert_refused(verify("explain", "--texts", a, str(tmp_path / "f")), "2 records, expected 1")


def test_logprobs_beside_exact_attention(reference: ReferencePasses, tiny: Tiny, tmp_path: Path) -> None:
    """Two right arithmetics, and a coarser cache, with the model as the judge."""
    prompt = reference.tokenizer.encode(PROMPT).tolist()
    bos = [reference.tokenizer.bos_id] if reference.tokenizer.add_bos else []
    rng = torch.Generator().manual_seed(0)
    lines: dict[str, list[str]] = {"a": [], "b": [], "coarse": []}
    ways = {
        "a": UNCHANGED,
        "b": Pass("other cuts", spec="flash:kv=2,block=16"),
        "coarse": Pass("bf16 cache", spec="flash", attention_type="bf16"),
    }
    for _ in range(12):
        text = torch.randint(3, reference.architecture.sizes.vocabulary, (24,), generator=rng).tolist()
        for name, way in ways.items():
            logits = reference.logits([*bos, *prompt, *text][:-1], way, len(text))
            logs = (-losses(logits, text)).tolist()
            record = {"prompt_token_ids": [*bos, *prompt], "token_ids": text, "logprobs": logs}
            lines[name].append(json.dumps(record))
    for name, written_lines in lines.items():
        (tmp_path / name).write_text("\n".join(written_lines))
    a, b, coarse = (str(tmp_path / name) for name in lines)
    model = ("-m", str(tiny.model), "--device", "cpu")
    done = verify("logprobs", a, coarse, *model, "--json")
    found = json.loads(done.stdout)
    assert (done.returncode, found["verdict"]) == (1, "degraded")
    assert found["beside_exact"]["rms_b"] > 2 * found["beside_exact"]["rms_a"] > 0
    assert verify("logprobs", coarse, a, *model).returncode == 0
    done = verify("logprobs", a, b, *model)
    assert "times as far from exact attention as A" in done.stdout
    assert done.returncode in (0, 3)
    (tmp_path / "texts").write_text(
        json.dumps({"choices": [{"logprobs": {"tokens": ["x"], "token_logprobs": [-1.0]}}]})
    )
    texts = str(tmp_path / "texts")
    assert_refused(verify("logprobs", texts, texts, *model), "has texts of tokens, expected ids")
    # What a mask leaves out stood before the rest all the same.
    one = json.loads(lines["a"][0])
    mask = [1] * 10 + [0] * 8 + [1] * 6
    (tmp_path / "masked").write_text(json.dumps(one | {"response_mask": mask}))
    masked = str(tmp_path / "masked")
    repeated = json.loads(verify("logprobs", masked, masked, *model, "--json").stdout)
    assert repeated["tokens"] == 16 and repeated["beside_exact"]["rms_a"] < 5e-3
    (tmp_path / "bare").write_text(json.dumps({"ids": [5], "logprobs": [-1.0]}))
    bare = str(tmp_path / "bare")
    assert_refused(verify("logprobs", bare, bare, *model), "has no prompt, expected prompt_token_ids")


@pytest.mark.slow
def test_a_real_model_moves_as_right_kernels_do_and_faults_do_not(smollm: Path, wikitext: Path) -> None:
    """SmolLM2, WikiText: moves of right kernels that are no draws are calibrated, a dropped key's are not."""
    model = ReferencePasses(str(smollm), "cpu")
    ids = model.tokenizer.encode(wikitext.read_text(encoding="utf-8")[:4000]).tolist()[:192]
    seen = walk_window(model, ids)
    moves = []
    for spec in ("flash:kv=5", "flash:acc=f16,kv=5", "flash:p=bf16,kv=5"):
        logits = model.logits(ids, Pass(spec, spec=spec), len(ids))
        moves.append(abs(seen.moves_of(logits)))
        assert (seen.p_of(logits) >= 1e-3).all()
    together = torch.tensor(moves).flatten()
    # Student's t with 12 degrees: beyond 2.18 one in 20, beyond 4.32 one in 1,000.
    assert 0.01 < (together > 2.18).double().mean() < 0.12
    assert (together > 4.32).double().mean() < 0.01
    wrong = model.logits(ids, Pass("off", spec="fault", build=unseen_key), len(ids))
    assert (seen.p_of(wrong) < 1e-6).sum() > 10
    model.close()
