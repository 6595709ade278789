"""What engines and trainers write about a text: its tokens, and their logarithms of probability.

A file holds records, one a sequence: a JSON object or array, or JSON lines. Read are the answers of
OpenAI-like servers (completions and chat), llama-server's `/completion`, SGLang's `/generate`, vLLM's
outputs, and plain records of trainers: ids under one of IDS, logprobs of those ids under one of LOGPROBS. A
record may also be a bare list of ids; a file that is no JSON is one text.

A token may carry the most likely tokens beside it (`top`). Where a server writes texts of tokens instead of
ids, a token is known by its text.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from verify.engines.pasted_text import marked_text
from verify.machine.errors import UsageError
from verify.machine.files import read_input

IDS = (
    "token_ids", "output_ids", "output_token_ids", "completion_ids", "response_ids", "completion_token_ids",
    "responses", "ids", "tokens",
)  # fmt: skip
LOGPROBS = (
    "logprobs", "log_probs", "token_logprobs", "rollout_log_probs", "old_log_probs", "per_token_logps",
    "sampling_per_token_logps", "response_logprobs", "output_logprobs",
)  # fmt: skip
MASKS = ("response_mask", "completion_mask", "loss_mask", "mask")
TEXTS = ("text", "content", "completion", "response", "output", "generated_text")
PROMPTS = ("prompt", "prompt_text", "input")
PROMPT_IDS = ("prompt_token_ids", "prompt_ids", "input_ids")
# vLLM writes a token as this where it is asked for ids.
_ID_PREFIX = "token_id:"
_MOST_DIGITS = 12
# Engines write -9999 and the like for what has no probability; a sum of printed digits may exceed 1.
LEAST_LOG, MOST_LOG = -1e5, 1e-4
_FAR = 10**9
# Keys by which a broken text is known as an answer of an engine.
_TELLING = (
    "choices",
    "outputs",
    "logprobs",
    "completion_probabilities",
    "meta_info",
    *IDS[:6],
    *PROMPT_IDS[:2],
)
# Events of a server that streams.
_STREAM = re.compile(r'\s*(?:event:[^\n]*\n\s*)?data: ?\{"')

# A token by its id, or by its text where there is no id.
Name = int | str
T = TypeVar("T")


@dataclass
class TokenRecord:
    """One sequence."""

    # Where it stands: the file and the record's number.
    where: str
    prompt: str | None = None  # as text
    prompt_ids: list[int] | None = None  # as tokens
    text: str | None = None  # after the prompt
    # Tokens after the prompt; None where the record has text alone.
    names: list[Name] | None = None
    # Natural logarithms of probability of those tokens, and of the most likely ones beside each.
    logprobs: list[float] | None = None
    top: list[dict[Name, float]] | None = None  # by position: token -> ln p
    # Ids of the tokens, where they are named by their texts.
    own_ids: list[int] | None = None
    # Before a mask was applied: the ids, where there are ids, and which of the tokens it kept.
    before_mask: tuple[list[int] | None, list[int]] | None = None

    @property
    def ids(self) -> list[int] | None:
        """The tokens' ids, where all are known."""
        if self.names is None or not all(isinstance(x, int) for x in self.names):
            return self.own_ids
        return [int(x) for x in self.names]


def read_records(path: str | Path) -> list[TokenRecord]:
    """Every record of a file. Raises UsageError, one line that names the file, the record and the field."""
    path = Path(path)
    try:
        raw = read_input(path)
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror or error}") from None
    try:
        text = marked_text(raw)
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{path}: byte {error.start} is not {error.encoding.upper()}, expected a text or JSON"
        ) from None
    values = _json_values(text, path)
    if values is None:
        if not text.strip():
            raise UsageError(f"{path}: is empty, expected a text, token ids or JSON")
        return [TokenRecord(str(path), text=text)]
    return [one for i, value in enumerate(values, 1) for one in _records(value, f"{path}, record {i}")]


def check_same_prompt(a: TokenRecord, b: TokenRecord) -> None:
    """Raises UsageError with the first difference where two records state prompts that are not the same."""
    if a.prompt_ids is not None and b.prompt_ids is not None:
        x: Sequence[Any] = a.prompt_ids
        y: Sequence[Any] = b.prompt_ids
        unit = "token"
    elif a.prompt is not None and b.prompt is not None:
        x, y, unit = a.prompt, b.prompt, "character"
    else:
        return
    if x == y:
        return
    at = next((i for i, (p, q) in enumerate(zip(x, y, strict=False)) if p != q), min(len(x), len(y)))
    found, expected = (repr(z[at]) if at < len(z) else "its end" for z in (y, x))
    raise UsageError(
        f"{b.where}: the prompt is not that of {a.where}: its {unit} {at} is {found}, expected {expected}"
    )


def with_same_line_ends(a: TokenRecord, b: TokenRecord) -> str:
    """Where one text was saved with the line ends of Windows and the other was not: both with LF, and a
    sentence that says so; else nothing."""
    if a.names is not None or b.names is not None or a.text is None or b.text is None:
        return ""
    for of, other, side in ((a, b, "A"), (b, a, "B")):
        assert of.text is not None and other.text is not None
        if "\r\n" in of.text and "\n" in other.text and "\r" not in other.text:
            of.text = of.text.replace("\r\n", "\n")
            return f"{side}'s line ends are those of Windows: read as the other's"
    return ""


def _json_values(text: str, path: Path) -> list[Any] | None:
    """The records of a JSON text or of JSON lines; None where it is neither.

    Raises UsageError for JSON that is cut off, or comes in pieces: it is not to be taken for a text.
    """
    if _STREAM.match(text):
        raise UsageError(
            f"{path}: is an answer in pieces (stream: true), expected the whole answer, of stream: false"
        )
    if text.lstrip()[:1] not in ("{", "["):
        return None
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return _json_lines(text, path)
    if isinstance(found, list) and found and all(isinstance(x, dict | list) for x in found):
        return found
    return [found]


def _json_lines(text: str, path: Path) -> list[Any] | None:
    # A string of JSON may hold what str.splitlines takes for line ends.
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    found: list[Any] = []
    for number, line in lines:
        try:
            found.append(json.loads(line))
        except (ValueError, RecursionError):
            if found or any(f'"{key}"' in text for key in _TELLING):
                where = f"line {number}" if len(lines) > 1 else "the file"
                cut = number == lines[-1][0] and line.lstrip()[:1] in ("{", "[")
                why = "it is cut off" if cut else "expected a record a line"
                raise UsageError(f"{path}: {where} is not whole JSON: {why}") from None
            return None
    return found


def _records(value: Any, where: str) -> list[TokenRecord]:
    """One, or as many as a server gave answers to one question (`n`)."""
    if isinstance(value, list):
        return [TokenRecord(where, names=[*_ids(value, "the list", where)])]
    if not isinstance(value, dict):
        raise UsageError(f"{where}: is {type(value).__name__}, expected an object or a list of token ids")
    for key in ("choices", "outputs"):
        listed = value.get(key)
        if isinstance(listed, list) and listed and isinstance(listed[0], dict):
            several = len(listed) > 1
            called = [f"{where}, {key}[{i}]" if several else where for i in range(len(listed))]
            return [_record(value, inner, name) for inner, name in zip(listed, called, strict=True)]
    return [_record(value, value, where)]


def _record(value: dict[str, Any], inner: Any, where: str) -> TokenRecord:
    """value: the whole answer; inner: the one of its choices."""
    if not isinstance(inner, dict):
        raise UsageError(f"{where}: is {_shown(inner)}, expected an object")
    found = TokenRecord(where, prompt=_first_text(value, PROMPTS))
    for of, key in ((of, key) for of in (inner, value) for key in (*PROMPT_IDS, *PROMPTS)):
        listed = of.get(key)
        if isinstance(listed, list) and (key in PROMPT_IDS or (listed and isinstance(listed[0], int))):
            found.prompt_ids = _ids(listed, key, where)
            break
    message = inner.get("message")
    found.text = _first_text(message if isinstance(message, dict) else inner, TEXTS)
    for key in IDS:
        if isinstance(inner.get(key), list) and (not inner[key] or isinstance(inner[key][0], int)):
            found.names = list(_ids(inner[key], key, where))
            break
    for read in (_chat, _completion, _llama_server, _sglang, _vllm, _plain):
        if read(inner, found):
            break
    if found.names is None and found.text is None:
        if value.get("error"):
            raise UsageError(f"{where}: is an error of the engine: {_shown(value['error'], 200)}")
        raise UsageError(
            f"{where}: has neither ids ({', '.join(IDS[:4])}, ...) nor a text ({', '.join(TEXTS[:3])}, ...);"
            ' a text that itself is JSON is given as {"text": ...}'
        )
    _without_the_answer(found)
    if found.logprobs is not None:
        _check_lengths(found)
        _apply_mask(inner, found)
        bad = next((i for i, x in enumerate(found.logprobs) if not LEAST_LOG <= x <= MOST_LOG), None)
        if bad is not None:
            raise UsageError(
                f"{where}: logprob {bad} is {found.logprobs[bad]!r}, expected a logarithm of a probability"
            )
    return found


def _chat(inner: dict[str, Any], found: TokenRecord) -> bool:
    """`logprobs: {content: [{token, logprob, top_logprobs: [...]}]}`"""
    logprobs = inner.get("logprobs")
    if not isinstance(logprobs, dict) or not isinstance(logprobs.get("content"), list):
        return False
    _from_entries(logprobs["content"], "logprobs.content", found)
    return True


def _completion(inner: dict[str, Any], found: TokenRecord) -> bool:
    """`logprobs: {tokens, token_logprobs, top_logprobs: [{token: logprob}]}`; the first may be null."""
    logprobs = inner.get("logprobs")
    if not isinstance(logprobs, dict) or not isinstance(logprobs.get("token_logprobs"), list):
        return False
    values = _each(logprobs["token_logprobs"], "token_logprobs", found.where, _number_or_none)
    tokens, ids = logprobs.get("tokens"), found.names
    names = _each(tokens, "tokens", found.where, _name) if isinstance(tokens, list) else ids
    if names is None:
        raise UsageError(f"{found.where}: logprobs has no 'tokens', expected them beside 'token_logprobs'")
    kept = [i for i, x in enumerate(values) if x is not None]
    listed = logprobs.get("top_logprobs")
    if isinstance(listed, list) and any(listed):
        if len(listed) != len(values):
            raise UsageError(f"{found.where}: {len(listed)} top logprobs for {len(values)} tokens")
        tops = _each(listed, "top_logprobs", found.where, _by_name)
        found.top = [tops[i] for i in kept]
    _set_names([names[i] for i in kept] if len(names) == len(values) else names, ids, found)
    found.logprobs = [x for x in values if x is not None]
    return True


def _llama_server(inner: dict[str, Any], found: TokenRecord) -> bool:
    """`completion_probabilities: [{id, token, logprob, top_logprobs: [...]}]`"""
    entries = inner.get("completion_probabilities")
    if not isinstance(entries, list) or not entries:
        return False
    if isinstance(entries[0], dict) and "logprob" not in entries[0]:
        raise UsageError(
            f"{found.where}: completion_probabilities[0] has no 'logprob': an old llama-server, or"
            " post_sampling_probs; expected logprobs before sampling"
        )
    _from_entries(entries, "completion_probabilities", found)
    return True


def _sglang(inner: dict[str, Any], found: TokenRecord) -> bool:
    """`meta_info: {output_token_logprobs: [[logprob, id, text]], output_top_logprobs: [[[...]]]}`"""
    meta = inner.get("meta_info")
    if not isinstance(meta, dict) or not isinstance(meta.get("output_token_logprobs"), list):
        return False
    pairs = _each(meta["output_token_logprobs"], "output_token_logprobs", found.where, _pair)
    found.names = [name for _, name in pairs]
    found.logprobs = [x for x, _ in pairs]
    tops = meta.get("output_top_logprobs")
    if isinstance(tops, list) and any(tops):
        found.top = _each(tops, "output_top_logprobs", found.where, _of_pairs)
    return True


def _vllm(inner: dict[str, Any], found: TokenRecord) -> bool:
    """`logprobs: [{id: {logprob, rank, ...}}]` or `[{id: logprob}]` beside ids, each token among its top."""
    listed = inner.get("logprobs")
    if not isinstance(listed, list) or not listed or not isinstance(listed[0], dict) or found.names is None:
        return False
    if "logprob" in listed[0]:
        _from_entries(listed, "logprobs", found)
        return True
    found.top = _each(listed, "logprobs", found.where, _by_id)
    missing = next(
        (i for i, (n, t) in enumerate(zip(found.names, found.top, strict=False)) if n not in t), None
    )
    if missing is not None:
        raise UsageError(
            f"{found.where}: logprobs[{missing}] does not hold its own token {found.names[missing]}"
        )
    found.logprobs = [t[n] for n, t in zip(found.names, found.top, strict=False)]
    return True


def _plain(inner: dict[str, Any], found: TokenRecord) -> bool:
    """Numbers beside ids; null where a trainer has none, which its mask must leave out."""
    for key in LOGPROBS:
        listed = inner.get(key)
        if not isinstance(listed, list) or not listed or not isinstance(listed[0], int | float | None):
            continue
        if found.names is None:
            raise UsageError(f"{found.where}: has {key} and no ids, expected one of {', '.join(IDS)}")
        values = _each(listed, key, found.where, _number_or_none)
        found.logprobs = [math.nan if x is None else x for x in values]
        tops = inner.get("top_logprobs")
        if isinstance(tops, list) and tops:
            found.top = _each(tops, "top_logprobs", found.where, _by_id)
        return True
    return False


def _from_entries(entries: Sequence[Any], key: str, found: TokenRecord) -> None:
    read = _each(entries, key, found.where, _entry)
    if any(top for *_, top in read):
        found.top = [top for *_, top in read]
    _set_names([name for name, *_ in read], found.names, found)
    found.logprobs = [x for _, x, _ in read]


def _set_names(names: list[Name], ids: list[Name] | None, found: TokenRecord) -> None:
    """names: of the tokens, as their logprobs have them; ids: what stands beside, if anything does.

    Tokens are known as those of their lists are, or nothing would be found there.
    """
    found.names = names
    if ids is None or len(ids) != len(names) or all(isinstance(x, int) for x in names):
        return
    if found.top is None:
        found.names = ids
    else:
        found.own_ids = [int(x) for x in ids]


class _Unlike(ValueError):
    """A value that is not what stands at such a place: what it is, and what was expected."""


def _each(listed: Sequence[Any], key: str, where: str, read: Callable[[Any], T]) -> list[T]:
    """Every element as `read` has it. Raises UsageError that names the first which is none."""
    found = []
    for i, x in enumerate(listed):
        try:
            found.append(read(x))
        except _Unlike as odd:
            raise UsageError(f"{where}: {key}[{i}] {odd}") from None
    return found


def _number_or_none(x: Any) -> float | None:
    return None if x is None else _number(x)


def _number(x: Any) -> float:
    if isinstance(x, bool) or not isinstance(x, int | float):
        raise _Unlike(f"is {_shown(x)}, expected a logarithm of a probability")
    # An int may be too large for a float; no logarithm is.
    return float(max(min(x, _FAR), -_FAR)) if isinstance(x, int) else x


def _log(x: Any) -> float:
    found = _number(x)
    if not LEAST_LOG <= found <= MOST_LOG:
        raise _Unlike(f"is {found!r}, expected a logarithm of a probability")
    return found


def _object(x: Any) -> dict[str, Any]:
    if not isinstance(x, dict):
        raise _Unlike(f"is {_shown(x)}, expected an object")
    return x


def _list(x: Any) -> list[Any]:
    if not isinstance(x, list):
        raise _Unlike(f"is {_shown(x)}, expected a list")
    return x


def _entry(x: Any) -> tuple[Name, float, dict[Name, float]]:
    """`{token, id, logprob, top_logprobs}`: the token, its logarithm, the most likely ones."""
    entry = _object(x)
    top: dict[Name, float] = {}
    for y in _list(entry.get("top_logprobs") or []):
        # Of tokens with the same text the likelier comes first.
        name, log = _name_of(_object(y)), _number(y.get("logprob"))
        if log != -math.inf:
            top.setdefault(name, _log(log))
    return _name_of(entry), _number(entry.get("logprob")), top


def _by_name(x: Any) -> dict[Name, float]:
    """`{token: logprob}`; null has none. What has no probability is not listed."""
    return {_name(k): _log(v) for k, v in _object(x or {}).items() if v != -math.inf}


def _by_id(x: Any) -> dict[Name, float]:
    """`{id: logprob}` or `{id: {logprob, ...}}`"""
    numbers = {k: v.get("logprob") if isinstance(v, dict) else v for k, v in _object(x).items()}
    return {_id(k): _log(v) for k, v in numbers.items() if v != -math.inf}


def _pair(x: Any) -> tuple[float, Name]:
    """`[logprob, id, text]`"""
    pair = _list(x)
    if len(pair) < 2:
        raise _Unlike(f"is {_shown(x)}, expected a logarithm and a token id")
    return _number(pair[0]), _whole(pair[1])


def _of_pairs(x: Any) -> dict[Name, float]:
    pairs = map(_pair, _list(x or []))
    return {name: _log(log) for log, name in pairs if log != -math.inf}


def _name_of(entry: dict[str, Any]) -> Name:
    for key in ("id", "token_id"):
        if isinstance(entry.get(key), int):
            return _whole(entry[key])
    if "token" not in entry:
        raise _Unlike("has neither 'id' nor 'token'")
    return _name(entry["token"])


def _name(token: Any) -> Name:
    """An id, whether as a number, its digits as a key of JSON, or `token_id:5`; else the token's text."""
    if isinstance(token, int):
        return _whole(token)
    if not isinstance(token, str):
        raise _Unlike(f"is {_shown(token)}, expected a token")
    digits = token.removeprefix(_ID_PREFIX)
    return int(digits) if digits != token and _is_id(digits) else token


def _id(key: str) -> Name:
    """A key of JSON beside ids: its digits are an id."""
    return int(key) if _is_id(key) else _name(key)


def _is_id(digits: str) -> bool:
    return digits.isascii() and digits.isdigit() and len(digits) < _MOST_DIGITS


def _whole(x: Any) -> int:
    if not isinstance(x, int) or isinstance(x, bool) or x < 0:
        raise _Unlike(f"is {_shown(x)}, expected a token id")
    return x


def _ids(value: list[Any], key: str, where: str) -> list[int]:
    return _each(value, key, where, _whole)


def _first_text(value: dict[str, Any], keys: Sequence[str]) -> str | None:
    return next((value[k] for k in keys if isinstance(value.get(k), str)), None)


def _shown(x: Any, most: int = 24) -> str:
    """A value of JSON in a message."""
    written = x if isinstance(x, str) else json.dumps(x)
    return repr(written if len(written) <= most else f"{written[:most]}...")


def _without_the_answer(found: TokenRecord) -> None:
    """A trainer's `input_ids` are the prompt and the answer: the prompt is what comes before."""
    ids = found.ids
    if found.prompt_ids and ids and len(found.prompt_ids) > len(ids) and found.prompt_ids[-len(ids) :] == ids:
        found.prompt_ids = found.prompt_ids[: -len(ids)]


def _check_lengths(found: TokenRecord) -> None:
    assert found.names is not None and found.logprobs is not None
    for what, listed in (("logprobs", found.logprobs), ("top logprobs", found.top)):
        if listed is not None and len(listed) != len(found.names):
            raise UsageError(f"{found.where}: {len(listed)} {what} for {len(found.names)} tokens")
    if any(isinstance(x, str) for x in found.names) and found.top is not None:
        # Digits as a key are an id only beside ids.
        found.top = [{str(k): v for k, v in x.items()} for x in found.top]


def _apply_mask(inner: dict[str, Any], found: TokenRecord) -> None:
    """Leave out what a trainer masks: padding, and tokens of tools. Which were there is kept."""
    assert found.names is not None and found.logprobs is not None
    key = next((key for key in MASKS if isinstance(inner.get(key), list)), None)
    if key is None:
        return
    mask, n, before = inner[key], len(found.names), len(found.prompt_ids or ())
    if len(mask) == before + n:
        # Of the prompt too.
        mask = mask[before:]
    if len(mask) != n:
        raise UsageError(f"{found.where}: {key} has {len(mask)} entries for {n} tokens")
    kept = [i for i, x in enumerate(mask) if x]
    found.before_mask = found.ids, kept
    found.names = [found.names[i] for i in kept]
    found.logprobs = [found.logprobs[i] for i in kept]
    found.top = [found.top[i] for i in kept] if found.top is not None else None
    found.own_ids = [found.own_ids[i] for i in kept] if found.own_ids is not None else None
