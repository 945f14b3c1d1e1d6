"""`python -m lorikeet`."""

import sys

from lorikeet.cli.main import main

sys.exit(main())
