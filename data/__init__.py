"""Text, and the windows of tokens that are measured on it.

    corpora    a name or a file -> a text with its hash (`load_corpus`, `read_text_file`)
    windows    token ids -> the windows that perplexity is measured on (`cut_windows`)

and under them: `corpus` (what a text carries), `long_text` (a file that is not held), `rows` (a
data set's rows as one text), `hub` and `local` (where rows come from), `embedded` (the text for a
machine without a network), `errors`.

Tokenising lies between the two and is not done here; nothing here knows a model or a kernel.
"""

from verify.data.corpora import load_corpus, read_any_text, read_text_file
from verify.data.corpus import Corpus
from verify.data.embedded import embedded_corpus
from verify.data.errors import CorpusError
from verify.data.long_text import LongText
from verify.data.windows import Windows, cut_windows, strided_windows

__all__ = [
    "Corpus",
    "CorpusError",
    "LongText",
    "Windows",
    "cut_windows",
    "embedded_corpus",
    "load_corpus",
    "read_any_text",
    "read_text_file",
    "strided_windows",
]
