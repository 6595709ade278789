"""Answers of engines and files of trainers: read right, or refused in one line, whatever they hold."""

from __future__ import annotations

import codecs
import copy
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support.cli import assert_refused, verify
from verify.engines.logprob_files import check_same_tokens, columns_of, open_logprobs
from verify.engines.logprobs import compare_logprobs
from verify.engines.token_records import read_records, with_same_line_ends
from verify.explain.texts import from_files_alone
from verify.machine.errors import UsageError

TOP = {"token": " b", "logprob": -0.2, "top_logprobs": [{"token": " b", "logprob": -0.2}]}
SERVED = {
    "id": 7,
    "token": " b",
    "logprob": -0.2,
    "top_logprobs": [{"id": 7, "token": " b", "logprob": -0.2}],
}
LISTED = {"7": {"logprob": -0.2, "rank": 1}, "9": {"logprob": -3.0}}
COMPLETION = {
    "tokens": [" a", " b"],
    "token_logprobs": [None, -0.2],
    "top_logprobs": [None, {" b": -0.2, " c": -3.0}],
}
PAIRS = {"output_token_logprobs": [[-0.2, 7, " b"]], "output_top_logprobs": [[[-0.2, 7, None]]]}
FORMS: dict[str, Any] = {
    "vllm": {"prompt_token_ids": [1, 2], "token_ids": [7, 7], "logprobs": [LISTED, LISTED]},
    "vllm, numbers": {"token_ids": [7, 7], "logprobs": [{"7": -0.2}, {"7": -0.3, "9": -2.0}]},
    "vllm, entries": {"token_ids": [7], "logprobs": [{"token": " b", "token_id": 7, "logprob": -1.0}]},
    "completion": {"choices": [{"text": " a b", "logprobs": COMPLETION}], "prompt": "x"},
    "chat": {"choices": [{"message": {"content": " b"}, "logprobs": {"content": [TOP]}}]},
    "llama-server": {"content": " b", "tokens": [7], "prompt": "x", "completion_probabilities": [SERVED]},
    "sglang": {"text": " b", "output_ids": [7], "meta_info": PAIRS},
    "trl": {"completion_ids": [7, 8, 9], "logprobs": [-0.1, -0.2, -0.3], "completion_mask": [1, 1, 0]},
    "verl": {"responses": [7, 8], "rollout_log_probs": [-0.1, -0.2], "input_ids": [1, 7, 8]},
    "ids": [7, 8, 9],
}
ODD = [
    None, True, 0, -1, 5, 1e400, float("nan"), -1e300, -0.5, 10**30, "", "a", "7", "token_id:5", "token_id:²",
    "²", [], {}, [None], [[]], [{}], {"a": 1}, {"logprob": None}, {"logprob": "x"}, {"logprob": -0.1}, [1],
    [-0.1, 3],
]  # fmt: skip
KEYS = (
    "logprobs",
    "tokens",
    "token_ids",
    "top_logprobs",
    "id",
    "text",
    "prompt",
    "mask",
    "choices",
    "²",
    "x",
)


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if at:
        yield at
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from places(value[key], (*at, key))


def spoiled(draw: random.Random, value: Any) -> Any:
    """The same with one to three changes by chance."""
    value = copy.deepcopy(value)
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        found = list(places(value))
        if not found:
            break
        *path, last = draw.choice(found)
        holder = value
        for key in path:
            holder = holder[key]
        what = draw.choice(("drop", "put", "rename", "change", "change", "change"))
        odd = copy.deepcopy(draw.choice(ODD))
        if what == "drop":
            del holder[last]
        elif isinstance(holder, list):
            holder.append(odd) if what == "put" else holder.__setitem__(last, odd)
        elif what == "put":
            holder[draw.choice(KEYS)] = odd
        elif what == "rename":
            holder[draw.choice(KEYS)] = holder.pop(last)
        else:
            holder[last] = odd
    return value


def test_spoiled_answers_are_read_or_refused_in_one_line(tmp_path: Path) -> None:
    draw, read, refused = random.Random(23), 0, 0
    a, b = tmp_path / "a.json", tmp_path / "b.json"
    for _ in range(500):
        whole = draw.choice(list(FORMS.values()))
        one = spoiled(draw, whole)
        other = draw.choice((whole, one, spoiled(draw, whole)))
        for path, value in ((a, one), (b, other)):
            more = "\n" + json.dumps(whole) if draw.random() < 0.3 else ""
            path.write_text(json.dumps(value) + more)
        try:
            for x, y in zip(read_records(a), read_records(b), strict=False):
                from_files_alone(x, y)
            first, second = open_logprobs(str(a)), open_logprobs(str(b))
            check_same_tokens(first, second)
            with np.errstate(all="raise", under="ignore"):
                found = compare_logprobs(first, columns_of(first, second))
            assert np.isfinite(found.divergence.mean)
            read += 1
        except UsageError as error:
            assert "\n" not in str(error)
            assert str(error).startswith((str(a), str(b)))
            refused += 1
    assert read > 40 and refused > 300, (read, refused)


NOT_READ: dict[str, tuple[Any, str]] = {
    "no logprob": ({"choices": [{"logprobs": {"content": [{"token": "a"}]}}]}, "content[0] is 'null'"),
    "no token": ({"completion_probabilities": [{"logprob": -1}]}, "[0] has neither 'id' nor 'token'"),
    "words": ({"ids": [1, 2], "logprobs": [-1, "x"]}, "logprobs[1] is 'x', expected a logarithm"),
    "no id": ({"meta_info": {"output_token_logprobs": [[-1.0]]}}, "expected a logarithm and a token id"),
    "a list too short": (
        {"choices": [{"logprobs": {**COMPLETION, "top_logprobs": [{"a": -1}]}}]},
        "1 top logprobs for 2 tokens",
    ),
    "no probability": ({"ids": [1], "logprobs": [float("nan")]}, "logprob 0 is nan"),
    "mask": ({"ids": [1, 2], "logprobs": [-1, -1], "mask": [1]}, "mask has 1 entries for 2 tokens"),
    "an error": ({"error": {"code": 503, "message": "Loading model"}}, "is an error of the engine", ),
    "of JSON": ({"answer": 5}, 'a text that itself is JSON is given as {"text": ...}'),
}  # fmt: skip


@pytest.mark.parametrize("name", NOT_READ)
def test_the_field_is_named(tmp_path: Path, name: str) -> None:
    value, said = NOT_READ[name]
    (tmp_path / "a.json").write_text(json.dumps(value))
    path = str(tmp_path / "a.json")
    assert_refused(verify("logprobs", path, path), "a.json, record 1", said)


WHOLE = json.dumps(FORMS["llama-server"])


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (f"{WHOLE}\n{WHOLE}\n{WHOLE[:40]}", "line 3 is not whole JSON: it is cut off"),
        (f"{WHOLE}\nnote\n{WHOLE}", "line 2 is not whole JSON: expected a record a line"),
        (WHOLE[:-20], "the file is not whole JSON: it is cut off"),
        (f"data: {WHOLE}\n\ndata: [DONE]\n", "an answer in pieces (stream: true)"),
    ],
)
def test_broken_json_is_no_text(tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / "a.json").write_text(content)
    path = str(tmp_path / "a.json")
    assert_refused(verify("explain", "--texts", path, path), "a.json", said)


@pytest.mark.parametrize("text", ["{no JSON} at all", '{"name": "Ann", "age', "[1] and [2", "data: none"])
def test_a_text_that_begins_as_json_is_a_text(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.txt").write_text(text)
    (record,) = read_records(tmp_path / "a.txt")
    assert record.text == text and record.names is None


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-be"])
def test_marked_texts_are_read_by_their_mark(tmp_path: Path, encoding: str) -> None:
    """A shell of Windows writes UTF-16."""
    mark = codecs.BOM_UTF16_BE if encoding == "utf-16-be" else b""
    (tmp_path / "a").write_bytes(mark + WHOLE.encode(encoding))
    (record,) = read_records(tmp_path / "a")
    assert record.names == [7]
    (tmp_path / "b").write_bytes(b"\xff\xfea")
    with pytest.raises(UsageError, match="is not UTF-16"):
        read_records(tmp_path / "b")


def test_a_line_end_inside_a_string_ends_no_record(tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"a\u2028b\x85{i}"}, ensure_ascii=False) for i in range(2)]
    (tmp_path / "a").write_text("\n".join(lines) + "\r\n", encoding="utf-8", newline="")
    assert [r.text for r in read_records(tmp_path / "a")] == ["a\u2028b\x850", "a\u2028b\x851"]


def test_every_choice_is_a_record(tmp_path: Path) -> None:
    choices = [{"index": i, "text": "x", "logprobs": COMPLETION} for i in range(3)]
    (tmp_path / "a").write_text(json.dumps({"choices": choices, "prompt": "p"}))
    found = read_records(tmp_path / "a")
    assert [r.where.rpartition(", ")[2] for r in found] == ["choices[0]", "choices[1]", "choices[2]"]
    assert [r.prompt for r in found] == ["p"] * 3


def test_ids_beside_texts_of_tokens_are_kept(tmp_path: Path) -> None:
    """vLLM gives both: lists name tokens by their texts, and a model wants ids."""
    choice = {"token_ids": [5, 7], "prompt_token_ids": [1], "logprobs": {"content": [TOP, TOP]}}
    (tmp_path / "a").write_text(json.dumps({"choices": [choice]}))
    (record,) = read_records(tmp_path / "a")
    assert (record.names, record.ids, record.prompt_ids) == ([" b", " b"], [5, 7], [1])
    found = open_logprobs(str(tmp_path / "a"))
    columns = columns_of(found, found)
    # The token that came is found in its own list: nothing of its divergence is estimated twice.
    assert columns.kind == "top" and columns.bound is not None
    plain = {"content": [{"token": " b", "logprob": -0.2}] * 2}
    (tmp_path / "b").write_text(json.dumps({"choices": [choice | {"logprobs": plain}]}))
    (record,) = read_records(tmp_path / "b")
    assert record.names == [5, 7]


def test_what_a_mask_leaves_out_was_there(tmp_path: Path) -> None:
    value = {"prompt_ids": [1], "ids": [4, 5, 6], "logprobs": [-1, None, -3], "mask": [0, 1, 0, 1]}
    (tmp_path / "a").write_text(json.dumps(value))
    (record,) = read_records(tmp_path / "a")
    assert (record.names, record.logprobs) == ([4, 6], [-1, -3])
    assert record.before_mask == ([4, 5, 6], [0, 2])
    (tmp_path / "b").write_text(json.dumps(value | {"mask": [0, 1, 1, 1]}))
    with pytest.raises(UsageError, match="logprob 1 is nan"):
        read_records(tmp_path / "b")


def test_prompts_that_do_not_match_are_one_line(tmp_path: Path) -> None:
    served = FORMS["llama-server"]
    for name, value in (
        ("a", {"prompt_ids": [1, 2, 3], "ids": [7], "logprobs": [-1]}),
        ("b", {"prompt_ids": [1, 5, 3], "ids": [7], "logprobs": [-1]}),
        ("c", {"prompt_ids": [1, 2], "ids": [7], "logprobs": [-1]}),
        ("p", served),
        ("q", served | {"prompt": "xy"}),
    ):
        (tmp_path / name).write_text(json.dumps(value))
    a, b, c, p, q = (str(tmp_path / n) for n in "abcpq")
    for x, y, said in (
        (a, b, "its token 1 is 5, expected 2"),
        (a, c, "its token 2 is its end, expected 3"),
        (p, q, "its character 1 is 'y', expected its end"),
    ):
        for command in (("logprobs", x, y), ("explain", "--texts", x, y)):
            assert_refused(verify(*command), f"{y}, record 1: the prompt is not that of {x}", said)


def test_windows_line_ends_are_no_difference(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"one\ntwo\n")
    (tmp_path / "b").write_bytes(b"one\r\ntwo\r\n")
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    for pair, side in (((a, b), "B"), ((b, a), "A")):
        done = verify("explain", "--texts", *pair)
        assert done.returncode == 0
        assert f"{side}'s line ends are those of Windows" in done.stdout
    both = [*read_records(b), *read_records(b)]
    assert with_same_line_ends(*both) == "" and both[0].text == "one\r\ntwo\r\n"


def test_arrays_that_say_nothing_are_one_line(tmp_path: Path) -> None:
    good = np.log(np.full((3, 5), 0.2))
    never = good.copy()
    never[1, 2] = -np.inf
    tokens = np.full(3, 2)
    for arrays, said in (
        ({"logits": good.astype(str), "tokens": tokens}, "expected floating-point numbers"),
        ({"logits": good.astype(complex), "tokens": tokens}, "expected floating-point numbers"),
        ({"logits": good[:0], "tokens": tokens[:0]}, "expected [N, V] and [N]"),
        ({"logits": np.full((3, 5), -np.inf), "tokens": tokens}, "holds NaN or Inf"),
        ({"logits": never, "tokens": tokens}, "token 1 of sequence 1 has the logarithm -inf"),
    ):
        np.savez(tmp_path / "a.npz", **arrays)
        path = str(tmp_path / "a.npz")
        assert_refused(verify("logprobs", path, path), "a.npz", said)
    np.save(tmp_path / "b.npy", good)
    path = str((tmp_path / "b.npy").rename(tmp_path / "b.npz"))
    assert_refused(verify("logprobs", path, path), "b.npz: is one array, expected .npz")
