"""The text that is always there: the help topics that every CPython carries.

English prose about the Python language, some hundred thousand tokens: enough to run every experiment
without a network, too small and too unlike WikiText for its perplexity to mean anything elsewhere. It
changes from one Python release to the next, so the version is in the name and the hash says which text it
was.
"""

import platform

from verify.data.corpus import Corpus, corpus_from_bytes
from verify.data.errors import CorpusError


def embedded_corpus(*, notice: str | None = None) -> Corpus:
    """The values of `pydoc_data.topics.topics` in the order of their keys, a blank line between two of them.

    Raises CorpusError where this Python was built without its help topics.
    """
    name = f"embedded:pydoc_data.topics ({platform.python_implementation()} {platform.python_version()})"
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise CorpusError(
            f"{name}: expected the module pydoc_data, which this Python lacks; give a text with -f FILE"
        ) from None
    raw = "\n\n".join(topics[key].strip("\n") for key in sorted(topics)).encode("utf-8") + b"\n"
    return corpus_from_bytes(raw, name=name, source="embedded", notice=notice)
