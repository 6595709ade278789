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
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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

# A token by its id, or by its text where there is no id.
Name = int | str


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

    @property
    def ids(self) -> list[int] | None:
        """The tokens, where all are ids."""
        if self.names is None or not all(isinstance(x, int) for x in self.names):
            return None
        return [int(x) for x in self.names]


def read_records(path: str | Path) -> list[TokenRecord]:
    """Every record of a file. Raises UsageError, one line that names the file, the record and the field."""
    path = Path(path)
    try:
        raw = read_input(path)
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror or error}") from None
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: byte {error.start} is not UTF-8, expected a text or JSON") from None
    values = _json_values(text)
    if values is None:
        if not text.strip():
            raise UsageError(f"{path}: is empty, expected a text, token ids or JSON")
        return [TokenRecord(str(path), text=text)]
    return [_record(value, f"{path}, record {i}") for i, value in enumerate(values, 1)]


def _json_values(text: str) -> list[Any] | None:
    """The records of a JSON text or of JSON lines; None where it is neither."""
    if text.lstrip()[:1] not in ("{", "["):
        return None
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        lines = [line for line in text.splitlines() if line.strip()]
        try:
            return [json.loads(line) for line in lines]
        except (ValueError, RecursionError):
            return None
    if isinstance(found, list) and found and all(isinstance(x, dict | list) for x in found):
        return found
    return [found]


def _record(value: Any, where: str) -> TokenRecord:
    if isinstance(value, list):
        return TokenRecord(where, names=[*_ids(value, "the list", where)])
    if not isinstance(value, dict):
        raise UsageError(f"{where}: is {type(value).__name__}, expected an object or a list of token ids")
    found = TokenRecord(where, prompt=_first_text(value, PROMPTS))
    for key in PROMPT_IDS:
        if isinstance(value.get(key), list):
            found.prompt_ids = _ids(value[key], key, where)
            break
    inner = value
    for key in ("choices", "outputs"):
        if isinstance(value.get(key), list) and value[key] and isinstance(value[key][0], dict):
            inner = value[key][0]
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
        raise UsageError(
            f"{where}: has neither ids ({', '.join(IDS[:4])}, ...) nor a text ({', '.join(TEXTS[:3])}, ...)"
        )
    if found.logprobs is not None:
        _check_lengths(found)
        _apply_mask(inner, found)
        bad = next((i for i, x in enumerate(found.logprobs) if not math.isfinite(x) or x > 1e-4), None)
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
    _from_entries(logprobs["content"], found)
    return True


def _completion(inner: dict[str, Any], found: TokenRecord) -> bool:
    """`logprobs: {tokens, token_logprobs, top_logprobs: [{token: logprob}]}`; the first may be null."""
    logprobs = inner.get("logprobs")
    if not isinstance(logprobs, dict) or not isinstance(logprobs.get("token_logprobs"), list):
        return False
    values = logprobs["token_logprobs"]
    tokens = logprobs.get("tokens")
    names = found.names or (list(map(_name, tokens)) if isinstance(tokens, list) else None)
    if names is None:
        raise UsageError(f"{found.where}: logprobs has no 'tokens', expected them beside 'token_logprobs'")
    kept = [i for i, x in enumerate(values) if x is not None]
    found.names = [names[i] for i in kept] if len(names) == len(values) else names
    found.logprobs = [float(values[i]) for i in kept]
    tops = logprobs.get("top_logprobs")
    if isinstance(tops, list) and any(tops):
        found.top = [{_name(k): float(v) for k, v in (tops[i] or {}).items()} for i in kept]
    return True


def _llama_server(inner: dict[str, Any], found: TokenRecord) -> bool:
    """`completion_probabilities: [{id, token, logprob, top_logprobs: [...]}]`"""
    entries = inner.get("completion_probabilities")
    if not isinstance(entries, list) or not entries:
        return False
    if "logprob" not in entries[0]:
        raise UsageError(
            f"{found.where}: completion_probabilities[0] has no 'logprob': an old llama-server, or"
            " post_sampling_probs; expected logprobs before sampling"
        )
    _from_entries(entries, found)
    return True


def _sglang(inner: dict[str, Any], found: TokenRecord) -> bool:
    """`meta_info: {output_token_logprobs: [[logprob, id, text]], output_top_logprobs: [[[...]]]}`"""
    meta = inner.get("meta_info")
    if not isinstance(meta, dict) or not isinstance(meta.get("output_token_logprobs"), list):
        return False
    listed = meta["output_token_logprobs"]
    found.names = [int(x[1]) for x in listed]
    found.logprobs = [float(x[0]) for x in listed]
    tops = meta.get("output_top_logprobs")
    if isinstance(tops, list) and any(tops):
        found.top = [{int(y[1]): float(y[0]) for y in x or ()} for x in tops]
    return True


def _vllm(inner: dict[str, Any], found: TokenRecord) -> bool:
    """`logprobs: [{id: {logprob, rank, ...}}]` or `[{id: logprob}]` beside ids, each token among its top."""
    listed = inner.get("logprobs")
    if not isinstance(listed, list) or not listed or not isinstance(listed[0], dict) or found.names is None:
        return False
    if "logprob" in listed[0]:
        _from_entries(listed, found)
        return True
    found.top = [
        {_id(k): float(v["logprob"] if isinstance(v, dict) else v) for k, v in x.items()} for x in listed
    ]
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
    """Numbers beside ids."""
    for key in LOGPROBS:
        listed = inner.get(key)
        if isinstance(listed, list) and listed and all(isinstance(x, int | float) for x in listed):
            if found.names is None:
                raise UsageError(f"{found.where}: has {key} and no ids, expected one of {', '.join(IDS)}")
            found.logprobs = [float(x) for x in listed]
            tops = inner.get("top_logprobs")
            if isinstance(tops, list) and tops and isinstance(tops[0], dict):
                found.top = [{_id(k): float(v) for k, v in x.items()} for x in tops]
            return True
    return False


def _from_entries(entries: Sequence[dict[str, Any]], found: TokenRecord) -> None:
    found.names = [_name_of(x) for x in entries]
    found.logprobs = [float(x["logprob"]) for x in entries]
    if any(x.get("top_logprobs") for x in entries):
        found.top = [{_name_of(y): float(y["logprob"]) for y in x.get("top_logprobs") or ()} for x in entries]


def _name_of(entry: dict[str, Any]) -> Name:
    if isinstance(entry.get("id"), int):
        return int(entry["id"])
    if isinstance(entry.get("token_id"), int):
        return int(entry["token_id"])
    return _name(entry.get("token", ""))


def _name(token: Any) -> Name:
    """An id, whether as a number, its digits as a key of JSON, or `token_id:5`; else the token's text."""
    if isinstance(token, int):
        return token
    written = str(token)
    if written.startswith(_ID_PREFIX) and written[len(_ID_PREFIX) :].isdigit():
        return int(written[len(_ID_PREFIX) :])
    return written


def _id(key: Any) -> Name:
    """A key of JSON beside ids: its digits are an id."""
    return int(key) if str(key).isdigit() else _name(key)


def _ids(value: list[Any], key: str, where: str) -> list[int]:
    for i, x in enumerate(value):
        if not isinstance(x, int) or isinstance(x, bool) or x < 0:
            raise UsageError(f"{where}: {key}[{i}] is {str(x)[:20]!r}, expected a token id")
    return [int(x) for x in value]


def _first_text(value: dict[str, Any], keys: Sequence[str]) -> str | None:
    return next((value[k] for k in keys if isinstance(value.get(k), str)), None)


def _check_lengths(found: TokenRecord) -> None:
    assert found.names is not None and found.logprobs is not None
    for what, listed in (("logprobs", found.logprobs), ("top logprobs", found.top)):
        if listed is not None and len(listed) != len(found.names):
            raise UsageError(f"{found.where}: {len(listed)} {what} for {len(found.names)} tokens")
    if any(isinstance(x, str) for x in found.names) and found.top is not None:
        # Digits as a key are an id only beside ids.
        found.top = [{str(k): v for k, v in x.items()} for x in found.top]


def _apply_mask(inner: dict[str, Any], found: TokenRecord) -> None:
    """Leave out what a trainer masks: padding, and tokens of tools."""
    assert found.names is not None and found.logprobs is not None
    for key in MASKS:
        mask = inner.get(key)
        if isinstance(mask, list) and len(mask) == len(found.names):
            kept = [i for i, x in enumerate(mask) if x]
            found.names = [found.names[i] for i in kept]
            found.logprobs = [found.logprobs[i] for i in kept]
            found.top = [found.top[i] for i in kept] if found.top is not None else None
            return
