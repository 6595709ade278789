"""Evidence that a changed attention kernel is still right: commands, experiments, verdicts and reports.

`verify.kernels`, `verify.model` and `verify.data` are the floors that it stands on. In a checkout their
folders lie beside this one, in an installed package inside it; the name is the same.
"""

from verify.checkout import find_floors

__version__ = "0.1.0"

find_floors()
