"""`verify gen` from end to end on a tiny model, and what is said about a first difference."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from support.blank_pictures import BlankPictures
from support.browser import Browser
from support.cli import Done, assert_refused, verify
from support.plain_arms import ExactArm
from support.tiny_model import write_tiny_model
from verify.gen.difference import Difference, measure_floor
from verify.gen.record import ShownToken
from verify.model.architectures import architecture_of
from verify.model.gguf.file import GGUFFile
from verify.model.steps import Stepper

TILINGS = Path(__file__).parents[2] / "support/tilings.py"
KERNELS = Path(__file__).parents[2] / "support/user_kernels.py"
PROMPT = "the moth sat on that"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("gen") / "tiny.gguf", seed=3, restless=True)


def gen(tiny: Path, out: Path, *more: str) -> tuple[Done, dict[str, Any]]:
    base = ["gen", "-m", str(tiny), "-p", PROMPT, "-n", "16", "--ignore-eos", "--device", "cpu"]
    done = verify(*base, "--out", str(out), *more)
    return done, json.loads((out / "run.json").read_text()) if (out / "run.json").is_file() else {}


@pytest.fixture(scope="module")
def coarse(
    tiny: Path, tmp_path_factory: pytest.TempPathFactory, blank_pictures: BlankPictures
) -> tuple[Path, Done, dict[str, Any]]:
    """A run whose candidate comes to write another text; its page is opened."""
    folder = tmp_path_factory.mktemp("coarse") / "run"
    with blank_pictures.drawing():
        return folder, *gen(tiny, folder, "--candidate", f"py:{KERNELS}::coarse", "-n", "48")


def plain_greedy(tiny: Path, tokens: int) -> str:
    """What exact attention writes, by the straightest way: the whole sequence again for every token."""
    from verify.model.tokenizer import Tokenizer

    file = GGUFFile.open(tiny)
    tokenizer, architecture = Tokenizer.from_gguf(file), architecture_of(file)
    ids = tokenizer.encode(PROMPT).tolist()
    start = len(ids)
    for _ in range(tokens):
        logits = Stepper(architecture, [ExactArm()], device=CPU).step(torch.tensor(ids), scored=1)
        ids.append(int(logits["exact"].argmax()))
    return tokenizer.decode(ids[start:])


def test_equal_texts_and_their_closest_call(tiny: Path, tmp_path: Path) -> None:
    done, run = gen(tiny, tmp_path, "--baseline", "eager:block=16", "--candidate", "eager:block=16,kv=2")
    assert done.returncode == 0, done.stderr
    assert run["verdict"] == "round-off"
    baseline = next(arm for arm in run["arms"] if arm["name"] == "baseline")
    assert baseline["text"] == plain_greedy(tiny, 16)
    assert f"baseline eager:block=16 writes: {baseline['text']}" in done.stdout
    (pair,) = run["pairs"]
    assert pair["first_difference"] is None
    assert pair["disagreements"] == []
    # The prompt's last token is the first that the decode path sees.
    n_prompt = run["prompt"]["tokens"]
    assert pair["coverage"] == sum(n > 16 for n in range(n_prompt, n_prompt + 16)) / 16
    tokens = pq.read_table(tmp_path / "tokens.parquet").to_pylist()
    assert [t["n_kv"] for t in tokens if t["arm"] == "exact"] == list(range(n_prompt, n_prompt + 16))
    margins = [t["top1_margin"] for t in tokens if t["arm"] == "baseline"]
    assert pair["closest"]["margin"] == pytest.approx(min(margins))
    assert pair["closest"]["step"] == margins.index(min(margins))
    assert 0 < pair["margin_moved_rms_floor"] < pair["margin_moved_rms"] < 0.1
    paths = {(line["arm"], line["path"]): line["rows"] for line in run["coverage"]}
    assert paths["baseline", "prefill"] == 2 * (n_prompt - 1)
    assert paths["baseline", "decode"] == 2 * 16


def test_the_first_difference_and_all_after_it(coarse: tuple[Path, Done, dict[str, Any]]) -> None:
    folder, done, run = coarse
    assert done.returncode == 1, done.stderr
    (pair,) = run["pairs"]
    first = pair["first_difference"]
    tokens = pq.read_table(folder / "tokens.parquet").to_pylist()
    by_arm = {name: [t for t in tokens if t["arm"] == name] for name in ("baseline", "candidate", "exact")}
    differs = [
        i
        for i, (b, c) in enumerate(zip(by_arm["baseline"], by_arm["candidate"], strict=True))
        if b["top1"] != c["top1"]
    ]
    assert differs
    assert [d["step"] for d in pair["disagreements"]] == differs
    assert first["step"] == differs[0]
    step = differs[0]
    assert first["baseline_token"]["id"] == by_arm["baseline"][step]["top1"]
    assert first["candidate_token"]["id"] == by_arm["candidate"][step]["top1"]
    assert first["logits"]["baseline"][0] == by_arm["baseline"][step]["target_logit"]
    assert first["logits"]["exact"][0] == by_arm["exact"][step]["target_logit"]
    assert first["margin"] > 0 > first["margins"]["candidate"]
    assert first["moved"] == pytest.approx(first["margin"] - first["margins"]["candidate"])
    assert first["moved"] > 3 * first["floor"] > 0
    assert "rounding alone does not explain it" in done.stdout
    # Every arm is given the baseline's tokens; the candidate's own text parts from there.
    assert [t["target"] for t in by_arm["candidate"]] == [t["top1"] for t in by_arm["baseline"]]
    texts = {arm["name"]: arm["text"] for arm in run["arms"]}
    assert texts["candidate"] != texts["baseline"]
    common = texts["baseline"][: len(first["before"]) - len(PROMPT)]
    assert texts["candidate"].startswith(common)
    assert first["before"] == PROMPT + common


def test_a_text_by_drafts_is_that_of_single_tokens(
    tiny: Path, coarse: tuple[Path, Done, dict[str, Any]], tmp_path: Path
) -> None:
    """What a call has of a refused draft is cut off again: a kernel whose rows are right for any number of
    tokens writes the same text, whether the baseline's text is its draft or it has none."""
    plain = coarse[2]
    more = ("-n", "24", "--draft", "3", "--baseline", "flash", "--candidate", f"py:{KERNELS}::coarse")
    done, run = gen(tiny, tmp_path / "drafts", *more)
    first, of_plain = run["pairs"][0]["first_difference"], plain["pairs"][0]["first_difference"]
    assert first["step"] == of_plain["step"] < 16
    drafted, single = ({arm["name"]: arm["text"] for arm in one["arms"]} for one in (run, plain))
    for name in ("baseline", "candidate"):
        assert single[name].startswith(drafted[name].rstrip("\ufffd"))
    assert drafted["candidate"] != drafted["baseline"]
    # Another kernel writes the text: what differs is not the path alone.
    assert run["path_alone"] == [] and "lossless" not in done.stdout


def test_what_a_user_is_told() -> None:
    close = Difference(
        candidate="candidate",
        step=16,
        n_kv=20,
        before="once upon",
        baseline_token=ShownToken(id=1, text=" a"),
        candidate_token=ShownToken(id=2, text=" the"),
        logits={"baseline": (1.0004, 1.0), "candidate": (1.0, 1.0003), "exact": (1.0, 1.0001)},
        probabilities={},
        floor=0.0011,
        draws=8,
    )
    said = close.sentences()
    assert said[0] == "token 17: after 'once upon' the baseline writes ' a', the candidate ' the'"
    assert said[1] == (
        "the two top tokens were 0.0004 nats apart; the candidate moves them by 0.0007 nats;"
        " rounding alone moves them by 0.0011 nats (rms of 8 draws)"
    )
    assert said[2] == "exact attention prefers ' the', by 0.0001 nats"
    assert "either token was as good" in said[3]
    close.floor = 0.0001
    assert "rounding alone does not explain it: the move is 7 times that" in close.sentences()[3]


def test_the_floor_is_what_noise_does_there(tiny: Path) -> None:
    stepper = Stepper(architecture_of(GGUFFile.open(tiny)), [], device=CPU)

    def floor(seed: int, tokens: int = 12) -> Difference:
        found = Difference(
            candidate="candidate",
            step=0,
            n_kv=tokens,
            before="",
            baseline_token=ShownToken(id=1, text=""),
            candidate_token=ShownToken(id=2, text=""),
            logits={},
            probabilities={},
        )
        measure_floor(found, stepper, [i % 250 for i in range(tokens)], seed=seed)
        return found

    one, again, other = floor(0), floor(0), floor(1)
    assert one.floor == again.floor != other.floor
    assert one.floor and other.floor
    assert 1 / 5 < one.floor / other.floor < 5
    assert 1e-7 < one.floor < 1e-2
    assert (one.draws, floor(0, 2048).draws) == (8, 4)


def test_the_same_kernel_is_identical(tiny: Path, tmp_path: Path) -> None:
    done, run = gen(tiny, tmp_path / "a", "--candidate", "flash", "--allow-same")
    assert done.returncode == 0
    assert run["verdict"] == "identical"
    assert run["pairs"][0]["margin_moved_rms"] == 0
    done, run = gen(tiny, tmp_path / "b", "--candidate", "flash")
    assert (done.returncode, run["verdict"]) == (3, "inconclusive")


def test_a_baseline_answers_in_the_type_of_its_candidate(tiny: Path, tmp_path: Path) -> None:
    half = f"py:{TILINGS}::half,acc=f32"
    both = ("--baseline", "eager", "--candidate", "eager:kv=2", "--candidate", half)
    done, run = gen(tiny, tmp_path, *both)
    assert [pair["reference"] for pair in run["pairs"]] == ["baseline", "baseline-2"]
    assert {arm["name"]: arm["spec"] for arm in run["arms"]}["baseline-2"] == "eager:out=f16"
    assert "returns float16, so it is compared with eager:out=f16" in done.stdout
    assert run["pairs"][1]["verdict"] not in ("degraded", "broken"), run["pairs"][1]["reasons"]


def test_a_plan_that_never_differs_is_inconclusive(tiny: Path, tmp_path: Path) -> None:
    done, run = gen(tiny, tmp_path, "--candidate", "flash:block=64,kv=2")
    assert done.returncode == 3
    assert "the path under test did not run" in run["reasons"][0]


def test_wrong_kernels_are_broken_and_do_not_stop_the_others(tiny: Path, tmp_path: Path) -> None:
    candidates = [f"--candidate=py:{KERNELS}::{name}" for name in ("heads_rotated", "raises")]
    done, run = gen(tiny, tmp_path, *candidates, "--candidate", "eager:block=16", "-n", "4")
    assert done.returncode == 1, done.stderr
    assert [pair["verdict"] for pair in run["pairs"]][:2] == ["broken", "broken"]
    rotated, raised, good = (" ".join(pair["reasons"]) for pair in run["pairs"])
    assert "times its rounding budget at the prompt, layer " in rotated
    assert raised.startswith(
        "candidate failed at the prompt, layer 0: raised: raises: RuntimeError: no such luck"
    )
    assert "broken" not in good
    assert run["pairs"][2]["tokens"] == 4
    assert "Traceback" not in done.stderr


def test_nan_is_no_distance(tiny: Path, tmp_path: Path) -> None:
    done, run = gen(tiny, tmp_path, "--candidate", f"py:{KERNELS}::nan_in_one_row")
    assert done.returncode == 1
    (pair,) = run["pairs"]
    assert pair["verdict"] == "broken"
    assert pair["distance_ratio"] is None
    words = done.stdout.replace("nan_in_one_row", "").replace(str(tmp_path), "")
    assert "nan" not in words
    assert "times that" not in words


def test_every_row_of_the_prompt_counts(tiny: Path, tmp_path: Path) -> None:
    done, run = gen(tiny, tmp_path, "--candidate", f"py:{KERNELS}::prompt_row_wrong")
    assert done.returncode == 1
    assert run["prompt"]["tokens"] > 12
    assert "at the prompt, layer" in run["reasons"][0]
    assert "n_kv 11" in run["reasons"][0]


def test_a_common_factor_shows(tiny: Path, tmp_path: Path) -> None:
    done, run = gen(tiny, tmp_path, "--candidate", f"py:{KERNELS}::off_by_2e_3,acc=f32")
    assert done.returncode == 1
    # What is read off it leaves an element no room for that.
    assert "times its rounding budget" in run["reasons"][0]
    assert any("off_by_2e_3,acc=f32: read off it: P float32, sums float32" in note for note in run["notes"])


def test_a_failure_in_the_prompt_is_said_to_be_there(tiny: Path, tmp_path: Path) -> None:
    done, run = gen(tiny, tmp_path, "--candidate", f"py:{KERNELS}::raises")
    assert done.returncode == 1
    assert "failed at the prompt, layer 0" in run["reasons"][0]


def test_a_kernel_that_has_no_prefill_is_no_bug(tiny: Path, tmp_path: Path) -> None:
    done, run = gen(tiny, tmp_path, "--candidate", f"py:{KERNELS}::decode_only")
    assert done.returncode == 3
    assert "candidate does not take this call, unsupported: decode_only: decode only" in run["reasons"][0]


def test_float16_accumulators_are_degraded(tiny: Path, tmp_path: Path) -> None:
    candidates = ("--candidate", "eager:block=16,acc=f16", "--candidate", "eager:block=16,kv=2")
    done, run = gen(tiny, tmp_path, "--baseline", "eager:block=16", *candidates, "--json")
    assert done.returncode == 1
    assert json.loads(done.stdout) == run
    assert [pair["verdict"] for pair in run["pairs"]] == ["degraded", "round-off"]


@pytest.mark.parametrize(("cache", "least"), [("q8_0", 5.0), ("q4_0", 50.0)])
def test_what_a_cache_loses_is_distance_and_no_fault(tmp_path: Path, cache: str, least: float) -> None:
    # Two heads of 32, the size of a block of the cache.
    heads = {"attention__head_count": 2, "attention__head_count_kv": 1}
    model = write_tiny_model(tmp_path / "tiny.gguf", seed=3, restless=True, **heads)
    done, run = gen(model, tmp_path / "run", "--candidate", f"flash:cache={cache}")
    assert done.returncode == 1, done.stderr
    (pair,) = run["pairs"]
    assert pair["verdict"] == "degraded"
    assert pair["distance_ratio"] > least
    checks = pq.read_table(tmp_path / "run/layers.parquet").to_pylist()
    assert max(c["max_budget_ratio"] for c in checks if c["arm"] == "candidate") <= 1


def test_the_text_ends_where_the_model_ends_it(tiny: Path, tmp_path: Path) -> None:
    _, run = gen(tiny, tmp_path / "all")
    tokens = pq.read_table(tmp_path / "all/tokens.parquet").to_pylist()
    third = [t["target"] for t in tokens if t["arm"] == "exact"][2]
    model = write_tiny_model(tmp_path / "ends.gguf", seed=3, restless=True, eos=third)
    done = verify("gen", "-m", str(model), "-p", PROMPT, "-n", "16", "--out", str(tmp_path / "run"))
    run = json.loads((tmp_path / "run/run.json").read_text())
    first = next(i for i, t in enumerate(t for t in tokens if t["arm"] == "exact") if t["target"] == third)
    assert run["arms"][0]["tokens"] == first + 1
    assert f"the model ended its text after {first + 1} of 16 tokens" in done.stdout


@pytest.mark.pictures
def test_its_reports_open_and_are_made_again(
    coarse: tuple[Path, Done, dict[str, Any]], tmp_path: Path
) -> None:
    out = coarse[0]
    before = {name: (out / name).read_bytes() for name in ("report.md", "report.html")}
    assert verify("report", str(out)).returncode == 0
    assert {name: (out / name).read_bytes() for name in before} == before
    text = before["report.md"].decode()
    assert text.startswith("## verify gen: ")
    assert "the two top tokens were" in text
    with Browser(tmp_path / "profile") as browser:
        opened = browser.open(out / "report.html", width=400)
    assert (opened.said, opened.requests) == ([], [])
    assert opened.scrolls <= 400
    assert len(opened.pictures) == 1
    assert "the two top tokens were" in opened.text


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ((), "expected a prompt"),
        (("-p", "x", "-f", "y"), "expected a prompt"),
        (("-f", "nowhere.txt"), "nowhere.txt"),
        (("-p", ""), "the prompt has no tokens"),
        (("-p", "x", "-n", "0"), "-n 0"),
        (("-p", "x", "--candidate", "flahs"), "did you mean 'flash'"),
        (("-p", "x", "--candidate", "flash:heads=8+4"), "sums to 12, expected r = 2"),
        (("-p", "x", "--margin", "0.5"), "--margin"),
        (("-p", "x", "-m", "nowhere.gguf"), "nowhere.gguf"),
    ],
)
def test_bad_input_is_one_line(tiny: Path, tmp_path: Path, more: tuple[str, ...], said: str) -> None:
    model = () if "-m" in more else ("-m", str(tiny))
    out = tmp_path / "run"
    assert_refused(verify("gen", *model, *more, "--device", "cpu", "--out", str(out)), said)
    assert not out.exists()


def test_a_prompt_in_a_file_is_taken_byte_for_byte(tmp_path: Path) -> None:
    """Line ends and all, but for one newline at the end, as `verify ppl -f` and engines take it."""
    model = write_tiny_model(tmp_path / "tiny.gguf")
    (tmp_path / "prompt").write_bytes(b"a\r\nL\xc3\xb6we\n")
    base = ["gen", "-m", str(model), "-f", str(tmp_path / "prompt"), "-n", "2", "--device", "cpu"]
    verify(*base, "--out", str(tmp_path / "run"))
    run = json.loads((tmp_path / "run/run.json").read_text())
    assert run["prompt"]["text"] == "a\r\nL\u00f6we"
    assert f"verify gen -m {model} -f {tmp_path / 'prompt'} -n 2" in (tmp_path / "run/report.md").read_text()
