"""The laws of attention: what holds for every right kernel, merge and plan, each a named function.

`LAWS` holds them by name, in the order of their groups; `subject_of` makes of a specification what they are
asked of; `run.run_law` tries one on many cases and shrinks the case in which it fails.
"""

from verify.laws.cases import Parts, Problem, Rule
from verify.laws.law import GROUPS, LAWS, Law, LawBroken, Subject, subject_of

# Importing a module of laws puts them into LAWS. In the order of `GROUPS`.
from verify.laws import (  # isort: skip
    merge_laws, part_laws, attention_laws, option_laws, form_laws, cache_laws, plan_laws
)  # fmt: skip

__all__ = ["GROUPS", "LAWS", "Law", "LawBroken", "Parts", "Problem", "Rule", "Subject", "subject_of"]

del merge_laws, part_laws, attention_laws, option_laws, form_laws, cache_laws, plan_laws
