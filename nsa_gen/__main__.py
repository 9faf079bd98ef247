"""`python -m nsa_gen`: the command line, where the `nsa-gen` script is not on the path."""

import sys

from nsa_gen.cli import main

sys.exit(main())
