"""What a kernel can be asked for: stated by the kernel, read by laws, reports and whoever draws problems.

A kernel that lacks something is not wrong; it is only not judged by what needs it. `lacks` says why in words.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    # What kernels have is listed without torch.
    import torch

    from verify.kernels.call import Call

Promise = Literal[
    "lse", "sliding_window", "softcap", "sinks", "alibi", "plans", "head_groups", "empty_rows", "ragged",
    "deterministic", "row_alone", "v_size", "strided", "paged", "packed", "mask", "key_list",
]  # fmt: skip
# What a kernel without one of them is said to lack.
WORDS: dict[Promise, str] = {
    "lse": "returns no log-sum-exp",
    "sliding_window": "has no sliding window",
    "softcap": "has no softcap",
    "sinks": "has no sinks",
    "alibi": "has no ALiBi slopes",
    "plans": "takes no plan",
    "head_groups": "takes no head groups",
    "empty_rows": "takes no row that sees no key",
    "ragged": "takes one kv_len a call",
    "deterministic": "does not promise the same bits twice",
    "row_alone": "does not promise that a row alone has the bits of the row in a batch",
    "v_size": "needs values of the size of keys",
    "strided": "is given copies without gaps, whatever the strides were",
    "paged": "takes no pages",
    "packed": "takes no packed sequences",
    "mask": "takes no mask",
    "key_list": "takes no list of keys",
}
# What few kernels have: a kernel that has one of them says so, none is said to lack it.
FORMS: tuple[Promise, ...] = ("paged", "packed", "mask", "key_list")

# Of a kernel that takes all of them.
ALL_FORMS: dict[str, Any] = {
    "paths": ("decode", "several", "prefill"), "paged": True, "packed": True, "mask": True, "key_list": True
}  # fmt: skip


@dataclass(frozen=True)
class Capabilities:
    """What a kernel has. The defaults are those of a kernel of our own, forms left aside."""

    lse: bool = True  # returns it
    sliding_window: bool = True  # takes one
    softcap: bool = True  # takes one
    sinks: bool = True  # takes them
    alibi: bool = True  # takes slopes
    plans: bool = True  # obeys `Call.plan` whole
    head_groups: bool = True  # obeys the head groups of `Call.plan`; implied by `plans`
    empty_rows: bool = True  # takes rows of kv_len 0
    ragged: bool = True  # takes rows of different kv_len in one call
    deterministic: bool = True  # the same call gives the same bits
    row_alone: bool = True  # decode: a row's bits depend neither on other rows nor on the batch
    zero_for_empty_rows: bool = True  # promises 0 and an lse of -inf for rows of kv_len 0
    v_size: bool = True  # takes values of another head size than keys
    strided: bool = True  # sees keys and values where they lie, not copies
    paths: tuple[str, ...] = ("decode", "prefill")  # which of them
    dtypes: tuple[str, ...] = ("float16", "bfloat16", "float32")  # which of them, by torch's names
    devices: tuple[str, ...] = ("cpu", "cuda")  # which of them
    k_sizes: tuple[int, ...] | None = None  # head sizes of keys; None: all
    ratios: tuple[int, ...] | None = None  # query heads a KV head; None: all
    # Head sizes at which it takes a softcap; None: all that it has.
    softcap_sizes: tuple[int, ...] | None = None
    size_multiple: int = 1  # head sizes are multiples of it: a quantised cache holds them in blocks
    caches: tuple[str, ...] = ()  # quantised types that `cache=` of its specification takes
    # Forms of a call, and the path `several`, a kernel has only if it says so.
    paged: bool = False  # keys and values in pages
    packed: bool = False  # sequences one behind the other
    mask: bool = False  # a mask of its own, in the place of lengths or beside them
    key_list: bool = False  # a list of the keys that each row sees
    page_sizes: tuple[int, ...] | None = None  # keys a page that it has; None: all

    def lacks(self, *promises: Promise) -> str | None:
        """Why a kernel cannot be asked for all of these, or None if it can."""
        missing = [WORDS[name] for name in promises if not getattr(self, name)]
        return "; ".join(missing) or None

    def limits(self) -> list[str]:
        """All that a kernel lacks beside one that has everything, in words."""
        found = [words for name, words in WORDS.items() if not getattr(self, name) and name not in FORMS]
        all_of = Capabilities()
        for what in ("paths", "devices", "dtypes"):
            has = getattr(self, what)
            if set(has) < set(getattr(all_of, what)):
                found.append(f"has only {what} {', '.join(has)}")
        for what, some in (
            ("head sizes", self.k_sizes),
            ("ratios", self.ratios),
            ("a softcap at head sizes", self.softcap_sizes),
        ):
            if some is not None:
                found.append(f"has only {what} {', '.join(map(str, some))}")
        if self.size_multiple > 1:
            found.append(f"has only head sizes that are multiples of {self.size_multiple}")
        return found

    def refuses_form(self, call: Call) -> str | None:
        """Why the form of a call is beyond this kernel, or None: what a kernel must not overlook, since it
        would compute another call. Looks at no number on the device."""
        given = {
            "paged": call.block_table, "packed": call.cu_seqlens, "mask": call.mask, "key_list": call.keys
        }  # fmt: skip
        missing = [WORDS[name] for name in FORMS if given[name] is not None and not getattr(self, name)]
        if call.path == "several" and call.path not in self.paths:
            missing.append(f"has no path {call.path} (has {', '.join(self.paths)})")
        page = call.k.shape[1]
        if call.block_table is not None and self.page_sizes is not None and page not in self.page_sizes:
            sizes = ", ".join(map(str, self.page_sizes))
            missing.append(f"has no pages of {page} keys (has {sizes})")
        return "; ".join(missing) or None

    def refuses(self, call: Call) -> str | None:
        """Why a call is beyond this kernel, or None if it is not."""
        shape, lengths = call.shape, call.kv_len
        wanted: list[Promise] = []
        form = self.refuses_form(call)
        if call.sliding_window is not None:
            wanted.append("sliding_window")
        if call.softcap is not None:
            wanted.append("softcap")
        if call.sinks is not None:
            wanted.append("sinks")
        if call.alibi_slopes is not None:
            wanted.append("alibi")
        if shape.v_size != shape.k_size:
            wanted.append("v_size")
        if lengths.numel() and int(lengths.min()) == 0:
            wanted.append("empty_rows")
        if lengths.numel() and int(lengths.min()) != int(lengths.max()):
            wanted.append("ragged")
        missing = [WORDS[name] for name in wanted if not getattr(self, name)] + ([form] if form else [])
        for what, value, allowed in (
            # Of the path `several` its form says so.
            ("path", call.path, self.paths if call.path != "several" else None),
            ("dtype", name_of(call.q.dtype), self.dtypes),
            ("device", call.q.device.type, self.devices),
            ("head size", shape.k_size, self.k_sizes),
            ("ratio", shape.ratio, self.ratios),
            ("softcap at head size", shape.k_size, self.softcap_sizes if call.softcap is not None else None),
        ):
            if allowed is not None and value not in allowed:
                missing.append(f"has no {what} {value} (has {', '.join(map(str, allowed))})")
        odd = [size for size in (shape.k_size, shape.v_size) if size % self.size_multiple]
        if odd:
            missing.append(f"has no head size {odd[0]} (has multiples of {self.size_multiple})")
        return "; ".join(missing) or None


def name_of(dtype: torch.dtype) -> str:
    """`float16` for torch.float16."""
    return str(dtype).removeprefix("torch.")
