"""`python -m detr` is the command `detr`."""

import sys

from detr.cli import main

sys.exit(main())
