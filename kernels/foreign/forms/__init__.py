"""How a user's callable is called: what its signature says, what its owner says, or what it shows when asked.

`form` is a call of one, `finding` which it is, `loading` where the callable comes from. Runs in the worker
too, by its place alone, and so imports torch, the standard library and what lies beside it.
"""

from .finding import form_of, plain_softmax, small_call
from .form import CALL_FORMS, Form, FormError, FormFailure, Wanted, pieces
from .loading import load_callable, load_module

__all__ = [
    "CALL_FORMS",
    "Form",
    "FormError",
    "FormFailure",
    "Wanted",
    "form_of",
    "load_callable",
    "load_module",
    "pieces",
    "plain_softmax",
    "small_call",
]
