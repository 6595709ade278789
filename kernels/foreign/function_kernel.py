"""A callable of this process as a kernel: whoever passes it vouches for it; nothing ends it but itself."""

from __future__ import annotations

import hashlib
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from verify.kernels.budget.arithmetic import Arithmetic
from verify.kernels.call import Call
from verify.kernels.errors import KernelFailure, MachineFailure, SpecError
from verify.kernels.foreign.forms import Form, FormError, FormFailure, Wanted, form_of
from verify.kernels.foreign.user_kernel import UserKernel, forms_given, says_several
from verify.kernels.torch_settings import TorchSettings


class FunctionKernel(UserKernel):
    """A function, lambda, bound method, module, operator or compiled function, called where it is.

    What it raises is a finding about it, as of a kernel in a process of its own; a crash or a hang is not
    survived. It is given copies: what it writes into them is found, and nobody else sees it.
    """

    # The device that it is called on, whatever device a call lies on; None: the call's.
    runs_on: torch.device | None = None

    def __init__(
        self,
        function: Callable[..., Any],
        *,
        spec: str = "",
        wanted: Wanted | None = None,
        acc: str | None = None,
        stated: Arithmetic | None = None,
    ) -> None:
        """Raises SpecError for a callable that cannot be used."""
        name = name_of_callable(function)
        spec = spec or spec_of(function)
        try:
            if isinstance(function, type):
                raise FormError(f"{name} is a class: expected an object of it, {name}(...)")
            if not callable(function):
                raise FormError(f"expected something that can be called, got a {type(function).__name__}")
            self.form: Form = form_of(function, name, wanted or Wanted())
        except FormError as error:
            raise SpecError(f"kernel {spec!r}: {error}") from None
        self._shown: dict[str, Any] = {}
        # As whoever passes it has set torch: what we set for our own sums is none of its business.
        self._settings = TorchSettings.now()
        form = self.form
        super().__init__(
            spec,
            name,
            binary=hashlib.sha256(_source(function).encode()).hexdigest()[:12],
            greeting={
                "takes": form.takes,
                "left_out": form.left_out,
                "way": form.way,
                "dtypes": form.dtypes,
                "one_head_each": form.one_head_each,
                "forms": form.forms,
                "said": form.said,
            },
            acc=acc,
            stated=stated,
            knows_several=says_several(_module_source(function)),
        )

    @property
    def shown(self) -> Mapping[str, Any]:
        return self._shown

    def answer(self, call: Call) -> tuple[torch.Tensor, torch.Tensor]:
        device = self.runs_on or call.q.device
        given = {"q": call.q, "k": call.k, "v": call.v, "kv_len": call.kv_len.to(torch.int32)}
        options: dict[str, Any] = {"path": self.path_word(call)}
        options |= {name: getattr(call, name) for name in ("sliding_window", "softcap")}
        for name in ("sinks", "alibi_slopes"):
            x = getattr(call, name)
            options[name] = None if x is None else x.detach().to(device, torch.float32, copy=True)
        forms = forms_given(call)
        given |= forms
        copies = {
            name: x.detach().to(device, copy=True, memory_format=torch.contiguous_format)
            for name, x in given.items()
        }
        try:
            with self._settings.applied():
                out, lse = self.form.run(
                    copies["q"],
                    copies["k"],
                    copies["v"],
                    kv_len=copies["kv_len"],
                    scale=call.scale,
                    **options,
                    **{name: copies[name] for name in forms},
                )
        except FormFailure as failure:
            raise KernelFailure(failure.kind, f"{self.function}: {failure}") from None
        except NotImplementedError as error:
            raise KernelFailure("unsupported", str(error) or "NotImplementedError") from None
        except torch.cuda.OutOfMemoryError:
            raise
        except MemoryError as error:
            raise MachineFailure(f"{self.function}: {error}", memory=True) from None
        except (Exception, SystemExit) as error:
            raise KernelFailure("raised", f"{self.function}: {type(error).__name__}: {error}") from error
        # Copied before anything else happens: the result may lie in what the callable writes next.
        found = out.detach().to(call.q.device, torch.float32, copy=True).contiguous()
        wide = torch.full(found.shape[:3], math.nan, device=found.device) if lse is None else lse.detach()
        wide = wide.to(call.q.device, torch.float32, copy=True).contiguous()
        for name, x in given.items():
            if not _same_bytes(copies[name].to(x.device), x):
                raise KernelFailure("wrote-inputs", f"{self.function}: wrote into its input {name}")
        self._shown = {"lse": lse is not None, "dtype": str(out.dtype).removeprefix("torch.")}
        return found, wide


def _same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.view(torch.uint8), b.contiguous().view(torch.uint8)) if a.numel() else True


def name_of_callable(function: Any) -> str:
    """What messages call it: `attend`, `Attention.forward`, `Attention` for an object of that class."""
    inner = getattr(function, "func", function)
    found = getattr(inner, "__qualname__", None) or getattr(inner, "__name__", None)
    if not isinstance(found, str):
        found = type(inner).__name__
    return found.replace("<locals>.", "").rpartition("..")[2]


def spec_of(function: Any) -> str:
    """How reports name it: as a specification that can be typed, where its module can be imported."""
    module = getattr(function, "__module__", None) or type(function).__module__
    return f"py:{module}::{name_of_callable(function)}".replace(",", ";")


def _module_source(function: Any) -> str:
    """The code of the module that it stands in; where it cannot be had, its own."""
    try:
        return inspect.getsource(inspect.getmodule(getattr(function, "func", function)))  # type: ignore[arg-type]
    except (OSError, TypeError):
        return _source(function)


def _source(function: Any) -> str:
    """Its code, as far as it can be had: two versions of a kernel are two binaries."""
    inner = getattr(function, "func", function)
    inner = getattr(inner, "__func__", inner)
    for each in (inner, type(inner)):
        try:
            return inspect.getsource(each)
        except (OSError, TypeError):
            continue
    return repr(type(inner)) + name_of_callable(function)
