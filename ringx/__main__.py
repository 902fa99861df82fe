"""python -m ringx"""

import sys

from .cli import main

sys.exit(main())
