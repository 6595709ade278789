"""`python -m verify.model.dressing`: see `verify.model.dressing.dress`."""

import sys

from verify.model.dressing.dress import main

sys.exit(main(sys.argv[1:]))
